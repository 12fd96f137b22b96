//! Quantisation with AVX-512.

use std::arch::x86_64::*;

use super::{load, widen, STEP};
use crate::nf4::element::Kind;
use crate::nf4::portable::floor;
use crate::nf4::{Codebook, Element};

/// As [`portable::quantize_blocks`](crate::nf4::portable::quantize_blocks).
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
pub(in crate::nf4) fn quantize_blocks<T: Element>(
    codebook: Codebook,
    values: &[T],
    block_size: usize,
    packed: &mut [u8],
    absmax: &mut [f32],
) {
    let grid = Grid::new(codebook);
    let blocks = values.chunks_exact(block_size).zip(packed.chunks_exact_mut(block_size / 2)).zip(absmax);
    for ((values, packed), absmax) in blocks {
        let (values, packed) = (values.as_chunks::<STEP>().0, packed.as_chunks_mut::<{ STEP / 2 }>().0);
        *absmax = block_absmax(values);
        let reciprocal = _mm512_set1_ps(1.0 / floor(*absmax));
        for (values, packed) in values.iter().zip(packed) {
            let vectors = values.as_chunks::<16>().0;
            let cells = |i: usize| grid.cells(_mm512_mul_ps(widen(&vectors[i]), reciprocal));
            let bytes = grid.pack(cells(0), cells(1));
            // SAFETY: the store is as wide as `packed`, 16 bytes, and needs no alignment.
            unsafe { _mm_storeu_si128(packed.as_mut_ptr().cast(), bytes) };
        }
    }
}

/// [-1, 1] cut into 32 cells, with at most one midpoint inside each. One look-up gives that midpoint, one comparison
/// tells the side. Cell `i` is above `(i - 16) / 15.5`, and up to `(i - 15) / 15.5`.
struct Grid {
    /// The midpoint inside each cell, infinity where there is none.
    midpoints: [__m512; 2],
    /// Index below the midpoint of each cell, then above it.
    indices: __m512i,
}

impl Grid {
    const CELLS_PER_UNIT: f32 = 15.5;

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
    fn new(codebook: Codebook) -> Self {
        let (mut inside, mut indices) = ([f32::INFINITY; 32], [0; 64]);
        for cell in 0..32 {
            let [low, high] = [16.0, 15.0].map(|zero| (cell as f32 - zero) / Self::CELLS_PER_UNIT);
            let rank = codebook.midpoints().iter().filter(|&&m| m <= low).count();
            let is_split = codebook.midpoints().get(rank).is_some_and(|&m| m < high);
            if is_split {
                inside[cell] = codebook.midpoints()[rank];
            }
            indices[cell] = codebook.ranked()[rank];
            indices[cell + 32] = codebook.ranked()[rank + usize::from(is_split)];
        }
        let [low, high] = inside.as_chunks::<16>().0 else { unreachable!() };
        Self { midpoints: [widen(low), widen(high)], indices: load(&indices) }
    }

    /// Low byte of each: the cell of a value, plus 32 above the midpoint inside it.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
    fn cells(&self, scaled: __m512) -> __m512i {
        // The minimum takes its second operand for a NaN, which so counts as above all midpoints.
        let scaled = _mm512_min_ps(scaled, _mm512_set1_ps(1.0));
        // Around 1.5 * 2^23 floats are integers. Rounded up: zero ends a cell, as it must at the midpoint between the
        // two zeros of FP4.
        let (per_unit, first) = (_mm512_set1_ps(Self::CELLS_PER_UNIT), _mm512_set1_ps(12_582_912.0 + 15.0));
        let cell = _mm512_fmadd_round_ps::<{ _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC }>(scaled, per_unit, first);
        let cell = _mm512_castps_si512(cell);
        let midpoint = _mm512_permutex2var_ps(self.midpoints[0], cell, self.midpoints[1]);
        let is_above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(scaled, midpoint);
        _mm512_mask_or_epi32(cell, is_above, cell, _mm512_set1_epi32(32))
    }

    /// Indices of 2 * 16 cells in 16 bytes, the first of two in the high nibble.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
    fn pack(&self, first: __m512i, second: __m512i) -> __m128i {
        let cells = _mm256_set_m128i(_mm512_cvtepi32_epi8(second), _mm512_cvtepi32_epi8(first));
        let indices = _mm512_permutexvar_epi8(_mm512_castsi256_si512(cells), self.indices);
        let joined = _mm256_maddubs_epi16(_mm512_castsi512_si256(indices), _mm256_set1_epi16(0x0110));
        _mm256_cvtepi16_epi8(joined)
    }
}

/// Largest magnitude of a block; NaN if there is one. Magnitudes are compared as integers, see [`Element`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
fn block_absmax<T: Element>(values: &[[T; STEP]]) -> f32 {
    let mut max = _mm512_setzero_si512();
    if T::KIND == Kind::F32 {
        let magnitude = _mm512_set1_epi32(0x7fff_ffff);
        for vector in values.as_flattened().as_chunks::<16>().0 {
            max = _mm512_max_epi32(max, _mm512_and_si512(load(vector), magnitude));
        }
        return f32::from_bits(_mm512_reduce_max_epi32(max) as u32);
    }
    let magnitude = _mm512_set1_epi16(0x7fff);
    for vector in values {
        max = _mm512_max_epi16(max, _mm512_and_si512(load(vector), magnitude));
    }
    let max = _mm256_max_epi16(_mm512_castsi512_si256(max), _mm512_extracti64x4_epi64::<1>(max));
    let max = _mm_max_epi16(_mm256_castsi256_si128(max), _mm256_extracti128_si256::<1>(max));
    // There is a horizontal minimum, of unsigned words, but no maximum.
    let bits = !_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(max, _mm_set1_epi16(-1)))) as u16;
    match T::KIND {
        Kind::F16 => _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits)))),
        _ => f32::from_bits(u32::from(bits) << 16),
    }
}
