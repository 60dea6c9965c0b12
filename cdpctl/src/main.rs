//! `cdpctl`: the operator's command line over the REST API.
//!
//! *Owns* arguments, text output and exit codes. *Must not know* the store or the server's insides: everything goes
//! through [`cdp_api::Client`].
//!
//! Exit codes: 0 done; 1 failed (server not reached, no such disk, agent away, …); 2 wrong usage, also a text that is
//! no point in time; 3 the point cannot be restored (in a gap or out of range); 4 a check found damage.

#![forbid(unsafe_code)]

mod args;
mod output;
mod verify;

use std::io::Write;
use std::process::ExitCode;

use cdp_api::client::parse_point;
use cdp_api::{Client, ClientError, Kind, PointSpec, Problem, Protection};
use clap::Parser;

use crate::args::{Args, Command, DiskCommand, Switch};
use crate::output::Output;

const FAILED: u8 = 1;
const USAGE: u8 = 2;
const NOT_RESTORABLE: u8 = 3;
const DAMAGED: u8 = 4;

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok((text, code)) => print(&text, code),
        Err(Failure::Api(error)) => report(&error),
        Err(Failure::Usage(problem)) => {
            complain(&problem.detail, &problem.hint);
            ExitCode::from(USAGE)
        }
    }
}

enum Failure {
    Api(ClientError),
    Usage(Box<Problem>),
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Self::Api(error)
    }
}

/// Carries out the command; returns what goes to standard output, and the exit code.
fn run(args: &Args) -> Result<(String, ExitCode), Failure> {
    let point = |text: &Option<String>| -> Result<Option<PointSpec>, Failure> {
        text.as_deref().map(parse_point).transpose().map_err(Failure::Usage)
    };
    let output = Output::new(args.output_format);
    let client = Client::new(&args.server)?;
    let text = match &args.command {
        Command::Disk(DiskCommand::List) => output.disks(&client.disks()?),
        Command::Disk(DiskCommand::Show { disk }) => output.disk(&client.disk(disk)?),
        Command::Protect { disk, policy, throttle_ms, ring_mib, sync, sync_timeout_ms } => {
            let protection = Protection {
                enabled: true,
                policy: policy.clone(),
                throttle_ms: *throttle_ms,
                ring_mib: *ring_mib,
                sync: sync.map(|sync| sync == Switch::On),
                sync_timeout_ms: *sync_timeout_ms,
            };
            output.protection(disk, &client.put_protection(disk, &protection)?)
        }
        Command::Unprotect { disk } => output.protection(disk, &client.set_protection(disk, false)?),
        Command::Points { disk, at } => match point(at)? {
            Some(at) => output.points(&client.points_at(disk, &at)?),
            None => output.points(&client.points(disk)?),
        },
        Command::Verify { disk } => {
            let checks = verify::run(&client, disk.as_deref())?;
            let damaged = checks.iter().any(|check| !check.damage.is_empty());
            return Ok((output.checks(&checks), ExitCode::from(if damaged { DAMAGED } else { 0 })));
        }
        Command::Bookmark { disk, name, at } => {
            let at = point(at)?;
            output.bookmark(&client.create_bookmark(disk, name, at.as_ref())?)
        }
    };
    Ok((text, ExitCode::SUCCESS))
}

/// Prints the result; ends with `code` if that works.
fn print(text: &str, code: ExitCode) -> ExitCode {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => code,
        // The reader of a pipe may have seen enough.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => code,
        Err(error) => {
            complain(&format!("cannot write: {error}"), "check where standard output goes");
            ExitCode::from(FAILED)
        }
    }
}

fn report(error: &ClientError) -> ExitCode {
    complain(&error.to_string(), error.hint());
    let Some(problem) = error.problem() else { return ExitCode::from(FAILED) };
    for (name, point) in [("before", &problem.before), ("after", &problem.after)] {
        if let Some(point) = point {
            eprintln!("nearest good point {name}: {point}");
        }
    }
    ExitCode::from(match problem.kind {
        Kind::BadPoint | Kind::BadRequest | Kind::BadValue => USAGE,
        Kind::PointInGap | Kind::PointOutOfRange => NOT_RESTORABLE,
        _ => FAILED,
    })
}

fn complain(what: &str, hint: &str) {
    eprintln!("cdpctl: {what}");
    if !hint.is_empty() {
        eprintln!("hint: {hint}");
    }
}
