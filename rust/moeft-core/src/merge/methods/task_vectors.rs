//! What the methods on differences to the base share: thin them out, agree on signs or not, add them up.

use super::{divisor, ANY, NOT_NORMALIZED};
use crate::checkpoint::Dtype;
use crate::float::round_trip;
use crate::merge::kernel::{Block, Gathered, Kernel, Reads, Settings};
use crate::merge::keys::RecipeError;
use crate::merge::simd::vectorised;

/// Values whose signs are elected at once: sums stay in the L1 cache.
const PIECE: usize = 256;

/// Sets some values of a delta to zero.
pub trait Thin: Send + Sync {
    /// As [`Kernel::pass`].
    fn pass(&self) -> Option<Reads> {
        None
    }

    /// As [`Kernel::gather`].
    fn gather(&self, _block: &Block, _into: &mut Gathered) {}

    /// As [`Kernel::learn`].
    fn learn(&mut self, _all: Gathered) {}

    /// Thins out the delta of model `input`, which starts at element `start` of the tensor.
    fn thin(&self, input: usize, start: u64, delta: &mut [f32]);
}

/// Keeps everything.
struct Everything;

impl Thin for Everything {
    fn thin(&self, _input: usize, _start: u64, _delta: &mut [f32]) {}
}

/// How deltas become one.
enum Sum {
    /// Added with these weights.
    Plain(Vec<f32>),
    /// Only those of the elected sign; divided by the weights that took part, if so asked.
    Elected { weights: Vec<f32>, normalize: bool, scale: f32 },
}

/// `W' = W + merged delta`.
pub struct TaskVectors {
    thin: Box<dyn Thin>,
    sum: Sum,
    delta_dtype: Option<Dtype>,
}

impl TaskVectors {
    /// The weighted sum of all deltas.
    pub fn sum(settings: &Settings<'_>, normalize: bool) -> Result<Self, RecipeError> {
        Self::thinned(settings, normalize, Box::new(Everything))
    }

    /// The weighted sum of deltas that were thinned out. `normalize` is what holds if the recipe does not say.
    pub fn thinned(settings: &Settings<'_>, normalize: bool, thin: Box<dyn Thin>) -> Result<Self, RecipeError> {
        let factor = match settings.flag("normalize", normalize)? {
            true => settings.number("scale", Some(1.0), ANY)? / divisor(settings, NOT_NORMALIZED)?,
            false => settings.number("scale", Some(1.0), ANY)?,
        };
        let weights = settings.numbers("weight", Some(1.0), ANY)?;
        let sum = Sum::Plain(weights.into_iter().map(|weight| (weight * factor) as f32).collect());
        Ok(Self { thin, sum, delta_dtype: settings.delta_dtype })
    }

    /// The sum of deltas whose sign, after weighting, is that of the sum of all. The sign of a sum of zero is plus.
    pub fn elected(settings: &Settings<'_>, normalize: bool, thin: Box<dyn Thin>) -> Result<Self, RecipeError> {
        let weights = settings.numbers("weight", Some(1.0), ANY)?;
        let sum = Sum::Elected {
            weights: weights.into_iter().map(|weight| weight as f32).collect(),
            normalize: settings.flag("normalize", normalize)?,
            scale: settings.number("scale", Some(1.0), ANY)? as f32,
        };
        Ok(Self { thin, sum, delta_dtype: settings.delta_dtype })
    }
}

impl Kernel for TaskVectors {
    fn pass(&self) -> Option<Reads> {
        self.thin.pass()
    }

    fn gather(&self, block: &Block, into: &mut Gathered) {
        self.thin.gather(block, into);
    }

    fn learn(&mut self, all: Gathered) {
        self.thin.learn(all);
    }

    fn combine(&self, block: &mut Block, out: &mut [f32]) {
        for (input, delta) in block.inputs.iter_mut().enumerate() {
            self.thin.thin(input, block.start, delta);
        }
        match &self.sum {
            Sum::Plain(weights) => weighted_sum(&block.inputs, weights, out),
            Sum::Elected { weights, normalize, scale } => elected_sum(&block.inputs, weights, *normalize, *scale, out),
        }
        if let Some(dtype) = self.delta_dtype {
            out.iter_mut().for_each(|delta| *delta = round_trip(dtype, *delta));
        }
        add_base(&block.base, out);
    }
}

vectorised! {
    /// `out = sum_i weights[i] * inputs[i]`, in the order of i.
    pub fn weighted_sum(inputs: &[Vec<f32>], weights: &[f32], out: &mut [f32]) {
        let mut weighted = inputs.iter().zip(weights);
        match weighted.next() {
            Some((input, weight)) => out.iter_mut().zip(input).for_each(|(sum, delta)| *sum = delta * weight),
            None => out.fill(0.0),
        }
        for (input, weight) in weighted {
            out.iter_mut().zip(input).for_each(|(sum, delta)| *sum += delta * weight);
        }
    }
}

vectorised! {
    /// `out = base + out`, and the base itself for a zero: -0.0 + 0.0 would be +0.0 and change bytes.
    pub fn add_base(base: &[f32], out: &mut [f32]) {
        for (delta, weight) in out.iter_mut().zip(base) {
            let sum = weight + *delta;
            *delta = if *delta == 0.0 { *weight } else { sum };
        }
    }
}

vectorised! {
    /// The sum of the weighted deltas that agree with the sign of the sum of all.
    fn elected_sum(inputs: &[Vec<f32>], weights: &[f32], normalize: bool, scale: f32, out: &mut [f32]) {
        for (start, out) in (0..).step_by(PIECE).zip(out.chunks_mut(PIECE)) {
            let (mut sign, mut divisor) = ([0.0f32; PIECE], [0.0f32; PIECE]);
            for (input, &weight) in inputs.iter().zip(weights) {
                for (sum, delta) in sign.iter_mut().zip(&input[start..][..out.len()]) {
                    *sum += delta * weight;
                }
            }
            out.fill(0.0);
            for (input, &weight) in inputs.iter().zip(weights) {
                let deltas = input[start..].iter().zip(&sign);
                for ((sum, divisor), (delta, sign)) in out.iter_mut().zip(&mut divisor).zip(deltas) {
                    let weighted = delta * weight;
                    let agrees = ((weighted > 0.0) & (*sign >= 0.0)) | ((weighted < 0.0) & (*sign < 0.0));
                    *sum += if agrees { weighted } else { 0.0 };
                    *divisor += if agrees { weight } else { 0.0 };
                }
            }
            for (sum, divisor) in out.iter_mut().zip(&divisor) {
                let by = if normalize & (divisor.abs() >= 1e-8) { *divisor } else { 1.0 };
                *sum = *sum / by * scale;
            }
        }
    }
}
