//! Model stock: the average of the models, drawn to the base by how far their deltas point apart:
//! `W' = r * mean_i W_i + (1 - r) * W` with `r = N cos / (1 + (N - 1) cos)`, where cos is the mean cosine of all pairs of
//! deltas of a tensor.
//!
//! A pair with a zero delta has cosine 0. Source: Jang et al., <https://arxiv.org/abs/2403.19522>.

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
    common: &[],
    per_model: &[],
    kernel: |settings| Ok(Box::new(ModelStock { models: settings.models.len(), ratio: None })),
};

struct ModelStock {
    models: usize,
    ratio: Option<f64>,
}

impl ModelStock {
    fn pairs(&self) -> impl Iterator<Item = (usize, usize)> {
        let models = self.models;
        (0..models).flat_map(move |left| (left + 1..models).map(move |right| (left, right)))
    }
}

impl Kernel for ModelStock {
    fn pass(&self) -> Option<Reads> {
        self.ratio.is_none().then_some(Reads::Models)
    }

    fn gather(&self, block: &Block, into: &mut Gathered) {
        let sums = into.sums(3 * self.pairs().count());
        for ((left, right), sums) in self.pairs().zip(sums.as_chunks_mut::<3>().0) {
            let found = products(&block.inputs[left], &block.inputs[right]);
            sums.iter_mut().zip(found).for_each(|(sum, value)| *sum += value);
        }
    }

    fn learn(&mut self, all: Gathered) {
        let cosine =
            |&[aa, bb, ab]: &[f64; 3]| if aa * bb > 0.0 { (ab / (aa * bb).sqrt()).clamp(-1.0, 1.0) } else { 0.0 };
        let pairs = all.sums.as_chunks::<3>().0;
        let mean = pairs.iter().map(cosine).sum::<f64>() / pairs.len().max(1) as f64;
        let count = self.models as f64;
        self.ratio = Some(count * mean / (1.0 + (count - 1.0) * mean));
    }

    fn combine(&self, block: &mut Block, out: &mut [f32]) {
        let weight = self.ratio.unwrap_or(0.0) / self.models as f64;
        weighted_sum(&block.inputs, &vec![weight as f32; self.models], out);
        add_base(&block.base, out);
    }

    fn branch(&self) -> Option<String> {
        Some(format!("ratio {:.6}", self.ratio.unwrap_or(0.0)))
    }
}
