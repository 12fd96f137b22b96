//! Writes one safetensors file: header first, then every tensor piece by piece at its place.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::{json, Map, Value};
use xxhash_rust::xxh3::Xxh3;

use super::header::{Header, TensorInfo, LENGTH_BYTES};
use super::reader::Shard;
use super::staged_file::hex;
use super::{CheckpointError, Dtype};
use crate::progress::Progress;
use crate::{Error, Result};

/// Size of buffers between disk and disk. 256 KiB to 1 MiB stay in the L2 cache; 8 MiB took twice the time.
pub const CHUNK_BYTES: usize = 1 << 20;
/// How much may be dirty before the kernel is asked to start writing: 0.46 s/GB against 0.69 s without.
const WRITEBACK_BYTES: u64 = 64 << 20;

/// Name, type and shape of a tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct TensorSpec {
    /// Name on disk.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Sizes, slowest axis first.
    pub shape: Vec<u64>,
}

impl TensorSpec {
    /// Bytes of the tensor.
    ///
    /// # Panics
    /// If the shape overflows or is no whole number of bytes: our own mistake.
    pub fn bytes(&self) -> u64 {
        self.dtype.bytes(&self.shape).unwrap_or_else(|| panic!("{} has no size: {:?}", self.name, self.shape))
    }
}

impl Header {
    /// The header that safetensors' own serializer writes: dtype descending, then name, padded to 8 bytes.
    ///
    /// # Errors
    /// [`CheckpointError::HeaderTooLarge`] for millions of tensors.
    pub fn layout(path: &Path, mut specs: Vec<TensorSpec>, metadata: &[(String, String)]) -> Result<Self> {
        specs.sort_by(|left, right| right.dtype.cmp(&left.dtype).then_with(|| left.name.cmp(&right.name)));
        let mut object = Map::new();
        if !metadata.is_empty() {
            let entries: Map<String, Value> = metadata.iter().map(|(key, value)| (key.clone(), json!(value))).collect();
            object.insert("__metadata__".into(), Value::Object(entries));
        }
        let mut begin = 0;
        for spec in &specs {
            let end = begin + spec.bytes();
            let entry = json!({"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [begin, end]});
            object.insert(spec.name.clone(), entry);
            begin = end;
        }
        let mut json = serde_json::to_vec(&object).expect("strings and numbers always serialize");
        json.resize(json.len().next_multiple_of(8), b' ');
        let claimed = json.len() as u64;
        if claimed > super::header::MAX_JSON_BYTES {
            return Err(CheckpointError::HeaderTooLarge { path: path.into(), claimed }.into());
        }
        let mut offset = LENGTH_BYTES + claimed;
        let tensors = specs.into_iter().map(|spec| {
            let bytes = spec.bytes();
            offset += bytes;
            TensorInfo { name: spec.name, dtype: spec.dtype, shape: spec.shape, offset: offset - bytes, bytes }
        });
        let tensors = tensors.collect();
        let raw = claimed.to_le_bytes().into_iter().chain(json).collect();
        Ok(Self { tensors, metadata: metadata.to_vec(), raw })
    }

    /// Length of the whole file.
    pub fn file_bytes(&self) -> u64 {
        self.raw.len() as u64 + self.tensors.iter().map(|tensor| tensor.bytes).sum::<u64>()
    }
}

/// One file being written. Tensors may be filled in any order, each from its first byte to its last.
pub struct ShardWriter {
    path: PathBuf,
    file: File,
    header: Header,
    slots: HashMap<String, usize>,
    filled: Vec<(u64, Xxh3)>,
    dirty_bytes: u64,
}

impl ShardWriter {
    /// Creates the file, replacing an unfinished one, and writes its header.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(path: &Path, header: Header) -> Result<Self> {
        let file = File::create(path).map_err(Error::io("create", path))?;
        file.write_all_at(&header.raw, 0).map_err(Error::io("write", path))?;
        let slots = header.tensors.iter().enumerate().map(|(slot, tensor)| (tensor.name.clone(), slot)).collect();
        let filled = header.tensors.iter().map(|_| (0, Xxh3::new())).collect();
        Ok(Self { path: path.into(), file, header, slots, filled, dirty_bytes: 0 })
    }

    /// Goes on with an open file whose header is written.
    ///
    /// # Arguments
    /// * `found`: the bytes that are there, by tensor, and their hash.
    pub(super) fn resume(path: &Path, file: File, header: Header, mut found: HashMap<String, (u64, Xxh3)>) -> Self {
        let slots = header.tensors.iter().enumerate().map(|(slot, tensor)| (tensor.name.clone(), slot)).collect();
        let filled =
            header.tensors.iter().map(|tensor| found.remove(&tensor.name).unwrap_or((0, Xxh3::new()))).collect();
        Self { path: path.into(), file, header, slots, filled, dirty_bytes: 0 }
    }

    /// How much of a tensor is written.
    pub fn filled(&self, name: &str) -> u64 {
        self.filled[self.slots[name]].0
    }

    /// How much of all tensors is written.
    pub(super) fn filled_bytes(&self) -> u64 {
        self.filled.iter().map(|(filled, _)| filled).sum()
    }

    /// Whether every tensor is written.
    pub fn is_full(&self) -> bool {
        self.header.tensors.iter().zip(&self.filled).all(|(tensor, (filled, _))| *filled == tensor.bytes)
    }

    /// Digest of what is written of a tensor.
    pub(super) fn digest(&self, name: &str) -> String {
        hex(&self.filled[self.slots[name]].1)
    }

    /// Starts a tensor over.
    pub(super) fn restart(&mut self, name: &str) {
        self.filled[self.slots[name]] = (0, Xxh3::new());
    }

    /// Another handle of the file, and its path.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn handle(&self) -> Result<(File, PathBuf)> {
        let file = self.file.try_clone().map_err(Error::io("open", &self.path))?;
        Ok((file, self.path.clone()))
    }

