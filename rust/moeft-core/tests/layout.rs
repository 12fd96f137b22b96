//! Experts fused and taken apart on disk.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use common::{files, load, StopAt};
use moeft_core::layout::{convert, Direction};
use moeft_core::progress::Silent;
use moeft_core::Error;
use proptest::prelude::*;
use safetensors::tensor::TensorView;
use safetensors::Dtype;

/// Shape and bytes by name.
type Tensors = BTreeMap<String, (Vec<usize>, Vec<u8>)>;

/// Sizes of the experts of a small model.
#[derive(Debug, Clone, Copy)]
struct Model {
    model_type: &'static str,
    experts: usize,
    inner: usize,
    hidden: usize,
    dtype: Dtype,
}

const GEMMA: Model = Model { model_type: "gemma4_text", experts: 3, inner: 5, hidden: 7, dtype: Dtype::BF16 };
const QWEN: Model = Model { model_type: "qwen3_moe", ..GEMMA };
const GPT_OSS: Model = Model { model_type: "gpt_oss", ..GEMMA };

impl Model {
    fn is_gpt_oss(self) -> bool {
        self.model_type == "gpt_oss"
    }

    fn module(self) -> &'static str {
        if self.model_type == "gemma4_text" {
            "experts"
        } else {
            "mlp.experts"
        }
    }

    /// Stacks of one layer, and a norm.
    fn layer(self, index: usize) -> Tensors {
        let Self { experts, inner, hidden, .. } = self;
        let mut tensors = Tensors::new();
        let mut add = |name: String, shape: Vec<usize>| {
            let bytes = bytes(shape.iter().product::<usize>() * self.dtype.bitsize() / 8, tensors.len() + 99 * index);
            tensors.insert(format!("model.layers.{index}.{name}"), (shape, bytes));
        };
        let module = self.module();
        if self.is_gpt_oss() {
            add(format!("{module}.gate_up_proj"), vec![experts, hidden, 2 * inner]);
            add(format!("{module}.gate_up_proj_bias"), vec![experts, 2 * inner]);
            add(format!("{module}.down_proj"), vec![experts, inner, hidden]);
            add(format!("{module}.down_proj_bias"), vec![experts, hidden]);
        } else {
            add(format!("{module}.gate_up_proj"), vec![experts, 2 * inner, hidden]);
            add(format!("{module}.down_proj"), vec![experts, hidden, inner]);
        }
        add("input_layernorm.weight".into(), vec![hidden]);
        tensors
    }

    fn config(self) -> String {
        let Self { model_type, experts, hidden, .. } = self;
        format!(
            r#"{{"model_type": "{model_type}", "num_local_experts": {experts}, "num_experts": {experts}, "hidden_size": {hidden}}}"#
        )
    }

    /// Writes a checkpoint of these files, with something beside the weights.
    fn save(self, folder: PathBuf, shards: &[Tensors]) -> PathBuf {
        fs::create_dir_all(&folder).unwrap();
        let mut map = serde_json::Map::new();
        for (index, tensors) in shards.iter().enumerate() {
            let file = match shards.len() {
                1 => "model.safetensors".to_string(),
                count => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
            };
            map.extend(tensors.keys().map(|name| (name.clone(), file.clone().into())));
            let view = |(shape, bytes)| TensorView::new(self.dtype, Vec::clone(shape), bytes).unwrap();
            let views = tensors.iter().map(|(name, (shape, bytes))| (name, view((shape, bytes))));
            fs::write(folder.join(file), safetensors::serialize(views, None).unwrap()).unwrap();
        }
        if shards.len() > 1 {
            let total: usize = shards.iter().flat_map(BTreeMap::values).map(|(_, bytes)| bytes.len()).sum();
            let index = serde_json::json!({"metadata": {"note": "kept", "total_size": total}, "weight_map": map});
            let text = serde_json::to_string_pretty(&index).unwrap() + "\n";
            fs::write(folder.join("model.safetensors.index.json"), text).unwrap();
        }
        fs::write(folder.join("config.json"), self.config()).unwrap();
        fs::write(folder.join("tokenizer.json"), "{\"kept\":  true}").unwrap();
        folder
    }
}

