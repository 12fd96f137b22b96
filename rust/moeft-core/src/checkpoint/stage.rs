//! Builds an output folder beside its final name: locked, journalled, resumable, published by one rename.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde::Serialize;
use sha2::{Digest, Sha256};

use super::disk::{free_bytes, is_empty, sync_folder};
use super::fingerprint::hex;
use super::journal::{Journal, Marks};
use super::keeper::Keeper;
use super::staged_file::StagedFile;
use super::{Checkpoint, CheckpointError, Header};
use crate::progress::Progress;
use crate::{Error, Result};

/// Folder inside the stage that holds lock and journal. Hidden, so that no tool takes it for part of the model.
const PRIVATE: &str = ".moeft";

/// Hash of a resolved plan, of the state of its inputs (size, time of change and header of every file), and of the
/// version of this crate.
///
/// # Errors
/// [`Error::Io`] if an input cannot be read.
pub fn plan_hash<'a>(plan: &impl Serialize, inputs: impl IntoIterator<Item = &'a Checkpoint>) -> Result<String> {
    let mut hash = Sha256::new();
    hash.update(env!("CARGO_PKG_VERSION"));
    hash.update(serde_json::to_vec(plan).expect("plans are plain data"));
    for shard in inputs.into_iter().flat_map(|input| &input.shards) {
        let (bytes, modified) = shard.stat()?;
        let age = modified.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        hash.update(format!("\n{} {bytes} {} ", shard.name, age.as_nanos()));
        hash.update(Sha256::digest(&shard.header.raw));
    }
    Ok(hex(&hash.finalize()))
}

/// Written bytes are brought to the disk and journalled about so many times in a run, so a kill costs little of it.
const KEEPS: u64 = 32;
/// But not in smaller steps than this, and not in larger ones.
const KEEP_BYTES: (u64, u64) = (1 << 20, 64 << 20);

/// What [`Stage::write_files`] did.
#[derive(Debug, Default)]
pub struct Written {
    /// Checksum of each file, by name.
    pub checksums: BTreeMap<String, String>,
    /// Files that an earlier run had finished.
    pub shards_resumed: u64,
    /// Bytes of tensors that an earlier run had written.
    pub bytes_resumed: u64,
}

/// A folder `OUT.partial` that becomes `OUT`.
#[derive(Debug)]
pub struct Stage {
    out: PathBuf,
    folder: PathBuf,
    journal: Journal,
    marks: Marks,
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
        let journal = Journal::start(&journal_path, plan, &recorded.marks)?;
        Ok(Self { out: out.into(), folder, journal, marks: recorded.marks, _lock: lock })
    }

    /// Where the file `name` is to be written.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Writes what an earlier run did not write, after checking what it did.
    ///
    /// # Arguments
    /// * `files`: name and header of each.
    /// * `write`: fills what is not filled of one file, marking the places from which it could go on. It is called for
    ///   every file, finished ones included.
    ///
    /// # Errors
    /// [`CheckpointError::NoSpace`] before the first byte; [`Error::Io`]; what `write` and `progress` return. What was
    /// marked before the error is kept.
    pub fn write_files(
        &mut self,
        files: Vec<(String, Header)>,
        progress: &mut dyn Progress,
        mut write: impl FnMut(&str, &mut StagedFile<'_>, &mut dyn Progress) -> Result<()>,
    ) -> Result<Written> {
        self.reserve(&files)?;
        let total = files.iter().flat_map(|(_, header)| &header.tensors).map(|tensor| tensor.bytes).sum::<u64>();
        progress.start(total);
        let keep_every = (total / KEEPS).clamp(KEEP_BYTES.0, KEEP_BYTES.1);
        let Self { folder, journal, marks, .. } = self;
        std::thread::scope(|scope| {
            let keeper = Keeper::start(scope, journal);
            let written = files.into_iter().try_fold(Written::default(), |mut written, (name, header)| {
                let path = folder.join(&name);
                let mut file = StagedFile::open(&path, header, marks.get(&name), &keeper, keep_every, progress)?;
                written.bytes_resumed += file.resumed();
                written.shards_resumed += u64::from(file.resumed() > 0 && file.is_full());
                let result = write(&name, &mut file, progress);
                let is_kept = file.keep()?;
                result?;
                if is_kept {
                    written.checksums.insert(name, file.checksum());
                    Ok(written)
                } else {
                    Err(Error::Interrupted)
                }
            });
            // An error of the keeper is the cause of the other, if there are two.
            keeper.finish()?;
            written
        })
    }

    /// Makes sure that the disk can take what is missing, after removing what no mark speaks of.
    fn reserve(&self, files: &[(String, Header)]) -> Result<()> {
        let mut needed = 0;
        for (name, header) in files {
            let path = self.path(name);
            let marked = self.marks.get(name).filter(|_| path.exists());
            if marked.is_none() && path.exists() {
                fs::remove_file(&path).map_err(Error::io("remove", &path))?;
            }
            let there = marked.into_iter().flat_map(|marks| marks.values()).map(|mark| mark.bytes).sum();
            needed += header.file_bytes().saturating_sub(there);
        }
        let available = free_bytes(&self.folder)?;
        if available < needed {
            return Err(CheckpointError::NoSpace { path: self.folder.clone(), needed, available }.into());
        }
        Ok(())
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

/// Refuses an output inside of the folder it is made from: what stands beside the weights is copied, and would be without end.
///
/// # Errors
/// [`Error::InvalidArgument`]; also as [`check_output`].
pub fn check_output_of(source: &Path, out: &Path) -> Result<()> {
    check_output(out)?;
    // A folder that does not exist yet lies where its nearest ancestor does.
    let absolute = std::path::absolute(out).map_err(Error::io("find", out))?;
    let existing = absolute.ancestors().find_map(|folder| folder.canonicalize().ok());
    match (source.canonicalize(), existing) {
        (Ok(source), Some(folder)) if folder.starts_with(&source) => {
            let expected = format!("a folder outside of {}, which it is made from", source.display());
            Err(Error::invalid("out", out.display(), expected))
        }
        _ => Ok(()),
    }
}

fn partial_path(out: &Path) -> Result<PathBuf> {
    let name = out.file_name().ok_or_else(|| CheckpointError::OutputUnnamed { path: out.into() })?;
    let mut name = name.to_os_string();
    name.push(".partial");
    Ok(out.with_file_name(name))
}
