//! `adapter_config.json` of PEFT: what scales the factors, and what cannot be merged.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::AdapterError;
use crate::{Error, Result};

/// Settings that change what a merged weight is, and why they are refused. A setting counts as off when it is absent,
/// null, false, empty, or `"none"`.
const UNSUPPORTED: &[(&str, &str)] = &[
    ("use_dora", "DoRA rescales whole columns of the weight, which is not LoRA; merge it with peft"),
    ("fan_in_fan_out", "the weights of the base are stored transposed; merge it with peft"),
    ("bias", "trained biases would be lost; train with bias=\"none\" or merge it with peft"),
    ("lora_bias", "trained biases would be lost; train with lora_bias=False or merge it with peft"),
    ("modules_to_save", "whole modules were trained, which a LoRA merge would lose; merge it with peft"),
    ("trainable_token_indices", "trained embeddings would be lost; merge it with peft"),
    ("layer_replication", "the adapter's model has other layers than the base; merge it with peft"),
    ("use_qalora", "QA-LoRA pools the inputs, which is not LoRA; merge it with peft"),
    ("use_bdlora", "BD-LoRA has block-diagonal factors; merge it with peft"),
    ("alora_invocation_tokens", "an activated LoRA acts on some tokens only and cannot be merged"),
    ("arrow_config", "Arrow routes between adapters and cannot be merged"),
    ("velora_config", "VeLoRA is not plain LoRA; merge it with peft"),
    ("kasa_config", "KaSA is not plain LoRA; merge it with peft"),
    ("monteclora_config", "MonteCLoRA is not plain LoRA; merge it with peft"),
];

/// Ways of initialising that change the base weights too, so that the factors alone do not fit the base on disk.
const CHANGES_BASE: &[&str] = &["pissa", "olora", "corda", "loftq", "lora_ga"];

/// What `adapter_config.json` says about the factors.
#[derive(Debug)]
pub struct AdapterConfig {
    /// Parameters that were targeted directly, such as `experts.gate_up_proj`.
    pub target_parameters: Vec<String>,
    /// Version of PEFT that wrote the adapter.
    pub peft_version: Option<String>,
    path: PathBuf,
    b_layout: Option<String>,
    written_by_unsloth: bool,
    rank: f64,
    alpha: f64,
    use_rslora: bool,
    rank_pattern: Map<String, Value>,
    alpha_pattern: Map<String, Value>,
}

