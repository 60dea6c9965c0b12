//! Entries of the data and the metadata volume.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{ENTRY_ALIGN_BYTES, PAGE_BYTES};
use crate::error::{FormatError, FormatErrorKind};
use crate::frame::{Codec, FRAME_HEADER_BYTES, Frame, FrameHeader};
use crate::layout::{header_crc, layout};
use crate::limits::{MAX_FRAME_DATA_BYTES, MAX_FRAME_HEAD_BYTES, MAX_FRAME_RAW_BYTES, MAX_SEGMENT_BYTES};
use crate::parts;
use crate::units::{DiskId, Lsn, SegmentNumber};

/// First eight bytes of an entry of the data volume.
pub const DATA_ENTRY_MAGIC: [u8; 8] = *b"CDPDATAE";
/// First eight bytes of an entry of the metadata volume.
pub const META_ENTRY_MAGIC: [u8; 8] = *b"CDPMETAE";
/// Encoded size of a data entry's header, in bytes.
pub const DATA_ENTRY_BYTES: usize = 64;
/// Encoded size of a metadata entry's header, in bytes.
pub const META_ENTRY_BYTES: usize = 96;

const _: () = assert!(size_of::<RawDataEntry>() == DATA_ENTRY_BYTES);
const _: () = assert!(size_of::<RawMetaEntry>() == META_ENTRY_BYTES);

/// Where an entry lies. An entry says its own place, so that one written elsewhere by mistake is refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// Whose segment.
    pub disk: DiskId,
    /// Its number.
    pub segment: SegmentNumber,
    /// Byte position in the file, a multiple of [`ENTRY_ALIGN_BYTES`], at least [`PAGE_BYTES`].
    pub position: u64,
}

impl Place {
    fn is_possible(&self, length: usize) -> bool {
        self.segment.0 != 0
            && self.position >= PAGE_BYTES
            && self.position.is_multiple_of(ENTRY_ALIGN_BYTES)
            && self.position.saturating_add(length as u64) <= MAX_SEGMENT_BYTES
    }
}

/// Header of an entry of the data volume; the frame's data, as stored, follows it.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawDataEntry {
    magic: [u8; 8],
    disk: [u8; 16],
    first_lsn: U64,
    position: U64,
    segment: U32,
    data_bytes: U32,
    data_crc: U32,
    parts_of: U32,
    reserved: [u8; 4],
    header_crc: U32,
}

layout!(RawDataEntry {
    magic,
    disk,
    first_lsn,
    position,
    segment,
    data_bytes,
    data_crc,
    parts_of,
    reserved,
    header_crc
});

/// A checked entry of the data volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DataEntry<'a> {
    /// First LSN of the frame that the data belongs to.
    pub first_lsn: Lsn,
    /// The frame's checksum of the data ([`parts::data_crc`]); it was compared.
    pub data_crc: u32,
    /// The data as stored (codec applied).
    pub data: &'a [u8],
}

impl<'a> DataEntry<'a> {
    /// Encodes the header of the entry for that frame at `place`; its data follows. A frame without data has no entry.
    ///
    /// # Errors
    /// `Invalid` for a place where no entry may be, or a frame without data.
    pub fn encode_header(place: &Place, frame: &FrameHeader) -> Result<[u8; DATA_ENTRY_BYTES], FormatError> {
        let length = DATA_ENTRY_BYTES.saturating_add(frame.data_bytes() as usize);
        if frame.data_bytes() == 0 || !place.is_possible(length) || place.disk != frame.disk() {
            return Err(FormatError::invalid("data entry", "no data, or a place where it cannot be"));
        }
        let mut raw = RawDataEntry {
            magic: DATA_ENTRY_MAGIC,
            disk: place.disk.0,
            first_lsn: U64::new(frame.first_lsn().0),
            position: U64::new(place.position),
            segment: U32::new(place.segment.0),
            data_bytes: U32::new(frame.data_bytes()),
            data_crc: U32::new(frame.data_crc()),
            parts_of: U32::new(if frame.codec() == Codec::Parts { frame.raw_bytes() } else { 0 }),
            reserved: [0; 4],
            header_crc: U32::new(0),
        };
        raw.header_crc = U32::new(header_crc(raw.as_bytes()));
        Ok(zerocopy::transmute!(raw))
    }

