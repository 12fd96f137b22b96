//! The progress bar, on standard error.

use indicatif::{ProgressBar, ProgressStyle};
use moeft_core::progress::Progress;
use moeft_core::{Error, Result};

/// Bytes done, speed, time left, and the tensor at hand; stops when it is told to.
pub struct Bar<'a> {
    bar: ProgressBar,
    stop: &'a mut dyn FnMut() -> bool,
}

impl<'a> Bar<'a> {
    /// An empty bar; it draws itself only on a terminal.
    pub fn new(is_shown: bool, stop: &'a mut dyn FnMut() -> bool) -> Self {
        let template = "{bar:32} {bytes}/{total_bytes} {bytes_per_sec} {eta} {wide_msg}";
        let style = ProgressStyle::with_template(template).expect("a constant template");
        let bar = if is_shown { ProgressBar::new(0) } else { ProgressBar::hidden() };
        Self { bar: bar.with_style(style), stop }
    }
}

impl Progress for Bar<'_> {
    fn start(&mut self, total_bytes: u64) {
        self.bar.set_length(total_bytes);
    }

    fn advance(&mut self, bytes: u64, what: &str) -> Result<()> {
        self.bar.inc(bytes);
        if !self.bar.is_hidden() {
            self.bar.set_message(what.to_string());
        }
        if (self.stop)() {
            return Err(Error::Interrupted);
        }
        Ok(())
    }
}

impl Drop for Bar<'_> {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
