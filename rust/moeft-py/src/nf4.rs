//! NF4 and FP4 for Python.

use std::num::NonZeroUsize;

use half::{bf16, f16};
use moeft_core::nf4::{self, Codebook, Layout, Scales};
use moeft_core::parallel::with_threads;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::arguments::{codebook_named, thread_limit};
use crate::buffers::{Buffers, WeightElement};
use crate::error::IntoPyResult;

/// Calls a function generic over the weight type that `dtype` names.
macro_rules! with_dtype {
    ($dtype:expr, $function:ident($($argument:expr),*)) => {
        match $dtype {
            "float32" => $function::<f32>($($argument),*),
            "bfloat16" => $function::<bf16>($($argument),*),
            "float16" => $function::<f16>($($argument),*),
            other => Err(PyValueError::new_err(format!(
                "dtype is {other:?}, expected \"float32\", \"bfloat16\" or \"float16\""
            ))),
        }
    };
}

/// Quantise `values` into `packed` and `absmax`.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn nf4_quantize(
    py: Python<'_>,
    values: &Bound<'_, PyAny>,
    dtype: &str,
    groups: i64,
    group_len: i64,
    block_size: i64,
    codebook: &str,
    packed: &Bound<'_, PyAny>,
    absmax: &Bound<'_, PyAny>,
    threads: i64,
) -> PyResult<()> {
    let layout = layout(groups, group_len, block_size)?;
    let (codebook, threads) = (codebook_named(codebook)?, thread_limit(threads)?);
    with_dtype!(dtype, quantize(py, values, codebook, layout, packed, absmax, threads))
}

fn quantize<T: WeightElement>(
    py: Python<'_>,
    values: &Bound<'_, PyAny>,
    codebook: Codebook,
    layout: Layout,
    packed: &Bound<'_, PyAny>,
    absmax: &Bound<'_, PyAny>,
    threads: NonZeroUsize,
) -> PyResult<()> {
    let mut buffers = Buffers::default();
    let values = buffers.input::<T::Carrier>("values", values)?;
    let mut packed = buffers.output::<u8>("packed", packed)?;
    let mut absmax = buffers.output::<f32>("absmax", absmax)?;
    let (values, packed, absmax) = (T::view(values.slice()), packed.slice_mut(), absmax.slice_mut());
    py.detach(|| with_threads(threads, || nf4::quantize(values, codebook, layout, packed, absmax))).into_py()
}

/// Restore values from `packed` and `absmax` into `out`. With `absmax2`, `absmax` is nested.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn nf4_dequantize(
    py: Python<'_>,
    packed: &Bound<'_, PyAny>,
    absmax: &Bound<'_, PyAny>,
    absmax2: Option<&Bound<'_, PyAny>>,
    offset: f32,
    groups: i64,
    group_len: i64,
    block_size: i64,
    codebook: &str,
    out: &Bound<'_, PyAny>,
    dtype: &str,
    threads: i64,
) -> PyResult<()> {
    let layout = layout(groups, group_len, block_size)?;
    let (codebook, threads) = (codebook_named(codebook)?, thread_limit(threads)?);
    with_dtype!(dtype, dequantize(py, packed, absmax, absmax2, offset, codebook, layout, out, threads))
}

#[allow(clippy::too_many_arguments)]
fn dequantize<T: WeightElement>(
    py: Python<'_>,
    packed: &Bound<'_, PyAny>,
    absmax: &Bound<'_, PyAny>,
    absmax2: Option<&Bound<'_, PyAny>>,
    offset: f32,
    codebook: Codebook,
    layout: Layout,
    out: &Bound<'_, PyAny>,
    threads: NonZeroUsize,
) -> PyResult<()> {
    let mut buffers = Buffers::default();
    let packed = buffers.input::<u8>("packed", packed)?;
    let (plain, nested);
    let scales = if let Some(absmax2) = absmax2 {
        nested = (buffers.input::<u8>("absmax", absmax)?, buffers.input::<f32>("absmax2", absmax2)?);
        Scales::Nested { codes: nested.0.slice(), absmax2: nested.1.slice(), offset, first: 0 }
    } else {
        plain = buffers.input::<f32>("absmax", absmax)?;
        Scales::Plain(plain.slice())
    };
    let mut out = buffers.output::<T::Carrier>("out", out)?;
    let (packed, out) = (packed.slice(), T::view_mut(out.slice_mut()));
    py.detach(|| with_threads(threads, || nf4::dequantize(packed, scales, codebook, layout, out))).into_py()
}

/// The layout of these sizes; negative ones are refused here, the others where the layout is used.
fn layout(groups: i64, group_len: i64, block_size: i64) -> PyResult<Layout> {
    let size = |name: &str, value: i64| {
        usize::try_from(value).map_err(|_| PyValueError::new_err(format!("{name} is {value}, expected 0 or more")))
    };
    Ok(Layout {
        groups: size("groups", groups)?,
        group_len: size("group_len", group_len)?,
        block_size: size("block_size", block_size)?,
    })
}

/// Position of the first infinite or NaN value, or None.
#[pyfunction]
pub fn nf4_first_non_finite(py: Python<'_>, values: &Bound<'_, PyAny>, dtype: &str) -> PyResult<Option<usize>> {
    with_dtype!(dtype, first_non_finite(py, values))
}

fn first_non_finite<T: WeightElement>(py: Python<'_>, values: &Bound<'_, PyAny>) -> PyResult<Option<usize>> {
    let values = Buffers::default().input::<T::Carrier>("values", values)?;
    let values = T::view(values.slice());
    Ok(py.detach(|| nf4::first_non_finite(values)))
}

/// Store `absmax` in 8 bits; return the offset used.
#[pyfunction]
#[pyo3(signature = (absmax, codes, absmax2, offset=None))]
pub fn nf4_nest(
    py: Python<'_>,
    absmax: &Bound<'_, PyAny>,
    codes: &Bound<'_, PyAny>,
    absmax2: &Bound<'_, PyAny>,
    offset: Option<f32>,
) -> PyResult<f32> {
    let mut buffers = Buffers::default();
    let absmax = buffers.input::<f32>("absmax", absmax)?;
    let mut codes = buffers.output::<u8>("codes", codes)?;
    let mut absmax2 = buffers.output::<f32>("absmax2", absmax2)?;
    let (absmax, codes, absmax2) = (absmax.slice(), codes.slice_mut(), absmax2.slice_mut());
    py.detach(|| nf4::nest(absmax, offset, codes, absmax2)).into_py()
}

/// Restore absmax from its 8-bit form into `out`.
#[pyfunction]
pub fn nf4_unnest(
    py: Python<'_>,
    codes: &Bound<'_, PyAny>,
    absmax2: &Bound<'_, PyAny>,
    offset: f32,
    out: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let mut buffers = Buffers::default();
    let codes = buffers.input::<u8>("codes", codes)?;
    let absmax2 = buffers.input::<f32>("absmax2", absmax2)?;
    let mut out = buffers.output::<f32>("out", out)?;
    let (codes, absmax2, out) = (codes.slice(), absmax2.slice(), out.slice_mut());
    py.detach(|| nf4::unnest(codes, absmax2, offset, out)).into_py()
}
