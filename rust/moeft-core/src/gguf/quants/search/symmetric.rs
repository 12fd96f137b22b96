//! Scale of blocks whose values are `scale * (level - max_level)`.

use super::{nearest, Lanes, ZERO};

/// What was found for each block.
pub(in super::super) struct Symmetric<const N: usize> {
    /// Step between levels; its sign is opposite to that of the value with the largest magnitude.
    pub scale: Lanes<N>,
    /// Level of a value: the nearest integer to `inverse * value`.
    inverse: Lanes<N>,
    is_zero: [bool; N],
}

impl<const N: usize> Symmetric<N> {
    /// Level of a value of block `lane`, from 0 to `2 * half - 1`; 0 in a block of zeros.
    #[inline(always)]
    pub fn level(&self, value: f32, lane: usize, half: i32) -> u8 {
        let level = half + nearest(self.inverse[lane] * value).clamp(-half, half - 1);
        if self.is_zero[lane] {
            0
        } else {
            level as u8
        }
    }
}

/// The scale with the least weighted squared error among nineteen, for `2 * half` levels.
#[inline(always)]
pub(in super::super) fn symmetric<const LEN: usize, const N: usize>(
    x: &[Lanes<N>; LEN],
    weights: &[Lanes<N>; LEN],
    half: i32,
) -> Symmetric<N> {
    let (mut magnitude, mut extreme) = ([0.0; N], [0.0; N]);
    for values in x {
        for n in 0..N {
            let larger = values[n].abs() > magnitude[n];
            extreme[n] = if larger { values[n] } else { extreme[n] };
            magnitude[n] = if larger { values[n].abs() } else { magnitude[n] };
        }
    }
    let mut inverse = [0.0; N];
    for n in 0..N {
        inverse[n] = -(half as f32) / extreme[n];
    }
    let (product, square) = sums(x, weights, &inverse, half);
    let (mut scale, mut best) = ([0.0; N], [0.0; N]);
    for n in 0..N {
        scale[n] = if square[n] != 0.0 { product[n] / square[n] } else { 0.0 };
        best[n] = scale[n] * product[n];
    }
    for step in (-9..=9).filter(|&step| step != 0) {
        let levels = -(half as f32 + 0.1 * step as f32);
        let mut tried = [0.0; N];
        for n in 0..N {
            tried[n] = levels / extreme[n];
        }
        let (product, square) = sums(x, weights, &tried, half);
        for n in 0..N {
            let better = (square[n] > 0.0) & (product[n] * product[n] > best[n] * square[n]);
            let this_scale = product[n] / square[n];
            scale[n] = if better { this_scale } else { scale[n] };
            best[n] = if better { this_scale * product[n] } else { best[n] };
            inverse[n] = if better { tried[n] } else { inverse[n] };
        }
    }
    let mut is_zero = [false; N];
    for n in 0..N {
        is_zero[n] = magnitude[n] < ZERO;
        scale[n] = if is_zero[n] { 0.0 } else { scale[n] };
    }
    Symmetric { scale, inverse, is_zero }
}

/// Weighted sums of value times level and of level squared.
#[inline(always)]
fn sums<const LEN: usize, const N: usize>(
    x: &[Lanes<N>; LEN],
    weights: &[Lanes<N>; LEN],
    inverse: &Lanes<N>,
    half: i32,
) -> (Lanes<N>, Lanes<N>) {
    let (mut product, mut square) = ([0.0; N], [0.0; N]);
    for i in 0..LEN {
        for n in 0..N {
            let level = nearest(inverse[n] * x[i][n]).clamp(-half, half - 1) as f32;
            product[n] += weights[i][n] * x[i][n] * level;
            square[n] += weights[i][n] * level * level;
        }
    }
    (product, square)
}
