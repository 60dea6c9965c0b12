//! Making the index of a segment, frame by frame.

use std::collections::BTreeMap;

use zerocopy::IntoBytes;
use zerocopy::little_endian::{U32, U64};

use super::pages::raw_pages;
use super::{
    INDEX_MAGIC, IndexHeader, IndexShape, NO_FRAME, RawChunk, RawExtent, RawIndexFrame, RawMark, RawWide,
    chunk_of, chunk_start,
};
use crate::error::{FormatError, FormatErrorKind};
use crate::frame::Frame;
use crate::layout::header_crc;
use crate::limits::{INDEX_CHUNK_BYTES, WIDE_EXTENT_BYTES};
use crate::record::{Op, RawRecord, Record};
use crate::segment::{DataPlace, SegmentKind, SegmentMeta};
use crate::units::{ByteRange, DiskId, Lsn, SegmentNumber};

/// Collects what an index holds. Memory grows with the number of records, about 24 bytes for each.
#[derive(Debug)]
pub struct IndexBuilder {
    disk: DiskId,
    segment: SegmentNumber,
    disk_bytes: u64,
    pub(super) frames: Vec<RawIndexFrame>,
    pub(super) chunks: BTreeMap<u32, Vec<RawExtent>>,
    pub(super) wide: Vec<RawWide>,
    pub(super) marks: Vec<RawMark>,
}

impl IndexBuilder {
    /// An index without frames.
    #[must_use]
    pub const fn new(disk: DiskId, segment: SegmentNumber) -> Self {
        Self {
            disk,
            segment,
            disk_bytes: 0,
            frames: Vec::new(),
            chunks: BTreeMap::new(),
            wide: Vec::new(),
            marks: Vec::new(),
        }
    }

    /// Adds the next frame in LSN order (checked as a whole by [`IndexBuilder::finish`]). Only its head is looked at.
    /// `meta_position` is where its entry lies in the segment's metadata file, `data` where its data entry lies.
    ///
    /// # Errors
    /// `Invalid` when it is another disk's or does not follow the frame before; `TooLarge` when the index is full.
    pub fn push(
        &mut self,
        frame: &Frame<'_>,
        meta_position: u64,
        data: Option<DataPlace>,
    ) -> Result<(), FormatError> {
        let header = frame.header();
        let follows = self.frames.last().is_none_or(|last| {
            last.first_lsn.get().saturating_add(u64::from(last.record_count.get())) == header.first_lsn().0
        });
        if header.disk() != self.disk || !follows {
            return Err(FormatError::invalid("index", "a frame that does not follow the one before it"));
        }
        let number = u32::try_from(self.frames.len()).ok().filter(|number| *number != NO_FRAME);
        let number = number.ok_or(FormatError::new(FormatErrorKind::TooLarge, "index", "too many frames"))?;
        self.frames.push(RawIndexFrame {
            first_lsn: U64::new(header.first_lsn().0),
            first_stamp: U64::new(header.first_stamp().0),
            last_stamp: U64::new(header.last_stamp().0),
            epoch: U64::new(header.epoch().0),
            meta_position: U64::new(meta_position),
            data_position: U64::new(data.map_or(0, |d| d.position)),
            data_segment: U32::new(data.map_or(0, |d| d.segment.0)),
            record_count: U32::new(header.record_count()),
            raw_bytes: U32::new(header.raw_bytes()),
            data_bytes: U32::new(header.data_bytes()),
            data_crc: U32::new(header.data_crc()),
            codec: header.codec() as u8,
            reserved: [0; 3],
        });
        self.disk_bytes = header.disk_bytes();
        for record in frame.records() {
            self.push_record(&record, number);
        }
        Ok(())
    }

