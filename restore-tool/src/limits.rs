//! Every limit of the tool, and the relations between them.

use std::num::NonZeroUsize;
use std::time::Duration;

/// A restore hashes, writes and verifies the disk in blocks of this many bytes.
pub const BLOCK_BYTES: u64 = 4 << 20;

/// Zeroes are written in calls for so many bytes at most, between which a signal is seen: 64 MiB are half a second on a slow disk
/// that has to be sent each of them.
pub const ZERO_BYTES: u64 = 64 << 20;

/// Most bytes of a disk that are read at once, while as many are written. What lies in one place of the journal and
/// belongs to one such stretch is read once, however far apart it is on the disk; two of these are the memory of a restore.
pub const STRETCH_BYTES: u64 = 64 << 20;

/// Threads that read a store's files: so many requests has a disk at once, and so many parts are decompressed.
pub const READ_THREADS: NonZeroUsize = NonZeroUsize::new(8).unwrap();

/// Requests that a server is asked at once. More would be faster, at the cost of everybody else's.
pub const SERVER_REQUESTS: usize = 2;

/// Most bytes of data in one of them: the larger, the less often a server reads the same part of its journal.
pub const REQUEST_BYTES: u64 = cdp_api::limits::MAX_DATA_BYTES;

/// A hole in the data of up to this many bytes is asked for as if it were data: a request costs more than these zeroes.
pub const SMALL_HOLE_BYTES: u64 = 256 << 10;

/// How long a restore that was asked to stop may take for that. What is read at once comes in minutes over a slow link, and a
/// service manager that has waited long enough kills, which leaves the temporary file.
pub const STOP_GRACE: Duration = Duration::from_secs(5);

/// Zeroes are looked for in steps of this many bytes: the block size of common filesystems, so that a smaller hole would
/// save nothing.
pub const GRAIN_BYTES: usize = 4096;

/// How far ahead a store is asked at once where its data lies, in bytes of disk.
pub const WINDOW_BYTES: u64 = 256 << 20;

/// Sizes of qcow2 images are multiples of this, in bytes; a smaller rest is filled up with zeroes.
pub const QCOW2_SECTOR_BYTES: u64 = 512;

const _: () = assert!(BLOCK_BYTES.is_multiple_of(GRAIN_BYTES as u64));
const _: () = assert!(WINDOW_BYTES.is_multiple_of(BLOCK_BYTES));
const _: () = assert!(STRETCH_BYTES.is_multiple_of(BLOCK_BYTES));
