//! The durable mark: an LSN that is known to be durable. Layout: `docs/formats/manifest.md`.
//!
//! Its enemy is rot at the end of the log: there a rotten entry looks like one that a power cut has torn, unless something
//! says that it was durable. The mark is written after a durability step has succeeded and is not made durable itself, so
//! it may be old or missing after a power cut, but what it says is true whenever it can be read.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::{FormatError, FormatErrorKind};
use crate::layout::{header_crc, layout};
use crate::units::{DiskId, Lsn};

/// First eight bytes of a mark.
pub const MARK_MAGIC: [u8; 8] = *b"CDPDURAB";
/// The version this code writes, and the only one it reads.
pub const MARK_VERSION: u16 = 1;
/// Encoded size of a mark, in bytes.
pub const MARK_BYTES: usize = 64;
/// Where the two marks of the file are, in bytes: on pages of their own, and written in turn, so that a torn write leaves
/// the other.
pub const MARK_POSITIONS: [u64; 2] = [0, 4096];

const _: () = assert!(size_of::<RawDurableMark>() == MARK_BYTES);

/// Everything up to and including this LSN was durable when it was written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DurableMark {
    /// Whose mark.
    pub disk: DiskId,
    /// The last durable LSN.
    pub durable_lsn: Lsn,
}

/// A mark as it is stored.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawDurableMark {
    magic: [u8; 8],
    version: U16,
    reserved_a: [u8; 6],
    disk: [u8; 16],
    durable_lsn: U64,
    reserved_b: [u8; 20],
    header_crc: U32,
}

layout!(RawDurableMark { magic, version, reserved_a, disk, durable_lsn, reserved_b, header_crc });

impl DurableMark {
    /// Encodes the mark.
    #[must_use]
    pub fn encode(&self) -> [u8; MARK_BYTES] {
        let mut raw = RawDurableMark {
            magic: MARK_MAGIC,
            version: U16::new(MARK_VERSION),
            reserved_a: [0; 6],
            disk: self.disk.0,
            durable_lsn: U64::new(self.durable_lsn.0),
            reserved_b: [0; 20],
            header_crc: U32::new(0),
        };
        raw.header_crc = U32::new(header_crc(raw.as_bytes()));
        zerocopy::transmute!(raw)
    }

    /// Reads and checks the mark at the start of `bytes`.
    ///
    /// # Errors
    /// `Truncated` when bytes are missing; otherwise what is wrong with it.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let err = |kind, detail| Err(FormatError::new(kind, "durable mark", detail));
        let (raw, _) =
            RawDurableMark::ref_from_prefix(bytes).map_err(|_| FormatError::truncated("durable mark"))?;
        if raw.magic != MARK_MAGIC {
            return err(FormatErrorKind::Magic, "this is no mark");
        }
        if raw.version.get() != MARK_VERSION {
            return err(FormatErrorKind::Version, "written by a newer release; upgrade this one");
        }
        if raw.header_crc.get() != header_crc(raw.as_bytes()) {
            return err(FormatErrorKind::Checksum, "torn or corrupt");
        }
        if raw.reserved_a != [0; 6] || raw.reserved_b != [0; 20] || raw.durable_lsn.get() == u64::MAX {
            return err(FormatErrorKind::Invalid, "a field is out of its range");
        }
        Ok(Self { disk: DiskId(raw.disk), durable_lsn: Lsn(raw.durable_lsn.get()) })
    }
}
