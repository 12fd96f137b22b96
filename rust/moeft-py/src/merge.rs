//! Merges.

use std::ffi::OsString;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use moeft_core::merge::{self, Options, Recipe};
use moeft_core::parallel::{threads as all_threads, with_threads};
use pyo3::prelude::*;
use serde_json::json;

use crate::error::IntoPyResult;
use crate::progress::with_progress;

/// Time between two looks for signals.
const INTERVAL: Duration = Duration::from_millis(50);

/// Merges what a recipe says; returns the report as JSON.
#[pyfunction]
#[pyo3(signature = (recipe, folder, out, progress=None, max_shard_bytes=None, threads=None))]
pub fn merge_checkpoint(
    py: Python<'_>,
    recipe: &str,
    folder: PathBuf,
    out: PathBuf,
    progress: Option<Py<PyAny>>,
    max_shard_bytes: Option<u64>,
    threads: Option<NonZeroUsize>,
) -> PyResult<String> {
    let recipe = Recipe::parse(recipe, &folder).into_py()?;
    let threads = threads.or(NonZeroUsize::new(all_threads())).expect("there is a thread");
    let options = Options { max_shard_bytes };
    let report = with_progress(py, progress, |progress| {
        with_threads(threads, || merge::merge(recipe, &out, options, progress))
    })?;
    Ok(json!(report).to_string())
}

/// Refuses a recipe that cannot be used, without looking at its inputs.
#[pyfunction]
pub fn check_merge(recipe: &str, folder: PathBuf) -> PyResult<()> {
    Recipe::parse(recipe, &folder).map(drop).into_py()
}

/// Says what a merge would do, as JSON.
#[pyfunction]
#[pyo3(signature = (recipe, folder, max_shard_bytes=None))]
pub fn plan_merge(py: Python<'_>, recipe: &str, folder: PathBuf, max_shard_bytes: Option<u64>) -> PyResult<String> {
    let recipe = Recipe::parse(recipe, &folder).into_py()?;
    let outline = py.detach(|| merge::outline(recipe, Options { max_shard_bytes })).into_py()?;
    Ok(json!(outline).to_string())
}

/// Recipe, output folder, and whether to answer in JSON.
type ToVerify = (PathBuf, PathBuf, bool);

/// Runs the `moeft-merge` command on these words, under the name `moeft merge`; returns its exit code and what the caller is
/// to verify.
#[pyfunction]
pub fn merge_command(py: Python<'_>, words: Vec<OsString>) -> PyResult<(u8, Option<ToVerify>)> {
    let (mut last, mut raised) = (Instant::now(), None);
    let mut stop = || {
        if last.elapsed() >= INTERVAL {
            last = Instant::now();
            raised = Python::attach(|py| py.check_signals()).err();
        }
        raised.is_some()
    };
    let outcome = py.detach(|| moeft_merge::run("moeft merge", words, true, &mut stop));
    match raised {
        // The command has said so, with the exit code of an interrupt.
        Some(error) if !error.is_instance_of::<pyo3::exceptions::PyKeyboardInterrupt>(py) => Err(error),
        _ => Ok((outcome.code, outcome.verify.map(|verify| (verify.recipe, verify.out, verify.json)))),
    }
}
