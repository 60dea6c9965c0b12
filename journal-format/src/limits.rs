//! Every limit of the formats, and the relations between them.

/// Largest disk, in bytes: 256 TiB. Keeps every end offset far from 64-bit overflow.
pub const MAX_DISK_BYTES: u64 = 1 << 48;

/// Largest data of one write record, in bytes. A larger guest request is several, in a gap.
pub const MAX_RECORD_DATA_BYTES: u32 = 4 << 20;

/// The agent closes a frame before its raw data would pass this, in bytes, unless one record is larger.
pub const TARGET_FRAME_RAW_BYTES: u32 = 512 << 10;

/// Largest raw (uncompressed) data of a frame, in bytes.
pub const MAX_FRAME_RAW_BYTES: u32 = MAX_RECORD_DATA_BYTES;

/// Raw bytes of each part of a frame's data, but for the last. A read of a few KiB decompresses one: half of them makes
/// reads a little faster and files a few percent larger, twice as many does the opposite.
pub const PART_RAW_BYTES: u32 = 32 << 10;

/// Largest data of a frame as stored, in bytes: raw, with the table of its parts.
pub const MAX_FRAME_DATA_BYTES: u32 = MAX_FRAME_RAW_BYTES + crate::parts::table_bytes(MAX_FRAME_RAW_BYTES);

/// Most records in one frame.
pub const MAX_FRAME_RECORDS: u32 = 16 << 10;

/// Largest head of a frame, in bytes: header and records.
pub const MAX_FRAME_HEAD_BYTES: usize =
    crate::frame::FRAME_HEADER_BYTES + MAX_FRAME_RECORDS as usize * crate::record::RECORD_BYTES;

/// Largest encoded frame, in bytes: head, and data that is stored raw when compression does not pay.
pub const MAX_FRAME_BYTES: usize = MAX_FRAME_HEAD_BYTES + MAX_FRAME_DATA_BYTES as usize;

/// Longest bookmark name, in bytes of UTF-8.
pub const MAX_BOOKMARK_BYTES: u32 = 255;

/// Granularity of the dirty bitmap, in bytes of disk per bit.
pub const DIRTY_CHUNK_BYTES: u64 = 64 << 10;

/// Granularity of a sealed segment's index, in bytes of disk per chunk.
pub const INDEX_CHUNK_BYTES: u64 = 256 << 10;

/// The two large tables of an index are checked in pages of at most this many bytes, each when it is first looked at.
pub const INDEX_PAGE_BYTES: usize = 4 << 10;

/// Largest file of a segment (data, metadata or index), in bytes: 64 GiB.
pub const MAX_SEGMENT_BYTES: u64 = 64 << 30;

/// Most live segments that a manifest names.
pub const MAX_SEGMENTS: u32 = 1 << 20;

/// Most bookmarks of one disk.
pub const MAX_BOOKMARKS: u32 = 1 << 20;

/// A zeroed or discarded range longer than this many bytes is indexed once, not once for each chunk that it covers:
/// one discard of a whole 256 TiB disk would otherwise make a thousand million index entries.
pub const WIDE_EXTENT_BYTES: u64 = 4 * INDEX_CHUNK_BYTES;

const _: () = assert!(TARGET_FRAME_RAW_BYTES <= MAX_FRAME_RAW_BYTES);
const _: () = assert!(MAX_BOOKMARK_BYTES < MAX_RECORD_DATA_BYTES);
const _: () = assert!(INDEX_CHUNK_BYTES.is_multiple_of(DIRTY_CHUNK_BYTES));
const _: () = assert!(MAX_DISK_BYTES / INDEX_CHUNK_BYTES <= u32::MAX as u64);
const _: () = assert!(MAX_FRAME_BYTES as u64 * 2 < MAX_SEGMENT_BYTES);
