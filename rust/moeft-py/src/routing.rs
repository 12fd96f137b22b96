//! Expert routing for Python.

use moeft_core::routing::{self, ExpertIndex, LoadStatistics};
use pyo3::buffer::{Element, PyUntypedBuffer};
use pyo3::prelude::*;

use crate::buffers::Buffers;
use crate::error::IntoPyResult;

/// Below this many rows, tens of microseconds, the GIL is kept: taking it back can cost more than the work.
const SMALL: usize = 1 << 14;

/// Sort rows by expert, stably.
#[pyfunction]
pub fn bucket(
    py: Python<'_>,
    top_k_index: &Bound<'_, PyAny>,
    num_experts: usize,
    permutation: &Bound<'_, PyAny>,
    inverse: &Bound<'_, PyAny>,
    offsets: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let is_int32 = PyUntypedBuffer::get(top_k_index)?.as_typed::<i32>().is_ok();
    let bucket = if is_int32 { bucket_as::<i32> } else { bucket_as::<i64> };
    bucket(py, top_k_index, num_experts, permutation, inverse, offsets)
}

fn bucket_as<I: ExpertIndex + Element + Sync>(
    py: Python<'_>,
    top_k_index: &Bound<'_, PyAny>,
    num_experts: usize,
    permutation: &Bound<'_, PyAny>,
    inverse: &Bound<'_, PyAny>,
    offsets: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let mut buffers = Buffers::default();
    let top_k_index = buffers.input::<I>("top_k_index", top_k_index)?;
    let mut permutation = buffers.output::<i64>("permutation", permutation)?;
    let mut inverse = buffers.output::<i64>("inverse", inverse)?;
    let mut offsets = buffers.output::<i32>("offsets", offsets)?;
    let top_k_index = top_k_index.slice();
    let (permutation, inverse, offsets) = (permutation.slice_mut(), inverse.slice_mut(), offsets.slice_mut());
    let is_small = top_k_index.len() < SMALL;
    let mut sort = || routing::bucket(top_k_index, num_experts, permutation, inverse, offsets);
    if is_small { sort() } else { py.detach(sort) }.into_py()
}

/// Entropy in nats, the same over ln E, and coefficient of variation of the experts' loads.
#[pyfunction]
pub fn load_statistics(offsets: &Bound<'_, PyAny>) -> PyResult<(f64, f64, f64)> {
    let offsets = Buffers::default().input::<i32>("offsets", offsets)?;
    let load = LoadStatistics::from_offsets(offsets.slice()).into_py()?;
    Ok((load.entropy_nats, load.normalized_entropy, load.coefficient_of_variation))
}
