//! The invariants, checked against the model.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

use capture_ring::Mode;
use host_agent::session::FilterId;
use journal_format::{Lsn, Stamp};
use journal_store::{DiskStore, History, PointError, PointSpec, StoreError};

use super::guest::DISKS;
use super::model::Span;
use super::world::World;

/// What was seen so far, and how much was checked.
#[derive(Default)]
pub(crate) struct Checks {
    /// Which process each connection of a filter was.
    pub(crate) filters: Vec<(FilterId, u32)>,
    /// Requests that the guest was told of: when, and the greatest stamp until then.
    told: Vec<(u64, u64)>,
    /// How far each disk's journal was durable at the last step, and the server's start then.
    durable: [(u64, Lsn); DISKS],
    /// Epochs that began without a sync.
    pub(crate) unchanged: u64,
    /// Rings that went on with another agent.
    pub(crate) adopted: u64,
    /// Flushes that were durable when they completed.
    pub(crate) flushes: u64,
    /// Requests that waited for room.
    pub(crate) waits: u64,
    /// Bookmarks found where they were promised.
    pub(crate) bookmarks: u64,
    /// Most bytes that one comparison has left out.
    pub(crate) equal_bytes: u64,
    /// Points compared byte for byte.
    pub(crate) points: u64,
    /// Points inside gaps that were refused.
    pub(crate) refused: u64,
    /// Instants at which both disks were compared.
    pub(crate) instants: u64,
    /// Sealed segments as they were first seen (invariant I6).
    sealed: BTreeMap<PathBuf, Vec<u8>>,
}

impl Checks {
    pub(crate) fn pid_of(&self, filter: FilterId) -> u32 {
        self.filters.iter().find(|(known, _)| *known == filter).map_or(0, |(_, pid)| *pid)
    }

    /// After every step: what is cheap to look at. Full images are compared now and then.
    pub(crate) fn step(world: &mut World) {
        for i in 0..DISKS {
            Self::numbers(world, i);
            Self::gap(world, i);
            let Some(disk) = world.disk_store(i) else { continue };
            Self::acknowledged(world, i, &disk);
            let now = (world.server.starts, disk.durable_lsn());
            let before = std::mem::replace(&mut world.checks.durable[i], now);
            assert!(before.0 != now.0 || before.1 <= now.1, "I5: disk {i}: {before:?} became {now:?}");
            if world.random.chance(2) {
                Self::ranges(world, i, &disk, &disk.history());
                Self::sample(world, i, &disk, 1);
            }
        }
    }

    /// I5: nobody at the agent holds for durable what the server did not say so of, and captured ≥ packed.
    fn numbers(world: &mut World, i: usize) {
        let acked = world.server.acked.get(&world.ids[i]).copied().unwrap_or_default();
        let Some(agent) = &mut world.agent else { return };
        world.checks.equal_bytes = world.checks.equal_bytes.max(agent.equal_bytes);
        let Some(numbers) = agent.numbers(world.ids[i]) else { return };
        let durable = acked.max(numbers.first.prev());
        let most = numbers.told.max(numbers.released);
        assert!(
            most <= durable,
            "I5: disk {i}: the agent takes LSN {most} for durable, the server said {acked}"
        );
        let packed = numbers.packed.unwrap_or_default().max(most);
        assert!(
            packed <= numbers.captured,
            "disk {i}: LSN {packed} is packed, {} captured",
            numbers.captured
        );
    }

    /// I4: what history does not have lies in a gap that is open.
    fn gap(world: &World, i: usize) {
        let Some(attached) = world.attached(i) else { return };
        let (ring, mode) = (&attached.ring, attached.ring.mode().mode);
        if mode != Mode::Off && !ring.gap_is_open() {
            assert_eq!(mode, Mode::Capturing, "I4: disk {i} is {mode:?} outside a gap");
            assert_eq!(ring.dirty().bytes(), 0, "I4: disk {i} has dirty bytes outside a gap");
        }
    }

