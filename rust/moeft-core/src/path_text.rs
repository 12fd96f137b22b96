//! Paths in JSON.

use std::path::Path;

use serde::Serializer;

/// Writes a path as text for people; what is no UTF-8 in it is replaced, where serde's own form of paths fails.
pub(crate) fn serialize<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&path.to_string_lossy())
}
