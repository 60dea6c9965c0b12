//! `cdpctl`: the operator's command line over the REST API.
//!
//! *Owns* arguments, text output and exit codes. *Must not know* the store or the server's insides: everything goes
//! through [`cdp_api::Client`].
//!
//! Exit codes: 0 done; 1 failed (server not reached, no such disk, agent away, …); 2 wrong usage, also a text that is
//! no point in time; 3 the point cannot be restored (in a gap or out of range); 4 a check found damage; 141 the reader
//! of standard output went away.

#![forbid(unsafe_code)]

mod args;
mod output;
mod verify;

use std::process::ExitCode;

use cdp_api::client::parse_point;
use cdp_api::program::{self, FAILED, USAGE};
use cdp_api::{Client, ClientError, Kind, PointSpec, Problem, Protection};

use crate::args::{Args, Command, DiskCommand, Format, Switch};
use crate::output::Output;

const NOT_RESTORABLE: u8 = 3;
const DAMAGED: u8 = 4;

fn main() -> ExitCode {
    let args: Args = match program::parse() {
        Ok(args) => args,
        Err(code) => return code,
    };
    match run(&args) {
        Ok((text, code)) => match program::print(&text) {
            Ok(()) => ExitCode::from(code),
            Err(error) => program::cannot_print("cdpctl", &error, None),
        },
        Err(failure) => report(&failure, args.output_format),
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
fn run(args: &Args) -> Result<(String, u8), Failure> {
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
            return Ok((output.checks(&checks), if damaged { DAMAGED } else { 0 }));
        }
        Command::Bookmark { disk, name, at } => {
            let at = point(at)?;
            output.bookmark(&client.create_bookmark(disk, name, at.as_ref())?)
        }
    };
    Ok((text, 0))
}

/// Says what went wrong; returns the exit code.
fn report(failure: &Failure, format: Format) -> ExitCode {
    let (kind, detail, hint, problem) = match failure {
        Failure::Api(error) => (error.kind(), error.to_string(), error.hint(), error.problem()),
        Failure::Usage(problem) => {
            (problem.kind.as_str(), problem.detail.clone(), problem.hint.as_str(), Some(&**problem))
        }
    };
    let mut text = format!("cdpctl: {detail}");
    let mut document = program::Failure::new(kind, detail, hint);
    if let Some(problem) = problem {
        document = document.near(problem);
    }
    if !hint.is_empty() {
        text += &format!("\nhint: {hint}");
    }
    for (name, point) in [("before", document.before), ("after", document.after)] {
        if let Some(point) = point {
            text += &format!("\nnearest good point {name}: {point}");
        }
    }
    program::say(&text);
    if format == Format::Json {
        document.print_json();
    }
    ExitCode::from(match problem.map(|problem| problem.kind) {
        Some(Kind::BadPoint | Kind::BadRequest | Kind::BadValue) => USAGE,
        Some(Kind::PointInGap | Kind::PointOutOfRange) => NOT_RESTORABLE,
        _ => FAILED,
    })
}
