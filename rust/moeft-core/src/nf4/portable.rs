//! The paths of every CPU: plain Rust, shaped for the compiler's vectoriser.

use super::codebook::MIN_ABSMAX;
use super::{Codebook, Element};

/// Values handled at once: their ranks fit the vector registers, and it divides every block size.
const LANES: usize = 32;

/// Quantises whole blocks.
pub(super) fn quantize_blocks<T: Element>(
    codebook: Codebook,
    values: &[T],
    block_size: usize,
    packed: &mut [u8],
    absmax: &mut [f32],
) {
    let blocks = values.chunks_exact(block_size).zip(packed.chunks_exact_mut(block_size / 2)).zip(absmax);
    for ((values, packed), absmax) in blocks {
        *absmax = T::absmax(values);
        let reciprocal = 1.0 / floor(*absmax);
        for (values, packed) in values.chunks_exact(LANES).zip(packed.chunks_exact_mut(LANES / 2)) {
            let mut scaled = [0.0f32; LANES];
            T::widen(values, &mut scaled);
            for s in &mut scaled {
                *s *= reciprocal;
            }
            pack(codebook, &ranks(codebook.midpoints(), &scaled), packed);
        }
    }
}

/// Quantises the short last block of a group; returns its absmax.
#[cold]
pub(super) fn quantize_short_block<T: Element>(codebook: Codebook, values: &[T], packed: &mut [u8]) -> f32 {
    let absmax = floor(T::absmax(values));
    for (values, packed) in values.chunks(LANES).zip(packed.chunks_mut(LANES / 2)) {
        // Lanes beyond the end stay 0.0, the value that pads the last nibble of an odd group.
        let mut scaled = [0.0f32; LANES];
        T::widen(values, &mut scaled[..values.len()]);
        for s in &mut scaled[..values.len()] {
            *s /= absmax;
        }
        pack(codebook, &ranks(codebook.midpoints(), &scaled), packed);
    }
    absmax
}

/// Restores values of one block that start at a high nibble.
#[inline(never)]
pub(super) fn restore_block<T: Element>(codebook: Codebook, bytes: &[u8], absmax: f32, out: &mut [T]) {
    let table = codebook.codes().map(|code| T::from_f32(code * absmax));
    let (pairs, last) = out.as_chunks_mut::<2>();
    for (pair, &byte) in pairs.iter_mut().zip(bytes) {
        *pair = [table[usize::from(byte >> 4)], table[usize::from(byte & 15)]];
    }
    if let [last] = last {
        *last = table[usize::from(bytes[pairs.len()] >> 4)];
    }
}

/// The scale's divisor: `absmax`, but at least 1e-38; NaN stays NaN.
#[inline]
pub(super) fn floor(absmax: f32) -> f32 {
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
fn ranks(midpoints: &[f32; 15], scaled: &[f32; LANES]) -> [i32; LANES] {
    let mut ranks = [0i32; LANES];
    for &midpoint in midpoints {
        for (rank, &s) in ranks.iter_mut().zip(scaled) {
            // Not `s > midpoint`: a NaN must count.
            #[allow(clippy::neg_cmp_op_on_partial_ord)]
            let above = !(s <= midpoint);
            *rank += i32::from(above);
        }
    }
    ranks
}

/// Joins the indices of pairs of ranks into bytes, the first in the high nibble.
#[inline]
fn pack(codebook: Codebook, ranks: &[i32; LANES], packed: &mut [u8]) {
    let pairs = packed.iter_mut().zip(ranks.chunks_exact(2));
    match codebook {
        // Its ranks are its indices; without the look-up this is vector code.
        Codebook::Nf4 => pairs.for_each(|(byte, pair)| *byte = (pair[0] << 4 | pair[1]) as u8),
        Codebook::Fp4 => {
            let index = |rank: i32| codebook.ranked()[rank as usize];
            pairs.for_each(|(byte, pair)| *byte = index(pair[0]) << 4 | index(pair[1]));
        }
    }
}
