//! Task arithmetic: `W' = W + scale * sum_i weight_i * (W_i - W)`, in float32.
//!
//! Models may be whole checkpoints or adapters. Source: Ilharco et al., <https://arxiv.org/abs/2212.04089>.

use super::task_vectors::TaskVectors;
use super::{BaseModel, Inputs, Spec};

pub(super) const SPEC: Spec = Spec {
    name: "task_arithmetic",
    summary: "base + weighted sum of the differences to the base",
    inputs: Inputs::Deltas,
    base: BaseModel::Required,
    models: [1, usize::MAX],
    adapters_only: false,
    importance: false,
    common: &["scale", "normalize"],
    per_model: &["weight"],
    kernel: |settings| Ok(Box::new(TaskVectors::sum(settings, false)?)),
};
