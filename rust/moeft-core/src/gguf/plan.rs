//! Which type each tensor gets. The choices are llama.cpp's own (`llama-quant.cpp`, MIT), without an importance matrix.

use regex_lite::Regex;
use serde::{Deserialize, Serialize};

use super::GgmlType;
use crate::{Error, Result};

/// What the whole file is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(non_camel_case_types, missing_docs)] // The names are llama.cpp's.
pub enum FileType {
    F32,
    F16,
    BF16,
    Q8_0,
    Q6_K,
    Q5_K_M,
    Q4_K_M,
}

impl FileType {
    /// Value of `general.file_type`.
    pub fn id(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q8_0 => 7,
            Self::Q4_K_M => 15,
            Self::Q5_K_M => 17,
            Self::Q6_K => 18,
            Self::BF16 => 32,
        }
    }

    /// Type of a tensor that no rule concerns.
    fn default_type(self) -> GgmlType {
        match self {
            Self::F32 => GgmlType::F32,
            Self::F16 => GgmlType::F16,
            Self::BF16 => GgmlType::BF16,
            Self::Q8_0 => GgmlType::Q8_0,
            Self::Q6_K => GgmlType::Q6_K,
            Self::Q5_K_M => GgmlType::Q5_K,
            Self::Q4_K_M => GgmlType::Q4_K,
        }
    }

    /// Whether some tensors get more bits.
    fn is_mixed(self) -> bool {
        matches!(self, Self::Q4_K_M | Self::Q5_K_M)
    }
}

/// What the choice depends on.
#[derive(Debug, Clone)]
pub struct Weight<'a> {
    /// Name, as llama.cpp knows it.
    pub name: &'a str,
    /// Sizes, slowest axis first.
    pub shape: &'a [u64],
    /// Type that keeps the source's bits, for matrices that stay as they are.
    pub source: GgmlType,
}

/// The tensors of a model and what is asked for.
#[derive(Debug, Clone)]
pub struct Rules {
    /// What the whole file is called.
    pub file_type: FileType,
    /// Decoder layers.
    pub num_layers: u64,
    /// Experts per layer; 0 in a dense model.
    pub num_experts: u64,
    /// Patterns of names and their types; the first that matches wins over llama.cpp's choice.
    pub overrides: Vec<(Regex, GgmlType)>,
}

impl Rules {
    /// Compiles overrides.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a pattern that is no regular expression.
    pub fn overrides(patterns: &[(String, GgmlType)]) -> Result<Vec<(Regex, GgmlType)>> {
        let compile = |(pattern, kind): &(String, GgmlType)| {
            let regex = Regex::new(pattern).map_err(|error| {
                Error::invalid("tensor_types", format!("{pattern:?}"), format!("a regular expression: {error}"))
            })?;
            Ok((regex, *kind))
        };
        patterns.iter().map(compile).collect()
    }

