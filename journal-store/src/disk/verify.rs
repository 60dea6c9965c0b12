//! Reading everything of a disk and checking everything that a restore would: every frame's data (checksum,
//! decompression), every record against the index and against its data, every index against the records that it was made
//! from, headers, unused bytes, bookmarks, the manifest, and that no LSN is missing.
//!
//! Memory: one frame, and of one segment the metadata file and the index that is made from it for comparison. It does not
//! grow with the history, and nothing passes the frame cache, so a check does not push out what readers use.

use std::collections::BTreeMap;
use std::ops::{ControlFlow, RangeInclusive};
use std::path::Path;
use std::sync::Arc;

use journal_format::durable_mark::MARK_POSITIONS;
use journal_format::index::{IndexBuilder, IndexFrame, IndexShape};
use journal_format::manifest::Sealed;
use journal_format::segment::{
    DATA_ENTRY_BYTES, MetaEntry, PAGE_BYTES, Place, SEGMENT_HEADER_PAGE_BYTES, SegmentKind, next_commit,
};
use journal_format::{Lsn, SegmentNumber, Stamp};

use super::bookmarks::parse_bookmarks;
use super::manifest::parse_manifest;
use super::{DiskStore, State, mark};
use crate::damage::{Damage, DamageKind, merged};
use crate::error::StoreError;
use crate::files::{self, Header};
use crate::io::Access;
use crate::segment::Segment;

/// How far a check is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VerifyProgress {
    /// Everything before this LSN (of the range that was asked for) is checked.
    pub next_lsn: Lsn,
    /// Bytes of frames' data that are checked.
    pub done_bytes: u64,
    /// Bytes of frames' data in the range.
    pub total_bytes: u64,
}

/// What a check found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Verified {
    /// Damage, by LSN; neighbours of one kind in one file are one. An empty list says that every point of the range can be read.
    pub damage: Vec<Damage>,
    /// First and last LSN that were checked; `None` if there was none to check.
    pub checked: Option<(Lsn, Lsn)>,
    /// Where to go on, when the check was told to stop before it was done.
    pub resume_at: Option<Lsn>,
    /// Bytes of frames' data that were checked.
    pub data_bytes: u64,
}

impl DiskStore {
    /// Checks all that is durable and has an LSN in `lsns` (`Lsn::FIRST..=Lsn::MAX` is everything), against checksums and
    /// against each other. Frames are checked whole, also those that begin before the range or end behind it.
    ///
    /// `watch` is called before each frame and at the end; when it breaks, the check ends and says where to go on. A disk
    /// may be written and read meanwhile. What cannot be read is damage too ([`DamageKind::Unreadable`]), not an error: a
    /// check ends for no other reason than `watch`.
    pub fn verify(
        &self,
        lsns: RangeInclusive<Lsn>,
        watch: &mut dyn FnMut(&VerifyProgress) -> ControlFlow<()>,
    ) -> Verified {
        let state = self.state().clone();
        let first =
            *lsns.start().max(&state.segments.first().map_or(Lsn::FIRST, |segment| segment.first_lsn));
        let last = *lsns.end().min(&state.durable_lsn);
        let mut check = Check::new(self, &state, (first, last));
        check.small_files();
        let end = state.segments.iter().try_for_each(|segment| check.segment(segment, watch));
        let resume_at = end.is_break().then_some(check.progress.next_lsn);
        let mut damage = check.damage;
        damage.sort_by(|a, b| (a.first_lsn, &a.path, a.offset).cmp(&(b.first_lsn, &b.path, b.offset)));
        if resume_at.is_none() {
            check.progress.next_lsn = last.next();
            // Nothing is left to stop.
            let _ = watch(&check.progress);
        }
        let next = resume_at.unwrap_or(last.next());
        let checked = (first < next && first <= last).then(|| (first, next.prev()));
        let damage = merged(damage);
        Verified { damage, checked, resume_at, data_bytes: check.progress.done_bytes }
    }
}

/// A check that is under way.
struct Check<'a> {
    store: &'a DiskStore,
    state: &'a State,
    first: Lsn,
    last: Lsn,
    progress: VerifyProgress,
    damage: Vec<Damage>,
    /// Stamps of bookmarks, to be compared with those of their records.
    bookmarks: BTreeMap<Lsn, Stamp>,
    /// What the manifest says of sealed segments.
    sealed: BTreeMap<SegmentNumber, Sealed>,
    /// The LSN behind the segment that was checked last.
    expected: Option<Lsn>,
}

fn durable_frames(segment: &Segment, state: &State) -> Vec<IndexFrame> {
    let index = segment.index();
    index.tables().frames().take_while(|frame| frame.first_lsn <= state.durable_lsn).collect()
}

