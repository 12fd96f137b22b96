//! NF4, routing, checkpoint streaming and merging for Mixture-of-Experts models.
//!
//! Pure Rust: no Python, no command line, no printing. The Python extension (`moeft-py`) and the
//! standalone binary (`moeft-merge`) are thin layers over this crate.

mod error;
pub mod nf4;
pub mod routing;

pub use error::{Error, Result};
