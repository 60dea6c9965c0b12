//! Checking an index file once, so that its accessors need not.

use std::sync::atomic::AtomicU64;

use zerocopy::FromBytes;
use zerocopy::little_endian::U32;

use super::pages::{Paged, PagedEntry};
use super::{
    INDEX_HEADER_BYTES, INDEX_MAGIC, Index, IndexHeader, IndexShape, NO_FRAME, RawChunk, RawExtent,
    RawIndexFrame, RawMark, RawPage, RawWide,
};
use crate::error::{FormatError, FormatErrorKind};
use crate::frame::Codec;
use crate::layout::header_crc;
use crate::limits::{
    INDEX_CHUNK_BYTES, MAX_DISK_BYTES, MAX_FRAME_RAW_BYTES, MAX_FRAME_RECORDS, MAX_SEGMENT_BYTES,
    WIDE_EXTENT_BYTES,
};
use crate::record::Op;
use crate::segment::{ENTRY_ALIGN_BYTES, PAGE_BYTES, SEGMENT_HEADER_PAGE_BYTES, SegmentKind, SegmentMeta};
use crate::units::{ByteRange, Lsn};

fn bad<T>(detail: &'static str) -> Result<T, FormatError> {
    Err(FormatError::invalid("index", detail))
}

impl IndexShape {
    /// Reads a file and checks all of it but chunks and extents: both headers, the checksum of the other tables, and every
    /// entry of them. Touches none of the rest, whose pages are checked when they are first looked at.
    ///
    /// # Errors
    /// `Truncated` when bytes are missing; otherwise what is wrong with it. An index that is refused can be built again
    /// from the segment's metadata file.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let cut = || FormatError::truncated("index");
        let segment = SegmentMeta::parse(bytes)?;
        if segment.kind != SegmentKind::Index {
            return bad("a segment's file of another kind");
        }
        let own = bytes.get(SEGMENT_HEADER_PAGE_BYTES..).unwrap_or(&[]);
        let (header, _) = IndexHeader::read_from_prefix(own).map_err(|_| cut())?;
        header.check(segment.first_lsn)?;
        let shape = Self::new(&segment, header, bytes.len())?;
        let body = bytes.get(shape.frames_at..shape.chunks_at).ok_or_else(cut)?;
        if header.body_crc.get() != crc32c::crc32c(body) {
            return Err(FormatError::new(
                FormatErrorKind::Checksum,
                "index",
                "the tables are torn or corrupt",
            ));
        }
        let index = shape.open(bytes);
        shape.check_frames(&index)?;
        shape.check_wide_and_marks(&index)?;
        check_first_chunks(&index)?;
        Ok(shape)
    }

    /// Reads and checks a whole file: what [`IndexShape::parse`] does, and every page.
    ///
    /// # Errors
    /// As [`IndexShape::parse`].
    pub fn check(bytes: &[u8]) -> Result<Self, FormatError> {
        let shape = Self::parse(bytes)?;
        let index = shape.open(bytes);
        index.check_pages().map_err(|page| page.error)?;
        // What no page shows by itself.
        let chunks = index.chunks.entries;
        check_chunks(chunks)?;
        // Chunk follows chunk: an extent that belongs to none would be before the first or behind the last.
        let first = chunks.first().map_or(0, |entry| entry.extents().start);
        let end = chunks.last().map_or(0, |entry| entry.extents().end);
        if (first, end) != (0, index.extents.entries.len()) {
            return bad("an extent belongs to no chunk");
        }
        for entry in chunks {
            let run = index.extents.entries.get(entry.extents()).unwrap_or(&[]);
            if !run.is_sorted_by(|one, next| one.lsn.get() < next.lsn.get()) {
                return bad("a chunk's extents are out of order");
            }
        }
        Ok(shape)
    }

    /// Where the tables lie in a file of that length, which they must fill.
    fn new(segment: &SegmentMeta, header: IndexHeader, file_bytes: usize) -> Result<Self, FormatError> {
        let after = |at: usize, count: usize, size: usize| at.checked_add(count.checked_mul(size)?);
        let count = |count: U32| count.get() as usize;
        let pages = Paged::<RawChunk>::pages_of(count(header.chunk_count))
            .saturating_add(Paged::<RawExtent>::pages_of(count(header.extent_count)));
        let frames_at = SEGMENT_HEADER_PAGE_BYTES.saturating_add(INDEX_HEADER_BYTES);
        let places = || {
            let wide_at = after(frames_at, count(header.frame_count), size_of::<RawIndexFrame>())?;
            let marks_at = after(wide_at, count(header.wide_count), size_of::<RawWide>())?;
            let pages_at = after(marks_at, count(header.mark_count), size_of::<RawMark>())?;
            let chunks_at = after(pages_at, pages, size_of::<RawPage>())?;
            let extents_at = after(chunks_at, count(header.chunk_count), size_of::<RawChunk>())?;
            let end = after(extents_at, count(header.extent_count), size_of::<RawExtent>())?;
            Some([wide_at, marks_at, pages_at, chunks_at, extents_at, end])
        };
        // `None`: larger than memory.
        let places = places().filter(|[.., end]| *end <= file_bytes);
        let [wide_at, marks_at, pages_at, chunks_at, extents_at, end] =
            places.ok_or_else(|| FormatError::truncated("index"))?;
        if end < file_bytes {
            return bad("bytes after the last table");
        }
        // No more than the file has of them.
        let checked = (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        let (disk, segment) = (segment.disk, segment.segment);
        Ok(Self {
            disk,
            segment,
            header,
            frames_at,
            wide_at,
            marks_at,
            pages_at,
            chunks_at,
            extents_at,
            end,
            checked,
        })
    }

    fn holds(&self, lsn: u64) -> bool {
        (self.first_lsn().0..=self.last_lsn().0).contains(&lsn)
    }

    fn check_frames(&self, index: &Index<'_>) -> Result<(), FormatError> {
        let (mut next, mut stamp) = (self.first_lsn(), self.first_stamp());
        for frame in index.frames {
            if !frame.is_possible() {
                return bad("a frame's field is out of its range");
            }
            if frame.first_lsn.get() != next.0 || frame.first_stamp.get() < stamp.0 {
                return bad("the frames are out of order");
            }
            next = next.plus(u64::from(frame.record_count.get()));
            stamp.0 = frame.last_stamp.get();
        }
        let first = index.frames.first().map(|frame| frame.first_stamp.get());
        if next != self.last_lsn().next() || stamp != self.last_stamp() || first != Some(self.first_stamp().0)
        {
            return bad("the frames do not add up to what the header says");
        }
        Ok(())
    }

    fn check_wide_and_marks(&self, index: &Index<'_>) -> Result<(), FormatError> {
        let mut last_lsn = 0;
        for wide in index.wide {
            let range = ByteRange::new(wide.offset.get(), wide.length.get());
            if wide.lsn.get() <= last_lsn || !self.holds(wide.lsn.get()) {
                return bad("the wide extents are out of order");
            }
            if range.is_none_or(|range| range.length() <= WIDE_EXTENT_BYTES) {
                return bad("a wide extent is not wide, or passes the largest disk");
            }
            last_lsn = wide.lsn.get();
        }
        last_lsn = 0;
        for mark in index.marks {
            if mark.lsn.get() <= last_lsn || !self.holds(mark.lsn.get()) {
                return bad("the marks are out of order");
            }
            last_lsn = mark.lsn.get();
            match mark.record.decode(Lsn(last_lsn))?.op {
                Op::Resize { .. }
                | Op::Bookmark { .. }
                | Op::GapBegin { .. }
                | Op::GapEnd { .. }
                | Op::Close { .. } => {}
                _ => return bad("a record that is no mark"),
            }
        }
        Ok(())
    }
}

