//! Every way a call into this crate can fail, with the data that explains it.

use std::path::{Path, PathBuf};

use crate::adapter::AdapterError;
use crate::checkpoint::CheckpointError;
use crate::gguf::GgufError;
use crate::merge::RecipeError;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

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
    /// A checkpoint is incomplete, damaged, or not what the operation needs.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// An adapter does not fit its base, or its layout cannot be told.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// A GGUF file is damaged, or a model cannot become one.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// A recipe cannot be used.
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    /// No family file knows this `model_type`.
    #[error("model_type is {model_type:?}, which no family file knows; known are: {known}")]
    UnknownModelType {
        /// `model_type` of config.json.
        model_type: String,
        /// The known ones, separated by commas.
        known: String,
    },
    /// A family without a file, as a part of a larger model: nothing says which class would load it.
    #[error(
        "model_type is {model_type:?}, which no family file knows, and its layers are at {layers}, inside of a larger \
         model: moeft.load could not read what is packed here; use a model of its text part alone"
    )]
    UnknownPart {
        /// `model_type` of config.json.
        model_type: String,
        /// Path of the layers.
        layers: String,
    },
    /// The caller's [`Progress`](crate::progress::Progress) asked to stop.
    #[error("interrupted; what is finished was kept, start the same command again to go on")]
    Interrupted,
}

impl Error {
    /// An [`Error::InvalidArgument`] from anything printable.
    pub fn invalid(name: &'static str, value: impl ToString, expected: impl ToString) -> Self {
        Self::InvalidArgument { name, value: value.to_string(), expected: expected.to_string() }
    }

    /// For `map_err` on an operation of the file system: `.map_err(Error::io("read", path))`.
    pub fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io { action, path: path.as_ref().to_path_buf(), source }
    }
}
