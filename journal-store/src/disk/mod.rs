//! One disk of a store.
//!
//! `open` recovers it (`manifest`, `active`, `bookmarks`, `mark`: its parts), `writer` appends and makes durable (`tail`, `pages`, `behind`), `seal` turns the active segment into a sealed one, `lookup`
//! finds records and resolves points, `mend` looks things up in indexes, `data` reads frames, `verify` reads everything.

mod active;
mod behind;
mod bookmarks;
mod data;
mod lookup;
mod manifest;
mod mark;
mod mend;
mod open;
pub(crate) mod pages;
mod scan;
mod seal;
mod tail;
mod verify;
mod writer;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use journal_format::segment::SegmentKind;
use journal_format::{DiskId, Epoch, ImageTag, Lsn, SegmentNumber, Stamp};

pub(crate) use data::{DataCache, Reading};
pub(crate) use manifest::{create, exists};
pub(crate) use open::open;
pub use verify::{Verified, VerifyProgress};
pub(crate) use writer::Commit;

use crate::cache::Cache;
use crate::config::StoreConfig;
use crate::damage::Damage;
use crate::error::StoreError;
use crate::files;
use crate::io::{File, Storage};
use crate::limits::OPEN_DATA_FILES;
use crate::segment::Segment;
use crate::timeline::Timeline;
use crate::view::View;
use journal_format::bookmarks::Bookmark;
use journal_format::{History, Point, RecoverableRange};
use pages::PageWriting;
use writer::Writer;

/// What all disks of a store share.
#[derive(Debug)]
pub(crate) struct Env {
    pub(crate) root: PathBuf,
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) config: StoreConfig,
    pub(crate) data: DataCache,
    pub(crate) pages: Arc<PageWriting>,
    /// Numbers the openings of disks, so that what one opening cached is never taken for another's.
    pub(crate) openings: AtomicU64,
}

/// Sizes of a disk's journal.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Stats {
    /// Bytes of data before compression.
    pub raw_bytes: u64,
    /// Bytes of the data volume.
    pub stored_data_bytes: u64,
    /// Bytes of the metadata volume: records and indexes.
    pub stored_meta_bytes: u64,
    /// Number of live segments.
    pub segments: u64,
    /// Number of durable records.
    pub records: u64,
}

/// The journal of one disk.
#[derive(Debug)]
pub struct DiskStore {
    id: DiskId,
    dir: PathBuf,
    env: Arc<Env>,
    opening: u64,
    state: RwLock<State>,
    /// `None` when opened for reading only.
    writer: Option<Mutex<Writer>>,
    /// Data files of sealed segments.
    files: Cache<SegmentNumber, Arc<dyn File>>,
    /// The newest restorable point as last asked for.
    newest: Mutex<Option<Point>>,
    /// Held by who makes an index again.
    mending: Mutex<()>,
    found: Mutex<Found>,
}

/// What was found damaged after opening without losing anything.
#[derive(Default, Debug)]
struct Found {
    damage: Vec<Damage>,
    /// So many of them were told.
    told: usize,
}

/// What readers see. Changed by `commit` only, in one step.
#[derive(Clone, Debug)]
struct State {
    /// Live segments in LSN order; the last is active. Replaced, never changed in place: views keep theirs.
    segments: Arc<Vec<Arc<Segment>>>,
    durable_lsn: Lsn,
    durable_stamp: Stamp,
    last_epoch: Epoch,
    disk_bytes: u64,
    timeline: Timeline,
    bookmarks: Vec<Bookmark>,
    /// Why the bookmarks' file cannot be used, if so.
    bookmarks_damage: Option<Damage>,
    /// History from this LSN on is unknown, if so.
    damage: Option<Damage>,
    /// What opening found damaged without losing anything: it was made again, or it will be.
    noted: Vec<Damage>,
    stats: Stats,
}

impl DiskStore {
    /// Whose journal this is.
    #[must_use]
    pub const fn id(&self) -> DiskId {
        self.id
    }

    /// The last LSN that survives a power cut; `Lsn::ZERO` for a disk of which nothing is recorded.
    #[must_use]
    pub fn durable_lsn(&self) -> Lsn {
        self.state().durable_lsn
    }

    /// Stamp of the last durable record; `Stamp::ZERO` if there is none.
    #[must_use]
    pub fn durable_stamp(&self) -> Stamp {
        self.state().durable_stamp
    }

    /// The newest epoch of which something is durable; `Epoch(0)` if there is none.
    #[must_use]
    pub fn last_epoch(&self) -> Epoch {
        self.state().last_epoch
    }

    /// How the last epoch left the disk's image, if it was closed in good order: if its close record is the last of all. An
    /// image that is still so holds what the journal shows.
    #[must_use]
    pub fn closed_image(&self) -> Option<ImageTag> {
        let state = self.state();
        let (lsn, image) = state.timeline.closed?;
        (lsn == state.durable_lsn && state.damage.is_none()).then_some(image)
    }

    /// Size of the disk in bytes after the last durable record.
    #[must_use]
    pub fn disk_bytes(&self) -> u64 {
        self.state().disk_bytes
    }

