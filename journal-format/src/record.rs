//! Records: what happened to a disk, one per LSN. Layout: `docs/formats/frame.md`.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::FormatError;
use crate::layout::layout;
use crate::limits::{MAX_BOOKMARK_BYTES, MAX_DISK_BYTES, MAX_RECORD_DATA_BYTES};
use crate::units::{ByteRange, ImageTag, Lsn, Stamp};

/// Encoded size of one record, in bytes.
pub const RECORD_BYTES: usize = 32;

/// Where a record's data lies in its frame's raw (uncompressed) data.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DataSpan {
    /// Position of the first byte in the frame's raw data.
    pub pos: u32,
    /// Length in bytes.
    pub len: u32,
}

impl DataSpan {
    /// One past the last byte, saturating (a decoder has checked that it fits).
    #[must_use]
    pub const fn end(self) -> u32 {
        self.pos.saturating_add(self.len)
    }
}

/// Why history has a gap.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum GapReason {
    /// Protection was switched on, or a VM that was stopped in good order was started; the sync has not finished.
    Attach = 1,
    /// The ring was full and the policy let the guest go on.
    Overflow = 2,
    /// A guest write failed; what the disk now holds there has to be read back.
    WriteFailed = 3,
    /// The ring filled up while no agent was connected, or what an agent had taken out of the ring was lost.
    AgentLost = 4,
    /// A fault in the filter itself switched capture off, or what it left in the ring could not be used.
    FilterFault = 5,
    /// The contents changed behind the guest's back (snapshot revert, migration, commit into the node).
    ContentsChanged = 6,
    /// QEMU or its host ended without closing the epoch.
    UncleanEnd = 7,
    /// A guest's write is too large for one record: between its records the disk has a part of it.
    LargeRequest = 8,
}

impl GapReason {
    /// The reason with that number, if there is one.
    #[must_use]
    pub const fn from_u8(value: u8) -> Option<Self> {
        Some(match value {
            1 => Self::Attach,
            2 => Self::Overflow,
            3 => Self::WriteFailed,
            4 => Self::AgentLost,
            5 => Self::FilterFault,
            6 => Self::ContentsChanged,
            7 => Self::UncleanEnd,
            8 => Self::LargeRequest,
            _ => return None,
        })
    }

    /// The name in JSON and on the command line.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Attach => "attach",
            Self::Overflow => "overflow",
            Self::WriteFailed => "write-failed",
            Self::AgentLost => "agent-lost",
            Self::FilterFault => "filter-fault",
            Self::ContentsChanged => "contents-changed",
            Self::UncleanEnd => "unclean-end",
            Self::LargeRequest => "large-request",
        }
    }
}

/// What a record says. `fill` marks a background read (initial sync, resync) instead of a guest request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    /// The range now holds `data`; `range.length() == data.len`, at least 1 byte.
    Write {
        /// Where on the disk.
        range: ByteRange,
        /// Where in the frame's raw data.
        data: DataSpan,
        /// A background read, not a guest write.
        fill: bool,
        /// The request asked for force-unit-access.
        fua: bool,
    },
    /// The range now reads as zeroes.
    Zero {
        /// Where on the disk; at least 1 byte.
        range: ByteRange,
        /// A background read, not a guest write.
        fill: bool,
        /// The request asked for force-unit-access.
        fua: bool,
        /// The guest allowed the range to be unmapped.
        may_unmap: bool,
    },
    /// The guest no longer needs the range; history reads it as zeroes.
    Discard {
        /// Where on the disk; at least 1 byte.
        range: ByteRange,
    },
    /// A guest flush began: everything the guest saw complete before it has a smaller LSN.
    Flush,
    /// The disk has a new size in bytes; new bytes read as zeroes, cut ones are gone.
    Resize {
        /// The new size in bytes.
        disk_bytes: u64,
    },
    /// A named point; the data is the name in UTF-8.
    Bookmark {
        /// Where in the frame's raw data.
        name: DataSpan,
    },
    /// From this LSN on, writes may be missing.
    GapBegin {
        /// Why.
        reason: GapReason,
        /// Number of the gap; grows with every gap-begin of an epoch.
        generation: u64,
    },
    /// From this LSN on the history is whole again, if no later generation has begun before it.
    GapEnd {
        /// The generation this end belongs to; an end of an older generation closes nothing.
        generation: u64,
    },
    /// A slot whose writer died or had nothing to say. Keeps LSNs free of holes.
    Void,
    /// The VM has let go of the disk in good order: what the journal shows here is what the disk holds. The last record of
    /// its epoch.
    Close {
        /// The image as it was left: a later epoch that finds it so needs no sync.
        image: ImageTag,
    },
}

