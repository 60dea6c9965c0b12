//! The index of a sealed segment: where each part of the disk was changed, and when. Layout: `docs/formats/index.md`.
//!
//! ```text
//! │ header page │ IndexHeader │ frames │ wide extents │ marks │ pages │ chunks │ extents │
//! ```
//!
//! Tables of fixed-size entries, searched in place in the mapped file: nothing is decoded or copied on opening. For each
//! 256 KiB *chunk* of the disk that the segment changes there is a run of *extents* sorted by LSN; an extent never
//! crosses its chunk. Zeroed and discarded ranges over [`WIDE_EXTENT_BYTES`](crate::limits::WIDE_EXTENT_BYTES) are in a
//! table of their own. *Marks* are the records that history needs and that are no extents: resizes, bookmarks, gaps.
//!
//! [`IndexShape::parse`] validates everything but chunks and extents, checksum and every entry; [`IndexShape::open`] then
//! gives an [`Index`] over the same bytes for nothing. Chunks and extents, nearly all of the file, are validated in pages of
//! 4 KiB, each when a lookup first comes to it; the lookup fails with a [`BadPage`] where that fails. [`IndexShape::check`]
//! validates it all at once. Accessors never panic, whatever the bytes: over other bytes than the checked ones they give
//! wrong answers or none.

mod build;
mod check;
mod live;
mod pages;

pub use build::IndexBuilder;
pub use pages::BadPage;

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use pages::Paged;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::frame::Codec;
use crate::layout::layout;
use crate::limits::INDEX_CHUNK_BYTES;
use crate::record::{RawRecord, Record};
use crate::segment::DataPlace;
use crate::units::{ByteRange, DiskId, Epoch, Lsn, SegmentNumber, Stamp};

/// First eight bytes of the index's own header, which follows the segment's header page.
pub const INDEX_MAGIC: [u8; 8] = *b"CDPINDEX";
/// Encoded size of the index's own header, in bytes.
pub const INDEX_HEADER_BYTES: usize = 96;
/// In an extent's `frame`: no frame, the bytes are zeroes.
pub const NO_FRAME: u32 = u32::MAX;

const _: () = assert!(size_of::<IndexHeader>() == INDEX_HEADER_BYTES);

/// The index's own header.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IndexHeader {
    magic: [u8; 8],
    first_lsn: U64,
    last_lsn: U64,
    first_stamp: U64,
    last_stamp: U64,
    disk_bytes: U64,
    frame_count: U32,
    chunk_count: U32,
    extent_count: U32,
    wide_count: U32,
    mark_count: U32,
    body_crc: U32,
    reserved: [u8; 20],
    header_crc: U32,
}

layout!(IndexHeader {
    magic,
    first_lsn,
    last_lsn,
    first_stamp,
    last_stamp,
    disk_bytes,
    frame_count,
    chunk_count,
    extent_count,
    wide_count,
    mark_count,
    body_crc,
    reserved,
    header_crc
});

/// A frame of the segment, in LSN order.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawIndexFrame {
    first_lsn: U64,
    first_stamp: U64,
    last_stamp: U64,
    epoch: U64,
    meta_position: U64,
    data_position: U64,
    data_segment: U32,
    record_count: U32,
    raw_bytes: U32,
    data_bytes: U32,
    data_crc: U32,
    codec: u8,
    reserved: [u8; 3],
}

layout!(RawIndexFrame {
    first_lsn,
    first_stamp,
    last_stamp,
    epoch,
    meta_position,
    data_position,
    data_segment,
    record_count,
    raw_bytes,
    data_bytes,
    data_crc,
    codec,
    reserved
});

/// A chunk of the disk and its run of extents, in chunk order.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawChunk {
    chunk: U32,
    first_extent: U32,
    extent_count: U32,
}

layout!(RawChunk { chunk, first_extent, extent_count });

/// A page of chunks or extents.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawPage {
    crc: U32,
    first_chunk: U32,
}

layout!(RawPage { crc, first_chunk });

/// A changed part of a chunk; within a chunk's run in LSN order.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawExtent {
    lsn: U64,
    start: U32,
    length: U32,
    frame: U32,
    data_pos: U32,
}

layout!(RawExtent { lsn, start, length, frame, data_pos });

/// A long zeroed or discarded range, in LSN order.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawWide {
    lsn: U64,
    offset: U64,
    length: U64,
}

layout!(RawWide { lsn, offset, length });

/// A resize, bookmark, gap-begin or gap-end, in LSN order.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawMark {
    lsn: U64,
    record: RawRecord,
}

layout!(RawMark { lsn, record });

