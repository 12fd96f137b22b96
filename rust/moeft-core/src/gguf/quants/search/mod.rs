//! The searches for scales that ggml's quantisers make, over several blocks at once.
//!
//! Sums in ggml run over a block from its first value to its last, one rounding each, and the bytes depend on it. A
//! vector of lanes therefore holds one value each of `N` neighbouring blocks, and every lane does what ggml does for one.
//! Source of the formulas: ggml-quants.c of ggml (MIT), <https://github.com/ggml-org/ggml>.

mod affine;
mod positive;
mod symmetric;

pub(super) use affine::{affine, Affine, AffineGrid};
pub(super) use positive::positive;
pub(super) use symmetric::symmetric;

/// One value each of `N` blocks.
pub(super) type Lanes<const N: usize> = [f32; N];

/// Blocks whose largest magnitude is below this count as zero.
pub(super) const ZERO: f32 = 1e-15;

/// The nearest integer, ties to even, of a value below 2^22 in magnitude. What larger ones give is part of the format's
/// behaviour too: the addition leaves the integer in the low bits of the sum.
#[inline(always)]
pub(super) fn nearest(value: f32) -> i32 {
    ((value + 12_582_912.0).to_bits() & 0x007f_ffff) as i32 - 0x0040_0000
}

/// Value `i` of block `lane` at `[i][lane]`.
#[inline(always)]
pub(super) fn transpose<const LEN: usize, const N: usize>(values: &[f32]) -> [Lanes<N>; LEN] {
    let mut lanes = [[0.0; N]; LEN];
    for (lane, block) in values.as_chunks::<LEN>().0[..N].iter().enumerate() {
        for i in 0..LEN {
            lanes[i][lane] = block[i];
        }
    }
    lanes
}
