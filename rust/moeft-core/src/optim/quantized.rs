//! Optimiser state in 8 bits: blocks of 256 values with one scale each, in bitsandbytes' dynamic types.
//!
//! Codes and scales are those of `bitsandbytes.functional.quantize_blockwise` on the CPU, with one exception: zero is
//! stored as zero. bitsandbytes' rounding makes it 2e-5 (signed) or 1.5e-5 (unsigned) of the largest value of the
//! block, so that a weight which never had a gradient, such as one of an expert without tokens, would drift.
//!
//! Source: 8-bit Optimizers via Block-wise Quantization, <https://arxiv.org/abs/2110.02861>.

use std::sync::LazyLock;

use super::UNSIGNED_DYNAMIC_MAP;
use crate::dynamic8::{self, STEPS};
use crate::nf4::DYNAMIC_MAP;
use crate::{Error, Result};

/// Values that share one scale.
pub const BLOCK_SIZE: usize = 256;

/// What the 256 codes mean, and how to find them.
#[derive(Debug)]
pub struct Code {
    map: [f32; 256],
    /// Code of each step, then that of zero; as long as the next power of two, so that a mask bounds the index.
    steps: Box<[u8; 2 * STEPS]>,
}

impl Code {
    /// Values in [-1, 1], for first moments.
    pub fn signed() -> &'static Self {
        static SIGNED: LazyLock<Code> = LazyLock::new(|| Code::new(DYNAMIC_MAP));
        &SIGNED
    }

    /// Values in [0, 1], for second moments.
    pub fn unsigned() -> &'static Self {
        static UNSIGNED: LazyLock<Code> = LazyLock::new(|| Code::new(UNSIGNED_DYNAMIC_MAP));
        &UNSIGNED
    }

    fn new(map: [f32; 256]) -> Self {
        let mut steps = dynamic8::step_codes(&map);
        steps.resize(2 * STEPS, map.partition_point(|&value| value < 0.0) as u8);
        Self { map, steps: steps.try_into().expect("has this length") }
    }

    /// Quantises `values`.
    ///
    /// # Arguments
    /// * `codes` - output, as long as `values`.
    /// * `absmax` - output, one scale per block of 256; the last block may be short.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if a length does not fit.
    pub fn quantize(&self, values: &[f32], codes: &mut [u8], absmax: &mut [f32]) -> Result<()> {
        check_lengths(("values", values.len()), codes.len(), ("absmax", absmax.len()))?;
        for ((values, codes), absmax) in values.chunks(BLOCK_SIZE).zip(codes.chunks_mut(BLOCK_SIZE)).zip(absmax) {
            *absmax = self.encode(values, codes);
        }
        Ok(())
    }

    /// Restores values: that of the code times the scale, in f32.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if a length does not fit.
    pub fn dequantize(&self, codes: &[u8], absmax: &[f32], values: &mut [f32]) -> Result<()> {
        check_lengths(("values", values.len()), codes.len(), ("absmax", absmax.len()))?;
        for ((values, codes), absmax) in values.chunks_mut(BLOCK_SIZE).zip(codes.chunks(BLOCK_SIZE)).zip(absmax) {
            self.decode(codes, *absmax, values);
        }
        Ok(())
    }

    /// Quantises one block and returns its scale.
    #[inline(always)]
    pub(super) fn encode(&self, values: &[f32], codes: &mut [u8]) -> f32 {
        // Magnitudes are compared as integers, which vectorises; NaN comes out on top.
        let magnitude = |value: &f32| (value.to_bits() & 0x7fff_ffff) as i32;
        let absmax = f32::from_bits(values.iter().map(magnitude).fold(0, i32::max) as u32);
        let reciprocal = 1.0 / absmax;
        let mut steps = [0; BLOCK_SIZE];
        for (step, &value) in steps.iter_mut().zip(values) {
            let found = dynamic8::step(value * reciprocal);
            *step = if value == 0.0 { STEPS as u32 } else { found };
        }
        for (code, &step) in codes.iter_mut().zip(&steps) {
            *code = self.steps[step as usize & (2 * STEPS - 1)];
        }
        absmax
    }

    /// Restores one block.
    #[inline(always)]
    pub(super) fn decode(&self, codes: &[u8], absmax: f32, values: &mut [f32]) {
        for (value, &code) in values.iter_mut().zip(codes) {
            *value = self.map[usize::from(code)] * absmax;
        }
    }
}

/// A moment in 8 bits.
#[derive(Debug)]
pub struct Quantized<'a> {
    /// One code per value.
    pub codes: &'a mut [u8],
    /// One scale per block of [`BLOCK_SIZE`] values; the last may be short.
    pub absmax: &'a mut [f32],
}

impl<'a> Quantized<'a> {
    /// The values before `at`, a multiple of the block size, and those from there on.
    #[inline(always)]
    pub(super) fn split_at(self, at: usize) -> (Self, Self) {
        let (codes, absmax) = (self.codes.split_at_mut(at), self.absmax.split_at_mut(at.div_ceil(BLOCK_SIZE)));
        (Self { codes: codes.0, absmax: absmax.0 }, Self { codes: codes.1, absmax: absmax.1 })
    }
}

/// Checks codes and scales of a moment against the number of values.
fn check_lengths(values: (&'static str, usize), codes: usize, absmax: (&'static str, usize)) -> Result<()> {
    if codes != values.1 {
        let expected = format!("as many as codes, {codes}");
        return Err(Error::invalid(values.0, format!("{} long", values.1), expected));
    }
    let blocks = codes.div_ceil(BLOCK_SIZE);
    if absmax.1 != blocks {
        let expected = format!("one per block of {BLOCK_SIZE} values, {blocks}");
        return Err(Error::invalid(absmax.0, format!("{} long", absmax.1), expected));
    }
    Ok(())
}
