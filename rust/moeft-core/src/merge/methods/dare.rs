//! DARE: drop each value of a delta with probability `1 - density` and divide the others by `density`; then add up
//! (`dare_linear`) or elect signs as [`ties`](super::ties) does (`dare_ties`).
//!
//! `rescale: false` leaves out the division. A value's fate is decided by seed, tensor, model and place alone. Source: Yu
//! et al., <https://arxiv.org/abs/2311.03099>.

use super::task_vectors::{TaskVectors, Thin};
use super::{BaseModel, Inputs, Spec};
use crate::merge::kernel::Settings;
use crate::merge::keys::RecipeError;
use crate::merge::random::Stream;

pub(super) const LINEAR: Spec = Spec {
    name: "dare_linear",
    summary: "base + a random part of each difference, rescaled",
    inputs: Inputs::Deltas,
    base: BaseModel::Required,
    models: [1, usize::MAX],
    adapters_only: false,
    importance: false,
    common: &["scale", "normalize", "rescale"],
    per_model: &["weight", "density"],
    kernel: |settings| Ok(Box::new(TaskVectors::thinned(settings, false, Box::new(Drop::new(settings)?))?)),
};

pub(super) const TIES: Spec = Spec {
    name: "dare_ties",
    summary: "as dare_linear, where signs agree",
    kernel: |settings| Ok(Box::new(TaskVectors::elected(settings, false, Box::new(Drop::new(settings)?))?)),
    ..LINEAR
};

/// Drops values at random. Per model: where its numbers come from, density, and factor of what stays.
struct Drop {
    models: Vec<(Stream, f64, f32)>,
}

impl Drop {
    fn new(settings: &Settings<'_>) -> Result<Self, RecipeError> {
        let rescale = settings.flag("rescale", true)?;
        let densities = settings.numbers("density", Some(1.0), f64::MIN_POSITIVE..=1.0)?;
        let models = settings.entries.iter().zip(densities).map(|(&entry, density)| {
            let factor = if rescale { (1.0 / density) as f32 } else { 1.0 };
            (Stream::new(settings.seed, settings.name, entry), density, factor)
        });
        Ok(Self { models: models.collect() })
    }
}

impl Thin for Drop {
    fn thin(&self, input: usize, start: u64, delta: &mut [f32]) {
        let (stream, density, factor) = self.models[input];
        for (index, value) in (start..).zip(delta) {
            *value = if stream.happens(index, density) { *value * factor } else { 0.0 };
        }
    }
}
