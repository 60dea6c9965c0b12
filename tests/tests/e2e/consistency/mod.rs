//! Crash consistency of every point: programs whose writes have an order are captured, and at thousands of points of the
//! history the disks are looked at as after a power cut.
//!
//! | test | what is written | what must hold at every point outside a gap |
//! | --- | --- | --- |
//! | [`linked`] | records that point to their predecessors, then a header that points to the newest, by several writers at once | the chain is whole; what was complete before the point is there, nothing begun after it is |
//! | [`guest`] | a Linux guest with an ext4 file system on each of two disks | the journal replays, `e2fsck` then finds nothing; synced lines are there; money as below |
//! | [`transfers`] | money moved between two disks of one process, on several iothreads | at one instant of both disks no money is lost or made beyond what is under way |
//! | [`overlap`] | requests that overlap while in flight | the witness's data in the journal's order is every point, and the disk |
//! | [`in_flight`] | the same from a guest that changes its buffers meanwhile | the journal equals the disk |
//!
//! Each test prints its seed and how many points it checked. `CDP_TEST_SEED` repeats a run's random choices;
//! `CDP_TEST_SCALE=N` writes and checks N times as much: `CDP_TEST_SCALE=20 cargo test -p cdp-tests --test e2e
//! consistency -- --nocapture`.

mod guest;
mod in_flight;
mod linked;
mod overlap;
mod transfers;

use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use cdp_tests::journal;
use cdp_tests::random::Random;
use journal_format::{ByteRange, Lsn, Op, Point, PointSpec, Record, RecoverableRange, Stamp};
use journal_store::{DiskStore, Store, StoreError, View};

/// `count`, or the multiple that `CDP_TEST_SCALE` asks for.
fn scaled(count: usize) -> usize {
    let factor = std::env::var("CDP_TEST_SCALE").ok();
    let factor = factor.map_or(1, |text| text.parse::<usize>().expect("CDP_TEST_SCALE is a whole number"));
    assert!(factor > 0, "CDP_TEST_SCALE is at least 1");
    count * factor
}

/// The clock that stamps come from: the host's, in nanoseconds since 1970.
fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock after 1970");
    u64::try_from(since.as_nanos()).expect("a clock before 2554")
}

/// A disk's history, read straight from the store's files while the server runs.
struct History {
    /// Keeps the files open.
    _store: Store,
    disk: Arc<DiskStore>,
    records: Vec<Record>,
    ranges: Vec<RecoverableRange>,
    /// First records of epochs.
    epochs: Vec<Lsn>,
}

impl History {
    /// What is durable of the disk now.
    fn open(store: &Path, disk: &str) -> Self {
        let records = journal::records(store, disk);
        let opened = Store::open_read_only(store).expect("the store");
        let disk = opened.disk(disk.parse().expect("a disk id")).expect("the disk");
        let history = disk.history();
        let (ranges, epochs) = (history.recoverable, history.epochs.iter().map(|start| start.lsn).collect());
        assert!(!ranges.is_empty(), "nothing of the disk can be restored");
        Self { _store: opened, disk, records, ranges, epochs }
    }

    /// Any point outside a gap, asked for in any way: by LSN, by an instant, by the very instant of a record, and by the
    /// nanosecond before it.
    fn any_point(&self, random: &mut Random) -> Point {
        let (first, last) = (self.ranges[0].first, self.ranges[self.ranges.len() - 1].last);
        loop {
            let spec = match random.within(0..4) {
                0 | 1 => PointSpec::Lsn(Lsn(random.within(first.0.0..last.0.0 + 1))),
                2 => PointSpec::Stamp(Stamp(random.within(first.1.0..last.1.0 + 1))),
                _ => PointSpec::Stamp(self.near_a_record(random)),
            };
            match self.disk.resolve(&spec, Stamp::MAX, None) {
                Ok(point) => return point,
                Err(StoreError::Point(_)) => assert!(self.is_refused_rightly(&spec), "{spec:?} was refused"),
                Err(error) => panic!("{spec:?}: {error}"),
            }
        }
    }

    /// The instant of a random record, or just before.
    fn near_a_record(&self, random: &mut Random) -> Stamp {
        let record = &self.records[random.within(0..self.records.len() as u64) as usize];
        Stamp(record.stamp.0 - u64::from(random.chance(50)))
    }

