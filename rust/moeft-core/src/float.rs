//! Weights between bytes and f32: F32, BF16 and F16, little endian.

use half::{bf16, f16};

use crate::checkpoint::Dtype;

/// Decodes `bytes` into `values`; exact. Inlined, like the other loops here, into callers compiled for vector units.
///
/// # Panics
/// If the lengths differ or `dtype` is none of F32, BF16, F16: our own mistake.
#[inline(always)]
pub fn decode(dtype: Dtype, bytes: &[u8], values: &mut [f32]) {
    assert_eq!(bytes.len() as u64 * 8, values.len() as u64 * u64::from(dtype.bits()));
    match dtype {
        Dtype::F32 => {
            for (value, bytes) in values.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *value = f32::from_le_bytes(*bytes);
            }
        }
        Dtype::BF16 => {
            for (value, bytes) in values.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *value = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
            }
        }
        Dtype::F16 => {
            for (value, bytes) in values.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *value = f16::from_le_bytes(*bytes).to_f32();
            }
        }
        other => panic!("{other} is not a type of weights"),
    }
}

/// Encodes `values` into `bytes`, rounding to nearest, ties to even.
///
/// # Panics
/// As [`decode`].
#[inline(always)]
pub fn encode(dtype: Dtype, values: &[f32], bytes: &mut [u8]) {
    assert_eq!(bytes.len() as u64 * 8, values.len() as u64 * u64::from(dtype.bits()));
    match dtype {
        Dtype::F32 => {
            for (value, bytes) in values.iter().zip(bytes.as_chunks_mut::<4>().0) {
                *bytes = value.to_le_bytes();
            }
        }
        Dtype::BF16 => {
            for (value, bytes) in values.iter().zip(bytes.as_chunks_mut::<2>().0) {
                *bytes = round_bf16(*value).to_le_bytes();
            }
        }
        Dtype::F16 => {
            for (value, bytes) in values.iter().zip(bytes.as_chunks_mut::<2>().0) {
                *bytes = f16::from_f32(*value).to_le_bytes();
            }
        }
        other => panic!("{other} is not a type of weights"),
    }
}

/// `value` as it comes back after being stored as `dtype`.
#[inline(always)]
pub fn round_trip(dtype: Dtype, value: f32) -> f32 {
    match dtype {
        Dtype::BF16 => round_trip_bf16(value),
        Dtype::F16 => f16::from_f32(value).to_f32(),
        _ => value,
    }
}

/// `value` as it comes back after being stored as bf16.
#[inline(always)]
pub fn round_trip_bf16(value: f32) -> f32 {
    f32::from_bits(u32::from(round_bf16(value)) << 16)
}

/// The bits of `value` as bf16. Without branches, so that the loop around it becomes vector code.
#[inline(always)]
pub fn round_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16;
    let quiet_nan = (bits >> 16) as u16 | 0x40;
    if value.is_nan() {
        quiet_nan
    } else {
        rounded
    }
}

/// Position of the first NaN or infinity, and its value.
#[inline(always)]
pub fn first_non_finite(dtype: Dtype, bytes: &[u8]) -> Option<(usize, f32)> {
    // The first loop of each type has no early exit and becomes vector code; what it must find are bits above those of
    // every finite magnitude. The second one runs only on bad weights.
    match dtype {
        Dtype::F32 => {
            let items = bytes.as_chunks::<4>().0;
            let largest = items.iter().fold(0, |largest, bytes| largest.max(u32::from_le_bytes(*bytes) & 0x7fff_ffff));
            find(largest < 0x7f80_0000, items, |bytes| f32::from_le_bytes(*bytes))
        }
        Dtype::BF16 => {
            let items = bytes.as_chunks::<2>().0;
            find(largest_16(items) < 0x7f80, items, |bytes| bf16::from_le_bytes(*bytes).to_f32())
        }
        Dtype::F16 => {
            let items = bytes.as_chunks::<2>().0;
            find(largest_16(items) < 0x7c00, items, |bytes| f16::from_le_bytes(*bytes).to_f32())
        }
        other => panic!("{other} is not a type of weights"),
    }
}

/// The largest bits without the sign.
#[inline(always)]
fn largest_16(items: &[[u8; 2]]) -> u16 {
    items.iter().fold(0, |largest, bytes| largest.max(u16::from_le_bytes(*bytes) & 0x7fff))
}

#[inline(always)]
fn find<T>(all_finite: bool, items: &[T], value: impl Fn(&T) -> f32) -> Option<(usize, f32)> {
    if all_finite {
        return None;
    }
    items.iter().map(value).enumerate().find(|(_, value)| !value.is_finite())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn bf16_rounding_equals_the_half_crate(bits: u32) {
            let value = f32::from_bits(bits);
            prop_assert_eq!(round_bf16(value), bf16::from_f32(value).to_bits());
        }

        #[test]
        fn decoding_what_was_encoded_equals_round_trip(value: f32) {
            for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
                let mut bytes = vec![0; dtype.bits() as usize / 8];
                encode(dtype, &[value], &mut bytes);
                let mut back = [f32::NAN];
                decode(dtype, &bytes, &mut back);
                prop_assert_eq!(back[0].to_bits(), round_trip(dtype, value).to_bits());
            }
        }
    }

    proptest! {
        #[test]
        fn what_is_not_finite_is_found_in_every_type(
            bits in prop::collection::vec(any::<u32>(), 1..40), at in any::<prop::sample::Index>(),
            broken in prop::sample::select(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY]),
        ) {
            for (dtype, largest) in [(Dtype::F32, f32::MAX), (Dtype::BF16, 3.38e38), (Dtype::F16, 65504.0)] {
                let finite = bits.iter().map(|&bits| f32::from_bits(bits)).map(|value| {
                    if value.is_finite() { value.clamp(-largest, largest) } else { -largest }
                });
                let mut values: Vec<f32> = finite.collect();
                let mut bytes = vec![0; values.len() * dtype.bits() as usize / 8];
                encode(dtype, &values, &mut bytes);
                prop_assert_eq!(first_non_finite(dtype, &bytes), None);
                let place = at.index(values.len());
                values[place] = broken;
                encode(dtype, &values, &mut bytes);
                let found = first_non_finite(dtype, &bytes).map(|(place, value)| (place, value.is_nan(), value > 0.0));
                prop_assert_eq!(found, Some((place, broken.is_nan(), broken > 0.0)));
            }
        }
    }

    #[test]
    fn the_first_non_finite_value_is_found() {
        let mut bytes = vec![0; 10];
        encode(Dtype::BF16, &[0.0, -1.0, f32::INFINITY, f32::NAN, 2.0], &mut bytes);
        assert_eq!(first_non_finite(Dtype::BF16, &bytes), Some((2, f32::INFINITY)));
        assert_eq!(first_non_finite(Dtype::BF16, &bytes[..4]), None);
    }
}
