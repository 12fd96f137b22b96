//! Optimisers for Python.

use std::num::NonZeroUsize;

use half::slice::HalfBitsSliceExt;
use moeft_core::optim::{self, Code, Gradients, Hyperparameters, Moments, Parameters, Quantized};
use moeft_core::parallel;
use pyo3::buffer::{Element, PyUntypedBuffer};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::buffers::{Buffers, Input, Output};
use crate::error::IntoPyResult;

/// A buffer of f32, or of bf16 as its bits.
enum Either<F, B> {
    F32(F),
    Bf16(B),
}

/// Make one step of AdamW.
#[pyfunction]
#[pyo3(signature = (
    param, grad, exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax, rounded,
    lr, beta1, beta2, eps, weight_decay, step, threads,
))]
#[allow(clippy::too_many_arguments)]
pub fn adamw_step(
    py: Python<'_>,
    param: &Bound<'_, PyAny>,
    grad: &Bound<'_, PyAny>,
    exp_avg: &Bound<'_, PyAny>,
    exp_avg_sq: &Bound<'_, PyAny>,
    exp_avg_absmax: Option<&Bound<'_, PyAny>>,
    exp_avg_sq_absmax: Option<&Bound<'_, PyAny>>,
    rounded: Option<&Bound<'_, PyAny>>,
    lr: f64,
    beta1: f64,
    beta2: f64,
    eps: f64,
    weight_decay: f64,
    step: u64,
    threads: NonZeroUsize,
) -> PyResult<()> {
    let mut buffers = Buffers::default();
    let mut param = float_output(&mut buffers, "param", param)?;
    let mut rounded = rounded.map(|rounded| buffers.output::<u16>("rounded", rounded)).transpose()?;
    let grad = float_input(&mut buffers, "grad", grad)?;
    let hyperparameters = Hyperparameters { lr, beta1, beta2, eps, weight_decay };

    let parameters = match (&mut param, &mut rounded) {
        (Either::F32(weights), None) => Parameters::F32(weights.slice_mut()),
        (Either::Bf16(weights), None) => Parameters::Bf16(weights.slice_mut().reinterpret_cast_mut()),
        (Either::F32(master), Some(rounded)) => {
            Parameters::Master { master: master.slice_mut(), rounded: rounded.slice_mut().reinterpret_cast_mut() }
        }
        (Either::Bf16(_), Some(_)) => {
            return Err(PyValueError::new_err("rounded is given, expected None beside a bfloat16 param"));
        }
    };
    let gradients = match &grad {
        Either::F32(gradients) => Gradients::F32(gradients.slice()),
        Either::Bf16(gradients) => Gradients::Bf16(gradients.slice().reinterpret_cast()),
    };
    let make_step = |moments: Moments<'_>| {
        py.detach(|| {
            parallel::with_threads(threads, || optim::adamw_step(parameters, gradients, moments, hyperparameters, step))
        })
        .into_py()
    };
    match (exp_avg_absmax, exp_avg_sq_absmax) {
        (None, None) => {
            let mut first = buffers.output::<f32>("exp_avg", exp_avg)?;
            let mut second = buffers.output::<f32>("exp_avg_sq", exp_avg_sq)?;
            make_step(Moments::F32 { exp_avg: first.slice_mut(), exp_avg_sq: second.slice_mut() })
        }
        (Some(first_absmax), Some(second_absmax)) => {
            let mut first = buffers.output::<u8>("exp_avg", exp_avg)?;
            let mut second = buffers.output::<u8>("exp_avg_sq", exp_avg_sq)?;
            let mut first_absmax = buffers.output::<f32>("exp_avg_absmax", first_absmax)?;
            let mut second_absmax = buffers.output::<f32>("exp_avg_sq_absmax", second_absmax)?;
            make_step(Moments::Bits8 {
                exp_avg: Quantized { codes: first.slice_mut(), absmax: first_absmax.slice_mut() },
                exp_avg_sq: Quantized { codes: second.slice_mut(), absmax: second_absmax.slice_mut() },
            })
        }
        _ => Err(PyValueError::new_err(
            "one of exp_avg_absmax and exp_avg_sq_absmax is None, expected both for 8-bit moments or none",
        )),
    }
}

/// Store values in 8 bits.
#[pyfunction]
pub fn blockwise_quantize(
    py: Python<'_>,
    values: &Bound<'_, PyAny>,
    signed: bool,
    codes: &Bound<'_, PyAny>,
    absmax: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let mut buffers = Buffers::default();
    let values = buffers.input::<f32>("values", values)?;
    let mut codes = buffers.output::<u8>("codes", codes)?;
    let mut absmax = buffers.output::<f32>("absmax", absmax)?;
    let (values, codes, absmax) = (values.slice(), codes.slice_mut(), absmax.slice_mut());
    py.detach(|| code(signed).quantize(values, codes, absmax)).into_py()
}

/// Restore values from 8 bits.
#[pyfunction]
pub fn blockwise_dequantize(
    py: Python<'_>,
    codes: &Bound<'_, PyAny>,
    absmax: &Bound<'_, PyAny>,
    signed: bool,
    out: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let mut buffers = Buffers::default();
    let codes = buffers.input::<u8>("codes", codes)?;
    let absmax = buffers.input::<f32>("absmax", absmax)?;
    let mut out = buffers.output::<f32>("out", out)?;
    let (codes, absmax, out) = (codes.slice(), absmax.slice(), out.slice_mut());
    py.detach(|| code(signed).dequantize(codes, absmax, out)).into_py()
}

fn code(signed: bool) -> &'static Code {
    if signed {
        Code::signed()
    } else {
        Code::unsigned()
    }
}

fn float_input(
    buffers: &mut Buffers,
    name: &'static str,
    object: &Bound<'_, PyAny>,
) -> PyResult<Either<Input<f32>, Input<u16>>> {
    Ok(if holds::<u16>(object)? {
        Either::Bf16(buffers.input(name, object)?)
    } else {
        Either::F32(buffers.input(name, object)?)
    })
}

fn float_output(
    buffers: &mut Buffers,
    name: &'static str,
    object: &Bound<'_, PyAny>,
) -> PyResult<Either<Output<f32>, Output<u16>>> {
    Ok(if holds::<u16>(object)? {
        Either::Bf16(buffers.output(name, object)?)
    } else {
        Either::F32(buffers.output(name, object)?)
    })
}

fn holds<T: Element>(object: &Bound<'_, PyAny>) -> PyResult<bool> {
    Ok(PyUntypedBuffer::get(object)?.as_typed::<T>().is_ok())
}
