//! Vectors of sixteen f32 with AVX-512.

use std::arch::x86_64::*;

use super::avx2;
use super::few::{self, MOST_ROWS};
use super::rows::{Lanes, Rows};
use super::vector::{self, Panel, Vector};
use super::Kernel;

#[derive(Clone, Copy)]
struct F32x16(__m512);

impl Vector for F32x16 {
    const LEN: usize = 16;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        // SAFETY: only functions of this file use the type, and they have the instructions.
        Self(unsafe { _mm512_set1_ps(value) })
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: by the caller, and as above.
        Self(unsafe { _mm512_loadu_ps(from) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: by the caller, and as above.
        unsafe { _mm512_storeu_ps(to, self.0) }
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        // SAFETY: as above.
        Self(unsafe { _mm512_fmadd_ps(self.0, factor.0, addend.0) })
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        // SAFETY: as above.
        unsafe { _mm512_reduce_add_ps(self.0) }
    }
}

/// # Safety
/// The CPU must have AVX-512 F.
#[target_feature(enable = "avx512f")]
pub(crate) unsafe fn multiply_panel(x: &Rows, panel: &Panel<'_>, out: &mut Rows, accumulate: bool) {
    vector::multiply_panel::<F32x16, 12, 12>(x, panel, out, accumulate);
}

/// # Safety
/// The CPU must have AVX-512 F.
#[target_feature(enable = "avx512f")]
pub(crate) unsafe fn add_outer(left: &Rows, right: &Rows, scale: f32, add: impl FnMut(usize, usize, f32)) {
    vector::add_outer::<F32x16, 4>(left, right, scale, add);
}

/// # Safety
/// The CPU must have AVX-512 F.
#[target_feature(enable = "avx512f")]
pub(crate) unsafe fn dots(weights: &[f32], inputs: &[f32], count: usize) -> [f32; MOST_ROWS] {
    few::dots::<F32x16>(weights, inputs, count)
}

/// Sixteen rows to lanes.
///
/// # Safety
/// The CPU must have AVX2.
#[target_feature(enable = "avx2")]
pub(crate) unsafe fn from_rows(rows: &[f32], block: &mut [Lanes]) {
    // SAFETY: by the caller.
    unsafe { avx2::from_rows(rows, block) }
}

/// Lanes to sixteen rows.
///
/// # Safety
/// The CPU must have AVX2.
#[target_feature(enable = "avx2")]
pub(crate) unsafe fn to_rows(block: &[Lanes], rows: &mut [f32]) {
    // SAFETY: by the caller.
    unsafe { avx2::to_rows(block, rows) }
}

/// # Safety
/// The CPU must have AVX-512 F.
#[target_feature(enable = "avx512f")]
pub(crate) unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run()
}
