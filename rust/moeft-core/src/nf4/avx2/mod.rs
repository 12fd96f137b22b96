//! AVX2, FMA and F16C: 8 values of f32 or 16 of a half type in a vector.

mod quantize;
mod restore;

use std::arch::x86_64::*;

use super::element::Kind;
use super::Element;

pub(super) use quantize::quantize_blocks;
pub(super) use restore::restore;

/// Values quantised, or restored to a half type, at once; it divides every block size.
const STEP: usize = 32;

/// Loads 32 bytes of values.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn load<V>(values: &[V]) -> __m256i {
    debug_assert_eq!(size_of_val(values), 32);
    // SAFETY: the load reads the 32 bytes of the slice and needs no alignment.
    unsafe { _mm256_loadu_si256(values.as_ptr().cast()) }
}

/// Widens eight values to f32, exactly.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn widen<T: Element>(values: &[T; 8]) -> __m256 {
    // SAFETY: each arm reads the eight values, 32 or 16 bytes by their type, and needs no alignment.
    unsafe {
        match T::KIND {
            Kind::F32 => _mm256_loadu_ps(values.as_ptr().cast()),
            Kind::F16 => _mm256_cvtph_ps(_mm_loadu_si128(values.as_ptr().cast())),
            Kind::Bf16 => {
                let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(values.as_ptr().cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
            }
        }
    }
}
