//! Frames: a run of records of one disk with their data, compressed once, checksummed; the unit of shipping
//! and of storing. Layout: `docs/formats/frame.md`.
//!
//! ```text
//! ┌────────┬──────────────────────────┬──────────────────────┐
//! │ header │ records, 32 bytes each   │ data, codec applied  │
//! │ 128 B  │ record_count × 32        │ data_bytes           │
//! └────────┴──────────────────────────┴──────────────────────┘
//! ```

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::{FormatError, FormatErrorKind};
use crate::layout::{header_crc, layout};
use crate::limits::{MAX_FRAME_RAW_BYTES, MAX_FRAME_RECORDS};
use crate::parts;
use crate::record::{Op, RECORD_BYTES, RawRecord, Record};
use crate::units::{DiskId, Epoch, Lsn, Stamp};

/// Encoded size of a frame header, in bytes.
pub const FRAME_HEADER_BYTES: usize = 128;
/// First eight bytes of a frame.
pub const FRAME_MAGIC: [u8; 8] = *b"CDPFRAME";
/// The version this code writes, and the only one it reads.
pub const FRAME_VERSION: u16 = 1;

/// How a frame's data is stored.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Codec {
    /// As it is.
    Raw = 0,
    /// One zstd frame.
    Zstd = 1,
    /// In parts, each of them raw or a zstd frame: see [`crate::parts`].
    Parts = 2,
}

impl Codec {
    /// The codec with that number, if there is one.
    #[must_use]
    pub const fn from_u8(value: u8) -> Option<Self> {
        match value {
            0 => Some(Self::Raw),
            1 => Some(Self::Zstd),
            2 => Some(Self::Parts),
            _ => None,
        }
    }

    /// Whether so many raw bytes can be so many stored ones. Data that did not shrink is stored raw, so what zstd made is
    /// always less; and it makes something of nothing.
    pub(crate) const fn fits(self, raw_bytes: u32, data_bytes: u32) -> bool {
        match self {
            Self::Raw => data_bytes == raw_bytes,
            Self::Zstd => data_bytes > 0 && data_bytes < raw_bytes,
            Self::Parts => parts::table_place(raw_bytes, data_bytes).is_some(),
        }
    }
}

/// What a frame says of itself; everything but the checksums, which encoding computes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrameMeta {
    /// Whose records.
    pub disk: DiskId,
    /// Capture session they belong to.
    pub epoch: Epoch,
    /// LSN of the first record.
    pub first_lsn: Lsn,
    /// Size of the disk in bytes when the frame was packed (after its last record).
    pub disk_bytes: u64,
    /// How the data is stored.
    pub codec: Codec,
    /// Bytes of data before compression.
    pub raw_bytes: u32,
}

/// The 128 bytes of a frame header. Little-endian, reserved bytes zero and checked.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct FrameHeader {
    magic: [u8; 8],
    version: U16,
    header_bytes: U16,
    codec: u8,
    reserved_a: [u8; 3],
    disk: [u8; 16],
    epoch: U64,
    first_lsn: U64,
    first_stamp: U64,
    last_stamp: U64,
    disk_bytes: U64,
    record_count: U32,
    raw_bytes: U32,
    data_bytes: U32,
    records_crc: U32,
    data_crc: U32,
    reserved_b: [u8; 32],
    header_crc: U32,
}

layout!(FrameHeader {
    magic,
    version,
    header_bytes,
    codec,
    reserved_a,
    disk,
    epoch,
    first_lsn,
    first_stamp,
    last_stamp,
    disk_bytes,
    record_count,
    raw_bytes,
    data_bytes,
    records_crc,
    data_crc,
    reserved_b,
    header_crc,
});
const _: () = assert!(size_of::<FrameHeader>() == FRAME_HEADER_BYTES);
const _: () = assert!(size_of::<RawRecord>() == RECORD_BYTES);

