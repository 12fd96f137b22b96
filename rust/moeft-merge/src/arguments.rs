//! What the command takes.

use std::path::PathBuf;

use clap::builder::Styles;
use clap::Parser;

/// Merge models and LoRA adapters into one checkpoint, in bounded memory.
///
/// Writes to DIR.partial and renames it when everything is on the disk. Start the same command again after an
/// interruption, and it goes on where it was. Inputs are never changed, an output is never overwritten.
#[derive(Debug, Parser)]
#[command(version, after_help = crate::help::SHORT, after_long_help = crate::help::long(), styles = Styles::plain())]
pub struct Arguments {
    /// Recipe, YAML or JSON; relative paths in it start at its folder.
    #[arg(required_unless_present_any = ["completions", "man"])]
    pub recipe: Option<PathBuf>,
    /// Folder to write; must not exist or be empty.
    #[arg(long, value_name = "DIR", required_unless_present_any = ["dry_run", "completions", "man"])]
    pub out: Option<PathBuf>,
    /// Open and check all inputs, print what would be done, and stop.
    #[arg(long)]
    pub dry_run: bool,
    /// Print the whole report, or plan, as JSON on standard output.
    #[arg(long)]
    pub json: bool,
    /// Show no progress bar.
    #[arg(long)]
    pub quiet: bool,
    /// Threads that read and compute; as many as there are cores if not given. The output does not depend on it.
    #[arg(long, value_name = "N")]
    pub threads: Option<std::num::NonZeroUsize>,
    /// Cut the output into files of at most this size: 5GB, 512MiB, or bytes. The files of the base if not given.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub max_shard_size: Option<u64>,
    /// Afterwards, compute tensors and logits of the merge once more with PyTorch, and fail where they differ by more than
    /// rounding explains. A finished DIR is verified as it is. Only `moeft merge` of the Python package can.
    #[arg(long, conflicts_with = "dry_run")]
    pub verify: bool,
    /// Print a completion script for this shell and stop.
    #[arg(long, value_name = "SHELL", exclusive = true)]
    pub completions: Option<clap_complete::Shell>,
    /// Print the manual page and stop.
    #[arg(long, exclusive = true)]
    pub man: bool,
}

/// A number of bytes with an optional unit.
fn size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" | "B" => 1,
        "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "KIB" => 1 << 10,
        "MIB" => 1 << 20,
        "GIB" => 1 << 30,
        _ => return Err("the unit must be B, KB, MB, GB, KiB, MiB or GiB".into()),
    };
    let number: f64 = digits.trim().parse().map_err(|_| "expected a number and a unit, such as 5GB".to_string())?;
    match number * f64::from(unit) {
        bytes if (1.0..1e18).contains(&bytes) => Ok(bytes as u64),
        _ => Err("expected at least one byte".into()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(size("5GB"), Ok(5_000_000_000));
        assert_eq!(size("1.5 MiB"), Ok(3 << 19));
        assert_eq!(size("700"), Ok(700));
        for wrong in ["", "GB", "0", "5 apples", "-1GB", "1e30GB"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }
}
