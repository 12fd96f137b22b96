//! `moeft-merge`: the command on its own.

#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

fn main() -> ExitCode {
    let stopped = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        if !is_ignored(signal) {
            // Without a handler the process dies at once, and what is finished is kept all the same.
            let _ = signal_hook::flag::register(signal, Arc::clone(&stopped));
        }
    }
    let words = std::env::args_os().skip(1).collect();
    moeft_merge::run("moeft-merge", words, false, &mut || stopped.load(Ordering::Relaxed)).code.into()
}

/// Whether who started the process wants it to ignore a signal, as nohup does. Known on Linux alone.
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}
