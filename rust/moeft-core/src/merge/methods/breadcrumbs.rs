//! Model breadcrumbs: of each delta drop the `gamma * n` largest values and, from the smallest up, as many that
//! `density * n` are left; add up the rest, weighted. `breadcrumbs_ties` elects signs as [`ties`](super::ties) does.
//!
//! Source: Davari and Belilovsky, <https://arxiv.org/abs/2312.06795>.

use super::by_magnitude::{ByMagnitude, Keep};
use super::task_vectors::TaskVectors;
use super::{BaseModel, Inputs, Spec};
use crate::merge::kernel::Settings;
use crate::merge::keys::RecipeError;
use crate::merge::select::Largest;

pub(super) const LINEAR: Spec = Spec {
    name: "breadcrumbs",
    summary: "base + each difference without its largest and smallest values",
    inputs: Inputs::Deltas,
    base: BaseModel::Required,
    models: [1, usize::MAX],
    adapters_only: false,
    importance: false,
    common: &["scale", "normalize"],
    per_model: &["weight", "density", "gamma"],
    kernel: |settings| Ok(Box::new(TaskVectors::thinned(settings, false, middle(settings)?)?)),
};

pub(super) const TIES: Spec = Spec {
    name: "breadcrumbs_ties",
    summary: "as breadcrumbs, where signs agree",
    kernel: |settings| Ok(Box::new(TaskVectors::elected(settings, false, middle(settings)?)?)),
    ..LINEAR
};

/// Keeps the values between the largest and the smallest.
fn middle(settings: &Settings<'_>) -> Result<Box<ByMagnitude>, RecipeError> {
    let elements = settings.elements();
    let part = |fraction: f64| (elements as f64 * fraction) as u64;
    let density = settings.numbers("density", Some(1.0), 0.0..=1.0)?;
    let gamma = settings.numbers("gamma", Some(0.01), 0.0..=1.0)?;
    // Where both do not fit, fewer of the largest go.
    let cuts = |(&density, &gamma): (&f64, &f64)| {
        let kept = part(density);
        let dropped = part(gamma).min(elements - kept);
        vec![dropped, dropped + kept]
    };
    let largest = Largest::new(density.iter().zip(&gamma).map(cuts).collect(), settings);
    // The wider cut first: it sees every value, and what it drops is no tie of the narrower one.
    Ok(Box::new(ByMagnitude::new(largest, &[(1, Keep::Largest), (0, Keep::Others)])))
}
