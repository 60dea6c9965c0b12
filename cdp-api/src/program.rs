//! What `cdpctl` and `cdp-restore` do first and last: read the command line, write results, report failures.
//!
//! Standard output takes results. With `--output-format json` it gets exactly one JSON document, whatever happens: the
//! result, or `{"error": …}` ([`Failure`]). Standard error takes what people read; when it cannot be written to, that
//! is no reason to fail.

use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;
use serde::Serialize;

use crate::problem::Problem;
use crate::types::ResolvedPoint;

/// Exit code of whatever has no code of its own.
pub const FAILED: u8 = 1;
/// Exit code of a command line that is wrong.
pub const USAGE: u8 = 2;
/// Exit code when the reader of standard output went away: what a shell shows for a program that SIGPIPE ended.
pub const READER_GONE: u8 = 141;

/// A failure for programs: the content of `{"error": …}`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Failure<'a> {
    /// What went wrong, for programs to match on: of a problem its kind, else a name of the program's own.
    pub kind: &'a str,
    /// What went wrong, for people.
    pub detail: String,
    /// What to do next; may be empty.
    pub hint: &'a str,
    /// What state was left, where something was begun.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<&'a str>,
    /// For a point that cannot be restored: the nearest good one before it.
    pub before: Option<&'a ResolvedPoint>,
    /// For a point that cannot be restored: the nearest good one after it.
    pub after: Option<&'a ResolvedPoint>,
}

impl<'a> Failure<'a> {
    /// A failure without points or state.
    #[must_use]
    pub fn new(kind: &'a str, detail: impl Into<String>, hint: &'a str) -> Self {
        Self { kind, detail: detail.into(), hint, state: None, before: None, after: None }
    }

    /// The same failure with the points of a problem.
    #[must_use]
    pub fn near(self, problem: &'a Problem) -> Self {
        Self { before: problem.before.as_ref(), after: problem.after.as_ref(), ..self }
    }

    /// The document for standard output. It cannot be written in a way that anybody would notice, so a failure of that
    /// is left out.
    pub fn print_json(&self) {
        let document = serde_json::json!({ "error": self });
        let _ = print(&format!("{document:#}\n"));
    }
}

/// Reads the command line.
///
/// # Errors
/// The exit code, after saying what is wrong: [`USAGE`]; 0 after `--help` and `--version`.
pub fn parse<P: Parser>() -> Result<P, ExitCode> {
    let error = match P::try_parse() {
        Ok(parsed) => return Ok(parsed),
        Err(error) => error,
    };
    if !error.use_stderr() {
        return Err(match print(&error.render().to_string()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => cannot_print(P::command().get_name(), &error, None),
        });
    }
    Err(wrong_usage(&error))
}

/// Says that the command line is wrong in a way that only `kind` and `what` can say; returns the exit code.
#[must_use]
pub fn usage<P: Parser>(kind: ErrorKind, what: &str) -> ExitCode {
    wrong_usage(&P::command().error(kind, what))
}

fn wrong_usage(error: &clap::Error) -> ExitCode {
    // Nothing can be said if this fails.
    let _ = error.print();
    if wants_json(std::env::args_os()) {
        let text = error.render().to_string();
        let what = text.split("\n\n").next().unwrap_or_default();
        let what = what.strip_prefix("error: ").unwrap_or(what).trim_end();
        Failure::new("usage", what, "see --help").print_json();
    }
    ExitCode::from(USAGE)
}

/// Whether a command line that could not be read asks for JSON.
fn wants_json(arguments: impl Iterator<Item = OsString>) -> bool {
    let mut after_flag = false;
    for argument in arguments {
        if argument == "--output-format=json" || (after_flag && argument == "json") {
            return true;
        }
        after_flag = argument == "--output-format";
    }
    false
}

/// Writes to standard output, all of it and at once.
///
/// # Errors
/// What the system says; [`cannot_print`] says it to the user.
pub fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Says that standard output could not be written to, and what was left; returns the exit code. A reader that has seen
/// enough is told nothing.
#[must_use]
pub fn cannot_print(program: &str, error: &io::Error, state: Option<&str>) -> ExitCode {
    if error.kind() == io::ErrorKind::BrokenPipe {
        return ExitCode::from(READER_GONE);
    }
    let state = state.map(|state| format!("state: {state}\n")).unwrap_or_default();
    say(&format!(
        "{program}: cannot write to standard output: {error}\n{state}hint: check where standard output goes"
    ));
    ExitCode::from(FAILED)
}

/// Writes a line to standard error. Unlike `eprintln!` it does not panic when that is a full disk or a closed pipe.
pub fn say(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_seen_in_a_command_line_that_is_wrong() {
        let asks = |line: &str| wants_json(line.split(' ').map(OsString::from));
        assert!(asks("cdpctl --output-format json disk") && asks("cdpctl --output-format=json"));
        assert!(!asks("cdpctl disk json") && !asks("cdpctl --output-format text json"));
    }
}
