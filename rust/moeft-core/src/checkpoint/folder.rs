//! What a checkpoint folder holds beside weights: configuration, tokenizer, templates, index.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use serde_json::{json, Map, Value};

use super::disk::sync_folder;
use super::{CheckpointError, INDEX};
use crate::{Error, Result};

/// Endings of files that hold weights.
const WEIGHTS: &[&str] = &["safetensors", "bin", "pt", "pth", "ckpt", "gguf", "h5", "msgpack", "onnx"];

/// `config.json` of a checkpoint, with its fields in order.
#[derive(Debug, Clone)]
pub struct Config {
    /// The fields.
    pub fields: Map<String, Value>,
}

impl Config {
    /// Reads `folder/config.json`.
    ///
    /// # Errors
    /// [`CheckpointError::Config`] if it is missing or not a JSON object.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        let invalid = |cause: String| Error::from(CheckpointError::Config { path: path.clone(), cause });
        let text = fs::read(&path)
            .map_err(|error| invalid(format!("cannot read it: {error}; a checkpoint needs its config.json")))?;
        let fields = serde_json::from_slice(&text).map_err(|error| invalid(format!("not a JSON object: {error}")))?;
        Ok(Self { fields })
    }

    /// `model_type`.
    ///
    /// # Errors
    /// [`CheckpointError::Config`] if there is none.
    pub fn model_type(&self, folder: &Path) -> Result<&str> {
        self.fields.get("model_type").and_then(Value::as_str).ok_or_else(|| {
            let cause = "it has no model_type, which tells how the weights are laid out".to_string();
            CheckpointError::Config { path: folder.join("config.json"), cause }.into()
        })
    }

    /// A field of the text model: at the top, or in `text_config` of a multimodal model.
    pub fn text_field(&self, name: &str) -> Option<&Value> {
        self.fields.get("text_config").and_then(|text| text.get(name)).or_else(|| self.fields.get(name))
    }

    /// `quantization_config.quant_method`, if the weights are packed.
    pub fn quant_method(&self) -> Option<String> {
        let config = self.fields.get("quantization_config").filter(|config| !config.is_null())?;
        Some(config.get("quant_method").and_then(Value::as_str).unwrap_or("unknown").to_string())
    }

    /// Records another element type, where the configuration names one.
    pub fn set_dtype(&mut self, dtype: &str) {
        set_dtype_of(&mut self.fields, dtype);
        if let Some(text) = self.fields.get_mut("text_config").and_then(Value::as_object_mut) {
            set_dtype_of(text, dtype);
        }
    }
}

fn set_dtype_of(fields: &mut Map<String, Value>, dtype: &str) {
    for key in ["dtype", "torch_dtype"] {
        if let Some(value) = fields.get_mut(key) {
            *value = json!(dtype);
        }
    }
}

/// Copies everything that is not weights, an index or hidden, folders included.
///
/// # Errors
/// [`Error::Io`].
pub fn copy_side_files(source: &Path, target: &Path) -> Result<()> {
    for entry in fs::read_dir(source).map_err(Error::io("list", source))? {
        let entry = entry.map_err(Error::io("list", source))?;
        let (from, name) = (entry.path(), entry.file_name());
        let name = name.to_string_lossy();
        let kind = entry.file_type().map_err(Error::io("read", &from))?;
        let weights = Path::new(&*name).extension().is_some_and(|ending| WEIGHTS.iter().any(|known| ending == *known));
        if name.starts_with('.') || weights || name.ends_with(".index.json") {
            continue;
        }
        let to = target.join(&*name);
        if kind.is_dir() {
            fs::create_dir_all(&to).map_err(Error::io("create", &to))?;
            copy_side_files(&from, &to)?;
            sync_folder(&to)?;
        } else if from.is_file() {
            let mut reader = File::open(&from).map_err(Error::io("open", &from))?;
            let mut writer = File::create(&to).map_err(Error::io("create", &to))?;
            std::io::copy(&mut reader, &mut writer).map_err(Error::io("write", &to))?;
            writer.sync_all().map_err(Error::io("sync", &to))?;
        }
    }
    Ok(())
}

/// Writes JSON as Hugging Face does: indented by two, one newline at the end, on the disk when this returns.
///
/// # Errors
/// [`Error::Io`].
pub fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(value).expect("plain data always serializes");
    text.push(b'\n');
    let mut file = File::create(path).map_err(Error::io("create", path))?;
    file.write_all(&text).and_then(|()| file.sync_all()).map_err(Error::io("write", path))
}

/// Writes the index of a sharded checkpoint: true `total_size`, and the other metadata of `source`'s index if it has one.
///
/// # Errors
/// [`Error::Io`], [`CheckpointError::IndexInvalid`].
pub fn write_index(source: &Path, target: &Path, total_bytes: u64, places: &BTreeMap<String, String>) -> Result<()> {
    let original = source.join(INDEX);
    let mut metadata = Map::new();
    if original.is_file() {
        let text = fs::read(&original).map_err(Error::io("read", &original))?;
        let index: Value = serde_json::from_slice(&text)
            .map_err(|error| CheckpointError::IndexInvalid { path: original, cause: error.to_string() })?;
        metadata = index.get("metadata").and_then(Value::as_object).cloned().unwrap_or_default();
    }
    metadata.insert("total_size".into(), json!(total_bytes));
    write_json(&target.join(INDEX), &json!({"metadata": metadata, "weight_map": places}))
}
