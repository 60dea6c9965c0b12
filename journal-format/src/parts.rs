//! Frame data in parts, each of which can be read, checked and decompressed without the others. Layout:
//! `docs/formats/frame.md`.
//!
//! ```text
//! ┌────────┬────────┬─────┬──────────────────────┐
//! │ part 0 │ part 1 │  …  │ table, 8 bytes each  │
//! └────────┴────────┴─────┴──────────────────────┘
//! ```
//!
//! The table has the checksum of each part, and the frame's `data_crc` is that of the table: who knows the frame can
//! trust the table, and who trusts the table can trust a part, without a look at the rest.

use std::ops::Range;

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::{FormatError, FormatErrorKind};
use crate::frame::Codec;
use crate::layout::layout;
use crate::limits::PART_RAW_BYTES;

/// Encoded size of a part's entry in the table, in bytes.
pub const PART_ENTRY_BYTES: usize = 8;

/// A part's entry in the table.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawPart {
    stored_bytes: U32,
    crc: U32,
}

layout!(RawPart { stored_bytes, crc });
const _: () = assert!(size_of::<RawPart>() == PART_ENTRY_BYTES);

/// A part of a frame's data.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Part {
    /// Where it begins in the frame's data as stored, in bytes.
    pub start: u32,
    /// Its bytes as stored: as many as raw ones, then they are these; or fewer, then they are one zstd frame.
    pub stored_bytes: u32,
    /// Its bytes before compression.
    pub raw_bytes: u32,
    crc: u32,
}

impl Part {
    /// Whether it is stored as it is.
    #[must_use]
    pub const fn is_raw(&self) -> bool {
        self.stored_bytes == self.raw_bytes
    }

    /// Where it lies in the frame's data as stored.
    #[must_use]
    pub const fn stored(&self) -> Range<usize> {
        self.start as usize..self.start.saturating_add(self.stored_bytes) as usize
    }

    /// Compares bytes that were read from [`Part::stored`] with the table's checksum.
    ///
    /// # Errors
    /// `Checksum` when they are others.
    pub fn check(&self, stored: &[u8]) -> Result<(), FormatError> {
        if stored.len() == self.stored_bytes as usize && crc32c::crc32c(stored) == self.crc {
            Ok(())
        } else {
            Err(FormatError::new(FormatErrorKind::Checksum, "frame data", "a part is torn or corrupt"))
        }
    }
}

/// Number of parts of a frame with so many raw bytes.
const fn part_count(raw_bytes: u32) -> u32 {
    raw_bytes.div_ceil(PART_RAW_BYTES)
}

/// Bytes of the table of a frame with so many raw bytes.
#[must_use]
pub const fn table_bytes(raw_bytes: u32) -> u32 {
    part_count(raw_bytes).saturating_mul(PART_ENTRY_BYTES as u32)
}

/// Where the table lies in `data_bytes` of stored data; `None` when they cannot be so many raw bytes in parts.
#[must_use]
pub const fn table_place(raw_bytes: u32, data_bytes: u32) -> Option<Range<u32>> {
    let table = table_bytes(raw_bytes);
    let stored = data_bytes.saturating_sub(table);
    // Each part has a byte at least, and no more than raw ones.
    if raw_bytes > PART_RAW_BYTES && stored >= part_count(raw_bytes) && stored <= raw_bytes {
        Some(stored..data_bytes)
    } else {
        None
    }
}

/// Reads a table that was read from [`table_place`]: the parts, in order.
///
/// # Errors
/// `Checksum` when it is not the one that `data_crc` is of; otherwise as [`parse_table`].
pub fn read_table(
    table: &[u8],
    raw_bytes: u32,
    data_bytes: u32,
    data_crc: u32,
) -> Result<Vec<Part>, FormatError> {
    if crc32c::crc32c(table) != data_crc {
        let detail = "the table of its parts is torn or corrupt";
        return Err(FormatError::new(FormatErrorKind::Checksum, "frame data", detail));
    }
    parse_table(table, raw_bytes, data_bytes)
}

/// Reads a table of which nobody knows the checksum.
///
/// # Errors
/// `Invalid` when the parts do not fill `data_bytes` of stored data, or one is longer than its raw bytes.
pub fn parse_table(table: &[u8], raw_bytes: u32, data_bytes: u32) -> Result<Vec<Part>, FormatError> {
    let bad = || FormatError::invalid("frame data", "the table of its parts does not fit");
    let place = table_place(raw_bytes, data_bytes).ok_or_else(bad)?;
    let entries = <[RawPart]>::ref_from_bytes(table).map_err(|_| bad())?;
    if entries.len() != part_count(raw_bytes) as usize {
        return Err(bad());
    }
    let (mut start, mut left) = (0_u32, raw_bytes);
    let mut parts = Vec::with_capacity(entries.len());
    for entry in entries {
        let (stored_bytes, raw_bytes) = (entry.stored_bytes.get(), left.min(PART_RAW_BYTES));
        if stored_bytes == 0 || stored_bytes > raw_bytes {
            return Err(bad());
        }
        parts.push(Part { start, stored_bytes, raw_bytes, crc: entry.crc.get() });
        start = start.saturating_add(stored_bytes);
        left = left.saturating_sub(raw_bytes);
    }
    if start == place.start { Ok(parts) } else { Err(bad()) }
}

/// The table at the end of `data`, as bytes.
fn table_of(data: &[u8], raw_bytes: u32) -> Option<&[u8]> {
    let place = table_place(raw_bytes, u32::try_from(data.len()).ok()?)?;
    data.get(place.start as usize..)
}

/// The parts of stored data.
///
/// # Errors
/// As [`parse_table`].
pub fn parts_of(data: &[u8], raw_bytes: u32) -> Result<Vec<Part>, FormatError> {
    let data_bytes = u32::try_from(data.len()).unwrap_or(u32::MAX);
    parse_table(table_of(data, raw_bytes).unwrap_or_default(), raw_bytes, data_bytes)
}

/// Ends data that is in parts with its table. `lengths` are the stored bytes of each part.
pub fn push_table(data: &mut Vec<u8>, lengths: &[u32]) {
    let mut start = 0_usize;
    for &length in lengths {
        let end = start.saturating_add(length as usize);
        let crc = crc32c::crc32c(data.get(start..end).unwrap_or_default());
        data.extend_from_slice(RawPart { stored_bytes: U32::new(length), crc: U32::new(crc) }.as_bytes());
        start = end;
    }
}

/// What a frame says of its data as stored, in its `data_crc`: crc32c of all of it, or of the table where it is in parts.
#[must_use]
pub fn data_crc(codec: Codec, raw_bytes: u32, data: &[u8]) -> u32 {
    crc32c::crc32c(match codec {
        Codec::Raw | Codec::Zstd => data,
        Codec::Parts => table_of(data, raw_bytes).unwrap_or_default(),
    })
}

/// Compares all of a frame's data as stored with its `data_crc`.
///
/// # Errors
/// `Checksum` when it is not what was written; `Invalid` when the parts do not fit.
pub fn check_data(codec: Codec, raw_bytes: u32, data: &[u8], crc: u32) -> Result<(), FormatError> {
    if data_crc(codec, raw_bytes, data) != crc {
        return Err(FormatError::new(FormatErrorKind::Checksum, "frame data", "torn or corrupt"));
    }
    if codec == Codec::Parts {
        for part in parts_of(data, raw_bytes)? {
            part.check(data.get(part.stored()).unwrap_or_default())?;
        }
    }
    Ok(())
}
