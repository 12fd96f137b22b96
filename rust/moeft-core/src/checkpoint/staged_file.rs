//! One file of a stage: written in marked steps, and continued behind the last mark that still holds.

use std::collections::{BTreeMap, HashMap};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::Serialize;
use serde_json::Value;
use xxhash_rust::xxh3::Xxh3;

use super::journal::Mark;
use super::keeper::{Keeper, Kept};
use super::{Header, Shard, ShardWriter, Tensor, CHUNK_BYTES};
use crate::parallel::{pipeline, threads};
use crate::progress::Progress;
use crate::{Error, Result};

/// A file of a stage. Work marks the places from which it could go on; what is marked survives a kill once it is kept.
pub struct StagedFile<'a> {
    name: String,
    writer: ShardWriter,
    keeper: &'a Keeper<'a>,
    /// What was marked with the bytes that are there.
    states: HashMap<String, Value>,
    /// Marks that are not kept yet, by tensor.
    pending: BTreeMap<String, Mark>,
    /// Bytes written since marks were last handed over, and how many may be.
    unkept: u64,
    keep_every: u64,
    resumed: u64,
}

impl<'a> StagedFile<'a> {
    /// Opens what an earlier run left of the file, or creates it.
    ///
    /// # Arguments
    /// * `marks`: what is said to be there, by tensor. It is read again; what is damaged or gone is to be written anew.
    /// * `keep_every`: bytes after which marks are handed to the keeper.
    ///
    /// # Errors
    /// [`Error::Io`]; what `progress` returns.
    pub(super) fn open(
        path: &Path,
        header: Header,
        marks: Option<&HashMap<String, Mark>>,
        keeper: &'a Keeper<'a>,
        keep_every: u64,
        progress: &mut dyn Progress,
    ) -> Result<Self> {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let earlier = match marks {
            Some(marks) => reopen(path, &header)?.map(|file| (file, marks)),
            None => None,
        };
        let (writer, states) = match earlier {
            Some((file, marks)) => {
                let found = verify(&file, &header, marks, progress)?;
                let states = found.keys().map(|tensor| (tensor.clone(), marks[tensor].state.clone())).collect();
                (ShardWriter::resume(path, file, header, found), states)
            }
            None => (ShardWriter::create(path, header)?, HashMap::new()),
        };
        let resumed = writer.filled_bytes();
        Ok(Self { name, writer, keeper, states, pending: BTreeMap::new(), unkept: 0, keep_every, resumed })
    }

    /// Bytes that an earlier run had written.
    pub(super) fn resumed(&self) -> u64 {
        self.resumed
    }

    /// Whether nothing is left to write.
    pub fn is_full(&self) -> bool {
        self.writer.is_full()
    }

    /// How much of a tensor is there, from its first byte on.
    pub fn filled(&self, tensor: &str) -> u64 {
        self.writer.filled(tensor)
    }

    /// What was marked with the bytes of a tensor that an earlier run left; `None` if there are none.
    pub fn state<T: DeserializeOwned>(&self, tensor: &str) -> Option<T> {
        T::deserialize(self.states.get(tensor)?).ok()
    }

    /// Forgets what an earlier run left of a tensor.
    pub fn restart(&mut self, tensor: &str) {
        self.writer.restart(tensor);
        self.states.remove(tensor);
    }

    /// As [`ShardWriter::append`].
    ///
    /// # Errors
    /// [`Error::Io`], for example when the disk is full.
    pub fn append(&mut self, tensor: &str, bytes: &[u8]) -> Result<()> {
        self.append_from(tensor, bytes, None)
    }

    /// As [`ShardWriter::append_from`].
    ///
    /// # Errors
    /// As [`Self::append`].
    pub fn append_from(&mut self, tensor: &str, bytes: &[u8], source: Option<(&Shard, u64)>) -> Result<()> {
        self.unkept += bytes.len() as u64;
        self.writer.append_from(tensor, bytes, source)
    }

