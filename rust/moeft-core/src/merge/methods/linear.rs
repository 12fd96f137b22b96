//! Weighted average: `W' = sum_i weight_i * W_i`, divided by `sum_i weight_i` unless `normalize: false`.
//!
//! Computed in float64 and rounded once, so equal inputs come out unchanged. Source: Wortsman et al., model soups,
//! <https://arxiv.org/abs/2203.05482>.

use super::{divisor, BaseModel, Inputs, Spec, ANY, NOT_NORMALIZED};
use crate::merge::kernel::{Block, Kernel};
use crate::merge::simd::vectorised;

pub(super) const SPEC: Spec = Spec {
    name: "linear",
    summary: "weighted average of weights",
    inputs: Inputs::Weights,
    base: BaseModel::Layout,
    models: [1, usize::MAX],
    adapters_only: false,
    importance: false,
    common: &["normalize"],
    per_model: &["weight"],
    kernel: |settings| {
        let by = if settings.flag("normalize", true)? { divisor(settings, NOT_NORMALIZED)? } else { 1.0 };
        let weights = settings.numbers("weight", Some(1.0), ANY)?;
        Ok(Box::new(Linear { weights: weights.into_iter().map(|weight| weight / by).collect() }))
    },
};

struct Linear {
    weights: Vec<f64>,
}

impl Kernel for Linear {
    fn combine(&self, block: &mut Block, out: &mut [f32]) {
        weighted_average(&block.inputs, &self.weights, out);
    }
}

/// Values whose sums stay in registers.
const PIECE: usize = 32;

vectorised! {
    /// `out = sum_i weights[i] * inputs[i]`, summed in float64, in the order of i.
    pub(super) fn weighted_average(inputs: &[Vec<f32>], weights: &[f64], out: &mut [f32]) {
        let (pieces, rest) = out.as_chunks_mut::<PIECE>();
        let start_of_rest = pieces.len() * PIECE;
        for (start, out) in (0..).step_by(PIECE).zip(pieces) {
            let mut sums = [0.0f64; PIECE];
            for (input, &weight) in inputs.iter().zip(weights) {
                let input: &[f32; PIECE] = input[start..][..PIECE].try_into().expect("inputs are as long as the output");
                for lane in 0..PIECE {
                    sums[lane] += f64::from(input[lane]) * weight;
                }
            }
            *out = sums.map(|sum| sum as f32);
        }
        for (place, out) in (start_of_rest..).zip(rest) {
            let terms = inputs.iter().zip(weights).map(|(input, &weight)| f64::from(input[place]) * weight);
            *out = terms.fold(0.0, |sum, term| sum + term) as f32;
        }
    }
}