    /// Writes the next bytes of a tensor.
    ///
    /// # Errors
    /// [`Error::Io`], for example when the disk is full.
    ///
    /// # Panics
    /// If the file has no such tensor or it is full: our own mistake.
    pub fn append(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        self.append_from(name, bytes, None)
    }

    /// As [`Self::append`], for bytes that were read at a place of a file: the system copies them from there where it can,
    /// which a file system that shares blocks does without writing.
    ///
    /// # Errors
    /// As [`Self::append`].
    pub fn append_from(&mut self, name: &str, bytes: &[u8], source: Option<(&Shard, u64)>) -> Result<()> {
        let slot = self.slots[name];
        let (tensor, (filled, hash)) = (&self.header.tensors[slot], &mut self.filled[slot]);
        assert!(*filled + bytes.len() as u64 <= tensor.bytes, "{name} is longer than announced");
        let copied = match source {
            Some((source, start)) => source.copy_to(&self.file, start, tensor.offset + *filled, bytes.len() as u64),
            None => 0,
        };
        let place = tensor.offset + *filled + copied;
        self.file.write_all_at(&bytes[copied as usize..], place).map_err(Error::io("write", &self.path))?;
        hash.update(bytes);
        *filled += bytes.len() as u64;
        self.dirty_bytes += bytes.len() as u64;
        if self.dirty_bytes >= WRITEBACK_BYTES {
            self.dirty_bytes = 0;
            start_writeback(&self.file);
        }
        Ok(())
    }

    /// Brings the file to the disk and returns its checksum.
    ///
    /// # Errors
    /// [`Error::Io`].
    ///
    /// # Panics
    /// If a tensor is not filled: our own mistake.
    pub fn finish(self) -> Result<String> {
        self.file.sync_all().map_err(Error::io("sync", &self.path))?;
        Ok(self.checksum())
    }

    /// Checksum of the whole file, see [`checksum`].
    ///
    /// # Panics
    /// If a tensor is not filled: our own mistake.
    pub(super) fn checksum(&self) -> String {
        for (tensor, (filled, _)) in self.header.tensors.iter().zip(&self.filled) {
            assert_eq!(*filled, tensor.bytes, "{} is not filled", tensor.name);
        }
        combine(&self.header.raw, self.filled.iter().map(|(_, hash)| hash.digest128()))
    }
}

/// Checksum of a file on disk, as [`ShardWriter::finish`] returned it.
///
/// XXH3, 128 bits: it finds damage, not malice, and at more than 10 GB/s it costs nothing beside the disk, where
/// SHA-256 would double the time of a merge. One digest per tensor lets tensors be written side by side.
///
/// # Errors
/// As [`Shard::open`]; what `progress` returns.
pub fn checksum(path: &Path, progress: &mut dyn Progress) -> Result<String> {
    let shard = Shard::open(path)?;
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut digests = Vec::with_capacity(shard.header.tensors.len());
    for tensor in &shard.header.tensors {
        let mut hash = Xxh3::new();
        let mut start = 0;
        while start < tensor.bytes {
            let piece = &mut buffer[..CHUNK_BYTES.min((tensor.bytes - start) as usize)];
            shard.read_at(piece, tensor.offset + start)?;
            hash.update(piece);
            start += piece.len() as u64;
            progress.advance(piece.len() as u64, &shard.name)?;
        }
        digests.push(hash.digest128());
    }
    Ok(combine(&shard.header.raw, digests))
}

fn combine(header: &[u8], digests: impl IntoIterator<Item = u128>) -> String {
    let mut hash = Xxh3::new();
    hash.update(header);
    for digest in digests {
        hash.update(&digest.to_le_bytes());
    }
    format!("xxh3-128:{:032x}", hash.digest128())
}

/// Asks the kernel to write what is dirty without waiting for it. A hint: the fsync at the end reports errors.
#[cfg(target_os = "linux")]
pub(crate) fn start_writeback(file: &File) {
    use std::os::fd::AsRawFd;
    // SAFETY: the descriptor is open for the whole call; the call takes no pointers.
    unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) };
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn start_writeback(_file: &File) {}
