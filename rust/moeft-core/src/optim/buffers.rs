//! What one optimiser step reads and writes, in the types it comes in.

use half::bf16;

use super::quantized::Quantized;
use super::BLOCK_SIZE;
use crate::{Error, Result};

/// Weights to update.
#[derive(Debug)]
pub enum Parameters<'a> {
    /// f32.
    F32(&'a mut [f32]),
    /// bf16, rounded to nearest even after each step: an update below 1/512 of a weight (half its last place) is lost.
    Bf16(&'a mut [bf16]),
    /// f32 weights that the step works on, and the bf16 copy that the model computes with.
    Master {
        /// The weights.
        master: &'a mut [f32],
        /// Output: the weights rounded to nearest even. What it held is not read.
        rounded: &'a mut [bf16],
    },
}

/// Gradients of the weights.
#[derive(Debug, Clone, Copy)]
pub enum Gradients<'a> {
    /// f32.
    F32(&'a [f32]),
    /// bf16, widened exactly.
    Bf16(&'a [bf16]),
}

/// Running means of the gradients and of their squares. Zero before the first step.
#[derive(Debug)]
pub enum Moments<'a> {
    /// 8 bytes per weight.
    F32 {
        /// Mean of the gradients.
        exp_avg: &'a mut [f32],
        /// Mean of their squares.
        exp_avg_sq: &'a mut [f32],
    },
    /// 2.03 bytes per weight.
    Bits8 {
        /// Mean of the gradients, in the signed code.
        exp_avg: Quantized<'a>,
        /// Mean of their squares, in the unsigned code.
        exp_avg_sq: Quantized<'a>,
    },
}

/// One step over some weights.
pub(super) struct Task<'a> {
    pub parameters: Parameters<'a>,
    pub gradients: Gradients<'a>,
    pub moments: Moments<'a>,
}

impl Task<'_> {
    /// Number of weights.
    #[inline(always)]
    pub fn len(&self) -> usize {
        match &self.parameters {
            Parameters::F32(weights) => weights.len(),
            Parameters::Bf16(weights) => weights.len(),
            Parameters::Master { master, .. } => master.len(),
        }
    }

    /// Checks every length against the number of weights.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] naming the buffer that does not fit.
    pub fn check(&self) -> Result<()> {
        let len = self.len();
        if let Parameters::Master { rounded, .. } = &self.parameters {
            check_len("rounded", rounded.len(), len, "one per weight")?;
        }
        match self.gradients {
            Gradients::F32(gradients) => check_len("grad", gradients.len(), len, "one per weight")?,
            Gradients::Bf16(gradients) => check_len("grad", gradients.len(), len, "one per weight")?,
        }
        match &self.moments {
            Moments::F32 { exp_avg, exp_avg_sq } => {
                check_len("exp_avg", exp_avg.len(), len, "one per weight")?;
                check_len("exp_avg_sq", exp_avg_sq.len(), len, "one per weight")
            }
            Moments::Bits8 { exp_avg, exp_avg_sq } => {
                let blocks = len.div_ceil(BLOCK_SIZE);
                check_len("exp_avg", exp_avg.codes.len(), len, "one per weight")?;
                check_len("exp_avg_absmax", exp_avg.absmax.len(), blocks, "one per block of 256 weights")?;
                check_len("exp_avg_sq", exp_avg_sq.codes.len(), len, "one per weight")?;
                check_len("exp_avg_sq_absmax", exp_avg_sq.absmax.len(), blocks, "one per block of 256 weights")
            }
        }
    }

    /// The weights before `at`, a multiple of the block size, and those from there on.
    #[inline(always)]
    pub fn split_at(self, at: usize) -> (Self, Self) {
        let (left, right) = match self.parameters {
            Parameters::F32(weights) => both(weights.split_at_mut(at), Parameters::F32),
            Parameters::Bf16(weights) => both(weights.split_at_mut(at), Parameters::Bf16),
            Parameters::Master { master, rounded } => {
                let (masters, rounded) = (master.split_at_mut(at), rounded.split_at_mut(at));
                let join = |(master, rounded)| Parameters::Master { master, rounded };
                both(((masters.0, rounded.0), (masters.1, rounded.1)), join)
            }
        };
        let gradients = match self.gradients {
            Gradients::F32(gradients) => both(gradients.split_at(at), Gradients::F32),
            Gradients::Bf16(gradients) => both(gradients.split_at(at), Gradients::Bf16),
        };
        let moments = match self.moments {
            Moments::F32 { exp_avg, exp_avg_sq } => {
                let (first, second) = (exp_avg.split_at_mut(at), exp_avg_sq.split_at_mut(at));
                let join = |(exp_avg, exp_avg_sq)| Moments::F32 { exp_avg, exp_avg_sq };
                both(((first.0, second.0), (first.1, second.1)), join)
            }
            Moments::Bits8 { exp_avg, exp_avg_sq } => {
                let (first, second) = (exp_avg.split_at(at), exp_avg_sq.split_at(at));
                let join = |(exp_avg, exp_avg_sq)| Moments::Bits8 { exp_avg, exp_avg_sq };
                both(((first.0, second.0), (first.1, second.1)), join)
            }
        };
        (
            Self { parameters: left, gradients: gradients.0, moments: moments.0 },
            Self { parameters: right, gradients: gradients.1, moments: moments.1 },
        )
    }
}

#[inline(always)]
fn both<T, U>(pair: (T, T), make: impl Fn(T) -> U) -> (U, U) {
    (make(pair.0), make(pair.1))
}

fn check_len(name: &'static str, found: usize, expected: usize, why: &str) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::invalid(name, format!("{found} long"), format!("{expected}, {why}")))
}
