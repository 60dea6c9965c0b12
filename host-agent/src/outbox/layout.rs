//! The bytes of the outbox memfd. Authority: `docs/formats/outbox.md`; a test compares it with this module.

use journal_format::limits::MAX_FRAME_BYTES;
use journal_format::wire::MESSAGE_HEADER_BYTES;
use journal_format::{DiskId, Epoch, Lsn};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::PackedFrame;

/// First eight bytes of an outbox.
pub const HEADER_MAGIC: [u8; 8] = *b"CDPOUTBX";
/// First four bytes of an entry.
pub const ENTRY_MAGIC: [u8; 4] = *b"OENT";
/// First eight bytes of a spool file.
pub const SPOOL_MAGIC: [u8; 8] = *b"CDPSPOOL";
/// The version that this code writes, and the only one it adopts.
pub const VERSION: u32 = 3;
/// That of spool files.
pub const SPOOL_VERSION: u32 = 1;
/// An entry that holds a frame.
pub const KIND_FRAME: u32 = 1;
/// An entry that says that the rest of the segment is not used.
pub const KIND_SKIP: u32 = 2;

/// Alignment of entries.
pub const ENTRY_ALIGN: u64 = 64;
/// Bytes of a segment of the area: the largest frame fits.
pub const SEGMENT_BYTES: u64 = 5 << 20;
/// Bytes in front of a message.
pub const ENTRY_HEADER_BYTES: usize = size_of::<RawEntry>();
/// Where the entries begin.
pub const AREA_START: usize = 4096;

/// The header: written once, but for its words.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    pub(super) magic: [u8; 8],
    pub(super) version: U32,
    pub(super) reserved: U32,
    pub(super) area_bytes: U64,
    pub(super) disk: [u8; 16],
    pub(super) epoch: U64,
    pub(super) reserved2: [u8; 12],
    pub(super) crc: U32,
    pub(super) head: U64,
    pub(super) tail: U64,
    pub(super) packed_lsn: U64,
    pub(super) packed_stamp: U64,
    pub(super) packed_disk_bytes: U64,
    pub(super) freed: U64,
    pub(super) last_lsn: U64,
}

impl Header {
    /// The checksum of what is written once.
    pub(super) fn computed_crc(&self) -> u32 {
        crc32c::crc32c(self.as_bytes().get(..core::mem::offset_of!(Self, crc)).unwrap_or_default())
    }
}

/// What stands in front of each message.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawEntry {
    pub(super) magic: [u8; 4],
    pub(super) kind: U32,
    pub(super) first_lsn: U64,
    pub(super) last_lsn: U64,
    pub(super) message_bytes: U32,
    pub(super) raw_bytes: U32,
    pub(super) position: U64,
    pub(super) reserved: [u8; 20],
    pub(super) crc: U32,
}

/// The beginning of a spool file; entries follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SpoolHeader {
    magic: [u8; 8],
    version: U32,
    reserved: U32,
    disk: [u8; 16],
    epoch: U64,
    first_lsn: U64,
    reserved2: [u8; 12],
    crc: U32,
}

impl SpoolHeader {
    /// The header of a file whose first entry begins with that LSN.
    pub(crate) fn new(disk: DiskId, epoch: Epoch, first_lsn: Lsn) -> Self {
        let mut header = Self {
            magic: SPOOL_MAGIC,
            version: U32::new(SPOOL_VERSION),
            reserved: U32::new(0),
            disk: disk.0,
            epoch: U64::new(epoch.0),
            first_lsn: U64::new(first_lsn.0),
            reserved2: [0; 12],
            crc: U32::new(0),
        };
        header.crc = U32::new(crc_of(header.as_bytes()));
        header
    }

    /// Whether it is exactly the header of such a file.
    pub(crate) fn is_of(&self, disk: DiskId, epoch: Epoch, first_lsn: Lsn) -> bool {
        self.as_bytes() == Self::new(disk, epoch, first_lsn).as_bytes()
    }
}