impl IndexHeader {
    fn check(&self, first_lsn: Lsn) -> Result<(), FormatError> {
        let err = |kind, detail| Err(FormatError::new(kind, "index", detail));
        if self.magic != INDEX_MAGIC {
            return err(FormatErrorKind::Magic, "no index follows the header page");
        }
        if self.header_crc.get() != header_crc(zerocopy::IntoBytes::as_bytes(self)) {
            return err(FormatErrorKind::Checksum, "the header is torn or corrupt");
        }
        if self.reserved != [0; 20] {
            return bad("a reserved byte is not zero");
        }
        if self.first_lsn.get() != first_lsn.0 || self.last_lsn.get() == u64::MAX {
            return bad("the LSNs are out of range or differ from the header page's");
        }
        if self.disk_bytes.get() > MAX_DISK_BYTES {
            return bad("the disk is larger than the limit");
        }
        if self.chunk_count.get() > self.extent_count.get() {
            return bad("more chunks than extents");
        }
        Ok(())
    }
}

impl RawIndexFrame {
    fn is_possible(&self) -> bool {
        let at = |position: u64| {
            position.is_multiple_of(ENTRY_ALIGN_BYTES) && (PAGE_BYTES..MAX_SEGMENT_BYTES).contains(&position)
        };
        let data = match self.data_bytes.get() {
            0 => self.data_position.get() == 0 && self.data_segment.get() == 0,
            _ => at(self.data_position.get()) && self.data_segment.get() != 0,
        };
        let stored = Codec::from_u8(self.codec)
            .is_some_and(|codec| codec.fits(self.raw_bytes.get(), self.data_bytes.get()));
        data && stored
            && at(self.meta_position.get())
            && self.reserved == [0; 3]
            && self.epoch.get() != 0
            && self.raw_bytes.get() <= MAX_FRAME_RAW_BYTES
            && (1..=MAX_FRAME_RECORDS).contains(&self.record_count.get())
            && self.first_lsn.get().checked_add(u64::from(self.record_count.get())).is_some()
            && self.first_stamp.get() <= self.last_stamp.get()
    }
}

