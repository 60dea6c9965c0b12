//! Appending frames and making them durable.

use std::path::PathBuf;
use std::sync::{Arc, MutexGuard};

use journal_format::manifest::Manifest;
use journal_format::segment::{DATA_ENTRY_BYTES, DataEntry, DataPlace, META_ENTRY_BYTES, MetaEntry, Place};
use journal_format::{DiskId, Epoch, Frame, Lsn, Op, Record, Stamp, codec};

use super::DiskStore;
use super::mark::Mark;
use super::tail::Tail;
use crate::damage::Damage;
use crate::error::StoreError;
use crate::files;
use crate::io::File;
use crate::segment::{Segment, SegmentIndex};
use journal_format::bookmarks::Bookmark;

/// Where the journal ends, durable or not.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub(super) struct Last {
    pub(super) lsn: Lsn,
    pub(super) stamp: Stamp,
    pub(super) epoch: Epoch,
}

/// What history needs to know of a frame.
#[derive(Clone, Debug)]
pub(super) enum Event {
    Epoch { epoch: Epoch, lsn: Lsn, stamp: Stamp, disk_bytes: u64 },
    Mark(Record),
    Bookmark(Bookmark),
}

/// The events of a frame; bookmarks come as marks, [`bookmarks_of`] has their names.
pub(super) fn events_of(frame: &Frame<'_>, last_epoch: Epoch) -> Vec<Event> {
    let header = frame.header();
    let mut events = Vec::new();
    if header.epoch() > last_epoch {
        let (epoch, lsn, stamp) = (header.epoch(), header.first_lsn(), header.first_stamp());
        events.push(Event::Epoch { epoch, lsn, stamp, disk_bytes: header.disk_bytes() });
    }
    let is_mark = |op: &Op| {
        matches!(op, Op::Resize { .. } | Op::GapBegin { .. } | Op::GapEnd { .. } | Op::Close { .. })
    };
    events.extend(frame.records().filter(|record| is_mark(&record.op)).map(Event::Mark));
    events
}

/// The bookmarks among `records`, whose frame's decompressed data `raw` is. Bytes that are no UTF-8 are replaced.
pub(super) fn bookmarks_of(records: impl Iterator<Item = Record>, raw: &[u8]) -> Vec<Bookmark> {
    let name_of = |record: Record| {
        let Op::Bookmark { name } = record.op else { return None };
        let bytes = raw.get(name.pos as usize..name.end() as usize).unwrap_or(b"?");
        Some(Bookmark {
            lsn: record.lsn,
            stamp: record.stamp,
            name: String::from_utf8_lossy(bytes).into_owned(),
        })
    };
    records.filter_map(name_of).collect()
}

/// The writing end of a disk.
#[derive(Debug)]
pub(crate) struct Writer {
    /// The first failure; everything is refused since.
    pub(super) poison: Option<String>,
    pub(super) manifest: Manifest,
    pub(super) segment: Arc<Segment>,
    pub(super) data: Tail,
    pub(super) meta: Tail,
    pub(super) mark: Mark,
    pub(super) last: Last,
    /// Records in the active segment.
    pub(super) records: u64,
    /// What was appended since the last commit.
    pub(super) pending: Pending,
}

#[derive(Default, Debug)]
pub(super) struct Pending {
    pub(super) events: Vec<Event>,
    pub(super) raw_bytes: u64,
    pub(super) records: u64,
}

/// What to do with a frame.
enum Verdict {
    Append,
    /// The journal has it already: it was sent again after a reconnect.
    Known,
}

impl Writer {
    pub(super) fn check_alive(&self, disk: DiskId) -> Result<(), StoreError> {
        match &self.poison {
            None => Ok(()),
            Some(cause) => Err(StoreError::Poisoned { disk, cause: cause.clone() }),
        }
    }

    /// Refuses everything from now on if this failed: what was appended since the last commit will come again, to another opening of
    /// the disk.
    pub(super) fn poison_on<T>(&mut self, result: Result<T, StoreError>) -> Result<T, StoreError> {
        if let Err(error) = &result {
            self.poison.get_or_insert_with(|| error.to_string());
            self.data.give_up();
        }
        result
    }

