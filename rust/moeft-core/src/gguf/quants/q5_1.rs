//! Q5_1: 32 values of `scale * level + min`, levels in 5 bits. Scale and min (f16), the fifth bits, then the low four.

use super::block::{
    fifth_bits, half_bytes, half_value, inverse_or_zero, low_byte, pack_nibbles, sum_of_squares, unpack_nibbles,
    weighted,
};
use super::search::{affine, transpose, AffineGrid};

const LEN: usize = 32;
const BYTES: usize = 24;
const GRID: AffineGrid = AffineGrid { max_level: 31, first: -0.9, step: 0.05, steps: 36 };

#[inline(always)]
pub(super) fn quantize(values: &[f32], row_len: usize, importance: Option<&[f32]>, bytes: &mut [u8]) {
    let rows = values.chunks_exact(row_len).zip(bytes.chunks_exact_mut(row_len / LEN * BYTES));
    for (row, bytes) in rows {
        let mean_square = importance.map_or(0.0, |_| sum_of_squares(row) / row_len as f32);
        let blocks = row.as_chunks::<LEN>().0.iter().zip(bytes.as_chunks_mut::<BYTES>().0);
        for (block, (values, bytes)) in blocks.enumerate() {
            let (scale, min, levels) = match importance {
                None => plain(values),
                Some(importance) => {
                    let weights = weighted(values, &importance[block * LEN..][..LEN], mean_square);
                    let found = affine::<LEN, 1>(&transpose::<LEN, 1>(values), &transpose::<LEN, 1>(&weights), GRID);
                    let mut levels = [0; LEN];
                    for i in 0..LEN {
                        levels[i] = found.level(values[i], 0, GRID.max_level);
                    }
                    (found.scale[0], -found.min[0], levels)
                }
            };
            bytes[..2].copy_from_slice(&half_bytes(scale));
            bytes[2..4].copy_from_slice(&half_bytes(min));
            bytes[4..8].copy_from_slice(&fifth_bits(&levels).to_le_bytes());
            pack_nibbles(&levels, &mut bytes[8..]);
        }
    }
}

#[inline(always)]
fn plain(values: &[f32; LEN]) -> (f32, f32, [u8; LEN]) {
    let (mut min, mut max) = (f32::MAX, -f32::MAX);
    for &value in values {
        min = if value < min { value } else { min };
        max = if value > max { value } else { max };
    }
    let scale = (max - min) / 31.0;
    let inverse = inverse_or_zero(scale);
    let mut levels = [0; LEN];
    for i in 0..LEN {
        levels[i] = low_byte((values[i] - min) * inverse + 0.5);
    }
    (scale, min, levels)
}

pub(super) fn dequantize(bytes: &[u8], values: &mut [f32]) {
    for (values, bytes) in values.as_chunks_mut::<LEN>().0.iter_mut().zip(bytes.as_chunks::<BYTES>().0) {
        let (scale, min) = (half_value(bytes), half_value(&bytes[2..]));
        let high = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
        for (value, level) in values.iter_mut().zip(unpack_nibbles(&bytes[8..], high)) {
            *value = f32::from(level) * scale + min;
        }
    }
}
