//! What `cdp-server` and `cdp-agent` do first and last: logs, open files, exit codes.
//!
//! *Owns* these habits, so that both programs have the same. *Must not know* what either program does.
//!
//! *Threads*: called from `main`, before any other thread exists.

#![forbid(unsafe_code)]

use std::error::Error;
use std::io::IsTerminal;
use std::process::ExitCode;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tracing_subscriber::EnvFilter;

/// Exit code of a program that was called the wrong way or has a wrong configuration; the same as for a wrong flag.
pub const USAGE: u8 = 2;

/// Open files that a daemon should be able to have at least: connections, and some files for each protected disk.
pub const WANTED_FILES: u64 = 4096;

/// Logs go to standard error: coloured on a terminal (unless `NO_COLOR` is set), plain elsewhere; `RUST_LOG` says how
/// much.
pub fn start_logging() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let coloured = std::io::stderr().is_terminal() && !plain;
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(coloured).with_writer(std::io::stderr).init();
}

/// Raises the number of files that this process may have open to what the system allows it, and warns when that is
/// less than [`WANTED_FILES`].
pub fn raise_open_files() {
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
            "few open files are allowed; with many disks or connections new ones will be turned away: raise the hard \
             limit (LimitNOFILE= of the systemd unit, or ulimit -Hn)"
        ),
        Ok(most) => tracing::debug!(most, "open files"),
        Err(error) => tracing::warn!(%error, "cannot raise the number of open files; see ulimit -n"),
    }
}

/// How the program ends: 0; or 1 after saying why, with the causes; or [`USAGE`] when `is_usage` says that the caller
/// can mend it by calling it another way.
pub fn exit_code<E: Error>(name: &str, ended: Result<(), E>, is_usage: impl FnOnce(&E) -> bool) -> ExitCode {
    let Err(error) = ended else { return ExitCode::SUCCESS };
    eprintln!("{name}: {}", chain(&error));
    if is_usage(&error) { ExitCode::from(USAGE) } else { ExitCode::FAILURE }
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
        raise_open_files();
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).expect("a limit"), (hard, hard));
    }
}
