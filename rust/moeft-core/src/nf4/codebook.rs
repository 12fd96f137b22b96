//! The sixteen values of NF4, and the thresholds between them.

/// Values of the sixteen indices, ascending. Quantiles of N(0, 1) scaled to [-1, 1], with an exact zero.
///
/// Source: QLoRA, appendix E, <https://arxiv.org/abs/2305.14314>.
// Digits as in the source, so that the table can be compared with it by eye.
#[allow(clippy::excessive_precision)]
pub const CODE: [f32; 16] = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
];

/// Midpoint `i` lies between codes `i` and `i + 1`, rounded to f32. A value on a midpoint takes the lower index.
pub const MIDPOINTS: [f32; 15] = {
    let mut midpoints = [0.0; 15];
    let mut i = 0;
    while i < 15 {
        midpoints[i] = (CODE[i] + CODE[i + 1]) / 2.0;
        i += 1;
    }
    midpoints
};

/// A scale is never taken from an absolute maximum below this, so that an all-zero block divides by something.
pub(super) const MIN_ABSMAX: f32 = 1e-38;
