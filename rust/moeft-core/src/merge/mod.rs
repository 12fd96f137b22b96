//! The merge engine: a recipe in, a checkpoint in the base's own layout out.

mod engine;
mod factors;
pub mod lora;
mod plan;
mod recipe;
mod report;

pub use engine::merge;
pub use plan::{Delta, Patch, Plan};
pub use recipe::{Method, Recipe, RecipeError, Rounding, WeightedAdapter};
pub use report::{BaseCheck, MergeReport};