/// One record of a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Record {
    /// Its number.
    pub lsn: Lsn,
    /// When it became visible; never smaller than the stamp of the record before.
    pub stamp: Stamp,
    /// What it says.
    pub op: Op,
}

const FLAG_FILL: u8 = 1;
const FLAG_FUA: u8 = 2;
const FLAG_MAY_UNMAP: u8 = 4;

const KIND_WRITE: u8 = 1;
const KIND_ZERO: u8 = 2;
const KIND_DISCARD: u8 = 3;
const KIND_FLUSH: u8 = 4;
const KIND_RESIZE: u8 = 5;
const KIND_BOOKMARK: u8 = 6;
const KIND_GAP_BEGIN: u8 = 7;
const KIND_GAP_END: u8 = 8;
const KIND_VOID: u8 = 9;
const KIND_CLOSE: u8 = 10;

/// The 32 bytes of a record. The LSN is implied: the frame's first LSN plus the record's position.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawRecord {
    /// Byte offset on the disk; new size for resize; generation for gap-begin and gap-end; first half of a
    /// close's image tag; else 0.
    pub offset: U64,
    /// Bytes of disk covered, or of the bookmark's name; second half of a close's image tag; else 0.
    pub length: U64,
    /// Nanoseconds since 1970 UTC; neither 0 nor the largest number.
    pub stamp: U64,
    /// Kind, 1 to 10.
    pub kind: u8,
    /// Bit 0 fill, bit 1 FUA, bit 2 may-unmap; others 0.
    pub flags: u8,
    /// Gap reason for gap-begin, else 0.
    pub reason: U16,
    /// Position in the frame's raw data for write and bookmark, else 0.
    pub data_pos: U32,
}

layout!(RawRecord { offset, length, stamp, kind, flags, reason, data_pos });

impl RawRecord {
    /// Encodes a record (its LSN is implied by its place in the frame).
    #[must_use]
    pub fn encode(record: &Record) -> Self {
        let flag = |on: bool, bit: u8| if on { bit } else { 0 };
        let (kind, flags, reason, offset, length, data_pos) = match record.op {
            Op::Write { range, data, fill, fua } => {
                let flags = flag(fill, FLAG_FILL) | flag(fua, FLAG_FUA);
                (KIND_WRITE, flags, 0, range.offset(), range.length(), data.pos)
            }
            Op::Zero { range, fill, fua, may_unmap } => {
                let flags = flag(fill, FLAG_FILL) | flag(fua, FLAG_FUA) | flag(may_unmap, FLAG_MAY_UNMAP);
                (KIND_ZERO, flags, 0, range.offset(), range.length(), 0)
            }
            Op::Discard { range } => (KIND_DISCARD, 0, 0, range.offset(), range.length(), 0),
            Op::Flush => (KIND_FLUSH, 0, 0, 0, 0, 0),
            Op::Resize { disk_bytes } => (KIND_RESIZE, 0, 0, disk_bytes, 0, 0),
            Op::Bookmark { name } => (KIND_BOOKMARK, 0, 0, 0, u64::from(name.len), name.pos),
            Op::GapBegin { reason, generation } => (KIND_GAP_BEGIN, 0, reason as u16, generation, 0, 0),
            Op::GapEnd { generation } => (KIND_GAP_END, 0, 0, generation, 0, 0),
            Op::Void => (KIND_VOID, 0, 0, 0, 0, 0),
            Op::Close { image } => {
                let [first, second] = image.halves();
                (KIND_CLOSE, 0, 0, first, second, 0)
            }
        };
        Self {
            offset: U64::new(offset),
            length: U64::new(length),
            stamp: U64::new(record.stamp.0),
            kind,
            flags,
            reason: U16::new(reason),
            data_pos: U32::new(data_pos),
        }
    }

