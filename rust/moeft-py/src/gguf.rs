//! GGUF for Python.

use std::path::PathBuf;

use moeft_core::gguf::export::{self, Model, Options};
use moeft_core::gguf::{encode_header, quants, GgmlType, Header, TensorInfo, Value};
use moeft_core::parallel::with_threads;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use serde_json::json;

use crate::arguments::thread_limit;
use crate::buffers::Buffers;
use crate::error::IntoPyResult;
use crate::progress::with_progress;

/// Quantise rows of float32 `values` into `blocks`.
#[pyfunction]
pub fn gguf_quantize(
    py: Python<'_>,
    values: &Bound<'_, PyAny>,
    kind: &str,
    row_len: usize,
    importance: Option<&Bound<'_, PyAny>>,
    blocks: &Bound<'_, PyAny>,
    threads: i64,
) -> PyResult<()> {
    let (kind, threads) = (kind.parse::<GgmlType>().into_py()?, thread_limit(threads)?);
    let mut buffers = Buffers::default();
    let values = buffers.input::<f32>("values", values)?;
    let importance = importance.map(|importance| buffers.input::<f32>("importance", importance)).transpose()?;
    let mut blocks = buffers.output::<u8>("blocks", blocks)?;
    let (values, blocks) = (values.slice(), blocks.slice_mut());
    let importance = importance.as_ref().map(|importance| importance.slice());
    py.detach(|| with_threads(threads, || quants::quantize_rows(kind, values, row_len, importance, blocks))).into_py()
}

/// Restore float32 `values` from `blocks`.
#[pyfunction]
pub fn gguf_dequantize(
    py: Python<'_>,
    blocks: &Bound<'_, PyAny>,
    kind: &str,
    values: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let kind = kind.parse::<GgmlType>().into_py()?;
    let mut buffers = Buffers::default();
    let blocks = buffers.input::<u8>("blocks", blocks)?;
    let mut values = buffers.output::<f32>("values", values)?;
    let (blocks, values) = (blocks.slice(), values.slice_mut());
    py.detach(|| quants::dequantize(kind, blocks, values)).into_py()
}

/// Types and places of a model that would be written; returns the report as JSON.
#[pyfunction]
pub fn gguf_plan(py: Python<'_>, source: PathBuf, out: PathBuf, model: &str, options: &str) -> PyResult<String> {
    let (model, options) = (parse_model(model)?, parse_options(options)?);
    let report = py.detach(|| export::plan(&source, &out, &model, &options)).into_py()?;
    Ok(json!(report).to_string())
}

/// Writes a model; returns the report as JSON.
#[pyfunction]
#[pyo3(signature = (source, out, model, options, threads, progress=None))]
pub fn gguf_write(
    py: Python<'_>,
    source: PathBuf,
    out: PathBuf,
    model: &str,
    options: &str,
    threads: i64,
    progress: Option<Py<PyAny>>,
) -> PyResult<String> {
    let (model, options) = (parse_model(model)?, parse_options(options)?);
    let threads = thread_limit(threads)?;
    let report = with_progress(py, progress, |progress| {
        with_threads(threads, || export::write(&source, &out, &model, &options, progress))
    })?;
    Ok(json!(report).to_string())
}

/// JSON of the header of a GGUF file: version, metadata and tensors.
#[pyfunction]
pub fn gguf_header(py: Python<'_>, path: PathBuf) -> PyResult<String> {
    let header = py.detach(|| Header::read(&path)).into_py()?;
    let tensors: Vec<_> = header
        .tensors
        .iter()
        .map(|tensor| {
            let place = header.data_offset + tensor.offset;
            json!({
                "name": tensor.name, "shape": tensor.shape, "type": tensor.kind, "offset": place, "bytes": tensor.bytes,
            })
        })
        .collect();
    Ok(json!({"version": header.version, "metadata": header.metadata, "tensors": tensors}).to_string())
}

/// The header of a GGUF file of float32 tensors that follow each other, given metadata and (name, shape) as JSON.
#[pyfunction]
pub fn gguf_encode_header(metadata: &str, tensors: &str) -> PyResult<Vec<u8>> {
    let wrong = |error: serde_json::Error| PyValueError::new_err(format!("header: {error}"));
    let metadata: Vec<(String, Value)> = serde_json::from_str(metadata).map_err(wrong)?;
    let named: Vec<(String, Vec<u64>)> = serde_json::from_str(tensors).map_err(wrong)?;
    let mut offset = 0;
    let place = |(name, shape): (String, Vec<u64>)| {
        let bytes = 4 * shape.iter().product::<u64>();
        let tensor = TensorInfo { name, shape, kind: GgmlType::F32, offset, bytes };
        offset += bytes.next_multiple_of(32);
        tensor
    };
    let tensors: Vec<TensorInfo> = named.into_iter().map(place).collect();
    Ok(encode_header(&metadata, &tensors))
}

fn parse_model(text: &str) -> PyResult<Model> {
    serde_json::from_str(text).map_err(|error| PyValueError::new_err(format!("model: {error}")))
}

fn parse_options(text: &str) -> PyResult<Options> {
    serde_json::from_str(text).map_err(|error| PyValueError::new_err(format!("options: {error}")))
}
