//! Spherical interpolation of two models by their weights: [`slerp`](super::slerp)'s formula with `t = w_1 / (w_0 + w_1)`.
//!
//! With a `base_model` the deltas are interpolated and added to it: `W' = W + slerp(W_0 - W, W_1 - W)`. Straight lines only
//! where the deltas are parallel to nine digits. `unit: tensor` (the default), `row` or `expert`.

use super::slerp::{Arc, Unit};
use super::task_vectors::add_base;
use super::{divisor, BaseModel, Inputs, Spec, ANY};
use crate::merge::kernel::{Block, Gathered, Kernel, Reads};

pub(super) const SPEC: Spec = Spec {
    name: "nuslerp",
    summary: "between two models along the arc, by weight; of the deltas, if there is a base",
    inputs: Inputs::DeltasFromBase,
    base: BaseModel::Layout,
    models: [2, 2],
    adapters_only: false,
    importance: false,
    common: &["unit"],
    per_model: &["weight"],
    kernel: |settings| {
        let weights = settings.numbers("weight", Some(1.0), ANY)?;
        let t = weights[1] / divisor(settings, "")?;
        let arc = Arc::new(settings, t, 1.0 - 1e-9, Unit::Tensor)?;
        Ok(Box::new(Nuslerp { arc, of_deltas: settings.of_deltas }))
    },
};

struct Nuslerp {
    arc: Arc,
    of_deltas: bool,
}

impl Kernel for Nuslerp {
    fn pass(&self) -> Option<Reads> {
        self.arc.pass()
    }

    fn gather(&self, block: &Block, into: &mut Gathered) {
        self.arc.gather(block.start, &block.inputs[0], &block.inputs[1], into);
    }

    fn learn(&mut self, all: Gathered) {
        self.arc.learn(&all);
    }

    fn combine(&self, block: &mut Block, out: &mut [f32]) {
        self.arc.combine(block.start, &block.inputs[0], &block.inputs[1], out);
        if self.of_deltas {
            add_base(&block.base, out);
        }
    }

    fn counts_while_combining(&self) -> bool {
        self.arc.rows
    }

    fn branch(&self) -> Option<String> {
        Some(self.arc.branch())
    }
}