/// Where the bytes from `from` to `to` stop being zeroes, if they do. `bytes` holds the file from its start.
fn not_zero(bytes: &[u8], from: u64, to: u64) -> Option<u64> {
    let (from_at, to_at) = (usize::try_from(from).ok()?, usize::try_from(to).ok()?);
    let part = bytes.get(from_at..to_at.min(bytes.len()))?;
    Some(from.saturating_add(part.iter().position(|byte| *byte != 0)? as u64))
}

impl<'a> Check<'a> {
    fn new(store: &'a DiskStore, state: &'a State, (first, last): (Lsn, Lsn)) -> Self {
        let in_range = |frame: &&IndexFrame| frame.first_lsn <= last && frame.last_lsn() >= first;
        let stored = |segment: &Arc<Segment>| {
            let frames = durable_frames(segment, state);
            frames.iter().filter(in_range).map(|frame| u64::from(frame.data_bytes)).sum::<u64>()
        };
        let total_bytes = state.segments.iter().map(stored).sum();
        Self {
            store,
            state,
            first,
            last,
            progress: VerifyProgress { next_lsn: first, done_bytes: 0, total_bytes },
            damage: state.damage.iter().chain(&state.bookmarks_damage).cloned().collect(),
            bookmarks: BTreeMap::new(),
            sealed: BTreeMap::new(),
            expected: None,
        }
    }

    fn found(&mut self, path: &Path, offset: u64, lsns: (Lsn, Lsn), kind: DamageKind, detail: impl ToString) {
        self.damage.push(Damage::new(self.store.id, (path, offset), lsns, kind, detail));
    }

    /// The contents of a file; what cannot be read is noted.
    fn load(&mut self, path: &Path, lsns: (Lsn, Lsn)) -> Option<Vec<u8>> {
        let open = self.store.storage().open(path, Access::Read).map_err(StoreError::io("open", path));
        match open.and_then(|file| files::read_all(&*file, path)) {
            Ok(bytes) => Some(bytes),
            Err(error) => {
                self.found(path, 0, lsns, DamageKind::Unreadable, error);
                None
            }
        }
    }

    fn small_files(&mut self) {
        // While nobody writes: bookmarks are shown before they are saved.
        let writer = self.store.lock_writer();
        let (everything, disk) = ((Lsn::FIRST, Lsn::MAX), self.store.id);
        let parse = |bytes: &[u8]| parse_manifest(bytes, disk);
        if let Some(manifest) = self.pair(files::MANIFEST, DamageKind::Manifest, parse) {
            let sealed = manifest.segments.iter().filter_map(|live| Some((live.segment, live.sealed?)));
            self.sealed = sealed.collect();
        }
        if !self.state.bookmarks.is_empty() && self.state.bookmarks_damage.is_none() {
            let parse = |bytes: &[u8]| parse_bookmarks(bytes, disk);
            let bookmarks = self.pair(files::BOOKMARKS, DamageKind::Bookmarks, parse).unwrap_or_default();
            self.bookmarks = bookmarks.iter().map(|bookmark| (bookmark.lsn, bookmark.stamp)).collect();
        }
        // An opening for writing has written both marks; before it they may be torn.
        if writer.is_err() {
            return;
        }
        let path = self.store.dir.join(files::DURABLE);
        match mark::look(self.store.storage(), &self.store.dir, disk) {
            Ok(marks) => {
                for (mark, position) in marks.into_iter().zip(MARK_POSITIONS) {
                    if let Err(detail) = mark {
                        let detail = detail.unwrap_or_else(|| "the mark is missing".to_owned());
                        self.found(&path, position, everything, DamageKind::Mark, detail);
                    }
                }
            }
            Err(error) => self.found(&path, 0, everything, DamageKind::Mark, error),
        }
    }

    /// Checks a small file and its copy, and returns what they say.
    fn pair<T>(
        &mut self,
        name: &str,
        kind: DamageKind,
        parse: impl Fn(&[u8]) -> Result<T, String>,
    ) -> Option<T> {
        let (everything, path) = ((Lsn::FIRST, Lsn::MAX), self.store.dir.join(name));
        match files::read_pair(self.store.storage(), &self.store.dir, name, parse) {
            Ok(Some(Ok(pair))) => {
                if let Some((path, detail)) = pair.damage {
                    self.found(&path, 0, everything, kind, detail);
                }
                return Some(pair.value);
            }
            Ok(Some(Err(detail))) => self.found(&path, 0, everything, kind, detail),
            Ok(None) => self.found(&path, 0, everything, kind, "the file is missing"),
            Err(error) => self.found(&path, 0, everything, DamageKind::Unreadable, error),
        }
        None
    }

