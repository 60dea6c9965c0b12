//! The manifest: which segments of a disk are live. Layout: `docs/formats/manifest.md`.
//!
//! The file is replaced as a whole (write a new file, make it durable, rename it, make the folder durable), so a reader
//! sees the old one or the new one. It is small: a header and 64 bytes for each live segment.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::{FormatError, FormatErrorKind};
use crate::layout::{header_crc, layout};
use crate::limits::{MAX_DISK_BYTES, MAX_SEGMENT_BYTES, MAX_SEGMENTS};
use crate::units::{DiskId, Epoch, Lsn, SegmentNumber, Stamp};

/// First eight bytes of a manifest.
pub const MANIFEST_MAGIC: [u8; 8] = *b"CDPMANIF";
/// The version this code writes, and the only one it reads.
pub const MANIFEST_VERSION: u16 = 1;
/// Encoded size of the manifest's header, in bytes.
pub const MANIFEST_HEADER_BYTES: usize = 128;
/// Encoded size of one segment's entry, in bytes.
pub const MANIFEST_SEGMENT_BYTES: usize = 64;

const _: () = assert!(size_of::<ManifestHeader>() == MANIFEST_HEADER_BYTES);
const _: () = assert!(size_of::<RawLiveSegment>() == MANIFEST_SEGMENT_BYTES);

/// A segment that holds part of the history.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LiveSegment {
    /// Its number.
    pub segment: SegmentNumber,
    /// LSN of its first record; for an active segment the LSN that comes next.
    pub first_lsn: Lsn,
    /// What is known once it is sealed; `None` for the one that is still written to, which is the last.
    pub sealed: Option<Sealed>,
}

/// What is fixed when a segment is sealed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sealed {
    /// LSN of its last record, at least the first.
    pub last_lsn: Lsn,
    /// Stamp of its first record.
    pub first_stamp: Stamp,
    /// Stamp of its last record.
    pub last_stamp: Stamp,
    /// Length of its data file in bytes.
    pub data_bytes: u64,
    /// Length of its metadata file in bytes.
    pub meta_bytes: u64,
    /// Length of its index file in bytes.
    pub index_bytes: u64,
}

/// A disk's manifest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Manifest {
    /// Whose it is.
    pub disk: DiskId,
    /// Number of the manifest; grows by one with each replacement.
    pub revision: u64,
    /// Size of the disk in bytes when this was written (records after it may have changed it).
    pub disk_bytes: u64,
    /// Last epoch when this was written; 0 before the first.
    pub last_epoch: Epoch,
    /// Number that the next new segment gets; greater than every live one.
    pub next_segment: SegmentNumber,
    /// The live segments in LSN order, without holes; all sealed but perhaps the last.
    pub segments: Vec<LiveSegment>,
}

/// The 128 bytes before the segments' entries.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ManifestHeader {
    magic: [u8; 8],
    version: U16,
    header_bytes: U16,
    reserved_a: [u8; 4],
    disk: [u8; 16],
    revision: U64,
    disk_bytes: U64,
    last_epoch: U64,
    reserved_b: [u8; 8],
    next_segment: U32,
    segment_count: U32,
    segments_crc: U32,
    reserved_c: [u8; 48],
    header_crc: U32,
}

layout!(ManifestHeader {
    magic,
    version,
    header_bytes,
    reserved_a,
    disk,
    revision,
    disk_bytes,
    last_epoch,
    reserved_b,
    next_segment,
    segment_count,
    segments_crc,
    reserved_c,
    header_crc
});

/// The 64 bytes of a live segment.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawLiveSegment {
    segment: U32,
    sealed: u8,
    reserved: [u8; 3],
    first_lsn: U64,
    last_lsn: U64,
    first_stamp: U64,
    last_stamp: U64,
    data_bytes: U64,
    meta_bytes: U64,
    index_bytes: U64,
}

layout!(RawLiveSegment {
    segment,
    sealed,
    reserved,
    first_lsn,
    last_lsn,
    first_stamp,
    last_stamp,
    data_bytes,
    meta_bytes,
    index_bytes
});

