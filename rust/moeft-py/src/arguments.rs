//! Small arguments from Python, checked.

use std::num::NonZeroUsize;

use moeft_core::nf4::Codebook;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// The codebook of that name.
pub fn codebook_named(name: &str) -> PyResult<Codebook> {
    Codebook::ALL
        .into_iter()
        .find(|codebook| codebook.name() == name)
        .ok_or_else(|| PyValueError::new_err(format!("codebook is {name:?}, expected \"nf4\" or \"fp4\"")))
}

/// The limit of threads that Python gives.
pub fn thread_limit(threads: i64) -> PyResult<NonZeroUsize> {
    let limit = usize::try_from(threads).ok().and_then(NonZeroUsize::new);
    limit.ok_or_else(|| PyValueError::new_err(format!("threads is {threads}, expected 1 or more")))
}