const _: () = assert!(size_of::<SpoolHeader>() as u64 == ENTRY_ALIGN);
const _: () = assert!(ENTRY_HEADER_BYTES == 64 && size_of::<Header>() <= AREA_START);
const _: () = assert!(SEGMENT_BYTES.is_multiple_of(4096));
const _: () = assert!(MAX_FRAME_BYTES + MESSAGE_HEADER_BYTES + ENTRY_HEADER_BYTES < SEGMENT_BYTES as usize);

impl RawEntry {
    /// The header of an entry at `position` with that frame.
    pub(crate) fn new(position: u64, kind: u32, frame: &PackedFrame, message_bytes: usize) -> Self {
        let mut entry = Self {
            magic: ENTRY_MAGIC,
            kind: U32::new(kind),
            first_lsn: U64::new(frame.first_lsn.0),
            last_lsn: U64::new(frame.last_lsn.0),
            message_bytes: U32::new(u32::try_from(message_bytes).unwrap_or(u32::MAX)),
            raw_bytes: U32::new(frame.raw_bytes),
            position: U64::new(position),
            reserved: [0; 20],
            crc: U32::new(0),
        };
        entry.crc = U32::new(crc_of(entry.as_bytes()));
        entry
    }

    /// Bytes of the message that follows.
    pub(crate) fn message_bytes(&self) -> usize {
        self.message_bytes.get() as usize
    }
}

/// The checksum of a struct whose last four bytes hold it.
pub(crate) fn crc_of(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes.get(..bytes.len().saturating_sub(4)).unwrap_or_default())
}

/// Bytes that an entry with a message of that length takes.
pub(crate) fn entry_bytes(message_bytes: usize) -> u64 {
    (ENTRY_HEADER_BYTES as u64).saturating_add(message_bytes as u64).next_multiple_of(ENTRY_ALIGN)
}

#[cfg(test)]
mod tests {
    use std::mem::{offset_of, size_of};
    use std::path::Path;

    use super::*;

    macro_rules! rows {
        ($kind:ident, $($field:ident),* $(,)?) => {{
            let at = [$((stringify!($field), offset_of!($kind, $field))),*];
            let mut rows = Vec::new();
            for (index, (name, offset)) in at.iter().enumerate() {
                let end = at.get(index + 1).map_or(size_of::<$kind>(), |next| next.1);
                assert!(end > *offset, "{name} is not listed in the order of its place");
                rows.push(vec![offset.to_string(), (end - offset).to_string(), format!("`{name}`")]);
            }
            (stringify!($kind), size_of::<$kind>(), rows)
        }};
    }

    #[test]
    fn outbox_md_has_the_tables_of_the_code() {
        let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/formats/outbox.md");
        let page = std::fs::read_to_string(page).unwrap();
        let real = [
            rows!(
                Header,
                magic,
                version,
                reserved,
                area_bytes,
                disk,
                epoch,
                reserved2,
                crc,
                head,
                tail,
                packed_lsn,
                packed_stamp,
                packed_disk_bytes,
                freed,
                last_lsn
            ),
            rows!(
                RawEntry,
                magic,
                kind,
                first_lsn,
                last_lsn,
                message_bytes,
                raw_bytes,
                position,
                reserved,
                crc
            ),
            rows!(SpoolHeader, magic, version, reserved, disk, epoch, first_lsn, reserved2, crc),
        ];
        let documented = page.lines().filter(|line| line.starts_with("### `")).count();
        assert_eq!(documented, real.len(), "one table each");
        for (name, bytes, rows) in real {
            let heading = format!("### `{name}`, {bytes} bytes\n");
            let (_, section) = page.split_once(&heading).unwrap_or_else(|| panic!("no {heading}"));
            let section = section.split("\n#").next().unwrap_or_default();
            let cells = |line: &str| -> Vec<String> {
                line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect()
            };
            let table: Vec<_> =
                section.lines().filter(|line| line.starts_with('|')).skip(2).map(cells).collect();
            let first = |row: &Vec<String>| row[..3].to_vec();
            assert_eq!(table.iter().map(first).collect::<Vec<_>>(), rows, "{name}");
            assert!(table.iter().all(|row| row.len() == 5 && row.iter().all(|cell| !cell.is_empty())));
        }
        assert!(page.contains(&format!("| {AREA_START} | entries |")), "entries begin at {AREA_START}");
    }
}
