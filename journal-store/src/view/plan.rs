//! Working out which frame each part of a range comes from.

use std::sync::Arc;

use journal_format::index::{self, Source, chunk_of};
use journal_format::limits::{INDEX_CHUNK_BYTES, MAX_DISK_BYTES};
use journal_format::{ByteRange, Lsn};

use super::{Extent, ExtentKind, View};
use crate::disk::DiskStore;
use crate::error::StoreError;
use crate::segment::Segment;
use crate::timeline::SizeChange;

/// Where a part's bytes are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum PieceSource {
    Zero,
    /// From `pos` on in the data of that frame of that segment (its place in the view's list).
    Data {
        segment: usize,
        frame: u32,
        pos: u32,
    },
}

/// A part of a range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Piece {
    pub(super) range: ByteRange,
    pub(super) source: PieceSource,
}

impl Piece {
    pub(super) const fn extent(&self) -> Extent {
        let kind = match self.source {
            PieceSource::Zero => ExtentKind::Zero,
            PieceSource::Data { .. } => ExtentKind::Data,
        };
        Extent { range: self.range, kind }
    }
}

/// Looks at the records with LSNs in `(after, upto]`.
#[derive(Debug)]
pub(super) struct Planner<'a> {
    disk: &'a DiskStore,
    segments: &'a [Arc<Segment>],
    sizes: &'a [SizeChange],
    after: Lsn,
    upto: Lsn,
}

/// A long range of zeroes: a wide extent, or what a resize did away with.
pub(super) type Zeroes = (Lsn, ByteRange);

impl<'a> Planner<'a> {
    /// Of the view's disk up to `upto`.
    pub(super) fn new(view: &'a View, after: Lsn, upto: Lsn) -> Self {
        let (disk, segments, sizes) = (&*view.disk, &view.segments[..], &view.sizes[..]);
        let first = segments.partition_point(|segment| segment.first_lsn <= after.next()).saturating_sub(1);
        let end = segments.partition_point(|segment| segment.first_lsn <= upto);
        debug_assert!(
            after == Lsn::ZERO || first <= end,
            "a difference of views that were given in the right order"
        );
        // A read starts at the first segment, so that the numbers of pieces are places in the view's list.
        let first = if after == Lsn::ZERO { 0 } else { first.min(end) };
        Self { disk, segments: segments.get(first..end).unwrap_or(&[]), sizes, after, upto }
    }

    /// The start of the first chunk with extents that overlaps `[from, to)`, at least `from`.
    pub(super) fn next_content(&self, from: u64, to: u64) -> Result<Option<u64>, StoreError> {
        let end = chunk_of(to.saturating_sub(1)).saturating_add(1);
        let mut first = None;
        for segment in self.segments {
            // Of none that lies behind one that is known.
            let found = self.disk.next_chunk(segment, chunk_of(from), first.unwrap_or(end))?;
            first = found.or(first);
        }
        Ok(first.map(|first| (u64::from(first) * INDEX_CHUNK_BYTES).max(from)))
    }

    /// The ranges of a chunk's extents, of all segments.
    pub(super) fn extents(&self, chunk: u32) -> Result<Vec<ByteRange>, StoreError> {
        let mut ranges = Vec::new();
        for segment in self.segments {
            self.disk.newest_first(segment, chunk, self.after, self.upto, |extent| {
                ranges.push(extent.range);
                true
            })?;
        }
        Ok(ranges)
    }

    /// Long zeroes that overlap `range`, of each segment, by LSN.
    pub(super) fn zeroes(&self, range: ByteRange) -> Vec<Vec<Zeroes>> {
        let mut all = Vec::with_capacity(self.segments.len());
        for (at, segment) in self.segments.iter().enumerate() {
            let wide = segment.index();
            let wide = wide.tables();
            let wide = wide.wide(self.after, self.upto).map(|extent| (extent.lsn, extent.range));
            let next = self.segments.get(at.saturating_add(1)).map_or(Lsn::MAX, |next| next.first_lsn);
            let resized = self.resized(segment.first_lsn.max(self.after.next()), next.min(self.upto.next()));
            let mut zeroes: Vec<_> =
                wide.chain(resized).filter(|(_, zeroes)| zeroes.overlaps(range)).collect();
            zeroes.sort_by_key(|(lsn, _)| *lsn);
            all.push(zeroes);
        }
        all
    }

