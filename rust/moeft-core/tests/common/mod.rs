//! A small Gemma-4 checkpoint and an adapter for it, written with the `safetensors` crate.
#![allow(dead_code)] // Each test file uses a part.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use moeft_core::progress::Progress;
use moeft_core::{Error, Result};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

pub const EXPERTS: usize = 3;
pub const HIDDEN: usize = 10;
pub const INNER: usize = 7;
pub const RANK: usize = 2;

/// Finite values in (-1, 1), the same for the same seed.
pub fn values(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

pub type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

pub fn save(path: &Path, tensors: &Tensors) {
    let bytes: BTreeMap<&String, Vec<u8>> = tensors
        .iter()
        .map(|(name, (_, values))| (name, values.iter().flat_map(|value| value.to_le_bytes()).collect()))
        .collect();
    let views = tensors
        .iter()
        .map(|(name, (shape, _))| (name, TensorView::new(Dtype::F32, shape.clone(), &bytes[name]).unwrap()));
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// Base with one shard per layer, F32.
pub fn save_base(folder: &Path, layers: usize) -> PathBuf {
    fs::create_dir_all(folder).unwrap();
    let mut map = serde_json::Map::new();
    for layer in 0..layers {
        let prefix = format!("model.layers.{layer}");
        let seed = layer as u64;
        let mut tensors = Tensors::new();
        let mut add = |name: &str, shape: Vec<usize>, seed| {
            let count = shape.iter().product();
            tensors.insert(format!("{prefix}.{name}"), (shape, values(count, seed)));
        };
        add("experts.gate_up_proj", vec![EXPERTS, 2 * INNER, HIDDEN], 10 + seed);
        add("experts.down_proj", vec![EXPERTS, HIDDEN, INNER], 20 + seed);
        add("self_attn.q_proj.weight", vec![6, HIDDEN], 30 + seed);
        add("input_layernorm.weight", vec![HIDDEN], 40 + seed);
        let file = format!("model-{:05}-of-{layers:05}.safetensors", layer + 1);
        save(&folder.join(&file), &tensors);
        map.extend(tensors.into_keys().map(|name| (name, file.clone().into())));
    }
    let index = serde_json::json!({"metadata": {"total_parameters": 7}, "weight_map": map});
    fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
    let config = format!(r#"{{"model_type": "gemma4_text", "num_experts": {EXPERTS}, "rope": {{"theta": 1e6}}}}"#);
    fs::write(folder.join("config.json"), config).unwrap();
    folder.to_path_buf()
}

/// Adapter of attention and both stacks in every layer.
pub fn save_adapter(folder: &Path, layers: usize, spread: f32) -> PathBuf {
    fs::create_dir_all(folder).unwrap();
    let mut tensors = Tensors::new();
    for layer in 0..layers {
        let mut add = |name: &str, shape: [usize; 2], seed| {
            let data = values(shape[0] * shape[1], seed + layer as u64).iter().map(|value| value * spread).collect();
            tensors.insert(format!("base_model.model.model.layers.{layer}.{name}.weight"), (shape.to_vec(), data));
        };
        add("self_attn.q_proj.lora_A", [RANK, HIDDEN], 100);
        add("self_attn.q_proj.lora_B", [6, RANK], 200);
        add("experts.lora_A", [EXPERTS * RANK, INNER], 300);
        add("experts.lora_B", [HIDDEN, RANK * EXPERTS], 400);
        add("experts.base_layer.lora_A", [EXPERTS * RANK, HIDDEN], 500);
        add("experts.base_layer.lora_B", [2 * INNER, RANK * EXPERTS], 600);
    }
    save(&folder.join("adapter_model.safetensors"), &tensors);
    let config = serde_json::json!({
        "peft_type": "LORA", "peft_version": "0.21.2", "r": RANK, "lora_alpha": 3,
        "target_parameters": ["experts.down_proj", "experts.gate_up_proj"],
    });
    fs::write(folder.join("adapter_config.json"), config.to_string()).unwrap();
    folder.to_path_buf()
}

/// Every tensor of a folder: shape and bytes.
pub fn load(folder: &Path) -> BTreeMap<String, (Vec<usize>, Vec<u8>)> {
    let mut tensors = BTreeMap::new();
    for (name, bytes) in files(folder).into_iter().filter(|(name, _)| name.ends_with(".safetensors")) {
        let parsed = SafeTensors::deserialize(&bytes).unwrap_or_else(|error| panic!("{name}: {error}"));
        for (name, view) in parsed.tensors() {
            tensors.insert(name, (view.shape().to_vec(), view.data().to_vec()));
        }
    }
    tensors
}

/// Every file of a folder by name.
pub fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    entries.map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())).collect()
}

/// Stops the work at the call of this number.
pub struct StopAt {
    pub call: usize,
    pub calls: usize,
}

impl StopAt {
    pub fn new(call: usize) -> Self {
        Self { call, calls: 0 }
    }
}

impl Progress for StopAt {
    fn start(&mut self, _total_bytes: u64) {}

    fn advance(&mut self, _bytes: u64, _what: &str) -> Result<()> {
        self.calls += 1;
        if self.calls > self.call {
            Err(Error::Interrupted)
        } else {
            Ok(())
        }
    }
}