    fn segment(
        &mut self,
        segment: &Segment,
        watch: &mut dyn FnMut(&VerifyProgress) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        let frames = durable_frames(segment, self.state);
        let end = frames.last().map_or(segment.first_lsn, |frame| frame.last_lsn().next());
        if let Some(expected) = self.expected.replace(end)
            && expected != segment.first_lsn
        {
            let path = self.store.path(SegmentKind::Meta, segment.number);
            let lsns = (expected, segment.first_lsn.prev());
            self.found(&path, 0, lsns, DamageKind::Missing, "no segment holds these LSNs");
        }
        if end <= self.first || segment.first_lsn > self.last {
            return ControlFlow::Continue(());
        }
        self.headers_and_lengths(segment, end.prev());
        self.records(segment, &frames);
        self.data(segment, &frames, watch)
    }

    /// The header pages of both files, and of a sealed segment their lengths.
    fn headers_and_lengths(&mut self, segment: &Segment, last: Lsn) {
        let (disk, number, lsns) = (self.store.id, segment.number, (segment.first_lsn, last));
        let sealed = self.sealed.get(&number).copied();
        for kind in [SegmentKind::Data, SegmentKind::Meta] {
            let path = self.store.path(kind, number);
            let open = self.store.storage().open(&path, Access::Read).map_err(StoreError::io("open", &path));
            let seen = open.and_then(|file| {
                let length = file.len().map_err(StoreError::io("read the length of", &path))?;
                Ok((files::check_header(&*file, &path, kind, disk, number)?, length))
            });
            let (header, length) = match seen {
                Ok(seen) => seen,
                Err(error) => {
                    self.found(&path, 0, lsns, DamageKind::Unreadable, error);
                    continue;
                }
            };
            match header {
                Header::Good => {}
                Header::Rotten(detail) => self.found(&path, 0, lsns, DamageKind::Header, detail),
                Header::Wrong(detail) => self.found(&path, 0, lsns, DamageKind::Foreign, detail),
            }
            let said = sealed.map(|sealed| match kind {
                SegmentKind::Data => sealed.data_bytes,
                _ => sealed.meta_bytes,
            });
            if let Some(said) = said.filter(|said| *said < length) {
                let detail = format!("the file has {length} bytes, the manifest says {said}");
                self.found(&path, said, lsns, DamageKind::Unused, detail);
            }
        }
    }

    /// The records of all frames of a segment, its index, and the bytes between entries of the metadata file.
    fn records(&mut self, segment: &Segment, frames: &[IndexFrame]) {
        let (disk, number) = (self.store.id, segment.number);
        let lsns = (segment.first_lsn, frames.last().map_or(segment.first_lsn, IndexFrame::last_lsn));
        let path = self.store.path(SegmentKind::Meta, number);
        let Some(meta) = self.load(&path, lsns) else { return };
        let mut rebuilt = Some(IndexBuilder::new(disk, number));
        let mut end = SEGMENT_HEADER_PAGE_BYTES as u64;
        for frame in frames {
            let lsns = (frame.first_lsn, frame.last_lsn());
            if let Some(offset) = not_zero(&meta, end, frame.meta_position) {
                let detail = "bytes between two entries are not zero";
                self.found(&path, offset, lsns, DamageKind::Unused, detail);
            }
            let place = Place { disk, segment: number, position: frame.meta_position };
            let rest = usize::try_from(place.position).ok().and_then(|at| meta.get(at..)).unwrap_or(&[]);
            match MetaEntry::parse(rest, &place) {
                Ok(entry) => {
                    end = place.position.saturating_add(entry.header.entry_bytes());
                    self.bookmark_stamps(&entry);
                    let pushed = rebuilt
                        .as_mut()
                        .map(|index| index.push(&entry.frame, place.position, entry.header.data));
                    if let Some(Err(error)) = pushed {
                        self.found(&path, place.position, lsns, DamageKind::Records, error);
                        rebuilt = None;
                    }
                }
                Err(error) => {
                    self.found(&path, place.position, lsns, DamageKind::Records, error);
                    // Where it ended is unknown, so the bytes behind it are not judged.
                    end = u64::MAX;
                    rebuilt = None;
                }
            }
        }
        if let Some(sealed) = self.sealed.get(&number).copied() {
            if let Some(offset) = not_zero(&meta, end, sealed.meta_bytes) {
                self.found(
                    &path,
                    offset,
                    lsns,
                    DamageKind::Unused,
                    "bytes behind the last entry are not zero",
                );
            }
            // A segment that was sealed since this check began has records behind those that it saw.
            let rebuilt = rebuilt.filter(|_| lsns.1 == sealed.last_lsn);
            self.index(segment, lsns, &sealed, rebuilt);
        }
    }

