//! Adds the deltas of LoRA adapters to the base: `W' = round(W + scale * sum_i weight_i * ((B_i @ A_i) * scaling_i))`.
//!
//! Ranks, scalings (rsLoRA too) and targets may differ from adapter to adapter; the sum is dense, so nothing is lost. With
//! `normalize: true` the weights are divided by their sum over all adapters: the average of the deltas, where an adapter
//! that leaves a tensor alone counts as zero. Source: Hu et al., <https://arxiv.org/abs/2106.09685>; the order of
//! roundings is PEFT's `merge_and_unload`.

use super::task_vectors::TaskVectors;
use super::{BaseModel, Inputs, Spec};

pub(super) const SPEC: Spec = Spec {
    name: "lora",
    summary: "base + weighted sum (normalize: average) of LoRA deltas, any mix of ranks",
    inputs: Inputs::Deltas,
    base: BaseModel::Required,
    models: [1, usize::MAX],
    adapters_only: true,
    importance: false,
    common: &["scale", "normalize"],
    per_model: &["weight"],
    kernel: |settings| Ok(Box::new(TaskVectors::sum(settings, false)?)),
};
