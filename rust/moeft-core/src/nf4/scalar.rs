//! The definition of the 4-bit types as bitsandbytes writes them, one value at a time.
//!
//! Slow and allocating on purpose: it is the text to read and the oracle of the fast paths.

use super::codebook::MIN_ABSMAX;
use super::{Codebook, Element, Layout};

/// Index of a scaled value: that of the rank which is the number of midpoints strictly below it. NaN counts as above
/// them all.
pub fn index(codebook: Codebook, scaled: f32) -> u8 {
    let is_below = |&&midpoint: &&f32| midpoint < scaled || scaled.is_nan();
    codebook.ranked()[codebook.midpoints().iter().filter(is_below).count()]
}

/// Quantises one block; returns its indices and its absmax.
///
/// A full block is multiplied by the reciprocal of its absmax and stores a zero absmax as zero. A
/// short block (the tail of a group) is divided by its absmax and stores at least 1e-38.
pub fn quantize_block<T: Element>(codebook: Codebook, values: &[T], block_size: usize) -> (Vec<u8>, f32) {
    let values = values.iter().map(|v| v.to_f32());
    let absmax = values.clone().map(f32::abs).fold(0.0, nan_max);
    let scale = nan_max(absmax, MIN_ABSMAX);
    if values.len() < block_size {
        (values.map(|v| index(codebook, v / scale)).collect(), scale)
    } else {
        let reciprocal = 1.0 / scale;
        (values.map(|v| index(codebook, v * reciprocal)).collect(), absmax)
    }
}

/// Quantises all groups; returns packed bytes and absmax.
///
/// The first value of a byte is its high nibble. The missing last value of an odd group counts as 0.0.
pub fn quantize<T: Element>(codebook: Codebook, values: &[T], layout: Layout) -> (Vec<u8>, Vec<f32>) {
    let (mut packed, mut absmax) = (Vec::new(), Vec::new());
    let zero = index(codebook, 0.0);
    for group in values.chunks(layout.group_len.max(1)) {
        let mut indices = Vec::new();
        for block in group.chunks(layout.block_size) {
            let (block_indices, block_absmax) = quantize_block(codebook, block, layout.block_size);
            indices.extend(block_indices);
            absmax.push(block_absmax);
        }
        packed.extend(indices.chunks(2).map(|pair| pair[0] << 4 | pair.get(1).copied().unwrap_or(zero)));
    }
    (packed, absmax)
}

/// Restores all groups: code times absmax in f32, rounded once to `T`.
pub fn dequantize<T: Element>(codebook: Codebook, packed: &[u8], absmax: &[f32], layout: Layout) -> Vec<T> {
    let mut values = Vec::with_capacity(layout.values_len());
    for group in 0..layout.groups {
        let bytes = &packed[group * layout.group_packed_len()..];
        let scales = &absmax[group * layout.group_absmax_len()..];
        for i in 0..layout.group_len {
            let index = if i % 2 == 0 { bytes[i / 2] >> 4 } else { bytes[i / 2] & 15 };
            values.push(T::from_f32(codebook.codes()[usize::from(index)] * scales[i / layout.block_size]));
        }
    }
    values
}

/// The larger, or NaN if either is; `f32::max` would return the other.
fn nan_max(a: f32, b: f32) -> f32 {
    if a.is_nan() || a > b {
        a
    } else {
        b
    }
}