/// Checks chunks that follow each other.
fn check_chunks(chunks: &[RawChunk]) -> Result<(), FormatError> {
    let follows = |one: &RawChunk, next: &RawChunk| {
        one.chunk.get() < next.chunk.get() && one.extents().end == next.extents().start
    };
    if chunks.is_sorted_by(follows) {
        Ok(())
    } else {
        bad("the chunks are out of order or leave extents out")
    }
}

/// The pages' first chunks, of which a search believes the order before it looks at a page.
fn check_first_chunks(index: &Index<'_>) -> Result<(), FormatError> {
    let (of_chunks, of_extents) = index.pages.split_at_checked(index.chunk_pages()).unwrap_or_default();
    if !of_chunks.is_sorted_by(|one, next| one.first_chunk.get() < next.first_chunk.get()) {
        return bad("the pages of chunks are out of order");
    }
    if of_extents.iter().any(|page| page.first_chunk != U32::ZERO) {
        return bad("a page of extents has a first chunk");
    }
    Ok(())
}

impl PagedEntry for RawChunk {
    fn check(page: &[Self], index: &Index<'_>) -> Result<(), FormatError> {
        for entry in page {
            let extents = entry.extents();
            if extents.is_empty() || extents.end > index.extents.entries.len() {
                return bad("a chunk has no extents, or more than there are");
            }
            if u64::from(entry.chunk.get()) >= MAX_DISK_BYTES / INDEX_CHUNK_BYTES {
                return bad("a chunk passes the largest disk");
            }
        }
        check_chunks(page)
    }

    fn first_chunk(&self) -> U32 {
        self.chunk
    }
}

impl PagedEntry for RawExtent {
    fn check(page: &[Self], index: &Index<'_>) -> Result<(), FormatError> {
        page.iter().try_for_each(|extent| extent.check(index))
    }

    fn first_chunk(&self) -> U32 {
        U32::ZERO
    }
}

impl RawExtent {
    fn check(&self, index: &Index<'_>) -> Result<(), FormatError> {
        let (start, length) = (u64::from(self.start.get()), u64::from(self.length.get()));
        if length == 0 || start.saturating_add(length) > INDEX_CHUNK_BYTES {
            return bad("an extent is empty or crosses its chunk");
        }
        let (lsn, (first, last)) = (self.lsn.get(), index.lsns);
        if !(first..=last).contains(&lsn) {
            return bad("an extent lies outside its segment");
        }
        if self.frame.get() == NO_FRAME {
            return if self.data_pos.get() == 0 { Ok(()) } else { bad("zeroes with a position in a frame") };
        }
        let Some(frame) = index.frames.get(self.frame.get() as usize) else {
            return bad("an extent of no frame");
        };
        let data_end = u64::from(self.data_pos.get()).saturating_add(length);
        let in_frame = lsn.checked_sub(frame.first_lsn.get());
        if data_end > u64::from(frame.raw_bytes.get())
            || in_frame.is_none_or(|number| number >= u64::from(frame.record_count.get()))
        {
            return bad("an extent lies outside its frame");
        }
        Ok(())
    }
}
