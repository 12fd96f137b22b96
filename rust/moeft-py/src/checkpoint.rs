//! Checkpoints on disk: listed, fingerprinted, stamped, packed, their experts fused or taken apart.

use std::collections::BTreeMap;
use std::path::PathBuf;

use moeft_core::checkpoint::{self, Checkpoint};
use moeft_core::layout::{self, Direction};
use moeft_core::progress::Silent;
use moeft_core::quantize::{self, Options};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use serde_json::json;

use crate::error::IntoPyResult;
use crate::progress::with_progress;

/// Fingerprint of a checkpoint folder or file, whatever its sharding.
#[pyfunction]
pub fn fingerprint(py: Python<'_>, path: PathBuf) -> PyResult<String> {
    py.detach(|| checkpoint::fingerprint(&Checkpoint::open(&path)?)).into_py()
}

/// Checksum of a safetensors file, as manifests have it.
#[pyfunction]
pub fn checksum(py: Python<'_>, path: PathBuf) -> PyResult<String> {
    py.detach(|| checkpoint::checksum(&path, &mut Silent)).into_py()
}

/// JSON list of the tensors of a checkpoint folder or file.
#[pyfunction]
pub fn tensors(py: Python<'_>, path: PathBuf) -> PyResult<String> {
    let checkpoint = py.detach(|| Checkpoint::open(&path)).into_py()?;
    let row = |tensor: checkpoint::Tensor<'_>| {
        let info = tensor.info;
        json!({
            "name": info.name, "dtype": info.dtype, "shape": info.shape, "bytes": info.bytes, "file": tensor.shard.name,
        })
    };
    Ok(serde_json::Value::Array(checkpoint.tensors().map(row).collect()).to_string())
}

/// Adds entries to the metadata of a safetensors file.
#[pyfunction]
pub fn stamp_metadata(py: Python<'_>, path: PathBuf, entries: BTreeMap<String, String>) -> PyResult<()> {
    let entries: Vec<_> = entries.into_iter().collect();
    py.detach(|| checkpoint::stamp(&path, &entries)).into_py()
}

/// Packs a checkpoint folder; returns the report as JSON.
#[pyfunction]
#[pyo3(signature = (source, out, options, progress=None))]
pub fn quantize_checkpoint(
    py: Python<'_>,
    source: PathBuf,
    out: PathBuf,
    options: &str,
    progress: Option<Py<PyAny>>,
) -> PyResult<String> {
    let options: Options =
        serde_json::from_str(options).map_err(|error| PyValueError::new_err(format!("options: {error}")))?;
    let report = with_progress(py, progress, |progress| quantize::quantize(&source, &out, &options, progress))?;
    Ok(json!(report).to_string())
}

/// Fuses the experts of a checkpoint folder or takes them apart; returns the report as JSON.
#[pyfunction]
#[pyo3(signature = (source, out, direction, progress=None))]
pub fn convert_layout(
    py: Python<'_>,
    source: PathBuf,
    out: PathBuf,
    direction: &str,
    progress: Option<Py<PyAny>>,
) -> PyResult<String> {
    let direction = match direction {
        "fuse" => Direction::Fuse,
        "unfuse" => Direction::Unfuse,
        other => {
            let message = format!("direction is {other:?}, expected \"fuse\" or \"unfuse\"");
            return Err(PyValueError::new_err(message));
        }
    };
    let report = with_progress(py, progress, |progress| layout::convert(&source, &out, direction, progress))?;
    Ok(json!(report).to_string())
}
