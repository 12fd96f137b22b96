//! What can be wrong with a GGUF file or with the plan of one.

use std::path::PathBuf;

/// One variant per cause.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // The messages say what the fields are.
pub enum GgufError {
    #[error("{}: starts with {found:02x?}, expected \"GGUF\"; this is no GGUF file", path.display())]
    Magic { path: PathBuf, found: [u8; 4] },
    #[error("{}: GGUF version {version}, expected 2 or 3; convert the model again with a newer tool", path.display())]
    Version { path: PathBuf, version: u32 },
    #[error("{}: {cause}; the file is damaged or truncated, download or write it again", path.display())]
    Damaged { path: PathBuf, cause: String },
    #[error("{}: {name} has the tensor type {kind}, which moeft does not know", path.display())]
    UnknownType { path: PathBuf, name: String, kind: u32 },
    #[error("{name}: {cause}")]
    Tensor { name: String, cause: String },
}