    /// Whether no recoverable range holds the point, or it lies between two epochs, when nobody watched the disk.
    fn is_refused_rightly(&self, spec: &PointSpec) -> bool {
        let lsn = match spec {
            PointSpec::Lsn(lsn) => *lsn,
            PointSpec::Stamp(stamp) => {
                let until = self.records.partition_point(|record| record.stamp <= *stamp);
                let newest = until.checked_sub(1).map(|last| &self.records[last]);
                let begins = self.records.get(until).is_some_and(|next| self.epochs.contains(&next.lsn));
                if begins && newest.is_some_and(|newest| newest.stamp < *stamp) {
                    return true;
                }
                newest.map_or(Lsn::ZERO, |newest| newest.lsn)
            }
            other => panic!("{other:?} is not asked for here"),
        };
        !self.ranges.iter().any(|range| range.first.0 <= lsn && lsn <= range.last.0)
    }

    fn view(&self, lsn: Lsn) -> View {
        self.disk.view(lsn).unwrap_or_else(|e| panic!("view at LSN {lsn}: {e}"))
    }
}

/// What an instant means on two disks; `None` where one of them cannot be restored to it.
fn at_instant(histories: &[History; 2], stamp: Stamp) -> Option<[Lsn; 2]> {
    let resolve = |history: &History| match history.disk.resolve(&PointSpec::Stamp(stamp), Stamp::MAX, None) {
        Ok(point) => Some(point.lsn),
        Err(StoreError::Point(_)) => None,
        Err(error) => panic!("{stamp:?}: {error}"),
    };
    Some([resolve(&histories[0])?, resolve(&histories[1])?])
}

/// The last instant that both histories know.
fn last_instant(histories: &[History; 2]) -> (Stamp, [Lsn; 2]) {
    let last = histories.each_ref().map(|history| history.ranges[history.ranges.len() - 1].last.1);
    let last = last[0].min(last[1]);
    (last, at_instant(histories, last).expect("the end can be restored"))
}

/// An instant that both histories can be restored to, and the LSNs that it means.
fn any_instant(histories: &[History; 2], random: &mut Random) -> (Stamp, [Lsn; 2]) {
    let first = histories.each_ref().map(|history| history.ranges[0].first.1);
    let (first, last) = (first[0].max(first[1]), last_instant(histories).0);
    loop {
        let stamp = match random.within(0..2) {
            0 => Stamp(random.within(first.0..last.0 + 1)),
            _ => histories[random.within(0..2) as usize].near_a_record(random),
        };
        if let Some(lsns) = at_instant(histories, stamp).filter(|_| first <= stamp && stamp <= last) {
            return (stamp, lsns);
        }
    }
}

/// What guests changed since the history is whole for the first time.
fn guest_changes(history: &History) -> Vec<Record> {
    let whole = history.ranges[0].first.0;
    let changes =
        history.records.iter().filter(|record| record.lsn > whole && journal::is_guest_change(record));
    changes.copied().collect()
}

/// The range that a guest's request changed.
fn range_of(record: &Record) -> ByteRange {
    match record.op {
        Op::Write { range, .. } | Op::Zero { range, .. } | Op::Discard { range } => range,
        _ => panic!("no change of a range: {record:?}"),
    }
}

fn read(view: &View, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    view.read(offset, &mut bytes).unwrap_or_else(|e| panic!("read at LSN {}: {e}", view.lsn()));
    bytes
}

/// FNV-1a, enough to tell torn from whole.
fn checksum(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

/// Puts little-endian numbers, and the checksum of all before it, at the front of a block of `length` bytes whose rest is
/// `filler`.
fn sealed(words: &[u64], filler: &[u8], length: usize) -> Vec<u8> {
    let mut block: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    block.extend(filler);
    assert!(block.len() <= length - 8, "no room for the checksum");
    block.resize(length - 8, 0);
    block.extend(checksum(&block).to_le_bytes());
    block
}

/// The first `N` numbers of a block of which the checksum is right; `None` for any other block.
fn unsealed<const N: usize>(block: &[u8]) -> Option<[u64; N]> {
    let (body, sum) = block.split_at(block.len() - 8);
    let words = |at: usize| u64::from_le_bytes(body[at * 8..at * 8 + 8].try_into().expect("8 bytes"));
    (checksum(body).to_le_bytes() == *sum).then(|| std::array::from_fn(words))
}
