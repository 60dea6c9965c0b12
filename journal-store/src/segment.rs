//! A segment as readers see it: an index, and where its data is.

use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use journal_format::index::{Extent, Index, IndexBuilder, IndexFrame, IndexShape};
use journal_format::{Lsn, SegmentNumber};

use crate::io::Bytes;

/// A segment. Views keep it; while it is active it grows behind them, and sealing changes only how it is looked up.
#[derive(Debug)]
pub(crate) struct Segment {
    pub(crate) number: SegmentNumber,
    pub(crate) first_lsn: Lsn,
    index: RwLock<SegmentIndex>,
}

/// The index of a segment.
#[derive(Debug)]
pub(crate) enum SegmentIndex {
    /// Of the active segment: in memory, growing.
    Live(IndexBuilder),
    /// Of a sealed one: its file, checked.
    Sealed(IndexShape, Bytes),
}

impl Segment {
    pub(crate) const fn new(number: SegmentNumber, first_lsn: Lsn, index: SegmentIndex) -> Self {
        Self { number, first_lsn, index: RwLock::new(index) }
    }

    /// The index, to look things up. Never hold it across I/O: `append` waits for it.
    pub(crate) fn index(&self) -> RwLockReadGuard<'_, SegmentIndex> {
        // `IndexBuilder::push` changes nothing before its checks and does not panic after them.
        self.index.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn index_mut(&self) -> RwLockWriteGuard<'_, SegmentIndex> {
        self.index.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SegmentIndex {
    /// Frames, wide extents and marks.
    pub(crate) fn tables(&self) -> Index<'_> {
        match self {
            Self::Live(builder) => builder.tables(),
            Self::Sealed(shape, bytes) => shape.open(bytes),
        }
    }

    /// The frame with that number.
    pub(crate) fn frame(&self, number: u32) -> Option<IndexFrame> {
        self.tables().frame(number)
    }

    /// The first chunk in `[from, to)` that has extents.
    pub(crate) fn next_chunk(&self, from: u32, to: u32) -> Option<u32> {
        match self {
            Self::Live(builder) => builder.chunks(from, to).next(),
            Self::Sealed(shape, bytes) => shape.open(bytes).chunks(from, to).next(),
        }
    }

    /// The chunk's extents with LSNs in `(after, upto]`, newest first, until `each` returns `false`.
    pub(crate) fn newest_first(
        &self,
        chunk: u32,
        after: Lsn,
        upto: Lsn,
        mut each: impl FnMut(Extent) -> bool,
    ) {
        match self {
            Self::Live(builder) => {
                let _ = builder.extents(chunk, after, upto).rev().all(&mut each);
            }
            Self::Sealed(shape, bytes) => {
                let _ = shape.open(bytes).extents(chunk, after, upto).rev().all(&mut each);
            }
        }
    }
}
