//! What `cdp-server` and `cdp-agent` do first and last: logs, open files, exit codes; how drills are ordered, and what
//! their TLS takes from files.
//!
//! *Owns* these habits, so that both programs have the same. *Must not know* what either program does.
//!
//! *Threads*: called from `main`, before any other thread exists.

#![forbid(unsafe_code)]

pub mod drill;
pub mod tls;

use std::error::Error;
use std::io::{self, ErrorKind, IsTerminal, Write};
use std::process::ExitCode;

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use tracing_subscriber::EnvFilter;

/// Exit code of a program that was called the wrong way or has a wrong configuration; the same as for a wrong flag.
pub const USAGE: u8 = 2;

/// Open files that a daemon should be able to have at least: connections, and some files for each protected disk.
pub const WANTED_FILES: u64 = 4096;

/// With fewer a daemon could not even listen to its signals, and does not start.
pub const LEAST_FILES: u64 = 64;

/// What to do when a process has as many open files as it may have.
pub const MORE_FILES: &str =
    "raise the limit of open files (LimitNOFILE= of the systemd unit, or ulimit -Hn)";

/// What ends a daemon.
pub trait Fatal: Error {
    /// Whether the caller can mend it by calling the program another way.
    fn is_usage(&self) -> bool;

    /// What to do next; empty where the error says so itself.
    fn hint(&self) -> String;
}

/// Everything that comes first: logs, signals, limits. To be called before any other thread exists.
///
/// # Errors
/// The exit code, after saying why this process cannot work.
pub fn start(name: &str) -> Result<(), ExitCode> {
    start_logging();
    // What would become larger than `ulimit -f` allows is then a write that fails, not the end of the process.
    let mut file_size = SigSet::empty();
    file_size.add(Signal::SIGXFSZ);
    if let Err(error) = file_size.thread_block() {
        tracing::warn!(%error, "cannot block SIGXFSZ; a limit of file sizes may end this process");
    }
    let most = raise_open_files();
    if most < LEAST_FILES {
        say(&format!(
            "{name}: only {most} open files are allowed, {LEAST_FILES} are the least\nhint: {MORE_FILES}"
        ));
        return Err(ExitCode::FAILURE);
    }
    Ok(())
}

/// Logs go to standard error: coloured on a terminal (unless `NO_COLOR` is set), plain elsewhere; `RUST_LOG` says how
/// much.
fn start_logging() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let coloured = io::stderr().is_terminal() && !plain;
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(coloured);
    // A log on a full disk, or whose reader is gone, is lost and nothing else: what tracing would say about that, it
    // would say on standard error, with a panic when that fails.
    subscriber.with_writer(io::stderr).log_internal_errors(false).init();
}

/// Raises the number of files that this process may have open to what the system allows it, and warns when that is
/// less than [`WANTED_FILES`]. Returns it.
fn raise_open_files() -> u64 {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        if soft < hard {
            setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
        }
        Ok(hard)
    });
    match raised {
        Ok(most) if most < WANTED_FILES => tracing::warn!(
            most,
            wanted = WANTED_FILES,
            hint = MORE_FILES,
            "few open files are allowed; with many disks or connections new ones will be turned away"
        ),
        Ok(most) => tracing::debug!(most, "open files"),
        Err(error) => tracing::warn!(%error, "cannot raise the number of open files; see ulimit -n"),
    }
    raised.unwrap_or(u64::MAX)
}

/// What to do about an answer of the system to an operation on a file or folder; empty where nothing general helps.
#[must_use]
pub fn advice(error: &io::Error) -> &'static str {
    if matches!(error.raw_os_error().map(Errno::from_raw), Some(Errno::EMFILE | Errno::ENFILE)) {
        return MORE_FILES;
    }
    match error.kind() {
        ErrorKind::PermissionDenied => {
            "let the user that this runs as write there (chown, chmod), or name another place"
        }
        ErrorKind::ReadOnlyFilesystem => {
            "its filesystem is mounted read-only (dmesg may say why): mount it for writing, or name another place"
        }
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => "free space there, or name another place",
        ErrorKind::AlreadyExists | ErrorKind::NotADirectory => {
            "a part of the path is a file: name a folder, or move the file away"
        }
        ErrorKind::InvalidFilename => "name a shorter path",
        _ => "",
    }
}

/// How the program ends: 0; or 1 after saying why, with the causes, and what to do; or [`USAGE`] for an error that
/// [`Fatal::is_usage`].
pub fn exit_code<E: Fatal>(name: &str, ended: Result<(), E>) -> ExitCode {
    let Err(error) = ended else { return ExitCode::SUCCESS };
    let mut text = format!("{name}: {}", chain(&error));
    let hint = error.hint();
    if !hint.is_empty() {
        text += &format!("\nhint: {hint}");
    }
    say(&text);
    if error.is_usage() { ExitCode::from(USAGE) } else { ExitCode::FAILURE }
}

/// Writes a line to standard error. Unlike `eprintln!` it does not panic when that is a full disk or a closed pipe.
fn say(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// The error and its causes, on one line; a cause that its effect has named already is not said again.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.contains(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt;

    #[derive(Debug)]
    struct Layer(&'static str, Option<Box<Layer>>);

    impl fmt::Display for Layer {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.0)
        }
    }

    impl Error for Layer {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            self.1.as_deref().map(|cause| cause as _)
        }
    }

    #[test]
    fn causes_are_said_once_each_and_in_order() {
        let root = Layer("no such file", None);
        let said = Layer("read /x: no such file", Some(Box::new(root)));
        let top = Layer("cannot start", Some(Box::new(said)));
        assert_eq!(chain(&top), "cannot start: read /x: no such file");
    }

    #[test]
    fn after_raising_the_soft_limit_is_the_hard_one() {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
        setrlimit(Resource::RLIMIT_NOFILE, hard.min(512), hard).expect("lowering is allowed");
        assert_eq!(raise_open_files(), hard);
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).expect("a limit"), (hard, hard));
    }
}
