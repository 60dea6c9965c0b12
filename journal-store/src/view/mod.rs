//! A disk at one point: read, extents, difference to another point.
//!
//! A read walks the segments from the newest that can hold LSNs at or before the view's to the oldest, and in each the
//! extents of a chunk from newest to oldest, until every byte is covered; bytes that nothing covers were never written
//! and read as zeroes. Opening a view copies nothing but three pointers.

mod diff;
mod plan;

use std::iter;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use journal_format::{ByteRange, Lsn};

use crate::disk::{DiskStore, Reading};
use crate::error::StoreError;
use crate::limits::{KEPT_READ_BYTES, WINDOW_BYTES};
use crate::segment::Segment;
use crate::timeline::SizeChange;
use plan::{Piece, PieceSource, Planner};

/// What a part of a disk holds.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ExtentKind {
    /// Written data (which may happen to be zeroes).
    Data,
    /// Zeroes: zeroed, discarded, or never written.
    Zero,
}

/// A part of a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// Where.
    pub range: ByteRange,
    /// What it holds.
    pub kind: ExtentKind,
}

/// A disk at one LSN. Cheap to clone; any thread may read through it.
#[derive(Clone, Debug)]
pub struct View {
    disk: Arc<DiskStore>,
    segments: Arc<Vec<Arc<Segment>>>,
    sizes: Arc<Vec<SizeChange>>,
    lsn: Lsn,
    disk_bytes: u64,
}

impl View {
    pub(crate) const fn new(
        disk: Arc<DiskStore>,
        segments: Arc<Vec<Arc<Segment>>>,
        sizes: Arc<Vec<SizeChange>>,
        lsn: Lsn,
        disk_bytes: u64,
    ) -> Self {
        Self { disk, segments, sizes, lsn, disk_bytes }
    }

    /// The point.
    #[must_use]
    pub const fn lsn(&self) -> Lsn {
        self.lsn
    }

    /// Size of the disk at the point, in bytes.
    #[must_use]
    pub const fn disk_bytes(&self) -> u64 {
        self.disk_bytes
    }

    fn check(&self, offset: u64, length: u64) -> Result<ByteRange, StoreError> {
        let range = ByteRange::new(offset, length).filter(|range| range.end() <= self.disk_bytes);
        range.ok_or_else(|| {
            let size = self.disk_bytes;
            let detail =
                format!("{length} bytes at {offset} pass the end of the disk, which then had {size} bytes");
            StoreError::invalid(self.disk.id(), detail)
        })
    }

    /// Fills `buf` with the disk's bytes from `offset` on. Larger reads are cheaper by the byte: what several pieces come
    /// from is read and decompressed once, in the order in which it lies in the journal.
    ///
    /// # Errors
    /// `Invalid` past the end of the disk; `Damaged` when a needed frame is damaged, or an index that cannot be made again; `Io`. The contents of `buf` are then
    /// undefined.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        self.read_with(NonZeroUsize::MIN, offset, buf)
    }

    /// As [`View::read`], by so many threads, this one included, or fewer where the system has no more: for many MiB, while
    /// nobody else needs the processors.
    ///
    /// # Errors
    /// As [`View::read`].
    pub fn read_with(&self, threads: NonZeroUsize, offset: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        let range = self.check(offset, buf.len() as u64)?;
        let keeps = buf.len() <= KEPT_READ_BYTES;
        let mut jobs = Vec::new();
        let mut rest = buf;
        for piece in Planner::new(self, Lsn::ZERO, self.lsn).pieces(range)? {
            let length = piece.range.length() as usize;
            let (into, later) = rest.split_at_mut_checked(length).ok_or_else(|| self.broken())?;
            rest = later;
            match piece.source {
                PieceSource::Zero => into.fill(0),
                PieceSource::Data { segment, frame, pos } => jobs.push(Job { segment, frame, pos, into }),
            }
        }
        jobs.sort_unstable_by_key(|job| (job.segment, job.frame, job.pos));
        let share = jobs.len().div_ceil(threads.get()).max(JOBS_PER_THREAD);
        let others = jobs.len().div_ceil(share).saturating_sub(1);
        let shares = Mutex::new(jobs.chunks_mut(share));
        let next = || shares.lock().unwrap_or_else(PoisonError::into_inner).next();
        let work = || iter::from_fn(next).try_for_each(|share| self.copy(share, keeps));
        thread::scope(|scope| {
            // Where no more threads are to be had, those there are do it all.
            let others: Vec<_> = (0..others)
                .map_while(|_| thread::Builder::new().name(READER.to_owned()).spawn_scoped(scope, work).ok())
                .collect();
            let own = work();
            let panicked = || StoreError::invalid(self.disk.id(), "a reading thread panicked; report this");
            let ended = others.into_iter().map(|other| other.join().unwrap_or_else(|_| Err(panicked())));
            ended.fold(own, Result::and)
        })
    }

    /// Does jobs that are in the journal's order.
    fn copy(&self, jobs: &mut [Job<'_>], keeps: bool) -> Result<(), StoreError> {
        let mut reading = Reading::new(keeps);
        for jobs in jobs.chunk_by_mut(|one, next| (one.segment, one.frame) == (next.segment, next.frame)) {
            let Some(&Job { segment, frame, .. }) = jobs.first() else { continue };
            let frame = self.segments.get(segment).and_then(|segment| segment.index().frame(frame));
            let frame = frame.ok_or_else(|| self.broken())?;
            for job in jobs {
                self.disk.copy_data(&frame, job.pos, job.into, &mut reading)?;
            }
        }
        Ok(())
    }

    /// An index that passed its checks does not name frames or bytes that are not there.
    fn broken(&self) -> StoreError {
        StoreError::invalid(self.disk.id(), "an index names data that is not there; verify the disk")
    }

    /// What `range` holds, in order, without holes; neighbours of the same kind are one extent. Nothing follows an error.
    ///
    /// # Errors
    /// `Invalid` past the end of the disk. In place of an extent: `Damaged` when an index is damaged that cannot be made
    /// again; `Io`.
    pub fn extents(
        &self,
        range: ByteRange,
    ) -> Result<impl Iterator<Item = Result<Extent, StoreError>> + use<>, StoreError> {
        let range = self.check(range.offset(), range.length())?;
        Ok(Merged::new(Windows { view: self.clone(), position: range.offset(), end: range.end() }.flatten()))
    }

    /// Where this view may differ from `other` of the same disk: everything that was changed at an LSN between the two,
    /// in order, neighbours merged, up to the end of the larger one. Costs what changed, not the size of the disk. Nothing
    /// follows an error.
    ///
    /// # Errors
    /// `Invalid` when the views are of different disks. In place of a range: as of [`View::extents`].
    pub fn diff(
        &self,
        other: &Self,
    ) -> Result<impl Iterator<Item = Result<ByteRange, StoreError>> + use<>, StoreError> {
        if self.disk.id() != other.disk.id() {
            return Err(StoreError::invalid(
                self.disk.id(),
                format!("a difference to disk {}", other.disk.id()),
            ));
        }
        let (older, newer) = if self.lsn <= other.lsn { (self, other) } else { (other, self) };
        Ok(diff::Changes::between(newer.clone(), older.lsn, older.disk_bytes.max(newer.disk_bytes)))
    }
}

