//! Weights as they are stored, and panels of them in f32.

use std::ops::Range;

use super::floats::Floats;
use super::{run, Kernel};
use crate::isa::Isa;
use crate::nf4::{decode_run, Codebook, Scales};

/// Values of a weight or of a stack of them, as stored.
#[derive(Debug, Clone, Copy)]
pub enum Values<'a> {
    /// Not quantised.
    Dense(Floats<'a>),
    /// NF4, one group per weight, see [`nf4`](crate::nf4).
    Nf4 {
        /// Codes.
        packed: &'a [u8],
        /// Scales.
        scales: Scales<'a>,
        /// Values that share a scale.
        block_size: usize,
        /// What the codes stand for.
        codebook: Codebook,
    },
}

/// A weight `[rows, cols]`, row after row.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    /// The values.
    pub values: Values<'a>,
    /// Rows: outputs, as `nn.Linear` stores a weight.
    pub rows: usize,
    /// Columns: inputs.
    pub cols: usize,
}

impl<'a> Matrix<'a> {
    /// A dense f32 matrix.
    pub fn f32(values: &'a [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(values.len(), rows * cols);
        Self { values: Values::Dense(Floats::F32(values)), rows, cols }
    }

    /// The panel of `rows` and `cols` in f32, and the distance of its rows; restored into `scratch` if it must be.
    pub(super) fn panel<'b>(
        &self,
        isa: Isa,
        rows: Range<usize>,
        cols: Range<usize>,
        scratch: &'b mut [f32],
    ) -> (&'b [f32], usize)
    where
        'a: 'b,
    {
        let start = |row: usize| row * self.cols + cols.start;
        let width = cols.len();
        match self.values {
            Values::Dense(Floats::F32(values)) => {
                return (&values[start(rows.start)..start(rows.end - 1) + width], self.cols);
            }
            Values::Dense(floats) => {
                for (row, out) in rows.clone().zip(scratch.chunks_exact_mut(width)) {
                    run(isa, Widen(floats.slice(start(row)..start(row) + width), out));
                }
            }
            Values::Nf4 { packed, scales, block_size, codebook } => {
                for (row, out) in rows.clone().zip(scratch.chunks_exact_mut(width)) {
                    decode_run(isa, packed, scales, block_size, start(row), out, codebook);
                }
            }
        }
        (&scratch[..rows.len() * width], width)
    }
}

/// Widens values, with the instructions of a set.
struct Widen<'a>(Floats<'a>, &'a mut [f32]);

impl Kernel for Widen<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        self.0.widen(0, self.1);
    }
}
