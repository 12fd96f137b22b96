//! `moeft-merge`: arguments -> recipe -> plan -> run -> report.

#![forbid(unsafe_code)]

mod bar;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use moeft_core::merge::{merge, BaseCheck, MergeReport, Recipe};
use moeft_core::progress::{Progress, Silent};
use moeft_core::Error;

/// Merge LoRA adapters into a Mixture-of-Experts checkpoint, in bounded memory.
///
/// Writes to DIR.partial and renames it when everything is on the disk. Start the same command again after an
/// interruption, and it goes on where it was.
///
/// Exit codes: 0 merged; 1 the inputs cannot be merged; 2 wrong arguments or recipe; 3 a file cannot be read or written.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Recipe, YAML or JSON; relative paths in it start at its folder.
    recipe: PathBuf,
    /// Folder to write; must not exist or be empty.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Print the whole report as JSON on standard output.
    #[arg(long)]
    json: bool,
    /// Show no progress bar.
    #[arg(long)]
    quiet: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(report) if arguments.json => println!("{}", serde_json::json!(report)),
        Ok(report) => print_text(&report),
        Err(error) => {
            eprintln!("moeft-merge: {error}");
            return ExitCode::from(exit_code(&error));
        }
    }
    ExitCode::SUCCESS
}

fn run(arguments: &Arguments) -> Result<MergeReport, Error> {
    let text = std::fs::read_to_string(&arguments.recipe).map_err(Error::io("read", &arguments.recipe))?;
    let recipe = Recipe::parse(&text, arguments.recipe.parent().unwrap_or(Path::new("")))?;
    let mut progress: Box<dyn Progress> = if arguments.quiet { Box::new(Silent) } else { Box::new(bar::Bar::new()) };
    merge(recipe, &arguments.out, progress.as_mut())
}

fn exit_code(error: &Error) -> u8 {
    match error {
        Error::Recipe(_) | Error::InvalidArgument { .. } => 2,
        Error::Io { .. } => 3,
        _ => 1,
    }
}

fn print_text(report: &MergeReport) {
    let resumed = match report.shards_resumed {
        0 => String::new(),
        count => format!(" ({count} files from an interrupted run)"),
    };
    let gigabytes = report.bytes as f64 / 1e9;
    println!("wrote {}: {gigabytes:.3} GB in {:.1} s{resumed}", report.out.display(), report.seconds);
    println!("tensors: {} merged, {} copied byte for byte", report.tensors_merged, report.tensors_copied);
    let largest = report.merged.iter().max_by(|left, right| left.1.max_delta.total_cmp(&right.1.max_delta));
    if let Some((name, extremes)) = largest {
        println!(
            "largest change: {:.3e} in {name}, whose largest weight is {:.3e}",
            extremes.max_delta, extremes.max_weight
        );
    }
    let check = match report.base_check {
        BaseCheck::Verified => "verified: every adapter was trained on this base",
        BaseCheck::Unverified => "unverified: an adapter carries no fingerprint; names and shapes fit",
    };
    println!("base: {check} ({})", report.base_fingerprint);
}