    /// Reads and checks the entry at the start of `bytes`, which were read from `place`; bytes after it are left alone.
    ///
    /// # Errors
    /// `Truncated` when bytes are missing; otherwise what is wrong with it.
    pub fn parse(bytes: &'a [u8], place: &Place) -> Result<Self, FormatError> {
        let err = |kind, detail| FormatError::new(kind, "data entry", detail);
        let cut = || FormatError::truncated("data entry");
        let (raw, rest) = RawDataEntry::ref_from_prefix(bytes).map_err(|_| cut())?;
        if raw.magic != DATA_ENTRY_MAGIC {
            return Err(err(FormatErrorKind::Magic, "no entry starts here"));
        }
        if raw.header_crc.get() != header_crc(raw.as_bytes()) {
            return Err(err(FormatErrorKind::Checksum, "the header is torn or corrupt"));
        }
        if raw.disk != place.disk.0
            || raw.segment.get() != place.segment.0
            || raw.position.get() != place.position
        {
            return Err(err(FormatErrorKind::Invalid, "the entry was meant for another place"));
        }
        if raw.reserved != [0; 4] || raw.first_lsn.get() == 0 || raw.data_bytes.get() == 0 {
            return Err(err(FormatErrorKind::Invalid, "a field is out of its range"));
        }
        if raw.data_bytes.get() > MAX_FRAME_DATA_BYTES || raw.parts_of.get() > MAX_FRAME_RAW_BYTES {
            return Err(err(FormatErrorKind::TooLarge, "more data than a frame can have"));
        }
        let data = rest.get(..raw.data_bytes.get() as usize).ok_or_else(cut)?;
        let codec = if raw.parts_of.get() == 0 { Codec::Raw } else { Codec::Parts };
        parts::check_data(codec, raw.parts_of.get(), data, raw.data_crc.get())?;
        Ok(Self { first_lsn: Lsn(raw.first_lsn.get()), data_crc: raw.data_crc.get(), data })
    }
}

/// Header of an entry of the metadata volume; the frame's head (its header and records) follows it.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawMetaEntry {
    magic: [u8; 8],
    disk: [u8; 16],
    first_lsn: U64,
    durable_lsn: U64,
    position: U64,
    data_position: U64,
    segment: U32,
    data_segment: U32,
    head_bytes: U32,
    head_crc: U32,
    data_bytes: U32,
    reserved: [u8; 16],
    header_crc: U32,
}

layout!(RawMetaEntry {
    magic,
    disk,
    first_lsn,
    durable_lsn,
    position,
    data_position,
    segment,
    data_segment,
    head_bytes,
    head_crc,
    data_bytes,
    reserved,
    header_crc
});

/// Where a frame's data entry lies in the data volume of the same disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DataPlace {
    /// Segment whose data file holds it.
    pub segment: SegmentNumber,
    /// Position of the entry's header in that file.
    pub position: u64,
}

/// What the header of a metadata entry says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MetaEntryHeader {
    /// First LSN of the frame.
    pub first_lsn: Lsn,
    /// Last LSN of the disk that was durable when this entry was written: nothing at or below it may ever be missing.
    pub durable_lsn: Lsn,
    /// Where the data is; `None` for a frame without data.
    pub data: Option<DataPlace>,
    /// Bytes of the head that follows.
    pub head_bytes: u32,
    /// Bytes of the frame's data, as stored.
    pub data_bytes: u32,
    head_crc: u32,
}

impl MetaEntryHeader {
    /// Reads and checks an entry's header at the start of `bytes`, which were read from `place`.
    ///
    /// # Errors
    /// `Truncated` when bytes are missing; otherwise what is wrong with it.
    pub fn parse(bytes: &[u8], place: &Place) -> Result<Self, FormatError> {
        let err = |kind, detail| FormatError::new(kind, "metadata entry", detail);
        let (raw, _) =
            RawMetaEntry::ref_from_prefix(bytes).map_err(|_| FormatError::truncated("metadata entry"))?;
        if raw.magic != META_ENTRY_MAGIC {
            return Err(err(FormatErrorKind::Magic, "no entry starts here"));
        }
        if raw.header_crc.get() != header_crc(raw.as_bytes()) {
            return Err(err(FormatErrorKind::Checksum, "the header is torn or corrupt"));
        }
        if raw.disk != place.disk.0
            || raw.segment.get() != place.segment.0
            || raw.position.get() != place.position
        {
            return Err(err(FormatErrorKind::Invalid, "the entry was meant for another place"));
        }
        let head_bytes = raw.head_bytes.get() as usize;
        if head_bytes <= FRAME_HEADER_BYTES
            || raw.reserved != [0; 16]
            || raw.first_lsn.get() <= raw.durable_lsn.get()
        {
            return Err(err(FormatErrorKind::Invalid, "a field is out of its range"));
        }
        if head_bytes > MAX_FRAME_HEAD_BYTES || raw.data_bytes.get() > MAX_FRAME_DATA_BYTES {
            return Err(err(FormatErrorKind::TooLarge, "more bytes than a frame can have"));
        }
        Ok(Self {
            first_lsn: Lsn(raw.first_lsn.get()),
            durable_lsn: Lsn(raw.durable_lsn.get()),
            data: raw.data_place(place.disk)?,
            head_bytes: raw.head_bytes.get(),
            data_bytes: raw.data_bytes.get(),
            head_crc: raw.head_crc.get(),
        })
    }

