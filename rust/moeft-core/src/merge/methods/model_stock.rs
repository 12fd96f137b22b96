//! Model stock: the average of the models, drawn to the base by how far their deltas point apart:
//! `W' = r * mean_i W_i + (1 - r) * W` with `r = N cos / (1 + (N - 1) cos)`, where cos is the mean cosine of all pairs of
//! deltas of a tensor, or of each row with `filter_wise: true`.
//!
//! A pair with a zero delta has cosine 0. Deltas that cancel out, `cos = -1 / (N - 1)`, have no ratio: the base stays. That
//! is the rule, not the exception, for tensors of one value and two models. Source: Jang et al., <https://arxiv.org/abs/2403.19522>.

use std::ops::Range;

use super::task_vectors::{add_base, weighted_sum};
use super::{BaseModel, Inputs, Spec};
use crate::merge::kernel::{Block, Gathered, Kernel, Reads};
use crate::merge::measure::products;

pub(super) const SPEC: Spec = Spec {
    name: "model_stock",
    summary: "average of models, drawn to the base by the angles between them",
    inputs: Inputs::Deltas,
    base: BaseModel::Required,
    models: [2, usize::MAX],
    adapters_only: false,
    importance: false,
    common: &["filter_wise"],
    per_model: &[],
    kernel: |settings| {
        // A vector is one row, which may be longer than a block.
        let rows = settings.flag("filter_wise", false)? && settings.shape.len() > 1;
        let row_len = rows.then(|| settings.cols() as usize);
        Ok(Box::new(ModelStock { models: settings.models.len(), row_len, ratio: None }))
    },
};

/// What is left of deltas that cancel out but for rounding.
const CANCELLED: f64 = 1e-6;

struct ModelStock {
    models: usize,
    /// Length of what has a ratio of its own, if it is not the whole tensor; rows lie whole in every block.
    row_len: Option<usize>,
    ratio: Option<f64>,
}

impl ModelStock {
    fn pairs(&self) -> impl Iterator<Item = (usize, usize)> {
        let models = self.models;
        (0..models).flat_map(move |left| (left + 1..models).map(move |right| (left, right)))
    }

    /// Adds the products of each pair of deltas: left with left, right with right, left with right.
    fn add_products(&self, block: &Block, range: Range<usize>, sums: &mut [f64]) {
        for ((left, right), sums) in self.pairs().zip(sums.as_chunks_mut::<3>().0) {
            let found = products(&block.inputs[left][range.clone()], &block.inputs[right][range.clone()]);
            sums.iter_mut().zip(found).for_each(|(sum, value)| *sum += value);
        }
    }

    /// How far from the base to the average, from the products of all pairs.
    fn ratio(&self, sums: &[f64]) -> f64 {
        let cosine =
            |&[aa, bb, ab]: &[f64; 3]| if aa * bb > 0.0 { (ab / (aa * bb).sqrt()).clamp(-1.0, 1.0) } else { 0.0 };
        let pairs = sums.as_chunks::<3>().0;
        let mean = pairs.iter().map(cosine).sum::<f64>() / pairs.len().max(1) as f64;
        let count = self.models as f64;
        let left = 1.0 + (count - 1.0) * mean;
        if left > CANCELLED {
            count * mean / left
        } else {
            0.0
        }
    }
}

impl Kernel for ModelStock {
    fn pass(&self) -> Option<Reads> {
        (self.row_len.is_none() && self.ratio.is_none()).then_some(Reads::Models)
    }

    fn gather(&self, block: &Block, into: &mut Gathered) {
        self.add_products(block, 0..block.base.len(), into.sums(3 * self.pairs().count()));
    }

    fn learn(&mut self, all: Gathered) {
        self.ratio = Some(self.ratio(&all.sums));
    }

    fn combine(&self, block: &mut Block, out: &mut [f32]) {
        let weights = vec![(self.ratio.unwrap_or(1.0) / self.models as f64) as f32; self.models];
        weighted_sum(&block.inputs, &weights, out);
        if let Some(row_len) = self.row_len {
            for (start, row) in (0..).step_by(row_len).zip(out.chunks_mut(row_len)) {
                let mut sums = vec![0.0; 3 * self.pairs().count()];
                self.add_products(block, start..start + row_len, &mut sums);
                let ratio = self.ratio(&sums) as f32;
                row.iter_mut().for_each(|delta| *delta *= ratio);
            }
        }
        add_base(&block.base, out);
    }

    fn branch(&self) -> Option<String> {
        self.ratio.map(|ratio| format!("ratio {ratio:.6}"))
    }
}