impl FrameHeader {
    /// Reads and checks a header: magic, version, length, checksum, in that order, then every field's range.
    ///
    /// # Errors
    /// `Truncated` when `bytes` is shorter than a header; otherwise what is wrong with it.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let err = |kind, detail| FormatError::new(kind, "frame header", detail);
        let (header, _) =
            Self::read_from_prefix(bytes).map_err(|_| FormatError::truncated("frame header"))?;
        if header.magic != FRAME_MAGIC {
            return Err(err(FormatErrorKind::Magic, "these bytes are not a frame"));
        }
        if header.version.get() != FRAME_VERSION {
            return Err(err(FormatErrorKind::Version, "written by a newer release; upgrade this one"));
        }
        if usize::from(header.header_bytes.get()) != FRAME_HEADER_BYTES {
            return Err(err(FormatErrorKind::Invalid, "the header's length is not 128"));
        }
        if header.header_crc.get() != header_crc(header.as_bytes()) {
            return Err(err(FormatErrorKind::Checksum, "the header is torn or corrupt"));
        }
        header.check_fields()?;
        Ok(header)
    }

    fn check_fields(&self) -> Result<(), FormatError> {
        let bad = |detail| Err(FormatError::invalid("frame header", detail));
        if self.reserved_a != [0; 3] || self.reserved_b != [0; 32] {
            return bad("a reserved byte is not zero");
        }
        let Some(codec) = Codec::from_u8(self.codec) else {
            return bad("unknown codec");
        };
        let (records, raw, data) = (self.record_count.get(), self.raw_bytes.get(), self.data_bytes.get());
        if records == 0 || records > MAX_FRAME_RECORDS {
            return bad("the number of records is 0 or over the limit");
        }
        if raw > MAX_FRAME_RAW_BYTES || !codec.fits(raw, data) {
            return bad("the data length is over its limit or does not fit the codec");
        }
        if self.epoch.get() == 0 {
            return bad("the epoch is 0");
        }
        if self.first_lsn.get() == 0 || self.first_lsn.get().checked_add(u64::from(records)).is_none() {
            return bad("the first LSN is 0 or overflows");
        }
        if self.disk_bytes.get() > crate::limits::MAX_DISK_BYTES {
            return bad("the disk is larger than the limit");
        }
        if self.first_stamp.get() > self.last_stamp.get() {
            return bad("the stamps run backwards");
        }
        Ok(())
    }

    /// Disk the records belong to.
    #[must_use]
    pub const fn disk(&self) -> DiskId {
        DiskId(self.disk)
    }
    /// Capture session.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        Epoch(self.epoch.get())
    }
    /// LSN of the first record.
    #[must_use]
    pub fn first_lsn(&self) -> Lsn {
        Lsn(self.first_lsn.get())
    }
    /// LSN of the last record.
    #[must_use]
    pub fn last_lsn(&self) -> Lsn {
        self.first_lsn().plus(u64::from(self.record_count.get())).prev()
    }
    /// Stamp of the first record.
    #[must_use]
    pub fn first_stamp(&self) -> Stamp {
        Stamp(self.first_stamp.get())
    }
    /// Stamp of the last record.
    #[must_use]
    pub fn last_stamp(&self) -> Stamp {
        Stamp(self.last_stamp.get())
    }
    /// Size of the disk in bytes after the last record.
    #[must_use]
    pub fn disk_bytes(&self) -> u64 {
        self.disk_bytes.get()
    }
    /// How the data is stored. (`parse` has refused unknown codecs.)
    #[must_use]
    pub fn codec(&self) -> Codec {
        Codec::from_u8(self.codec).unwrap_or(Codec::Raw)
    }
    /// Number of records, at least 1.
    #[must_use]
    pub fn record_count(&self) -> u32 {
        self.record_count.get()
    }
    /// Bytes of data before compression.
    #[must_use]
    pub fn raw_bytes(&self) -> u32 {
        self.raw_bytes.get()
    }
    /// Bytes of data as stored.
    #[must_use]
    pub fn data_bytes(&self) -> u32 {
        self.data_bytes.get()
    }
    /// crc32c of the data as stored ([`parts::data_crc`]); its enemies are torn, lost and misdirected writes and bit rot.
    #[must_use]
    pub fn data_crc(&self) -> u32 {
        self.data_crc.get()
    }
    /// Bytes of the records.
    #[must_use]
    pub fn records_len(&self) -> usize {
        (self.record_count.get() as usize).saturating_mul(RECORD_BYTES)
    }
    /// Bytes of the whole frame: header, records and data.
    #[must_use]
    pub fn frame_len(&self) -> usize {
        FRAME_HEADER_BYTES.saturating_add(self.records_len()).saturating_add(self.data_bytes.get() as usize)
    }
}