    fn judge(&self, frame: &Frame<'_>) -> Result<Verdict, StoreError> {
        let (header, last) = (frame.header(), self.last);
        let refuse = |detail: String| Err(StoreError::invalid(header.disk(), detail));
        if header.last_lsn() <= last.lsn && header.epoch() <= last.epoch {
            return Ok(Verdict::Known);
        }
        if header.first_lsn() != last.lsn.next() {
            let (first, next) = (header.first_lsn(), last.lsn.next());
            return refuse(format!(
                "a frame begins at LSN {first}, expected {next}; open the disk again and resend"
            ));
        }
        if header.epoch() < last.epoch {
            return refuse(format!(
                "a frame of epoch {}, the journal is in {}",
                header.epoch().0,
                last.epoch.0
            ));
        }
        let begins_gap =
            frame.records().next().is_some_and(|record| matches!(record.op, Op::GapBegin { .. }));
        if header.epoch() > last.epoch && !begins_gap {
            return refuse(format!("epoch {} does not begin with a gap", header.epoch().0));
        }
        if header.first_stamp() < last.stamp {
            return refuse(format!(
                "LSN {} is stamped earlier than the record before it",
                header.first_lsn()
            ));
        }
        Ok(Verdict::Append)
    }

    /// Appends both halves of a frame and puts it into the index.
    fn write(&mut self, frame: &Frame<'_>, durable: Lsn) -> Result<(), StoreError> {
        let header = frame.header();
        let (disk, segment) = (header.disk(), self.segment.number);
        let unwritable = StoreError::unwritable(disk);
        let data_at = Place { disk, segment, position: self.data.next() };
        let meta_at = Place { disk, segment, position: self.meta.next() };
        let data = (header.data_bytes() > 0).then_some(DataPlace { segment, position: data_at.position });
        let meta_head = MetaEntry::encode_header(&meta_at, frame, durable, data).map_err(&unwritable)?;
        if data.is_some() {
            let data_head = DataEntry::encode_header(&data_at, header).map_err(&unwritable)?;
            self.data.append(&data_head, frame.data())?;
        }
        self.meta.append(&meta_head, frame.head())?;
        match &mut *self.segment.index_mut() {
            SegmentIndex::Live(builder) => builder.push(frame, meta_at.position, data).map_err(&unwritable),
            SegmentIndex::Sealed(..) => Err(StoreError::invalid(disk, "the active segment is sealed")),
        }
    }
}

const _: () = assert!(DATA_ENTRY_BYTES.is_multiple_of(8) && META_ENTRY_BYTES.is_multiple_of(8));

impl DiskStore {
    pub(crate) fn lock_writer(&self) -> Result<MutexGuard<'_, Writer>, StoreError> {
        let Some(writer) = &self.writer else {
            // A damaged journal takes no frames: where its end is is not known.
            return Err(self.state().damage.as_ref().map_or(StoreError::ReadOnly, Damage::error));
        };
        let cause = || "a thread panicked while it wrote".to_owned();
        let guard = writer.lock().map_err(|_| StoreError::Poisoned { disk: self.id, cause: cause() })?;
        guard.check_alive(self.id)?;
        Ok(guard)
    }

    /// Appends a frame; durable only after the next commit.
    pub(crate) fn append(&self, frame: &Frame<'_>) -> Result<(), StoreError> {
        let mut writer = self.lock_writer()?;
        let header = frame.header();
        if let Verdict::Known = writer.judge(frame)? {
            return Ok(());
        }
        let mut events = events_of(frame, writer.last.epoch);
        if frame.records().any(|record| matches!(record.op, Op::Bookmark { .. })) {
            let raw =
                codec::decompress(header.codec(), frame.data(), header.raw_bytes()).map_err(|error| {
                    StoreError::invalid(self.id, format!("a bookmark cannot be read: {error}"))
                })?;
            events.extend(bookmarks_of(frame.records(), &raw).into_iter().map(Event::Bookmark));
        }
        let durable = self.durable_lsn();
        let written = writer.write(frame, durable);
        writer.poison_on(written)?;
        writer.last = Last { lsn: header.last_lsn(), stamp: header.last_stamp(), epoch: header.epoch() };
        let records = u64::from(header.record_count());
        writer.records += records;
        writer.pending.events.append(&mut events);
        writer.pending.records += records;
        writer.pending.raw_bytes += u64::from(header.raw_bytes());
        Ok(())
    }

    /// Begins a durability step, if anything was appended since the last. Until it is finished nothing can be appended.
    pub(crate) fn begin_commit(&self) -> Option<Commit<'_>> {
        let mut writer = self.lock_writer().ok().filter(|writer| writer.pending.records > 0)?;
        let written = writer.data.write_out().and_then(|()| writer.meta.write_out());
        Some(Commit { disk: self, writer, written })
    }

    /// Names a restorable point, durably.
    ///
    /// # Errors
    /// `Invalid` for a name that is taken, empty or longer than 255 bytes; `Point` for an LSN that is not restorable;
    /// `ReadOnly`, `Poisoned`, `Io` as for all writing.
    pub fn add_bookmark(&self, name: &str, lsn: Lsn) -> Result<Bookmark, StoreError> {
        let mut writer = self.lock_writer()?;
        let state = self.state().clone();
        if let Some(damage) = &state.bookmarks_damage {
            return Err(damage.error());
        }
        self.check_restorable(&state, lsn)?;
        if state.bookmarks.iter().any(|bookmark| bookmark.name == name) {
            return Err(StoreError::invalid(
                self.id,
                format!("there is a bookmark \"{name}\" already; choose another name"),
            ));
        }
        let spec = crate::PointSpec::Lsn(lsn);
        let stamp = self.resolve(&spec, Stamp::MAX, None)?.stamp;
        let bookmark = Bookmark { lsn, stamp, name: name.to_owned() };
        let mut bookmarks = state.bookmarks;
        bookmarks.push(bookmark.clone());
        let bytes = journal_format::bookmarks::encode(self.id, &bookmarks)
            .map_err(|error| StoreError::invalid(self.id, format!("the bookmark cannot be: {error}")))?;
        let written = files::replace(self.storage(), &self.dir, files::BOOKMARKS, &bytes)
            .and_then(|()| files::sync_dir(self.storage(), &self.dir));
        writer.poison_on(written)?;
        self.state_mut().bookmarks = bookmarks;
        Ok(bookmark)
    }
}

