//! A disk at one point: read, extents, difference to another point.
//!
//! A read walks the segments from the newest that can hold LSNs at or before the view's to the oldest, and in each the
//! extents of a chunk from newest to oldest, until every byte is covered; bytes that nothing covers were never written
//! and read as zeroes. Opening a view copies nothing but three pointers.

mod diff;
mod plan;

use std::collections::BTreeMap;
use std::sync::Arc;

use journal_format::{ByteRange, Lsn};

use crate::disk::DiskStore;
use crate::error::StoreError;
use crate::limits::WINDOW_BYTES;
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

    /// Fills `buf` with the disk's bytes from `offset` on. Larger reads are cheaper by the byte: a frame that several
    /// parts come from is decompressed once.
    ///
    /// # Errors
    /// `Invalid` past the end of the disk; `Damaged` when a needed frame is damaged; `Io`. The contents of `buf` are then
    /// undefined.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        let range = self.check(offset, buf.len() as u64)?;
        let mut by_frame: BTreeMap<(usize, u32), Vec<Piece>> = BTreeMap::new();
        for piece in Planner::new(&self.segments, &self.sizes, Lsn::ZERO, self.lsn).pieces(range) {
            match piece.source {
                PieceSource::Zero => part_of(buf, offset, piece.range)?.fill(0),
                PieceSource::Data { segment, frame, .. } => {
                    by_frame.entry((segment, frame)).or_default().push(piece)
                }
            }
        }
        for ((segment, frame), pieces) in by_frame {
            let frame = self.segments.get(segment).and_then(|segment| segment.index().frame(frame));
            let frame = frame.ok_or_else(|| self.broken())?;
            let data = self.disk.frame_data(&frame)?;
            for piece in pieces {
                let PieceSource::Data { pos, .. } = piece.source else { continue };
                let (start, length) = (pos as usize, piece.range.length() as usize);
                let bytes = start.checked_add(length).and_then(|end| data.get(start..end));
                part_of(buf, offset, piece.range)?.copy_from_slice(bytes.ok_or_else(|| self.broken())?);
            }
        }
        Ok(())
    }

    /// An index that passed its checks does not name frames or bytes that are not there.
    fn broken(&self) -> StoreError {
        StoreError::invalid(self.disk.id(), "an index names data that is not there; verify the disk")
    }

    /// What `range` holds, in order, without holes; neighbours of the same kind are one extent.
    ///
    /// # Errors
    /// `Invalid` past the end of the disk.
    pub fn extents(&self, range: ByteRange) -> Result<impl Iterator<Item = Extent> + use<>, StoreError> {
        let range = self.check(range.offset(), range.length())?;
        Ok(Merged::new(Windows { view: self.clone(), position: range.offset(), end: range.end() }.flatten()))
    }

    /// Where this view may differ from `other` of the same disk: everything that was changed at an LSN between the two,
    /// in order, neighbours merged, up to the end of the larger one. Costs what changed, not the size of the disk.
    ///
    /// # Errors
    /// `Invalid` when the views are of different disks.
    pub fn diff(&self, other: &Self) -> Result<impl Iterator<Item = ByteRange> + use<>, StoreError> {
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

/// The part of `buf`, which begins at `offset` of the disk, that is `range`.
fn part_of(buf: &mut [u8], offset: u64, range: ByteRange) -> Result<&mut [u8], StoreError> {
    let start = range.offset().saturating_sub(offset) as usize;
    let part = start.checked_add(range.length() as usize).and_then(|end| buf.get_mut(start..end));
    part.ok_or_else(|| StoreError::invalid(journal_format::DiskId::default(), "a plan passes its read"))
}

/// Extents of a range, a window at a time.
struct Windows {
    view: View,
    position: u64,
    end: u64,
}

impl Iterator for Windows {
    type Item = Vec<Extent>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.position >= self.end {
            return None;
        }
        let planner = Planner::new(&self.view.segments, &self.view.sizes, Lsn::ZERO, self.view.lsn);
        let content = planner.next_content(self.position, self.end).unwrap_or(self.end);
        let extents = if content > self.position {
            // Nothing but wide zeroes, or nothing at all, up to the next chunk with extents.
            let range = ByteRange::new(self.position, content - self.position)?;
            self.position = content;
            vec![Extent { range, kind: ExtentKind::Zero }]
        } else {
            let range = ByteRange::new(self.position, WINDOW_BYTES.min(self.end - self.position))?;
            self.position = range.end();
            planner.pieces(range).iter().map(Piece::extent).collect()
        };
        Some(extents)
    }
}

/// Merges neighbours of the same kind.
struct Merged<I: Iterator<Item = Extent>> {
    inner: std::iter::Peekable<I>,
}

impl<I: Iterator<Item = Extent>> Merged<I> {
    fn new(inner: I) -> Self {
        Self { inner: inner.peekable() }
    }
}

impl<I: Iterator<Item = Extent>> Iterator for Merged<I> {
    type Item = Extent;

    fn next(&mut self) -> Option<Extent> {
        let mut extent = self.inner.next()?;
        while let Some(more) =
            self.inner.next_if(|next| next.kind == extent.kind && next.range.offset() == extent.range.end())
        {
            extent.range =
                ByteRange::new(extent.range.offset(), extent.range.length() + more.range.length())?;
        }
        Some(extent)
    }
}