/// A checked frame, borrowed from its bytes.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    header: FrameHeader,
    head: &'a [u8],
    data: &'a [u8],
}

impl<'a> Frame<'a> {
    /// Reads and checks one whole frame from the start of `bytes`: header, both checksums and every record.
    /// Bytes after the frame are left alone ([`FrameHeader::frame_len`] says where it ends).
    ///
    /// # Errors
    /// `Truncated` when bytes are missing; otherwise what is wrong.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, FormatError> {
        let header = FrameHeader::parse(bytes)?;
        let head_len = FRAME_HEADER_BYTES.saturating_add(header.records_len());
        let cut = || FormatError::truncated("frame");
        let head = bytes.get(..head_len).ok_or_else(cut)?;
        let data = bytes.get(head_len..header.frame_len()).ok_or_else(cut)?;
        Self::from_parts(head, data)
    }

    /// Like [`Frame::parse`] when header-and-records and data lie apart, as they do in the two volumes.
    /// `head` must be exactly header and records, `data` exactly the stored data.
    ///
    /// # Errors
    /// As [`Frame::parse`].
    pub fn from_parts(head: &'a [u8], data: &'a [u8]) -> Result<Self, FormatError> {
        let frame = Self { data, ..Self::from_head(head)? };
        if data.len() != frame.header.data_bytes() as usize {
            return Err(FormatError::truncated("frame data"));
        }
        let header = &frame.header;
        parts::check_data(header.codec(), header.raw_bytes(), data, header.data_crc())?;
        Ok(frame)
    }

    /// Checks header and records only, as recovery and indexing do; [`Frame::data`] is then empty.
    ///
    /// # Errors
    /// As [`Frame::parse`], but for the data, which is not looked at.
    pub fn from_head(head: &'a [u8]) -> Result<Self, FormatError> {
        let header = FrameHeader::parse(head)?;
        let records = head.get(FRAME_HEADER_BYTES..).unwrap_or(&[]);
        if records.len() != header.records_len() {
            return Err(FormatError::truncated("frame records"));
        }
        if crc32c::crc32c(records) != header.records_crc.get() {
            return Err(FormatError::new(FormatErrorKind::Checksum, "frame records", "torn or corrupt"));
        }
        let frame = Self { header, head, data: &[] };
        frame.check_records()?;
        Ok(frame)
    }

    fn check_records(&self) -> Result<(), FormatError> {
        let bad = |detail| FormatError::invalid("frame records", detail);
        let mut last = self.header.first_stamp();
        for (i, raw) in self.raw_records().iter().enumerate() {
            let record = raw.decode(self.lsn_at(i))?;
            if record.stamp < last || (i == 0 && record.stamp != last) {
                return Err(bad("the stamps run backwards or differ from the header's"));
            }
            last = record.stamp;
            if let Op::Write { data, .. } | Op::Bookmark { name: data } = record.op
                && data.end() > self.header.raw_bytes()
            {
                return Err(bad("a record's data lies outside the frame's"));
            }
        }
        if last == self.header.last_stamp() {
            Ok(())
        } else {
            Err(bad("the last stamp differs from the header's"))
        }
    }

    fn raw_records(&self) -> &'a [RawRecord] {
        let bytes = self.head.get(FRAME_HEADER_BYTES..).unwrap_or(&[]);
        <[RawRecord]>::ref_from_bytes(bytes).unwrap_or(&[])
    }

    fn lsn_at(&self, index: usize) -> Lsn {
        self.header.first_lsn().plus(index as u64)
    }

    /// The header.
    #[must_use]
    pub const fn header(&self) -> &FrameHeader {
        &self.header
    }

    /// Header and records as encoded: what the metadata volume stores.
    #[must_use]
    pub const fn head(&self) -> &'a [u8] {
        self.head
    }

    /// The data as stored (codec applied): what the data volume stores.
    #[must_use]
    pub const fn data(&self) -> &'a [u8] {
        self.data
    }

    /// The records in LSN order. (They were checked when the frame was parsed.)
    pub fn records(&self) -> impl Iterator<Item = Record> + use<'a> {
        let first = self.header.first_lsn();
        self.raw_records()
            .iter()
            .enumerate()
            .filter_map(move |(i, raw)| raw.decode(first.plus(i as u64)).ok())
    }
}

