//! A segment as readers see it: an index, and where its data is.

use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use journal_format::index::{BadPage, Extent, Index, IndexBuilder, IndexFrame, IndexShape};
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
    /// In memory: of the active segment, growing; or of a sealed one whose file cannot be used.
    Live(IndexBuilder),
    /// Of a sealed one: its file, checked but for pages of chunks and extents that nobody looked at.
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

    /// As [`Index::next_chunk`].
    pub(crate) fn next_chunk(&self, from: u32, to: u32) -> Result<Option<u32>, BadPage> {
        match self {
            Self::Live(builder) => Ok(builder.next_chunk(from, to)),
            Self::Sealed(shape, bytes) => shape.open(bytes).next_chunk(from, to),
        }
    }

    /// As [`Index::newest_first`].
    pub(crate) fn newest_first(
        &self,
        chunk: u32,
        after: Lsn,
        upto: Lsn,
        each: impl FnMut(Extent) -> bool,
    ) -> Result<(), BadPage> {
        match self {
            Self::Live(builder) => {
                builder.newest_first(chunk, after, upto, each);
                Ok(())
            }
            Self::Sealed(shape, bytes) => shape.open(bytes).newest_first(chunk, after, upto, each),
        }
    }
}
