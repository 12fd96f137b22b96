//! Q6_K: sixteen blocks of 16 values of `scale * (level - 32)`, levels in 6 bits.
//!
//! A super-block is the low four bits of all levels, their high two, sixteen scales (int8), and the scales' unit (f16).

use super::block::{half_bytes, half_value};
use super::search::{nearest, symmetric, transpose, Lanes, ZERO};

const LEN: usize = 256;
const BYTES: usize = 210;
const BLOCK: usize = 16;
const BLOCKS: usize = 16;
const HALF: i32 = 32;

type Blocks = [Lanes<BLOCKS>; BLOCK];

#[inline(always)]
pub(super) fn quantize(values: &[f32], row_len: usize, importance: Option<&[f32]>, bytes: &mut [u8]) {
    let blocks = values.as_chunks::<LEN>().0.iter().zip(bytes.as_chunks_mut::<BYTES>().0);
    for (index, (values, bytes)) in blocks.enumerate() {
        let x: Blocks = transpose(values);
        let weights = match importance {
            Some(importance) => transpose(&importance[index * LEN % row_len..][..LEN]),
            None => squares(&x),
        };
        let found = symmetric(&x, &weights, HALF);
        let (mut magnitude, mut extreme) = (0.0, 0.0);
        for &scale in &found.scale {
            if scale.abs() > magnitude {
                (magnitude, extreme) = (scale.abs(), scale);
            }
        }
        if magnitude < ZERO {
            bytes.fill(0);
            continue;
        }
        let inverse = -128.0 / extreme;
        let unit = half_bytes(1.0 / inverse);
        let mut scale = [0.0; BLOCKS];
        for n in 0..BLOCKS {
            let level = nearest(inverse * found.scale[n]).min(127) as i8;
            bytes[192 + n] = level as u8;
            scale[n] = half_value(&unit) * f32::from(level);
        }
        bytes[208..].copy_from_slice(&unit);
        let mut levels = [[0u8; BLOCKS]; BLOCK];
        for i in 0..BLOCK {
            for n in 0..BLOCKS {
                levels[i][n] = (nearest(x[i][n] / scale[n]).clamp(-HALF, HALF - 1) + HALF) as u8;
            }
        }
        // Where a stored scale is zero, the levels of the search remain.
        for n in (0..BLOCKS).filter(|&n| scale[n] == 0.0) {
            for i in 0..BLOCK {
                levels[i][n] = found.level(x[i][n], n, HALF);
            }
        }
        pack(&levels, bytes);
    }
}

#[inline(always)]
fn squares(x: &Blocks) -> Blocks {
    let mut squares = *x;
    for i in 0..BLOCK {
        for n in 0..BLOCKS {
            squares[i][n] *= x[i][n];
        }
    }
    squares
}

/// Each half of the values has four quarters of 32, whose levels share bytes.
#[inline(always)]
fn pack(levels: &[[u8; BLOCKS]; BLOCK], bytes: &mut [u8; BYTES]) {
    let (low, rest) = bytes.split_at_mut(128);
    for half in 0..2 {
        for part in 0..2 {
            for i in 0..BLOCK {
                let quarter: [u8; 4] = [0, 2, 4, 6].map(|block| levels[i][8 * half + block + part]);
                let place = 16 * part + i;
                low[64 * half + place] = (quarter[0] & 15) | (quarter[2] << 4);
                low[64 * half + 32 + place] = (quarter[1] & 15) | (quarter[3] << 4);
                rest[32 * half + place] =
                    quarter[0] >> 4 | quarter[1] >> 4 << 2 | quarter[2] >> 4 << 4 | quarter[3] >> 4 << 6;
            }
        }
    }
}

pub(super) fn dequantize(bytes: &[u8], values: &mut [f32]) {
    for (values, bytes) in values.as_chunks_mut::<LEN>().0.iter_mut().zip(bytes.as_chunks::<BYTES>().0) {
        let unit = half_value(&bytes[208..]);
        for (index, value) in values.iter_mut().enumerate() {
            let (half, quarter, place) = (index / 128, index / 32 % 4, index % 32);
            let low = bytes[64 * half + 32 * (quarter % 2) + place] >> (quarter / 2 * 4) & 15;
            let high = bytes[128 + 32 * half + place] >> (2 * quarter) & 3;
            let level = f32::from(low | high << 4) - HALF as f32;
            *value = unit * f32::from(bytes[192 + index / BLOCK] as i8) * level;
        }
    }
}
