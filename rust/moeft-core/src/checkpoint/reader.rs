//! Reads a safetensors checkpoint, one file or many, by bounded positional reads.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::disk::copy_range;
use super::header::{Header, TensorInfo, LENGTH_BYTES};
use super::writer::CHUNK_BYTES;
use super::CheckpointError;
use crate::{Error, Result};

/// Name of a checkpoint's only file.
pub const SINGLE: &str = "model.safetensors";
/// Name of a sharded checkpoint's index.
pub const INDEX: &str = "model.safetensors.index.json";

/// One open safetensors file.
///
/// Never mapped: a mapping counts as resident memory and dies of SIGBUS when the file shrinks.
#[derive(Debug)]
pub struct Shard {
    /// File name inside the folder.
    pub name: String,
    /// Full path.
    pub path: PathBuf,
    /// Its header.
    pub header: Header,
    file: File,
}

impl Shard {
    /// Opens a file and checks its header.
    ///
    /// # Errors
    /// [`CheckpointError`] for a damaged file, [`Error::Io`] if it cannot be read.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let file_bytes = file.metadata().map_err(Error::io("read", path))?.len();
        if file_bytes < LENGTH_BYTES {
            return Err(CheckpointError::TooShort { path: path.into(), bytes: file_bytes }.into());
        }
        let mut length = [0; LENGTH_BYTES as usize];
        file.read_exact_at(&mut length, 0).map_err(Error::io("read", path))?;
        let json_bytes = Header::json_bytes(path, length, file_bytes)?;
        let mut raw = vec![0; (LENGTH_BYTES + json_bytes) as usize];
        file.read_exact_at(&mut raw, 0).map_err(Error::io("read", path))?;
        let header = Header::parse(path, raw, file_bytes)?;
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        Ok(Self { name, path: path.into(), header, file })
    }

    /// Fills `buffer` from byte `offset` of the file.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.file.read_exact_at(buffer, offset).map_err(Error::io("read", &self.path))
    }

    /// Lets the system copy bytes to another file; returns how many it did.
    pub(crate) fn copy_to(&self, target: &File, offset: u64, target_offset: u64, bytes: u64) -> u64 {
        copy_range(&self.file, offset, target, target_offset, bytes)
    }

    /// Length and time of last change, to notice that an input is not the one of an earlier run.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn stat(&self) -> Result<(u64, std::time::SystemTime)> {
        let metadata = self.file.metadata().map_err(Error::io("read", &self.path))?;
        Ok((metadata.len(), metadata.modified().map_err(Error::io("read", &self.path))?))
    }
}

/// A tensor and the file that holds it.
#[derive(Debug, Clone, Copy)]
pub struct Tensor<'a> {
    /// The file.
    pub shard: &'a Shard,
    /// Name, type, shape and place.
    pub info: &'a TensorInfo,
}

impl Tensor<'_> {
    /// Fills `buffer` from byte `start` of this tensor.
    ///
    /// # Errors
    /// [`Error::Io`].
    ///
    /// # Panics
    /// If the range is not inside the tensor: our own mistake.
    pub fn read_at(&self, buffer: &mut [u8], start: u64) -> Result<()> {
        assert!(start + buffer.len() as u64 <= self.info.bytes, "read past the end of {}", self.info.name);
        self.shard.read_at(buffer, self.info.offset + start)
    }

    /// Reads `bytes` from byte `start` of this tensor, a chunk at a time; `take` gets the place of the chunk and the chunk.
    ///
    /// # Errors
    /// [`Error::Io`], and what `take` returns.
    ///
    /// # Panics
    /// If the range is not inside the tensor: our own mistake.
    pub fn for_each_chunk(&self, start: u64, bytes: u64, mut take: impl FnMut(u64, &[u8]) -> Result<()>) -> Result<()> {
        let mut buffer = vec![0; CHUNK_BYTES.min(bytes as usize)];
        let (mut place, end) = (start, start + bytes);
        while place < end {
            let count = buffer.len().min((end - place) as usize);
            let piece = &mut buffer[..count];
            self.read_at(piece, place)?;
            take(place, piece)?;
            place += piece.len() as u64;
        }
        Ok(())
    }
}

