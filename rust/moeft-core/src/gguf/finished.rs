//! The tensors that an interrupted export had finished: a line each, with a checksum, beside the unfinished file.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::checkpoint::CheckpointError;
use crate::{Error, Result};

#[derive(Serialize, Deserialize)]
struct Line {
    name: String,
    hash: String,
}

/// An open, locked journal.
#[derive(Debug)]
pub(super) struct Finished {
    path: PathBuf,
    file: File,
    hashes: HashMap<String, String>,
}

impl Finished {
    /// Opens the journal of `out`, and empties it if it is of another plan.
    ///
    /// # Errors
    /// [`CheckpointError::Locked`] if another process writes the same file; [`Error::Io`].
    pub fn open(out: &Path, plan: &str) -> Result<Self> {
        let mut name = out.file_name().unwrap_or_default().to_os_string();
        name.push(".journal");
        let path = out.with_file_name(name);
        let file = OpenOptions::new().create(true).truncate(false).read(true).append(true).open(&path);
        let mut file = file.map_err(Error::io("create", &path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(CheckpointError::Locked { path }.into()),
            Err(TryLockError::Error(error)) => return Err(Error::io("lock", &path)(error)),
        }
        let mut text = Vec::new();
        file.read_to_end(&mut text).map_err(Error::io("read", &path))?;
        // A last line that was cut off by a kill is as if never written.
        let mut lines = text.split_inclusive(|&byte| byte == b'\n').filter(|line| line.ends_with(b"\n"));
        let is_same = lines.next().is_some_and(|line| line.trim_ascii() == plan.as_bytes());
        let mut finished = Self { path, file, hashes: HashMap::new() };
        if is_same {
            let known = lines.filter_map(|line| serde_json::from_slice::<Line>(line).ok());
            finished.hashes = known.map(|line| (line.name, line.hash)).collect();
        }
        // Written anew, so that nothing follows a line that was cut off.
        finished.file.set_len(0).map_err(Error::io("write", &finished.path))?;
        finished.append(&format!("{plan}\n"))?;
        let known: Vec<_> = finished.hashes.clone().into_iter().collect();
        finished.add(known)?;
        Ok(finished)
    }

    /// Checksum of a tensor that was finished.
    pub fn hash(&self, name: &str) -> Option<&str> {
        self.hashes.get(name).map(String::as_str)
    }

    /// Whether anything was finished.
    pub fn is_empty(&self) -> bool {
        self.hashes.is_empty()
    }

    /// Adds tensors that are on the disk.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn add(&mut self, tensors: impl IntoIterator<Item = (String, String)>) -> Result<()> {
        let lines = tensors
            .into_iter()
            .map(|(name, hash)| serde_json::to_string(&Line { name, hash }).expect("texts are plain data") + "\n");
        self.append(&lines.collect::<String>())
    }

    /// Removes the journal: the file is complete, or will never be.
    pub fn remove(self) {
        // What is left over costs some bytes, and the next export empties it.
        let _ = fs::remove_file(&self.path);
    }

    fn append(&mut self, text: &str) -> Result<()> {
        self.file.write_all(text.as_bytes()).map_err(Error::io("write", &self.path))?;
        self.file.sync_data().map_err(Error::io("sync", &self.path))
    }
}
