//! What protection costs and gives, side by side with what else can run here: `scripts/bench`.
//!
//! Every number comes from *rounds* in which all *variants* take turns, and gives a *row*. What counts is the ratio to the
//! table's first variant (the plain disk, a peer) in the same round: machines drift and have neighbours, ratios within a
//! round hold (`docs/benchmarks/README.md`).

mod contents;
mod export;
mod feed;
mod filter;
mod history;
mod in_process;
mod ingest;
mod machine;
mod ours;
mod parts;
mod report;
mod restore;
mod rpo;
mod space;
mod stall;
mod stored;
mod summary;
mod tools;
mod variants;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::PathBuf;
use std::process::ExitCode;

use crate::report::Report;

/// How much is measured.
#[derive(Clone, Copy, Debug)]
struct Effort {
    /// Rounds of each table.
    rounds: usize,
    /// Seconds that one variant runs in one round.
    seconds: f64,
    /// Whether a round waits for the machine to be idle, and says so if it never was.
    patient: bool,
}

const FULL: Effort = Effort { rounds: 5, seconds: 0.6, patient: true };
const QUICK: Effort = Effort { rounds: 1, seconds: 0.3, patient: false };

/// Measures a table.
type Bench = fn(Effort, &mut Report);

/// The tables' names, and what measures them.
const TABLES: [(&str, Bench); 8] = [
    ("capture", capture),
    ("filter", filter::run),
    ("stall", stall::run),
    ("ingest", ingest::run),
    ("space", space::run),
    ("restore", restore::run),
    ("history", history::run),
    ("rpo", rpo::run),
];

/// What a write costs, inside QEMU and through an export.
fn capture(effort: Effort, report: &mut Report) {
    in_process::run(effort, report);
    export::run(effort, report);
}

fn main() -> ExitCode {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let quick = take(&mut arguments, "--quick").is_some();
    let out = match take(&mut arguments, "--out") {
        Some(at) if at < arguments.len() => PathBuf::from(arguments.remove(at)),
        _ => PathBuf::from("target/bench"),
    };
    let only = match take(&mut arguments, "--only") {
        Some(at) if at < arguments.len() => Some(arguments.remove(at)),
        _ => None,
    };
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let wanted = match words[..] {
        ["compare", old, new] => return report::compare(old.as_ref(), new.as_ref()),
        ["join", first, ref others @ ..] => return report::join(&out, first, others),
        ["write", document, reports] => return summary::write(document.as_ref(), reports.as_ref()),
        ["all"] => None,
        [name] if TABLES.iter().any(|(table, _)| *table == name) => Some(name),
        _ => {
            let names = TABLES.map(|(name, _)| name).join("|");
            eprintln!(
                "usage: bench {names}|all [--quick] [--only TEXT] [--out DIR]\n       bench compare OLD.json NEW.json\n       bench join PART.json... [--out DIR]\n       bench write DOCUMENT.md REPORTS"
            );
            return ExitCode::from(2);
        }
    };
    let effort = if quick { QUICK } else { FULL };
    std::fs::create_dir_all(&out).unwrap_or_else(|e| panic!("cannot make {}: {e}", out.display()));
    for (name, measure) in TABLES.into_iter().filter(|(name, _)| wanted.is_none_or(|wanted| wanted == *name))
    {
        let mut report = Report::new(name, quick, only.clone());
        // What was measured before a failure is kept: a run is long.
        let done = catch_unwind(AssertUnwindSafe(|| measure(effort, &mut report)));
        report.write(&out, done.is_ok());
        if let Err(panic) = done {
            resume_unwind(panic);
        }
    }
    ExitCode::SUCCESS
}

/// Takes a flag out of the arguments; where it stood.
fn take(arguments: &mut Vec<String>, flag: &str) -> Option<usize> {
    let at = arguments.iter().position(|argument| argument == flag)?;
    arguments.remove(at);
    Some(at)
}