/// A frame of a sealed segment: all that reading its data needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IndexFrame {
    /// LSN of its first record.
    pub first_lsn: Lsn,
    /// Number of its records, at least 1.
    pub record_count: u32,
    /// Stamp of its first record.
    pub first_stamp: Stamp,
    /// Stamp of its last record.
    pub last_stamp: Stamp,
    /// Capture session.
    pub epoch: Epoch,
    /// Where its entry lies in the segment's metadata file.
    pub meta_position: u64,
    /// Where its data entry lies; `None` if it has no data.
    pub data: Option<DataPlace>,
    /// How its data is stored.
    pub codec: Codec,
    /// Bytes of data before compression.
    pub raw_bytes: u32,
    /// Bytes of data as stored.
    pub data_bytes: u32,
    /// crc32c of the data as stored.
    pub data_crc: u32,
}

impl IndexFrame {
    /// LSN of its last record.
    #[must_use]
    pub fn last_lsn(&self) -> Lsn {
        self.first_lsn.plus(u64::from(self.record_count)).prev()
    }
}

impl RawIndexFrame {
    fn decode(&self) -> IndexFrame {
        let place =
            DataPlace { segment: SegmentNumber(self.data_segment.get()), position: self.data_position.get() };
        IndexFrame {
            first_lsn: Lsn(self.first_lsn.get()),
            record_count: self.record_count.get(),
            first_stamp: Stamp(self.first_stamp.get()),
            last_stamp: Stamp(self.last_stamp.get()),
            epoch: Epoch(self.epoch.get()),
            meta_position: self.meta_position.get(),
            data: (self.data_bytes.get() != 0).then_some(place),
            codec: Codec::from_u8(self.codec).unwrap_or(Codec::Raw),
            raw_bytes: self.raw_bytes.get(),
            data_bytes: self.data_bytes.get(),
            data_crc: self.data_crc.get(),
        }
    }
}

/// What an extent's bytes are.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Source {
    /// Zeroes.
    Zero,
    /// From `pos` on in the raw data of the frame with that number in this index.
    Data {
        /// For [`Index::frame`].
        frame: u32,
        /// Byte position in the frame's raw data.
        pos: u32,
    },
}

/// A changed part of the disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// The record that changed it.
    pub lsn: Lsn,
    /// Which part.
    pub range: ByteRange,
    /// What it holds since.
    pub source: Source,
}

/// The chunk of a disk offset.
#[must_use]
pub fn chunk_of(offset: u64) -> u32 {
    u32::try_from(offset.checked_div(INDEX_CHUNK_BYTES).unwrap_or(0)).unwrap_or(u32::MAX)
}

fn chunk_start(chunk: u32) -> u64 {
    u64::from(chunk).saturating_mul(INDEX_CHUNK_BYTES)
}

/// The proof that a file's bytes were checked, where its tables lie, and which pages of the large ones were checked too.
/// Keep it beside the mapping.
#[derive(Debug)]
pub struct IndexShape {
    disk: DiskId,
    segment: SegmentNumber,
    header: IndexHeader,
    frames_at: usize,
    wide_at: usize,
    marks_at: usize,
    pages_at: usize,
    chunks_at: usize,
    extents_at: usize,
    end: usize,
    /// A bit for each page.
    checked: Box<[AtomicU64]>,
}

impl IndexShape {
    /// Whose index this is.
    #[must_use]
    pub const fn disk(&self) -> DiskId {
        self.disk
    }
    /// Number of its segment.
    #[must_use]
    pub const fn segment(&self) -> SegmentNumber {
        self.segment
    }
    /// LSN of the segment's first record.
    #[must_use]
    pub fn first_lsn(&self) -> Lsn {
        Lsn(self.header.first_lsn.get())
    }
    /// LSN of the segment's last record.
    #[must_use]
    pub fn last_lsn(&self) -> Lsn {
        Lsn(self.header.last_lsn.get())
    }
    /// Stamp of the segment's first record.
    #[must_use]
    pub fn first_stamp(&self) -> Stamp {
        Stamp(self.header.first_stamp.get())
    }
    /// Stamp of the segment's last record.
    #[must_use]
    pub fn last_stamp(&self) -> Stamp {
        Stamp(self.header.last_stamp.get())
    }
    /// Size of the disk in bytes after the segment's last record.
    #[must_use]
    pub fn disk_bytes(&self) -> u64 {
        self.header.disk_bytes.get()
    }

    /// How many pages of chunks and extents were checked so far.
    #[must_use]
    pub fn checked_pages(&self) -> u32 {
        // ORDERING: nothing is read because of it.
        self.checked.iter().map(|word| word.load(Relaxed).count_ones()).fold(0, u32::saturating_add)
    }