    /// I3, at its source: this request has a greater stamp than all that the guest knew to be complete when it began it.
    pub(crate) fn in_order(&mut self, span: Span, stamp: u64) {
        let before = self.told.partition_point(|(ended, _)| *ended < span.began);
        if let Some((_, earlier)) = before.checked_sub(1).and_then(|last| self.told.get(last)) {
            assert!(*earlier < stamp, "I3: a request has stamp {stamp}, one before it {earlier}");
        }
        let most = self.told.last().map_or(stamp, |(_, most)| stamp.max(*most));
        self.told.push((span.ended, most));
    }

    /// A bookmark that the operator was told of is where it was.
    fn bookmark(world: &mut World, n: usize) {
        let (id, name, lsn) = &world.server.bookmarks[n];
        let i = world.ids.iter().position(|known| known == id).expect("one of the disks");
        let disk = world.disk_store(i).unwrap_or_else(|| panic!("I5: disk {i} is gone with {name}"));
        let whole = world.models[i].get(lsn.0).is_some_and(|point| point.whole);
        match disk.resolve(&PointSpec::Bookmark(name.clone()), Stamp(u64::MAX / 4), None) {
            Ok(point) => assert!(whole && point.lsn == *lsn, "{name} of disk {i}: {point:?}, promised {lsn}"),
            Err(StoreError::Point(PointError::InGap { .. })) if !whole => {}
            Err(error) => panic!("{name} of disk {i}, promised at LSN {lsn}: {error}"),
        }
        world.checks.bookmarks += 1;
    }

    fn bookmarks(world: &mut World) {
        for n in 0..world.server.bookmarks.len() {
            Self::bookmark(world, n);
        }
    }

    /// After a commit: something new may be restorable.
    pub(crate) fn committed(world: &mut World) {
        for i in 0..DISKS {
            let Some(disk) = world.disk_store(i) else { continue };
            Self::acknowledged(world, i, &disk);
            let history = disk.history();
            Self::ranges(world, i, &disk, &history);
            Self::sample(world, i, &disk, 1);
        }
        if world.random.chance(25) {
            Self::instant(world);
        }
        if world.random.chance(10) {
            Self::segments(world);
        }
        if world.random.chance(10) && !world.server.bookmarks.is_empty() {
            let n = world.random.within(0..world.server.bookmarks.len() as u64);
            Self::bookmark(world, n as usize);
        }
    }

    /// After a restart: what was acknowledged is there, and it is what it was.
    pub(crate) fn restarted(world: &mut World) {
        for i in 0..DISKS {
            let Some(disk) = world.disk_store(i) else {
                let acked = world.server.acked.get(&world.ids[i]);
                assert!(acked.is_none(), "I5: disk {i} is gone, LSN {acked:?} was acknowledged");
                continue;
            };
            Self::acknowledged(world, i, &disk);
            let history = disk.history();
            Self::ranges(world, i, &disk, &history);
            Self::sample(world, i, &disk, 3);
        }
        Self::instant(world);
        Self::segments(world);
        Self::bookmarks(world);
    }

    /// At the end: everything is there, from the first point to the newest, which is what the disk holds.
    pub(crate) fn finished(world: &mut World) {
        for i in 0..DISKS {
            let disk = world.disk_store(i).expect("a disk that is whole");
            Self::acknowledged(world, i, &disk);
            Self::sample(world, i, &disk, 12);
            let last = disk.durable_lsn();
            let found = contents(&disk, last).expect("the newest point of a whole disk");
            assert!(
                found == world.images[i],
                "I2: disk {i} at its newest LSN {last} is not what the disk holds"
            );
            let verified = disk.verify(Lsn::FIRST..=Lsn::MAX, &mut |_| ControlFlow::Continue(()));
            assert!(verified.damage.is_empty(), "disk {i}: verify finds {:?}", verified.damage);
        }
        for _ in 0..6 {
            Self::instant(world);
        }
        Self::segments(world);
        Self::bookmarks(world);
    }

    /// I5.
    fn acknowledged(world: &World, i: usize, disk: &DiskStore) {
        let acked = world.server.acked.get(&world.ids[i]).copied().unwrap_or_default();
        assert!(
            disk.durable_lsn() >= acked,
            "I5: disk {i} ends at {}, acknowledged {acked}",
            disk.durable_lsn()
        );
    }