impl RawLiveSegment {
    fn encode(live: &LiveSegment) -> Self {
        let number = |get: fn(&Sealed) -> u64| U64::new(live.sealed.as_ref().map_or(0, get));
        Self {
            segment: U32::new(live.segment.0),
            sealed: u8::from(live.sealed.is_some()),
            reserved: [0; 3],
            first_lsn: U64::new(live.first_lsn.0),
            last_lsn: number(|s| s.last_lsn.0),
            first_stamp: number(|s| s.first_stamp.0),
            last_stamp: number(|s| s.last_stamp.0),
            data_bytes: number(|s| s.data_bytes),
            meta_bytes: number(|s| s.meta_bytes),
            index_bytes: number(|s| s.index_bytes),
        }
    }

    fn decode(&self) -> Result<LiveSegment, FormatError> {
        let sealed = Sealed {
            last_lsn: Lsn(self.last_lsn.get()),
            first_stamp: Stamp(self.first_stamp.get()),
            last_stamp: Stamp(self.last_stamp.get()),
            data_bytes: self.data_bytes.get(),
            meta_bytes: self.meta_bytes.get(),
            index_bytes: self.index_bytes.get(),
        };
        let nothing = Sealed {
            last_lsn: Lsn::ZERO,
            first_stamp: Stamp::ZERO,
            last_stamp: Stamp::ZERO,
            data_bytes: 0,
            meta_bytes: 0,
            index_bytes: 0,
        };
        let sealed = match self.sealed {
            0 if sealed == nothing => None,
            1 => Some(sealed),
            _ => {
                return Err(FormatError::invalid(
                    "manifest",
                    "an active segment with a sealed one's numbers",
                ));
            }
        };
        if self.reserved != [0; 3] {
            return Err(FormatError::invalid("manifest", "a reserved byte is not zero"));
        }
        let first_lsn = Lsn(self.first_lsn.get());
        Ok(LiveSegment { segment: SegmentNumber(self.segment.get()), first_lsn, sealed })
    }
}

impl Sealed {
    fn is_possible(&self, first_lsn: Lsn) -> bool {
        let lengths = [self.data_bytes, self.meta_bytes, self.index_bytes];
        first_lsn <= self.last_lsn
            && self.last_lsn < Lsn::MAX
            && self.first_stamp <= self.last_stamp
            && lengths.iter().all(|bytes| *bytes <= MAX_SEGMENT_BYTES)
    }
}

impl Manifest {
    /// The manifest of a disk of which nothing is recorded.
    #[must_use]
    pub const fn new(disk: DiskId, disk_bytes: u64) -> Self {
        Self {
            disk,
            revision: 1,
            disk_bytes,
            last_epoch: Epoch(0),
            next_segment: SegmentNumber(1),
            segments: Vec::new(),
        }
    }

    /// Encodes the whole file.
    ///
    /// # Errors
    /// `Invalid` or `TooLarge` when it would not parse again.
    pub fn encode(&self) -> Result<Vec<u8>, FormatError> {
        self.check()?;
        let count = u32::try_from(self.segments.len()).unwrap_or(u32::MAX);
        let mut body = Vec::with_capacity(self.segments.len().saturating_mul(MANIFEST_SEGMENT_BYTES));
        for live in &self.segments {
            body.extend_from_slice(RawLiveSegment::encode(live).as_bytes());
        }
        let mut header = ManifestHeader {
            magic: MANIFEST_MAGIC,
            version: U16::new(MANIFEST_VERSION),
            header_bytes: U16::new(MANIFEST_HEADER_BYTES as u16),
            reserved_a: [0; 4],
            disk: self.disk.0,
            revision: U64::new(self.revision),
            disk_bytes: U64::new(self.disk_bytes),
            last_epoch: U64::new(self.last_epoch.0),
            reserved_b: [0; 8],
            next_segment: U32::new(self.next_segment.0),
            segment_count: U32::new(count),
            segments_crc: U32::new(crc32c::crc32c(&body)),
            reserved_c: [0; 48],
            header_crc: U32::new(0),
        };
        header.header_crc = U32::new(header_crc(header.as_bytes()));
        let mut out = header.as_bytes().to_vec();
        out.append(&mut body);
        Ok(out)
    }

