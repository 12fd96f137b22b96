//! Work that stops anywhere and goes on gives the bytes of work that never stopped.

mod common;

use std::fs;
use std::path::Path;

use common::{files, load, save, save_adapter, save_base, values, StopAt, Tensors, EXPERTS, HIDDEN, INNER, RANK};
use moeft_core::layout::{convert, Direction};
use moeft_core::merge::{merge, Options, Recipe};
use moeft_core::nf4;
use moeft_core::progress::{Progress, Silent};
use moeft_core::quantize::{self, quantize};
use moeft_core::{Error, Result};

const LAYERS: usize = 3;

fn recipe(folder: &Path) -> Recipe {
    Recipe::parse("merge_method: lora\nbase_model: base\nmodels: [{adapter: adapter}]", folder).unwrap()
}

fn prepared(spread: f32) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    save_base(&folder.path().join("base"), LAYERS);
    save_adapter(&folder.path().join("adapter"), LAYERS, spread);
    folder
}

/// Stops `work` at every call of its progress in turn, resumes it, and compares with an uninterrupted run. `work` returns
/// the bytes that it found of an earlier run.
fn check_every_stop(folder: &Path, work: impl Fn(&Path, &mut dyn Progress) -> Result<u64>) {
    let expected = folder.join("expected");
    let mut count = StopAt::new(usize::MAX);
    assert_eq!(work(&expected, &mut count).unwrap(), 0);
    let whole: u64 = load(&expected).values().map(|(_, bytes)| bytes.len() as u64).sum();
    let (mut resumed_most, mut resumed_each) = (0, 0);
    for call in 0..count.calls {
        let out = folder.join(format!("out-{call}"));
        assert!(matches!(work(&out, &mut StopAt::new(call)), Err(Error::Interrupted)));
        assert!(!out.exists(), "something is under the final name after stop {call}");
        let resumed = work(&out, &mut Silent).unwrap();
        assert!(resumed >= resumed_most, "a later stop keeps at least as much");
        resumed_each += u64::from(resumed > resumed_most);
        resumed_most = resumed;
        assert_eq!(files(&out), files(&expected), "stop {call}");
    }
    assert!(resumed_most * 4 > whole * 3, "{resumed_most} of {whole}: only the tensor at hand is made again");
    assert!(resumed_each > 2 * LAYERS as u64, "tensors are kept, not whole files alone");
}

/// Damages one bit of every file of a stage in turn, goes on, and compares with an uninterrupted run.
fn check_every_damage(folder: &Path, work: impl Fn(&Path, &mut dyn Progress) -> Result<u64>) {
    let expected = folder.join("expected");
    let mut count = StopAt::new(usize::MAX);
    work(&expected, &mut count).unwrap();
    let stop = |out: &Path| assert!(work(out, &mut StopAt::new(count.calls - 1)).is_err());
    let partial = |out: &Path| out.with_extension("partial");
    let undamaged = folder.join("undamaged");
    stop(&undamaged);
    let entries = fs::read_dir(partial(&undamaged)).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let names = names.filter(|name| name.ends_with("safetensors"));
    for (number, name) in names.chain([".moeft/journal.jsonl".to_string()]).enumerate() {
        for (part, place) in [0.0, 0.5, 0.999].into_iter().enumerate() {
            let out = folder.join(format!("damaged-{number}-{part}"));
            stop(&out);
            let path = partial(&out).join(&name);
            let mut bytes = fs::read(&path).unwrap();
            let place = (place * bytes.len() as f64) as usize;
            bytes[place] ^= 4;
            fs::write(&path, &bytes).unwrap();
            let resumed = work(&out, &mut Silent).unwrap();
            assert_eq!(files(&out), files(&expected), "{name}, byte {place}");
            // Without the plan nothing is known; else damage costs what it touched.
            assert!(resumed > 0 || (name.starts_with('.') && part == 0), "{name}, byte {place}");
        }
        let out = folder.join(format!("cut-{number}"));
        stop(&out);
        let path = partial(&out).join(&name);
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() * 2 / 3]).unwrap();
        assert!(work(&out, &mut Silent).unwrap() > 0);
        assert_eq!(files(&out), files(&expected), "{name}, cut");
    }
}

#[test]
fn a_merge_goes_on_after_every_stop() {
    let folder = prepared(0.1);
    check_every_stop(folder.path(), |out, progress| {
        Ok(merge(recipe(folder.path()), out, Options::default(), progress)?.bytes_resumed)
    });
}