    /// The index over the bytes that were checked.
    #[must_use]
    pub fn open<'a>(&'a self, bytes: &'a [u8]) -> Index<'a> {
        Index {
            frames: table(bytes, self.frames_at, self.wide_at),
            wide: table(bytes, self.wide_at, self.marks_at),
            marks: table(bytes, self.marks_at, self.pages_at),
            pages: table(bytes, self.pages_at, self.chunks_at),
            chunks: Paged::new(table(bytes, self.chunks_at, self.extents_at), self.chunks_at, 0),
            extents: Paged::new(
                table(bytes, self.extents_at, self.end),
                self.extents_at,
                Paged::<RawChunk>::pages_of(self.header.chunk_count.get() as usize),
            ),
            lsns: (self.header.first_lsn.get(), self.header.last_lsn.get()),
            checked: &self.checked,
        }
    }
}

/// The entries in `bytes[from..to]`, or none if they are not there.
fn table<T: FromBytes + Immutable + KnownLayout + Unaligned>(bytes: &[u8], from: usize, to: usize) -> &[T] {
    bytes.get(from..to).and_then(|bytes| <[T]>::ref_from_bytes(bytes).ok()).unwrap_or(&[])
}

/// The index of a sealed segment, over its file's bytes.
#[derive(Clone, Copy, Debug)]
pub struct Index<'a> {
    frames: &'a [RawIndexFrame],
    wide: &'a [RawWide],
    marks: &'a [RawMark],
    pages: &'a [RawPage],
    chunks: Paged<'a, RawChunk>,
    extents: Paged<'a, RawExtent>,
    /// First and last LSN.
    lsns: (u64, u64),
    /// A bit for each page.
    checked: &'a [AtomicU64],
}

impl<'a> Index<'a> {
    /// The segment's frames in LSN order.
    pub fn frames(&self) -> impl DoubleEndedIterator<Item = IndexFrame> + ExactSizeIterator + use<'a> {
        self.frames.iter().map(RawIndexFrame::decode)
    }

    /// The frame with that number ([`Source::Data`]).
    #[must_use]
    pub fn frame(&self, number: u32) -> Option<IndexFrame> {
        self.frames.get(number as usize).map(RawIndexFrame::decode)
    }

    /// The frame that holds the record `lsn`.
    #[must_use]
    pub fn frame_of(&self, lsn: Lsn) -> Option<IndexFrame> {
        let after = self.frames.partition_point(|frame| frame.first_lsn.get() <= lsn.0);
        let frame = self.frames.get(after.checked_sub(1)?)?.decode();
        (lsn <= frame.last_lsn()).then_some(frame)
    }

    /// The last frame that begins at or before `stamp`.
    #[must_use]
    pub fn frame_at(&self, stamp: Stamp) -> Option<IndexFrame> {
        let after = self.frames.partition_point(|frame| frame.first_stamp.get() <= stamp.0);
        Some(self.frames.get(after.checked_sub(1)?)?.decode())
    }

    /// The wide extents with LSNs in `(after, upto]`, in LSN order; all are zeroes. The caller looks for overlaps.
    pub fn wide(&self, after: Lsn, upto: Lsn) -> impl DoubleEndedIterator<Item = Extent> + use<'a> {
        let start = self.wide.partition_point(|wide| wide.lsn.get() <= after.0);
        let end = self.wide.partition_point(|wide| wide.lsn.get() <= upto.0);
        self.wide.get(start..end).unwrap_or(&[]).iter().filter_map(RawWide::decode)
    }

    /// Resizes, bookmarks, gap-begins and gap-ends in LSN order. A bookmark's name is in its frame's data.
    pub fn marks(&self) -> impl DoubleEndedIterator<Item = Record> + use<'a> {
        self.marks.iter().filter_map(|mark| mark.record.decode(Lsn(mark.lsn.get())).ok())
    }
}

impl RawExtent {
    fn decode(&self, chunk: u32) -> Option<Extent> {
        let offset = chunk_start(chunk).checked_add(u64::from(self.start.get()))?;
        let source = match self.frame.get() {
            NO_FRAME => Source::Zero,
            frame => Source::Data { frame, pos: self.data_pos.get() },
        };
        let range = ByteRange::new(offset, u64::from(self.length.get()))?;
        Some(Extent { lsn: Lsn(self.lsn.get()), range, source })
    }
}

impl RawWide {
    fn decode(&self) -> Option<Extent> {
        let range = ByteRange::new(self.offset.get(), self.length.get())?;
        Some(Extent { lsn: Lsn(self.lsn.get()), range, source: Source::Zero })
    }
}
