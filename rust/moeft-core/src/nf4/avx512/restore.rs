//! Restoring with AVX-512: sixteen products per block, then look-ups in registers.

use std::arch::x86_64::*;

use super::{widen, STEP};
use crate::nf4::element::Kind;
use crate::nf4::kernel::for_each_block;
use crate::nf4::{portable, Codebook, Element, Scales};

/// Restores values from `start` on, which is even; see [`kernel::restore`](crate::nf4::kernel::restore). `STREAM` asks for
/// `out` aligned to 64 bytes and `start` at a block.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
pub(in crate::nf4) fn restore<T: Element, const STREAM: bool>(
    codebook: Codebook,
    packed: &[u8],
    scales: Scales<'_>,
    block_size: usize,
    start: usize,
    out: &mut [T],
) {
    let codes = widen(codebook.codes());
    for_each_block(packed, scales, block_size, start, out, |bytes, absmax, out| {
        let table = _mm512_mul_ps(codes, _mm512_set1_ps(absmax));
        let done = match T::KIND {
            Kind::F32 => restore_f32::<T, STREAM>(table, bytes, out),
            // Products that are not finite are rounded where a NaN is looked after.
            _ if !absmax.is_finite() => 0,
            _ => restore_half::<T, STREAM>(table, bytes, out),
        };
        if done < out.len() {
            portable::restore_block(codebook, &bytes[done / 2..], absmax, &mut out[done..]);
        }
    });
    if STREAM {
        _mm_sfence();
    }
}

/// Restores f32 values of one block from their sixteen products, 16 at a time; returns how many.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
fn restore_f32<T: Element, const STREAM: bool>(table: __m512, bytes: &[u8], out: &mut [T]) -> usize {
    // Bits from the nibbles of values 0 and 1 on, then 2 and 3, and so on: low bytes of the eight pairs of lanes.
    let shifts = _mm512_set_epi32(56, 60, 48, 52, 40, 44, 32, 36, 24, 28, 16, 20, 8, 12, 0, 4);
    let vectors = out.as_chunks_mut::<16>().0;
    for (out, bytes) in vectors.iter_mut().zip(bytes.as_chunks::<8>().0) {
        let index = _mm512_multishift_epi64_epi8(shifts, _mm512_set1_epi64(i64::from_le_bytes(*bytes)));
        store::<T, STREAM>(out, _mm512_castps_si512(_mm512_permutexvar_ps(index, table)));
    }
    vectors.len() * 16
}

/// Restores values of a half type of one block from their sixteen finite products, 32 at a time; returns how many.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
fn restore_half<T: Element, const STREAM: bool>(table: __m512, bytes: &[u8], out: &mut [T]) -> usize {
    let table = match T::KIND {
        Kind::F16 => _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(table),
        _ => _mm512_cvtepi32_epi16(round_bf16(table)),
    };
    // Twice, because a look-up minds five bits and a nibble has a neighbour.
    let table = _mm512_broadcast_i64x4(table);
    // Bits from the four nibbles of two bytes on: low bytes of the four words of a lane.
    let shifts = _mm512_set1_epi64(0x0008_000c_0000_0004);
    let steps = out.as_chunks_mut::<STEP>().0;
    for (out, bytes) in steps.iter_mut().zip(bytes.as_chunks::<{ STEP / 2 }>().0) {
        // SAFETY: the load reads the 16 bytes of the array and needs no alignment.
        let bytes = _mm512_cvtepu16_epi64(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) });
        let index = _mm512_multishift_epi64_epi8(shifts, bytes);
        store::<T, STREAM>(out, _mm512_permutexvar_epi16(index, table));
    }
    steps.len() * STEP
}

/// The bits of finite values as bf16, nearest, ties to even.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
fn round_bf16(values: __m512) -> __m512i {
    let bits = _mm512_castps_si512(values);
    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    _mm512_srli_epi32::<16>(rounded)
}

/// Stores to 64 bytes of values, past the cache if `STREAM`; `out` is aligned to 64 bytes then.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
fn store<T: Element, const STREAM: bool>(out: &mut [T], vector: __m512i) {
    debug_assert_eq!(size_of_val(out), 64);
    let out = out.as_mut_ptr().cast();
    // SAFETY: the store is as wide as the slice; it is aligned where that matters, by the contract of `restore`.
    unsafe {
        if STREAM {
            _mm512_stream_si512(out, vector);
        } else {
            _mm512_storeu_si512(out, vector);
        }
    }
}