    /// Bytes of the whole entry, without padding.
    #[must_use]
    pub const fn entry_bytes(&self) -> u64 {
        (META_ENTRY_BYTES as u64).saturating_add(self.head_bytes as u64)
    }
}

impl RawMetaEntry {
    fn data_place(&self, disk: DiskId) -> Result<Option<DataPlace>, FormatError> {
        let (segment, position) = (SegmentNumber(self.data_segment.get()), self.data_position.get());
        let bytes = self.data_bytes.get() as usize;
        let possible =
            || Place { disk, segment, position }.is_possible(DATA_ENTRY_BYTES.saturating_add(bytes));
        match bytes {
            0 if segment.0 == 0 && position == 0 => Ok(None),
            1.. if possible() => Ok(Some(DataPlace { segment, position })),
            _ => Err(FormatError::invalid("metadata entry", "the data lies where none can be")),
        }
    }
}

/// A checked entry of the metadata volume.
#[derive(Clone, Copy, Debug)]
pub struct MetaEntry<'a> {
    /// What its header says.
    pub header: MetaEntryHeader,
    /// The frame's header and records; its data is elsewhere ([`Frame::data`] is empty).
    pub frame: Frame<'a>,
}

impl<'a> MetaEntry<'a> {
    /// Encodes the header of the entry for `frame` at `place`; [`Frame::head`] follows. `durable_lsn` is the last LSN of
    /// the disk that is durable already; `data` is where the frame's data goes, `None` exactly if it has none.
    ///
    /// # Errors
    /// `Invalid` when it would not parse again.
    pub fn encode_header(
        place: &Place,
        frame: &Frame<'_>,
        durable_lsn: Lsn,
        data: Option<DataPlace>,
    ) -> Result<[u8; META_ENTRY_BYTES], FormatError> {
        let head_bytes = u32::try_from(frame.head().len())
            .map_err(|_| FormatError::new(FormatErrorKind::TooLarge, "metadata entry", "head over 4 GiB"))?;
        let mut raw = RawMetaEntry {
            magic: META_ENTRY_MAGIC,
            disk: frame.header().disk().0,
            first_lsn: U64::new(frame.header().first_lsn().0),
            durable_lsn: U64::new(durable_lsn.0),
            position: U64::new(place.position),
            data_position: U64::new(data.map_or(0, |d| d.position)),
            segment: U32::new(place.segment.0),
            data_segment: U32::new(data.map_or(0, |d| d.segment.0)),
            head_bytes: U32::new(head_bytes),
            head_crc: U32::new(crc32c::crc32c(frame.head())),
            data_bytes: U32::new(frame.header().data_bytes()),
            reserved: [0; 16],
            header_crc: U32::new(0),
        };
        raw.header_crc = U32::new(header_crc(raw.as_bytes()));
        if !place.is_possible(META_ENTRY_BYTES.saturating_add(frame.head().len())) {
            return Err(FormatError::invalid("metadata entry", "a place where no entry can be"));
        }
        MetaEntryHeader::parse(raw.as_bytes(), place)?;
        Ok(zerocopy::transmute!(raw))
    }

    /// Reads and checks the whole entry at the start of `bytes`, which were read from `place`: its header, the checksum
    /// of the head, every record, and that header and head speak of the same frame.
    ///
    /// # Errors
    /// `Truncated` when bytes are missing; otherwise what is wrong with it.
    pub fn parse(bytes: &'a [u8], place: &Place) -> Result<Self, FormatError> {
        let header = MetaEntryHeader::parse(bytes, place)?;
        let end = META_ENTRY_BYTES.saturating_add(header.head_bytes as usize);
        let head = bytes.get(META_ENTRY_BYTES..end).ok_or(FormatError::truncated("metadata entry"))?;
        if crc32c::crc32c(head) != header.head_crc {
            return Err(FormatError::new(
                FormatErrorKind::Checksum,
                "metadata entry",
                "the head is torn or corrupt",
            ));
        }
        let frame = Frame::from_head(head)?;
        let said = (frame.header().disk(), frame.header().first_lsn(), frame.header().data_bytes());
        if said != (place.disk, header.first_lsn, header.data_bytes) {
            return Err(FormatError::invalid("metadata entry", "header and frame speak of different things"));
        }
        Ok(Self { header, frame })
    }
}
