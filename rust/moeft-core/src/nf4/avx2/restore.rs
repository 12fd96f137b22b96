//! Restoring with AVX2: sixteen products per block, then look-ups in registers.

use std::arch::x86_64::*;

use super::{load, widen, STEP};
use crate::nf4::element::Kind;
use crate::nf4::kernel::for_each_block;
use crate::nf4::{portable, Codebook, Element, Scales};

/// Restores values from `start` on, which is even; see [`kernel::restore`](crate::nf4::kernel::restore). `STREAM` asks for
/// `out` aligned to 32 bytes and `start` at a block.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::nf4) fn restore<T: Element, const STREAM: bool>(
    codebook: Codebook,
    packed: &[u8],
    scales: Scales<'_>,
    block_size: usize,
    start: usize,
    out: &mut [T],
) {
    let codes = codebook.codes();
    for_each_block(packed, scales, block_size, start, out, |bytes, absmax, out| {
        let done = match T::KIND {
            Kind::F32 => restore_f32::<T, STREAM>(codes, bytes, absmax, out),
            // Products that are not finite are rounded where a NaN is looked after.
            _ if !absmax.is_finite() => 0,
            _ => restore_half::<T, STREAM>(codes, bytes, absmax, out),
        };
        if done < out.len() {
            portable::restore_block(codebook, &bytes[done / 2..], absmax, &mut out[done..]);
        }
    });
    if STREAM {
        _mm_sfence();
    }
}

/// Restores f32 values of one block, eight at a time; returns how many.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn restore_f32<T: Element, const STREAM: bool>(codes: &[f32; 16], bytes: &[u8], absmax: f32, out: &mut [T]) -> usize {
    let absmax = _mm256_set1_ps(absmax);
    let (low, high) = (codes.first_chunk::<8>().unwrap(), codes.last_chunk::<8>().unwrap());
    let (low, high) = (_mm256_mul_ps(widen(low), absmax), _mm256_mul_ps(widen(high), absmax));
    // Nibbles in the order of their values: the high one of each byte first.
    let shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
    let vectors = out.as_chunks_mut::<8>().0;
    for (out, bytes) in vectors.iter_mut().zip(bytes.as_chunks::<4>().0) {
        // The look-ups mind three bits; the fourth chooses between them from the place of the sign.
        let index = _mm256_srlv_epi32(_mm256_set1_epi32(i32::from_le_bytes(*bytes)), shifts);
        let is_high = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index));
        let (low, high) = (_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index));
        store::<T, STREAM>(out, _mm256_castps_si256(_mm256_blendv_ps(low, high, is_high)));
    }
    vectors.len() * 8
}

/// Restores values of a half type of one block, 32 at a time; returns how many. `absmax` is finite.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn restore_half<T: Element, const STREAM: bool>(codes: &[f32; 16], bytes: &[u8], absmax: f32, out: &mut [T]) -> usize {
    let [low, high] = half_table::<T>(codes, absmax);
    // Each index names one value; lanes are such that unpacking within them gives 16 values in order.
    let look_up = |out: &mut [T; STEP], index: __m256i| {
        let (low, high) = (_mm256_shuffle_epi8(low, index), _mm256_shuffle_epi8(high, index));
        let [first, second] = out.as_chunks_mut::<16>().0 else { unreachable!() };
        store::<T, STREAM>(first, _mm256_unpacklo_epi8(low, high));
        store::<T, STREAM>(second, _mm256_unpackhi_epi8(low, high));
    };
    let nibbles = _mm256_set1_epi8(15);
    let (pairs, last) = out.as_chunks_mut::<STEP>().0.as_chunks_mut::<2>();
    for ([first, second], bytes) in pairs.iter_mut().zip(bytes.as_chunks::<STEP>().0) {
        let bytes = _mm256_permutevar8x32_epi32(load(bytes), _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
        let even = _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), nibbles);
        let odd = _mm256_and_si256(bytes, nibbles);
        look_up(first, _mm256_unpacklo_epi8(even, odd));
        look_up(second, _mm256_unpackhi_epi8(even, odd));
    }
    if let ([out], Some(bytes)) = (&mut *last, bytes[pairs.len() * STEP..].first_chunk::<{ STEP / 2 }>()) {
        // SAFETY: the load reads the 16 bytes of the array and needs no alignment.
        let bytes = unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) };
        let bytes = _mm256_cvtepu8_epi16(_mm_shuffle_epi32::<0b11_01_10_00>(bytes));
        let index = _mm256_or_si256(_mm256_srli_epi16::<4>(bytes), _mm256_slli_epi16::<8>(bytes));
        look_up(out, _mm256_and_si256(index, nibbles));
    }
    (2 * pairs.len() + last.len()) * STEP
}

/// The low and the high bytes of the sixteen products, rounded to `T`; each in both lanes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn half_table<T: Element>(codes: &[f32; 16], absmax: f32) -> [__m256i; 2] {
    let c = codes.as_chunks::<4>().0;
    // SAFETY: each load reads the four values of its array and needs no alignment.
    let [c0, c1, c2, c3] = std::array::from_fn(|i| unsafe { _mm_loadu_ps(c[i].as_ptr()) });
    let absmax = _mm256_set1_ps(absmax);
    let products = |first: __m128, second: __m128| _mm256_mul_ps(_mm256_set_m128(second, first), absmax);
    // Within each lane: the low bytes of eight products, then their high bytes.
    let bytes = match T::KIND {
        Kind::F16 => {
            let first = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(products(c0, c1));
            let second = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(products(c2, c3));
            let places = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
            _mm256_shuffle_epi8(_mm256_set_m128i(second, first), _mm256_broadcastsi128_si256(places))
        }
        _ => {
            // Joining within lanes puts them in order.
            let (even, odd) = (products(c0, c2), products(c1, c3));
            let even_places = _mm_setr_epi8(2, 6, 10, 14, -1, -1, -1, -1, 3, 7, 11, 15, -1, -1, -1, -1);
            let odd_places = _mm_setr_epi8(-1, -1, -1, -1, 2, 6, 10, 14, -1, -1, -1, -1, 3, 7, 11, 15);
            let even = _mm256_shuffle_epi8(round_bf16(even), _mm256_broadcastsi128_si256(even_places));
            let odd = _mm256_shuffle_epi8(round_bf16(odd), _mm256_broadcastsi128_si256(odd_places));
            _mm256_or_si256(even, odd)
        }
    };
    [_mm256_permute4x64_epi64::<0b10_00_10_00>(bytes), _mm256_permute4x64_epi64::<0b11_01_11_01>(bytes)]
}

/// The bits of finite values as bf16, nearest, ties to even, in the high half of each lane.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn round_bf16(values: __m256) -> __m256i {
    let bits = _mm256_castps_si256(values);
    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd)
}

/// Stores to 32 bytes of values, past the cache if `STREAM`; `out` is aligned to 32 bytes then.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn store<T: Element, const STREAM: bool>(out: &mut [T], vector: __m256i) {
    debug_assert_eq!(size_of_val(out), 32);
    let out = out.as_mut_ptr().cast();
    // SAFETY: the store is as wide as the slice; it is aligned where that matters, by the contract of `restore`.
    unsafe {
        if STREAM {
            _mm256_stream_si256(out, vector);
        } else {
            _mm256_storeu_si256(out, vector);
        }
    }
}