    /// Sizes of the journal, as far as it is durable.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.state().stats
    }

    /// What opening found damaged, whether it was mended or not, and indexes that lookups found damaged since. Frames' data is
    /// looked at only by [`DiskStore::verify`] and by reading it.
    #[must_use]
    pub fn known_damage(&self) -> Vec<Damage> {
        let found = self.found().damage.clone();
        let state = self.state();
        let at_opening = state.damage.iter().chain(&state.bookmarks_damage).chain(&state.noted);
        at_opening.cloned().chain(found).collect()
    }

    /// What was found damaged since opening, each once: for whoever tells people.
    #[must_use]
    pub fn newly_found(&self) -> Vec<Damage> {
        let mut found = self.found();
        let all = found.damage.len();
        let told = std::mem::replace(&mut found.told, all);
        found.damage.get(told..).unwrap_or_default().to_vec()
    }

    fn found(&self) -> MutexGuard<'_, Found> {
        // It only grows, by whole entries.
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a write has failed, so that the disk must be opened again before it takes frames.
    #[must_use]
    pub fn is_poisoned(&self) -> bool {
        self.writer
            .as_ref()
            .is_some_and(|writer| writer.lock().map_or(true, |writer| writer.poison.is_some()))
    }

    /// Whether the disk takes frames; if not, why.
    pub(crate) fn check_writable(&self) -> Result<(), StoreError> {
        self.lock_writer().map(drop)
    }

    /// Takes nothing more, forgets what was appended since the last commit, and waits until none of it is on its way: from then on
    /// nothing changes the files, and another may open them.
    pub(crate) fn stop_writing(&self) {
        if let Some(writer) = &self.writer {
            // What a thread that panicked has left behind is only dropped.
            let mut writer = writer.lock().unwrap_or_else(PoisonError::into_inner);
            writer.poison.get_or_insert_with(|| "the disk was closed".to_owned());
            writer.data.abandon();
            writer.meta.abandon();
        }
    }

    /// What can be restored, as far as it is durable.
    #[must_use]
    pub fn history(&self) -> History {
        let state = self.state().clone();
        let Some(first) = state.segments.first().map(|segment| segment.first_lsn) else {
            return History::default();
        };
        if state.durable_lsn < first {
            return History::default();
        }
        let mut bookmarks = state.bookmarks.clone();
        bookmarks.sort_by_key(|bookmark| bookmark.lsn);
        History {
            first: self.stamp_of(&state, first).map(|stamp| (first, stamp)),
            last: Some((state.durable_lsn, state.durable_stamp)),
            recoverable: self.recoverable(&state, first),
            gaps: state.timeline.gaps,
            bookmarks,
            epochs: state.timeline.epochs,
        }
    }

    /// The stretches between gaps.
    fn recoverable(&self, state: &State, first: Lsn) -> Vec<RecoverableRange> {
        let mut ranges = Vec::new();
        let mut from = self.stamp_of(state, first).map(|stamp| (first, stamp));
        for gap in &state.timeline.gaps {
            let last = gap.begin_lsn.prev();
            if let Some(from) = from.filter(|(lsn, _)| *lsn <= last)
                && let Some(stamp) = self.stamp_of(state, last)
            {
                ranges.push(RecoverableRange { first: from, last: (last, stamp) });
            }
            from = gap.end;
        }
        if let Some(first) = from.filter(|(lsn, _)| *lsn <= state.durable_lsn) {
            ranges.push(RecoverableRange { first, last: (state.durable_lsn, state.durable_stamp) });
        }
        ranges
    }

    /// The disk after the record `lsn`. Costs the same however long the history is.
    ///
    /// # Errors
    /// `Point` for an LSN that is not durable, not recorded, or inside a gap.
    pub fn view(self: &Arc<Self>, lsn: Lsn) -> Result<View, StoreError> {
        let state = self.state().clone();
        self.check_restorable(&state, lsn)?;
        Ok(self.make_view(&state, lsn))
    }

    /// As [`DiskStore::view`], also inside a gap: what the journal knows, which may be no state that the disk ever had.
    ///
    /// # Errors
    /// `Point` for an LSN that is not durable or not recorded.
    pub fn view_in_gap(self: &Arc<Self>, lsn: Lsn) -> Result<View, StoreError> {
        let state = self.state().clone();
        self.check_recorded(&state, lsn)?;
        Ok(self.make_view(&state, lsn))
    }

    fn make_view(self: &Arc<Self>, state: &State, lsn: Lsn) -> View {
        let disk_bytes = state.timeline.size_at(lsn).unwrap_or(state.disk_bytes);
        View::new(
            Arc::clone(self),
            Arc::clone(&state.segments),
            Arc::clone(&state.timeline.sizes),
            lsn,
            disk_bytes,
        )
    }

    fn state(&self) -> RwLockReadGuard<'_, State> {
        // Changes are single assignments of values made before: a panic leaves the old state or the new.
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn state_mut(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn storage(&self) -> &dyn Storage {
        &*self.env.storage
    }

    fn path(&self, kind: SegmentKind, segment: SegmentNumber) -> PathBuf {
        self.dir.join(files::segment_file(kind, segment))
    }

    fn new(env: Arc<Env>, id: DiskId, dir: PathBuf, state: State, writer: Option<Writer>) -> Self {
        // ORDERING: pairs with nothing; only distinct numbers matter.
        let opening = env.openings.fetch_add(1, Ordering::Relaxed);
        let (state, writer, files) =
            (RwLock::new(state), writer.map(Mutex::new), Cache::new(OPEN_DATA_FILES));
        let (newest, mending, found) = (Mutex::default(), Mutex::default(), Mutex::default());
        Self { id, dir, env, opening, state, writer, files, newest, mending, found }
    }
}

/// The path of one of a disk's files.
fn segment_path(dir: &Path, kind: SegmentKind, segment: SegmentNumber) -> PathBuf {
    dir.join(files::segment_file(kind, segment))
}