    /// What resizes with LSNs in `[from, to)` did away with.
    fn resized(&self, from: Lsn, to: Lsn) -> impl Iterator<Item = Zeroes> + use<'a> {
        let start = self.sizes.partition_point(|size| size.lsn < from);
        let end = self.sizes.partition_point(|size| size.lsn < to);
        let cut = |size: &SizeChange| {
            let range = ByteRange::new(size.zero_from, MAX_DISK_BYTES.saturating_sub(size.zero_from))?;
            Some((size.lsn, range))
        };
        self.sizes.get(start..end).unwrap_or(&[]).iter().filter_map(cut)
    }

    /// The parts of `range`, in order, without holes.
    pub(super) fn pieces(&self, range: ByteRange) -> Result<Vec<Piece>, StoreError> {
        let mut pieces = Vec::new();
        if range.is_empty() {
            return Ok(pieces);
        }
        let zeroes = self.zeroes(range);
        for chunk in chunk_of(range.offset())..=chunk_of(range.end().saturating_sub(1)) {
            let whole = ByteRange::new(u64::from(chunk) * INDEX_CHUNK_BYTES, INDEX_CHUNK_BYTES);
            if let Some(part) = whole.and_then(|whole| whole.intersection(range)) {
                self.pieces_of_chunk(chunk, part, &zeroes, &mut pieces)?;
            }
        }
        Ok(pieces)
    }

    fn pieces_of_chunk(
        &self,
        chunk: u32,
        range: ByteRange,
        zeroes: &[Vec<Zeroes>],
        pieces: &mut Vec<Piece>,
    ) -> Result<(), StoreError> {
        let mut cover = Cover { uncovered: vec![range], pieces: Vec::new() };
        for (at, segment) in self.segments.iter().enumerate().rev() {
            let mut zeroes = zeroes.get(at).map_or(&[][..], Vec::as_slice).iter().rev().peekable();
            self.disk.newest_first(segment, chunk, self.after, self.upto, |extent| {
                // A resize never has the LSN of an extent, but the first record of an epoch may imply one.
                while let Some((_, wide)) = zeroes.next_if(|(lsn, _)| *lsn > extent.lsn) {
                    cover.add(*wide, PieceSource::Zero);
                }
                cover.add(extent.range, piece_source(at, &extent));
                !cover.uncovered.is_empty()
            })?;
            zeroes.for_each(|(_, wide)| cover.add(*wide, PieceSource::Zero));
            if cover.uncovered.is_empty() {
                break;
            }
        }
        cover.add(range, PieceSource::Zero);
        cover.pieces.sort_unstable_by_key(|piece| piece.range.offset());
        pieces.append(&mut cover.pieces);
        Ok(())
    }
}

const fn piece_source(segment: usize, extent: &index::Extent) -> PieceSource {
    match extent.source {
        Source::Zero => PieceSource::Zero,
        Source::Data { frame, pos } => PieceSource::Data { segment, frame, pos },
    }
}

/// A range that is being covered, newest first.
struct Cover {
    /// What nothing newer covers, in order.
    uncovered: Vec<ByteRange>,
    pieces: Vec<Piece>,
}

impl Cover {
    /// Takes what `range` covers of the uncovered parts.
    fn add(&mut self, range: ByteRange, source: PieceSource) {
        let mut rest = Vec::with_capacity(self.uncovered.len().saturating_add(1));
        for open in &self.uncovered {
            let Some(taken) = open.intersection(range) else {
                rest.push(*open);
                continue;
            };
            let skipped = u32::try_from(taken.offset() - range.offset()).unwrap_or(u32::MAX);
            let source = match source {
                PieceSource::Zero => source,
                PieceSource::Data { segment, frame, pos } => {
                    PieceSource::Data { segment, frame, pos: pos.saturating_add(skipped) }
                }
            };
            self.pieces.push(Piece { range: taken, source });
            let before = ByteRange::new(open.offset(), taken.offset() - open.offset());
            let behind = ByteRange::new(taken.end(), open.end() - taken.end());
            rest.extend([before, behind].into_iter().flatten().filter(|part| !part.is_empty()));
        }
        self.uncovered = rest;
    }
}
