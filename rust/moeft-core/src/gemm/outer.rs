//! Sums of outer products over rows: the gradient of a low-rank factor.

use super::dispatch;
use super::rows::Rows;
use crate::isa::Isa;

/// Hands `scale * sum over rows of left[i] * right[j]` to `add(i, j, value)` for all columns i of left and j of right.
///
/// # Panics
/// If the numbers of rows differ: our own mistake.
pub fn add_outer(isa: Isa, left: &Rows, right: &Rows, scale: f32, add: impl FnMut(usize, usize, f32)) {
    dispatch!(isa, add_outer(left, right, scale, add));
}
