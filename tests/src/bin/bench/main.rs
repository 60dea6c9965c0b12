//! What protection costs, side by side with what QEMU itself can run: `scripts/bench`.
//!
//! Every number comes from rounds in which all variants take turns, and is a ratio to the plain disk of the same round:
//! machines drift and have neighbours, ratios within a round hold (`docs/benchmarks/README.md`).

mod export;
mod machine;
mod ours;
mod report;
mod stall;
mod variants;

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

const FULL: Effort = Effort { rounds: 7, seconds: 2.0, patient: true };
const QUICK: Effort = Effort { rounds: 2, seconds: 0.4, patient: false };

const USAGE: &str =
    "usage: bench capture|stall|all [--quick] [--out DIR]\n       bench compare OLD.json NEW.json";

fn main() -> ExitCode {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let quick = take(&mut arguments, "--quick").is_some();
    let out = match take(&mut arguments, "--out") {
        Some(at) if at < arguments.len() => PathBuf::from(arguments.remove(at)),
        _ => PathBuf::from("target/bench"),
    };
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let tables: &[&str] = match words[..] {
        ["capture"] => &["capture"],
        ["stall"] => &["stall"],
        ["all"] => &["capture", "stall"],
        ["compare", old, new] => return report::compare(old.as_ref(), new.as_ref()),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    let effort = if quick { QUICK } else { FULL };
    std::fs::create_dir_all(&out).unwrap_or_else(|e| panic!("cannot make {}: {e}", out.display()));
    for table in tables {
        let mut report = Report::new(table, quick);
        match *table {
            "capture" => export::run(effort, &mut report),
            _ => stall::run(effort, &mut report),
        }
        report.write(&out);
    }
    ExitCode::SUCCESS
}

/// Takes a flag out of the arguments; where it stood.
fn take(arguments: &mut Vec<String>, flag: &str) -> Option<usize> {
    let at = arguments.iter().position(|argument| argument == flag)?;
    arguments.remove(at);
    Some(at)
}
