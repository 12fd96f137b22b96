//! The merge methods, one file each: formula, source, parameters and arithmetic.

mod breadcrumbs;
mod by_magnitude;
mod dare;
mod della;
mod fisher_damped;
mod linear;
mod lora;
mod model_stock;
mod nuslerp;
mod passthrough;
mod slerp;
mod task_arithmetic;
mod task_vectors;
mod ties;

use serde::{Serialize, Serializer};

pub(super) use task_vectors::add_base;

use super::kernel::{Kernel, Settings};
use super::keys::{one_of, RecipeError};

/// Any number that a recipe may hold.
const ANY: std::ops::RangeInclusive<f64> = f64::NEG_INFINITY..=f64::INFINITY;

/// How weights are combined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // Each has a file of its name.
pub enum Method {
    Lora,
    Linear,
    Slerp,
    Nuslerp,
    TaskArithmetic,
    Ties,
    DareLinear,
    DareTies,
    Della,
    DellaLinear,
    Breadcrumbs,
    BreadcrumbsTies,
    ModelStock,
    FisherDamped,
    Passthrough,
}

/// What a kernel gets from each model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inputs {
    /// Its weights; those of the base and the adapter's delta together, for an adapter.
    Weights,
    /// Its weights less those of the base; the adapter's delta, for an adapter.
    Deltas,
    /// Deltas if the recipe has a base, else weights.
    DeltasFromBase,
}

/// What `base_model` is to a method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BaseModel {
    /// It must be there.
    Required,
    /// The first model, if there is none.
    First,
    /// It only gives names and layout, and adapters their base; the first model does, if there is none.
    Layout,
}

/// What is to be known about a method before any tensor.
#[derive(Debug)]
pub struct Spec {
    /// Name in a recipe.
    pub name: &'static str,
    /// One line for `--help`.
    pub summary: &'static str,
    /// What the kernel gets.
    pub inputs: Inputs,
    /// What the base is for.
    pub base: BaseModel,
    /// Least and largest number of models beside the base.
    pub models: [usize; 2],
    /// Whether only adapters may be merged.
    pub adapters_only: bool,
    /// Whether the recipe may name Fisher information and the importance of layers.
    pub importance: bool,
    /// Parameters of the method.
    pub common: &'static [&'static str],
    /// Parameters of each model.
    pub per_model: &'static [&'static str],
    /// The arithmetic for one tensor.
    pub kernel: fn(&Settings<'_>) -> Result<Box<dyn Kernel>, RecipeError>,
}

impl Spec {
    /// All parameters that may stand at the top of a recipe.
    pub(super) fn parameters(&self) -> Vec<&'static str> {
        self.common.iter().chain(self.per_model).copied().collect()
    }
}

impl Method {
    /// All methods.
    pub const ALL: [Self; 15] = [
        Self::Lora,
        Self::Linear,
        Self::Slerp,
        Self::Nuslerp,
        Self::TaskArithmetic,
        Self::Ties,
        Self::DareLinear,
        Self::DareTies,
        Self::Della,
        Self::DellaLinear,
        Self::Breadcrumbs,
        Self::BreadcrumbsTies,
        Self::ModelStock,
        Self::FisherDamped,
        Self::Passthrough,
    ];

    /// What is to be known about it.
    pub fn spec(self) -> &'static Spec {
        match self {
            Self::Lora => &lora::SPEC,
            Self::Linear => &linear::SPEC,
            Self::Slerp => &slerp::SPEC,
            Self::Nuslerp => &nuslerp::SPEC,
            Self::TaskArithmetic => &task_arithmetic::SPEC,
            Self::Ties => &ties::SPEC,
            Self::DareLinear => &dare::LINEAR,
            Self::DareTies => &dare::TIES,
            Self::Della => &della::TIES,
            Self::DellaLinear => &della::LINEAR,
            Self::Breadcrumbs => &breadcrumbs::LINEAR,
            Self::BreadcrumbsTies => &breadcrumbs::TIES,
            Self::ModelStock => &model_stock::SPEC,
            Self::FisherDamped => &fisher_damped::SPEC,
            Self::Passthrough => &passthrough::SPEC,
        }
    }

    /// The method of a name.
    pub(super) fn parse(name: &str) -> Result<Self, RecipeError> {
        one_of("merge_method", name, &Self::ALL.map(|method| (method.spec().name, method)))
    }
}

impl Serialize for Method {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.spec().name)
    }
}

/// What is left of weights that cancel out but for rounding, as a part of their magnitudes: 0.1 + 0.2 - 0.3 is 5.6e-17.
const CANCELLED: f64 = 1e-12;

/// Refuses weights whose sum is zero, where they are divided by it.
///
/// # Arguments
/// * `otherwise`: what else would help, for the message.
fn divisor(settings: &Settings<'_>, otherwise: &str) -> Result<f64, RecipeError> {
    let sum = settings.total_weight;
    if sum.abs() <= CANCELLED * settings.total_magnitude {
        let key = format!("the sum of the weights of {}", settings.name);
        let expected = format!("a number other than zero, as the weights are divided by it{otherwise}");
        let value = if sum == 0.0 { "0" } else { "0 but for rounding" };
        return Err(RecipeError::value(key, value, expected));
    }
    Ok(sum)
}

/// For methods that need not divide.
const NOT_NORMALIZED: &str = "; or set normalize: false";
