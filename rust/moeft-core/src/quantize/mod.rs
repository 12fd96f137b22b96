//! Streams a 16- or 32-bit checkpoint to a packed NF4 checkpoint.
//!
//! A stack `<experts>.gate_up_proj` `[E, 2I, H]` becomes `<experts>.gate_up_nf4.packed` U8 `[E, n/2]` and `.absmax` F32
//! `[E, n/block]`, where n is the number of elements of one expert; blocks start anew with every expert. A Linear
//! `<module>.weight` becomes `<module>.weight_nf4.packed` U8 `[n/2]` and `.absmax` F32 `[n/block]`. All divisions round
//! up. With `double_quant`, `.absmax` is U8, and `.nested_absmax` F32 `[blocks/256]` and `.nested_offset` F32 `[1]` cover
//! the whole stack. Experts are stacked under their names in memory; everything else keeps its name and bytes.

mod engine;
mod plan;
mod report;

pub use engine::quantize;
pub use plan::{Component, Job, Packing, Plan};
pub use report::{Bytes, QuantizeReport};

use serde::{Deserialize, Serialize};

/// `quantization_config.quant_method` of the checkpoints written here.
pub const QUANT_METHOD: &str = "moeft_nf4";

/// What is packed, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// Expert stacks.
    pub experts: bool,
    /// Attention projections.
    pub attention: bool,
    /// Projections of the dense MLP.
    pub mlp: bool,
    /// Store absmax in 8 bits too.
    pub double_quant: bool,
    /// Elements that share one absmax.
    pub block_size: usize,
    /// A file is closed before it gets larger than this.
    pub max_shard_bytes: u64,
}

impl Default for Options {
    fn default() -> Self {
        let max_shard_bytes = 4 << 30;
        Self { experts: true, attention: false, mlp: false, double_quant: false, block_size: 64, max_shard_bytes }
    }
}
