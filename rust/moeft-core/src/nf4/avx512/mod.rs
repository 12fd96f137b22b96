//! AVX-512 with VBMI: 16 values of f32 or 32 of a half type in a vector.

mod quantize;
mod restore;

use std::arch::x86_64::*;

use super::element::Kind;
use super::Element;

pub(super) use quantize::quantize_blocks;
pub(super) use restore::restore;

/// Values quantised, or restored to a half type, at once; it divides every block size.
const STEP: usize = 32;

/// Loads 64 bytes of values.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
pub(super) fn load<V>(values: &[V]) -> __m512i {
    debug_assert_eq!(size_of_val(values), 64);
    // SAFETY: the load reads the 64 bytes of the slice and needs no alignment.
    unsafe { _mm512_loadu_si512(values.as_ptr().cast()) }
}

/// Widens sixteen values to f32, exactly.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
pub(super) fn widen<T: Element>(values: &[T; 16]) -> __m512 {
    // SAFETY: each arm reads the sixteen values, 64 or 32 bytes by their type, and needs no alignment.
    unsafe {
        match T::KIND {
            Kind::F32 => _mm512_loadu_ps(values.as_ptr().cast()),
            Kind::F16 => _mm512_cvtph_ps(_mm256_loadu_si256(values.as_ptr().cast())),
            Kind::Bf16 => {
                let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(values.as_ptr().cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
            }
        }
    }
}
