//! DELLA: drop values of a delta at random, small ones more often. In each row the values are ranked by magnitude; the
//! smallest is kept with probability `density - epsilon`, the largest with `density + epsilon`, those between on a straight
//! line by rank, and what stays is divided by its probability. Then signs are elected as [`ties`](super::ties) does
//! (`della`), or not (`della_linear`).
//!
//! `rescale: false` leaves out the division. A row is the last axis; a vector of more than 65,536 values is ranked in pieces
//! of 16,384. Source: Deep et al., <https://arxiv.org/abs/2406.11617>.

use super::task_vectors::{TaskVectors, Thin};
use super::{BaseModel, Inputs, Spec};
use crate::merge::kernel::Settings;
use crate::merge::keys::RecipeError;
use crate::merge::random::Stream;

pub(super) const TIES: Spec = Spec {
    name: "della",
    summary: "base + a random part of each difference, large values more often, where signs agree",
    kernel: |settings| Ok(Box::new(TaskVectors::elected(settings, true, Box::new(Ranked::new(settings)?))?)),
    ..LINEAR
};

pub(super) const LINEAR: Spec = Spec {
    name: "della_linear",
    summary: "as della, whatever the signs",
    inputs: Inputs::Deltas,
    base: BaseModel::Required,
    models: [1, usize::MAX],
    adapters_only: false,
    importance: false,
    common: &["scale", "normalize", "rescale"],
    per_model: &["weight", "density", "epsilon"],
    kernel: |settings| Ok(Box::new(TaskVectors::thinned(settings, false, Box::new(Ranked::new(settings)?))?)),
};

/// Drops values at random, by their rank in the row. Per model: where its numbers come from, least and largest
/// probability to stay.
struct Ranked {
    models: Vec<(Stream, [f64; 2])>,
    rescale: bool,
    row: usize,
}

impl Ranked {
    fn new(settings: &Settings<'_>) -> Result<Self, RecipeError> {
        let densities = settings.numbers("density", Some(1.0), 0.0..=1.0)?;
        let epsilons = settings.numbers("epsilon", Some(0.15), 0.0..=1.0)?;
        let model = |(&entry, (&density, &epsilon)): (&usize, (&f64, &f64))| {
            let (least, most) = (density - epsilon, density + epsilon);
            if least <= 0.0 || most > 1.0 {
                let value = format!("{density} ± {epsilon}");
                let key = format!("density ± epsilon of {}", settings.name);
                return Err(RecipeError::value(key, value, "probabilities above 0 and up to 1; set a smaller epsilon"));
            }
            Ok((Stream::new(settings.seed, settings.name, entry), [least, most]))
        };
        let models = settings.entries.iter().zip(densities.iter().zip(&epsilons)).map(model);
        let row = settings.cols().min(settings.block) as usize;
        Ok(Self { models: models.collect::<Result<_, _>>()?, rescale: settings.flag("rescale", true)?, row })
    }
}

impl Thin for Ranked {
    fn thin(&self, input: usize, start: u64, delta: &mut [f32]) {
        let (stream, [least, most]) = self.models[input];
        let mut order: Vec<u64> = Vec::with_capacity(self.row);
        for (first, row) in (start..).step_by(self.row).zip(delta.chunks_mut(self.row)) {
            order.clear();
            let key = |(index, value): (u64, &f32)| u64::from(value.to_bits() & 0x7fff_ffff) << 32 | index;
            order.extend((0..).zip(&*row).map(key));
            order.sort_unstable();
            let last = (row.len().max(2) - 1) as f64;
            for (rank, key) in order.iter().enumerate() {
                let index = (key & 0xffff_ffff) as usize;
                let probability = least + (most - least) * rank as f64 / last;
                let factor = if self.rescale { (1.0 / probability) as f32 } else { 1.0 };
                let stays = stream.happens(first + index as u64, probability);
                row[index] = if stays { row[index] * factor } else { 0.0 };
            }
        }
    }
}
