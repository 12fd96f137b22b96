//! Q8_0: 32 values of `scale * level`, levels in int8. Scale (f16), then levels.

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::block::{half_value, inverse_or_zero};

const LEN: usize = 32;
const BYTES: usize = 34;

/// Blocks whose scales are computed side by side.
const TOGETHER: usize = 8;

#[inline(always)]
pub(super) fn quantize(values: &[f32], bytes: &mut [u8]) {
    let (values, bytes) = (values.as_chunks::<LEN>().0, bytes.as_chunks_mut::<BYTES>().0);
    let ((values, last_values), (bytes, last_bytes)) =
        (values.as_chunks::<TOGETHER>(), bytes.as_chunks_mut::<TOGETHER>());
    for (values, bytes) in values.iter().zip(bytes) {
        quantize_blocks(values, bytes);
    }
    for (values, bytes) in last_values.iter().zip(last_bytes) {
        quantize_blocks(&[*values], std::array::from_mut(bytes));
    }
}

#[inline(always)]
fn quantize_blocks<const N: usize>(values: &[[f32; LEN]; N], bytes: &mut [[u8; BYTES]; N]) {
    // Loops, since a closure would be compiled for the least of CPUs and called.
    let mut scales = [0.0; N];
    for block in 0..N {
        scales[block] = largest_magnitude(&values[block]) / 127.0;
    }
    let mut stored = [f16::ZERO; N];
    stored.convert_from_f32_slice(&scales);
    for block in 0..N {
        let inverse = inverse_or_zero(scales[block]);
        // An infinite inverse belongs to a scale that is zero in f16; ggml's conversion then gives zeros.
        let inverse = if inverse.is_finite() { inverse } else { 0.0 };
        let mut levels = [0; LEN];
        for i in 0..LEN {
            levels[i] = round_half_away(values[block][i] * inverse);
        }
        bytes[block][..2].copy_from_slice(&stored[block].to_le_bytes());
        bytes[block][2..].copy_from_slice(&levels);
    }
}

/// In halves, since a fold would compare one value after the other.
#[inline(always)]
fn largest_magnitude(values: &[f32; LEN]) -> f32 {
    let mut largest = *values;
    for value in &mut largest {
        *value = value.abs();
    }
    let mut len = LEN;
    while len > 1 {
        len /= 2;
        for i in 0..len {
            largest[i] = if largest[len + i] > largest[i] { largest[len + i] } else { largest[i] };
        }
    }
    largest[0]
}

/// The nearest integer of a value in -127..=127, ties away from zero, as the bits of an i8.
#[inline(always)]
fn round_half_away(value: f32) -> u8 {
    // The largest float below a half: a half itself would carry the value just below it up to one.
    let whole = (value + 0.5f32.next_down().copysign(value)).trunc();
    // Adding this puts an integer into the low bits.
    (whole + 12_582_912.0).to_bits() as u8
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
