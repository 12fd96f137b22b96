//! The list of what an interrupted run had finished.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Error, Result};

/// A finished file: its checksum and what the report says about it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Entry {
    /// File name.
    pub shard: String,
    /// Checksum, see [`super::writer::checksum`].
    pub checksum: String,
    /// The part of the report that was computed with this file.
    pub report: Value,
}

#[derive(Serialize, Deserialize)]
struct Start {
    plan: String,
}

/// An append-only file: the plan's hash, then one line per finished file.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
}

/// What a journal on disk says.
#[derive(Debug, Default)]
pub struct Recorded {
    /// Hash of the plan; `None` if there is no journal, or it was killed before its first line.
    pub plan: Option<String>,
    /// Finished files by name.
    pub entries: HashMap<String, Entry>,
}

impl Journal {
    /// What the journal at `path` says. A last line that was cut off by a kill is as if never written.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn read(path: &Path) -> Result<Recorded> {
        if !path.exists() {
            return Ok(Recorded::default());
        }
        let text = std::fs::read(path).map_err(Error::io("read", path))?;
        let mut lines = text.split_inclusive(|&byte| byte == b'\n').filter(|line| line.ends_with(b"\n"));
        let plan = lines.next().and_then(|line| serde_json::from_slice::<Start>(line).ok()).map(|start| start.plan);
        let entries = lines.filter_map(|line| serde_json::from_slice::<Entry>(line).ok());
        Ok(Recorded { plan, entries: entries.map(|entry| (entry.shard.clone(), entry)).collect() })
    }

    /// Writes the journal anew, with the plan and what is finished, and keeps it open.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn start(path: &Path, plan: &str, entries: impl IntoIterator<Item = Entry>) -> Result<Self> {
        let fresh = path.with_extension("new");
        let file = OpenOptions::new().create(true).truncate(true).write(true).open(&fresh);
        let mut journal = Self { path: fresh.clone(), file: file.map_err(Error::io("create", &fresh))? };
        journal.line(&Start { plan: plan.to_string() })?;
        for entry in entries {
            journal.line(&entry)?;
        }
        std::fs::rename(&fresh, path).map_err(Error::io("rename", &fresh))?;
        journal.path = path.into();
        Ok(journal)
    }

    /// Adds a finished file.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn add(&mut self, entry: &Entry) -> Result<()> {
        self.line(entry)
    }

    fn line(&mut self, value: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(value).expect("strings always serialize");
        line.push(b'\n');
        self.file.write_all(&line).map_err(Error::io("write", &self.path))?;
        self.file.sync_data().map_err(Error::io("sync", &self.path))
    }
}
