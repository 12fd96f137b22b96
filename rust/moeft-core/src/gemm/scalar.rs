//! Vectors of plain Rust: what the compiler makes of sixteen f32 on any CPU.

use super::few::{self, MOST_ROWS};
use super::rows::{Lanes, Rows, LANES};
use super::vector::{self, Panel, Vector};
use super::Kernel;

impl Vector for Lanes {
    const LEN: usize = LANES;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self([value; LANES])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: by the caller; the array has the alignment of f32.
        Self(unsafe { from.cast::<[f32; LANES]>().read() })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: by the caller; the array has the alignment of f32.
        unsafe { to.cast::<[f32; LANES]>().write(self.0) }
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        // Not f32::mul_add, which calls a library function on CPUs without the instruction.
        Self(std::array::from_fn(|i| self.0[i] * factor.0[i] + addend.0[i]))
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        self.0.iter().sum()
    }
}

pub(crate) fn multiply_panel(x: &Rows, panel: &Panel<'_>, out: &mut Rows, accumulate: bool) {
    vector::multiply_panel::<Lanes, 0, 2>(x, panel, out, accumulate);
}

pub(crate) fn add_outer(left: &Rows, right: &Rows, scale: f32, add: impl FnMut(usize, usize, f32)) {
    vector::add_outer::<Lanes, 1>(left, right, scale, add);
}

pub(crate) fn dots(weights: &[f32], inputs: &[f32], count: usize) -> [f32; MOST_ROWS] {
    few::dots::<Lanes>(weights, inputs, count)
}

/// Sixteen rows to lanes: a transposition.
pub(crate) fn from_rows(rows: &[f32], block: &mut [Lanes]) {
    let width = block.len();
    for (lane, row) in rows.chunks_exact(width).enumerate() {
        for (lanes, &value) in block.iter_mut().zip(row) {
            lanes.0[lane] = value;
        }
    }
}

/// Lanes to sixteen rows: a transposition.
pub(crate) fn to_rows(block: &[Lanes], rows: &mut [f32]) {
    let width = block.len();
    for (lane, row) in rows.chunks_exact_mut(width).enumerate() {
        for (value, lanes) in row.iter_mut().zip(block) {
            *value = lanes.0[lane];
        }
    }
}

pub(crate) fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run()
}
