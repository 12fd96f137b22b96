//! `moeft-merge`: the command on its own.

#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

/// Set by Ctrl-C and by the signals that end a process.
static STOPPED: AtomicBool = AtomicBool::new(false);

fn main() -> ExitCode {
    // Without a handler the process dies at once, and what is finished is kept all the same.
    let _ = ctrlc::set_handler(|| STOPPED.store(true, Ordering::Relaxed));
    let words = std::env::args_os().skip(1).collect();
    moeft_merge::run("moeft-merge", words, false, &mut || STOPPED.load(Ordering::Relaxed)).code.into()
}