    /// Decodes and checks a record whose LSN is known from its place.
    ///
    /// # Errors
    /// [`crate::FormatErrorKind::Invalid`] for an unknown kind or reason, a flag or field that must be zero and is
    /// not, an empty or oversize range, a stamp that stands for no instant.
    pub fn decode(&self, lsn: Lsn) -> Result<Record, FormatError> {
        let bad = |detail| FormatError::invalid("record", detail);
        let (allowed_flags, has_reason, has_data) = match self.kind {
            KIND_WRITE => (FLAG_FILL | FLAG_FUA, false, true),
            KIND_ZERO => (FLAG_FILL | FLAG_FUA | FLAG_MAY_UNMAP, false, false),
            KIND_BOOKMARK => (0, false, true),
            KIND_GAP_BEGIN => (0, true, false),
            _ => (0, false, false),
        };
        if self.flags & !allowed_flags != 0 {
            return Err(bad("a reserved flag is set"));
        }
        if (!has_reason && self.reason.get() != 0) || (!has_data && self.data_pos.get() != 0) {
            return Err(bad("a field that this kind does not use is not zero"));
        }
        let stamp = Stamp(self.stamp.get());
        if stamp == Stamp::ZERO || stamp == Stamp::MAX {
            return Err(bad(
                "the stamp is 0 or the largest number, which stand for before and after every record",
            ));
        }
        Ok(Record { lsn, stamp, op: self.decode_op()? })
    }

    fn decode_op(&self) -> Result<Op, FormatError> {
        let bad = |detail| FormatError::invalid("record", detail);
        let (fill, fua) = (self.flags & FLAG_FILL != 0, self.flags & FLAG_FUA != 0);
        Ok(match self.kind {
            KIND_WRITE => {
                Op::Write { range: self.range()?, data: self.span(MAX_RECORD_DATA_BYTES)?, fill, fua }
            }
            KIND_ZERO => {
                Op::Zero { range: self.range()?, fill, fua, may_unmap: self.flags & FLAG_MAY_UNMAP != 0 }
            }
            KIND_DISCARD => Op::Discard { range: self.range()? },
            KIND_RESIZE if self.length.get() == 0 && self.offset.get() <= MAX_DISK_BYTES => {
                Op::Resize { disk_bytes: self.offset.get() }
            }
            KIND_BOOKMARK if self.offset.get() == 0 => Op::Bookmark { name: self.span(MAX_BOOKMARK_BYTES)? },
            KIND_GAP_BEGIN if self.length.get() == 0 => {
                let reason = u8::try_from(self.reason.get()).ok().and_then(GapReason::from_u8);
                Op::GapBegin {
                    reason: reason.ok_or_else(|| bad("unknown gap reason"))?,
                    generation: self.offset.get(),
                }
            }
            KIND_GAP_END if self.length.get() == 0 => Op::GapEnd { generation: self.offset.get() },
            KIND_FLUSH if self.is_bare() => Op::Flush,
            KIND_VOID if self.is_bare() => Op::Void,
            KIND_CLOSE => Op::Close { image: ImageTag::from_halves([self.offset.get(), self.length.get()]) },
            _ => return Err(bad("unknown kind, or a field that this kind does not use is not zero")),
        })
    }

    fn is_bare(&self) -> bool {
        self.offset.get() == 0 && self.length.get() == 0
    }

    fn range(&self) -> Result<ByteRange, FormatError> {
        ByteRange::new(self.offset.get(), self.length.get())
            .filter(|range| !range.is_empty())
            .ok_or(FormatError::invalid("record", "the range is empty or passes the largest disk"))
    }

    fn span(&self, most: u32) -> Result<DataSpan, FormatError> {
        let len = u32::try_from(self.length.get()).ok().filter(|len| (1..=most).contains(len));
        let len = len.ok_or(FormatError::invalid("record", "the data is empty or longer than its limit"))?;
        let pos = self.data_pos.get();
        if pos.checked_add(len).is_none() {
            return Err(FormatError::invalid("record", "the data ends past 4 GiB"));
        }
        Ok(DataSpan { pos, len })
    }
}
