//! The weights of all experts of a layer.

use super::matrix::{Matrix, Values};
use crate::nf4::Layout;
use crate::{Error, Result};

/// A stack of weights, one per expert.
#[derive(Debug, Clone, Copy)]
pub struct Stack<'a> {
    /// `[E, rows, cols]`; of NF4, codes and scales of the whole stack.
    pub values: Values<'a>,
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
    pub(crate) fn expert(&self, expert: usize) -> Matrix<'a> {
        let len = self.rows * self.cols;
        let values = match self.values {
            Values::Dense(floats) => Values::Dense(floats.slice(expert * len..(expert + 1) * len)),
            Values::Nf4 { packed, scales, block_size, codebook } => {
                let (bytes, blocks) = (len.div_ceil(2), len.div_ceil(block_size));
                Values::Nf4 {
                    packed: &packed[expert * bytes..][..bytes],
                    scales: scales.skip(expert * blocks),
                    block_size,
                    codebook,
                }
            }
        };
        Matrix { values, rows: self.rows, cols: self.cols }
    }

    /// The bias of one expert.
    pub(crate) fn expert_bias(&self, expert: usize) -> Option<&'a [f32]> {
        self.bias.map(|bias| &bias[expert * self.outputs()..][..self.outputs()])
    }

    /// Checks lengths against the shape; what passes cannot be read out of bounds.
    pub(crate) fn check(&self, name: &'static str) -> Result<()> {
        if self.rows == 0 || self.cols == 0 {
            let found = format!("[{}, {}, {}]", self.num_experts, self.rows, self.cols);
            return Err(Error::invalid(name, found, "experts of at least one row and one column"));
        }
        let len = self.rows.saturating_mul(self.cols);
        match self.values {
            Values::Dense(floats) => check_len(name, floats.len(), len.saturating_mul(self.num_experts))?,
            Values::Nf4 { packed, scales, block_size, .. } => {
                let layout = Layout { groups: self.num_experts, group_len: len, block_size };
                layout.check((name, layout.values_len()), packed.len(), scales.len())?;
                scales.check()?;
            }
        }
        self.bias.map_or(Ok(()), |bias| check_len("bias", bias.len(), self.num_experts.saturating_mul(self.outputs())))
    }
}

/// Checks one length.
pub(crate) fn check_len(name: &'static str, found: usize, wanted: usize) -> Result<()> {
    if found == wanted {
        return Ok(());
    }
    Err(Error::invalid(name, format!("{found} long"), wanted))
}
