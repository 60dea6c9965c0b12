//! Every limit of the ring and the control socket, and the relations between them.

use journal_format::limits::{DIRTY_CHUNK_BYTES, MAX_BOOKMARK_BYTES, MAX_DISK_BYTES, MAX_RECORD_DATA_BYTES};

/// The arena's allocation unit in bytes, and the alignment of every piece: what `O_DIRECT` asks for at most.
pub const UNIT_BYTES: u32 = 4096;

/// Units in a slab. 64 units are 256 KiB: a few slabs stay in a core's second-level cache.
#[cfg(not(loom))]
pub const SLAB_UNITS: u32 = 64;
/// Small enough that loom sees slabs run full, retire and come back.
#[cfg(loom)]
pub const SLAB_UNITS: u32 = 2;

/// Bytes in a slab.
pub const SLAB_BYTES: u64 = UNIT_BYTES as u64 * SLAB_UNITS as u64;

/// Most pieces of one request: the largest record's slabs, and one more because the first slab may be begun.
pub const MAX_PIECES: u32 = (MAX_RECORD_DATA_BYTES / UNIT_BYTES).div_ceil(SLAB_UNITS) + 1;

/// Default size of the arena in bytes.
pub const DEFAULT_ARENA_BYTES: u64 = 64 << 20;
/// Smallest arena in bytes: two slabs, so that one can fill while the other is read.
pub const MIN_ARENA_BYTES: u64 = 2 * SLAB_BYTES;
/// Largest arena in bytes. Unit numbers stay far below 32 bits.
pub const MAX_ARENA_BYTES: u64 = 64 << 30;

/// Bytes of a ring that are provided before the first request, at most: all of one of the default size, and no more of a
/// huge one than takes a tenth of a second.
pub const WARM_BYTES: u64 = 256 << 20;

/// Default number of record slots.
pub const DEFAULT_SLOTS: u32 = 1 << 16;
/// Fewest record slots.
pub const MIN_SLOTS: u32 = 4;
/// Most record slots.
pub const MAX_SLOTS: u32 = 1 << 24;

/// Most slot credits that requests leave to control records. The reserve is this or a quarter of the slots,
/// whichever is less; bookmarks may use half of it, gap records and resizes all.
pub const MAX_CONTROL_RESERVE: u64 = 256;

/// The dirty bitmap covers at least this many bytes of disk, and four times the disk's size, so that a disk can
/// grow. The file is sparse: what is not used costs nothing.
pub const MIN_DIRTY_BYTES: u64 = 1 << 40;

/// Times a compare-and-swap of an allocator is tried before the memory is taken for corrupt. The other side cannot
/// keep us in a loop by changing a word for ever.
pub const MAX_CAS_TRIES: u32 = 100_000;

/// Records the consumer frees before it gives their slot credits back in one step.
pub const CREDIT_BATCH: u64 = 64;

/// Arena bytes that a consumer should hold at most before it frees them: what is cut from them next is still in a cache.
pub const HOLD_BYTES: u64 = 4 << 20;
/// The same of records. Whoever takes over from a consumer believes twice as many.
pub const HOLD_RECORDS: u64 = 4096;

/// A clock that is further than this ahead of 2026 (in nanoseconds since 1970: the year 2262) is corrupt.
pub const MAX_STAMP: u64 = i64::MAX as u64;

/// Largest message on the control socket, in bytes.
pub const MAX_MESSAGE_BYTES: usize = 64 << 10;
/// File descriptors in one control message, at most.
pub const MAX_MESSAGE_FDS: usize = 3;

const _: () = assert!(UNIT_BYTES.is_power_of_two());
const _: () = assert!(MAX_BOOKMARK_BYTES <= UNIT_BYTES);
const _: () = assert!(DIRTY_CHUNK_BYTES.is_multiple_of(UNIT_BYTES as u64));
const _: () = assert!(MAX_ARENA_BYTES / (UNIT_BYTES as u64) < u32::MAX as u64);
const _: () = assert!(MIN_SLOTS.is_power_of_two() && MAX_SLOTS.is_power_of_two());
const _: () = assert!(MIN_DIRTY_BYTES <= MAX_DISK_BYTES);
#[cfg(not(loom))]
const _: () = assert!(MAX_PIECES == 17);
