//! How long work tells its caller where it is, and how the caller stops it.

use crate::Result;

/// Receives the progress of long work.
pub trait Progress {
    /// Announces the number of bytes that will be processed in all; called once, before the first [`Self::advance`].
    fn start(&mut self, total_bytes: u64);

    /// Says that `bytes` more were processed, of the tensor or file `what`.
    ///
    /// # Errors
    /// An error stops the work cleanly; what is finished stays and the work can be resumed.
    fn advance(&mut self, bytes: u64, what: &str) -> Result<()>;
}

/// A [`Progress`] that nobody watches.
#[derive(Debug, Default, Clone, Copy)]
pub struct Silent;

impl Progress for Silent {
    fn start(&mut self, _total_bytes: u64) {}

    fn advance(&mut self, _bytes: u64, _what: &str) -> Result<()> {
        Ok(())
    }
}
