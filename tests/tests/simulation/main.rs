//! Thousands of seeded runs of a whole installation in one thread each, in virtual time. `CDP_SIM_RUNS=n` runs more of
//! them, `CDP_SIM_FIRST=n` begins at another seed, `CDP_SIM_SEED=n` does one with every event printed.

mod agent;
mod check;
mod guest;
mod memory;
mod model;
mod net;
mod run;
mod server;
mod world;

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::run::{Summary, run};

/// Runs by default: half a minute on two idle cores.
const RUNS: u64 = 2000;
const THREADS: usize = 2;

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

#[test]
fn no_fault_makes_a_point_wrong_or_loses_what_was_acknowledged() {
    if let Some(seed) = setting("CDP_SIM_SEED") {
        let summary = run(seed, true).unwrap_or_else(|failure| panic!("{failure}"));
        return println!("{summary:?}");
    }
    let first = setting("CDP_SIM_FIRST").unwrap_or(1);
    let end = first + setting("CDP_SIM_RUNS").unwrap_or(RUNS);
    let next = AtomicU64::new(first);
    let done = Mutex::new((Summary::default(), Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    // ORDERING: only distinct numbers matter. Each run is alone in its thread, whatever the others do.
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end || !done.lock().expect("unpoisoned").1.is_empty() {
                        return;
                    }
                    let outcome = run(seed, false);
                    let mut done = done.lock().expect("unpoisoned");
                    match outcome {
                        Ok(summary) => done.0.add(&summary),
                        Err(failure) => done.1.push(failure),
                    }
                }
            });
        }
    });
    let (summary, failures) = done.into_inner().expect("unpoisoned");
    println!("seeds {first} to {}: {summary:?}", end - 1);
    assert!(failures.is_empty(), "repeat with CDP_SIM_SEED\n{}", failures.join("\n\n"));
    // Whatever is meant to be simulated has happened. Few seeds need not do everything.
    let done = [summary.points, summary.refused, summary.instants, summary.adopted, summary.unchanged];
    let waited = [summary.flushes, summary.waits, summary.bookmarks, summary.equal_bytes];
    let complete = end - first < RUNS || done.iter().chain(&waited).all(|count| *count > 0);
    assert!(complete && summary.points > 0, "something was never done: {summary:?}");
}
