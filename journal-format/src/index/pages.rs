//! Chunks and extents: looked up in place, and checked in pages, each when a lookup first comes to it.

use core::fmt;
use core::ops::Range;
use std::sync::atomic::Ordering::Relaxed;

use zerocopy::little_endian::U32;
use zerocopy::{Immutable, IntoBytes};

use super::{Extent, Index, RawChunk, RawExtent, RawPage};
use crate::error::{FormatError, FormatErrorKind};
use crate::limits::INDEX_PAGE_BYTES;
use crate::units::Lsn;

/// A page of chunks or extents that is not what was written. What the index says is known to the segment's metadata file
/// too.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BadPage {
    /// Where in the file it begins, in bytes.
    pub offset: u64,
    /// What is wrong with it.
    pub error: FormatError,
}

impl fmt::Display for BadPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the page at byte {}: {}", self.offset, self.error)
    }
}

impl std::error::Error for BadPage {}

/// An entry of a table that is checked in pages.
pub(super) trait PagedEntry: Immutable + IntoBytes + Sized {
    /// Checks the entries of a page, as far as they can be judged without other pages.
    fn check(page: &[Self], index: &Index<'_>) -> Result<(), FormatError>;

    /// What [`RawPage`] says of a page's first entry.
    fn first_chunk(&self) -> U32;
}

/// A table that is checked in pages. A page holds whole entries: as many as fit into [`INDEX_PAGE_BYTES`], the last one of
/// a table fewer.
#[derive(Debug)]
pub(super) struct Paged<'a, T> {
    pub(super) entries: &'a [T],
    /// Where in the file it begins.
    at: usize,
    /// Number of its first page.
    first_page: usize,
}

impl<T> Clone for Paged<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Paged<'_, T> {}

impl<'a, T> Paged<'a, T> {
    const PAGE_ENTRIES: usize = INDEX_PAGE_BYTES / size_of::<T>();

    pub(super) const fn new(entries: &'a [T], at: usize, first_page: usize) -> Self {
        Self { entries, at, first_page }
    }

    /// Pages of so many entries.
    pub(super) const fn pages_of(entries: usize) -> usize {
        entries.div_ceil(Self::PAGE_ENTRIES)
    }

    /// The places of a page's entries; `page` counts from this table's first.
    const fn places(page: usize) -> Range<usize> {
        let start = page.saturating_mul(Self::PAGE_ENTRIES);
        start..start.saturating_add(Self::PAGE_ENTRIES)
    }
}

impl<'a> Index<'a> {
    /// The first chunk in `[from, to)` that has extents. (Wide extents are apart.)
    ///
    /// # Errors
    /// `BadPage` when a page that says so is damaged.
    pub fn next_chunk(&self, from: u32, to: u32) -> Result<Option<u32>, BadPage> {
        let at = self.first_from(from)?;
        if at == self.chunks.entries.len() {
            return Ok(None);
        }
        let chunk = self.entry(self.chunks, at)?.chunk.get();
        Ok((chunk < to).then_some(chunk))
    }

    /// Gives `each` the extents of a chunk with LSNs in `(after, upto]`, newest first, until it returns `false`.
    ///
    /// # Errors
    /// `BadPage` when a page that holds some of them, or says where they are, is damaged; `each` has had those that are
    /// newer than what the page holds.
    pub fn newest_first(
        &self,
        chunk: u32,
        after: Lsn,
        upto: Lsn,
        mut each: impl FnMut(Extent) -> bool,
    ) -> Result<(), BadPage> {
        let run = self.run(chunk)?;
        let start = self.first_not(self.extents, run.clone(), |extent| extent.lsn.get() <= after.0)?;
        let mut end = self.first_not(self.extents, start..run.end, |extent| extent.lsn.get() <= upto.0)?;
        while start < end {
            let last = end.saturating_sub(1);
            let from = self.look(self.extents, last)?.start.max(start);
            let newest_first = self.extents.entries.get(from..end).unwrap_or(&[]).iter().rev();
            if !newest_first.filter_map(|extent| extent.decode(chunk)).all(&mut each) {
                break;
            }
            end = from;
        }
        Ok(())
    }

    /// The places of a chunk's extents.
    fn run(&self, chunk: u32) -> Result<Range<usize>, BadPage> {
        let at = self.first_from(chunk)?;
        if at == self.chunks.entries.len() {
            return Ok(0..0);
        }
        let entry = self.entry(self.chunks, at)?;
        Ok(if entry.chunk.get() == chunk { entry.extents() } else { 0..0 })
    }

    /// How many of the pages are of chunks; they are the first.
    pub(super) const fn chunk_pages(&self) -> usize {
        Paged::<RawChunk>::pages_of(self.chunks.entries.len())
    }