    /// I4: stretches and gaps cover the history, in order, and are what the model says.
    fn ranges(world: &World, i: usize, disk: &DiskStore, history: &History) {
        let (Some((first, _)), Some((last, _))) = (history.first, history.last) else { return };
        assert_eq!(last, disk.durable_lsn());
        let mut parts: Vec<(u64, u64)> =
            history.recoverable.iter().map(|r| (r.first.0.0, r.last.0.0)).collect();
        for gap in &history.gaps {
            let end = gap.end.map_or(last.0, |(end, _)| end.0 - 1);
            parts.push((gap.begin_lsn.0, end));
        }
        parts.sort_unstable();
        let mut next = first.0;
        for (from, to) in parts {
            assert_eq!(from, next, "I4: disk {i}: stretches and gaps do not join: {history:?}");
            next = to + 1;
        }
        assert_eq!(next, last.0 + 1, "I4: disk {i}: stretches and gaps end early: {history:?}");
        for range in &history.recoverable {
            for lsn in [range.first.0, range.last.0] {
                let point = world.models[i]
                    .get(lsn.0)
                    .unwrap_or_else(|| panic!("disk {i}: LSN {lsn} was never given"));
                assert!(point.whole, "I4: disk {i}: LSN {lsn} ({}) is listed, but lies in a gap", point.what);
            }
        }
        for gap in &history.gaps {
            let whole = world.models[i].get(gap.begin_lsn.0).is_none_or(|point| point.whole);
            let epoch = world.models[i].epochs.iter().find(|epoch| epoch.first == gap.begin_lsn.0);
            assert!(
                !whole || epoch.is_some(),
                "I4: disk {i}: a gap at {} that never happened",
                gap.begin_lsn
            );
            let begins = epoch.map_or(gap.reason, |epoch| epoch.begins);
            assert_eq!(gap.reason, begins, "I4: disk {i}: the gap at {}", gap.begin_lsn);
        }
    }

    /// I2, I4: random points.
    fn sample(world: &mut World, i: usize, disk: &Arc<DiskStore>, count: u64) {
        let (first, last) = match disk.history() {
            History { first: Some((first, _)), last: Some((last, _)), .. } => (first.0, last.0),
            _ => return,
        };
        for n in 0..count {
            let lsn = if n == 0 { last } else { world.random.within(first..last + 1) };
            Self::point(world, i, disk, Lsn(lsn));
        }
    }

    fn point(world: &mut World, i: usize, disk: &Arc<DiskStore>, lsn: Lsn) {
        let point = world.models[i].get(lsn.0).cloned();
        let point = point.unwrap_or_else(|| panic!("I2: disk {i}: LSN {lsn} was never given"));
        match contents(disk, lsn) {
            Ok(found) => {
                assert!(point.whole, "I4: disk {i}: LSN {lsn} ({}) is served, but lies in a gap", point.what);
                let differs = world.models[i].differs(lsn.0, &found);
                assert_eq!(differs, None, "I2: disk {i} at LSN {lsn} ({}) is wrong at this byte", point.what);
                world.checks.points += 1;
            }
            Err(StoreError::Point(refusal)) => {
                assert!(!point.whole, "I4: disk {i}: LSN {lsn} ({}) is refused: {refusal}", point.what);
                Self::neighbours(world, i, disk, lsn, &refusal);
                world.checks.refused += 1;
            }
            Err(error) => panic!("disk {i} at LSN {lsn}: {error}"),
        }
    }