#[test]
fn a_merge_whose_adapter_is_scaled_anew_does_not_go_on() {
    let folder = prepared(0.1);
    let out = folder.path().join("out");
    let start =
        |progress: &mut dyn Progress| merge(recipe(folder.path()), &out, Options::default(), progress).map(|_| ());
    assert!(matches!(start(&mut StopAt::new(9)), Err(Error::Interrupted)));
    let config = folder.path().join("adapter/adapter_config.json");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace("\"lora_alpha\":3", "\"lora_alpha\":5")).unwrap();
    let error = start(&mut Silent).unwrap_err();
    assert!(error.to_string().contains("interrupted run of another plan"), "{error}");
    fs::write(&config, text).unwrap();
    start(&mut Silent).unwrap();
}

#[test]
fn a_quantisation_goes_on_after_every_stop() {
    let folder = prepared(0.1);
    let options =
        quantize::Options { attention: true, double_quant: true, max_shard_bytes: 700, ..quantize::Options::default() };
    check_every_stop(folder.path(), |out, progress| {
        Ok(quantize(&folder.path().join("base"), out, &options, progress)?.bytes_resumed)
    });
}

#[test]
fn a_change_of_layout_goes_on_after_every_stop() {
    let folder = prepared(0.1);
    check_every_stop(folder.path(), |out, progress| {
        Ok(convert(&folder.path().join("base"), out, Direction::Unfuse, progress)?.bytes_resumed)
    });
}

#[test]
fn what_is_damaged_is_made_again() {
    let folder = prepared(0.1);
    check_every_damage(folder.path(), |out, progress| {
        Ok(merge(recipe(folder.path()), out, Options::default(), progress)?.bytes_resumed)
    });
    let folder = prepared(0.1);
    let options = quantize::Options { max_shard_bytes: 700, ..quantize::Options::default() };
    check_every_damage(folder.path(), |out, progress| {
        Ok(quantize(&folder.path().join("base"), out, &options, progress)?.bytes_resumed)
    });
}

