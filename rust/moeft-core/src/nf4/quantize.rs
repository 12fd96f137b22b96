//! The quantiser that runs: no allocation, shaped for the vectoriser, parallel over chunks of large weights.

use rayon::prelude::*;

use super::codebook::MIN_ABSMAX;
use super::element::Element;
use super::{Layout, MIDPOINTS};
use crate::{parallel, Result};

/// Values per parallel task; a multiple of every block size.
pub(super) const TASK_LEN: usize = 1 << 16;

/// Below this many values one thread is faster than waking others.
pub(super) const PARALLEL_LEN: usize = 1 << 19;

/// Values handled at once: their indices fit the vector registers, and it divides every block size.
const LANES: usize = 32;

/// Quantises `values` to NF4, byte-identical to bitsandbytes' `quantize_4bit` on each group.
///
/// NaN and infinite values are stored as bitsandbytes stores them, which destroys their block; see
/// [`first_non_finite`](super::first_non_finite).
///
/// # Arguments
/// * `values` - `layout.groups * layout.group_len` values.
/// * `packed` - output, [`Layout::packed_len`] bytes; the first value of a byte is its high nibble.
/// * `absmax` - output, [`Layout::absmax_len`] scales.
///
/// # Errors
/// [`Error::InvalidArgument`](crate::Error::InvalidArgument) if a length or the block size does not fit.
pub fn quantize<T: Element>(values: &[T], layout: Layout, packed: &mut [u8], absmax: &mut [f32]) -> Result<()> {
    layout.check(("values", values.len()), packed.len(), absmax.len())?;
    if values.is_empty() {
        return Ok(());
    }
    let block_size = layout.block_size;
    let (group_packed, group_absmax) = (layout.group_packed_len(), layout.group_absmax_len());
    if values.len() < PARALLEL_LEN {
        let scales = absmax.chunks_mut(group_absmax);
        for ((v, p), a) in values.chunks(layout.group_len).zip(packed.chunks_mut(group_packed)).zip(scales) {
            quantize_group(v, block_size, p, a);
        }
    } else {
        parallel::install(|| {
            values
                .par_chunks(layout.group_len)
                .zip(packed.par_chunks_mut(group_packed))
                .zip(absmax.par_chunks_mut(group_absmax))
                .with_min_len(TASK_LEN.div_ceil(layout.group_len))
                .for_each(|((v, p), a)| quantize_group_parallel(v, block_size, p, a));
        });
    }
    Ok(())
}

/// Quantises one group in parallel. Lengths are as in [`quantize`] and were checked by the caller.
pub(super) fn quantize_group_parallel<T: Element>(
    values: &[T],
    block_size: usize,
    packed: &mut [u8],
    absmax: &mut [f32],
) {
    if values.len() < PARALLEL_LEN {
        return quantize_group(values, block_size, packed, absmax);
    }
    parallel::install(|| {
        values
            .par_chunks(TASK_LEN)
            .zip(packed.par_chunks_mut(TASK_LEN / 2))
            .zip(absmax.par_chunks_mut(TASK_LEN / block_size))
            .for_each(|((v, p), a)| quantize_group(v, block_size, p, a));
    });
}

/// Quantises one group, or a part of one that starts at a block.
fn quantize_group<T: Element>(values: &[T], block_size: usize, packed: &mut [u8], absmax: &mut [f32]) {
    let blocks = values.chunks(block_size).zip(packed.chunks_mut(block_size / 2)).zip(absmax);
    for ((values, packed), absmax) in blocks {
        *absmax = if values.len() == block_size { full_block(values, packed) } else { short_block(values, packed) };
    }
}

/// Quantises a block of `block_size` values; returns its absmax.
#[inline]
fn full_block<T: Element>(values: &[T], packed: &mut [u8]) -> f32 {
    let absmax = T::absmax(values);
    let reciprocal = 1.0 / floor(absmax);
    for (values, packed) in values.chunks_exact(LANES).zip(packed.chunks_exact_mut(LANES / 2)) {
        let mut scaled = [0.0f32; LANES];
        T::widen(values, &mut scaled);
        for s in &mut scaled {
            *s *= reciprocal;
        }
        pack(&indices(&scaled), packed);
    }
    absmax
}

/// Quantises the short last block of a group; returns its absmax.
#[cold]
fn short_block<T: Element>(values: &[T], packed: &mut [u8]) -> f32 {
    let absmax = floor(T::absmax(values));
    for (values, packed) in values.chunks(LANES).zip(packed.chunks_mut(LANES / 2)) {
        // Lanes beyond the end stay 0.0, the value that pads the last nibble of an odd group.
        let mut scaled = [0.0f32; LANES];
        T::widen(values, &mut scaled[..values.len()]);
        for s in &mut scaled[..values.len()] {
            *s /= absmax;
        }
        pack(&indices(&scaled), packed);
    }
    absmax
}

/// The scale's divisor: `absmax`, but at least 1e-38; NaN stays NaN.
#[inline]
fn floor(absmax: f32) -> f32 {
    if absmax < MIN_ABSMAX {
        MIN_ABSMAX
    } else {
        absmax
    }
}

/// Number of midpoints strictly below each value; 15 for NaN.
///
/// Values are not clamped to [-1, 1]: every midpoint lies inside, so the count is the same.
#[inline]
fn indices(scaled: &[f32; LANES]) -> [i32; LANES] {
    let mut index = [0i32; LANES];
    for midpoint in MIDPOINTS {
        for (i, &s) in index.iter_mut().zip(scaled) {
            // Not `s > midpoint`: a NaN must count.
            #[allow(clippy::neg_cmp_op_on_partial_ord)]
            let above = !(s <= midpoint);
            *i += i32::from(above);
        }
    }
    index
}

/// Joins pairs of indices into bytes, the first in the high nibble.
#[inline]
fn pack(index: &[i32; LANES], packed: &mut [u8]) {
    for (byte, pair) in packed.iter_mut().zip(index.chunks_exact(2)) {
        *byte = (pair[0] << 4 | pair[1]) as u8;
    }
}