/// A durability step of one disk: sync [`Commit::files`], then [`Commit::finish`].
#[derive(Debug)]
pub(crate) struct Commit<'a> {
    disk: &'a DiskStore,
    writer: MutexGuard<'a, Writer>,
    /// Whether all that was appended is in the files.
    written: Result<(), StoreError>,
}

impl Commit<'_> {
    pub(crate) const fn disk(&self) -> DiskId {
        self.disk.id
    }

    /// The two files that must be made durable.
    pub(crate) fn files(&self) -> [(Arc<dyn File>, PathBuf); 2] {
        [&self.writer.data, &self.writer.meta].map(|tail| (Arc::clone(&tail.file), tail.path.clone()))
    }

    /// Ends the step: shows what is durable now, or poisons the disk if it is not; seals a full segment.
    pub(crate) fn finish(mut self, synced: Result<(), StoreError>) -> Result<(), StoreError> {
        let disk = self.disk;
        let writer = &mut *self.writer;
        writer.poison_on(self.written.and(synced))?;
        writer.data.is_durable();
        writer.meta.is_durable();
        let pending = std::mem::take(&mut writer.pending);
        let bookmarked = disk.publish(writer, pending);
        let marked = writer.mark.write(writer.last.lsn);
        writer.poison_on(marked)?;
        if bookmarked {
            let saved = disk.save_bookmarks();
            writer.poison_on(saved)?;
        }
        let config = &disk.env.config;
        if writer.data.end() >= config.segment_data_bytes
            || writer.meta.end() >= config.segment_meta_bytes
            || writer.records >= config.segment_records
        {
            let sealed = disk.seal(writer);
            writer.poison_on(sealed)?;
        }
        Ok(())
    }
}

impl DiskStore {
    /// Shows readers everything that was appended. Returns whether there are new bookmarks.
    fn publish(&self, writer: &Writer, pending: Pending) -> bool {
        let mut state = self.state().clone();
        let bookmarks = state.bookmarks.len();
        state.apply(pending.events);
        state.durable_lsn = writer.last.lsn;
        state.durable_stamp = writer.last.stamp;
        state.stats.raw_bytes += pending.raw_bytes;
        state.stats.records += pending.records;
        let sealed = writer.manifest.segments.iter().filter_map(|live| live.sealed);
        let (data, meta) = sealed
            .fold((writer.data.file_bytes(), writer.meta.file_bytes()), |(data, meta), sealed| {
                (data + sealed.data_bytes, meta + sealed.meta_bytes + sealed.index_bytes)
            });
        (state.stats.stored_data_bytes, state.stats.stored_meta_bytes) = (data, meta);
        let bookmarked = state.bookmarks.len() > bookmarks;
        *self.state_mut() = state;
        bookmarked
    }

    /// Writes the bookmarks' file anew, for bookmarks that came as records: those are durable already, so nothing waits until
    /// the new file is. A damaged one is left for a person to look at.
    pub(super) fn save_bookmarks(&self) -> Result<(), StoreError> {
        let state = self.state().clone();
        if state.bookmarks_damage.is_some() {
            return Ok(());
        }
        let bytes = journal_format::bookmarks::encode(self.id, &state.bookmarks)
            .map_err(StoreError::unwritable(self.id))?;
        files::replace(self.storage(), &self.dir, files::BOOKMARKS, &bytes)
    }
}
