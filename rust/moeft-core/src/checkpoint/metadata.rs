//! Adds entries to the `__metadata__` of a safetensors file.

use std::fs;
use std::path::Path;

use super::disk::sync_folder;
use super::{Header, Shard, ShardWriter, TensorSpec, CHUNK_BYTES};
use crate::{Error, Result};

/// Rewrites the file at `path` with `entries` added to its metadata, replacing those of the same key.
///
/// The tensors are streamed to a sibling that then takes the name: a reader sees the old file or the new one.
///
/// # Errors
/// As [`Shard::open`]; [`Error::Io`], which leaves the old file as it was.
pub fn stamp(path: &Path, entries: &[(String, String)]) -> Result<()> {
    let shard = Shard::open(path)?;
    let mut metadata = shard.header.metadata.clone();
    for (key, value) in entries {
        match metadata.iter_mut().find(|(known, _)| known == key) {
            Some((_, known)) => known.clone_from(value),
            None => metadata.push((key.clone(), value.clone())),
        }
    }
    let specs = shard.header.tensors.iter().map(TensorSpec::from).collect();
    let header = Header::layout(path, specs, &metadata)?;
    let sibling = path.with_file_name(format!(".{}.{}.tmp", shard.name, std::process::id()));
    let written =
        copy(&shard, &sibling, header).and_then(|()| fs::rename(&sibling, path).map_err(Error::io("rename", &sibling)));
    if written.is_err() {
        // The error that matters is the first one; a leftover sibling only costs space.
        let _ = fs::remove_file(&sibling);
    }
    written?;
    sync_folder(path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new(".")))
}

fn copy(shard: &Shard, target: &Path, header: Header) -> Result<()> {
    let permissions = fs::metadata(&shard.path).map_err(Error::io("read", &shard.path))?.permissions();
    let mut writer = ShardWriter::create(target, header)?;
    fs::set_permissions(target, permissions).map_err(Error::io("write", target))?;
    let mut buffer = vec![0; CHUNK_BYTES];
    for tensor in &shard.header.tensors {
        let mut start = 0;
        while start < tensor.bytes {
            let piece = &mut buffer[..CHUNK_BYTES.min((tensor.bytes - start) as usize)];
            shard.read_at(piece, tensor.offset + start)?;
            writer.append(&tensor.name, piece)?;
            start += piece.len() as u64;
        }
    }
    writer.finish().map(drop)
}