/// A piece of a read that comes from a frame of a segment (its place in the view's list), and where it goes.
struct Job<'a> {
    segment: usize,
    frame: u32,
    pos: u32,
    into: &'a mut [u8],
}

/// What the threads of a large read are called.
const READER: &str = "cdp-read";

/// Fewer than these are not worth a thread's start.
const JOBS_PER_THREAD: usize = 64;

/// Extents of a range, a window at a time.
struct Windows {
    view: View,
    position: u64,
    end: u64,
}

impl Windows {
    fn window(&mut self) -> Result<Vec<Extent>, StoreError> {
        let planner = Planner::new(&self.view, Lsn::ZERO, self.view.lsn);
        let content = planner.next_content(self.position, self.end)?.unwrap_or(self.end);
        let nothing = content > self.position;
        let length =
            if nothing { content - self.position } else { WINDOW_BYTES.min(self.end - self.position) };
        let range = ByteRange::new(self.position, length).ok_or_else(|| self.view.broken())?;
        let extents = if nothing {
            // Nothing but wide zeroes, or nothing at all, up to the next chunk with extents.
            vec![Extent { range, kind: ExtentKind::Zero }]
        } else {
            planner.pieces(range)?.iter().map(Piece::extent).collect()
        };
        self.position = range.end();
        Ok(extents)
    }
}

impl Iterator for Windows {
    type Item = Vec<Result<Extent, StoreError>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.position >= self.end {
            return None;
        }
        Some(match self.window() {
            Ok(extents) => extents.into_iter().map(Ok).collect(),
            Err(error) => {
                self.position = self.end;
                vec![Err(error)]
            }
        })
    }
}

/// Merges neighbours of the same kind.
struct Merged<I: Iterator<Item = Result<Extent, StoreError>>> {
    inner: iter::Peekable<I>,
}

impl<I: Iterator<Item = Result<Extent, StoreError>>> Merged<I> {
    fn new(inner: I) -> Self {
        Self { inner: inner.peekable() }
    }
}

impl<I: Iterator<Item = Result<Extent, StoreError>>> Iterator for Merged<I> {
    type Item = Result<Extent, StoreError>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut extent = match self.inner.next()? {
            Ok(extent) => extent,
            Err(error) => return Some(Err(error)),
        };
        let continues = |next: &Self::Item, extent: Extent| {
            next.as_ref()
                .is_ok_and(|next| next.kind == extent.kind && next.range.offset() == extent.range.end())
        };
        while let Some(Ok(more)) = self.inner.next_if(|next| continues(next, extent)) {
            extent.range =
                ByteRange::new(extent.range.offset(), extent.range.length() + more.range.length())?;
        }
        Some(Ok(extent))
    }
}
