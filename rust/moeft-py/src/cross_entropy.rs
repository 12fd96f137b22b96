//! Log-probabilities of labels for Python.

use moeft_core::{cross_entropy, parallel};
use pyo3::prelude::*;

use crate::arguments::thread_limit;
use crate::buffers::Buffers;
use crate::error::IntoPyResult;

/// Log-probability of each row's label; logits become its gradient.
#[pyfunction]
pub fn log_probs_and_gradient(
    py: Python<'_>,
    logits: &Bound<'_, PyAny>,
    targets: &Bound<'_, PyAny>,
    softcap: Option<f32>,
    log_probs: &Bound<'_, PyAny>,
    threads: i64,
) -> PyResult<()> {
    let threads = thread_limit(threads)?;
    let mut buffers = Buffers::default();
    let mut logits = buffers.output::<f32>("logits", logits)?;
    let targets = buffers.input::<i64>("targets", targets)?;
    let mut log_probs = buffers.output::<f32>("log_probs", log_probs)?;
    let (logits, targets, log_probs) = (logits.slice_mut(), targets.slice(), log_probs.slice_mut());
    let work = || cross_entropy::log_probs_and_gradient(logits, targets, softcap, log_probs);
    py.detach(|| parallel::with_threads(threads, work)).into_py()
}
