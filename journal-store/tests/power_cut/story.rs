//! What happens to the store while the power fails: a table of operations, each done in turn. An operation that changes
//! files in a new way joins the proof by a row here.

use std::sync::Arc;

use journal_format::Lsn;
use journal_store::io::{MemStorage, Tearing};
use journal_store::{DiskStore, Store};

use crate::explore::{Counts, Defect, Effort, Explorer, Step};
use crate::oracle::{self, DISK_BYTES, Oracle, Verdict};
use crate::support::{DISK, Random, append};

/// An operation: its name, and what it does.
pub type Operation = (&'static str, fn(&mut World) -> Verdict);

/// Every operation that changes files.
pub const OPERATIONS: &[Operation] = &[
    ("make a disk", make),
    ("commit one frame", |world| world.commit(1)),
    ("commit three frames", |world| world.commit(3)),
    ("set a bookmark", set_bookmark),
    ("commit and seal", commit_until_sealed),
    ("commit into the new segment", |world| world.commit(1)),
    ("open again", World::reopen),
    ("commit behind an opening", |world| world.commit(2)),
    ("open after the process died with a tail", die_with_a_tail),
    ("open after a power cut tore a tail", lose_a_tail),
    ("seal, and die before it is durable", die_while_sealing),
    ("commit into a segment that a dead process made", |world| world.commit(2)),
    ("set another bookmark", set_bookmark),
    ("seal again", commit_until_sealed),
    ("open with a rotten index", |world| world.reopen_with_rot("index-000001.idx", 4200)),
    ("open with a rotten page of an index, and read", World::mend_a_page),
    ("open with a rotten manifest", |world| world.reopen_with_rot("manifest", 20)),
    ("open with a rotten copy of the bookmarks", |world| world.reopen_with_rot("bookmarks.copy", 70)),
    ("commit after mending", |world| world.commit(2)),
];

/// The store during the story.
pub struct World {
    explorer: Arc<Explorer>,
    oracle: Arc<Oracle>,
    random: Random,
    store: Option<Store>,
}

/// What a run found out.
pub struct Outcome {
    pub counts: Counts,
    pub steps: Vec<Step>,
    pub failure: Option<String>,
}

/// Runs the whole story.
pub fn run(oracle: &Arc<Oracle>, seed: u64, effort: Effort, defect: Defect) -> Outcome {
    let explorer = Explorer::new(oracle, seed, effort, defect);
    let (oracle, random) = (Arc::clone(oracle), Random::new(seed + 1));
    let mut world = World { explorer: Arc::clone(&explorer), oracle, random, store: None };
    for (name, operation) in OPERATIONS {
        explorer.begin(name);
        // With a defect an operation may fail outright, which is a way to notice it.
        if let Err(failure) = operation(&mut world) {
            explorer.fail(format!("{name}: {failure}"));
        }
        explorer.look();
        if explorer.failure().is_some() {
            break;
        }
    }
    Outcome { counts: explorer.counts(), steps: explorer.steps(), failure: explorer.failure() }
}

fn text(error: impl ToString) -> String {
    error.to_string()
}

fn make(world: &mut World) -> Verdict {
    world.open_store()?;
    world.store()?.open_or_create(DISK, DISK_BYTES).map_err(text)?;
    world.explorer.learn(|known| known.made = true);
    Ok(())
}

fn set_bookmark(world: &mut World) -> Verdict {
    let lsn = loop {
        let acknowledged = world.explorer.known().acknowledged;
        let good = |lsn: &Lsn| world.oracle.is_restorable(*lsn);
        match (1..=acknowledged.0).rev().map(Lsn).find(good) {
            Some(lsn) => break lsn,
            // The story begins with a gap that is still open.
            None => world.commit(1)?,
        }
    };
    let name = format!("set-{}", world.explorer.known().bookmarks.len());
    world.explorer.learn(|known| known.setting = Some((name.clone(), lsn)));
    world.disk()?.add_bookmark(&name, lsn).map_err(text)?;
    world.explorer.learn(|known| known.bookmarks.extend(known.setting.take()));
    Ok(())
}

fn commit_until_sealed(world: &mut World) -> Verdict {
    let segments = world.disk()?.stats().segments;
    while world.disk()?.stats().segments == segments {
        world.commit(1)?;
    }
    Ok(())
}

fn die_with_a_tail(world: &mut World) -> Verdict {
    let left = world.leave_a_tail(2)?;
    world.explorer.replace(left);
    world.reopen()
}

/// The process dies when the new manifest can be seen but is not durable; another one goes on from there.
fn die_while_sealing(world: &mut World) -> Verdict {
    world.explorer.die_between("Rename manifest", "SyncDir folder");
    commit_until_sealed(world)?;
    world.store = None;
    let (left, known) = world.explorer.left().ok_or("the process did not die")?;
    world.explorer.replace(left);
    world.explorer.learn(|now| *now = known);
    world.explorer.begin("open after the process died while it sealed");
    world.reopen()
}

fn lose_a_tail(world: &mut World) -> Verdict {
    let left = world.leave_a_tail(3)?;
    let mut random = world.random.clone();
    let left = left.crash(Tearing::Torn, |n| random.below(n as u64) as usize);
    world.explorer.replace(left);
    world.reopen()
}

impl World {
    fn store(&self) -> Result<&Store, String> {
        self.store.as_ref().ok_or_else(|| "the store is closed".into())
    }

    fn disk(&self) -> Result<Arc<DiskStore>, String> {
        self.store()?.disk(DISK).ok_or_else(|| "the disk is gone".into())
    }

    fn open_store(&mut self) -> Verdict {
        self.store = None;
        self.store = Some(oracle::open(Arc::new(self.explorer.storage()))?);
        Ok(())
    }

    /// Opening again tells what is durable: that is an acknowledgement too.
    fn reopen(&mut self) -> Verdict {
        self.open_store()?;
        let told = self.disk()?.durable_lsn();
        let before = self.explorer.known().acknowledged;
        oracle::ensure(told >= before, || format!("LSN {before} was acknowledged, {told} is left"))?;
        self.explorer.learn(|known| (known.acknowledged, known.appended) = (told, told));
        Ok(())
    }

    fn reopen_with_rot(&mut self, name: &str, at: usize) -> Verdict {
        self.store = None;
        let mut files = self.explorer.memory().files();
        let file = files.iter_mut().find(|(path, _)| path.ends_with(name)).ok_or(format!("no {name}"))?;
        *file.1.get_mut(at).ok_or(format!("{name} is short"))? ^= 4;
        self.explorer.replace(MemStorage::with_files(&files));
        self.explorer.learn(|known| known.rotten = true);
        self.reopen()?;
        oracle::ensure(!self.disk()?.known_damage().is_empty(), || format!("rot in {name} was not told"))?;
        self.explorer.learn(|known| known.rotten = false);
        Ok(())
    }

    /// Whoever reads comes to the page, and mends it.
    fn mend_a_page(&mut self) -> Verdict {
        self.store = None;
        let mut files = self.explorer.memory().files();
        let (path, bytes) =
            files.iter_mut().find(|(path, _)| path.ends_with("index-000001.idx")).ok_or("no index")?;
        let (path, good) = (path.clone(), bytes.clone());
        *bytes.last_mut().ok_or("the index is empty")? ^= 4;
        self.explorer.replace(MemStorage::with_files(&files));
        self.explorer.learn(|known| known.rotten = true);
        self.reopen()?;
        oracle::ensure(self.disk()?.known_damage().is_empty(), || "opening looked at a page".into())?;
        for lsn in 1..=self.explorer.known().acknowledged.0 {
            self.oracle.point(&self.disk()?, Lsn(lsn))?;
        }
        oracle::ensure(!self.disk()?.known_damage().is_empty(), || "rot in a page was not told".into())?;
        oracle::ensure(self.explorer.memory().files()[&path] == good, || "the page was not mended".into())?;
        self.explorer.learn(|known| known.rotten = false);
        Ok(())
    }

    fn append(&mut self, count: usize) -> Verdict {
        let from = self.explorer.known().appended;
        for made in self.oracle.frames_after(from).take(count) {
            self.explorer.learn(|known| known.appended = made.last);
            append(self.store()?, made).map_err(text)?;
        }
        Ok(())
    }

    /// The process dies in a commit of so many frames, when all is written and nothing durable: what it leaves.
    fn leave_a_tail(&mut self, count: usize) -> Result<MemStorage, String> {
        self.explorer.die_between("Write data-.seg", "Sync data-.seg");
        self.commit(count)?;
        self.store = None;
        let (left, known) = self.explorer.left().ok_or("the process did not die")?;
        self.explorer.learn(|now| *now = known);
        Ok(left)
    }

    fn commit(&mut self, count: usize) -> Verdict {
        self.append(count)?;
        let failures = self.store()?.commit();
        oracle::ensure(failures.is_empty(), || format!("{failures:?}"))?;
        let durable = self.disk()?.durable_lsn();
        self.explorer.learn(|known| known.acknowledged = durable);
        Ok(())
    }
}
