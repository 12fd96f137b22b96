//! TIES: of each delta keep the `density * n` largest values, elect a sign per element, add up what agrees with it:
//! `W' = W + scale * sum_{i agrees} weight_i d_i / sum_{i agrees} weight_i`.
//!
//! Weights are applied before the election (PEFT elects first and divides by a count); the sign of a zero sum is plus.
//! `normalize: false` leaves out the division. The largest values of a tensor are found exactly: equal magnitudes are kept
//! from the lowest index on. Source: Yadav et al., <https://arxiv.org/abs/2306.01708>.

use super::by_magnitude::{ByMagnitude, Keep};
use super::task_vectors::TaskVectors;
use super::{BaseModel, Inputs, Spec};
use crate::merge::select::Largest;

pub(super) const SPEC: Spec = Spec {
    name: "ties",
    summary: "base + the largest part of each difference where signs agree",
    inputs: Inputs::Deltas,
    base: BaseModel::Required,
    models: [1, usize::MAX],
    adapters_only: false,
    importance: false,
    common: &["scale", "normalize"],
    per_model: &["weight", "density"],
    kernel: |settings| {
        let elements = settings.elements();
        let kept = |density: f64| ((elements as f64 * density) as u64).max(1).min(elements);
        let targets = settings.numbers("density", Some(1.0), 0.0..=1.0)?.into_iter().map(kept).map(|kept| vec![kept]);
        let thin = ByMagnitude::new(Largest::new(targets.collect(), settings), &[(0, Keep::Largest)]);
        Ok(Box::new(TaskVectors::elected(settings, true, Box::new(thin))?))
    },
};
