//! Double quantisation: absmax itself stored in 8 bits, as bitsandbytes' `compress_statistics` does.
//!
//! `absmax = DYNAMIC_MAP[code] * absmax2[i / 256] + offset`, 0.516 bytes per weight instead of 0.5625
//! (block size 64).

use std::sync::LazyLock;

use super::DYNAMIC_MAP;
use crate::{dynamic8, Error, Result};

/// Values of absmax that share one second-level scale.
pub const NESTED_BLOCK_SIZE: usize = 256;

/// Stores `absmax` in 8 bits; codes and scales equal bitsandbytes' for the same offset.
///
/// With `offset = None` the mean of `absmax` is used, summed in f64 and rounded once. bitsandbytes
/// takes torch's f32 mean, whose last bit depends on the vector width and thread count of the CPU; pass
/// that mean to reproduce a file bit for bit.
///
/// # Arguments
/// * `absmax` - scales of [`quantize`](super::quantize()), finite.
/// * `codes` - output, as long as `absmax`.
/// * `absmax2` - output, `ceil(absmax.len() / 256)` scales.
///
/// # Returns
/// The offset used; 0 when `absmax` is empty.
///
/// # Errors
/// [`Error::InvalidArgument`] if a length does not fit, or a value or the offset is not finite.
pub fn nest(absmax: &[f32], offset: Option<f32>, codes: &mut [u8], absmax2: &mut [f32]) -> Result<f32> {
    check_lengths(codes.len(), absmax2.len(), ("absmax", absmax.len()))?;
    if let Some(at) = super::first_non_finite(absmax) {
        return Err(Error::invalid("absmax", format!("{} at {at}", absmax[at]), "finite; is the weight damaged?"));
    }
    let offset = offset.unwrap_or_else(|| mean(absmax));
    if !offset.is_finite() {
        return Err(Error::invalid("offset", offset, "a finite value"));
    }
    let blocks = absmax.chunks(NESTED_BLOCK_SIZE).zip(codes.chunks_mut(NESTED_BLOCK_SIZE)).zip(absmax2);
    for ((absmax, codes), absmax2) in blocks {
        *absmax2 = absmax.iter().fold(0.0f32, |max, a| max.max((a - offset).abs()));
        if *absmax2 == 0.0 {
            codes.fill(0);
            continue;
        }
        let reciprocal = 1.0 / *absmax2;
        for (code, a) in codes.iter_mut().zip(absmax) {
            *code = encode((a - offset) * reciprocal);
        }
    }
    Ok(offset)
}

/// Restores absmax: code times scale, then plus offset, two roundings in f32.
///
/// # Errors
/// [`Error::InvalidArgument`] if a length does not fit.
pub fn unnest(codes: &[u8], absmax2: &[f32], offset: f32, absmax_out: &mut [f32]) -> Result<()> {
    check_lengths(codes.len(), absmax2.len(), ("absmax_out", absmax_out.len()))?;
    let blocks = codes.chunks(NESTED_BLOCK_SIZE).zip(absmax2).zip(absmax_out.chunks_mut(NESTED_BLOCK_SIZE));
    for ((codes, absmax2), out) in blocks {
        for (out, &code) in out.iter_mut().zip(codes) {
            *out = DYNAMIC_MAP[usize::from(code)] * absmax2 + offset;
        }
    }
    Ok(())
}

/// Code of a value in [-1, 1] as bitsandbytes' CPU kernel finds it: zero becomes code 131 (2.0e-5), and codes 124 to
/// 130 are never written. A block whose absmax is below 2.9e-39 has an infinite reciprocal, so zeros of it are NaN.
fn encode(scaled: f32) -> u8 {
    static STEP_CODES: LazyLock<Vec<u8>> = LazyLock::new(|| dynamic8::step_codes(&DYNAMIC_MAP));
    STEP_CODES[dynamic8::step(scaled) as usize]
}

/// Mean summed in f64, so that it does not depend on the machine.
fn mean(values: &[f32]) -> f32 {
    let sum: f64 = values.iter().map(|&v| f64::from(v)).sum();
    (sum / values.len().max(1) as f64) as f32
}

/// Checks the three lengths; `absmax` is the name and length of the full-precision side.
fn check_lengths(codes: usize, absmax2: usize, absmax: (&'static str, usize)) -> Result<()> {
    if absmax.1 != codes {
        return Err(Error::invalid(absmax.0, format!("{} long", absmax.1), format!("as many as codes, {codes}")));
    }
    check_absmax2(codes, absmax2)
}

/// Checks the number of second-level scales of `codes` codes.
pub(super) fn check_absmax2(codes: usize, absmax2: usize) -> Result<()> {
    let blocks = codes.div_ceil(NESTED_BLOCK_SIZE);
    if absmax2 != blocks {
        return Err(Error::invalid("absmax2", format!("{absmax2} long"), format!("ceil(codes / 256) = {blocks}")));
    }
    Ok(())
}
