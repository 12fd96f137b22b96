//! The grouped linear for Python.

use moeft_core::gemm::{self, Side};
use moeft_core::parallel;
use pyo3::prelude::*;

use crate::arguments::thread_limit;
use crate::buffers::Buffers;
use crate::error::IntoPyResult;
use crate::floats::{FloatInput, FloatOutput};
use crate::stacks::{StackArgument, StackBuffers};

/// Multiply each expert's rows by its weight.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn grouped_linear(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    dtype: &str,
    offsets: &Bound<'_, PyAny>,
    stack: StackArgument<'_>,
    transpose: bool,
    out: &Bound<'_, PyAny>,
    threads: i64,
) -> PyResult<()> {
    let threads = thread_limit(threads)?;
    let mut buffers = Buffers::default();
    let x = FloatInput::take(&mut buffers, "x", x, dtype)?;
    let offsets = buffers.input::<i32>("offsets", offsets)?;
    let weights = StackBuffers::take(&mut buffers, &stack)?;
    let mut out = FloatOutput::take(&mut buffers, "out", out, dtype)?;
    let (x, offsets, out, stack) = (x.view(), offsets.slice(), out.view(), weights.view(&stack));
    let side = if transpose { Side::Rows } else { Side::Columns };
    py.detach(|| parallel::with_threads(threads, || gemm::grouped_linear(x, offsets, &stack, side, out))).into_py()
}
