//! The files of an export: which tensors they hold, what they are called, and how they appear.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::encode;
use super::header::ALIGNMENT;
use super::{TensorInfo, Value};
use crate::checkpoint::{free_bytes, sync_folder, CheckpointError};
use crate::{Error, Result};

/// One file.
#[derive(Debug)]
pub(super) struct Shard {
    /// Its final name.
    pub path: PathBuf,
    /// Its header, padded to where the tensors begin.
    pub header: Vec<u8>,
    /// Its tensors with their places.
    pub tensors: Vec<TensorInfo>,
}

impl Shard {
    /// Where it is written.
    pub fn partial(&self) -> PathBuf {
        let mut name = self.path.file_name().unwrap_or_default().to_os_string();
        name.push(".partial");
        self.path.with_file_name(name)
    }

    /// Length of the file; the last tensor is padded, as all are.
    pub fn file_bytes(&self) -> u64 {
        let data = self.tensors.last().map_or(0, |tensor| (tensor.offset + tensor.bytes).next_multiple_of(ALIGNMENT));
        self.header.len() as u64 + data
    }
}

/// Shares tensors out among files of at most `max_bytes`, or one file if that is 0. The first holds all metadata.
pub(super) fn split(
    out: &Path,
    metadata: Vec<(String, Value)>,
    tensors: Vec<TensorInfo>,
    max_bytes: u64,
) -> Result<Vec<Shard>> {
    let stem = out.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_suffix(".gguf"));
    let Some(stem) = stem.filter(|stem| !stem.is_empty()) else {
        return Err(Error::invalid("out", out.display(), "the name of a file that ends with .gguf"));
    };
    let total = tensors.len();
    let mut groups: Vec<Vec<TensorInfo>> = vec![Vec::new()];
    let mut end = 0;
    for mut tensor in tensors {
        let group = groups.last().expect("starts with one");
        if max_bytes > 0 && !group.is_empty() && end + tensor.bytes > max_bytes {
            groups.push(Vec::new());
            end = 0;
        }
        tensor.offset = end;
        end = (end + tensor.bytes).next_multiple_of(ALIGNMENT);
        groups.last_mut().expect("starts with one").push(tensor);
    }
    let count = groups.len();
    if count > usize::from(u16::MAX) {
        return Err(Error::invalid("max_shard_bytes", max_bytes, format!("more, so that fewer than {count} files do")));
    }
    let shard = |(index, tensors): (usize, Vec<TensorInfo>)| {
        let mut metadata = if index == 0 { metadata.clone() } else { Vec::new() };
        let mut path = out.to_path_buf();
        if count > 1 {
            metadata.push(("split.no".into(), Value::Uint16(index as u16)));
            metadata.push(("split.count".into(), Value::Uint16(count as u16)));
            metadata.push(("split.tensors.count".into(), Value::Int32(total as i32)));
            path = out.with_file_name(format!("{stem}-{:05}-of-{count:05}.gguf", index + 1));
        }
        Shard { path, header: encode::header(&metadata, &tensors), tensors }
    };
    Ok(groups.into_iter().enumerate().map(shard).collect())
}

/// Refuses files that exist, and makes the folder.
pub(super) fn check_outputs(shards: &[Shard]) -> Result<()> {
    for shard in shards {
        if fs::symlink_metadata(&shard.path).is_ok() {
            return Err(CheckpointError::OutputExists { path: shard.path.clone() }.into());
        }
    }
    let folder = folder(&shards[0].path);
    fs::create_dir_all(folder).map_err(Error::io("create", folder))
}

/// Refuses a disk that is too small for what is missing.
pub(super) fn check_space(shards: &[Shard]) -> Result<()> {
    let folder = folder(&shards[0].path);
    let held = |shard: &Shard| fs::metadata(shard.partial()).map_or(0, |found| found.blocks() * 512);
    let needed = shards.iter().map(|shard| shard.file_bytes().saturating_sub(held(shard))).sum::<u64>();
    let available = free_bytes(folder)?;
    if available < needed {
        return Err(CheckpointError::NoSpace { path: folder.into(), needed, available }.into());
    }
    Ok(())
}

/// Removes what was written of files that will not be finished.
pub(super) fn discard(shards: &[Shard]) {
    for shard in shards {
        // The error that matters came before; a leftover only costs space, and the next run removes it.
        let _ = fs::remove_file(shard.partial());
    }
}

/// Gives all files their names; they are on the disk already.
pub(super) fn publish(shards: &[Shard]) -> Result<()> {
    for shard in shards {
        fs::rename(shard.partial(), &shard.path).map_err(Error::io("rename", shard.partial()))?;
    }
    sync_folder(folder(&shards[0].path))
}

fn folder(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
