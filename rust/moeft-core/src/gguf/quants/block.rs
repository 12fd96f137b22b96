//! What the blocks of all formats share.

use half::f16;

/// `value` as a block stores its scales: f16, rounded to nearest even, little endian.
#[inline(always)]
pub(super) fn half_bytes(value: f32) -> [u8; 2] {
    f16::from_f32(value).to_le_bytes()
}

/// A stored scale.
#[inline(always)]
pub(super) fn half_value(bytes: &[u8]) -> f32 {
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

/// `1 / value`, and 0 for 0.
#[inline(always)]
pub(super) fn inverse_or_zero(value: f32) -> f32 {
    if value == 0.0 {
        0.0
    } else {
        1.0 / value
    }
}

/// The low byte of `value` without its fraction, as x86-64 converts: 0 for what no i32 holds. ggml relies on it where the
/// largest magnitude of a block is so small that its inverse is infinite.
#[inline(always)]
pub(super) fn low_byte(value: f32) -> u8 {
    if value.abs() < 2_147_483_648.0 {
        value as i32 as u8
    } else {
        0
    }
}

/// Levels of 32 values in 4 bits each: value `i` is in the low bits of byte `i`, value `16 + i` in its high bits.
#[inline(always)]
pub(super) fn pack_nibbles(levels: &[u8; 32], bytes: &mut [u8]) {
    for i in 0..16 {
        bytes[i] = (levels[i] & 15) | (levels[16 + i] << 4);
    }
}

/// The levels that [`pack_nibbles`] stored, and in bit 4 those of `high`.
#[inline(always)]
pub(super) fn unpack_nibbles(bytes: &[u8], high: u32) -> [u8; 32] {
    let mut levels = [0; 32];
    for i in 0..16 {
        levels[i] = (bytes[i] & 15) | ((high >> i) as u8 & 1) << 4;
        levels[16 + i] = (bytes[i] >> 4) | ((high >> (16 + i)) as u8 & 1) << 4;
    }
    levels
}

/// Bit 4 of 32 levels, that of value `i` in bit `i`.
#[inline(always)]
pub(super) fn fifth_bits(levels: &[u8; 32]) -> u32 {
    let mut bits = 0;
    for i in 0..32 {
        bits |= u32::from(levels[i] >> 4 & 1) << i;
    }
    bits
}

/// Weights of the errors of a row's values where an importance is known: it, times a magnitude that grows with the value.
#[inline(always)]
pub(super) fn weighted<const LEN: usize>(values: &[f32; LEN], importance: &[f32], mean_square: f32) -> [f32; LEN] {
    let mut weights = [0.0; LEN];
    for i in 0..LEN {
        weights[i] = importance[i] * (mean_square + values[i] * values[i]).sqrt();
    }
    weights
}

/// Sum of squares, added up in order.
#[inline(always)]
pub(super) fn sum_of_squares(values: &[f32]) -> f32 {
    let mut sum = 0.0;
    for &value in values {
        sum += value * value;
    }
    sum
}
