//! The store against a vector of versions, under random requests, seals, reopenings and power cuts.
#![allow(missing_docs, reason = "test code")]

mod support;

use std::sync::Arc;

use journal_format::{ByteRange, GapReason, Lsn, Op, Record, Stamp};
use journal_store::io::{MemStorage, Tearing};
use journal_store::{DiskStore, PointError, PointSpec, Store, StoreError};
use support::{DISK, DISK_BYTES, Model, Random, append, check_point, open, verify};

/// `CDP_SEED=n` replays one run; without it, these.
fn seeds(count: u64) -> Vec<u64> {
    match std::env::var("CDP_SEED") {
        Ok(seed) => vec![seed.parse().expect("CDP_SEED is a number")],
        Err(_) => (1..=count).collect(),
    }
}

/// Runs a test for each seed, and prints the seed that fails.
fn for_seeds(count: u64, test: impl Fn(&mut Random) + std::panic::RefUnwindSafe) {
    for seed in seeds(count) {
        if let Err(panic) = std::panic::catch_unwind(|| test(&mut Random::new(seed))) {
            eprintln!("to replay: CDP_SEED={seed} cargo test -p journal-store --test model");
            std::panic::resume_unwind(panic);
        }
    }
}

struct Run {
    storage: MemStorage,
    store: Store,
    model: Model,
    committed: Lsn,
    /// Bookmarks set by name.
    set: Vec<(String, Lsn)>,
}

impl Run {
    fn new() -> Self {
        let storage = MemStorage::new();
        let store = open(&storage);
        store.open_or_create(DISK, DISK_BYTES).expect("create");
        Self { storage, store, model: Model::new(DISK), committed: Lsn::ZERO, set: Vec::new() }
    }

    fn disk(&self) -> Arc<DiskStore> {
        self.store.disk(DISK).expect("disk")
    }

    fn step(&mut self, random: &mut Random) {
        match random.below(30) {
            0 => self.reopen(),
            1 => self.crash(random),
            2..=9 => self.commit(),
            10 => self.set_bookmark(random),
            11..=12 => self.check(random),
            13 => self.append(true, random),
            _ => self.append(false, random),
        }
    }

    fn append(&mut self, new_epoch: bool, random: &mut Random) {
        let new_epoch = new_epoch || self.model.epoch.0 == 0;
        let made = if new_epoch { self.model.begin_epoch(random) } else { self.model.random_frame(random) };
        append(&self.store, &made).expect("append");
        if random.chance(8) {
            append(&self.store, &made).expect("a frame that is sent again is ignored");
        }
    }

    fn commit(&mut self) {
        let failures = self.store.commit();
        assert!(failures.is_empty(), "{failures:?}");
        self.committed = self.model.last();
        assert_eq!(self.disk().durable_lsn(), self.committed);
        assert_eq!(self.disk().closed_image(), self.model.closed_image());
    }

    /// The process ends and starts again; what was written is still in the page cache, what waited to be written is gone.
    fn reopen(&mut self) {
        let storage = self.storage.clone();
        self.go_on_with(storage);
        assert_eq!(self.disk().closed_image(), self.model.closed_image());
    }

    /// The power fails; what was not durable may be lost, kept or torn.
    fn crash(&mut self, random: &mut Random) {
        let storage = self.storage.crash(Tearing::Torn, |n| random.below(n as u64) as usize);
        self.go_on_with(storage);
    }

    fn go_on_with(&mut self, storage: MemStorage) {
        self.replace(storage);
        let durable = self.disk().durable_lsn();
        assert!(durable >= self.committed, "{durable} was left of {}", self.committed);
        assert!(durable <= self.model.last());
        self.committed = durable;
        self.model.cut(durable);
        if self.disk().last_epoch().0 < self.model.epoch.0 {
            self.model.epoch = self.disk().last_epoch();
        }
    }