/// Bytes that hardly repeat.
fn bytes(count: usize, seed: usize) -> Vec<u8> {
    let word = |index: usize| (index as u32 + 7919 * seed as u32).wrapping_mul(0x9e37_79b9).to_le_bytes();
    (0..count.div_ceil(4)).flat_map(word).take(count).collect()
}

fn unfuse(source: &Path, out: &Path) {
    convert(source, out, Direction::Unfuse, &mut Silent).unwrap();
}

fn fuse(source: &Path, out: &Path) {
    convert(source, out, Direction::Fuse, &mut Silent).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn taking_apart_and_fusing_again_gives_the_same_files(
        experts in 1usize..5, inner in 1usize..40, hidden in 1usize..40,
        dtype in prop::sample::select(vec![Dtype::BF16, Dtype::F16, Dtype::F32]),
        kind in prop::sample::select(vec![GEMMA, QWEN, GPT_OSS]), layers in 1usize..4,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let model = Model { experts, inner, hidden, dtype, ..kind };
        let shards: Vec<_> = (0..layers).map(|index| model.layer(index)).collect();
        let source = model.save(folder.path().join("source"), &shards);
        let (apart, again) = (folder.path().join("apart"), folder.path().join("again"));
        unfuse(&source, &apart);
        fuse(&apart, &again);
        prop_assert_eq!(files(&source), files(&again));
        let stacks = if model.is_gpt_oss() { 6 } else { 3 };
        prop_assert_eq!(load(&apart).len(), layers * (stacks * experts + 1));
    }
}

#[test]
fn every_element_goes_where_the_layout_says() {
    for model in [QWEN, GPT_OSS] {
        let folder = tempfile::tempdir().unwrap();
        let Model { experts, inner, hidden, .. } = model;
        let source = model.save(folder.path().join("source"), &[model.layer(0)]);
        let apart = folder.path().join("apart");
        unfuse(&source, &apart);
        let (fused, apart) = (load(&source), load(&apart));
        let element = |tensors: &Tensors, name: String, index: usize| {
            let (_, bytes) = &tensors[&format!("model.layers.0.mlp.experts.{name}")];
            u16::from_le_bytes([bytes[2 * index], bytes[2 * index + 1]])
        };
        for e in 0..experts {
            for (i, h) in (0..inner).flat_map(|i| (0..hidden).map(move |h| (i, h))) {
                let (gate, up, down) = if model.is_gpt_oss() {
                    let row = (e * hidden + h) * 2 * inner;
                    (row + 2 * i, row + 2 * i + 1, (e * inner + i) * hidden + h)
                } else {
                    let row = e * 2 * inner + i;
                    (row * hidden + h, (row + inner) * hidden + h, (e * hidden + h) * inner + i)
                };
                for (name, stack, place, here) in [
                    ("gate_proj", "gate_up_proj", gate, i * hidden + h),
                    ("up_proj", "gate_up_proj", up, i * hidden + h),
                    ("down_proj", "down_proj", down, h * inner + i),
                ] {
                    let found = element(&apart, format!("{e}.{name}.weight"), here);
                    assert_eq!(found, element(&fused, stack.into(), place), "{name} of {e} at ({i}, {h})");
                }
            }
        }
        if model.is_gpt_oss() {
            for (e, i) in (0..experts).flat_map(|e| (0..inner).map(move |i| (e, i))) {
                let up = element(&apart, format!("{e}.up_proj.bias"), i);
                assert_eq!(up, element(&fused, "gate_up_proj_bias".into(), e * 2 * inner + 2 * i + 1));
            }
        }
    }
}

#[test]
fn a_large_matrix_is_rearranged_tile_by_tile() {
    // 17 MiB a stack: three tiles of 8 MiB, the last one not full.
    let model = Model { experts: 1, inner: 1500, hidden: 3000, dtype: Dtype::BF16, ..GPT_OSS };
    let folder = tempfile::tempdir().unwrap();
    let source = model.save(folder.path().join("source"), &[model.layer(0)]);
    unfuse(&source, &folder.path().join("apart"));
    fuse(&folder.path().join("apart"), &folder.path().join("again"));
    assert!(files(&source) == files(&folder.path().join("again")));
    let (shape, up) = &load(&folder.path().join("apart"))["model.layers.0.mlp.experts.0.up_proj.weight"];
    assert_eq!(shape, &[1500, 3000]);
    let fused = &load(&source)["model.layers.0.mlp.experts.gate_up_proj"].1;
    for (i, h) in [(0, 0), (1499, 2999), (1397, 1), (1398, 2), (1, 2998)] {
        assert_eq!(up[2 * (i * 3000 + h)..][..2], fused[2 * (h * 3000 + 2 * i + 1)..][..2], "({i}, {h})");
    }
}

