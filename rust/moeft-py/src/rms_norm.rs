//! Root-mean-square normalisation for Python.

use moeft_core::{parallel, rms_norm};
use pyo3::prelude::*;

use crate::arguments::thread_limit;
use crate::buffers::Buffers;
use crate::error::IntoPyResult;

/// Normalise rows.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn rms_norm_forward(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    weight: Option<&Bound<'_, PyAny>>,
    eps: f32,
    out: &Bound<'_, PyAny>,
    rstd: &Bound<'_, PyAny>,
    hidden: usize,
    threads: i64,
) -> PyResult<()> {
    let threads = thread_limit(threads)?;
    let mut buffers = Buffers::default();
    let x = buffers.input::<f32>("x", x)?;
    let weight = weight.map(|weight| buffers.input::<f32>("weight", weight)).transpose()?;
    let mut out = buffers.output::<f32>("out", out)?;
    let mut rstd = buffers.output::<f32>("rstd", rstd)?;
    let (x, weight) = (x.slice(), weight.as_ref().map(|weight| weight.slice()));
    let (out, rstd) = (out.slice_mut(), rstd.slice_mut());
    py.detach(|| parallel::with_threads(threads, || rms_norm::forward(x, weight, hidden, eps, out, rstd))).into_py()
}

/// Gradient of the rows.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn rms_norm_backward(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    weight: Option<&Bound<'_, PyAny>>,
    rstd: &Bound<'_, PyAny>,
    grad: &Bound<'_, PyAny>,
    grad_x: &Bound<'_, PyAny>,
    hidden: usize,
    threads: i64,
) -> PyResult<()> {
    let threads = thread_limit(threads)?;
    let mut buffers = Buffers::default();
    let x = buffers.input::<f32>("x", x)?;
    let weight = weight.map(|weight| buffers.input::<f32>("weight", weight)).transpose()?;
    let rstd = buffers.input::<f32>("rstd", rstd)?;
    let grad = buffers.input::<f32>("grad", grad)?;
    let mut grad_x = buffers.output::<f32>("grad_x", grad_x)?;
    let (x, weight) = (x.slice(), weight.as_ref().map(|weight| weight.slice()));
    let (rstd, grad, grad_x) = (rstd.slice(), grad.slice(), grad_x.slice_mut());
    py.detach(|| parallel::with_threads(threads, || rms_norm::backward(x, weight, hidden, rstd, grad, grad_x)))
        .into_py()
}