/// A checkpoint: every tensor by its name on disk.
#[derive(Debug)]
pub struct Checkpoint {
    /// The folder, or the file if a single one was opened.
    pub path: PathBuf,
    /// Files, sorted by name.
    pub shards: Vec<Shard>,
    places: BTreeMap<String, (usize, usize)>,
}

impl Checkpoint {
    /// Opens a folder that holds `model.safetensors`, or an index and its shards; as `transformers` does, the single
    /// file wins if both exist. A path to one `.safetensors` file opens that file alone.
    ///
    /// # Errors
    /// [`CheckpointError`] says which file is missing or damaged, or that there are no tensors, [`Error::Io`] which cannot be
    /// read.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_file() {
            return Self::from_shards(path, vec![Shard::open(path)?]);
        }
        if path.join(SINGLE).is_file() {
            return Self::from_shards(path, vec![Shard::open(&path.join(SINGLE))?]);
        }
        let index = path.join(INDEX);
        if !index.is_file() {
            let found = if !path.exists() {
                "no such folder".to_string()
            } else if path.join("pytorch_model.bin").exists() || path.join("pytorch_model.bin.index.json").exists() {
                "holds pickled weights (pytorch_model.bin), which run code when they are read; save them as safetensors"
                    .into()
            } else {
                "holds no safetensors weights".into()
            };
            return Err(CheckpointError::NoWeights { path: path.into(), found }.into());
        }
        Self::from_index(path, &index)
    }

    fn from_index(folder: &Path, index: &Path) -> Result<Self> {
        #[derive(serde::Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let invalid = |cause: String| CheckpointError::IndexInvalid { path: index.into(), cause };
        let text = std::fs::read(index).map_err(Error::io("read", index))?;
        let Index { weight_map } = serde_json::from_slice(&text).map_err(|error| invalid(error.to_string()))?;
        let files: BTreeSet<&String> = weight_map.values().collect();
        let mut shards = Vec::with_capacity(files.len());
        for file in files {
            if file.contains(['/', '\\']) || file == ".." {
                return Err(invalid(format!("{file:?} is not a plain file name")).into());
            }
            let path = folder.join(file);
            if !path.exists() {
                return Err(CheckpointError::MissingShard { path }.into());
            }
            shards.push(Shard::open(&path)?);
        }
        let checkpoint = Self::from_shards(folder, shards)?;
        for (name, file) in weight_map {
            if checkpoint.get(&name).is_none_or(|tensor| tensor.shard.name != file) {
                return Err(CheckpointError::AbsentTensor { path: folder.join(file), name }.into());
            }
        }
        Ok(checkpoint)
    }

    fn from_shards(path: &Path, shards: Vec<Shard>) -> Result<Self> {
        let mut places: BTreeMap<String, (usize, usize)> = BTreeMap::new();
        for (shard_index, shard) in shards.iter().enumerate() {
            for (tensor_index, tensor) in shard.header.tensors.iter().enumerate() {
                if let Some((first, _)) = places.insert(tensor.name.clone(), (shard_index, tensor_index)) {
                    let (first, second) = (shards[first].path.clone(), shard.path.clone());
                    return Err(CheckpointError::DuplicateTensor { name: tensor.name.clone(), first, second }.into());
                }
            }
        }
        if places.is_empty() {
            return Err(CheckpointError::NoWeights { path: path.into(), found: "holds no tensors".into() }.into());
        }
        Ok(Self { path: path.into(), shards, places })
    }

    /// The tensor of this name on disk.
    pub fn get(&self, name: &str) -> Option<Tensor<'_>> {
        self.places.get(name).map(|&(shard, tensor)| {
            let shard = &self.shards[shard];
            Tensor { shard, info: &shard.header.tensors[tensor] }
        })
    }

    /// Whether there is a tensor of this name on disk.
    pub fn contains(&self, name: &str) -> bool {
        self.places.contains_key(name)
    }

    /// Every tensor, sorted by name.
    pub fn tensors(&self) -> impl Iterator<Item = Tensor<'_>> {
        self.places.values().map(|&(shard, tensor)| {
            let shard = &self.shards[shard];
            Tensor { shard, info: &shard.header.tensors[tensor] }
        })
    }

    /// Number of tensors.
    #[allow(clippy::len_without_is_empty)] // No caller asks.
    pub fn len(&self) -> u64 {
        self.places.len() as u64
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> u64 {
        self.tensors().map(|tensor| tensor.info.bytes).sum()
    }
}
