//! The `moeft-merge` command: arguments -> recipe -> plan -> run -> report. `moeft merge` of the Python package is the same.

#![forbid(unsafe_code)]

mod arguments;
mod bar;
mod help;
mod text;

use std::ffi::OsString;
use std::io::Write;
use std::num::NonZeroUsize;
use std::path::Path;

use clap::{CommandFactory, FromArgMatches};
use moeft_core::merge::{merge, outline, Options, Recipe};
use moeft_core::parallel::{threads, with_threads};
use moeft_core::{checkpoint::CheckpointError, Error};

use arguments::Arguments;
use bar::Bar;

/// Runs the command and returns its exit code.
///
/// # Arguments
/// * `name`: the command as it was called, for messages.
/// * `words`: what followed the name.
/// * `stop`: asked often; `true` stops the merge so that it can go on later.
pub fn run(name: &'static str, words: Vec<OsString>, stop: &mut dyn FnMut() -> bool) -> u8 {
    let command = Arguments::command().name(name).bin_name(name);
    let matches = command.clone().try_get_matches_from(std::iter::once(OsString::from(name)).chain(words));
    let arguments = match matches.and_then(|matches| Arguments::from_arg_matches(&matches)) {
        Ok(arguments) => arguments,
        Err(error) => {
            // A closed pipe is no reason to fail.
            let _ = error.print();
            return if error.use_stderr() { 2 } else { 0 };
        }
    };
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
                return exit_code(&error);
            }
        },
    };
    let mut output = std::io::stdout().lock();
    let _ = output.write_all(&printed).and_then(|()| output.flush());
    0
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
