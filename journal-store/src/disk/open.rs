//! Opening a disk: making it, recovering it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use journal_format::index::{IndexFrame, IndexShape};
use journal_format::manifest::{LiveSegment, Manifest, Sealed};
use journal_format::recovery::{DataState, see_data};
use journal_format::segment::{
    DATA_ENTRY_BYTES, MetaEntry, Place, SEGMENT_HEADER_PAGE_BYTES, SegmentKind, next_entry,
};
use journal_format::{DiskId, Epoch, Lsn, Op, SegmentNumber, Stamp};

use super::scan::{Scanned, Source};
use super::seal::{load_index, make_segment, write_manifest};
use super::writer::{Event, Last, Pending, Tail, Writer, bookmarks_of};
use super::{DiskStore, Env, State, Stats, data, segment_path};
use crate::damage::{Damage, DamageKind};
use crate::error::StoreError;
use crate::files::{self, OwnFile};
use crate::io::{Access, Bytes, File};
use crate::segment::{Segment, SegmentIndex};
use crate::timeline::Timeline;
use journal_format::bookmarks::Bookmark;

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

    /// Adds a bookmark that came as a record. Its frame cannot be refused, so a name that is taken gets its LSN behind it.
    fn add_bookmark(&mut self, mut bookmark: Bookmark) {
        const LONGEST: usize = journal_format::limits::MAX_BOOKMARK_BYTES as usize;
        if self
            .bookmarks
            .iter()
            .any(|known| known.lsn == bookmark.lsn && known.name.starts_with(&bookmark.name))
        {
            return;
        }
        bookmark.name.truncate(bookmark.name.floor_char_boundary(LONGEST));
        if self.bookmarks.iter().any(|known| known.name == bookmark.name) {
            let suffix = format!("@{}", bookmark.lsn);
            bookmark.name.truncate(bookmark.name.floor_char_boundary(LONGEST - suffix.len()));
            bookmark.name.push_str(&suffix);
        }
        self.bookmarks.push(bookmark);
    }
}

/// Whether the folder holds a journal; refuses a folder that lost its manifest.
pub(crate) fn exists(env: &Env, disk: DiskId) -> Result<bool, StoreError> {
    let dir = files::disk_dir(&env.root, disk);
    let names = match env.storage.list(&dir) {
        Ok(names) => names,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(StoreError::io("list", &dir)(error)),
    };
    if names.iter().any(|name| name == files::MANIFEST) {
        return Ok(true);
    }
    for name in names.iter().filter(|name| matches!(files::parse_name(name), Some(OwnFile::Segment(..)))) {
        let path = dir.join(name);
        let file = env.storage.open(&path, Access::Read).map_err(StoreError::io("open", &path))?;
        if file.len().map_err(StoreError::io("read the length of", &path))? > SEGMENT_HEADER_PAGE_BYTES as u64
        {
            let detail = "the manifest is missing, but there are segments";
            return Err(StoreError::damaged(
                disk,
                &dir.join(files::MANIFEST),
                (Lsn::FIRST, Lsn::MAX),
                detail,
            ));
        }
    }
    Ok(false)
}

/// Makes a disk of which nothing is recorded, durably.
pub(crate) fn create(env: &Env, disk: DiskId, disk_bytes: u64) -> Result<(), StoreError> {
    let (storage, dir) = (&*env.storage, files::disk_dir(&env.root, disk));
    let disks = files::disks_dir(&env.root);
    storage.create_dir(&dir).map_err(StoreError::io("create", &dir))?;
    storage.sync_dir(&disks).map_err(StoreError::io("sync", &disks))?;
    let mut manifest = Manifest::new(disk, disk_bytes);
    let (segment, first_lsn) = (manifest.next_segment, Lsn::FIRST);
    make_segment(storage, &dir, disk, segment, first_lsn)?;
    storage.sync_dir(&dir).map_err(StoreError::io("sync", &dir))?;
    manifest.segments.push(LiveSegment { segment, first_lsn, sealed: None });
    manifest.next_segment = segment.next();
    write_manifest(storage, &dir, &manifest)
}