/// The bytes of a frame, which were checked once and need not be again.
#[derive(Clone, Debug)]
pub struct CheckedFrame {
    bytes: Vec<u8>,
    header: FrameHeader,
}

impl CheckedFrame {
    /// Checks bytes that are one whole frame and nothing else.
    ///
    /// # Errors
    /// As [`Frame::parse`]; `Invalid` for bytes behind the frame.
    pub fn parse(bytes: Vec<u8>) -> Result<Self, FormatError> {
        let header = *Frame::parse(&bytes)?.header();
        if header.frame_len() != bytes.len() {
            return Err(FormatError::invalid("frame", "there are bytes behind it"));
        }
        Ok(Self { bytes, header })
    }

    /// The frame.
    #[must_use]
    pub fn frame(&self) -> Frame<'_> {
        let head_len = FRAME_HEADER_BYTES.saturating_add(self.header.records_len());
        let (head, data) = self.bytes.split_at_checked(head_len).unwrap_or((&self.bytes, &[]));
        Frame { header: self.header, head, data }
    }

    /// The bytes that it was made of, for their memory.
    #[must_use]
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// Bytes of memory that it holds.
    #[must_use]
    pub const fn bytes_held(&self) -> usize {
        self.bytes.capacity()
    }
}

/// Encodes a frame's header and records; append `data` behind it for the whole frame.
///
/// `records` are consecutive from `meta.first_lsn`, with stamps that never run backwards; `data` is what the codec
/// made of `meta.raw_bytes` bytes.
///
/// # Errors
/// `Invalid` or `TooLarge` when the result would not parse again (a programmer's error, caught here rather than at the
/// other end).
pub fn encode_head(meta: &FrameMeta, records: &[Record], data: &[u8]) -> Result<Vec<u8>, FormatError> {
    let too_large =
        || FormatError::new(FormatErrorKind::TooLarge, "frame", "too many records or too much data");
    let count = u32::try_from(records.len()).map_err(|_| too_large())?;
    let data_bytes = u32::try_from(data.len()).map_err(|_| too_large())?;
    let mut body = Vec::with_capacity(records.len().saturating_mul(RECORD_BYTES));
    for record in records {
        body.extend_from_slice(RawRecord::encode(record).as_bytes());
    }
    let stamp = |record: Option<&Record>| U64::new(record.map_or(0, |r| r.stamp.0));
    let mut header = FrameHeader {
        magic: FRAME_MAGIC,
        version: U16::new(FRAME_VERSION),
        header_bytes: U16::new(FRAME_HEADER_BYTES as u16),
        codec: meta.codec as u8,
        reserved_a: [0; 3],
        disk: meta.disk.0,
        epoch: U64::new(meta.epoch.0),
        first_lsn: U64::new(meta.first_lsn.0),
        first_stamp: stamp(records.first()),
        last_stamp: stamp(records.last()),
        disk_bytes: U64::new(meta.disk_bytes),
        record_count: U32::new(count),
        raw_bytes: U32::new(meta.raw_bytes),
        data_bytes: U32::new(data_bytes),
        records_crc: U32::new(crc32c::crc32c(&body)),
        data_crc: U32::new(parts::data_crc(meta.codec, meta.raw_bytes, data)),
        reserved_b: [0; 32],
        header_crc: U32::new(0),
    };
    header.header_crc = U32::new(header_crc(header.as_bytes()));
    let mut out = Vec::with_capacity(FRAME_HEADER_BYTES.saturating_add(body.len()));
    out.extend_from_slice(header.as_bytes());
    out.extend_from_slice(&body);
    Frame::from_head(&out)?;
    if meta.codec == Codec::Parts {
        parts::parts_of(data, meta.raw_bytes)?;
    }
    Ok(out)
}

/// Encodes a whole frame: header, records and data in one run of bytes.
///
/// # Errors
/// As [`encode_head`].
pub fn encode(meta: &FrameMeta, records: &[Record], data: &[u8]) -> Result<Vec<u8>, FormatError> {
    let mut out = encode_head(meta, records, data)?;
    out.extend_from_slice(data);
    Ok(out)
}
