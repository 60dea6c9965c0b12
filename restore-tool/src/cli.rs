//! The command line.

use std::path::PathBuf;

use cdp_api::client::{parse_disk, parse_server};
use clap::builder::{PathBufValueParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use restore_tool::Format;

const AFTER_HELP: &str = "\
Points in time:
  lsn:1042                     right after that record
  bookmark:before-upgrade      right at that bookmark
  latest                       the newest durable record
  2026-11-20T10:00:03.5Z       the newest record not later than that instant
  '2026-11-20 10:00:03'        the same, on this machine's clock
  10:00:03                     the same, today
  -5m, '5 minutes ago'         the same, counted back from now

Exit codes:
  0    restored and verified
  1    the journal could not be read, or the target or standard output not written
  2    the command line is wrong
  3    the point cannot be restored; the nearest points that can are shown
  4    the target was refused, untouched: not empty (see --force), in use, too small, or it cannot be written
  5    the target reads back differently from what was written
  130  stopped by SIGINT, SIGTERM or SIGHUP; the block that is under way is waited for 5 s,
       or until a second one
  141  the reader of standard output went away; a target with its name is complete and verified

A file appears under its name only when it is complete and verified; until then it has a temporary name beside it, and
what it replaces stays as it was. A block device is overwritten in place: after a failure, restore again before using it.";

/// Bring a disk back as it was at any point of its journal.
#[derive(Debug, Parser)]
#[command(name = "cdp-restore", version, after_help = AFTER_HELP)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
    #[command(flatten)]
    pub(crate) common: Common,
    #[command(flatten)]
    pub(crate) restore: Option<RestoreArgs>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show the disks and the points that can be restored.
    List(ListArgs),
}

#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {
    /// The point in time (see below).
    #[arg(long, value_name = "POINT", allow_hyphen_values = true)]
    pub(crate) at: String,
    /// The disk, by UUID or by VM and device.
    #[arg(long, value_name = "UUID|VM/DEVICE", value_parser = parse_disk, allow_hyphen_values = true)]
    pub(crate) disk: String,
    /// The file or block device to write.
    #[arg(long, short, value_name = "FILE|DEVICE", value_parser = PathBufValueParser::new().try_map(not_standard_output))]
    pub(crate) output: PathBuf,
    /// Format of the image.
    #[arg(long, value_enum, default_value = "raw")]
    pub(crate) format: Format,
    /// Overwrite a target that is not empty.
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// Only this disk, by UUID or by VM and device.
    #[arg(long, value_name = "UUID|VM/DEVICE", value_parser = parse_disk, allow_hyphen_values = true)]
    pub(crate) disk: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Common {
    /// Read through this server (without --store, the environment's CDP_SERVER is taken).
    #[arg(long, global = true, value_name = "URL", value_parser = parse_server, conflicts_with = "store")]
    pub(crate) server: Option<String>,
    /// Read this store's files; no server needs to run.
    #[arg(long, global = true, value_name = "DIR")]
    pub(crate) store: Option<PathBuf>,
    /// What to print on standard output.
    #[arg(long, global = true, value_enum, default_value = "text")]
    pub(crate) output_format: OutputFormat,
}

/// What to print on standard output.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum OutputFormat {
    /// For people.
    Text,
    /// One JSON document, whatever happens: the result, or {"error": {kind, detail, hint, state, before, after}}.
    Json,
}

/// What is written to a pipe cannot be read back, and whoever reads it sees an image that may yet fail.
fn not_standard_output(output: PathBuf) -> Result<PathBuf, String> {
    if output.as_os_str() != "-" {
        return Ok(output);
    }
    Err("standard output cannot be read back and compared; restore to a file and send that on when it is complete, or \
         run cdp-restore where the image is wanted, with --server (a file of that name is ./-)"
        .to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn a_time_ago_needs_no_equals_sign() {
        let cli = Cli::try_parse_from("cdp-restore --at -5m --disk a/b --output x --store s".split(' '));
        assert_eq!(cli.expect("parses").restore.expect("a restore").at, "-5m");
    }

    #[test]
    fn server_and_store_together_are_refused() {
        let line = "cdp-restore --at latest --disk a/b --output x --store s --server http://s";
        assert!(Cli::try_parse_from(line.split(' ')).is_err());
    }

    #[test]
    fn a_restore_without_a_point_is_refused() {
        assert!(Cli::try_parse_from("cdp-restore --disk a/b --output x --store s".split(' ')).is_err());
        assert!(Cli::try_parse_from("cdp-restore list --store s".split(' ')).is_ok());
    }
}
