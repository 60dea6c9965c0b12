//! Every limit of the store, and the relations between them.

use journal_format::limits::{INDEX_CHUNK_BYTES, MAX_FRAME_BYTES, MAX_SEGMENT_BYTES};
use journal_format::segment::PAGE_BYTES;

/// A segment is sealed when its data file has grown to this, in bytes. Recovery reads at most one unsealed segment.
pub const SEGMENT_DATA_BYTES: u64 = 256 << 20;

/// A segment is sealed when its metadata file has grown to this, in bytes: a slow disk that commits each record alone pays a
/// page for it. Opening reads this file, and verifying holds it in memory.
pub const SEGMENT_META_BYTES: u64 = 64 << 20;

/// A segment is sealed when it holds this many records: bounds the index that is kept in memory (24 bytes a record).
pub const SEGMENT_RECORDS: u64 = 256 << 10;

/// Decompressed data that is kept for the next read, in bytes, for the whole store.
pub const CACHE_BYTES: usize = 128 << 20;

/// What the cache itself takes for each thing that it keeps, in bytes (measured, with tables of two parts): without it those
/// of small frames would take nine times what they may.
pub const CACHED_ENTRY_BYTES: usize = 256;

/// What a read of up to this many bytes decompresses is kept; a larger one is a copy of the disk, which comes by once.
pub const KEPT_READ_BYTES: usize = 1 << 20;

/// Data files of sealed segments that are kept open, per disk.
pub const OPEN_DATA_FILES: usize = 32;

/// Bytes of small frames' heads that wait to be written together, for each disk. What is larger is not worth a copy.
pub const WAITING_BYTES: usize = 16 << 10;

/// Data of a durability step is gathered in memory and written in pieces of this many bytes, past the page cache: the processor's time for a
/// write of this size is a third of what the page cache takes. Of many disks in one commit only [`WHOLE_PIECES`] begin with one; pieces of the
/// others are smaller and go through the cache until their step has brought so much: a write past it is waited for, and many disks that
/// have little each would wait one after the other.
pub const PIECE_BYTES: usize = 1 << 20;

/// Pieces past the page cache that are under way while the next is gathered, for the whole store: one that is written and one that
/// waits for that. More would only wait.
pub const PIECES_UNDER_WAY: usize = 2;

/// What is left over at the end of a step goes past the page cache if it has at least this many bytes.
pub const DIRECT_BYTES: usize = 128 << 10;

/// Disks of one commit that may gather a whole piece before their step has brought one, and pieces whose memory is kept for the next,
/// for the whole store.
pub const WHOLE_PIECES: usize = 16;

/// Most threads that a commit uses to make files durable at the same time. File systems make the changes of many files
/// durable in one go, and disks merge their flushes, if all are asked for at once: with 256 disks 16 threads take half the
/// time of 4, and less of the processor's; with 64 threads waking them costs what they save.
pub const SYNC_THREADS: usize = 16;

/// Files for each of these threads, at least: a commit of one disk makes the thread that it has do half the work.
pub const FILES_PER_SYNC_THREAD: usize = 2;

/// Bytes of disk that an extent or difference iterator works out at a time.
pub const WINDOW_BYTES: u64 = 64 * INDEX_CHUNK_BYTES;

// One commit may pass the threshold by everything it appended; that must stay far below the largest file.
const _: () = assert!(SEGMENT_DATA_BYTES + 1024 * (MAX_FRAME_BYTES as u64) < MAX_SEGMENT_BYTES);
const _: () = assert!(PIECE_BYTES.is_multiple_of(PAGE_BYTES as usize) && DIRECT_BYTES <= PIECE_BYTES);
const _: () = assert!(WINDOW_BYTES.is_multiple_of(INDEX_CHUNK_BYTES));
