//! What an expert block computes with, and the checks that it fits together.

use super::gate::Gate;
use crate::gemm::{Floats, Matrix, Values};
use crate::nf4::{Layout, Scales, NESTED_BLOCK_SIZE};
use crate::{Error, Result};

/// Values of a stack of experts, as stored.
#[derive(Debug, Clone, Copy)]
pub enum StackValues<'a> {
    /// Not quantised.
    Dense(Floats<'a>),
    /// NF4, one group per expert; `scales` are those of the whole stack.
    Nf4 {
        /// Codes.
        packed: &'a [u8],
        /// Scales of the whole stack.
        scales: Scales<'a>,
        /// Values that share a scale.
        block_size: usize,
    },
}

/// A stack of weights, one per expert.
#[derive(Debug, Clone, Copy)]
pub struct Stack<'a> {
    /// `[E, rows, cols]`.
    pub values: StackValues<'a>,
    /// Number of experts.
    pub num_experts: usize,
    /// Rows of an expert as stored: outputs, or inputs if `transposed`.
    pub rows: usize,
    /// Columns of an expert as stored.
    pub cols: usize,
    /// Whether an expert is stored as `[in, out]` instead of `[out, in]`.
    pub transposed: bool,
    /// `[E, out]`.
    pub bias: Option<&'a [f32]>,
}

impl<'a> Stack<'a> {
    /// Columns that go in.
    pub fn inputs(&self) -> usize {
        if self.transposed {
            self.rows
        } else {
            self.cols
        }
    }

    /// Columns that come out.
    pub fn outputs(&self) -> usize {
        if self.transposed {
            self.cols
        } else {
            self.rows
        }
    }

    /// The weight of one expert.
    pub(super) fn expert(&self, expert: usize) -> Matrix<'a> {
        let len = self.rows * self.cols;
        let values = match self.values {
            StackValues::Dense(floats) => Values::Dense(floats.slice(expert * len..(expert + 1) * len)),
            StackValues::Nf4 { packed, scales, block_size } => {
                let (bytes, blocks) = (len.div_ceil(2), len.div_ceil(block_size));
                Values::Nf4 {
                    packed: &packed[expert * bytes..][..bytes],
                    scales: scales.slice(expert * blocks..(expert + 1) * blocks),
                    block_size,
                }
            }
        };
        Matrix { values, rows: self.rows, cols: self.cols }
    }

    /// The bias of one expert.
    pub(super) fn expert_bias(&self, expert: usize) -> Option<&'a [f32]> {
        self.bias.map(|bias| &bias[expert * self.outputs()..][..self.outputs()])
    }

    fn check(&self, name: &'static str) -> Result<()> {
        let len = self.rows.saturating_mul(self.cols);
        match self.values {
            StackValues::Dense(floats) => check_len(name, floats.len(), len.saturating_mul(self.num_experts))?,
            StackValues::Nf4 { packed, scales, block_size } => {
                let layout = Layout { groups: self.num_experts, group_len: len, block_size };
                layout.check((name, layout.values_len()), packed.len(), scales.len())?;
                if let Scales::Nested { absmax2, .. } = scales {
                    check_len("nested absmax", absmax2.len(), scales.len().div_ceil(NESTED_BLOCK_SIZE))?;
                }
            }
        }
        self.bias.map_or(Ok(()), |bias| check_len("bias", bias.len(), self.num_experts.saturating_mul(self.outputs())))
    }
}

/// Low-rank factors of a stack, in PEFT's layout.
#[derive(Debug, Clone, Copy)]
pub struct Lora<'a> {
    /// `[E * r, in]`, row `e * r + j`.
    pub a: &'a [f32],
    /// `[out, r * E]`, column `j * E + e`.
    pub b: &'a [f32],
    /// r.
    pub rank: usize,
    /// The delta of an expert is `scaling * B A`.
    pub scaling: f32,
}