#[test]
fn a_large_tensor_is_kept_in_parts_with_what_its_report_has_summed_up() {
    let folder = tempfile::tempdir().unwrap();
    for (name, seed) in [("a", 1), ("b", 2)] {
        fs::create_dir(folder.path().join(name)).unwrap();
        let tensors = Tensors::from([("model.x".to_string(), (vec![3000, 500], values(1_500_000, seed)))]);
        save(&folder.path().join(name).join("model.safetensors"), &tensors);
        fs::write(folder.path().join(name).join("config.json"), r#"{"model_type": "llama"}"#).unwrap();
    }
    for unit in ["tensor", "row"] {
        let text =
            format!("merge_method: slerp\nmodels: [{{model: a}}, {{model: b}}]\nparameters: {{t: 0.3, unit: {unit}}}");
        let work = |name: String, progress: &mut dyn Progress| {
            let recipe = Recipe::parse(&text, folder.path()).unwrap();
            merge(recipe, &folder.path().join(name), Options::default(), progress)
        };
        let mut count = StopAt::new(usize::MAX);
        work(format!("{unit}-expected"), &mut count).unwrap();
        assert!(work(format!("{unit}-out"), &mut StopAt::new(count.calls - 2)).is_err());
        let report = work(format!("{unit}-out"), &mut Silent).unwrap();
        assert!((4_000_000..6_000_000).contains(&report.bytes_resumed), "{}", report.bytes_resumed);
        let [out, expected] = ["out", "expected"].map(|part| files(&folder.path().join(format!("{unit}-{part}"))));
        assert_eq!(out, expected);
    }
}

#[test]
fn a_stop_while_finished_files_are_checked_loses_nothing() {
    let folder = prepared(0.1);
    let work = |name: &str, progress: &mut dyn Progress| {
        merge(recipe(folder.path()), &folder.path().join(name), Options::default(), progress)
    };
    let mut count = StopAt::new(usize::MAX);
    let whole = work("expected", &mut count).unwrap().bytes;
    assert!(work("out", &mut StopAt::new(count.calls - 1)).is_err());
    assert!(matches!(work("out", &mut StopAt::new(0)), Err(Error::Interrupted)));
    let report = work("out", &mut Silent).unwrap();
    assert_eq!((report.bytes_resumed, report.shards_resumed), (whole, LAYERS as u64));
    assert_eq!(files(&folder.path().join("out")), files(&folder.path().join("expected")));
}

#[test]
fn a_zero_adapter_is_the_identity() {
    let folder = prepared(0.0);
    let out = folder.path().join("out");
    let report = merge(recipe(folder.path()), &out, Options::default(), &mut Silent).unwrap();
    assert_eq!((report.tensors_merged, report.tensors_copied), (3 * LAYERS as u64, LAYERS as u64));
    let (before, after) = (files(&folder.path().join("base")), files(&out));
    for (name, bytes) in before.iter().filter(|(name, _)| *name != "model.safetensors.index.json") {
        assert_eq!(&after[name], bytes, "{name}");
    }
    let index: serde_json::Value = serde_json::from_slice(&after["model.safetensors.index.json"]).unwrap();
    assert_eq!(index["metadata"], serde_json::json!({"total_parameters": 7, "total_size": report.bytes}));
}

#[test]
fn factors_of_experts_are_laid_out_as_peft_does() {
    let folder = prepared(0.1);
    let out = folder.path().join("out");
    merge(recipe(folder.path()), &out, Options::default(), &mut Silent).unwrap();
    let after = load(&out);
    let (name, seed) = ("model.layers.1.experts.gate_up_proj", 1);
    let base = values(EXPERTS * 2 * INNER * HIDDEN, 10 + seed);
    let scaled = |values: Vec<f32>| values.into_iter().map(|value| value * 0.1).collect::<Vec<f32>>();
    let a = scaled(values(EXPERTS * RANK * HIDDEN, 500 + seed));
    let b = scaled(values(2 * INNER * RANK * EXPERTS, 600 + seed));
    let found: Vec<f32> =
        after[name].1.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect();
    for (index, found) in found.into_iter().enumerate() {
        let (expert, row, column) = (index / (2 * INNER * HIDDEN), index / HIDDEN % (2 * INNER), index % HIDDEN);
        let product = (0..RANK).fold(0.0f32, |sum, j| {
            b[row * RANK * EXPERTS + j * EXPERTS + expert].mul_add(a[(expert * RANK + j) * HIDDEN + column], sum)
        });
        assert_eq!(found.to_bits(), (base[index] + product * 1.5).to_bits(), "[{expert}, {row}, {column}]");
    }
}

#[test]
fn streaming_equals_quantising_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let base = save_base(&folder.path().join("base"), 1);
    let out = folder.path().join("out");
    quantize(&base, &out, &quantize::Options::default(), &mut Silent).unwrap();
    let (after, len) = (load(&out), 2 * INNER * HIDDEN);
    let layout = nf4::Layout { groups: EXPERTS, group_len: len, block_size: 64 };
    let (mut packed, mut absmax) = (vec![0; layout.packed_len()], vec![0.0; layout.absmax_len()]);
    nf4::quantize(&values(EXPERTS * len, 10), nf4::Codebook::Nf4, layout, &mut packed, &mut absmax).unwrap();
    let name = "model.layers.0.experts.gate_up_nf4";
    assert_eq!(after[&format!("{name}.packed")], (vec![EXPERTS, len / 2], packed));
    let absmax: Vec<u8> = absmax.iter().flat_map(|value| value.to_le_bytes()).collect();
    assert_eq!(after[&format!("{name}.absmax")], (vec![EXPERTS, len.div_ceil(64)], absmax));
}

#[test]
fn a_disk_that_is_too_small_is_refused_before_the_first_byte() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base");
    fs::create_dir(&base).unwrap();
    // A sparse file of 8 TiB takes no room on the disk, its copy would.
    let bytes = 8u64 << 40;
    let header = serde_json::json!({
        "model.layers.0.experts.gate_up_proj": {"dtype": "F32", "shape": [1, 2, 8], "data_offsets": [0, 64]},
        "other": {"dtype": "F32", "shape": [bytes / 4], "data_offsets": [64, 64 + bytes]},
    });
    let header = header.to_string();
    let path = base.join("model.safetensors");
    fs::write(&path, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat()).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(8 + header.len() as u64 + 64 + bytes).expect("a temporary folder that takes sparse files of 8 TiB");
    fs::write(base.join("config.json"), r#"{"model_type": "gemma4_text", "num_experts": 1}"#).unwrap();
    let out = folder.path().join("out");
    let error = quantize(&base, &out, &quantize::Options::default(), &mut StopAt::new(0)).unwrap_err();
    assert!(error.to_string().contains("more bytes but its disk has"), "{error}; is there a disk of 8 TiB?");
    assert!(!out.exists());
}
