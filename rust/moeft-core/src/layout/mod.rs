//! Fuses the experts of a checkpoint on disk into stacks, or takes stacks apart, without changing a bit of any weight.
//!
//! Per expert, every projection is a matrix as in a Linear module: gate and up `[I, H]`, down `[H, I]`, biases `[I]` and
//! `[H]`. Fused, a layer has `gate_up_proj` `[E, 2I, H]` and `down_proj` `[E, H, I]`, biases `gate_up_proj_bias`
//! `[E, 2I]` and `down_proj_bias` `[E, H]`. A family may store its stacks transposed (`[E, H, 2I]` and `[E, I, H]`) and
//! gate and up interleaved along the axis of 2I instead of one after the other.
//!
//! Names are those of the family, and `<experts>.<e>.{gate,up,down}_proj.weight` if it has none of its own per expert.
//! Files keep their names and their other tensors: what a file's stacks become stays in that file, and a stack lands in
//! the file that held its first tensor.

mod arrangement;
mod engine;
pub(crate) mod experts;
mod gather;
mod plan;

pub use arrangement::Arrangement;
pub use engine::{convert, LayoutReport};
pub use plan::{Output, Plan};

use serde::{Deserialize, Serialize};

/// What is done to the experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// Tensors per expert become stacks.
    Fuse,
    /// Stacks become tensors per expert.
    Unfuse,
}
