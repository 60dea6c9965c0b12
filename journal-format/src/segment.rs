//! Files of a segment: the header page and the entries of the data and the metadata volume.
//! Layout: `docs/formats/segment.md`.
//!
//! ```text
//! data-N.seg  │ header page │ DataEntry · data │ pad │ DataEntry · data │ …
//! meta-N.seg  │ header page │ MetaEntry · frame header · records │ pad │ …
//! ```
//!
//! **Alignment.** An entry starts on a multiple of [`ENTRY_ALIGN_BYTES`]; the first entry after a durability step
//! starts on a multiple of [`PAGE_BYTES`]. So no append writes a page that holds acknowledged bytes again: a power cut
//! in the middle of a page cannot take an acknowledged entry with it.
//!
//! **End of the log.** A segment's bytes are written once, into a file that ends there or holds zeroes there. After an entry
//! the next one is at [`next_entry`], or, if there are only zeroes, at [`next_commit`]; if there are only zeroes too, or the
//! file ends, the log ends there. Whatever recovery finds behind the end, the writer cuts it off, durably, before anybody
//! is told what is durable, so that no bytes of a lost tail are ever taken for part of a new one.

mod entry;

pub use entry::{
    DATA_ENTRY_BYTES, DATA_ENTRY_MAGIC, DataEntry, DataPlace, META_ENTRY_BYTES, META_ENTRY_MAGIC, MetaEntry,
    MetaEntryHeader, Place, RawDataEntry, RawMetaEntry,
};

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::{FormatError, FormatErrorKind};
use crate::layout::{header_crc, is_zero, layout};
use crate::limits::MAX_SEGMENT_BYTES;
use crate::units::{DiskId, Lsn, SegmentNumber};

/// Unit of writing, in bytes: what a power cut may leave half-written.
pub const PAGE_BYTES: u64 = 4096;
/// Every entry starts on a multiple of this, in bytes.
pub const ENTRY_ALIGN_BYTES: u64 = 64;
/// Bytes before the first entry: one page that starts with a [`SegmentHeader`] and is zero behind it.
pub const SEGMENT_HEADER_PAGE_BYTES: usize = PAGE_BYTES as usize;
/// First eight bytes of every file of a segment.
pub const SEGMENT_MAGIC: [u8; 8] = *b"CDPSEGMT";
/// The version this code writes, and the only one it reads.
pub const SEGMENT_VERSION: u16 = 1;

const _: () = assert!(size_of::<SegmentHeader>() == 64);
const _: () = assert!(PAGE_BYTES.is_multiple_of(ENTRY_ALIGN_BYTES));

const fn align_up(position: u64, to: u64) -> u64 {
    position.next_multiple_of(if position > MAX_SEGMENT_BYTES { 1 } else { to })
}

/// Where an entry may start that follows one ending at `end` within the same commit.
#[must_use]
pub const fn next_entry(end: u64) -> u64 {
    align_up(end, ENTRY_ALIGN_BYTES)
}

/// Where the first entry of the next commit starts, after an entry ending at `end`.
#[must_use]
pub const fn next_commit(end: u64) -> u64 {
    align_up(end, PAGE_BYTES)
}

/// What a file of a segment holds.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum SegmentKind {
    /// Frames' data, compressed as shipped.
    Data = 1,
    /// Frames' headers and records, and where their data is.
    Meta = 2,
    /// The index of a sealed segment.
    Index = 3,
}

impl SegmentKind {
    /// The kind with that number, if there is one.
    #[must_use]
    pub const fn from_u8(value: u8) -> Option<Self> {
        Some(match value {
            1 => Self::Data,
            2 => Self::Meta,
            3 => Self::Index,
            _ => return None,
        })
    }
}

/// What the header page of a segment's file says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SegmentMeta {
    /// What the file holds.
    pub kind: SegmentKind,
    /// Whose segment.
    pub disk: DiskId,
    /// Its number.
    pub segment: SegmentNumber,
    /// LSN of its first record.
    pub first_lsn: Lsn,
}