impl Lora<'_> {
    fn check(&self, stack: &Stack<'_>) -> Result<()> {
        let factors = self.rank.saturating_mul(stack.num_experts);
        check_len("lora a", self.a.len(), factors.saturating_mul(stack.inputs()))?;
        check_len("lora b", self.b.len(), factors.saturating_mul(stack.outputs()))
    }
}

/// Frozen weights, adapters and activation of an expert block.
#[derive(Debug, Clone, Copy)]
pub struct Block<'a> {
    /// Outputs 2I, inputs H.
    pub gate_up: Stack<'a>,
    /// Outputs H, inputs I.
    pub down: Stack<'a>,
    /// Activation.
    pub gate: Gate,
    /// Whether gate and up outputs alternate, instead of all gates first.
    pub interleaved: bool,
    /// Added to gate_up.
    pub gate_up_lora: Option<Lora<'a>>,
    /// Added to down.
    pub down_lora: Option<Lora<'a>>,
}

impl Block<'_> {
    /// H.
    pub fn hidden(&self) -> usize {
        self.gate_up.inputs()
    }

    /// I.
    pub fn inner(&self) -> usize {
        self.down.inputs()
    }

    fn check(&self) -> Result<()> {
        self.gate_up.check("gate_up")?;
        self.down.check("down")?;
        let found = (self.gate_up.num_experts, self.gate_up.outputs(), self.gate_up.inputs());
        let wanted = (self.down.num_experts, self.inner().saturating_mul(2), self.down.outputs());
        if found != wanted {
            let expected = format!("{wanted:?} to go with down");
            return Err(Error::invalid("gate_up (experts, outputs, inputs)", format!("{found:?}"), expected));
        }
        self.gate_up_lora.map_or(Ok(()), |lora| lora.check(&self.gate_up))?;
        self.down_lora.map_or(Ok(()), |lora| lora.check(&self.down))
    }
}

/// Which token goes to which expert, as [`routing::bucket`](crate::routing::bucket) sorts it.
#[derive(Debug, Clone, Copy)]
pub struct Routing<'a> {
    /// Row `token * k + choice` at each sorted position, R.
    pub permutation: &'a [i64],
    /// Sorted position where each expert starts, then R.
    pub offsets: &'a [i32],
    /// Weight of each row, R, by row.
    pub weights: &'a [f32],
    /// k.
    pub top_k: usize,
}

impl Routing<'_> {
    /// Row at a sorted position.
    pub(super) fn row(&self, position: usize) -> usize {
        self.permutation[position] as usize
    }

    /// Token at a sorted position.
    pub(super) fn token(&self, position: usize) -> usize {
        self.row(position) / self.top_k
    }

    /// Checks the routing, the block, and the two against `tokens`; what passes cannot index out of bounds.
    pub(super) fn check(&self, block: &Block<'_>, tokens: usize) -> Result<()> {
        block.check()?;
        let rows = tokens.saturating_mul(self.top_k);
        check_len("permutation", self.permutation.len(), rows)?;
        check_len("weights", self.weights.len(), rows)?;
        check_len("offsets", self.offsets.len(), block.gate_up.num_experts.saturating_add(1))?;
        let ascending = self.offsets.windows(2).all(|pair| pair[0] <= pair[1]);
        if !ascending || self.offsets.first() != Some(&0) || self.offsets.last().map(|&r| r as usize) != Some(rows) {
            return Err(Error::invalid(
                "offsets",
                format!("{:?}", self.offsets),
                format!("0, ascending, up to {rows}"),
            ));
        }
        match self.permutation.iter().find(|&&row| row < 0 || row as usize >= rows) {
            Some(row) => Err(Error::invalid("permutation", row, format!("rows in 0..{rows}"))),
            None => Ok(()),
        }
    }
}

/// Checks one length.
pub(super) fn check_len(name: &'static str, found: usize, wanted: usize) -> Result<()> {
    if found == wanted {
        return Ok(());
    }
    Err(Error::invalid(name, format!("{found} long"), wanted))
}
