//! Files read and written here, against the `safetensors` crate.

mod common;

use std::path::Path;

use moeft_core::checkpoint::{checksum, fingerprint, stamp, Checkpoint, Dtype, Header, ShardWriter, TensorSpec};
use moeft_core::progress::Silent;
use proptest::prelude::*;
use safetensors::SafeTensors;

fn specs() -> impl Strategy<Value = Vec<TensorSpec>> {
    let dtype = prop::sample::select(vec![Dtype::F32, Dtype::BF16, Dtype::U8, Dtype::I64, Dtype::F16, Dtype::BOOL]);
    let shape = prop::collection::vec(0u64..5, 0..4);
    prop::collection::btree_map("[a-z\u{e9}\"\\\\.]{1,8}", (dtype, shape), 0..8).prop_map(|tensors| {
        let spec = |(name, (dtype, shape))| TensorSpec { name, dtype, shape };
        tensors.into_iter().map(spec).collect()
    })
}

proptest! {
    #[test]
    fn the_header_parser_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200), file_bytes in 0u64..300) {
        let _ = Header::parse(Path::new("x"), bytes, file_bytes);
    }

    #[test]
    fn the_header_parser_never_panics_on_json(text in r#"\{("[a-c]{0,2}":\{"dtype":"[FU]32","shape":\[[0-9]{0,20}\],"data_offsets":\[[0-9]{1,20},[0-9]{1,20}\]\},?){0,3}\}"#) {
        let raw = (text.len() as u64).to_le_bytes().into_iter().chain(text.bytes()).collect::<Vec<u8>>();
        let file_bytes = raw.len() as u64 + 8;
        let ours = Header::parse(Path::new("x"), raw.clone(), file_bytes);
        let data: Vec<u8> = raw.into_iter().chain([0; 8]).collect();
        if ours.is_ok() {
            prop_assert!(SafeTensors::deserialize(&data).is_ok());
        }
    }

    #[test]
    fn what_is_written_is_what_safetensors_writes(specs in specs(), pieces in 1usize..20, seed: u64) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let data: Vec<(TensorSpec, Vec<u8>)> = specs.iter().enumerate().map(|(index, spec)| {
            let values = common::values(spec.bytes() as usize, seed ^ index as u64);
            (spec.clone(), values.iter().map(|value| (value.abs() * 255.0) as u8).collect())
        }).collect();
        let metadata = vec![("format".to_string(), "pt".to_string())];
        let mut writer = ShardWriter::create(&path, Header::layout(&path, specs, &metadata).unwrap()).unwrap();
        let longest = data.iter().map(|(_, bytes)| bytes.len()).max().unwrap_or(0);
        for start in (0..longest).step_by(pieces) {
            // Tensors are filled side by side.
            for (spec, bytes) in data.iter().filter(|(_, bytes)| start < bytes.len()) {
                writer.append(&spec.name, &bytes[start..bytes.len().min(start + pieces)]).unwrap();
            }
        }
        let written = writer.finish().unwrap();
        let views = data.iter().map(|(spec, bytes)| {
            let shape = spec.shape.iter().map(|&size| size as usize).collect();
            let dtype = serde_json::from_value(serde_json::json!(spec.dtype)).unwrap();
            (spec.name.clone(), safetensors::tensor::TensorView::new(dtype, shape, bytes).unwrap())
        });
        let theirs = safetensors::serialize(views, Some(metadata.into_iter().collect())).unwrap();
        prop_assert_eq!(std::fs::read(&path).unwrap(), theirs);
        prop_assert_eq!(checksum(&path, &mut Silent).unwrap(), written);
    }
}

#[test]
fn a_checksum_sees_every_byte() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    common::save(&path, &[("x".to_string(), (vec![3], vec![1.0, 2.0, 3.0]))].into());
    let bytes = std::fs::read(&path).unwrap();
    let before = checksum(&path, &mut Silent).unwrap();
    let data = bytes.len() - 12;
    for place in data..bytes.len() {
        let mut changed = bytes.clone();
        changed[place] ^= 0x10;
        std::fs::write(&path, changed).unwrap();
        assert_ne!(checksum(&path, &mut Silent).unwrap(), before, "byte {place}");
    }
}

#[test]
fn stamping_keeps_tensors_and_replaces_entries() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    common::save(&path, &[("x".to_string(), (vec![2], vec![1.0, 2.0])), ("y".to_string(), (vec![], vec![3.0]))].into());
    let before = common::load(folder.path());
    let fingerprint_before = fingerprint(&Checkpoint::open(&path).unwrap()).unwrap();
    stamp(&path, &[("a".into(), "1".into()), ("b".into(), "2".into())]).unwrap();
    stamp(&path, &[("a".into(), "\"3\"".into())]).unwrap();
    assert_eq!(common::load(folder.path()), before);
    let opened = Checkpoint::open(&path).unwrap();
    assert_eq!(opened.shards[0].header.metadata, [("a".into(), "\"3\"".into()), ("b".into(), "2".into())]);
    assert_eq!(fingerprint(&opened).unwrap(), fingerprint_before);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn a_checkpoint_without_tensors_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let refused = || Checkpoint::open(folder.path()).unwrap_err().to_string();
    std::fs::write(folder.path().join("model.safetensors.index.json"), r#"{"weight_map": {}}"#).unwrap();
    assert!(refused().contains("holds no tensors"));
    common::save(&folder.path().join("model.safetensors"), &common::Tensors::new());
    assert!(refused().contains("holds no tensors"));
}
