//! Opening a disk: making it, recovering it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use journal_format::index::{IndexFrame, IndexShape};
use journal_format::manifest::{LiveSegment, Manifest, Sealed};
use journal_format::recovery::{DataState, see_data};
use journal_format::segment::{
    DATA_ENTRY_BYTES, MetaEntry, PAGE_BYTES, Place, SEGMENT_HEADER_PAGE_BYTES, SegmentKind, next_entry,
};
use journal_format::{DiskId, Epoch, Lsn, Op, SegmentNumber, Stamp};

use super::mark::{self, Mark};
use super::scan::{Scanned, Source, Unproven};
use super::seal::{load_index, make_segment, put_manifest};
use super::writer::{Event, Last, Pending, Tail, Writer, bookmarks_of};
use super::{DiskStore, Env, State, Stats, data, segment_path};
use crate::damage::{Damage, DamageKind};
use crate::error::StoreError;
use crate::files::{self, Header, OwnFile};
use crate::io::{Access, Bytes, File, Storage};
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
    if names.iter().any(|name| name == files::MANIFEST || *name == files::copy_of(files::MANIFEST)) {
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

/// Makes a disk of which nothing is recorded. Opening it makes it durable.
pub(crate) fn create(env: &Env, disk: DiskId, disk_bytes: u64) -> Result<(), StoreError> {
    let (storage, dir) = (&*env.storage, files::disk_dir(&env.root, disk));
    storage.create_dir(&dir).map_err(StoreError::io("create", &dir))?;
    let mut manifest = Manifest::new(disk, disk_bytes);
    let (segment, first_lsn) = (manifest.next_segment, Lsn::FIRST);
    make_segment(storage, &dir, disk, segment, first_lsn)?;
    files::sync_dir(storage, &dir)?;
    manifest.segments.push(LiveSegment { segment, first_lsn, sealed: None });
    manifest.next_segment = segment.next();
    put_manifest(storage, &dir, &manifest)
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

/// The active segment: its index, and the ends of its data and metadata files if it may be written.
type Active = (SegmentIndex, Option<(Tail, Tail)>);

struct Opener<'a> {
    env: &'a Arc<Env>,
    disk: DiskId,
    dir: PathBuf,
    writable: bool,
    state: State,
    last: Last,
    /// What the durable mark says.
    durable: Lsn,
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
    fn damage(&self, place: (&Path, u64), first_lsn: Lsn, kind: DamageKind, detail: impl ToString) -> Damage {
        Damage::new(self.disk, place, (first_lsn, Lsn::MAX), kind, detail)
    }

    fn read_file(&self, path: &Path, access: Access) -> Result<(Arc<dyn File>, Vec<u8>), StoreError> {
        let file = self.env.storage.open(path, access).map_err(StoreError::io("open", path))?;
        let bytes = files::read_all(&*file, path)?;
        Ok((file, bytes))
    }

    /// Reads the manifest. With leave to write, makes it and its copy the same, removes what it does not name, and makes
    /// the folder durable as it is.
    fn read_manifest(&mut self) -> Result<Manifest, StoreError> {
        let path = self.dir.join(files::MANIFEST);
        let everything = (Lsn::FIRST, Lsn::MAX);
        let damaged = |detail: String| StoreError::damaged(self.disk, &path, everything, detail);
        let parse = |bytes: &[u8]| parse_manifest(bytes, self.disk);
        let pair = files::read_pair(&*self.env.storage, &self.dir, files::MANIFEST, parse)?
            .ok_or_else(|| damaged("the manifest is missing".into()))?
            .map_err(damaged)?;
        let manifest = pair.value;
        if pair.from_copy {
            self.check_newest(&manifest)?;
        }
        if let Some((place, detail)) = pair.damage {
            let damage = Damage::new(self.disk, (&place, 0), everything, DamageKind::Manifest, detail);
            self.state.noted.push(damage);
        }
        if self.writable {
            if pair.differ {
                put_manifest(&*self.env.storage, &self.dir, &manifest)?;
            }
            self.remove_orphans(&manifest)?;
            // A process that died between a rename and this left names that are not durable yet.
            files::sync_dir(&*self.env.storage, &self.dir)?;
        }
        Ok(manifest)
    }

    /// Refuses a manifest that was taken from its copy if there are segments that it does not know: then it is an old one.
    fn check_newest(&self, manifest: &Manifest) -> Result<(), StoreError> {
        for name in self.env.storage.list(&self.dir).map_err(StoreError::io("list", &self.dir))? {
            let Some(OwnFile::Segment(SegmentKind::Meta, number)) = files::parse_name(&name) else {
                continue;
            };
            let path = self.dir.join(&name);
            let file = self.env.storage.open(&path, Access::Read).map_err(StoreError::io("open", &path))?;
            let length = file.len().map_err(StoreError::io("read the length of", &path))?;
            if number >= manifest.next_segment && length > SEGMENT_HEADER_PAGE_BYTES as u64 {
                let detail = "the manifest cannot be read, and its copy is older than the newest segment";
                let path = self.dir.join(files::MANIFEST);
                return Err(StoreError::damaged(self.disk, &path, (Lsn::FIRST, Lsn::MAX), detail));
            }
        }
        Ok(())
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
        let name = files::segment_file(SegmentKind::Index, live.segment);
        let index_path = self.dir.join(&name);
        self.state.noted.push(Damage::new(self.disk, (&index_path, 0), lsns, DamageKind::Index, why));
        let Some(index) = self.take_scanned(live, &path, found) else { return Ok(None) };
        if !whole || !self.writable {
            return Ok(Some(SegmentIndex::Live(index)));
        }
        let bytes = index.finish().map_err(StoreError::unwritable(self.disk))?;
        files::put(&*self.env.storage, &self.dir, &name, &bytes)?;
        files::sync_dir(&*self.env.storage, &self.dir)?;
        match load_index(&*self.env.storage, &index_path, self.disk, live.segment)? {
            Ok((shape, bytes)) => Ok(Some(SegmentIndex::Sealed(shape, bytes))),
            Err(detail) => Err(StoreError::damaged(self.disk, &index_path, lsns, detail)),
        }
    }

    fn source<'b>(&self, live: &LiveSegment, sealed: Option<Lsn>, meta: &'b [u8]) -> Source<'b> {
        let (disk, segment, first_lsn, last_epoch) =
            (self.disk, live.segment, live.first_lsn, self.last.epoch);
        let durable = sealed.unwrap_or(self.durable);
        Source { disk, segment, first_lsn, sealed, durable, last_epoch, meta }
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
            let damage = |detail| self.damage((path, 0), live.first_lsn, DamageKind::Header, detail);
            match header {
                Header::Good => {}
                Header::Rotten(detail) => self.state.noted.push(damage(detail)),
                Header::Wrong(detail) => {
                    self.state.damage = Some(damage(detail));
                    return Ok(None);
                }
            }
        }
        let bytes = files::read_all(&*meta, &meta_path)?;
        let mut see = |entry: Option<&MetaEntry<'_>>, data_end: u64| {
            self.see(&*data, &data_path, live, entry, data_end)
        };
        let found = self.source(live, None, &bytes).scan(&mut see)?;
        let unproven = found.unproven.clone();
        let tail = |file, path, end| Tail { file, path, end, fresh: true };
        let tails = (tail(data, data_path, found.data_end), tail(meta, meta_path.clone(), found.meta_end));
        self.state.stats.stored_data_bytes += found.data_end;
        self.state.stats.stored_meta_bytes += found.meta_end;
        let Some(index) = self.take_scanned(live, &meta_path, found) else { return Ok(None) };
        let usable = self.writable && self.state.damage.is_none();
        if usable {
            self.write_again(live, &bytes, &unproven, &tails)?;
            settle(&tails.0, unproven.is_empty())?;
            settle(&tails.1, unproven.is_empty())?;
        }
        Ok(Some((SegmentIndex::Live(index), usable.then_some(tails))))
    }

    /// Writes the entries again of which it is not known that they were durable, with the same bytes. After a failed
    /// durability step the system may hold bytes that no disk has and that it takes for clean: another step alone would
    /// pass them over and succeed. The unused bytes before them, which a power cut may have left as anything, become zero.
    fn write_again(
        &self,
        live: &LiveSegment,
        meta: &[u8],
        unproven: &[Unproven],
        (data_tail, meta_tail): &(Tail, Tail),
    ) -> Result<(), StoreError> {
        let changed = |tail: &Tail| {
            let error = std::io::Error::other("two reads gave different bytes; open the disk again");
            StoreError::io("read", &tail.path)(error)
        };
        for Unproven { meta_from, meta_at, data_from } in unproven {
            let place = Place { disk: self.disk, segment: live.segment, position: *meta_at };
            let rest = usize::try_from(*meta_at).ok().and_then(|at| meta.get(at..)).unwrap_or(&[]);
            let entry = MetaEntry::parse(rest, &place).map_err(|_| changed(meta_tail))?;
            if let Some(at) = entry.header.data {
                let length = DATA_ENTRY_BYTES.saturating_add(entry.header.data_bytes as usize);
                let bytes = files::read_some(&*data_tail.file, &data_tail.path, at.position, length)?;
                let place = Place { position: at.position, ..place };
                if see_data(&bytes, &place, Some(&entry)) != DataState::Valid {
                    return Err(changed(data_tail));
                }
                write_behind_zeroes(data_tail, *data_from, at.position, &bytes)?;
            }
            let bytes = rest.get(..entry.header.entry_bytes() as usize).unwrap_or(rest);
            write_behind_zeroes(meta_tail, *meta_from, *meta_at, bytes)?;
        }
        Ok(())
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

/// Writes `bytes` at `position`, and zeroes from `from` up to there.
fn write_behind_zeroes(tail: &Tail, from: u64, position: u64, bytes: &[u8]) -> Result<(), StoreError> {
    // Less than a page: that is how far entries are apart.
    let gap = position.checked_sub(from).filter(|gap| *gap < PAGE_BYTES).unwrap_or(0);
    let all = [&vec![0; gap as usize], bytes].concat();
    tail.file.write_at(&all, position - gap).map_err(StoreError::io("write", &tail.path))
}

/// Cuts what is behind the end off a file and makes it durable as it is, unless it is so and `proven` to be durable.
fn settle(tail: &Tail, proven: bool) -> Result<(), StoreError> {
    let length = tail.file.len().map_err(StoreError::io("read the length of", &tail.path))?;
    if length == tail.end && proven {
        return Ok(());
    }
    if length != tail.end {
        tail.file.set_len(tail.end).map_err(StoreError::io("cut", &tail.path))?;
    }
    tail.file.sync().map_err(StoreError::io("sync", &tail.path))
}

/// Opens the mark and has both of its places say what opening has just made durable.
fn new_mark(storage: &dyn Storage, dir: &Path, disk: DiskId, durable: Lsn) -> Result<Mark, StoreError> {
    let mut mark = Mark::open(storage, dir, disk)?;
    mark.write(durable)?;
    mark.write(durable)?;
    Ok(mark)
}

/// Reads a manifest that can be used for that disk; the error says what is wrong.
pub(super) fn parse_manifest(bytes: &[u8], disk: DiskId) -> Result<Manifest, String> {
    let manifest = Manifest::parse(bytes).map_err(|error| error.to_string())?;
    if manifest.disk != disk {
        return Err("it is the manifest of another disk".into());
    }
    if manifest.segments.last().is_none_or(|live| live.sealed.is_some()) {
        return Err("it names no active segment".into());
    }
    Ok(manifest)
}

/// Reads the bookmarks of that disk; the error says what is wrong.
pub(super) fn parse_bookmarks(bytes: &[u8], disk: DiskId) -> Result<Vec<Bookmark>, String> {
    match journal_format::bookmarks::parse(bytes) {
        Ok((owner, bookmarks)) if owner == disk => Ok(bookmarks),
        Ok(_) => Err("it holds another disk's bookmarks".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// Reads the bookmarks. Returns whether the file must be written again, because it or its copy cannot be used.
fn read_bookmarks(env: &Env, disk: DiskId, dir: &Path, state: &mut State) -> Result<bool, StoreError> {
    let lsns = (Lsn::FIRST, Lsn::MAX);
    let damage = |path: &Path, detail| Damage::new(disk, (path, 0), lsns, DamageKind::Bookmarks, detail);
    let parse = |bytes: &[u8]| parse_bookmarks(bytes, disk);
    match files::read_pair(&*env.storage, dir, files::BOOKMARKS, parse)? {
        None => Ok(false),
        Some(Ok(pair)) => {
            state.bookmarks = pair.value;
            state.noted.extend(pair.damage.map(|(path, detail)| damage(&path, detail)));
            Ok(pair.differ)
        }
        Some(Err(detail)) => {
            state.bookmarks_damage = Some(damage(&dir.join(files::BOOKMARKS), detail));
            Ok(false)
        }
    }
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