    /// The type of every weight, in their order.
    pub fn types(&self, weights: &[Weight<'_>]) -> Vec<GgmlType> {
        let mut order: Vec<usize> = (0..weights.len()).collect();
        order.sort_by_key(|&index| (layer(weights[index].name), weights[index].name));
        let is_tied = !weights.iter().any(|weight| weight.name == "output.weight");
        let mut counts = Counts { values: 0, downs: 0, num_values: 0, is_tied };
        counts.num_values = weights.iter().filter(|weight| is_value(weight.name)).count() as u64;
        let mut types = vec![GgmlType::F32; weights.len()];
        for index in order {
            types[index] = self.one(&weights[index], &mut counts);
        }
        types
    }

    fn one(&self, weight: &Weight<'_>, counts: &mut Counts) -> GgmlType {
        let default = self.file_type.default_type();
        if is_always_f32(weight) || default == GgmlType::F32 {
            return GgmlType::F32;
        }
        let forced = self.overrides.iter().find(|(pattern, _)| pattern.is_match(weight.name));
        if forced.is_none() && !default.is_quantized() {
            return default;
        }
        if !is_quantizable(weight.name) {
            return weight.source;
        }
        let row_len = weight.shape.last().copied().unwrap_or(1);
        let wanted = match forced {
            Some((_, kind)) => *kind,
            None => self.mixture(weight.name, row_len, default, counts),
        };
        fitting(wanted, row_len)
    }

    /// llama.cpp's mixtures of types.
    fn mixture(&self, name: &str, row_len: u64, default: GgmlType, counts: &mut Counts) -> GgmlType {
        let is_embedding = matches!(name, "token_embd.weight" | "per_layer_token_embd.weight");
        let is_mixtral = self.num_experts == 8;
        if name == "output.weight" || (is_embedding && counts.is_tied) {
            return match default {
                _ if !row_len.is_multiple_of(default.block_len() as u64) => GgmlType::Q8_0,
                GgmlType::Q8_0 => GgmlType::Q8_0,
                _ => GgmlType::Q6_K,
            };
        }
        if is_embedding {
            return default;
        }
        if is_value(name) {
            let index = next(&mut counts.values);
            return match default {
                _ if is_mixtral => GgmlType::Q8_0,
                _ if self.file_type.is_mixed() && has_more_bits(index, counts.num_values) => GgmlType::Q6_K,
                _ => default,
            };
        }
        if name.contains("attn_k.weight") && is_mixtral {
            return GgmlType::Q8_0;
        }
        if name.contains("attn_output.weight") && is_mixtral && self.file_type == FileType::Q4_K_M {
            return GgmlType::Q5_K;
        }
        if name.contains("ffn_down") {
            let counted = next(&mut counts.downs);
            let index = if self.num_experts > 1 { layer(name).unwrap_or(0) } else { counted };
            if self.file_type.is_mixed() && has_more_bits(index, self.num_layers) {
                return GgmlType::Q6_K;
            }
        }
        default
    }
}

/// What was met so far.
struct Counts {
    /// Value projections.
    values: u64,
    /// Down projections.
    downs: u64,
    num_values: u64,
    is_tied: bool,
}

/// Counts one more and returns how many there were.
fn next(count: &mut u64) -> u64 {
    *count += 1;
    *count - 1
}

/// The first and last eighth of `count` layers, and every third in between.
fn has_more_bits(index: u64, count: u64) -> bool {
    let eighth = count / 8;
    index < eighth || index >= 7 * count / 8 || (index - eighth) % 3 == 2
}

/// Number of the layer in `blk.3.attn_q.weight`.
pub(super) fn layer(name: &str) -> Option<u64> {
    name.strip_prefix("blk.")?.split_once('.')?.0.parse().ok()
}

fn is_value(name: &str) -> bool {
    name.contains("attn_v.weight")
}

/// Vectors, norms, routers, and what is not called a weight.
fn is_always_f32(weight: &Weight<'_>) -> bool {
    let name = weight.name;
    weight.shape.len() < 2
        || !name.ends_with(".weight")
        || name.ends_with("_norm.weight")
        || name.contains("ffn_gate_inp.")
}

/// Small matrices of per-layer embeddings are left as they are.
fn is_quantizable(name: &str) -> bool {
    !["altup", "laurel", "per_layer_model_proj"].iter().any(|part| name.contains(part))
}

/// `wanted`, or what llama.cpp takes instead where rows are no whole blocks of it.
fn fitting(wanted: GgmlType, row_len: u64) -> GgmlType {
    let fits = |kind: GgmlType| row_len.is_multiple_of(kind.block_len() as u64);
    let instead = match wanted {
        _ if fits(wanted) => return wanted,
        GgmlType::Q4_K => GgmlType::Q5_0,
        GgmlType::Q5_K => GgmlType::Q5_1,
        GgmlType::Q6_K => GgmlType::Q8_0,
        _ => GgmlType::F16,
    };
    if fits(instead) {
        instead
    } else {
        GgmlType::F16
    }
}