    /// The place of the first chunk that is not before `chunk`, or their number. At most one page is looked at.
    fn first_from(&self, chunk: u32) -> Result<usize, BadPage> {
        let pages = self.pages.get(..self.chunk_pages()).unwrap_or(&[]);
        let after = pages.partition_point(|page| page.first_chunk.get() < chunk);
        // Only the last page that begins before it can hold it; otherwise it would be the first of the next.
        let Some(page) = after.checked_sub(1) else { return Ok(0) };
        let Range { start, end } = Paged::<RawChunk>::places(page);
        let places = start..end.min(self.chunks.entries.len());
        self.first_not(self.chunks, places, |entry| entry.chunk.get() < chunk)
    }

    /// The first place in `places` whose entry is not `before`, or its end. As `partition_point`, but each page that is looked
    /// at is checked before it is believed.
    fn first_not<T: PagedEntry>(
        &self,
        table: Paged<'a, T>,
        places: Range<usize>,
        before: impl Fn(&T) -> bool,
    ) -> Result<usize, BadPage> {
        let Range { mut start, mut end } = places;
        while start < end {
            let middle = start.midpoint(end);
            if before(self.entry(table, middle)?) {
                start = middle.saturating_add(1);
            } else {
                end = middle;
            }
        }
        Ok(start)
    }

    fn entry<T: PagedEntry>(&self, table: Paged<'a, T>, at: usize) -> Result<&'a T, BadPage> {
        self.look(table, at)?;
        let gone = || BadPage { offset: table.at as u64, error: FormatError::truncated("index") };
        table.entries.get(at).ok_or_else(gone)
    }

    /// Checks the page of the entry at that place, unless it was checked before. The places of the page's entries.
    fn look<T: PagedEntry>(&self, table: Paged<'a, T>, at: usize) -> Result<Range<usize>, BadPage> {
        let page = at.checked_div(Paged::<T>::PAGE_ENTRIES).unwrap_or(0);
        let number = table.first_page.saturating_add(page);
        let (word, bit) = (self.checked.get(number / 64), 1_u64 << (number % 64));
        // ORDERING: pairs with the `fetch_or` below and needs no more than the bit: it publishes no memory. The bytes that
        // it speaks of do not change, and were there before anybody had this index.
        if word.is_none_or(|word| word.load(Relaxed) & bit == 0) {
            self.check_page(table, page)?;
            if let Some(word) = word {
                // ORDERING: as above. Of two threads that check a page at once, both come to the same.
                word.fetch_or(bit, Relaxed);
            }
        }
        Ok(Paged::<T>::places(page))
    }

    fn check_page<T: PagedEntry>(&self, table: Paged<'a, T>, page: usize) -> Result<(), BadPage> {
        let Range { start, end } = Paged::<T>::places(page);
        let offset = table.at.saturating_add(start.saturating_mul(size_of::<T>())) as u64;
        let bad = |error| BadPage { offset, error };
        let entries = table.entries.get(start..end.min(table.entries.len()));
        let said = self.pages.get(table.first_page.saturating_add(page));
        let (Some(entries), Some(said)) = (entries, said) else {
            return Err(bad(FormatError::truncated("index")));
        };
        if crc32c::crc32c(entries.as_bytes()) != said.crc.get() {
            let detail = "a page of chunks or extents is torn or corrupt";
            return Err(bad(FormatError::new(FormatErrorKind::Checksum, "index", detail)));
        }
        if entries.first().is_none_or(|first| first.first_chunk() != said.first_chunk) {
            return Err(bad(FormatError::invalid("index", "a page begins with another chunk")));
        }
        T::check(entries, self).map_err(bad)
    }

    /// Checks all pages.
    pub(super) fn check_pages(&self) -> Result<(), BadPage> {
        let each = |entries: usize, entries_in_page: usize| (0..entries).step_by(entries_in_page.max(1));
        each(self.chunks.entries.len(), Paged::<RawChunk>::PAGE_ENTRIES)
            .try_for_each(|at| self.look(self.chunks, at).map(drop))?;
        each(self.extents.entries.len(), Paged::<RawExtent>::PAGE_ENTRIES)
            .try_for_each(|at| self.look(self.extents, at).map(drop))
    }
}

/// What is said of a table's pages.
pub(super) fn raw_pages<T: PagedEntry>(entries: &[T]) -> impl Iterator<Item = RawPage> + '_ {
    entries.chunks(Paged::<T>::PAGE_ENTRIES.max(1)).map(|page| RawPage {
        crc: U32::new(crc32c::crc32c(page.as_bytes())),
        first_chunk: page.first().map_or(U32::ZERO, T::first_chunk),
    })
}

impl RawChunk {
    /// The places of its extents.
    pub(super) fn extents(&self) -> Range<usize> {
        let first = self.first_extent.get() as usize;
        first..first.saturating_add(self.extent_count.get() as usize)
    }
}
