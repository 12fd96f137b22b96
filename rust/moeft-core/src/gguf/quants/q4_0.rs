//! Q4_0 and Q5_0: 32 values of `scale * (level - half)`, levels below `2 * half` in 4 or 5 bits.
//!
//! A block is the scale (f16), with five bits the fifth of all levels, then the low four.

use super::block::{
    fifth_bits, half_bytes, half_value, inverse_or_zero, low_byte, pack_nibbles, sum_of_squares, unpack_nibbles,
    weighted,
};
use super::search::{symmetric, transpose};

const LEN: usize = 32;

/// `BYTES` is 18 with four bits, 22 with five.
#[inline(always)]
pub(super) fn quantize<const BYTES: usize>(
    values: &[f32],
    row_len: usize,
    importance: Option<&[f32]>,
    bytes: &mut [u8],
) {
    let half = half::<BYTES>();
    let rows = values.chunks_exact(row_len).zip(bytes.chunks_exact_mut(row_len / LEN * BYTES));
    for (row, bytes) in rows {
        let mean_square = importance.map_or(0.0, |_| sum_of_squares(row) / row_len as f32);
        let blocks = row.as_chunks::<LEN>().0.iter().zip(bytes.as_chunks_mut::<BYTES>().0);
        for (block, (values, bytes)) in blocks.enumerate() {
            let (scale, levels) = match importance {
                None => plain(values, half),
                Some(importance) => {
                    let weights = weighted(values, &importance[block * LEN..][..LEN], mean_square);
                    let found =
                        symmetric::<LEN, 1>(&transpose::<LEN, 1>(values), &transpose::<LEN, 1>(&weights), half as i32);
                    let mut levels = [0; LEN];
                    for i in 0..LEN {
                        levels[i] = found.level(values[i], 0, half as i32);
                    }
                    (found.scale[0], levels)
                }
            };
            bytes[..2].copy_from_slice(&half_bytes(scale));
            if BYTES == 22 {
                bytes[2..6].copy_from_slice(&fifth_bits(&levels).to_le_bytes());
            }
            pack_nibbles(&levels, &mut bytes[BYTES - 16..]);
        }
    }
}

/// Levels are 8 or 16 above those of a signed integer.
#[inline(always)]
fn half<const BYTES: usize>() -> u8 {
    if BYTES == 18 {
        8
    } else {
        16
    }
}

/// The value with the largest magnitude gets level 0.
#[inline(always)]
fn plain(values: &[f32; LEN], half: u8) -> (f32, [u8; LEN]) {
    let mut magnitude = 0.0f32;
    for value in values {
        magnitude = magnitude.max(value.abs());
    }
    // The first of two that are as large decides the sign; that of a zero does not count.
    let mut extreme = 0.0;
    for &value in values.iter().rev() {
        extreme = if value.abs() == magnitude { value } else { extreme };
    }
    let extreme = if magnitude == 0.0 { 0.0 } else { extreme };
    let scale = extreme / -f32::from(half);
    let inverse = inverse_or_zero(scale);
    let mut levels = [0; LEN];
    for i in 0..LEN {
        levels[i] = low_byte(values[i] * inverse + (f32::from(half) + 0.5)).min(2 * half - 1);
    }
    (scale, levels)
}

pub(super) fn dequantize<const BYTES: usize>(bytes: &[u8], values: &mut [f32]) {
    let half = f32::from(half::<BYTES>());
    for (values, bytes) in values.as_chunks_mut::<LEN>().0.iter_mut().zip(bytes.as_chunks::<BYTES>().0) {
        let scale = half_value(bytes);
        let high = if BYTES == 22 { u32::from_le_bytes([bytes[2], bytes[3], bytes[4], bytes[5]]) } else { 0 };
        for (value, level) in values.iter_mut().zip(unpack_nibbles(&bytes[BYTES - 16..], high)) {
            *value = (f32::from(level) - half) * scale;
        }
    }
}
