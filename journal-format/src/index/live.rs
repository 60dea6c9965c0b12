//! Reading an index that is still being made: the active segment's.

use super::pages::Paged;
use super::{Extent, Index, IndexBuilder, RawExtent};
use crate::units::Lsn;

impl IndexBuilder {
    /// Frames, wide extents and marks so far. Chunks and their extents are not in it: ask [`IndexBuilder::next_chunk`] and
    /// [`IndexBuilder::newest_first`].
    #[must_use]
    pub fn tables(&self) -> Index<'_> {
        Index {
            frames: &self.frames,
            wide: &self.wide,
            marks: &self.marks,
            pages: &[],
            chunks: Paged::new(&[], 0, 0),
            extents: Paged::new(&[], 0, 0),
            lsns: (0, 0),
            checked: &[],
        }
    }

    /// As [`Index::next_chunk`].
    #[must_use]
    pub fn next_chunk(&self, from: u32, to: u32) -> Option<u32> {
        // `BTreeMap::range` panics on a range that runs backwards.
        self.chunks.range(from.min(to)..to).next().map(|(chunk, _)| *chunk)
    }

    /// As [`Index::newest_first`].
    pub fn newest_first(&self, chunk: u32, after: Lsn, upto: Lsn, mut each: impl FnMut(Extent) -> bool) {
        let run: &[RawExtent] = self.chunks.get(&chunk).map_or(&[], Vec::as_slice);
        let start = run.partition_point(|extent| extent.lsn.get() <= after.0);
        let end = run.partition_point(|extent| extent.lsn.get() <= upto.0);
        let run = run.get(start..end).unwrap_or(&[]);
        let _ = run.iter().rev().filter_map(|extent| extent.decode(chunk)).all(&mut each);
    }
}
