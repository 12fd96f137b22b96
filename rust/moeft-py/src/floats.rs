//! Buffers of float32, bfloat16 or float16, by the name of the type.

use half::{bf16, f16};
use moeft_core::gemm::{Floats, FloatsMut};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::buffers::{Buffers, Input, Output, WeightElement};

/// Values to read, of the type that `dtype` names.
pub enum FloatInput {
    /// float32
    F32(Input<f32>),
    /// bfloat16
    Bf16(Input<u16>),
    /// float16
    F16(Input<u16>),
}

impl FloatInput {
    /// Takes the buffer; see [`Buffers`].
    pub fn take(buffers: &mut Buffers, name: &'static str, object: &Bound<'_, PyAny>, dtype: &str) -> PyResult<Self> {
        match dtype {
            "float32" => buffers.input(name, object).map(Self::F32),
            "bfloat16" => buffers.input(name, object).map(Self::Bf16),
            "float16" => buffers.input(name, object).map(Self::F16),
            other => Err(unknown_dtype(other)),
        }
    }

    /// The values.
    pub fn view(&self) -> Floats<'_> {
        match self {
            Self::F32(values) => Floats::F32(values.slice()),
            Self::Bf16(values) => Floats::Bf16(bf16::view(values.slice())),
            Self::F16(values) => Floats::F16(f16::view(values.slice())),
        }
    }
}

/// Values to write, of the type that `dtype` names.
pub enum FloatOutput {
    /// float32
    F32(Output<f32>),
    /// bfloat16
    Bf16(Output<u16>),
    /// float16
    F16(Output<u16>),
}

impl FloatOutput {
    /// Takes the buffer; see [`Buffers`].
    pub fn take(buffers: &mut Buffers, name: &'static str, object: &Bound<'_, PyAny>, dtype: &str) -> PyResult<Self> {
        match dtype {
            "float32" => buffers.output(name, object).map(Self::F32),
            "bfloat16" => buffers.output(name, object).map(Self::Bf16),
            "float16" => buffers.output(name, object).map(Self::F16),
            other => Err(unknown_dtype(other)),
        }
    }

    /// The values.
    pub fn view(&mut self) -> FloatsMut<'_> {
        match self {
            Self::F32(values) => FloatsMut::F32(values.slice_mut()),
            Self::Bf16(values) => FloatsMut::Bf16(bf16::view_mut(values.slice_mut())),
            Self::F16(values) => FloatsMut::F16(f16::view_mut(values.slice_mut())),
        }
    }
}

fn unknown_dtype(found: &str) -> PyErr {
    PyValueError::new_err(format!("dtype is {found:?}, expected \"float32\", \"bfloat16\" or \"float16\""))
}
