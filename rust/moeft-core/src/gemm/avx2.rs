//! Vectors of eight f32 with AVX2 and FMA.

use std::arch::x86_64::*;

use super::few::{self, MOST_ROWS};
use super::rows::{Lanes, Rows, LANES};
use super::vector::{self, Panel, Vector};
use super::Kernel;

#[derive(Clone, Copy)]
struct F32x8(__m256);

impl Vector for F32x8 {
    const LEN: usize = 8;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        // SAFETY: only functions of this file use the type, and they have the instructions.
        Self(unsafe { _mm256_set1_ps(value) })
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: by the caller, and as above.
        Self(unsafe { _mm256_loadu_ps(from) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: by the caller, and as above.
        unsafe { _mm256_storeu_ps(to, self.0) }
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        // SAFETY: as above.
        Self(unsafe { _mm256_fmadd_ps(self.0, factor.0, addend.0) })
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        // SAFETY: as above.
        unsafe {
            let half = _mm_add_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
            let pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
            _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)))
        }
    }
}

/// # Safety
/// The CPU must have AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub(crate) unsafe fn multiply_panel(x: &Rows, panel: &Panel<'_>, out: &mut Rows, accumulate: bool) {
    vector::multiply_panel::<F32x8, 6, 12>(x, panel, out, accumulate);
}

/// # Safety
/// The CPU must have AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub(crate) unsafe fn add_outer(left: &Rows, right: &Rows, scale: f32, add: impl FnMut(usize, usize, f32)) {
    vector::add_outer::<F32x8, 2>(left, right, scale, add);
}

/// # Safety
/// The CPU must have AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub(crate) unsafe fn dots(weights: &[f32], inputs: &[f32], count: usize) -> [f32; MOST_ROWS] {
    few::dots::<F32x8>(weights, inputs, count)
}

/// Sixteen rows to lanes.
///
/// # Safety
/// The CPU must have AVX2.
#[target_feature(enable = "avx2")]
pub(crate) unsafe fn from_rows(rows: &[f32], block: &mut [Lanes]) {
    let width = block.len();
    assert_eq!(rows.len(), LANES * width);
    let whole = width - width % 8;
    for half in [0, 8] {
        for column in (0..whole).step_by(8) {
            // SAFETY: eight rows from `half` on, eight columns from `column` on, lie inside of both.
            unsafe {
                let source = rows.as_ptr().add(half * width + column);
                let eight = transpose(std::array::from_fn(|row| _mm256_loadu_ps(source.add(row * width))));
                for (lanes, vector) in block[column..column + 8].iter_mut().zip(eight) {
                    _mm256_storeu_ps(lanes.0.as_mut_ptr().add(half), vector);
                }
            }
        }
    }
    for (lane, row) in rows.chunks_exact(width).enumerate() {
        for (lanes, &value) in block[whole..].iter_mut().zip(&row[whole..]) {
            lanes.0[lane] = value;
        }
    }
}

/// Lanes to sixteen rows.
///
/// # Safety
/// The CPU must have AVX2.
#[target_feature(enable = "avx2")]
pub(crate) unsafe fn to_rows(block: &[Lanes], rows: &mut [f32]) {
    let width = block.len();
    assert_eq!(rows.len(), LANES * width);
    let whole = width - width % 8;
    for half in [0, 8] {
        for column in (0..whole).step_by(8) {
            let lanes = &block[column..column + 8];
            // SAFETY: as in `from_rows`.
            unsafe {
                let eight = transpose(std::array::from_fn(|i| _mm256_loadu_ps(lanes[i].0.as_ptr().add(half))));
                let target = rows.as_mut_ptr().add(half * width + column);
                for (row, vector) in eight.into_iter().enumerate() {
                    _mm256_storeu_ps(target.add(row * width), vector);
                }
            }
        }
    }
    for (lane, row) in rows.chunks_exact_mut(width).enumerate() {
        for (value, lanes) in row[whole..].iter_mut().zip(&block[whole..]) {
            *value = lanes.0[lane];
        }
    }
}

/// Transposes eight vectors of eight.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose(v: [__m256; 8]) -> [__m256; 8] {
    let pairs = |a: __m256, b: __m256| (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    let ((a0, a1), (a2, a3)) = (pairs(v[0], v[1]), pairs(v[2], v[3]));
    let ((a4, a5), (a6, a7)) = (pairs(v[4], v[5]), pairs(v[6], v[7]));
    let fours = |a, b| (_mm256_shuffle_ps::<0x44>(a, b), _mm256_shuffle_ps::<0xee>(a, b));
    let ((b0, b1), (b2, b3)) = (fours(a0, a2), fours(a1, a3));
    let ((b4, b5), (b6, b7)) = (fours(a4, a6), fours(a5, a7));
    let low = |a, b| _mm256_permute2f128_ps::<0x20>(a, b);
    let high = |a, b| _mm256_permute2f128_ps::<0x31>(a, b);
    [low(b0, b4), low(b1, b5), low(b2, b6), low(b3, b7), high(b0, b4), high(b1, b5), high(b2, b6), high(b3, b7)]
}

/// # Safety
/// The CPU must have AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub(crate) unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run()
}
