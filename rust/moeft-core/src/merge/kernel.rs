//! What a merge method is to the engine: arithmetic on blocks of one tensor.

use std::ops::RangeInclusive;

use super::keys::RecipeError;
use super::recipe::Parameters;
use super::setting::Scalar;
use crate::checkpoint::Dtype;

/// Values of one tensor at the same places: base, and what each model has there.
#[derive(Debug, Default)]
pub struct Block {
    /// First element, counted from the start of the tensor.
    pub start: u64,
    /// Weights of the base.
    pub base: Vec<f32>,
    /// Largest magnitude in it.
    pub largest: f32,
    /// Per model that has the tensor, in the order of the recipe: weights or deltas, as the method asks.
    pub inputs: Vec<Vec<f32>>,
    /// Fisher information, where the recipe names some.
    pub fisher: Vec<f32>,
}

/// What a pass over a tensor must read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reads {
    /// Base and models.
    Models,
    /// Fisher information alone.
    Fisher,
}

/// What a pass gathers. Chunks are put together in order, so the bits do not depend on the number of threads.
#[derive(Debug, Clone)]
pub struct Gathered {
    /// Added up.
    pub sums: Vec<f64>,
    /// Added up.
    pub counts: Vec<u64>,
    /// Joined from the first block to the last.
    pub series: Vec<u32>,
    /// Smallest and largest value met.
    pub range: [f32; 2],
}

impl Default for Gathered {
    fn default() -> Self {
        Self { sums: Vec::new(), counts: Vec::new(), series: Vec::new(), range: [f32::INFINITY, f32::NEG_INFINITY] }
    }
}

impl Gathered {
    /// Empties it and keeps its memory.
    pub fn clear(&mut self) {
        self.sums.clear();
        self.counts.clear();
        self.series.clear();
        self.range = Self::default().range;
    }

    /// The sums, `len` of them, zero at first.
    pub fn sums(&mut self, len: usize) -> &mut [f64] {
        self.sums.resize(len, 0.0);
        &mut self.sums
    }

    /// The counts, `len` of them, zero at first.
    pub fn counts(&mut self, len: usize) -> &mut [u64] {
        self.counts.resize(len, 0);
        &mut self.counts
    }

    /// Adds what the next chunk gathered.
    pub fn add(&mut self, next: &Self) {
        let (sums, counts) = (self.sums.len().max(next.sums.len()), self.counts.len().max(next.counts.len()));
        self.sums(sums).iter_mut().zip(&next.sums).for_each(|(sum, value)| *sum += value);
        self.counts(counts).iter_mut().zip(&next.counts).for_each(|(count, value)| *count += value);
        self.series.extend(&next.series);
        self.range = [self.range[0].min(next.range[0]), self.range[1].max(next.range[1])];
    }
}

/// A method at work on one tensor.
///
/// First as many passes as [`Kernel::pass`] asks for, each of [`Kernel::gather`] over all blocks and then
/// [`Kernel::learn`]; then [`Kernel::combine`] for every block. Blocks come in any order, on any thread.
pub trait Kernel: Send + Sync {
    /// What the next pass must read; `None` if everything is known.
    fn pass(&self) -> Option<Reads> {
        None
    }

    /// Looks at a block. Blocks of one chunk come in order, into the same `into`.
    fn gather(&self, _block: &Block, _into: &mut Gathered) {}

    /// Takes in what a pass has gathered.
    fn learn(&mut self, _all: Gathered) {}

    /// Computes merged weights. The inputs may be overwritten.
    fn combine(&self, block: &mut Block, out: &mut [f32]);

    /// Whether [`Kernel::branch`] depends on what [`Kernel::combine`] met, so that a tensor cannot be continued.
    fn counts_while_combining(&self) -> bool {
        false
    }

    /// What was done where the values decide it, for the report.
    fn branch(&self) -> Option<String> {
        None
    }
}

