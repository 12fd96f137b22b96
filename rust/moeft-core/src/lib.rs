//! NF4, routing, checkpoint streaming and merging for Mixture-of-Experts models.
//!
//! Pure Rust: no Python, no command line, no printing. The Python extension (`moeft-py`) and the
//! standalone binary (`moeft-merge`) are thin layers over this crate.

pub mod adapter;
mod cache;
pub mod checkpoint;
pub mod cross_entropy;
mod dynamic8;
mod elementary;
mod error;
pub mod experts;
pub mod families;
mod float;
pub mod gemm;
pub mod gguf;
pub mod isa;
pub mod layout;
pub mod merge;
pub mod names;
pub mod nf4;
pub mod optim;
pub mod parallel;
mod path_text;
pub mod progress;
pub mod quantize;
pub mod rms_norm;
pub mod routing;

pub use error::{Error, Result};