    fn replace(&mut self, storage: MemStorage) {
        let elsewhere = MemStorage::new();
        self.store = open(&elsewhere); // drops the old one, and with it the lock
        self.store = open(&storage);
        self.storage = storage;
        assert!(self.store.damaged().is_empty());
        assert_eq!(self.disk().known_damage(), []);
    }

    fn set_bookmark(&mut self, random: &mut Random) {
        let good = self.model.restorable();
        let lsn = Lsn(1 + random.below(self.committed.0.max(1)));
        let name = format!("set-{}", self.set.len());
        match self.disk().add_bookmark(&name, lsn) {
            Ok(bookmark) => {
                assert!(good[lsn.0 as usize - 1]);
                assert_eq!(bookmark.stamp, self.model.records[lsn.0 as usize - 1].record.stamp);
                assert!(self.disk().add_bookmark(&name, lsn).is_err(), "a name is taken once");
                self.set.push((name, lsn));
            }
            Err(StoreError::Point(_)) => assert!(lsn > self.committed || !good[lsn.0 as usize - 1]),
            Err(error) => panic!("{error}"),
        }
    }

    fn check(&self, random: &mut Random) {
        if self.committed == Lsn::ZERO {
            return;
        }
        let disk = self.disk();
        for _ in 0..3 {
            check_point(&disk, &self.model, Lsn(1 + random.below(self.committed.0)), random);
        }
        self.check_difference(&disk, random);
        self.check_history(&disk);
        for _ in 0..10 {
            self.check_resolve(&disk, random);
        }
    }

    fn check_difference(&self, disk: &Arc<DiskStore>, random: &mut Random) {
        let lsns = [0, 1].map(|_| Lsn(1 + random.below(self.committed.0)));
        let views = lsns.map(|lsn| disk.view_in_gap(lsn).expect("view"));
        let images = lsns.map(|lsn| {
            let mut image = self.model.image(lsn);
            image.resize(3 * DISK_BYTES as usize, 0);
            image
        });
        let mut end = 0;
        let both = views[0].disk_bytes().max(views[1].disk_bytes());
        let same = |from: u64, to: u64| {
            let [a, b] = images.each_ref().map(|image| &image[from as usize..to as usize]);
            assert!(a == b, "{lsns:?}: they differ in {from}..{to}, which the difference leaves out");
        };
        for range in views[0].diff(&views[1]).expect("difference") {
            let range = range.expect("range");
            assert!(range.offset() > end || end == 0, "{lsns:?}: ranges that touch are not merged");
            same(end, range.offset());
            end = range.end();
        }
        assert!(end <= both);
        same(end, both);
    }

    fn check_history(&self, disk: &DiskStore) {
        let (history, good) = (disk.history(), self.model.restorable());
        let good = &good[..self.committed.0 as usize];
        assert_eq!(
            history.last,
            Some((self.committed, self.model.records[self.committed.0 as usize - 1].record.stamp))
        );
        let mut told = vec![false; good.len()];
        for range in &history.recoverable {
            told[range.first.0.0 as usize - 1..range.last.0.0 as usize].fill(true);
            for (lsn, stamp) in [range.first, range.last] {
                assert_eq!(stamp, self.model.records[lsn.0 as usize - 1].record.stamp);
            }
        }
        assert_eq!(told, good);
        let mut names: Vec<_> =
            self.model.names().into_iter().filter(|(_, lsn)| *lsn <= self.committed).collect();
        names.extend(self.set.iter().cloned());
        let mut listed: Vec<_> = history.bookmarks.into_iter().map(|b| (b.name, b.lsn)).collect();
        names.sort();
        listed.sort();
        assert_eq!(listed, names);
        assert_eq!(history.epochs.last().map(|start| start.epoch), Some(disk.last_epoch()));
    }

