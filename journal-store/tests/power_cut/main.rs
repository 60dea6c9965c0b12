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

use std::sync::{Arc, Mutex};

use explore::{Counts, Defect, Effort};
use journal_store::io::{Answer, Call, CallKind, Hook, HookStorage, MemStorage, Tearing};
use oracle::{DISK_BYTES, Known, Oracle};
use support::{DISK, Random, append};

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

/// The image in which write number `which` of what is unsynced was cut off after `kept` bytes and everything else arrived;
/// `None` when there is no such write, or it is not so long.
fn cut_off(memory: &MemStorage, which: usize, kept: usize) -> Option<MemStorage> {
    let (mut writes, mut cut, mut found) = (0, false, false);
    let image = memory.crash(Tearing::Torn, |n| {
        // A write was torn: the choice is where.
        if std::mem::take(&mut cut) {
            found = kept < n;
            return kept.min(n - 1);
        }
        // Five ways in which a write may arrive, three lengths of a file, two for a name.
        match n {
            5 => {
                writes += 1;
                cut = writes - 1 == which;
                if cut { 2 } else { 1 }
            }
            3 => 0,
            _ => 1,
        }
    });
    found.then_some(image)
}

/// Keeps what a process leaves that dies before the first file is made durable.
#[derive(Debug)]
struct BeforeSync {
    memory: MemStorage,
    left: Mutex<Option<MemStorage>>,
}

impl Hook for BeforeSync {
    fn before(&self, call: &Call<'_>) -> Answer {
        if call.kind == CallKind::Sync {
            self.left.lock().expect("lock").get_or_insert_with(|| self.memory.fork());
        }
        Answer::Go
    }
}

#[test]
fn an_append_that_is_cut_off_after_any_byte_is_cut_back_to_what_was_acknowledged() {
    let oracle = Oracle::new(1, 4);
    let memory = MemStorage::new();
    let before_sync = Arc::new(BeforeSync { memory: memory.clone(), left: Mutex::default() });
    let hooked = HookStorage::new(Arc::new(memory.clone()), Arc::clone(&before_sync) as Arc<dyn Hook>);
    let store = oracle::open(Arc::new(hooked)).expect("open");
    let disk = store.open_or_create(DISK, DISK_BYTES).expect("disk");
    append(&store, &oracle.frames[0]).expect("append");
    assert!(store.commit().is_empty());
    let acknowledged = disk.durable_lsn();
    append(&store, &oracle.frames[1]).expect("append");
    *before_sync.left.lock().expect("lock") = None;
    assert!(store.commit().is_empty());
    let memory = before_sync.left.lock().expect("lock").take().expect("the commit makes it durable");
    let known = Known { made: true, acknowledged, appended: oracle.frames[1].last, ..Known::default() };
    let (mut images, mut cut_back) = (0, 0);
    for which in 0.. {
        let before = images;
        while let Some(image) = cut_off(&memory, which, images - before) {
            images += 1;
            let told = oracle.check(&image, &known, &mut Random::new(images as u64));
            let told =
                told.unwrap_or_else(|wrong| panic!("write {which}, {} bytes: {wrong}", images - before));
            cut_back += usize::from(told == acknowledged);
        }
        if images == before {
            break;
        }
    }
    println!("{images} places to cut off, {cut_back} cut back");
    // The mark of the commit before is unsynced too; an append is whole without the rest of it.
    assert!(cut_back > 300 && images > cut_back, "{images} {cut_back}");
}