#[test]
fn a_stack_lands_in_the_file_of_its_first_expert() {
    let folder = tempfile::tempdir().unwrap();
    let whole = QWEN.save(folder.path().join("whole"), &[QWEN.layer(0)]);
    unfuse(&whole, &folder.path().join("apart"));
    let mut tensors = load(&folder.path().join("apart")).into_iter();
    // Names are sorted, so the last expert's tensors and the norm before them are cut from the others.
    let first: Tensors = tensors.by_ref().take(7).collect();
    let rest: Tensors = tensors.collect();
    assert!(rest.keys().all(|name| name.contains("experts.2")));
    let spread = QWEN.save(folder.path().join("spread"), &[first, rest]);
    let out = folder.path().join("out");
    fuse(&spread, &out);
    assert!(load(&out) == load(&whole));
    let index: serde_json::Value = serde_json::from_slice(&files(&out)["model.safetensors.index.json"]).unwrap();
    let places = index["weight_map"].as_object().unwrap();
    assert_eq!(places.len(), 3);
    assert!(places.values().all(|file| file == "model-00001-of-00002.safetensors"));
    assert_eq!(index["metadata"]["note"], "kept");
    assert!(!out.join("model-00002-of-00002.safetensors").exists(), "a file without tensors is not written");
}

#[test]
fn a_conversion_goes_on_after_every_stop() {
    let folder = tempfile::tempdir().unwrap();
    let source = GPT_OSS.save(folder.path().join("source"), &[GPT_OSS.layer(0), GPT_OSS.layer(1)]);
    let mut count = StopAt::new(usize::MAX);
    let expected = folder.path().join("expected");
    convert(&source, &expected, Direction::Unfuse, &mut count).unwrap();
    for call in 0..count.calls {
        let out = folder.path().join(format!("out-{call}"));
        let stopped = convert(&source, &out, Direction::Unfuse, &mut StopAt::new(call));
        assert!(matches!(stopped, Err(Error::Interrupted)));
        assert!(!out.exists());
        let report = convert(&source, &out, Direction::Unfuse, &mut Silent).unwrap();
        assert_eq!(report.shards_resumed, u64::from(call >= count.calls / 2), "stop {call}");
        assert_eq!(files(&out), files(&expected), "stop {call}");
    }
}

/// The message with which `tensors` are refused.
fn refused(model: Model, config: &str, tensors: Tensors, direction: Direction) -> String {
    let folder = tempfile::tempdir().unwrap();
    let source = model.save(folder.path().join("source"), &[tensors]);
    fs::write(source.join("config.json"), config).unwrap();
    let out = folder.path().join("out");
    let error = convert(&source, &out, direction, &mut StopAt::new(0)).unwrap_err();
    assert!(!out.exists());
    assert!(!folder.path().join("out.partial").exists(), "refused before the first byte");
    error.to_string()
}

fn apart(model: Model) -> Tensors {
    let folder = tempfile::tempdir().unwrap();
    let source = model.save(folder.path().join("source"), &[model.layer(0)]);
    unfuse(&source, &folder.path().join("apart"));
    load(&folder.path().join("apart"))
}

fn without(mut tensors: Tensors, name: &str) -> Tensors {
    tensors.remove(&format!("model.layers.0.mlp.experts.{name}")).expect("a tensor to remove");
    tensors
}

fn with(mut tensors: Tensors, name: &str, shape: &[usize]) -> Tensors {
    let bytes = bytes(shape.iter().product::<usize>() * 2, 1);
    tensors.insert(format!("model.layers.0.mlp.experts.{name}"), (shape.to_vec(), bytes));
    tensors
}

