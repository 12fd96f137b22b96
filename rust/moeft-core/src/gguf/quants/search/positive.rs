//! One scale for values that are positive: the scales and minima of the blocks of a super-block.

use super::{nearest, ZERO};

/// The scale and the levels `0..=max_level` of eight values with the least weighted squared error that ggml's search
/// finds: a grid of nine scales, then at most five rounds of changing one level at a time.
#[inline(always)]
pub(in super::super) fn positive(x: &[f32; 8], weights: &[f32; 8], max_level: i32) -> (f32, [u8; 8]) {
    let max = x.iter().fold(0.0f32, |max, &value| if max > value { max } else { value });
    if max < ZERO {
        return (0.0, [0; 8]);
    }
    let limit = max_level as f32;
    let error = |inverse: f32, cap: i32| {
        let scale = 1.0 / inverse;
        x.iter().zip(weights).fold(0.0f32, |sum, (&value, &weight)| {
            let difference = value - scale * nearest(inverse * value).min(cap) as f32;
            sum + weight * difference * difference
        })
    };
    let mut inverse = limit / max;
    // The first try stores its levels in a byte before they are used.
    let mut least = {
        let scale = 1.0 / inverse;
        x.iter().zip(weights).fold(0.0f32, |sum, (&value, &weight)| {
            let difference = value - scale * f32::from(nearest(inverse * value) as u8);
            sum + weight * difference * difference
        })
    };
    for step in (-4..=4).filter(|&step| step != 0) {
        let tried = (0.1 * step as f32 + limit) / max;
        let this_error = error(tried, max_level);
        if this_error < least {
            least = this_error;
            inverse = tried;
        }
    }
    let mut levels = [0u8; 8];
    let (mut product, mut square) = (0.0f32, 0.0f32);
    for i in 0..8 {
        let level = nearest(inverse * x[i]).min(max_level);
        levels[i] = level as u8;
        product += weights[i] * x[i] * level as f32;
        square += weights[i] * level as f32 * level as f32;
    }
    for _ in 0..5 {
        let mut changed = false;
        for i in 0..8 {
            let (weight, level) = (weights[i], f32::from(levels[i]));
            let mut without = (product - weight * x[i] * level, square - weight * level * level);
            if !(without.0 > 0.0 && without.1 > 0.0) {
                continue;
            }
            let new = nearest(x[i] * without.1 / without.0).min(max_level);
            if new == i32::from(levels[i]) {
                continue;
            }
            without.0 += weight * x[i] * new as f32;
            without.1 += weight * new as f32 * new as f32;
            if without.0 * without.0 * square > product * product * without.1 {
                levels[i] = new as u8;
                (product, square) = without;
                changed = true;
            }
        }
        if !changed {
            break;
        }
    }
    (if square > 0.0 { product / square } else { 0.0 }, levels)
}
