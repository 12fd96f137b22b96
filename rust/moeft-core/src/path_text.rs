//! Paths in JSON.

use std::path::{Path, PathBuf};

use serde::{Serialize, Serializer};

/// Writes a path as text for people; what is no UTF-8 in it is replaced, where serde's own form of paths fails.
pub(crate) fn serialize<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&path.to_string_lossy())
}

/// [`serialize`] of a path that may be absent.
pub(crate) fn serialize_option<S: Serializer>(path: &Option<PathBuf>, serializer: S) -> Result<S::Ok, S::Error> {
    path.as_ref().map(|path| path.to_string_lossy()).serialize(serializer)
}