    fn bookmark_stamps(&mut self, entry: &MetaEntry<'_>) {
        let header = entry.frame.header();
        let inside = self.bookmarks.range(header.first_lsn()..=header.last_lsn());
        let wrong = |(lsn, stamp): (&Lsn, &Stamp)| {
            let record = entry.frame.records().find(|record| record.lsn == *lsn)?;
            (record.stamp != *stamp).then_some(*lsn)
        };
        let wrong: Vec<Lsn> = inside.filter_map(wrong).collect();
        for lsn in wrong {
            let path = self.store.dir.join(files::BOOKMARKS);
            let detail = "a bookmark has another time than its record";
            self.found(&path, 0, (lsn, lsn), DamageKind::Bookmarks, detail);
        }
    }

    /// The index file of a sealed segment, all of it, against itself, the manifest and the records. `rebuilt` is `None` when the
    /// records are damaged, which is reported elsewhere. Where the disk is written, it takes the place of a bad one.
    fn index(&mut self, segment: &Segment, lsns: (Lsn, Lsn), sealed: &Sealed, rebuilt: Option<IndexBuilder>) {
        let path = self.store.path(SegmentKind::Index, segment.number);
        let loaded = self.store.storage().load(&path).map_err(StoreError::io("read", &path));
        let detail = match &loaded {
            // It can be made again: not being able to read it is damage of the index, not of what it is made from.
            Err(error) => error.to_string(),
            Ok(bytes) => match IndexShape::check(bytes) {
                Err(error) => error.to_string(),
                Ok(shape)
                    if shape.last_lsn() != sealed.last_lsn || bytes.len() as u64 != sealed.index_bytes =>
                {
                    "it does not fit the manifest".to_owned()
                }
                Ok(_) => match rebuilt.as_ref().map(IndexBuilder::finish) {
                    Some(made) if made.as_ref().ok().map(Vec::as_slice) != Some(&bytes[..]) => {
                        "it does not fit the records".to_owned()
                    }
                    _ => return,
                },
            },
        };
        self.found(&path, 0, lsns, DamageKind::Index, detail);
        if let Some(index) = rebuilt.filter(|_| self.store.writer.is_some()) {
            self.store.replace_index(segment, index, lsns);
        }
    }

    /// The data of the segment's frames that are in the range, and the bytes between its entries.
    fn data(
        &mut self,
        segment: &Segment,
        frames: &[IndexFrame],
        watch: &mut dyn FnMut(&VerifyProgress) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        let mut end = SEGMENT_HEADER_PAGE_BYTES as u64;
        for frame in frames {
            let data_end = frame.data.map_or(end, |at| {
                at.position
                    .saturating_add(DATA_ENTRY_BYTES as u64)
                    .saturating_add(u64::from(frame.data_bytes))
            });
            if frame.first_lsn > self.last || frame.last_lsn() < self.first {
                end = data_end;
                continue;
            }
            self.progress.next_lsn = frame.first_lsn.max(self.first);
            watch(&self.progress)?;
            self.frame(frame, end);
            self.progress.done_bytes = self.progress.done_bytes.saturating_add(u64::from(frame.data_bytes));
            end = data_end;
        }
        // Each durability step fills its last page with zeroes. A reader beside a writer that has died may see a torn step there.
        if let Some(last) = frames.last()
            && last.last_lsn() <= self.last
            && (self.sealed.contains_key(&segment.number) || self.store.writer.is_some())
        {
            let path = self.store.path(SegmentKind::Data, segment.number);
            let lsns = (segment.first_lsn, last.last_lsn());
            let detail = "bytes behind the last entry are not zero";
            self.unused(&path, (end, next_commit(end)), lsns, detail);
        }
        ControlFlow::Continue(())
    }

    fn frame(&mut self, frame: &IndexFrame, unused_from: u64) {
        let Some(at) = frame.data else { return };
        let path = self.store.path(SegmentKind::Data, at.segment);
        let lsns = (frame.first_lsn, frame.last_lsn());
        match self.store.read_frame_data(frame) {
            Ok(_) => {}
            Err(StoreError::Damaged { detail, .. }) => {
                self.found(&path, at.position, lsns, DamageKind::Data, detail);
            }
            Err(error) => self.found(&path, at.position, lsns, DamageKind::Unreadable, error),
        }
        // Between two entries of one segment there is less than a page; merged segments take data from elsewhere.
        let unused = at.position.saturating_sub(unused_from);
        if unused < PAGE_BYTES {
            self.unused(&path, (unused_from, at.position), lsns, "bytes between two entries are not zero");
        }
    }

    /// Bytes that should be zero, as far as the file has them.
    fn unused(&mut self, path: &Path, (from, to): (u64, u64), lsns: (Lsn, Lsn), detail: &str) {
        let length = to.saturating_sub(from);
        if length > 0
            && let Ok(file) = self.store.storage().open(path, Access::Read)
            && let Ok(bytes) = files::read_some(&*file, path, from, length as usize)
            && let Some(offset) = not_zero(&bytes, 0, length)
        {
            self.found(path, from.saturating_add(offset), lsns, DamageKind::Unused, detail);
        }
    }
}
