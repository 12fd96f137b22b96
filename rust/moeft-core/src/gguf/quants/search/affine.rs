//! Scale and minimum of blocks whose values are `scale * level - min`.

use super::{nearest, Lanes};

/// What is tried.
#[derive(Clone, Copy)]
pub(in super::super) struct AffineGrid {
    /// Levels run from 0 to this.
    pub max_level: i32,
    /// The first try has this much more than `max_level` levels.
    pub first: f32,
    /// And each next one this much more.
    pub step: f32,
    /// Tries after the first.
    pub steps: i32,
}

/// What was found for each block.
pub(in super::super) struct Affine<const N: usize> {
    /// Step between levels.
    pub scale: Lanes<N>,
    /// What is subtracted from every value.
    pub min: Lanes<N>,
    /// Level of a value: the nearest integer to `inverse * (value - start)`, within the levels.
    inverse: Lanes<N>,
    start: Lanes<N>,
}

impl<const N: usize> Affine<N> {
    /// Level of a value of block `lane`.
    #[inline(always)]
    pub fn level(&self, value: f32, lane: usize, max_level: i32) -> u8 {
        nearest(self.inverse[lane] * (value - self.start[lane])).clamp(0, max_level) as u8
    }
}

/// The scale and minimum with the least weighted squared error among those that the grid leads to.
///
/// A later try starts from the minimum that an earlier one has improved; that too is ggml's.
#[inline(always)]
pub(in super::super) fn affine<const LEN: usize, const N: usize>(
    x: &[Lanes<N>; LEN],
    weights: &[Lanes<N>; LEN],
    grid: AffineGrid,
) -> Affine<N> {
    let (mut min, mut max) = (x[0], x[0]);
    let (mut sum_w, mut sum_x) = (weights[0], [0.0; N]);
    for n in 0..N {
        sum_x[n] = sum_w[n] * x[0][n];
    }
    for i in 1..LEN {
        for n in 0..N {
            min[n] = if x[i][n] < min[n] { x[i][n] } else { min[n] };
            max[n] = if x[i][n] > max[n] { x[i][n] } else { max[n] };
            sum_w[n] += weights[i][n];
            sum_x[n] += weights[i][n] * x[i][n];
        }
    }
    let mut inverse = [0.0; N];
    let mut scale = [0.0; N];
    for n in 0..N {
        min[n] = if min[n] > 0.0 { 0.0 } else { min[n] };
        inverse[n] = grid.max_level as f32 / (max[n] - min[n]);
        scale[n] = 1.0 / inverse[n];
    }
    let (lowest, mut start) = (min, min);
    let mut least = error(x, weights, &levels(x, &inverse, &min, grid.max_level), &scale, &min);
    for step in 0..=grid.steps {
        let tried = grid.first + grid.step * step as f32 + grid.max_level as f32;
        let mut this_inverse = [0.0; N];
        for n in 0..N {
            this_inverse[n] = tried / (max[n] - min[n]);
        }
        let levels = levels(x, &this_inverse, &min, grid.max_level);
        let (mut sum_l, mut sum_l2, mut sum_xl) = ([0.0; N], [0.0; N], [0.0; N]);
        for i in 0..LEN {
            for n in 0..N {
                let product = weights[i][n] * levels[i][n];
                sum_l[n] += product;
                sum_l2[n] += product * levels[i][n];
                sum_xl[n] += product * x[i][n];
            }
        }
        let (mut determinant, mut this_scale, mut this_min) = ([0.0; N], [0.0; N], [0.0; N]);
        for n in 0..N {
            determinant[n] = sum_w[n] * sum_l2[n] - sum_l[n] * sum_l[n];
            let solved = (sum_w[n] * sum_xl[n] - sum_x[n] * sum_l[n]) / determinant[n];
            let solved_min = (sum_l2[n] * sum_x[n] - sum_l[n] * sum_xl[n]) / determinant[n];
            let is_above = solved_min > 0.0;
            this_min[n] = if is_above { 0.0 } else { solved_min };
            this_scale[n] = if is_above { sum_xl[n] / sum_l2[n] } else { solved };
        }
        let this_error = error(x, weights, &levels, &this_scale, &this_min);
        for n in 0..N {
            let better = (determinant[n] > 0.0) & (this_error[n] < least[n]);
            inverse[n] = if better { this_inverse[n] } else { inverse[n] };
            start[n] = if better { min[n] } else { start[n] };
            least[n] = if better { this_error[n] } else { least[n] };
            scale[n] = if better { this_scale[n] } else { scale[n] };
            min[n] = if better { this_min[n] } else { min[n] };
        }
    }
    for n in 0..N {
        // A block of one value, unless that is positive and the range starts at zero.
        let flat = max[n] == lowest[n];
        scale[n] = if flat { 0.0 } else { scale[n] };
        inverse[n] = if flat { 0.0 } else { inverse[n] };
        min[n] = if flat { -lowest[n] } else { -min[n] };
    }
    Affine { scale, min, inverse, start }
}

#[inline(always)]
fn levels<const LEN: usize, const N: usize>(
    x: &[Lanes<N>; LEN],
    inverse: &Lanes<N>,
    min: &Lanes<N>,
    max_level: i32,
) -> [Lanes<N>; LEN] {
    let mut levels = [[0.0; N]; LEN];
    for i in 0..LEN {
        for n in 0..N {
            levels[i][n] = nearest(inverse[n] * (x[i][n] - min[n])).clamp(0, max_level) as f32;
        }
    }
    levels
}

#[inline(always)]
fn error<const LEN: usize, const N: usize>(
    x: &[Lanes<N>; LEN],
    weights: &[Lanes<N>; LEN],
    levels: &[Lanes<N>; LEN],
    scale: &Lanes<N>,
    min: &Lanes<N>,
) -> Lanes<N> {
    let mut sum = [0.0; N];
    for i in 0..LEN {
        for n in 0..N {
            let difference = scale[n] * levels[i][n] + min[n] - x[i][n];
            sum[n] += weights[i][n] * (difference * difference);
        }
    }
    sum
}