    /// Reads and checks a whole file.
    ///
    /// # Errors
    /// `Truncated` when bytes are missing; otherwise what is wrong with it.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let err = |kind, detail| FormatError::new(kind, "manifest", detail);
        let cut = || FormatError::truncated("manifest");
        let (header, body) = ManifestHeader::ref_from_prefix(bytes).map_err(|_| cut())?;
        header.check()?;
        let length = (header.segment_count.get() as usize).saturating_mul(MANIFEST_SEGMENT_BYTES);
        if body.len() < length {
            return Err(cut());
        }
        if body.len() > length {
            return Err(err(FormatErrorKind::Invalid, "bytes after the last segment"));
        }
        if header.segments_crc.get() != crc32c::crc32c(body) {
            return Err(err(FormatErrorKind::Checksum, "the segments are torn or corrupt"));
        }
        let raw = <[RawLiveSegment]>::ref_from_bytes(body).map_err(|_| cut())?;
        let manifest = Self {
            disk: DiskId(header.disk),
            revision: header.revision.get(),
            disk_bytes: header.disk_bytes.get(),
            last_epoch: Epoch(header.last_epoch.get()),
            next_segment: SegmentNumber(header.next_segment.get()),
            segments: raw.iter().map(RawLiveSegment::decode).collect::<Result<_, _>>()?,
        };
        manifest.check()?;
        Ok(manifest)
    }

    fn check(&self) -> Result<(), FormatError> {
        let bad = |detail| Err(FormatError::invalid("manifest", detail));
        if self.segments.len() > MAX_SEGMENTS as usize {
            return Err(FormatError::new(
                FormatErrorKind::TooLarge,
                "manifest",
                "more segments than the limit",
            ));
        }
        if self.disk_bytes > MAX_DISK_BYTES {
            return bad("the disk is larger than the limit");
        }
        let mut numbers: Vec<_> = self.segments.iter().map(|live| live.segment).collect();
        numbers.sort_unstable();
        numbers.dedup();
        if numbers.len() != self.segments.len() {
            return bad("two segments have the same number");
        }
        let mut expected = None;
        for (live, later) in self.segments.iter().zip(self.segments.iter().skip(1).map(Some).chain([None])) {
            if live.segment.0 == 0 || live.segment >= self.next_segment || live.first_lsn == Lsn::ZERO {
                return bad("a segment's number or first LSN is out of range");
            }
            if expected.is_some_and(|lsn| lsn != live.first_lsn) {
                return bad("the segments leave a hole between their LSNs, or overlap");
            }
            expected = match live.sealed {
                Some(sealed) if sealed.is_possible(live.first_lsn) => Some(sealed.last_lsn.next()),
                None if later.is_none() => None,
                _ => {
                    return bad(
                        "a sealed segment's numbers are out of range, or an active one is not the last",
                    );
                }
            };
        }
        Ok(())
    }
}

impl ManifestHeader {
    fn check(&self) -> Result<(), FormatError> {
        let err = |kind, detail| Err(FormatError::new(kind, "manifest", detail));
        if self.magic != MANIFEST_MAGIC {
            return err(FormatErrorKind::Magic, "this file is no manifest");
        }
        if self.version.get() != MANIFEST_VERSION {
            return err(FormatErrorKind::Version, "written by a newer release; upgrade this one");
        }
        if usize::from(self.header_bytes.get()) != MANIFEST_HEADER_BYTES {
            return err(FormatErrorKind::Invalid, "the header's length is not 128");
        }
        if self.header_crc.get() != header_crc(self.as_bytes()) {
            return err(FormatErrorKind::Checksum, "the header is torn or corrupt");
        }
        if self.reserved_a != [0; 4] || self.reserved_b != [0; 8] || self.reserved_c != [0; 48] {
            return err(FormatErrorKind::Invalid, "a reserved byte is not zero");
        }
        if self.segment_count.get() > MAX_SEGMENTS {
            return err(FormatErrorKind::TooLarge, "more segments than the limit");
        }
        Ok(())
    }
}