    fn check_resolve(&self, disk: &DiskStore, random: &mut Random) {
        let records = &self.model.records[..self.committed.0 as usize];
        let good = self.model.restorable();
        let stamp = Stamp(990 + random.below(self.model.stamp - 970));
        let newest = records.iter().rev().find(|r| r.record.stamp <= stamp).map(|r| r.record.lsn);
        let is_good = |lsn: Lsn| good[lsn.0 as usize - 1];
        // Behind the last record of an epoch nobody watched the disk, until the next epoch's gap is over.
        let attach = |record: &Record| matches!(record.op, Op::GapBegin { reason: GapReason::Attach, .. });
        let unwatched = |lsn: Lsn| {
            stamp > records[lsn.0 as usize - 1].record.stamp
                && records.get(lsn.0 as usize).is_some_and(|next| attach(&next.record))
        };
        match (disk.resolve(&PointSpec::Stamp(stamp), Stamp::MAX, None), newest) {
            (Ok(point), Some(lsn)) => {
                assert_eq!(point.lsn, lsn);
                assert!(is_good(lsn) && !unwatched(lsn));
                let last = lsn == self.committed;
                assert!(!point.exact || !last || stamp <= point.stamp, "nobody vouched for {stamp:?}");
            }
            (Err(StoreError::Point(PointError::InGap { before, after, .. })), Some(lsn)) => {
                assert!(!is_good(lsn) || unwatched(lsn));
                let lsn = if is_good(lsn) { lsn.next() } else { lsn };
                let nearest = (1..lsn.0).rev().map(Lsn).find(|lsn| is_good(*lsn));
                assert_eq!(before.map(|point| point.lsn), nearest);
                let nearest = (lsn.0..=self.committed.0).map(Lsn).find(|lsn| is_good(*lsn));
                assert_eq!(after.map(|point| point.lsn), nearest);
            }
            (Err(StoreError::Point(PointError::OutOfRange { before: None, after })), None) => {
                let nearest = (1..=self.committed.0).map(Lsn).find(|lsn| is_good(*lsn));
                assert_eq!(after.map(|point| point.lsn), nearest);
            }
            (other, newest) => panic!("{stamp:?}: {other:?}, the newest is {newest:?}"),
        }
    }
}

#[test]
fn every_version_reads_back_after_any_mix_of_requests_seals_reopenings_and_power_cuts() {
    for_seeds(6, |random| {
        let mut run = Run::new();
        for _ in 0..200 {
            run.step(random);
        }
        run.commit();
        run.check(random);
        let damages = verify(&run.disk());
        assert_eq!(damages, []);
    });
}

#[test]
fn a_grown_disk_reads_zeroes_where_it_was_cut_before() {
    use journal_format::Op;
    use support::Change;
    let mut run = Run::new();
    let random = &mut Random::new(1);
    let made = run.model.begin_epoch(random);
    append(&run.store, &made).expect("append");
    let range = ByteRange::new(0, DISK_BYTES).expect("disk");
    let resize = |size| (Op::Resize { disk_bytes: size }, Change::Resize(size), None);
    let fill = vec![7; 4096];
    let data = journal_format::DataSpan { pos: 0, len: 4096 };
    let at = ByteRange::new(DISK_BYTES - 4096, 4096).expect("range");
    let write =
        (Op::Write { range: at, data, fill: false, fua: false }, Change::Write(at.offset(), fill), None);
    let made = run.model.frame(vec![write, resize(4096), resize(DISK_BYTES)], random);
    append(&run.store, &made).expect("append");
    run.commit();
    let last = run.committed;
    check_point(&run.disk(), &run.model, Lsn(last.0 - 2), random);
    check_point(&run.disk(), &run.model, last, random);
    let view = run.disk().view_in_gap(last).expect("view");
    let behind: Vec<_> = view
        .extents(range)
        .expect("extents")
        .map(|e| e.expect("extent"))
        .filter(|e| e.range.end() == DISK_BYTES)
        .collect();
    assert_eq!(behind.len(), 1);
    assert_eq!(behind[0].kind, journal_store::ExtentKind::Zero);
}
