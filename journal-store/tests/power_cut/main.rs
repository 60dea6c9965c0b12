//! The power fails at every step of everything that changes files: nothing acknowledged is lost, nothing half-written is
//! served, and the journal goes on. The argument: `docs/formats/durability.md`.
//!
//! `CDP_POWER_CUT_EFFORT=n` tries n times as many images at each step; `CDP_SEED=n` another story.
#![allow(missing_docs, unreachable_pub, reason = "test code")]

mod defects;
mod explore;
mod oracle;
mod story;
#[path = "../support/mod.rs"]
mod support;

use std::sync::Arc;

use explore::{Counts, Defect, Effort};
use oracle::Oracle;

fn seeds() -> Vec<u64> {
    match std::env::var("CDP_SEED") {
        Ok(seed) => vec![seed.parse().expect("CDP_SEED is a number")],
        Err(_) => vec![1],
    }
}

/// Frames of a story: more than it needs.
const FRAMES: usize = 80;

#[test]
fn every_image_that_a_power_cut_could_leave_recovers_to_what_was_acknowledged() {
    let mut total = Counts::default();
    for seed in seeds() {
        let oracle = Arc::new(Oracle::new(seed, FRAMES));
        let outcome = story::run(&oracle, seed, Effort::from_environment(64, 12), Defect::None);
        if let Some(failure) = outcome.failure {
            panic!("{failure}\nto replay: CDP_SEED={seed} cargo test -p journal-store --test power_cut");
        }
        total += outcome.counts;
    }
    println!("{total:?}");
    assert!(total.images > 1000, "{total:?}");
}