#[test]
fn experts_that_do_not_fit_are_refused_before_the_first_byte() {
    use Direction::{Fuse, Unfuse};
    let (fused, single) = (QWEN.layer(0), apart(QWEN));
    let mixed: Tensors = fused.clone().into_iter().chain(single.clone()).collect();
    let dense = fused.clone().into_iter().filter(|(name, _)| name.contains("norm")).collect();
    let cases = [
        (mixed.clone(), Fuse, "gate_up_proj is fused already, expected per expert as model.layers.0"),
        (mixed, Unfuse, "is per expert already, expected fused as"),
        (fused.clone(), Fuse, "is fused already, expected per expert; nothing is left to do"),
        (single.clone(), Unfuse, "is per expert already, expected fused; nothing is left to do"),
        (dense, Unfuse, "model.layers.0.mlp.experts.gate_up_proj or mlp.experts.0.gate_proj.weight is missing"),
        (without(fused.clone(), "down_proj"), Unfuse, "mlp.experts.down_proj is missing"),
        (without(single.clone(), "1.up_proj.weight"), Fuse, "mlp.experts.1.up_proj.weight is missing"),
        (without(single.clone(), "0.gate_proj.weight"), Fuse, "mlp.experts.0.gate_proj.weight is missing"),
        (with(single.clone(), "3.up_proj.weight", &[5, 7]), Fuse, "of 4 experts, expected 3 as config.json says"),
        (
            with(single.clone(), "2.up_proj.weight", &[5, 8]),
            Fuse,
            "2.up_proj.weight is BF16 [5, 8], expected BF16 [5, 7]",
        ),
        (with(single.clone(), "2.up_proj.scale", &[5]), Fuse, "2.up_proj.scale is part of the experts"),
        (with(single.clone(), "0.gate_proj.weight", &[35]), Fuse, "is BF16 [35], expected [intermediate, hidden]"),
        (with(fused.clone(), "down_proj", &[3, 7, 6]), Unfuse, "down_proj is BF16 [3, 7, 6], expected BF16 [3, 7, 5]"),
        (with(fused.clone(), "gate_up_proj", &[3, 9, 7]), Unfuse, "is BF16 [3, 9, 7], expected BF16 [3, 8, 7]"),
        (with(fused.clone(), "gate_up_proj", &[3, 7, 10]), Unfuse, "expected hidden_size 7, not 10"),
        (with(fused.clone(), "gate_up_proj", &[2, 10, 7]), Unfuse, "of 2 experts, expected 3 as config.json says"),
        (with(fused, "gate_up_proj", &[3, 0, 7]), Unfuse, "without empty axes"),
    ];
    for (tensors, direction, expected) in cases {
        let message = refused(QWEN, &QWEN.config(), tensors, direction);
        assert!(message.contains(expected), "{message}\nexpected: {expected}");
    }
    let message = refused(GPT_OSS, &GPT_OSS.config(), without(GPT_OSS.layer(0), "down_proj_bias"), Unfuse);
    assert!(message.contains("down_proj_bias is missing"), "{message}");
}

#[test]
fn other_models_are_refused() {
    let refused = |config: &str| refused(QWEN, config, QWEN.layer(0), Direction::Unfuse);
    // A model of an unknown type is known by its tensors; these say nothing about experts.
    let norms: Tensors = QWEN.layer(0).into_iter().filter(|(name, _)| name.contains("norm")).collect();
    let unknown = self::refused(QWEN, r#"{"model_type": "qwen9"}"#, norms, Direction::Unfuse);
    assert!(unknown.contains("model_type is \"qwen9\", which no family file knows"), "{unknown}");
    let packed = r#"{"model_type": "qwen3_moe", "quantization_config": {"quant_method": "mxfp4"}}"#;
    assert!(refused(packed).contains("is packed already (quantization_config.quant_method is \"mxfp4\")"));
    let integers = Model { dtype: Dtype::I16, ..QWEN };
    let message = self::refused(integers, &QWEN.config(), QWEN.layer(0), Direction::Unfuse);
    assert!(message.contains("gate_up_proj is I16 [3, 10, 7], expected F32, BF16 or F16"), "{message}");
}
