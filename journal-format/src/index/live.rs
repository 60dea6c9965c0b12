//! Reading an index that is still being made: the active segment's.

use super::{Extent, Index, IndexBuilder, RawExtent};
use crate::units::Lsn;

impl IndexBuilder {
    /// Frames, wide extents and marks so far. Chunks and their extents are not in it: ask [`IndexBuilder::chunks`] and
    /// [`IndexBuilder::extents`].
    #[must_use]
    pub fn tables(&self) -> Index<'_> {
        Index { frames: &self.frames, chunks: &[], extents: &[], wide: &self.wide, marks: &self.marks }
    }

    /// As [`Index::chunks`].
    pub fn chunks(&self, from: u32, to: u32) -> impl DoubleEndedIterator<Item = u32> + '_ {
        // `BTreeMap::range` panics on a range that runs backwards.
        self.chunks.range(from.min(to)..to).map(|(chunk, _)| *chunk)
    }

    /// As [`Index::extents`].
    pub fn extents(&self, chunk: u32, after: Lsn, upto: Lsn) -> impl DoubleEndedIterator<Item = Extent> + '_ {
        let run: &[RawExtent] = self.chunks.get(&chunk).map_or(&[], Vec::as_slice);
        let start = run.partition_point(|extent| extent.lsn.get() <= after.0);
        let end = run.partition_point(|extent| extent.lsn.get() <= upto.0);
        run.get(start..end).unwrap_or(&[]).iter().filter_map(move |extent| extent.decode(chunk))
    }
}