/// What is known about a tensor before its values: the parameters of the recipe that hold for it.
#[derive(Debug)]
pub struct Settings<'a> {
    /// Name on disk.
    pub name: &'a str,
    /// Elements of a block: all blocks but the last have as many.
    pub block: u64,
    /// Experts of a stack; 1 for any other tensor.
    pub experts: u64,
    /// Sizes.
    pub shape: &'a [u64],
    /// Type of the base.
    pub dtype: Dtype,
    /// 0 in the first layer, 1 in the last.
    pub depth: f64,
    /// Seed of the recipe.
    pub seed: u64,
    /// Parameters of the recipe.
    pub common: &'a Parameters,
    /// Parameters of each model that has the tensor.
    pub models: Vec<&'a Parameters>,
    /// Index in the recipe of each model that has the tensor.
    pub entries: Vec<usize>,
    /// Sum of the weights of all models, those included that leave this tensor alone.
    pub total_weight: f64,
    /// Sum of their magnitudes.
    pub total_magnitude: f64,
    /// Type that a delta is rounded to before it is added, if it is.
    pub delta_dtype: Option<Dtype>,
    /// Importance of the layer, 0 to 1.
    pub layer_importance: f64,
    /// Smallest and largest Fisher information, where they are known.
    pub fisher_range: Option<[f32; 2]>,
    /// Whether inputs are deltas.
    pub of_deltas: bool,
    /// Whether there is Fisher information for this tensor.
    pub has_fisher: bool,
}

impl<'a> Settings<'a> {
    /// Elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }

    /// Elements of a row: those along the last axis.
    pub fn cols(&self) -> u64 {
        self.shape.last().copied().unwrap_or(1).max(1)
    }

    /// A number of the method, or `default`; without one it must be there.
    pub fn number(&self, key: &str, default: Option<f64>, range: RangeInclusive<f64>) -> Result<f64, RecipeError> {
        self.number_in(self.common, key, default, range)
    }

    /// A number of each model that has the tensor.
    pub fn numbers(
        &self,
        key: &str,
        default: Option<f64>,
        range: RangeInclusive<f64>,
    ) -> Result<Vec<f64>, RecipeError> {
        self.models.iter().map(|own| self.number_of(own, key, default, range.clone())).collect()
    }

    /// A number of one model: its own, or that of the recipe.
    pub fn number_of(
        &self,
        own: &Parameters,
        key: &str,
        default: Option<f64>,
        range: RangeInclusive<f64>,
    ) -> Result<f64, RecipeError> {
        let place = if own.contains_key(key) { own } else { self.common };
        self.number_in(place, key, default, range)
    }

    fn number_in(
        &self,
        place: &Parameters,
        key: &str,
        default: Option<f64>,
        range: RangeInclusive<f64>,
    ) -> Result<f64, RecipeError> {
        let found = place.get(key).and_then(|setting| setting.at(self.name, self.depth));
        let at = || format!("{key} of {}", self.name);
        match (found, default) {
            (Some(Scalar::Number(number)), _) if range.contains(&number) => Ok(number),
            (Some(other), _) => {
                let bounds = match range.end().is_finite() {
                    true => format!(" from {} to {}", range.start(), range.end()),
                    false => String::new(),
                };
                Err(RecipeError::value(at(), other, format!("a number{bounds}")))
            }
            (None, Some(default)) => Ok(default),
            (None, None) => {
                Err(RecipeError::value(at(), "missing", "a number for every tensor; add an entry without filter"))
            }
        }
    }

    /// `true` or `false` of the method.
    pub fn flag(&self, key: &str, default: bool) -> Result<bool, RecipeError> {
        match self.common.get(key).and_then(|setting| setting.at(self.name, self.depth)) {
            None => Ok(default),
            Some(Scalar::Flag(flag)) => Ok(flag),
            Some(other) => Err(RecipeError::value(format!("{key} of {}", self.name), other, "true or false")),
        }
    }

    /// A word of the method.
    pub fn word<T: Copy>(&self, key: &str, default: T, known: &[(&str, T)]) -> Result<T, RecipeError> {
        match self.common.get(key).and_then(|setting| setting.at(self.name, self.depth)) {
            None => Ok(default),
            Some(Scalar::Word(word)) => super::keys::one_of(&format!("{key} of {}", self.name), word, known),
            Some(other) => {
                let names = known.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(" or ");
                Err(RecipeError::value(format!("{key} of {}", self.name), other, names))
            }
        }
    }
}

impl std::fmt::Display for Scalar<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Number(number) => write!(formatter, "{number}"),
            Self::Flag(flag) => write!(formatter, "{flag}"),
            Self::Word(word) => write!(formatter, "{word:?}"),
        }
    }
}