    /// Marks the place up to which tensors are written, which belong together if there are several.
    ///
    /// # Arguments
    /// * `state`: what [`Self::state`] is to say to a run that goes on from here.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn mark(&mut self, tensors: &[&str], state: impl Serialize) -> Result<()> {
        let state = serde_json::to_value(state).expect("states are plain data");
        for &tensor in tensors {
            let mark = Mark {
                file: self.name.clone(),
                tensor: tensor.into(),
                bytes: self.writer.filled(tensor),
                digest: self.writer.digest(tensor),
                state: state.clone(),
            };
            self.pending.insert(tensor.into(), mark);
        }
        if self.unkept >= self.keep_every {
            let offered = self.take_pending()?;
            match self.keeper.offer(offered) {
                None => self.unkept = 0,
                Some(back) => self.pending = back.marks.into_iter().map(|mark| (mark.tensor.clone(), mark)).collect(),
            }
        }
        Ok(())
    }

    /// Copies the rest of a tensor of the same name.
    ///
    /// # Errors
    /// [`Error::Io`]; what `progress` returns.
    pub fn copy(&mut self, source: Tensor<'_>, progress: &mut dyn Progress) -> Result<()> {
        let name = source.info.name.as_str();
        let start = self.filled(name);
        source.for_each_chunk(start, source.info.bytes - start, |_, piece| {
            self.append(name, piece)?;
            self.mark(&[name], ())?;
            progress.advance(piece.len() as u64, name)
        })
    }

    /// Hands the last marks over, of work that ended or failed; false if the keeper stopped at an error.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn keep(&mut self) -> Result<bool> {
        let kept = self.take_pending()?;
        Ok(kept.marks.is_empty() || self.keeper.keep(kept))
    }

    /// Checksum of the whole file.
    pub(super) fn checksum(&self) -> String {
        self.writer.checksum()
    }

    fn take_pending(&mut self) -> Result<Kept> {
        let (file, path) = self.writer.handle()?;
        Ok(Kept { file, path, marks: std::mem::take(&mut self.pending).into_values().collect() })
    }
}

/// The file of an earlier run; `None` if there is none with this header.
fn reopen(path: &Path, header: &Header) -> Result<Option<File>> {
    if !path.exists() {
        return Ok(None);
    }
    let file = OpenOptions::new().read(true).write(true).open(path).map_err(Error::io("open", path))?;
    let bytes = file.metadata().map_err(Error::io("read", path))?.len();
    let mut raw = vec![0; header.raw.len()];
    let is_same = bytes <= header.file_bytes() && file.read_exact_at(&mut raw, 0).is_ok() && raw == header.raw;
    Ok(is_same.then_some(file))
}

/// Reads what is marked, and returns length and hash of what is as it was written.
fn verify(
    file: &File,
    header: &Header,
    marks: &HashMap<String, Mark>,
    progress: &mut dyn Progress,
) -> Result<HashMap<String, (u64, Xxh3)>> {
    let marked = header.tensors.iter().filter_map(|tensor| Some((tensor, marks.get(&tensor.name)?)));
    let marked: Vec<_> = marked.filter(|(tensor, mark)| mark.bytes <= tensor.bytes).collect();
    let mut slots = Vec::new();
    slots.resize_with(2 * threads(), || (vec![0; CHUNK_BYTES], None));
    let mut found = HashMap::new();
    let hash = |item: usize, (buffer, hash): &mut (Vec<u8>, Option<Xxh3>)| {
        let (tensor, mark) = marked[item];
        // What cannot be read is written again, like what is damaged.
        *hash = hash_range(file, tensor.offset, mark.bytes, buffer).filter(|hash| hex(hash) == mark.digest);
        Ok(())
    };
    let take = |item: usize, (_, hash): &mut (Vec<u8>, Option<Xxh3>)| {
        let (tensor, mark) = marked[item];
        let Some(hash) = hash.take() else { return Ok(()) };
        found.insert(tensor.name.clone(), (mark.bytes, hash));
        progress.advance(mark.bytes, &tensor.name)
    };
    pipeline(threads(), &mut slots, marked.len(), hash, take)?;
    Ok(found)
}

fn hash_range(file: &File, offset: u64, bytes: u64, buffer: &mut [u8]) -> Option<Xxh3> {
    let mut hash = Xxh3::new();
    for start in (0..bytes).step_by(buffer.len()) {
        let piece = &mut buffer[..CHUNK_BYTES.min((bytes - start) as usize)];
        file.read_exact_at(piece, offset + start).ok()?;
        hash.update(piece);
    }
    Some(hash)
}

/// A digest as marks hold it.
pub(super) fn hex(hash: &Xxh3) -> String {
    format!("{:032x}", hash.digest128())
}
