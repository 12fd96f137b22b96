//! Instruction sets for Python.

use moeft_core::isa::{self, Isa};
use pyo3::prelude::*;

use crate::error::IntoPyResult;

/// Name of the instruction set in use.
#[pyfunction]
pub fn instruction_set() -> PyResult<&'static str> {
    Isa::active().map(Isa::name).into_py()
}

/// Whether this CPU multiplies bf16 directly.
#[pyfunction]
pub fn has_bf16_instructions() -> bool {
    isa::has_bf16_instructions()
}
