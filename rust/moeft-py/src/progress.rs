//! Progress of long work on its way to Python, and Ctrl-C on its way back.

use std::time::{Duration, Instant};

use moeft_core::progress::Progress;
use moeft_core::{Error, Result};
use pyo3::prelude::*;

use crate::error::IntoPyResult;

/// Shortest time between two calls: often enough to look alive, seldom enough to cost nothing.
const INTERVAL: Duration = Duration::from_millis(50);

/// Calls `callback(done_bytes, total_bytes, what)`; what it raises stops the work.
struct Callback {
    callback: Option<Py<PyAny>>,
    done: u64,
    total: u64,
    last: Option<Instant>,
    raised: Option<PyErr>,
}

impl Callback {
    fn call(&self, what: &str) -> PyResult<()> {
        Python::attach(|py| {
            py.check_signals()?;
            match &self.callback {
                Some(callback) => callback.call1(py, (self.done, self.total, what)).map(drop),
                None => Ok(()),
            }
        })
    }
}

impl Progress for Callback {
    fn start(&mut self, total_bytes: u64) {
        self.total = total_bytes;
    }

    fn advance(&mut self, bytes: u64, what: &str) -> Result<()> {
        self.done += bytes;
        let due = self.done == self.total || self.last.is_none_or(|last| last.elapsed() >= INTERVAL);
        if due {
            self.last = Some(Instant::now());
            if let Err(error) = self.call(what) {
                self.raised = Some(error);
                return Err(Error::Interrupted);
            }
        }
        Ok(())
    }
}

/// Runs `work` with the GIL released.
///
/// # Errors
/// What the callback or a signal handler raised; else the error of `work`.
pub fn with_progress<T: Send>(
    py: Python<'_>,
    callback: Option<Py<PyAny>>,
    work: impl FnOnce(&mut dyn Progress) -> Result<T> + Send,
) -> PyResult<T> {
    let mut progress = Callback { callback, done: 0, total: 0, last: None, raised: None };
    let result = py.detach(|| work(&mut progress));
    match progress.raised {
        Some(error) => Err(error),
        None => result.into_py(),
    }
}
