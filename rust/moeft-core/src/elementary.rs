//! Exponential, sigmoid and hyperbolic tangent in f32, without branches, so that loops over them become vector code.

/// The smaller; NaN stays NaN.
#[inline(always)]
pub(crate) fn at_most(value: f32, limit: f32) -> f32 {
    if value > limit {
        limit
    } else {
        value
    }
}

/// `value` within `-limit..=limit`; NaN stays NaN.
#[inline(always)]
pub(crate) fn within(value: f32, limit: f32) -> f32 {
    let low = if value < -limit { -limit } else { value };
    at_most(low, limit)
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// e^x to about 2 units in the last place; the smallest normal number below e^-87.3, and e^87.3 above.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let (less_one, power) = reduced_exp_less_one(x);
    (less_one + 1.0) * power
}

/// tanh(x) to about 3 units in the last place, also near zero.
///
/// With q = e^(-2|x|) it is (1 - q) / (1 + q); q - 1 is formed without q, which would cancel where x is small.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let (less_one, power) = reduced_exp_less_one(-2.0 * x.abs());
    let q_less_one = less_one * power + (power - 1.0);
    (-q_less_one / (2.0 + q_less_one)).copysign(x)
}

/// e^r - 1 and 2^n of e^x = 2^n e^r with |r| <= ln 2 / 2, for |x| up to 87.3.
///
/// e^r - 1 is its Taylor series to the 7th power, whose remainder is below 6e-9.
#[inline(always)]
fn reduced_exp_less_one(x: f32) -> (f32, f32) {
    /// Adding it leaves the nearest integer in the low bits.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts; products of the first with integers up to 2^8 are exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // f32 has no e^88.8, nor a normal e^-87.4. Comparisons instead of clamp: NaN stays NaN.
    let x = within(x, 87.3);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    let mut sum = 1.0 / 5040.0;
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0] {
        sum = sum * r + coefficient;
    }
    let exponent = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32).wrapping_add(127) as u32;
    (sum * r, f32::from_bits(exponent << 23))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn exp_is_within_two_units_in_the_last_place(x in -87.0f32..87.0) {
            let exact = f64::from(x).exp();
            prop_assert!((f64::from(exp(x)) - exact).abs() <= exact * 2.0 * f64::from(f32::EPSILON));
        }

        #[test]
        fn tanh_is_within_three_units_in_the_last_place(x in -12.0f32..12.0, scale in prop::sample::select(vec![1.0f32, 1e-2, 1e-6, 1e-30])) {
            let x = x * scale;
            let exact = f64::from(x).tanh();
            prop_assert!((f64::from(tanh(x)) - exact).abs() <= exact.abs() * 3.0 * f64::from(f32::EPSILON));
        }
    }

    #[test]
    fn nothing_becomes_nan_but_nan() {
        for x in [f32::INFINITY, f32::NEG_INFINITY, 1e30, -1e30, 0.0, -0.0] {
            assert!(sigmoid(x).is_finite() && exp(x).is_finite());
            assert_eq!(tanh(x), x.clamp(-1.0, 1.0));
        }
        assert!(exp(f32::NAN).is_nan() && sigmoid(f32::NAN).is_nan() && tanh(f32::NAN).is_nan());
    }
}