/// Opens and recovers a disk.
pub(crate) fn open(env: &Arc<Env>, disk: DiskId, writable: bool) -> Result<Arc<DiskStore>, StoreError> {
    let dir = files::disk_dir(&env.root, disk);
    let mut opener = Opener { env, disk, writable, state: State::new(), last: Last::default(), dir };
    let manifest = opener.read_manifest()?;
    opener.state.disk_bytes = manifest.disk_bytes;
    opener.state.last_epoch = Epoch(0);
    if writable {
        // The manifest's name may be in the cache only, after a failure or a kill between rename and durability step.
        env.storage.sync_dir(&opener.dir).map_err(StoreError::io("sync", &opener.dir))?;
        opener.remove_orphans(&manifest)?;
    }
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

/// The active segment: its index, and the ends of its data and metadata files if it may be written.
type Active = (SegmentIndex, Option<(Tail, Tail)>);

struct Opener<'a> {
    env: &'a Arc<Env>,
    disk: DiskId,
    dir: PathBuf,
    writable: bool,
    state: State,
    last: Last,
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
            stats: Stats::default(),
        }
    }
}

impl Opener<'_> {
    fn damage(&self, place: (&Path, u64), first_lsn: Lsn, kind: DamageKind, detail: impl ToString) -> Damage {
        Damage::new(self.disk, place, (first_lsn, Lsn::MAX), kind, detail)
    }

    fn read_file(&self, path: &Path, access: Access) -> Result<(Arc<dyn File>, Vec<u8>), StoreError> {
        let file = self.env.storage.open(path, access).map_err(StoreError::io("open", path))?;
        let bytes = files::read_all(&*file, path)?;
        Ok((file, bytes))
    }

    fn read_manifest(&self) -> Result<Manifest, StoreError> {
        let path = self.dir.join(files::MANIFEST);
        let (_, bytes) = self.read_file(&path, Access::Read)?;
        let damaged = |detail: String| StoreError::damaged(self.disk, &path, (Lsn::FIRST, Lsn::MAX), detail);
        let manifest = Manifest::parse(&bytes).map_err(|error| damaged(error.to_string()))?;
        if manifest.disk != self.disk {
            return Err(damaged("it is the manifest of another disk".into()));
        }
        if manifest.segments.last().is_none_or(|live| live.sealed.is_some()) {
            return Err(damaged("it names no active segment".into()));
        }
        Ok(manifest)
    }

    /// Removes what a crash left behind and the manifest does not name.
    fn remove_orphans(&self, manifest: &Manifest) -> Result<(), StoreError> {
        let storage = &self.env.storage;
        let live: BTreeSet<SegmentNumber> = manifest.segments.iter().map(|live| live.segment).collect();
        let sealed =
            |number| manifest.segments.iter().any(|live| live.segment == number && live.sealed.is_some());
        for name in storage.list(&self.dir).map_err(StoreError::io("list", &self.dir))? {
            let orphan = match files::parse_name(&name) {
                None => false,
                Some(OwnFile::Temporary) => true,
                Some(OwnFile::Segment(SegmentKind::Index, number)) => !sealed(number),
                Some(OwnFile::Segment(_, number)) => !live.contains(&number),
            };
            if orphan {
                let path = self.dir.join(name);
                storage.remove(&path).map_err(StoreError::io("remove", &path))?;
            }
        }
        Ok(())
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
        let loaded = load_index(&*self.env.storage, &path, self.disk, live.segment)?;
        self.state.stats.stored_data_bytes += sealed.data_bytes;
        self.state.stats.stored_meta_bytes += sealed.meta_bytes + sealed.index_bytes;
        let fits = |shape: &IndexShape| {
            (shape.first_lsn(), shape.last_lsn()) == (live.first_lsn, sealed.last_lsn)
                && (shape.first_stamp(), shape.last_stamp()) == (sealed.first_stamp, sealed.last_stamp)
        };
        match loaded {
            Ok((shape, bytes)) if fits(&shape) => self.take_sealed(live, shape, bytes),
            // The index holds nothing that the records do not say too.
            _ => self.rebuild_sealed(live, sealed),
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
        let mut marks = marks.into_iter().peekable();
        for frame in frames {
            let mut events = Vec::new();
            if frame.epoch > self.state.last_epoch {
                match self.epoch_size(live.segment, &frame) {
                    Ok(disk_bytes) => {
                        let (epoch, lsn, stamp) = (frame.epoch, frame.first_lsn, frame.first_stamp);
                        events.push(Event::Epoch { epoch, lsn, stamp, disk_bytes });
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
    ) -> Result<Option<SegmentIndex>, StoreError> {
        let path = segment_path(&self.dir, SegmentKind::Meta, live.segment);
        let (_, meta) = self.read_file(&path, Access::Read)?;
        let source = self.source(live, Some(sealed.last_lsn), &meta);
        let found = source.scan(&mut |_, _| Ok(DataState::Valid))?;
        let whole = found.damage.is_none();
        let Some(index) = self.take_scanned(live, &path, found) else { return Ok(None) };
        if !whole || !self.writable {
            return Ok(Some(SegmentIndex::Live(index)));
        }
        let bytes = index.finish().map_err(StoreError::unwritable(self.disk))?;
        let name = files::segment_file(SegmentKind::Index, live.segment);
        files::replace(&*self.env.storage, &self.dir, &name, &bytes)?;
        let path = self.dir.join(name);
        match load_index(&*self.env.storage, &path, self.disk, live.segment)? {
            Ok((shape, bytes)) => Ok(Some(SegmentIndex::Sealed(shape, bytes))),
            Err(detail) => {
                Err(StoreError::damaged(self.disk, &path, (live.first_lsn, sealed.last_lsn), detail))
            }
        }
    }

    fn source<'b>(&self, live: &LiveSegment, sealed: Option<Lsn>, meta: &'b [u8]) -> Source<'b> {
        let (disk, segment, first_lsn, last_epoch) =
            (self.disk, live.segment, live.first_lsn, self.last.epoch);
        Source { disk, segment, first_lsn, sealed, last_epoch, meta }
    }

    /// Takes in what a scan found; `None` if that is no record at all.
    fn take_scanned(
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

    /// Recovers the active segment. `None` if nothing of it can be used.
    fn open_active(&mut self, live: &LiveSegment) -> Result<Option<Active>, StoreError> {
        let access = if self.writable { Access::ReadWrite } else { Access::Read };
        let open = |kind| {
            let path = segment_path(&self.dir, kind, live.segment);
            let file = self.env.storage.open(&path, access).map_err(StoreError::io("open", &path))?;
            let header = files::check_header(&*file, &path, kind, self.disk, live.segment)?;
            Ok::<_, StoreError>((file, path, header))
        };
        let (data, data_path, data_header) = open(SegmentKind::Data)?;
        let (meta, meta_path, meta_header) = open(SegmentKind::Meta)?;
        for (path, header) in [(&data_path, data_header), (&meta_path, meta_header)] {
            // Headers were durable before the manifest named the files.
            if let Err(error) = header {
                self.state.damage = Some(self.damage((path, 0), live.first_lsn, DamageKind::Header, error));
                return Ok(None);
            }
        }
        let bytes = files::read_all(&*meta, &meta_path)?;
        let mut see = |entry: Option<&MetaEntry<'_>>, data_end: u64| {
            self.see(&*data, &data_path, live, entry, data_end)
        };
        let found = self.source(live, None, &bytes).scan(&mut see)?;
        let (meta_sure, data_sure) = found.sure;
        let tail = |file, path, end| Tail { file, path, end, fresh: true };
        let tails = (tail(data, data_path, found.data_end), tail(meta, meta_path.clone(), found.meta_end));
        self.state.stats.stored_data_bytes += found.data_end;
        self.state.stats.stored_meta_bytes += found.meta_end;
        let Some(index) = self.take_scanned(live, &meta_path, found) else { return Ok(None) };
        let usable = self.writable && self.state.damage.is_none();
        if usable {
            settle(&tails.0, data_sure)?;
            settle(&tails.1, meta_sure)?;
        }
        Ok(Some((SegmentIndex::Live(index), usable.then_some(tails))))
    }

    /// Looks at the data of an entry of the active segment.
    fn see(
        &self,
        data: &dyn File,
        path: &Path,
        live: &LiveSegment,
        entry: Option<&MetaEntry<'_>>,
        data_end: u64,
    ) -> Result<DataState, StoreError> {
        let Some(entry) = entry else {
            let bytes = files::read_some(data, path, next_entry(data_end), DATA_ENTRY_BYTES)?;
            return Ok(if bytes.iter().all(|byte| *byte == 0) { DataState::Absent } else { DataState::Torn });
        };
        let Some(at) = entry.header.data else { return Ok(DataState::Valid) };
        if at.segment != live.segment {
            return Ok(DataState::Torn);
        }
        let length = DATA_ENTRY_BYTES.saturating_add(entry.header.data_bytes as usize);
        let bytes = files::read_some(data, path, at.position, length)?;
        let place = Place { disk: self.disk, segment: at.segment, position: at.position };
        Ok(see_data(&bytes, &place, Some(entry)))
    }

    fn finish(self, manifest: Manifest, tails: Option<(Tail, Tail)>) -> Result<Arc<DiskStore>, StoreError> {
        let Self { env, disk, dir, mut state, last, writable } = self;
        read_bookmarks(env, disk, &dir, &mut state)?;
        let writer = match (tails, state.segments.last()) {
            (Some((data, meta)), Some(segment)) => Some(Writer {
                poison: None,
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
        if store.name_bookmarks()? && writable && store.writer.is_some() {
            store.save_bookmarks()?;
        }
        Ok(Arc::new(store))
    }
}

/// Cuts what is behind the end off a file, and makes the rest durable: before this only the page cache may have had it.
///
/// What is not known to be durable, from `sure` on, is written again. After a durability step that failed the page cache
/// calls pages clean that never reached the disk: another step would write nothing, succeed, and make a promise that a
/// power cut breaks. Writing the same bytes makes the pages dirty again.
fn settle(tail: &Tail, sure: u64) -> Result<(), StoreError> {
    let length = tail.file.len().map_err(StoreError::io("read the length of", &tail.path))?;
    if length != tail.end {
        tail.file.set_len(tail.end).map_err(StoreError::io("cut", &tail.path))?;
    }
    let mut position = sure;
    while position < tail.end {
        let length = usize::try_from(tail.end - position).unwrap_or(usize::MAX).min(SETTLE_BYTES);
        let bytes = files::read_some(&*tail.file, &tail.path, position, length)?;
        tail.file.write_at(&bytes, position).map_err(StoreError::io("write", &tail.path))?;
        position = position.saturating_add(length as u64);
    }
    tail.file.sync().map_err(StoreError::io("sync", &tail.path))
}

/// Written again at a time, in bytes.
const SETTLE_BYTES: usize = 1 << 20;

fn read_bookmarks(env: &Env, disk: DiskId, dir: &Path, state: &mut State) -> Result<(), StoreError> {
    let path = dir.join(files::BOOKMARKS);
    let file = match env.storage.open(&path, Access::Read) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(StoreError::io("open", &path)(error)),
    };
    let detail = match journal_format::bookmarks::parse(&files::read_all(&*file, &path)?) {
        Ok((owner, bookmarks)) if owner == disk => {
            state.bookmarks = bookmarks;
            return Ok(());
        }
        Ok(_) => "it holds another disk's bookmarks".to_owned(),
        Err(error) => error.to_string(),
    };
    let lsns = (Lsn::FIRST, Lsn::MAX);
    state.bookmarks_damage = Some(Damage::new(disk, (&path, 0), lsns, DamageKind::Bookmarks, detail));
    Ok(())
}

impl DiskStore {
    /// Adds the bookmarks whose records are durable but which the file does not have, because of a crash in between.
    /// Returns whether there were any.
    fn name_bookmarks(&self) -> Result<bool, StoreError> {
        let mut state = self.state().clone();
        let known: BTreeSet<Lsn> = state.bookmarks.iter().map(|bookmark| bookmark.lsn).collect();
        let count = state.bookmarks.len();
        for segment in Arc::clone(&state.segments).iter() {
            for (mark, frame) in unknown_bookmarks(segment, &known) {
                let raw = match self.read_frame_data(&frame) {
                    Ok(raw) => raw,
                    // The name is lost with the frame's data; reading it or verifying says so.
                    Err(StoreError::Damaged { .. }) => continue,
                    Err(error) => return Err(error),
                };
                let named = bookmarks_of(std::iter::once(mark), &raw);
                state.apply_bookmarks(named);
            }
        }
        let found = state.bookmarks.len() > count;
        *self.state_mut() = state;
        Ok(found)
    }
}

impl State {
    fn apply_bookmarks(&mut self, bookmarks: Vec<Bookmark>) {
        bookmarks.into_iter().for_each(|bookmark| self.add_bookmark(bookmark));
    }
}

fn unknown_bookmarks(segment: &Segment, known: &BTreeSet<Lsn>) -> Vec<(journal_format::Record, IndexFrame)> {
    let index = segment.index();
    let tables = index.tables();
    let marks =
        tables.marks().filter(|mark| matches!(mark.op, Op::Bookmark { .. }) && !known.contains(&mark.lsn));
    marks.filter_map(|mark| Some((mark, tables.frame_of(mark.lsn)?))).collect()
}
