//! The loops of [`crate::float`] and others of the engine, for the vector unit at hand.

use super::simd::vectorised;
use crate::checkpoint::Dtype;
use crate::float;

/// Values that are looked at as soon as they are decoded: they stay in the L1 cache.
const PIECE: usize = 1024;

vectorised! {
    /// [`crate::float::decode`], vectorised; returns the largest magnitude, which is not finite if any value is not.
    pub fn decode(dtype: Dtype, bytes: &[u8], values: &mut [f32]) -> f32 {
        let mut largest = 0;
        let size = dtype.bits() as usize / 8;
        assert_eq!(bytes.len(), values.len() * size);
        for (bytes, values) in bytes.chunks(PIECE * size).zip(values.chunks_mut(PIECE)) {
            float::decode(dtype, bytes, values);
            // The bits of magnitudes are in the order of the magnitudes, infinity above all numbers and NaN above that.
            largest = values.iter().fold(largest, |largest, value| largest.max(value.abs().to_bits()));
        }
        f32::from_bits(largest)
    }
}

vectorised! {
    /// [`crate::float::encode`], vectorised.
    pub fn encode(dtype: Dtype, values: &[f32], bytes: &mut [u8]) {
        float::encode(dtype, values, bytes);
    }
}

vectorised! {
    /// [`crate::float::first_non_finite`], vectorised.
    pub fn first_non_finite(dtype: Dtype, bytes: &[u8]) -> Option<(usize, f32)> {
        float::first_non_finite(dtype, bytes)
    }
}

vectorised! {
    /// `values -= base`.
    pub fn subtract(values: &mut [f32], base: &[f32]) {
        for (value, base) in values.iter_mut().zip(base) {
            *value -= base;
        }
    }
}
