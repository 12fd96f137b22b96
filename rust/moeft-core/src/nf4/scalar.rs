//! The definition of NF4 as bitsandbytes writes it, one value at a time.
//!
//! Slow and allocating on purpose: it is the text to read and the oracle of the fast path.

use super::codebook::MIN_ABSMAX;
use super::{Element, Layout, CODE, MIDPOINTS};

/// Index of a scaled value: the number of midpoints strictly below it. NaN counts as above them all.
pub fn index(scaled: f32) -> u8 {
    if scaled.is_nan() {
        return 15;
    }
    MIDPOINTS.iter().filter(|&&midpoint| midpoint < scaled).count() as u8
}

/// Quantises one block; returns its indices and its absmax.
///
/// A full block is multiplied by the reciprocal of its absmax and stores a zero absmax as zero. A
/// short block (the tail of a group) is divided by its absmax and stores at least 1e-38.
pub fn quantize_block<T: Element>(values: &[T], block_size: usize) -> (Vec<u8>, f32) {
    let values = values.iter().map(|v| v.to_f32());
    let absmax = values.clone().map(f32::abs).fold(0.0, nan_max);
    let scale = nan_max(absmax, MIN_ABSMAX);
    if values.len() < block_size {
        (values.map(|v| index(v / scale)).collect(), scale)
    } else {
        let reciprocal = 1.0 / scale;
        (values.map(|v| index(v * reciprocal)).collect(), absmax)
    }
}

/// Quantises all groups; returns packed bytes and absmax.
///
/// The first value of a byte is its high nibble. The missing last value of an odd group counts as 0.0: index 7.
pub fn quantize<T: Element>(values: &[T], layout: Layout) -> (Vec<u8>, Vec<f32>) {
    let (mut packed, mut absmax) = (Vec::new(), Vec::new());
    for group in values.chunks(layout.group_len.max(1)) {
        let mut indices = Vec::new();
        for block in group.chunks(layout.block_size) {
            let (block_indices, block_absmax) = quantize_block(block, layout.block_size);
            indices.extend(block_indices);
            absmax.push(block_absmax);
        }
        packed.extend(indices.chunks(2).map(|pair| pair[0] << 4 | pair.get(1).copied().unwrap_or(7)));
    }
    (packed, absmax)
}

/// Restores all groups: code times absmax in f32, rounded once to `T`.
pub fn dequantize<T: Element>(packed: &[u8], absmax: &[f32], layout: Layout) -> Vec<T> {
    let mut values = Vec::with_capacity(layout.values_len());
    for group in 0..layout.groups {
        let bytes = &packed[group * layout.group_packed_len()..];
        let scales = &absmax[group * layout.group_absmax_len()..];
        for i in 0..layout.group_len {
            let index = if i % 2 == 0 { bytes[i / 2] >> 4 } else { bytes[i / 2] & 15 };
            values.push(T::from_f32(CODE[usize::from(index)] * scales[i / layout.block_size]));
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
