//! Merges.

use std::path::PathBuf;

use moeft_core::merge::{self, Recipe};
use pyo3::prelude::*;
use serde_json::json;

use crate::error::IntoPyResult;
use crate::progress::with_progress;

/// Merges what a recipe says; returns the report as JSON.
#[pyfunction]
#[pyo3(signature = (recipe, folder, out, progress=None))]
pub fn merge_checkpoint(
    py: Python<'_>,
    recipe: &str,
    folder: PathBuf,
    out: PathBuf,
    progress: Option<Py<PyAny>>,
) -> PyResult<String> {
    let recipe = Recipe::parse(recipe, &folder).into_py()?;
    let report = with_progress(py, progress, |progress| merge::merge(recipe, &out, progress))?;
    Ok(json!(report).to_string())
}
