//! Every limit of the tool, and the relations between them.

/// A restore reads, hashes, writes and verifies the disk in blocks of this many bytes.
pub const BLOCK_BYTES: u64 = 4 << 20;

/// Zeroes are looked for in steps of this many bytes: the block size of common filesystems, so that a smaller hole would
/// save nothing.
pub const GRAIN_BYTES: usize = 4096;

/// How far ahead a store is asked at once where its data lies, in bytes of disk.
pub const WINDOW_BYTES: u64 = 256 << 20;

/// Sizes of qcow2 images are multiples of this, in bytes; a smaller rest is filled up with zeroes.
pub const QCOW2_SECTOR_BYTES: u64 = 512;

const _: () = assert!(BLOCK_BYTES.is_multiple_of(GRAIN_BYTES as u64));
const _: () = assert!(WINDOW_BYTES.is_multiple_of(BLOCK_BYTES));
const _: () = assert!(BLOCK_BYTES <= cdp_api::limits::MAX_DATA_BYTES, "one request fetches a block");
