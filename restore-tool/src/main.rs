//! `cdp-restore`: see `--help`.

#![forbid(unsafe_code)]

mod cli;
mod show;

use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use cdp_api::client::parse_server;
use cdp_api::program;
use clap::error::ErrorKind;
use nix::sys::signal::{SigSet, Signal};
use restore_tool::limits::STOP_GRACE;
use restore_tool::restore::{Failure, Stop};
use restore_tool::{Order, RestoreError, ServerSource, Source, StoreSource, restore};
use serde_json::json;

use crate::cli::{Cli, Command, Common, ListArgs, OutputFormat, RestoreArgs};
use crate::show::Progress;

const NAME: &str = "cdp-restore";

/// Why the program ends early.
enum End {
    /// A failure that is still to be reported.
    Failed(Failure),
    /// Everything is said.
    Said(ExitCode),
}

impl<E: Into<Failure>> From<E> for End {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

fn main() -> ExitCode {
    let cli: Cli = match program::parse() {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    // A file that becomes larger than `ulimit -f` allows is then an error that is reported, not the end of the process
    // with a temporary file left behind.
    let mut file_size = SigSet::empty();
    file_size.add(Signal::SIGXFSZ);
    if let Err(error) = file_size.thread_block() {
        program::say(&format!("{NAME}: cannot block SIGXFSZ ({error}); a limit of file sizes may end this"));
    }
    let outcome = match (cli.command, cli.restore) {
        (Some(Command::List(args)), _) => list(&args, &cli.common),
        (None, Some(args)) => run(&args, &cli.common),
        (None, None) => unreachable!("clap asks for --at, --disk and --output unless there is a subcommand"),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(End::Said(code)) => code,
        Err(End::Failed(failure)) => {
            report(&failure, cli.common.output_format);
            ExitCode::from(failure.error.exit_code())
        }
    }
}

fn report(failure: &Failure, format: OutputFormat) {
    let Failure { error, left } = failure;
    program::say(&show::error(error, left.as_deref()));
    if format == OutputFormat::Json {
        show::error_json(error, left.as_deref()).print_json();
    }
}

fn list(args: &ListArgs, common: &Common) -> Result<(), End> {
    let listings = source(common)?.list(args.disk.as_deref())?;
    let text = match common.output_format {
        OutputFormat::Text => show::listings(&listings),
        OutputFormat::Json => format!("{:#}\n", json!({ "disks": listings })),
    };
    print(&text, None)
}

fn run(args: &RestoreArgs, common: &Common) -> Result<(), End> {
    let at = cdp_api::client::parse_point(&args.at).map_err(RestoreError::Problem)?;
    let mut image = source(common)?.open(&args.disk, &at)?;
    // The point is said before anything is done. With JSON, standard output holds one document at the end.
    let mut first = format!("{} at {}\n", image.disk().label(), show::point(image.point()));
    if !image.point().exact {
        first += "that is the newest record there is; the journal does not say what came after it\n";
    }
    match common.output_format {
        OutputFormat::Text => print(&first, Some("nothing was restored"))?,
        OutputFormat::Json => program::say(first.trim_end()),
    }
    let order = Order { output: args.output.clone(), format: args.format, force: args.force };
    let progress = Progress::new(image.disk_bytes());
    let stop = stop_on_signals(common.output_format);
    let outcome = restore(image.as_mut(), &order, &stop, &|stage, position| progress.at(stage, position));
    progress.finish();
    let report = outcome?;
    let text = match common.output_format {
        OutputFormat::Text => format!("{}\n", show::report(&report)),
        OutputFormat::Json => format!("{:#}\n", json!(report)),
    };
    print(&text, Some(&format!("{} is restored and verified", report.output.display())))
}

/// Prints a result; `state` is what is left when that fails.
fn print(text: &str, state: Option<&str>) -> Result<(), End> {
    program::print(text).map_err(|error| End::Said(program::cannot_print(NAME, &error, state)))
}

fn source(common: &Common) -> Result<Box<dyn Source>, End> {
    if let Some(store) = &common.store {
        return Ok(Box::new(StoreSource::open(store)?));
    }
    let environment = || std::env::var("CDP_SERVER").ok().filter(|url| !url.is_empty());
    let wrong = |kind, what: &str| End::Said(program::usage::<Cli>(kind, what));
    let url = common.server.clone().or_else(environment).ok_or_else(|| {
        let missing = "where is the journal? give --server URL (or set CDP_SERVER) or --store DIR";
        wrong(ErrorKind::MissingRequiredArgument, missing)
    })?;
    // --server was looked at with the command line, CDP_SERVER was not.
    parse_server(&url).map_err(|what| wrong(ErrorKind::InvalidValue, &format!("CDP_SERVER: {what}")))?;
    Ok(Box::new(ServerSource::new(&url)?))
}

/// The first SIGINT, SIGTERM or SIGHUP asks the restore to stop, which it does at the next block. It is not waited for when a
/// second one comes, or after [`STOP_GRACE`]: a server or a disk may take minutes to answer.
fn stop_on_signals(format: OutputFormat) -> Arc<Stop> {
    let stop = Arc::new(Stop::default());
    let asked = Arc::clone(&stop);
    let handler = move || {
        if !asked.ask() {
            leave(&asked, format);
            return;
        }
        let asked = Arc::clone(&asked);
        // Without another thread there is still the second signal.
        let _ = thread::Builder::new().spawn(move || {
            thread::sleep(STOP_GRACE);
            leave(&asked, format);
        });
    };
    if let Err(error) = ctrlc::set_handler(handler) {
        program::say(&format!(
            "{NAME}: cannot catch signals ({error}); if stopped, a temporary file may be left"
        ));
    }
    stop
}

/// Ends the process without waiting for the restore, unless that is complete.
fn leave(stop: &Stop, format: OutputFormat) {
    // One report, whoever comes first.
    static LEAVING: Mutex<()> = Mutex::new(());
    let _leaving = LEAVING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(left) = stop.abandon() {
        let failure = Failure { error: RestoreError::Interrupted, left };
        report(&failure, format);
        std::process::exit(failure.error.exit_code().into());
    }
}
