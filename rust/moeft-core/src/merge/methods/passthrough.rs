//! One model as it is, times `scale`: `W' = scale * W`.
//!
//! With filters it scales single tensors; with `out_dtype` and `--max-shard-size` it converts and cuts a checkpoint anew.

use super::{BaseModel, Inputs, Spec, ANY};
use crate::merge::kernel::{Block, Kernel};
use crate::merge::simd::vectorised;

pub(super) const SPEC: Spec = Spec {
    name: "passthrough",
    summary: "one model, each tensor times scale",
    inputs: Inputs::Weights,
    base: BaseModel::Layout,
    models: [1, 1],
    adapters_only: false,
    importance: false,
    common: &[],
    per_model: &["scale"],
    kernel: |settings| Ok(Box::new(Passthrough { scale: settings.numbers("scale", Some(1.0), ANY)?[0] as f32 })),
};

struct Passthrough {
    scale: f32,
}

impl Kernel for Passthrough {
    fn combine(&self, block: &mut Block, out: &mut [f32]) {
        scale(&block.inputs[0], self.scale, out);
    }
}

vectorised! {
    fn scale(input: &[f32], scale: f32, out: &mut [f32]) {
        for (out, value) in out.iter_mut().zip(input) {
            *out = value * scale;
        }
    }
}