    fn push_record(&mut self, record: &Record, frame: u32) {
        match record.op {
            Op::Write { range, data, .. } => self.push_range(record.lsn, range, frame, data.pos),
            Op::Zero { range, .. } | Op::Discard { range } if range.length() > WIDE_EXTENT_BYTES => {
                let (lsn, offset, length) = (record.lsn.0, range.offset(), range.length());
                self.wide.push(RawWide {
                    lsn: U64::new(lsn),
                    offset: U64::new(offset),
                    length: U64::new(length),
                });
            }
            Op::Zero { range, .. } | Op::Discard { range } => self.push_range(record.lsn, range, NO_FRAME, 0),
            Op::Resize { .. }
            | Op::Bookmark { .. }
            | Op::GapBegin { .. }
            | Op::GapEnd { .. }
            | Op::Close { .. } => {
                self.marks.push(RawMark { lsn: U64::new(record.lsn.0), record: RawRecord::encode(record) });
            }
            Op::Flush | Op::Void => {}
        }
    }

    /// Adds one extent for each chunk that `range` touches; data of a frame advances with the offset.
    fn push_range(&mut self, lsn: Lsn, range: ByteRange, frame: u32, data_pos: u32) {
        let last = chunk_of(range.end().saturating_sub(1));
        for chunk in chunk_of(range.offset())..=last {
            let whole = ByteRange::new(chunk_start(chunk), INDEX_CHUNK_BYTES);
            let Some(part) = whole.and_then(|whole| whole.intersection(range)) else { continue };
            // Both are at most a chunk or a record long, far below 4 GiB.
            let start = part.offset().saturating_sub(chunk_start(chunk)) as u32;
            let skipped = part.offset().saturating_sub(range.offset()) as u32;
            let data_pos = if frame == NO_FRAME { 0 } else { data_pos.saturating_add(skipped) };
            self.chunks.entry(chunk).or_default().push(RawExtent {
                lsn: U64::new(lsn.0),
                start: U32::new(start),
                length: U32::new(part.length() as u32),
                frame: U32::new(frame),
                data_pos: U32::new(data_pos),
            });
        }
    }

    /// Encodes the whole file.
    ///
    /// # Errors
    /// `Invalid` without frames, or when a position is impossible; `TooLarge` when a table is full.
    pub fn finish(&self) -> Result<Vec<u8>, FormatError> {
        let (Some(first), Some(last)) = (self.frames.first().copied(), self.frames.last().copied()) else {
            return Err(FormatError::invalid("index", "a segment without frames"));
        };
        let too_large = |_| FormatError::new(FormatErrorKind::TooLarge, "index", "a table is full");
        let count = |len: usize| u32::try_from(len).map(U32::new).map_err(too_large);
        let (mut chunks, mut extents) = (Vec::new(), Vec::new());
        for (chunk, run) in &self.chunks {
            let (first_extent, extent_count) = (count(extents.len())?, count(run.len())?);
            chunks.push(RawChunk { chunk: U32::new(*chunk), first_extent, extent_count });
            extents.extend_from_slice(run);
        }
        let pages: Vec<_> = raw_pages(&chunks).chain(raw_pages(&extents)).collect();
        let mut body =
            [self.frames.as_bytes(), self.wide.as_bytes(), self.marks.as_bytes(), pages.as_bytes()].concat();
        let records = u64::from(last.record_count.get());
        let mut header = IndexHeader {
            magic: INDEX_MAGIC,
            first_lsn: first.first_lsn,
            last_lsn: U64::new(last.first_lsn.get().saturating_add(records).saturating_sub(1)),
            first_stamp: first.first_stamp,
            last_stamp: last.last_stamp,
            disk_bytes: U64::new(self.disk_bytes),
            frame_count: count(self.frames.len())?,
            chunk_count: count(chunks.len())?,
            extent_count: count(extents.len())?,
            wide_count: count(self.wide.len())?,
            mark_count: count(self.marks.len())?,
            body_crc: U32::new(crc32c::crc32c(&body)),
            reserved: [0; 20],
            header_crc: U32::new(0),
        };
        header.header_crc = U32::new(header_crc(header.as_bytes()));
        let first_lsn = Lsn(first.first_lsn.get());
        let meta =
            SegmentMeta { kind: SegmentKind::Index, disk: self.disk, segment: self.segment, first_lsn };
        let mut out = meta.encode();
        out.extend_from_slice(header.as_bytes());
        out.append(&mut body);
        out.extend_from_slice(chunks.as_bytes());
        out.extend_from_slice(extents.as_bytes());
        IndexShape::check(&out)?;
        Ok(out)
    }
}
