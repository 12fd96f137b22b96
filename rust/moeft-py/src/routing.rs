//! Expert routing for Python.

use moeft_core::routing::{self, ExpertIndex};
use pyo3::buffer::{Element, PyUntypedBuffer};
use pyo3::prelude::*;

use crate::buffers::Buffers;
use crate::error::IntoPyResult;

/// Sort rows by expert, stably.
#[pyfunction]
pub fn bucket(
    py: Python<'_>,
    expert_index: &Bound<'_, PyAny>,
    num_experts: usize,
    permutation: &Bound<'_, PyAny>,
    inverse: &Bound<'_, PyAny>,
    offsets: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let is_int32 = PyUntypedBuffer::get(expert_index)?.as_typed::<i32>().is_ok();
    let bucket = if is_int32 { bucket_as::<i32> } else { bucket_as::<i64> };
    bucket(py, expert_index, num_experts, permutation, inverse, offsets)
}

fn bucket_as<I: ExpertIndex + Element + Sync>(
    py: Python<'_>,
    expert_index: &Bound<'_, PyAny>,
    num_experts: usize,
    permutation: &Bound<'_, PyAny>,
    inverse: &Bound<'_, PyAny>,
    offsets: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let mut buffers = Buffers::default();
    let expert_index = buffers.input::<I>("expert_index", expert_index)?;
    let mut permutation = buffers.output::<i64>("permutation", permutation)?;
    let mut inverse = buffers.output::<i64>("inverse", inverse)?;
    let mut offsets = buffers.output::<i32>("offsets", offsets)?;
    let expert_index = expert_index.slice();
    let (permutation, inverse, offsets) = (permutation.slice_mut(), inverse.slice_mut(), offsets.slice_mut());
    py.detach(|| routing::bucket(expert_index, num_experts, permutation, inverse, offsets)).into_py()
}