impl AdapterConfig {
    /// Reads and checks `folder/adapter_config.json`.
    ///
    /// # Errors
    /// [`AdapterError::Missing`], [`AdapterError::NotLora`], [`AdapterError::Unsupported`], [`AdapterError::Config`].
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("adapter_config.json");
        if !path.is_file() {
            return Err(AdapterError::Missing { path }.into());
        }
        let invalid = |cause: String| AdapterError::Config { path: path.clone(), cause };
        let text = std::fs::read(&path).map_err(Error::io("read", &path))?;
        let fields: Map<String, Value> =
            serde_json::from_slice(&text).map_err(|error| invalid(format!("not a JSON object: {error}")))?;
        refuse(&path, &fields)?;
        let number = |name: &str| {
            let value = fields.get(name).and_then(Value::as_f64);
            value.ok_or_else(|| {
                invalid(format!("{name} is {}, expected a number", fields.get(name).unwrap_or(&Value::Null)))
            })
        };
        let pattern = |name: &str| fields.get(name).and_then(Value::as_object).cloned().unwrap_or_default();
        let names = fields.get("target_parameters").and_then(Value::as_array).cloned().unwrap_or_default();
        Ok(Self {
            target_parameters: names.iter().filter_map(Value::as_str).map(str::to_string).collect(),
            peft_version: fields.get("peft_version").and_then(Value::as_str).map(str::to_string),
            b_layout: fields.get("lora_B_layout").and_then(Value::as_str).map(str::to_string),
            written_by_unsloth: fields.get("auto_mapping").and_then(|mapping| mapping.get("unsloth_fixed")).is_some()
                || fields
                    .get("base_model_name_or_path")
                    .and_then(Value::as_str)
                    .is_some_and(|name| name.starts_with("unsloth/")),
            rank: number("r")?,
            alpha: number("lora_alpha")?,
            use_rslora: fields.get("use_rslora").and_then(Value::as_bool).unwrap_or(false),
            rank_pattern: pattern("rank_pattern"),
            alpha_pattern: pattern("alpha_pattern"),
            path,
        })
    }

    /// Rank and scaling of the module or parameter `key`, such as `model.layers.0.experts.gate_up_proj`.
    ///
    /// # Errors
    /// [`AdapterError::Config`] if a pattern is no regular expression or a rank is no positive number.
    pub fn rank_and_scaling(&self, key: &str) -> Result<(u64, f32)> {
        let rank = self.lookup(&self.rank_pattern, key)?.unwrap_or(self.rank);
        let alpha = self.lookup(&self.alpha_pattern, key)?.unwrap_or(self.alpha);
        if rank < 1.0 || rank.fract() != 0.0 {
            return Err(AdapterError::Config {
                path: self.path.clone(),
                cause: format!("the rank of {key} is {rank}"),
            }
            .into());
        }
        // PEFT divides in f64; torch then multiplies an f32 tensor by the quotient rounded to f32.
        let scaling = alpha / if self.use_rslora { rank.sqrt() } else { rank };
        Ok((rank as u64, scaling as f32))
    }

    /// The first pattern that matches the end of `key`, as `peft.utils.other.get_pattern_key` does.
    fn lookup(&self, patterns: &Map<String, Value>, key: &str) -> Result<Option<f64>> {
        for (pattern, value) in patterns {
            let invalid = |cause: String| AdapterError::Config { path: self.path.clone(), cause };
            let expression = regex_lite::Regex::new(&format!(r"^(?:.*\.)?(?:{pattern})$"))
                .map_err(|error| invalid(format!("{pattern:?} is no pattern: {error}")))?;
            if expression.is_match(key) {
                let value =
                    value.as_f64().ok_or_else(|| invalid(format!("{pattern:?} is {value}, expected a number")))?;
                return Ok(Some(value));
            }
        }
        Ok(None)
    }

    /// Refuses a PEFT whose expert adapters have inputs and outputs the other way round, and an adapter of unsloth whose
    /// columns of B lie in another order, or in one that nothing tells: `stamped` says that the file names its layout.
    ///
    /// # Errors
    /// [`AdapterError::OldExpertLayout`], [`AdapterError::ForeignLayout`].
    pub fn check_expert_layout(&self, stamped: bool) -> Result<()> {
        let mark = match self.b_layout.as_deref() {
            Some("rank_major") => None,
            Some(order) => Some(format!("lora_B_layout is {order:?}")),
            None if self.written_by_unsloth && !stamped => Some("unsloth wrote it without lora_B_layout".to_string()),
            None => None,
        };
        if let Some(mark) = mark {
            return Err(AdapterError::ForeignLayout { path: self.path.clone(), mark }.into());
        }
        let version = self.peft_version.as_deref().unwrap_or("not recorded");
        let numbers: Vec<u32> = version.split(['.', '@', '+']).map_while(|part| part.parse().ok()).collect();
        let development = version.contains("dev") || version.contains("rc");
        let known = match numbers.as_slice() {
            // The swap came between 0.19.0 and 0.19.1, so development versions of 0.19 do not tell.
            [0, 19, ..] => numbers[..] >= [0, 19, 1][..] && !development,
            _ => numbers[..] >= [0, 20][..],
        };
        if known {
            return Ok(());
        }
        Err(AdapterError::OldExpertLayout { path: self.path.clone(), version: version.to_string() }.into())
    }
}

fn refuse(path: &Path, fields: &Map<String, Value>) -> Result<()> {
    let peft_type = fields.get("peft_type").and_then(Value::as_str).unwrap_or("");
    if peft_type != "LORA" {
        return Err(AdapterError::NotLora { path: path.into(), peft_type: peft_type.to_string() }.into());
    }
    let refused = |setting, value: &Value, reason| {
        Err(AdapterError::Unsupported { path: path.into(), setting, value: value.to_string(), reason }.into())
    };
    for &(setting, reason) in UNSUPPORTED {
        match fields.get(setting) {
            None | Some(Value::Null | Value::Bool(false)) => {}
            Some(Value::String(text)) if text == "none" => {}
            Some(Value::Array(items)) if items.is_empty() => {}
            Some(Value::Object(items)) if items.is_empty() => {}
            Some(value) => return refused(setting, value, reason),
        }
    }
    match fields.get("init_lora_weights") {
        Some(value @ Value::String(text)) if CHANGES_BASE.iter().any(|way| text.starts_with(way)) => {
            refused("init_lora_weights", value, "it changed the base weights too; save the adapter converted to plain LoRA (path_initial_model_for_weight_conversion)")
        }
        _ => Ok(()),
    }
}
