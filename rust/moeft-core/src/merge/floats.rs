//! The loops of [`crate::float`] and others of the engine, for the vector unit at hand.

use super::simd::vectorised;
use crate::checkpoint::Dtype;
use crate::float;

vectorised! {
    /// [`crate::float::decode`], vectorised.
    pub fn decode(dtype: Dtype, bytes: &[u8], values: &mut [f32]) {
        float::decode(dtype, bytes, values);
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
    /// Whether no value is NaN or infinite.
    pub fn all_finite(values: &[f32]) -> bool {
        values.iter().fold(true, |finite, value| finite & value.is_finite())
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
