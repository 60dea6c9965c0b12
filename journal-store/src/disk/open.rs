//! Opening a disk: making it, recovering it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use journal_format::index::{IndexFrame, IndexShape};
use journal_format::manifest::{LiveSegment, Manifest, Sealed};
use journal_format::recovery::DataState;
use journal_format::segment::{Place, SegmentKind, next_entry};
use journal_format::{DiskId, Epoch, Lsn, Op, SegmentNumber, Stamp};

use super::bookmarks::read_bookmarks;
use super::mark::{self, Mark};
use super::scan::{Scanned, Source};
use super::seal::{load_index, put_index};
use super::tail::Tail;
use super::writer::{Event, Last, Pending, Writer};
use super::{DiskStore, Env, State, Stats, data, segment_path};
use crate::damage::{Damage, DamageKind};
use crate::error::StoreError;
use crate::files;
use crate::io::{Access, Bytes, File, Storage};
use crate::segment::{Segment, SegmentIndex};
use crate::timeline::Timeline;

impl State {
    /// Takes in events, in LSN order.
    pub(super) fn apply(&mut self, events: Vec<Event>) {
        for event in events {
            match event {
                Event::Epoch { epoch, lsn, stamp, disk_bytes } => {
                    self.last_epoch = epoch;
                    self.timeline.begin_epoch(epoch, lsn, stamp, disk_bytes);
                }
                Event::Mark(record) => self.timeline.apply(&record),
                Event::Bookmark(bookmark) => self.add_bookmark(bookmark),
            }
        }
        if let Some(disk_bytes) = self.timeline.size_at(Lsn::MAX) {
            self.disk_bytes = disk_bytes;
        }
    }
}

/// Opens and recovers a disk.
pub(crate) fn open(env: &Arc<Env>, disk: DiskId, writable: bool) -> Result<Arc<DiskStore>, StoreError> {
    let dir = files::disk_dir(&env.root, disk);
    // The mark is read before what it speaks of, so that a writer beside us cannot make it say too much.
    let durable = mark::read(&*env.storage, &dir, disk)?;
    let mut opener = Opener { env, disk, writable, state: State::new(), last: Last::default(), durable, dir };
    let manifest = opener.read_manifest()?;
    opener.state.disk_bytes = manifest.disk_bytes;
    opener.state.last_epoch = Epoch(0);
    let mut segments = Vec::with_capacity(manifest.segments.len());
    let mut tails = None;
    for live in &manifest.segments {
        if opener.state.damage.is_some() {
            break;
        }
        let index = match &live.sealed {
            Some(sealed) => opener.open_sealed(live, sealed)?,
            None => opener.open_active(live)?.map(|(index, active)| {
                tails = active;
                index
            }),
        };
        segments.extend(index.map(|index| Arc::new(Segment::new(live.segment, live.first_lsn, index))));
    }
    opener.state.stats.segments = segments.len() as u64;
    opener.state.segments = Arc::new(segments);
    opener.finish(manifest, tails)
}

/// A disk that is being opened.
pub(super) struct Opener<'a> {
    pub(super) env: &'a Arc<Env>,
    pub(super) disk: DiskId,
    pub(super) dir: PathBuf,
    pub(super) writable: bool,
    pub(super) state: State,
    pub(super) last: Last,
    /// What the durable mark says.
    pub(super) durable: Lsn,
}

impl State {
    fn new() -> Self {
        Self {
            segments: Arc::default(),
            durable_lsn: Lsn::ZERO,
            durable_stamp: Stamp::ZERO,
            last_epoch: Epoch(0),
            disk_bytes: 0,
            timeline: Timeline::default(),
            bookmarks: Vec::new(),
            bookmarks_damage: None,
            damage: None,
            noted: Vec::new(),
            stats: Stats::default(),
        }
    }
}

