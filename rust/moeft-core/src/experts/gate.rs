//! Activations that join gate and up, and their gradients.

use crate::elementary::{at_most, sigmoid, within};
use crate::gemm::{run, Kernel, Lanes};
use crate::isa::Isa;

/// How gate and up become one value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Gate {
    /// `silu(gate) * up`.
    Silu,
    /// `gelu(gate) * up` with the tanh approximation.
    GeluTanh,
    /// GPT-OSS: gate at most `limit`, up within `limit`, then `gate * sigmoid(alpha * gate) * (up + 1)`.
    ClampedSwiglu {
        /// Slope of the sigmoid.
        alpha: f32,
        /// Bound of both inputs.
        limit: f32,
    },
}

/// Where gate and up of value `i` lie among the lanes of a block.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pairs {
    /// Number of values, I.
    pub inner: usize,
    /// Whether they alternate.
    pub interleaved: bool,
}

impl Pairs {
    #[inline(always)]
    fn at(self, i: usize) -> (usize, usize) {
        if self.interleaved {
            (2 * i, 2 * i + 1)
        } else {
            (i, self.inner + i)
        }
    }
}

impl Gate {
    /// Activations of one block: `h` holds 2I lanes, `act` I.
    pub(super) fn forward(self, isa: Isa, pairs: Pairs, h: &[Lanes], act: &mut [Lanes]) {
        match self {
            Self::Silu => run(isa, Forward(Silu, pairs, h, act)),
            Self::GeluTanh => run(isa, Forward(GeluTanh, pairs, h, act)),
            Self::ClampedSwiglu { alpha, limit } => run(isa, Forward(Clamped { alpha, limit }, pairs, h, act)),
        }
    }

    /// Turns the gradient of the activations of one block into that of `h`, in place of `h`.
    ///
    /// Returns, for each row, the sum over the block of activation times `grad`: the gradient of its routing weight.
    pub(super) fn backward(self, isa: Isa, pairs: Pairs, weights: Lanes, grad: &[Lanes], h: &mut [Lanes]) -> Lanes {
        match self {
            Self::Silu => run(isa, Backward(Silu, pairs, weights, grad, h)),
            Self::GeluTanh => run(isa, Backward(GeluTanh, pairs, weights, grad, h)),
            Self::ClampedSwiglu { alpha, limit } => {
                run(isa, Backward(Clamped { alpha, limit }, pairs, weights, grad, h))
            }
        }
    }
}

struct Forward<'a, F>(F, Pairs, &'a [Lanes], &'a mut [Lanes]);

impl<F: Activation> Kernel for Forward<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self(activation, pairs, h, act) = self;
        for (i, act) in act.iter_mut().enumerate() {
            let (gate, up) = pairs.at(i);
            let (gate, up) = (&h[gate].0, &h[up].0);
            for ((act, &gate), &up) in act.0.iter_mut().zip(gate).zip(up) {
                *act = activation.value(gate, up);
            }
        }
    }
}

struct Backward<'a, F>(F, Pairs, Lanes, &'a [Lanes], &'a mut [Lanes]);

impl<F: Activation> Kernel for Backward<'_, F> {
    type Output = Lanes;

    #[inline(always)]
    fn run(self) -> Lanes {
        let Self(activation, pairs, weights, grad, h) = self;
        let mut sums = Lanes::default();
        for (i, grad) in grad.iter().enumerate() {
            let (gate_at, up_at) = pairs.at(i);
            let (mut gates, mut ups) = (h[gate_at], h[up_at]);
            for lane in 0..sums.0.len() {
                let (gate, up) = (gates.0[lane], ups.0[lane]);
                sums.0[lane] += activation.value(gate, up) * grad.0[lane];
                let (by_gate, by_up) = activation.derivatives(gate, up);
                let grad = grad.0[lane] * weights.0[lane];
                (gates.0[lane], ups.0[lane]) = (by_gate * grad, by_up * grad);
            }
            (h[gate_at], h[up_at]) = (gates, ups);
        }
        sums
    }
}

/// One formula. No branches, so that loops over it become vector code.
trait Activation: Copy {
    fn value(self, gate: f32, up: f32) -> f32;
    /// By gate and by up.
    fn derivatives(self, gate: f32, up: f32) -> (f32, f32);
}

#[derive(Clone, Copy)]
struct Silu;

impl Activation for Silu {
    #[inline(always)]
    fn value(self, gate: f32, up: f32) -> f32 {
        gate * sigmoid(gate) * up
    }

    #[inline(always)]
    fn derivatives(self, gate: f32, up: f32) -> (f32, f32) {
        let s = sigmoid(gate);
        (s * (1.0 + gate * (1.0 - s)) * up, gate * s)
    }
}

#[derive(Clone, Copy)]
struct GeluTanh;

/// sqrt(8 / pi): `0.5 * (1 + tanh(u))` is `sigmoid(2 u)`, without the cancellation.
const GELU_SLOPE: f32 = 1.595_769;
const GELU_CUBE: f32 = 0.044_715;

impl Activation for GeluTanh {
    #[inline(always)]
    fn value(self, gate: f32, up: f32) -> f32 {
        gate * sigmoid(GELU_SLOPE * gate * (1.0 + GELU_CUBE * gate * gate)) * up
    }

    #[inline(always)]
    fn derivatives(self, gate: f32, up: f32) -> (f32, f32) {
        let s = sigmoid(GELU_SLOPE * gate * (1.0 + GELU_CUBE * gate * gate));
        let slope = GELU_SLOPE * (1.0 + 3.0 * GELU_CUBE * gate * gate);
        ((s + gate * s * (1.0 - s) * slope) * up, gate * s)
    }
}

#[derive(Clone, Copy)]
struct Clamped {
    alpha: f32,
    limit: f32,
}

impl Activation for Clamped {
    #[inline(always)]
    fn value(self, gate: f32, up: f32) -> f32 {
        let (gate, up) = (at_most(gate, self.limit), within(up, self.limit));
        gate * sigmoid(self.alpha * gate) * (up + 1.0)
    }

    #[inline(always)]
    fn derivatives(self, gate: f32, up: f32) -> (f32, f32) {
        let (g, u) = (at_most(gate, self.limit), within(up, self.limit));
        let s = sigmoid(self.alpha * g);
        let by_gate = s * (1.0 + self.alpha * g * (1.0 - s)) * (u + 1.0);
        let by_up = g * s;
        (if gate > self.limit { 0.0 } else { by_gate }, if up.abs() > self.limit { 0.0 } else { by_up })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn derivatives_equal_differences(gate in -6.0f32..6.0, up in -6.0f32..6.0) {
            fn check(activation: impl Activation, gate: f32, up: f32) {
                let step = 1e-2;
                let (by_gate, by_up) = activation.derivatives(gate, up);
                let difference = |a: f32, b: f32| (a - b) / (2.0 * step);
                let gates = difference(activation.value(gate + step, up), activation.value(gate - step, up));
                let ups = difference(activation.value(gate, up + step), activation.value(gate, up - step));
                assert!((by_gate - gates).abs() < 2e-2, "{by_gate} {gates}");
                assert!((by_up - ups).abs() < 2e-2, "{by_up} {ups}");
            }
            check(Silu, gate, up);
            check(GeluTanh, gate, up);
            check(Clamped { alpha: 1.702, limit: 7.0 }, gate, up);
        }
    }

    #[test]
    fn nan_stays_nan() {
        assert!(Silu.value(f32::NAN, 1.0).is_nan());
    }
}
