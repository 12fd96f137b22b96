//! Every way a call into this crate can fail, with the data that explains it.

use std::path::PathBuf;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong. Messages say what was found, what was expected and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument does not fit: wrong length, wrong value, overlapping buffers.
    #[error("{name} is {value}, expected {expected}")]
    InvalidArgument {
        /// Name of the argument as the caller knows it.
        name: &'static str,
        /// What was given.
        value: String,
        /// What would have been right.
        expected: String,
    },
    /// An operation of the file system failed.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// Verb: "read", "write", "rename".
        action: &'static str,
        /// The file or folder concerned.
        path: PathBuf,
        /// The cause, with the system's error number.
        source: std::io::Error,
    },
}

impl Error {
    /// An [`Error::InvalidArgument`] from anything printable.
    pub fn invalid(name: &'static str, value: impl ToString, expected: impl ToString) -> Self {
        Self::InvalidArgument { name, value: value.to_string(), expected: expected.to_string() }
    }
}
