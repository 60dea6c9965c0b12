//! `cdp-restore`: see `--help`.

#![forbid(unsafe_code)]

mod cli;
mod show;

use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cdp_api::client::parse_server;
use clap::Parser;
use clap::error::ErrorKind;
use restore_tool::restore::Failure;
use restore_tool::{Order, RestoreError, ServerSource, Source, StoreSource, restore};
use serde_json::json;

use crate::cli::{Cli, Command, Common, ListArgs, OutputFormat, RestoreArgs};
use crate::show::Progress;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = match (cli.command, cli.restore) {
        (Some(Command::List(args)), _) => list(&args, &cli.common),
        (None, Some(args)) => run(&args, &cli.common),
        (None, None) => unreachable!("clap asks for --at, --disk and --output unless there is a subcommand"),
    };
    let Err(Failure { error, left }) = outcome else {
        return ExitCode::SUCCESS;
    };
    eprintln!("{}", show::error(&error, left.as_deref()));
    if cli.common.output_format == OutputFormat::Json {
        print(&format!("{:#}\n", show::error_json(&error, left.as_deref())));
    }
    ExitCode::from(error.exit_code())
}

fn list(args: &ListArgs, common: &Common) -> Result<(), Failure> {
    let listings = source(common)?.list(args.disk.as_deref())?;
    match common.output_format {
        OutputFormat::Text => print(&show::listings(&listings)),
        OutputFormat::Json => print(&format!("{:#}\n", json!({ "disks": listings }))),
    }
    Ok(())
}

fn run(args: &RestoreArgs, common: &Common) -> Result<(), Failure> {
    let at = cdp_api::client::parse_point(&args.at).map_err(RestoreError::Problem)?;
    let mut image = source(common)?.open(&args.disk, &at)?;
    // The point is said before anything is done. With JSON, standard output holds one document at the end.
    let text = common.output_format == OutputFormat::Text;
    let say = |line: &str| if text { print(&format!("{line}\n")) } else { eprintln!("{line}") };
    say(&format!("{} at {}", image.disk().label(), show::point(image.point())));
    if !image.point().exact {
        say("that is the newest record there is; the journal does not say what came after it");
    }
    let order = Order { output: args.output.clone(), format: args.format, force: args.force };
    let progress = Progress::new(image.disk_bytes());
    let outcome =
        restore(image.as_mut(), &order, &stop_on_signals(), &|stage, position| progress.at(stage, position));
    progress.finish();
    let report = outcome?;
    match common.output_format {
        OutputFormat::Text => print(&format!("{}\n", show::report(&report))),
        OutputFormat::Json => print(&format!("{:#}\n", json!(report))),
    }
    Ok(())
}

fn source(common: &Common) -> Result<Box<dyn Source>, RestoreError> {
    if let Some(store) = &common.store {
        return Ok(Box::new(StoreSource::open(store)?));
    }
    let environment = || std::env::var("CDP_SERVER").ok().filter(|url| !url.is_empty());
    let wrong = |kind, what: &str| -> ! {
        use clap::CommandFactory;
        Cli::command().error(kind, what).exit()
    };
    let Some(url) = common.server.clone().or_else(environment) else {
        let missing = "where is the journal? give --server URL (or set CDP_SERVER) or --store DIR";
        wrong(ErrorKind::MissingRequiredArgument, missing)
    };
    // --server was looked at with the command line, CDP_SERVER was not.
    if let Err(what) = parse_server(&url) {
        wrong(ErrorKind::InvalidValue, &format!("CDP_SERVER: {what}"))
    }
    Ok(Box::new(ServerSource::new(&url)?))
}

/// A flag that the first SIGINT, SIGTERM or SIGHUP sets: the restore then stops at the next block and cleans up.
fn stop_on_signals() -> Arc<AtomicBool> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    // ORDERING: Relaxed; the flag stands alone, no other memory is published with it.
    let handler = move || flag.store(true, Ordering::Relaxed);
    if let Err(error) = ctrlc::set_handler(handler) {
        eprintln!("cdp-restore: cannot catch signals ({error}); if stopped, a temporary file may be left");
    }
    stop
}

/// Prints to standard output; a reader that has gone away is no reason to stop a restore.
fn print(text: &str) {
    let mut out = io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}
