//! Safetensors checkpoints: read, written and staged in bounded memory.

mod disk;
mod dtype;
mod error;
mod fingerprint;
pub mod folder;
mod header;
mod journal;
mod keeper;
mod metadata;
mod reader;
pub mod stage;
mod staged_file;
mod writer;

pub(crate) use disk::{free_bytes, sync_folder};
pub use dtype::Dtype;
pub use error::CheckpointError;
pub use fingerprint::fingerprint;
pub use header::{Header, TensorInfo};
pub use metadata::stamp;
pub use reader::{Checkpoint, Shard, Tensor, INDEX, SINGLE};
pub use staged_file::StagedFile;
pub(crate) use writer::start_writeback;
pub use writer::{checksum, ShardWriter, TensorSpec, CHUNK_BYTES};

impl From<&TensorInfo> for TensorSpec {
    fn from(info: &TensorInfo) -> Self {
        Self { name: info.name.clone(), dtype: info.dtype, shape: info.shape.clone() }
    }
}

/// Indices of element `position` of a tensor, for messages.
pub(crate) fn unravel(mut position: u64, shape: &[u64]) -> Vec<u64> {
    let mut indices: Vec<u64> = shape
        .iter()
        .rev()
        .map(|&size| {
            let index = position % size;
            position /= size;
            index
        })
        .collect();
    indices.reverse();
    indices
}
