//! The average of deltas, held back where the base must not change:
//! `W' = W + scale * (1 - F) * (1 - F_layer) * sum_i weight_i d_i / sum_i weight_i`.
//!
//! F is the diagonal Fisher information of each weight, from the file `fisher`, brought to 0..1 by smallest and largest value
//! of the tensor. F_layer is the importance of the layer, from the file `layer_importance`, brought to 0..1 over all layers.
//! A tensor without Fisher information, or with the same everywhere, has F = 0; a tensor outside the layers has
//! F_layer = 0. Source: Kirkpatrick et al., <https://arxiv.org/abs/1612.00796>, for what F means; Matena and Raffel,
//! <https://arxiv.org/abs/2111.09832>, for merging by it.

use super::task_vectors::{add_base, weighted_sum};
use super::{divisor, BaseModel, Inputs, Spec, ANY};
use crate::merge::kernel::{Block, Gathered, Kernel, Reads};
use crate::merge::simd::vectorised;

pub(super) const SPEC: Spec = Spec {
    name: "fisher_damped",
    summary: "base + average difference, damped by Fisher information of weights and layers",
    inputs: Inputs::Deltas,
    base: BaseModel::Required,
    models: [1, usize::MAX],
    adapters_only: false,
    importance: true,
    common: &["scale"],
    per_model: &["weight"],
    kernel: |settings| {
        let scale = settings.number("scale", Some(1.0), ANY)?;
        let factor = scale * (1.0 - settings.layer_importance) / divisor(settings, "")?;
        let weights = settings.numbers("weight", Some(1.0), ANY)?;
        Ok(Box::new(FisherDamped {
            weights: weights.into_iter().map(|weight| (weight * factor) as f32).collect(),
            range: settings.fisher_range,
            has_fisher: settings.has_fisher,
        }))
    },
};

struct FisherDamped {
    weights: Vec<f32>,
    range: Option<[f32; 2]>,
    has_fisher: bool,
}

impl Kernel for FisherDamped {
    fn pass(&self) -> Option<Reads> {
        (self.has_fisher && self.range.is_none()).then_some(Reads::Fisher)
    }

    fn gather(&self, block: &Block, into: &mut Gathered) {
        let [low, high] = range(&block.fisher);
        into.range = [into.range[0].min(low), into.range[1].max(high)];
    }

    fn learn(&mut self, all: Gathered) {
        self.range = Some(all.range);
    }

    fn combine(&self, block: &mut Block, out: &mut [f32]) {
        weighted_sum(&block.inputs, &self.weights, out);
        if let Some([low, high]) = self.range.filter(|[low, high]| self.has_fisher && low < high) {
            damp(out, &block.fisher, low, high);
        }
        add_base(&block.base, out);
    }

    fn branch(&self) -> Option<String> {
        let flat = self.range.is_some_and(|[low, high]| low >= high);
        Some(
            if !self.has_fisher {
                "undamped"
            } else if flat {
                "flat"
            } else {
                "damped"
            }
            .into(),
        )
    }
}

vectorised! {
    fn range(values: &[f32]) -> [f32; 2] {
        let (mut low, mut high) = ([f32::INFINITY; 16], [f32::NEG_INFINITY; 16]);
        let (whole, rest) = values.as_chunks::<16>();
        for values in whole {
            // Two loops become vector code; the same in one does not.
            for lane in 0..16 {
                low[lane] = if values[lane] < low[lane] { values[lane] } else { low[lane] };
            }
            for lane in 0..16 {
                high[lane] = if values[lane] > high[lane] { values[lane] } else { high[lane] };
            }
        }
        let low = low.into_iter().chain(rest.iter().copied()).fold(f32::INFINITY, f32::min);
        [low, high.into_iter().chain(rest.iter().copied()).fold(f32::NEG_INFINITY, f32::max)]
    }
}

vectorised! {
    /// `delta *= 1 - (fisher - low) / (high - low)`, the fraction held to 0..1 where the stated range is too narrow.
    fn damp(delta: &mut [f32], fisher: &[f32], low: f32, high: f32) {
        let span = high - low;
        for (delta, fisher) in delta.iter_mut().zip(fisher) {
            *delta *= 1.0 - ((fisher - low) / span).clamp(0.0, 1.0);
        }
    }
}
