//! The merge engine: a recipe in, a checkpoint in the base's own layout out.
//!
//! A [`Recipe`] becomes a [`Plan`], which says for every tensor of the output what it is made of; [`merge`] runs it. A
//! method is a kernel on blocks of float32: a file in `methods/` and an arm of [`Method`].

mod adapted;
mod adapters;
mod assignment;
mod chunk;
mod engine;
mod factors;
mod files;
mod floats;
mod grid;
mod group;
mod importance;
mod kernel;
mod keys;
mod low_rank;
mod manifest;
mod measure;
mod methods;
mod outline;
mod plan;
mod random;
mod recipe;
mod report;
mod select;
mod setting;
mod simd;
mod sources;
mod task;

pub use adapted::{Adapted, Scratch};
pub use adapters::{Delta, Patch};
pub use engine::{merge, Options};
pub use factors::Factors;
pub use keys::RecipeError;
pub use manifest::MANIFEST;
pub use methods::{Method, Spec};
pub use outline::{outline, Outline, TensorOutline};
pub use plan::{Action, Job, Plan};
pub use recipe::{ModelSource, Recipe, Rounding, WeightedModel};
pub use report::{BaseCheck, MergeReport, TensorReport};