impl Opener<'_> {
    pub(super) fn damage(
        &self,
        place: (&Path, u64),
        first_lsn: Lsn,
        kind: DamageKind,
        detail: impl ToString,
    ) -> Damage {
        Damage::new(self.disk, place, (first_lsn, Lsn::MAX), kind, detail)
    }

    fn read_file(&self, path: &Path, access: Access) -> Result<(Arc<dyn File>, Vec<u8>), StoreError> {
        let file = self.env.storage.open(path, access).map_err(StoreError::io("open", path))?;
        let bytes = files::read_all(&*file, path)?;
        Ok((file, bytes))
    }

    /// Takes in the last record of a segment.
    fn advance(&mut self, last: Last, records: u64, raw_bytes: u64) {
        self.last = last;
        (self.state.durable_lsn, self.state.durable_stamp) = (last.lsn, last.stamp);
        self.state.stats.records = self.state.stats.records.saturating_add(records);
        self.state.stats.raw_bytes = self.state.stats.raw_bytes.saturating_add(raw_bytes);
    }

    fn open_sealed(
        &mut self,
        live: &LiveSegment,
        sealed: &Sealed,
    ) -> Result<Option<SegmentIndex>, StoreError> {
        let path = segment_path(&self.dir, SegmentKind::Index, live.segment);
        // Pages of chunks and extents are checked by who looks at them: all of them together are nearly the whole file.
        let loaded = load_index(&*self.env.storage, &path, (self.disk, live.segment), IndexShape::parse)?;
        self.state.stats.stored_data_bytes += sealed.data_bytes;
        self.state.stats.stored_meta_bytes += sealed.meta_bytes + sealed.index_bytes;
        let fits = |shape: &IndexShape| {
            (shape.first_lsn(), shape.last_lsn()) == (live.first_lsn, sealed.last_lsn)
                && (shape.first_stamp(), shape.last_stamp()) == (sealed.first_stamp, sealed.last_stamp)
        };
        match loaded {
            Ok((shape, bytes)) if fits(&shape) => self.take_sealed(live, shape, bytes),
            // The index holds nothing that the records do not say too.
            Ok(_) => self.rebuild_sealed(live, sealed, "the index does not fit the manifest"),
            Err(why) => self.rebuild_sealed(live, sealed, &why),
        }
    }

    fn take_sealed(
        &mut self,
        live: &LiveSegment,
        shape: IndexShape,
        bytes: Bytes,
    ) -> Result<Option<SegmentIndex>, StoreError> {
        let (frames, marks): (Vec<_>, Vec<_>) = {
            let index = shape.open(&bytes);
            (index.frames().collect(), index.marks().collect())
        };
        // The size at the begin of an epoch is the one at the segment's end, if nothing changes it in between.
        let last_epoch = frames.last().map(|frame| frame.epoch);
        let resized =
            marks.iter().rev().find(|mark| matches!(mark.op, Op::Resize { .. })).map(|mark| mark.lsn);
        let sure = |frame: &IndexFrame| Some(frame.epoch) == last_epoch && resized < Some(frame.first_lsn);
        let mut marks = marks.into_iter().peekable();
        for frame in frames {
            let mut events = Vec::new();
            if frame.epoch > self.state.last_epoch {
                match self.epoch_size(live.segment, &frame) {
                    Ok(disk_bytes) => {
                        let (epoch, lsn, stamp) = (frame.epoch, frame.first_lsn, frame.first_stamp);
                        events.push(Event::Epoch { epoch, lsn, stamp, disk_bytes });
                    }
                    Err(StoreError::Damaged { path, detail, .. }) if sure(&frame) => {
                        let (lsns, place) =
                            ((frame.first_lsn, frame.last_lsn()), (&*path, frame.meta_position));
                        let damage = Damage::new(self.disk, place, lsns, DamageKind::Records, detail);
                        self.state.noted.push(damage);
                        let (epoch, lsn, stamp) = (frame.epoch, frame.first_lsn, frame.first_stamp);
                        events.push(Event::Epoch { epoch, lsn, stamp, disk_bytes: shape.disk_bytes() });
                    }
                    Err(StoreError::Damaged { path, detail, .. }) => {
                        self.state.damage = Some(self.damage(
                            (&path, frame.meta_position),
                            frame.first_lsn,
                            DamageKind::Records,
                            detail,
                        ));
                        break;
                    }
                    Err(error) => return Err(error),
                }
            }
            while let Some(mark) = marks.next_if(|mark| mark.lsn <= frame.last_lsn()) {
                events.push(Event::Mark(mark));
            }
            self.state.apply(events);
            let last = Last { lsn: frame.last_lsn(), stamp: frame.last_stamp, epoch: frame.epoch };
            self.advance(last, u64::from(frame.record_count), u64::from(frame.raw_bytes));
        }
        Ok(Some(SegmentIndex::Sealed(shape, bytes)))
    }

    /// The disk's size at the begin of an epoch, which only the frame's own header says.
    fn epoch_size(&self, segment: SegmentNumber, frame: &IndexFrame) -> Result<u64, StoreError> {
        let path = segment_path(&self.dir, SegmentKind::Meta, segment);
        let file = self.env.storage.open(&path, Access::Read).map_err(StoreError::io("open", &path))?;
        let place = Place { disk: self.disk, segment, position: 0 };
        data::with_head(&*file, &path, place, frame, |frame| frame.header().disk_bytes())
    }

    fn rebuild_sealed(
        &mut self,
        live: &LiveSegment,
        sealed: &Sealed,
        why: &str,
    ) -> Result<Option<SegmentIndex>, StoreError> {
        let path = segment_path(&self.dir, SegmentKind::Meta, live.segment);
        let (_, meta) = self.read_file(&path, Access::Read)?;
        let source = self.source(live, Some(sealed.last_lsn), &meta);
        let found = source.scan(&mut |_, _| Ok(DataState::Valid))?;
        let whole = found.damage.is_none();
        let lsns = (live.first_lsn, sealed.last_lsn);
        let index_path = segment_path(&self.dir, SegmentKind::Index, live.segment);
        self.state.noted.push(Damage::new(self.disk, (&index_path, 0), lsns, DamageKind::Index, why));
        let Some(index) = self.take_scanned(live, &path, found) else { return Ok(None) };
        if !whole || !self.writable {
            return Ok(Some(SegmentIndex::Live(index)));
        }
        put_index(&*self.env.storage, &self.dir, (self.disk, live.segment), lsns, &index).map(Some)
    }

    pub(super) fn source<'b>(&self, live: &LiveSegment, sealed: Option<Lsn>, meta: &'b [u8]) -> Source<'b> {
        let (disk, segment, first_lsn, last_epoch) =
            (self.disk, live.segment, live.first_lsn, self.last.epoch);
        let durable = sealed.unwrap_or(self.durable);
        Source { disk, segment, first_lsn, sealed, durable, last_epoch, meta }
    }

    /// Takes in what a scan found; `None` if that is no record at all.
    pub(super) fn take_scanned(
        &mut self,
        live: &LiveSegment,
        path: &Path,
        found: Scanned,
    ) -> Option<journal_format::index::IndexBuilder> {
        let next = found.last.map_or(live.first_lsn, |last| last.lsn.next());
        if let Some(detail) = &found.damage {
            let place = (path, next_entry(found.meta_end));
            self.state.damage = Some(self.damage(place, next, DamageKind::Records, detail));
        }
        self.state.apply(found.events);
        // Marks of bookmarks are taken from the index when the names are read.
        if let Some(last) = found.last {
            self.advance(last, next.since(live.first_lsn), found.raw_bytes);
        }
        (found.damage.is_none() || found.last.is_some()).then_some(found.index)
    }

    fn finish(self, manifest: Manifest, tails: Option<(Tail, Tail)>) -> Result<Arc<DiskStore>, StoreError> {
        let Self { env, disk, dir, mut state, last, writable, .. } = self;
        let differ = read_bookmarks(env, disk, &dir, &mut state)?;
        let writer = match (tails, state.segments.last()) {
            (Some((data, meta)), Some(segment)) => Some(Writer {
                poison: None,
                mark: new_mark(&*env.storage, &dir, disk, last.lsn)?,
                manifest,
                segment: Arc::clone(segment),
                records: last.lsn.next().since(segment.first_lsn),
                data,
                meta,
                last,
                pending: Pending::default(),
            }),
            _ => None,
        };
        let store = DiskStore::new(Arc::clone(env), disk, dir, state, writer);
        if (store.name_bookmarks()? || differ) && writable && store.writer.is_some() {
            store.save_bookmarks()?;
            if differ {
                files::sync_dir(store.storage(), &store.dir)?;
            }
        }
        Ok(Arc::new(store))
    }
}

/// Opens the mark and has both of its places say what opening has just made durable.
fn new_mark(storage: &dyn Storage, dir: &Path, disk: DiskId, durable: Lsn) -> Result<Mark, StoreError> {
    let mut mark = Mark::open(storage, dir, disk)?;
    mark.write(durable)?;
    mark.write(durable)?;
    Ok(mark)
}
