//! Q8_0: 32 values of `scale * level`, levels in int8. Scale (f16), then levels.

use super::block::{half_bytes, half_value, inverse_or_zero};

const LEN: usize = 32;
const BYTES: usize = 34;

#[inline(always)]
pub(super) fn quantize(values: &[f32], bytes: &mut [u8]) {
    for (values, bytes) in values.as_chunks::<LEN>().0.iter().zip(bytes.as_chunks_mut::<BYTES>().0) {
        let mut magnitude = [0.0f32; 8];
        for part in values.as_chunks::<8>().0 {
            for n in 0..8 {
                magnitude[n] = if part[n].abs() > magnitude[n] { part[n].abs() } else { magnitude[n] };
            }
        }
        let scale = magnitude.into_iter().fold(0.0, f32::max) / 127.0;
        let inverse = inverse_or_zero(scale);
        // An infinite inverse belongs to a scale that is zero in f16; ggml's conversion then gives zeros.
        let inverse = if inverse.is_finite() { inverse } else { 0.0 };
        bytes[..2].copy_from_slice(&half_bytes(scale));
        let mut levels = [0; LEN];
        for i in 0..LEN {
            levels[i] = round_half_away(values[i] * inverse);
        }
        bytes[2..].copy_from_slice(&levels);
    }
}

/// The nearest integer of a value in -127..=127, ties away from zero, as the bits of an i8.
#[inline(always)]
fn round_half_away(value: f32) -> u8 {
    // The sum has the integer in its low bits, ties to even; what is left is exact, and tells the ties that went inwards.
    let sum = value + 12_582_912.0;
    let left = value - (sum - 12_582_912.0);
    let up = (left == 0.5) & (value > 0.0);
    let down = (left == -0.5) & (value < 0.0);
    (sum.to_bits() as u8).wrapping_add(u8::from(up)).wrapping_sub(u8::from(down))
}

pub(super) fn dequantize(bytes: &[u8], values: &mut [f32]) {
    for (values, bytes) in values.as_chunks_mut::<LEN>().0.iter_mut().zip(bytes.as_chunks::<BYTES>().0) {
        let scale = half_value(bytes);
        for (value, &level) in values.iter_mut().zip(&bytes[2..]) {
            *value = f32::from(level as i8) * scale;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::round_half_away;

    #[test]
    fn every_half_and_its_neighbours_round_as_the_standard_library_does() {
        for half in -254..=254 {
            let value = half as f32 / 2.0;
            for value in [value.next_down(), value, value.next_up()] {
                assert_eq!(round_half_away(value), value.round() as i8 as u8, "{value}");
            }
        }
    }
}
