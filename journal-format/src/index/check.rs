//! Checking an index file once, so that its accessors need not.

use zerocopy::FromBytes;

use super::{
    INDEX_HEADER_BYTES, INDEX_MAGIC, Index, IndexHeader, IndexShape, NO_FRAME, RawChunk, RawExtent,
    RawIndexFrame, RawMark, RawWide, chunk_start,
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
    /// Reads and checks a whole file: both headers, the checksum of the tables, and every entry.
    ///
    /// # Errors
    /// `Truncated` when bytes are missing; otherwise what is wrong with it. An index that is refused can be built again
    /// from the segment's metadata file.
    pub fn check(bytes: &[u8]) -> Result<Self, FormatError> {
        let cut = || FormatError::truncated("index");
        let segment = SegmentMeta::parse(bytes)?;
        if segment.kind != SegmentKind::Index {
            return bad("a segment's file of another kind");
        }
        let own = bytes.get(SEGMENT_HEADER_PAGE_BYTES..).unwrap_or(&[]);
        let (header, body) = IndexHeader::read_from_prefix(own).map_err(|_| cut())?;
        header.check(segment.first_lsn)?;
        let shape = Self::new(&segment, header).ok_or_else(cut)?;
        if bytes.len() < shape.end {
            return Err(cut());
        }
        if bytes.len() > shape.end {
            return bad("bytes after the last table");
        }
        if header.body_crc.get() != crc32c::crc32c(body) {
            return Err(FormatError::new(
                FormatErrorKind::Checksum,
                "index",
                "the tables are torn or corrupt",
            ));
        }
        let index = shape.open(bytes);
        shape.check_frames(&index)?;
        shape.check_chunks(&index)?;
        shape.check_wide_and_marks(&index)?;
        Ok(shape)
    }

    /// Where the tables lie; `None` when they could not be in memory anyway.
    fn new(segment: &SegmentMeta, header: IndexHeader) -> Option<Self> {
        let after = |at: usize, count: u32, size: usize| at.checked_add((count as usize).checked_mul(size)?);
        let frames_at = SEGMENT_HEADER_PAGE_BYTES.checked_add(INDEX_HEADER_BYTES)?;
        let chunks_at = after(frames_at, header.frame_count.get(), size_of::<RawIndexFrame>())?;
        let extents_at = after(chunks_at, header.chunk_count.get(), size_of::<RawChunk>())?;
        let wide_at = after(extents_at, header.extent_count.get(), size_of::<RawExtent>())?;
        let marks_at = after(wide_at, header.wide_count.get(), size_of::<RawWide>())?;
        let end = after(marks_at, header.mark_count.get(), size_of::<RawMark>())?;
        let (disk, segment) = (segment.disk, segment.segment);
        Some(Self { disk, segment, header, frames_at, chunks_at, extents_at, wide_at, marks_at, end })
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

    fn check_chunks(&self, index: &Index<'_>) -> Result<(), FormatError> {
        let (mut next_extent, mut last_chunk) = (0_u32, None);
        for entry in index.chunks {
            let chunk = entry.chunk.get();
            if last_chunk >= Some(chunk)
                || entry.first_extent.get() != next_extent
                || entry.extent_count.get() == 0
            {
                return bad("the chunks are out of order or leave extents out");
            }
            last_chunk = Some(chunk);
            next_extent = next_extent.saturating_add(entry.extent_count.get());
            let mut last_lsn = 0;
            for extent in index.run(chunk).unwrap_or(&[]) {
                if extent.lsn.get() <= last_lsn || !self.holds(extent.lsn.get()) {
                    return bad("a chunk's extents are out of order");
                }
                last_lsn = extent.lsn.get();
                extent.check(chunk, index)?;
            }
        }
        if next_extent == self.header.extent_count.get() {
            Ok(())
        } else {
            bad("an extent belongs to no chunk")
        }
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

impl RawExtent {
    fn check(&self, chunk: u32, index: &Index<'_>) -> Result<(), FormatError> {
        let (start, length) = (u64::from(self.start.get()), u64::from(self.length.get()));
        let end = start.saturating_add(length);
        if length == 0 || end > INDEX_CHUNK_BYTES || chunk_start(chunk).saturating_add(end) > MAX_DISK_BYTES {
            return bad("an extent is empty, crosses its chunk or passes the largest disk");
        }
        if self.frame.get() == NO_FRAME {
            return if self.data_pos.get() == 0 { Ok(()) } else { bad("zeroes with a position in a frame") };
        }
        let Some(frame) = index.frame(self.frame.get()) else { return bad("an extent of no frame") };
        let data_end = u64::from(self.data_pos.get()).saturating_add(length);
        let lsns = frame.first_lsn.0..=frame.last_lsn().0;
        if data_end > u64::from(frame.raw_bytes) || !lsns.contains(&self.lsn.get()) {
            return bad("an extent lies outside its frame");
        }
        Ok(())
    }
}