    /// The points that a refusal offers are the nearest good ones.
    fn neighbours(world: &World, i: usize, disk: &Arc<DiskStore>, lsn: Lsn, refusal: &PointError) {
        let (before, after) = match refusal {
            PointError::OutOfRange { before, after } | PointError::InGap { before, after, .. } => {
                (before, after)
            }
            PointError::NoSuchBookmark { .. } => panic!("no bookmark was asked for"),
        };
        let model = &world.models[i];
        let durable = disk.durable_lsn().0;
        let older = model.back_from(lsn.0).find(|(_, point)| point.whole).map(|(lsn, _)| lsn);
        let newer = model.after(lsn.0).find(|(at, point)| point.whole && *at <= durable).map(|(lsn, _)| lsn);
        assert_eq!(before.map(|point| point.lsn.0), older, "I4: disk {i}: the point before LSN {lsn}");
        assert_eq!(after.map(|point| point.lsn.0), newer, "I4: disk {i}: the point after LSN {lsn}");
    }

    /// I3: an instant on both disks: no request is in that began after one that is out was complete.
    fn instant(world: &mut World) {
        let stores: Vec<_> = (0..DISKS).filter_map(|i| world.disk_store(i)).collect();
        let [a, b] = &stores[..] else { return };
        let from = |disk: &DiskStore| disk.history().first.map_or(u64::MAX, |(_, stamp)| stamp.0);
        let to = a.durable_stamp().0.min(b.durable_stamp().0);
        let from = from(a).max(from(b));
        if from >= to {
            return;
        }
        let stamp = world.random.within(from..to + 1);
        let resolve =
            |disk: &DiskStore| disk.resolve(&PointSpec::Stamp(Stamp(stamp)), Stamp(u64::MAX / 4), None);
        let (Ok(a), Ok(b)) = (resolve(a), resolve(b)) else { return };
        let cuts = [a.lsn.0, b.lsn.0];
        let mut newest_in = 0;
        let mut oldest_out = u64::MAX;
        for (model, cut) in world.models.iter().zip(cuts) {
            let point = model.get(cut).expect("a resolved point was given");
            assert!(point.stamp <= stamp, "I3: LSN {cut} is later than the instant");
            newest_in =
                model.back_from(cut).filter_map(|(_, p)| p.span).map(|s| s.began).fold(newest_in, u64::max);
            oldest_out =
                model.after(cut).filter_map(|(_, p)| p.span).map(|s| s.ended).fold(oldest_out, u64::min);
        }
        assert!(
            newest_in < oldest_out,
            "I3: at {stamp} (LSNs {cuts:?}) a request is in that began after one that is out"
        );
        world.checks.instants += 1;
    }

    /// I6.
    fn segments(world: &mut World) {
        let files = world.server.volumes().files();
        for (path, bytes) in &files {
            if let Some(then) = world.checks.sealed.get(path) {
                assert!(then == bytes, "I6: {} has changed after it was sealed", path.display());
            }
        }
        // A seal is complete when the manifest names a later segment; before that its files may be made again.
        for i in 0..DISKS {
            let Some(store) = world.disk_store(i).filter(|store| store.stats().segments > 1) else {
                continue;
            };
            let id = store.id().to_string();
            let sealed = files.keys().filter(|path| path.extension().is_some_and(|kind| kind == "idx"));
            for index in sealed.filter(|path| path.to_string_lossy().contains(&id)) {
                let number = index.file_stem().map(|stem| stem.to_string_lossy().replace("index-", ""));
                let number = number.unwrap_or_default();
                let parts = ["data", "meta"].map(|kind| index.with_file_name(format!("{kind}-{number}.seg")));
                for path in parts.into_iter().chain([index.clone()]) {
                    if let Some(bytes) = files.get(&path) {
                        world.checks.sealed.entry(path).or_insert_with(|| bytes.clone());
                    }
                }
            }
        }
        world.checks.sealed.retain(|path, _| files.contains_key(path));
    }
}

impl World {
    fn disk_store(&self, i: usize) -> Option<Arc<DiskStore>> {
        self.server.store().and_then(|store| store.disk(self.ids[i]))
    }
}

fn contents(disk: &Arc<DiskStore>, lsn: Lsn) -> Result<Vec<u8>, StoreError> {
    let view = disk.view(lsn)?;
    let mut bytes = vec![0; usize::try_from(view.disk_bytes()).expect("a small disk")];
    view.read(0, &mut bytes)?;
    Ok(bytes)
}
