//! The one table from errors of the core to Python exceptions.

use moeft_core::checkpoint::CheckpointError;
use moeft_core::Error;
use pyo3::exceptions::{PyOSError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;

/// Result of a core call, on its way to Python.
pub trait IntoPyResult<T> {
    /// Turns an error of the core into the Python exception that means the same.
    fn into_py(self) -> PyResult<T>;
}

impl<T> IntoPyResult<T> for moeft_core::Result<T> {
    fn into_py(self) -> PyResult<T> {
        self.map_err(|error| match &error {
            Error::InvalidArgument { .. } => PyValueError::new_err(error.to_string()),
            Error::Io { path, source, .. } => match source.raw_os_error() {
                Some(code) => PyOSError::new_err((code, error.to_string(), path.display().to_string())),
                None => PyOSError::new_err(error.to_string()),
            },
            Error::Checkpoint(CheckpointError::NoSpace { path, .. }) => {
                PyOSError::new_err((libc::ENOSPC, error.to_string(), path.display().to_string()))
            }
            Error::Checkpoint(_) | Error::Gguf(_) => domain_error("CheckpointError", &error),
            Error::Adapter(_) => domain_error("AdapterError", &error),
            Error::Recipe(_) => domain_error("RecipeError", &error),
            Error::UnknownModelType { .. } | Error::UnknownPart { .. } => domain_error("UnsupportedModelError", &error),
            _ => PyRuntimeError::new_err(error.to_string()),
        })
    }
}

/// An exception of `moeft.errors`.
fn domain_error(class: &str, error: &Error) -> PyErr {
    Python::attach(|py| {
        let made = py.import("moeft.errors").and_then(|errors| errors.getattr(class)?.call1((error.to_string(),)));
        // If the package is broken, its import error says more than ours.
        made.map_or_else(|broken| broken, PyErr::from_value)
    })
}
