//! The list of what an interrupted run had written.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use xxhash_rust::xxh3::xxh3_64;

use crate::{Error, Result};

/// Hexadecimal digits of a line's checksum, and the space behind them.
const SUM_BYTES: usize = 17;

/// The first bytes of a tensor, which are on the disk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Mark {
    /// File name.
    pub file: String,
    /// Name of the tensor.
    pub tensor: String,
    /// How many bytes.
    pub bytes: u64,
    /// Their checksum: XXH3, 128 bits, hexadecimal.
    pub digest: String,
    /// What the work has to know to go on behind them.
    pub state: Value,
}

#[derive(Serialize, Deserialize)]
struct Start {
    plan: String,
}

/// Marks by file and tensor.
pub type Marks = HashMap<String, HashMap<String, Mark>>;

/// An append-only file: the plan's hash, then lists of marks, each line behind its checksum.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
}

/// What a journal on disk says.
#[derive(Debug, Default)]
pub struct Recorded {
    /// Hash of the plan; `None` if there is no journal, or its first line is damaged or was never finished.
    pub plan: Option<String>,
    /// The last mark of every tensor.
    pub marks: Marks,
}

impl Journal {
    /// What the journal at `path` says. A line that is damaged, or cut off by a kill, is as if never written; without the
    /// first one nobody knows what the others are about.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn read(path: &Path) -> Result<Recorded> {
        if !path.exists() {
            return Ok(Recorded::default());
        }
        let text = std::fs::read(path).map_err(Error::io("read", path))?;
        let mut lines = text.split_inclusive(|&byte| byte == b'\n');
        let Some(Start { plan }) = lines.next().and_then(parse) else { return Ok(Recorded::default()) };
        let mut marks = Marks::new();
        for mark in lines.filter_map(parse::<Vec<Mark>>).flatten() {
            marks.entry(mark.file.clone()).or_default().insert(mark.tensor.clone(), mark);
        }
        Ok(Recorded { plan: Some(plan), marks })
    }

    /// Writes the journal anew, with the plan and what is known, and keeps it open.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn start(path: &Path, plan: &str, marks: &Marks) -> Result<Self> {
        let fresh = path.with_extension("new");
        let file = OpenOptions::new().create(true).truncate(true).write(true).open(&fresh);
        let mut journal = Self { path: fresh.clone(), file: file.map_err(Error::io("create", &fresh))? };
        journal.line(&Start { plan: plan.to_string() })?;
        for marks in marks.values() {
            journal.line(&marks.values().collect::<Vec<_>>())?;
        }
        std::fs::rename(&fresh, path).map_err(Error::io("rename", &fresh))?;
        journal.path = path.into();
        Ok(journal)
    }

    /// Adds what is on the disk by now.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn add(&mut self, marks: &[Mark]) -> Result<()> {
        self.line(&marks)
    }

    fn line(&mut self, value: &impl Serialize) -> Result<()> {
        let json = serde_json::to_vec(value).expect("plain data always serializes");
        let mut line = format!("{:016x} ", xxh3_64(&json)).into_bytes();
        line.extend(json);
        line.push(b'\n');
        self.file.write_all(&line).map_err(Error::io("write", &self.path))?;
        self.file.sync_data().map_err(Error::io("sync", &self.path))
    }
}

/// What a whole, undamaged line says.
fn parse<T: DeserializeOwned>(line: &[u8]) -> Option<T> {
    let (sum, json) = line.strip_suffix(b"\n")?.split_at_checked(SUM_BYTES)?;
    (sum == format!("{:016x} ", xxh3_64(json)).as_bytes()).then(|| serde_json::from_slice(json).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(tensor: &str, bytes: u64) -> Mark {
        Mark { file: "a".into(), tensor: tensor.into(), bytes, digest: format!("{bytes:032x}"), state: 7.into() }
    }

    /// A journal of three lists, and its bytes.
    fn written(path: &Path) -> Vec<u8> {
        let mut journal = Journal::start(path, "plan", &Marks::new()).unwrap();
        for marks in [vec![mark("x", 1)], vec![mark("x", 2), mark("y", 3)], vec![mark("y", 4)]] {
            journal.add(&marks).unwrap();
        }
        std::fs::read(path).unwrap()
    }

    fn lengths(recorded: &Recorded) -> [Option<u64>; 2] {
        ["x", "y"].map(|name| Some(recorded.marks.get("a")?.get(name)?.bytes))
    }

    #[test]
    fn a_journal_cut_anywhere_says_what_its_whole_lines_say() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        let whole = written(&path);
        let known = [[None, None], [Some(1), None], [Some(2), Some(3)], [Some(2), Some(4)]];
        for len in 0..=whole.len() {
            std::fs::write(&path, &whole[..len]).unwrap();
            let found = Journal::read(&path).unwrap();
            let lines = whole[..len].iter().filter(|&&byte| byte == b'\n').count();
            assert_eq!(found.plan.is_some(), lines > 0);
            assert_eq!(lengths(&found), known[lines.saturating_sub(1)], "{len} bytes");
        }
    }

    #[test]
    fn a_flipped_bit_costs_its_line_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        let whole = written(&path);
        for place in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[place] ^= 1;
            std::fs::write(&path, &damaged).unwrap();
            let found = Journal::read(&path).unwrap();
            let line = whole[..place].iter().filter(|&&byte| byte == b'\n').count();
            // A lost line end takes the line behind it along.
            let expected = match (line, whole[place] == b'\n') {
                (0, _) => [None, None],
                (1, false) => [Some(2), Some(4)],
                (1, true) => [None, Some(4)],
                (2, false) => [Some(1), Some(4)],
                (2, true) => [Some(1), None],
                _ => [Some(2), Some(3)],
            };
            assert_eq!(lengths(&found), expected, "byte {place}");
        }
    }
}
