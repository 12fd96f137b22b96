//! Q4_K and Q5_K: eight blocks of 32 values of `scale * level - min`, levels in 4 or 5 bits.
//!
//! A super-block is the unit of its scales and of its minima (f16), 6 bits each for eight of them (12 bytes), with five
//! bits the fifth of all levels, then the low four.

use super::block::{half_bytes, half_value, sum_of_squares};
use super::search::{affine, nearest, positive, transpose, Affine, AffineGrid, Lanes};

const LEN: usize = 256;
const BLOCK: usize = 32;
const BLOCKS: usize = 8;
/// Largest scale or minimum in 6 bits.
const LARGEST: i32 = 63;

type Blocks = [Lanes<BLOCKS>; BLOCK];

/// Scales and minima as they are stored.
struct Scales {
    unit: [u8; 2],
    min_unit: [u8; 2],
    scales: [u8; BLOCKS],
    mins: [u8; BLOCKS],
}

/// `BYTES` is 144 with four bits, 176 with five.
#[inline(always)]
pub(super) fn quantize<const BYTES: usize>(
    values: &[f32],
    row_len: usize,
    importance: Option<&[f32]>,
    bytes: &mut [u8],
) {
    let blocks = values.as_chunks::<LEN>().0.iter().zip(bytes.as_chunks_mut::<BYTES>().0);
    for (index, (values, bytes)) in blocks.enumerate() {
        let x: Blocks = transpose(values);
        let importance = importance.map(|importance| &importance[index * LEN % row_len..][..LEN]);
        let (found, stored) = match importance {
            None => plain::<BYTES>(&x),
            Some(importance) => by_importance::<BYTES>(values, &x, importance),
        };
        store::<BYTES>(&x, &found, &stored, bytes);
    }
}

/// Most of a level.
#[inline(always)]
fn max_level<const BYTES: usize>() -> i32 {
    if BYTES == 144 {
        15
    } else {
        31
    }
}

#[inline(always)]
fn plain<const BYTES: usize>(x: &Blocks) -> (Affine<BLOCKS>, Scales) {
    let grid = match BYTES {
        144 => AffineGrid { max_level: 15, first: -1.0, step: 0.1, steps: 20 },
        _ => AffineGrid { max_level: 31, first: -0.5, step: 0.1, steps: 15 },
    };
    let mut squares = [0.0; BLOCKS];
    for values in x {
        for n in 0..BLOCKS {
            squares[n] += values[n] * values[n];
        }
    }
    let mut weights: Blocks = [[0.0; BLOCKS]; BLOCK];
    for n in 0..BLOCKS {
        squares[n] = (squares[n] / BLOCK as f32).sqrt();
    }
    for i in 0..BLOCK {
        for n in 0..BLOCKS {
            weights[i][n] = squares[n] + x[i][n].abs();
        }
    }
    let found = affine(x, &weights, grid);
    let (scales, unit) = to_six_bits(&found.scale);
    let (mins, min_unit) = to_six_bits(&found.min);
    (found, Scales { unit, min_unit, scales, mins })
}

/// Eight scales as parts of 63 of the largest.
#[inline(always)]
fn to_six_bits(scales: &Lanes<BLOCKS>) -> ([u8; BLOCKS], [u8; 2]) {
    let mut max = 0.0;
    for &scale in scales {
        max = if scale > max { scale } else { max };
    }
    let inverse = if max > 0.0 { LARGEST as f32 / max } else { 0.0 };
    let mut levels = [0; BLOCKS];
    for n in 0..BLOCKS {
        levels[n] = (nearest(inverse * scales[n]) as u8).min(LARGEST as u8);
    }
    (levels, half_bytes(max / LARGEST as f32))
}

#[inline(always)]
fn by_importance<const BYTES: usize>(values: &[f32; LEN], x: &Blocks, importance: &[f32]) -> (Affine<BLOCKS>, Scales) {
    let grid = AffineGrid { max_level: max_level::<BYTES>(), first: -0.9, step: 0.05, steps: 36 };
    let mean_square = 2.0 * sum_of_squares(values) / LEN as f32;
    let mut weights: Blocks = transpose(importance);
    let mut sums = [0.0; BLOCKS];
    for i in 0..BLOCK {
        for n in 0..BLOCKS {
            weights[i][n] *= (mean_square + x[i][n] * x[i][n]).sqrt();
            sums[n] += weights[i][n];
        }
    }
    let found = affine(x, &weights, grid);
    let (unit, scales) = positive(&found.scale, &sums, LARGEST);
    let (min_unit, mins) = positive(&found.min, &sums, LARGEST);
    let at_most = |levels: [u8; BLOCKS]| levels.map(|level| if BYTES == 144 { level } else { level.min(63) });
    let (scales, mins) = (at_most(scales), at_most(mins));
    (found, Scales { unit: half_bytes(unit), min_unit: half_bytes(min_unit), scales, mins })
}