/// The 64 bytes at the start of every file of a segment; the rest of the page is zero.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SegmentHeader {
    magic: [u8; 8],
    version: U16,
    header_bytes: U16,
    kind: u8,
    reserved_a: [u8; 3],
    disk: [u8; 16],
    first_lsn: U64,
    segment: U32,
    reserved_b: [u8; 16],
    header_crc: U32,
}

layout!(SegmentHeader {
    magic,
    version,
    header_bytes,
    kind,
    reserved_a,
    disk,
    first_lsn,
    segment,
    reserved_b,
    header_crc
});

impl SegmentMeta {
    /// Encodes the header page, [`SEGMENT_HEADER_PAGE_BYTES`] long.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut header = SegmentHeader {
            magic: SEGMENT_MAGIC,
            version: U16::new(SEGMENT_VERSION),
            header_bytes: U16::new(SEGMENT_HEADER_PAGE_BYTES as u16),
            kind: self.kind as u8,
            reserved_a: [0; 3],
            disk: self.disk.0,
            first_lsn: U64::new(self.first_lsn.0),
            segment: U32::new(self.segment.0),
            reserved_b: [0; 16],
            header_crc: U32::new(0),
        };
        header.header_crc = U32::new(header_crc(header.as_bytes()));
        let mut page = header.as_bytes().to_vec();
        page.resize(SEGMENT_HEADER_PAGE_BYTES, 0);
        page
    }

    /// Reads and checks a header page from the start of `bytes`. The caller compares the disk and the segment's number
    /// with the file's place: see [`SegmentMeta::expect`].
    ///
    /// # Errors
    /// `Truncated` when `bytes` is shorter than a page; otherwise what is wrong with it.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let err = |kind, detail| FormatError::new(kind, "segment header", detail);
        let bad = |detail| Err(FormatError::invalid("segment header", detail));
        let page = bytes.get(..SEGMENT_HEADER_PAGE_BYTES).ok_or(FormatError::truncated("segment header"))?;
        let (header, rest) =
            SegmentHeader::ref_from_prefix(page).map_err(|_| FormatError::truncated("segment header"))?;
        if header.magic != SEGMENT_MAGIC {
            return Err(err(FormatErrorKind::Magic, "this file is no segment"));
        }
        if header.version.get() != SEGMENT_VERSION {
            return Err(err(FormatErrorKind::Version, "written by a newer release; upgrade this one"));
        }
        if usize::from(header.header_bytes.get()) != SEGMENT_HEADER_PAGE_BYTES {
            return bad("the header's length is not 4096");
        }
        if header.header_crc.get() != header_crc(header.as_bytes()) {
            return Err(err(FormatErrorKind::Checksum, "the header is torn or corrupt"));
        }
        if header.reserved_a != [0; 3] || header.reserved_b != [0; 16] || !is_zero(rest) {
            return bad("a reserved byte is not zero");
        }
        let Some(kind) = SegmentKind::from_u8(header.kind) else {
            return bad("unknown kind");
        };
        if header.first_lsn.get() == 0 || header.segment.get() == 0 {
            return bad("the first LSN or the segment's number is 0");
        }
        Ok(Self {
            kind,
            disk: DiskId(header.disk),
            segment: SegmentNumber(header.segment.get()),
            first_lsn: Lsn(header.first_lsn.get()),
        })
    }

    /// Whether the header at the start of `page` is as it was written, whatever it says. If it is not, it has rotted, and
    /// nothing that it says counts; entries say themselves where they belong.
    #[must_use]
    pub fn is_whole(page: &[u8]) -> bool {
        SegmentHeader::ref_from_prefix(page)
            .is_ok_and(|(header, _)| header.header_crc.get() == header_crc(header.as_bytes()))
    }

    /// Whether this is the file that its name says: a file copied or restored to the wrong place is refused here.
    ///
    /// # Errors
    /// `Invalid` for another kind, disk or number.
    pub fn expect(&self, kind: SegmentKind, disk: DiskId, segment: SegmentNumber) -> Result<(), FormatError> {
        if (self.kind, self.disk, self.segment) == (kind, disk, segment) {
            Ok(())
        } else {
            Err(FormatError::invalid("segment header", "the file belongs to another disk, segment or volume"))
        }
    }
}
