//! The progress bar, on standard error.

use indicatif::{ProgressBar, ProgressStyle};
use moeft_core::progress::Progress;
use moeft_core::Result;

/// Bytes done, speed, time left, and the tensor at hand.
pub struct Bar(ProgressBar);

impl Bar {
    /// An empty bar; it draws itself only on a terminal.
    pub fn new() -> Self {
        let template = "{bar:32} {bytes}/{total_bytes} {bytes_per_sec} {eta} {wide_msg}";
        let style = ProgressStyle::with_template(template).expect("a constant template");
        Self(ProgressBar::new(0).with_style(style))
    }
}

impl Progress for Bar {
    fn start(&mut self, total_bytes: u64) {
        self.0.set_length(total_bytes);
    }

    fn advance(&mut self, bytes: u64, what: &str) -> Result<()> {
        self.0.inc(bytes);
        self.0.set_message(what.to_string());
        Ok(())
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