/// Levels for the scales as stored; where a stored scale is zero, those of the search remain.
#[inline(always)]
fn store<const BYTES: usize>(x: &Blocks, found: &Affine<BLOCKS>, stored: &Scales, bytes: &mut [u8; BYTES]) {
    bytes[..2].copy_from_slice(&stored.unit);
    bytes[2..4].copy_from_slice(&stored.min_unit);
    let (packed, rest) = bytes[4..].split_at_mut(12);
    pack_scales(&stored.scales, &stored.mins, packed);
    let (unit, min_unit) = (half_value(&stored.unit), half_value(&stored.min_unit));
    let (mut scale, mut min) = ([0.0; BLOCKS], [0.0; BLOCKS]);
    for n in 0..BLOCKS {
        let (level, min_level) = unpack_scale(packed, n);
        scale[n] = unit * f32::from(level);
        min[n] = min_unit * f32::from(min_level);
    }
    let max_level = max_level::<BYTES>();
    let mut levels = [[0u8; BLOCKS]; BLOCK];
    for i in 0..BLOCK {
        for n in 0..BLOCKS {
            levels[i][n] = nearest((x[i][n] + min[n]) / scale[n]).clamp(0, max_level) as u8;
        }
    }
    for n in (0..BLOCKS).filter(|&n| scale[n] == 0.0) {
        for i in 0..BLOCK {
            levels[i][n] = found.level(x[i][n], n, max_level);
        }
    }
    let (high, low) = rest.split_at_mut(if BYTES == 176 { BLOCK } else { 0 });
    for pair in 0..BLOCKS / 2 {
        for i in 0..BLOCK {
            low[pair * BLOCK + i] = (levels[i][2 * pair] & 15) | (levels[i][2 * pair + 1] << 4);
        }
    }
    if BYTES == 176 {
        for i in 0..BLOCK {
            let mut bits = 0;
            for n in 0..BLOCKS {
                bits |= (levels[i][n] >> 4) << n;
            }
            high[i] = bits;
        }
    }
}

/// Eight scales and eight minima of 6 bits in 12 bytes.
#[inline(always)]
fn pack_scales(scales: &[u8; BLOCKS], mins: &[u8; BLOCKS], packed: &mut [u8]) {
    packed[..4].copy_from_slice(&scales[..4]);
    packed[4..8].copy_from_slice(&mins[..4]);
    for n in 4..8 {
        packed[n + 4] = (scales[n] & 15) | ((mins[n] & 15) << 4);
        packed[n - 4] |= (scales[n] >> 4) << 6;
        packed[n] |= (mins[n] >> 4) << 6;
    }
}

/// Scale and minimum of block `n`.
#[inline(always)]
fn unpack_scale(packed: &[u8], n: usize) -> (u8, u8) {
    if n < 4 {
        (packed[n] & 63, packed[n + 4] & 63)
    } else {
        ((packed[n + 4] & 15) | ((packed[n - 4] >> 6) << 4), (packed[n + 4] >> 4) | ((packed[n] >> 6) << 4))
    }
}

pub(super) fn dequantize<const BYTES: usize>(bytes: &[u8], values: &mut [f32]) {
    for (values, bytes) in values.as_chunks_mut::<LEN>().0.iter_mut().zip(bytes.as_chunks::<BYTES>().0) {
        let (unit, min_unit) = (half_value(bytes), half_value(&bytes[2..]));
        let (packed, rest) = bytes[4..].split_at(12);
        let (high, low) = rest.split_at(if BYTES == 176 { BLOCK } else { 0 });
        for (n, values) in values.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
            let (level, min_level) = unpack_scale(packed, n);
            let (scale, min) = (unit * f32::from(level), min_unit * f32::from(min_level));
            for (i, value) in values.iter_mut().enumerate() {
                let fifth = high.get(i).map_or(0, |bits| (bits >> n & 1) << 4);
                let level = (low[n / 2 * BLOCK + i] >> (n % 2 * 4) & 15) | fifth;
                *value = scale * f32::from(level) - min;
            }
        }
    }
}
