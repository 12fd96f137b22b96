//! Builds an output folder beside its final name: locked, journalled, resumable, published by one rename.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::fingerprint::hex;
use super::journal::{Entry, Journal};
use super::{checksum, Checkpoint, CheckpointError};
use crate::progress::Progress;
use crate::{Error, Result};

/// Folder inside the stage that holds lock and journal. Hidden, so that no tool takes it for part of the model.
const PRIVATE: &str = ".moeft";

/// Hash of a resolved plan and of the state of its inputs: size, time of change and header of every file.
///
/// # Errors
/// [`Error::Io`] if an input cannot be read.
pub fn plan_hash<'a>(plan: &impl Serialize, inputs: impl IntoIterator<Item = &'a Checkpoint>) -> Result<String> {
    let mut hash = Sha256::new();
    hash.update(serde_json::to_vec(plan).expect("plans are plain data"));
    for shard in inputs.into_iter().flat_map(|input| &input.shards) {
        let (bytes, modified) = shard.stat()?;
        let age = modified.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        hash.update(format!("\n{} {bytes} {} ", shard.name, age.as_nanos()));
        hash.update(Sha256::digest(&shard.header.raw));
    }
    Ok(hex(&hash.finalize()))
}

/// A folder `OUT.partial` that becomes `OUT`.
#[derive(Debug)]
pub struct Stage {
    out: PathBuf,
    folder: PathBuf,
    journal: Journal,
    finished: HashMap<String, Entry>,
    // Held until the stage is dropped; the system releases it when the process dies.
    _lock: File,
}

impl Stage {
    /// Opens or resumes the stage of `out`.
    ///
    /// # Errors
    /// [`CheckpointError::OutputExists`], [`CheckpointError::Locked`], [`CheckpointError::PlanChanged`], [`Error::Io`].
    pub fn open(out: &Path, plan: &str) -> Result<Self> {
        check_output(out)?;
        let folder = partial_path(out)?;
        let owned = folder.join(PRIVATE);
        let foreign = folder.exists() && !owned.exists() && !is_empty(&folder)?;
        if foreign {
            return Err(CheckpointError::PlanChanged { path: folder }.into());
        }
        fs::create_dir_all(&owned).map_err(Error::io("create", &owned))?;
        let lock_path = owned.join("lock");
        let lock = File::create(&lock_path).map_err(Error::io("create", &lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Err(CheckpointError::Locked { path: folder }.into()),
            Err(fs::TryLockError::Error(error)) => return Err(Error::io("lock", &lock_path)(error)),
        }
        let journal_path = owned.join("journal.jsonl");
        let recorded = Journal::read(&journal_path)?;
        if recorded.plan.as_deref().is_some_and(|earlier| earlier != plan) {
            return Err(CheckpointError::PlanChanged { path: folder }.into());
        }
        let journal = Journal::start(&journal_path, plan, recorded.entries.values().cloned())?;
        Ok(Self { out: out.into(), folder, journal, finished: recorded.entries, _lock: lock })
    }

    /// Where the file `name` is to be written.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Whether an earlier run finished this file.
    pub fn is_finished(&self, name: &str) -> bool {
        self.finished.contains_key(name)
    }

    /// Makes sure that the disk can take `bytes` more, after removing the unfinished files among `names`.
    ///
    /// # Errors
    /// [`CheckpointError::NoSpace`], [`Error::Io`].
    pub fn reserve<'a>(&self, names: impl IntoIterator<Item = &'a str>, needed: u64) -> Result<()> {
        for name in names {
            let path = self.path(name);
            if !self.is_finished(name) && path.exists() {
                fs::remove_file(&path).map_err(Error::io("remove", &path))?;
            }
        }
        let available = free_bytes(&self.folder)?;
        if available < needed {
            return Err(CheckpointError::NoSpace { path: self.folder.clone(), needed, available }.into());
        }
        Ok(())
    }

    /// Checks that a finished file is still what was written, and returns its part of the report.
    ///
    /// # Errors
    /// [`CheckpointError::ShardChanged`]; what `progress` returns.
    ///
    /// # Panics
    /// If the file is not finished: our own mistake.
    pub fn verify(&self, name: &str, progress: &mut dyn Progress) -> Result<Value> {
        let (entry, path) = (&self.finished[name], self.path(name));
        match checksum(&path, progress) {
            Ok(found) if found == entry.checksum => Ok(entry.report.clone()),
            Err(Error::Interrupted) => Err(Error::Interrupted),
            Ok(_) | Err(_) => Err(CheckpointError::ShardChanged { path, folder: self.folder.clone() }.into()),
        }
    }

    /// Records that a file is complete on disk.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn record(&mut self, name: &str, checksum: String, report: &impl Serialize) -> Result<()> {
        let report = serde_json::to_value(report).expect("reports are plain data");
        self.journal.add(&Entry { shard: name.into(), checksum, report })
    }

    /// Gives the folder its final name.
    ///
    /// # Errors
    /// [`Error::Io`]; nothing is under the final name then.
    pub fn publish(self) -> Result<()> {
        sync_folder(&self.folder)?;
        fs::rename(&self.folder, &self.out).map_err(Error::io("rename", &self.folder))?;
        let parent = self.out.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        sync_folder(parent)?;
        let owned = self.out.join(PRIVATE);
        fs::remove_dir_all(&owned).map_err(Error::io("remove", &owned))
    }
}

/// Refuses an output that exists and is not an empty folder.
///
/// # Errors
/// [`CheckpointError::OutputExists`], [`CheckpointError::OutputUnnamed`].
pub fn check_output(out: &Path) -> Result<()> {
    partial_path(out)?;
    match fs::symlink_metadata(out) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::io("read", out)(error)),
        Ok(metadata) if metadata.is_dir() && is_empty(out)? => Ok(()),
        Ok(_) => Err(CheckpointError::OutputExists { path: out.into() }.into()),
    }
}

fn partial_path(out: &Path) -> Result<PathBuf> {
    let name = out.file_name().ok_or_else(|| CheckpointError::OutputUnnamed { path: out.into() })?;
    let mut name = name.to_os_string();
    name.push(".partial");
    Ok(out.with_file_name(name))
}

fn is_empty(folder: &Path) -> Result<bool> {
    let mut entries = fs::read_dir(folder).map_err(Error::io("list", folder))?;
    Ok(entries.next().is_none())
}

/// Brings the names inside a folder to the disk.
pub(super) fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|handle| handle.sync_all()).map_err(Error::io("sync", folder))
}

/// Free bytes for ordinary users on the disk of `folder`.
fn free_bytes(folder: &Path) -> Result<u64> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(folder.as_os_str().as_bytes())
        .map_err(|error| Error::io("read", folder)(error.into()))?;
    let mut stats = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: `path` ends in NUL and `stats` is large enough for the call to fill.
    if unsafe { libc::statvfs(path.as_ptr(), stats.as_mut_ptr()) } != 0 {
        return Err(Error::io("read", folder)(std::io::Error::last_os_error()));
    }
    // SAFETY: the call returned 0, so it filled `stats`.
    let stats = unsafe { stats.assume_init() };
    Ok(stats.f_bavail as u64 * stats.f_frsize as u64)
}
