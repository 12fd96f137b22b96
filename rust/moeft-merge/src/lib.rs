//! The `moeft-merge` command: arguments -> recipe -> plan -> run -> report. `moeft merge` of the Python package is the same.

#![forbid(unsafe_code)]

mod arguments;
mod bar;
mod help;
mod text;

use std::ffi::OsString;
use std::io::Write;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use clap::{CommandFactory, FromArgMatches};
use moeft_core::merge::{merge, outline, Options, Recipe, MANIFEST};
use moeft_core::parallel::{threads, with_threads};
use moeft_core::{checkpoint::CheckpointError, Error};

use arguments::Arguments;
use bar::Bar;

/// What the command did.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Its exit code.
    pub code: u8,
    /// What the caller is asked to verify.
    pub verify: Option<Verify>,
}

/// A merge that is to be verified.
#[derive(Debug)]
pub struct Verify {
    /// Recipe file.
    pub recipe: PathBuf,
    /// Folder of the merged checkpoint.
    pub out: PathBuf,
    /// Whether the answer is to be JSON.
    pub json: bool,
}

/// Runs the command.
///
/// # Arguments
/// * `name`: the command as it was called, for messages.
/// * `words`: what followed the name.
/// * `can_verify`: whether the caller does what [`Outcome::verify`] asks for.
/// * `stop`: asked often; `true` stops the merge so that it can go on later.
pub fn run(name: &'static str, words: Vec<OsString>, can_verify: bool, stop: &mut dyn FnMut() -> bool) -> Outcome {
    let failed = |code| Outcome { code, verify: None };
    let command = Arguments::command().name(name).bin_name(name);
    let matches = command.clone().try_get_matches_from(std::iter::once(OsString::from(name)).chain(words));
    let arguments = match matches.and_then(|matches| Arguments::from_arg_matches(&matches)) {
        Ok(arguments) => arguments,
        Err(error) => {
            // A closed pipe is no reason to fail.
            let _ = error.print();
            return failed(if error.use_stderr() { 2 } else { 0 });
        }
    };
    if arguments.verify && !can_verify {
        eprintln!(
            "{name}: --verify runs the models, which needs the Python package: moeft merge RECIPE --out DIR --verify"
        );
        return failed(2);
    }
    let printed = match (arguments.completions, arguments.man) {
        (Some(shell), _) => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut command.clone(), name, &mut script);
            script
        }
        (None, true) => {
            let mut page = Vec::new();
            clap_mangen::Man::new(command.clone()).render(&mut page).expect("a vector takes every byte");
            page
        }
        (None, false) => match act(&arguments, stop) {
            Ok(text) => format!("{text}\n").into_bytes(),
            Err(error) => {
                eprintln!("{name}: {error}");
                return failed(exit_code(&error));
            }
        },
    };
    let mut output = std::io::stdout().lock();
    match output.write_all(&printed).and_then(|()| output.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            eprintln!("{name}: {}", Error::io("write", "standard output")(error));
            return failed(3);
        }
        // Who closed the pipe has read what it wanted.
        _ => {}
    }
    let verify = match (arguments.recipe, arguments.out) {
        (Some(recipe), Some(out)) if arguments.verify => Some(Verify { recipe, out, json: arguments.json }),
        _ => None,
    };
    Outcome { code: 0, verify }
}

/// Merges, or plans to, and returns what is to be printed.
fn act(arguments: &Arguments, stop: &mut dyn FnMut() -> bool) -> Result<String, Error> {
    let path = arguments.recipe.as_deref().expect("clap asked for it");
    let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
    let recipe = Recipe::parse(&text, path.parent().unwrap_or(Path::new("")))?;
    let options = Options { max_shard_bytes: arguments.max_shard_size };
    let count = arguments.threads.or(NonZeroUsize::new(threads())).expect("there is a thread");
    with_threads(count, || {
        if arguments.dry_run {
            let outline = outline(recipe, options)?;
            return Ok(if arguments.json { serde_json::json!(outline).to_string() } else { text::outline(&outline) });
        }
        let out = arguments.out.as_deref().expect("clap asked for it");
        if arguments.verify && out.join(MANIFEST).is_file() {
            let (path, found) = (out.display().to_string(), "merged before");
            let json = || serde_json::json!({"out": path, "found": found}).to_string();
            return Ok(if arguments.json { json() } else { format!("{path} was {found}") });
        }
        let report = merge(recipe, out, options, &mut Bar::new(!arguments.quiet, stop))?;
        Ok(if arguments.json { serde_json::json!(report).to_string() } else { text::report(&report) })
    })
}

fn exit_code(error: &Error) -> u8 {
    match error {
        Error::Recipe(_) | Error::InvalidArgument { .. } => 2,
        Error::Io { .. } | Error::Checkpoint(CheckpointError::NoSpace { .. }) => 3,
        Error::Interrupted => 130,
        _ => 1,
    }
}
