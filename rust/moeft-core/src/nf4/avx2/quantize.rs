//! Quantisation with AVX2.

use std::arch::x86_64::*;

use super::{load, widen, STEP};
use crate::nf4::element::Kind;
use crate::nf4::portable::floor;
use crate::nf4::{Codebook, Element};

/// As [`portable::quantize_blocks`](crate::nf4::portable::quantize_blocks).
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::nf4) fn quantize_blocks<T: Element>(
    codebook: Codebook,
    values: &[T],
    block_size: usize,
    packed: &mut [u8],
    absmax: &mut [f32],
) {
    let search = Search::new(codebook);
    let blocks = values.chunks_exact(block_size).zip(packed.chunks_exact_mut(block_size / 2)).zip(absmax);
    for ((values, packed), absmax) in blocks {
        let (values, packed) = (values.as_chunks::<STEP>().0, packed.as_chunks_mut::<{ STEP / 2 }>().0);
        *absmax = block_absmax(values);
        let reciprocal = _mm256_set1_ps(1.0 / floor(*absmax));
        for (values, packed) in values.iter().zip(packed) {
            let vectors = values.as_chunks::<8>().0;
            let ranks = |i: usize| search.ranks(_mm256_mul_ps(widen(&vectors[i]), reciprocal));
            let bytes = search.pack(ranks(0), ranks(1), ranks(2), ranks(3));
            // SAFETY: the store is as wide as `packed`, 16 bytes, and needs no alignment.
            unsafe { _mm_storeu_si128(packed.as_mut_ptr().cast(), bytes) };
        }
    }
}

/// A binary search in the midpoints, whose last two levels are look-ups in registers.
struct Search {
    root: __m256,
    second: [__m256; 2],
    /// Midpoints 1, 5, 9, 13, in both lanes.
    third: __m256,
    /// Midpoints 0, 2, 4 .. 14.
    fourth: __m256,
    /// Index of each rank, in both lanes.
    ranked: __m256i,
}

impl Search {
    #[target_feature(enable = "avx2,fma,f16c")]
    fn new(codebook: Codebook) -> Self {
        let m = codebook.midpoints();
        Self {
            root: _mm256_set1_ps(m[7]),
            second: [_mm256_set1_ps(m[3]), _mm256_set1_ps(m[11])],
            third: _mm256_setr_ps(m[1], m[5], m[9], m[13], m[1], m[5], m[9], m[13]),
            fourth: _mm256_setr_ps(m[0], m[2], m[4], m[6], m[8], m[10], m[12], m[14]),
            // SAFETY: the load reads the 16 bytes of the array and needs no alignment.
            ranked: _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(codebook.ranked().as_ptr().cast()) }),
        }
    }

    /// Number of midpoints strictly below each value, 15 for NaN.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn ranks(&self, scaled: __m256) -> __m256i {
        // "Not less or equal" counts a NaN. A mask is -1, so subtracting it adds one.
        let above = |midpoint| _mm256_castps_si256(_mm256_cmp_ps::<_CMP_NLE_UQ>(scaled, midpoint));
        let twice = |rank| _mm256_add_epi32(rank, rank);
        let mask = above(self.root);
        let rank = _mm256_and_si256(mask, _mm256_set1_epi32(2));
        let second = _mm256_blendv_ps(self.second[0], self.second[1], _mm256_castsi256_ps(mask));
        let rank = _mm256_sub_epi32(rank, above(second));
        let rank = _mm256_sub_epi32(twice(rank), above(_mm256_permutevar_ps(self.third, rank)));
        _mm256_sub_epi32(twice(rank), above(_mm256_permutevar8x32_ps(self.fourth, rank)))
    }

    /// Indices of 4 * 8 ranks in 16 bytes, the first of two in the high nibble.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn pack(&self, a: __m256i, b: __m256i, c: __m256i, d: __m256i) -> __m128i {
        // Within each lane: four ranks of a, four of b, of c, of d.
        let ranks = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
        let indices = _mm256_shuffle_epi8(self.ranked, ranks);
        let joined = _mm256_maddubs_epi16(indices, _mm256_set1_epi16(0x0110));
        let bytes = _mm256_packus_epi16(joined, joined);
        _mm_unpacklo_epi16(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256::<1>(bytes))
    }
}

/// Largest magnitude of a block; NaN if there is one. Magnitudes are compared as integers, see [`Element`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn block_absmax<T: Element>(values: &[[T; STEP]]) -> f32 {
    let (mut even, mut odd) = (_mm256_setzero_si256(), _mm256_setzero_si256());
    if T::KIND == Kind::F32 {
        let magnitude = _mm256_set1_epi32(0x7fff_ffff);
        for [a, b] in values.as_flattened().as_chunks::<8>().0.as_chunks::<2>().0 {
            even = _mm256_max_epi32(even, _mm256_and_si256(load(a), magnitude));
            odd = _mm256_max_epi32(odd, _mm256_and_si256(load(b), magnitude));
        }
        let max = _mm256_max_epi32(even, odd);
        let max = _mm_max_epi32(_mm256_castsi256_si128(max), _mm256_extracti128_si256::<1>(max));
        let max = _mm_max_epi32(max, _mm_shuffle_epi32::<0b01_00_11_10>(max));
        let max = _mm_max_epi32(max, _mm_shuffle_epi32::<0b10_11_00_01>(max));
        return f32::from_bits(_mm_cvtsi128_si32(max) as u32);
    }
    let magnitude = _mm256_set1_epi16(0x7fff);
    for [a, b] in values.as_flattened().as_chunks::<16>().0.as_chunks::<2>().0 {
        even = _mm256_max_epi16(even, _mm256_and_si256(load(a), magnitude));
        odd = _mm256_max_epi16(odd, _mm256_and_si256(load(b), magnitude));
    }
    let max = _mm256_max_epi16(even, odd);
    let max = _mm_max_epi16(_mm256_castsi256_si128(max), _mm256_extracti128_si256::<1>(max));
    // There is a horizontal minimum, of unsigned words, but no maximum.
    let bits = !_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(max, _mm_set1_epi16(-1)))) as u16;
    match T::KIND {
        Kind::F16 => _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits)))),
        _ => f32::from_bits(u32::from(bits) << 16),
    }
}
