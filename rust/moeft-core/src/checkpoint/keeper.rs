//! Brings what is written to the disk, and then the marks of it to the journal, while the work goes on.

use std::fs::File;
use std::path::PathBuf;
use std::sync::mpsc::{sync_channel, SyncSender, TrySendError};
use std::thread::{Scope, ScopedJoinHandle};

use super::journal::{Journal, Mark};
use crate::{Error, Result};

/// A file, and marks of what was written to it before.
#[derive(Debug)]
pub struct Kept {
    /// Another handle of the open file.
    pub file: File,
    /// Its path, for messages.
    pub path: PathBuf,
    /// True as soon as the file is on the disk.
    pub marks: Vec<Mark>,
}

/// A thread that syncs files and writes the journal, one after the other.
pub struct Keeper<'scope> {
    queue: SyncSender<Kept>,
    thread: ScopedJoinHandle<'scope, Result<()>>,
}

impl<'scope> Keeper<'scope> {
    /// Starts the thread.
    pub fn start<'env>(scope: &'scope Scope<'scope, 'env>, journal: &'env mut Journal) -> Self {
        // Without room in the queue an offer is taken by an idle thread or not at all.
        let (queue, arrived) = sync_channel::<Kept>(0);
        let thread = scope.spawn(move || {
            arrived.iter().try_for_each(|kept| {
                kept.file.sync_all().map_err(Error::io("sync", &kept.path))?;
                journal.add(&kept.marks)
            })
        });
        Self { queue, thread }
    }

    /// Hands marks over if the thread is idle; else they come back.
    pub fn offer(&self, kept: Kept) -> Option<Kept> {
        match self.queue.try_send(kept) {
            Ok(()) => None,
            Err(TrySendError::Full(kept) | TrySendError::Disconnected(kept)) => Some(kept),
        }
    }

    /// Hands marks over, after waiting for the thread; false if it stopped at an error.
    pub fn keep(&self, kept: Kept) -> bool {
        self.queue.send(kept).is_ok()
    }

    /// Waits until everything is kept.
    ///
    /// # Errors
    /// [`Error::Io`] of the first file or line that could not be brought to the disk.
    pub fn finish(self) -> Result<()> {
        drop(self.queue);
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}
