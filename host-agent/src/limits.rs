//! Every limit of the agent, and the relations between them.

use core::ops::RangeInclusive;
use core::time::Duration;

use journal_format::limits::TARGET_FRAME_RAW_BYTES;

/// Most bytes of a Unix socket's path: `sun_path` of unix(7), without the byte that ends it.
pub const MAX_SOCKET_PATH: usize = 107;

/// zstd level of frames: the cheapest, because the agent shares the host with its guests.
pub const ZSTD_LEVEL: i32 = 1;

/// Raw bytes at which a frame is closed.
pub const FRAME_TARGET_BYTES: usize = TARGET_FRAME_RAW_BYTES as usize;

/// Most records the agent puts into one frame, though the format takes more: a frame of flushes and small
/// zeroes must not hold back its first record for long.
pub const FRAME_MAX_RECORDS: usize = 4096;
const _: () = assert!(FRAME_MAX_RECORDS as u64 <= capture_ring::limits::HOLD_RECORDS);

/// Age of its first record at which a frame is closed, unless it has few records.
pub const FRAME_MAX_AGE: Duration = Duration::from_micros(1500);

/// Fewer records than this are few. A frame costs the same whatever is in it: a commit of the server, and a page in each of
/// its files.
pub const FRAME_FEW_RECORDS: usize = 16;

/// Bytes of data from which on a frame is worth that, however few records it has: as many as so many of 4 KiB.
pub const FRAME_FEW_BYTES: usize = FRAME_FEW_RECORDS * 4096;

/// Age at which a frame is closed however few records it has. So long may a slow writer's last writes be on their way; one
/// that waits for the server is not kept waiting by it.
pub const FRAME_FEW_AGE: Duration = Duration::from_millis(5);

/// Pause between two looks at a ring while writes come.
pub const DRAIN_POLL: Duration = Duration::from_micros(75);

/// A ring that has been empty this long is waited for on its eventfd instead.
pub const DRAIN_IDLE: Duration = Duration::from_millis(4);

/// Longest sleep of a drain thread: the bell wakes it for records and for its end.
pub const DRAIN_NAP: Duration = Duration::from_secs(1);

/// Smallest outbox: a few segments, each of which takes the largest frame.
pub const MIN_OUTBOX_BYTES: u64 = 16 << 20;

/// Sizes of a ring's arena that may be asked for, in MiB. The smallest takes two of the largest records. The same as the
/// server's for one disk.
pub const RING_MIB: RangeInclusive<u64> = 8..=16_384;

/// Sizes of an outbox that may be asked for, in MiB.
pub const OUTBOX_MIB: RangeInclusive<u64> = (MIN_OUTBOX_BYTES >> 20)..=65_536;

/// No outbox has more bytes, whoever made it.
pub const MAX_OUTBOX_BYTES: u64 = *OUTBOX_MIB.end() << 20;

/// Sizes of a disk's spool that may be asked for, in MiB: up to 16 TiB.
pub const SPOOL_MIB: RangeInclusive<u64> = (MIN_SPOOL_BYTES >> 20)..=16_777_216;

/// Frames moved from the spool into the outbox in one step of a drain.
pub const REFILL_BATCH: usize = 8;

/// A spool file is closed at this size: space is freed file by file.
pub const SPOOL_FILE_BYTES: u64 = 16 << 20;

/// Smallest spool, in bytes: a few files of it, so that some can be freed while another is written.
pub const MIN_SPOOL_BYTES: u64 = 64 << 20;

/// How long after its start an agent waits for the filters that hold the rings of what is in the spool; a filter
/// connects within 2 s.
pub const SPOOL_GRACE: Duration = Duration::from_secs(10);

/// Pause after a spool could not be written to.
pub const SPOOL_RETRY: Duration = Duration::from_secs(5);

/// Most bytes handed to one send.
pub const SEND_BATCH_BYTES: usize = 2 << 20;

/// Most frames handed to one send: one iovec each, far below the kernel's 1024.
pub const SEND_BATCH_FRAMES: usize = 64;

/// Most bytes of control messages that may wait for the socket; a server that takes none for so long is gone.
pub const MAX_UNSENT_BYTES: usize = 32 << 20;

/// Bytes asked for by one receive.
pub const RECV_BYTES: usize = 64 << 10;

/// How often the agent looks at modes, fill levels, dead processes and timers.
pub const TICK: Duration = Duration::from_millis(100);

/// How often the state of each protected disk is reported.
pub const STATUS_EVERY: Duration = Duration::from_secs(1);

/// Quiet time after which a ping is sent.
pub const PING_AFTER: Duration = Duration::from_secs(5);

/// Quiet time after which a connection is given up.
pub const SERVER_SILENT: Duration = Duration::from_secs(20);

/// First pause before connecting again; doubles up to [`RECONNECT_MOST`].
pub const RECONNECT_FIRST: Duration = Duration::from_millis(100);

/// Longest pause before connecting again.
pub const RECONNECT_MOST: Duration = Duration::from_secs(5);

/// How long a TCP connect may take.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long the server waits for QEMU to answer an attach or detach before it hears that QEMU is stuck.
/// The request itself stays valid: a late answer still counts.
pub const FILTER_ANSWER: Duration = Duration::from_secs(30);

/// Pause before a disk is opened again that the server refused.
pub const OPEN_AGAIN: Duration = Duration::from_secs(5);

/// Pause between two resync requests for a disk that stays in tracking.
pub const RESYNC_EVERY: Duration = Duration::from_millis(500);

/// How long a disk whose capture broke is not captured again, so that a fault that repeats does not read
/// the whole disk over and over.
pub const FAULT_HOLD: Duration = Duration::from_secs(30);

/// How long a stopping agent keeps shipping what it has.
pub const STOP_FLUSH: Duration = Duration::from_secs(5);

/// Most filters connected at a time.
pub const MAX_FILTERS: usize = 1024;

/// Most disks of one filter that are listed: what a thousand filters say still fits the inventory's message.
pub const MAX_DISKS_PER_FILTER: usize = 256;

/// Most captures that one filter may hold from an agent before: each costs the agent four descriptors.
pub const MAX_HELD_PER_FILTER: usize = 128;

/// A new connection must say hello within this time.
pub const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

/// Chunks (64 KiB) whose hashes are asked for at once: 4 MiB of disk.
pub const HASH_ASK_CHUNKS: u32 = 64;

/// Chunks ahead of the resync whose hashes are asked for: 64 MiB of disk, an eighth of a second's reading.
pub const HASH_WINDOW: u64 = 1024;

/// Chunks ahead that are asked for when fills begin to come one after the other.
pub const HASH_FIRST_AHEAD: u64 = 64;

/// How long a fill waits for the hashes that it is compared with, before it is shipped as it is.
pub const COMPARE_WAIT: Duration = Duration::from_millis(500);

/// A question for hashes that is older is taken for lost.
pub const HASH_ANSWER: Duration = Duration::from_secs(5);

/// Pause in asking for hashes after the server could not say.
pub const HASH_PAUSE: Duration = Duration::from_millis(100);

/// Events that may wait for the hub; senders block beyond it.
pub const EVENT_QUEUE: usize = 4096;

/// Most requests of the server that may wait for one disk.
pub const MAX_WAITERS: usize = 256;

const _: () = assert!(FRAME_FEW_RECORDS < FRAME_MAX_RECORDS && FRAME_FEW_BYTES < FRAME_TARGET_BYTES);
const _: () = assert!(FRAME_MAX_AGE.as_micros() < FRAME_FEW_AGE.as_micros());
const _: () = assert!(MIN_OUTBOX_BYTES >= 3 * crate::outbox::layout::SEGMENT_BYTES);
const _: () = assert!(FRAME_MAX_RECORDS <= journal_format::limits::MAX_FRAME_RECORDS as usize);
const _: () = assert!(*RING_MIB.start() << 20 >= 2 * journal_format::limits::MAX_RECORD_DATA_BYTES as u64);
const _: () = assert!(PING_AFTER.as_secs() * 2 < SERVER_SILENT.as_secs());
const _: () = assert!(HASH_ASK_CHUNKS <= journal_format::wire::MAX_HASH_CHUNKS);
const _: () = assert!(HASH_FIRST_AHEAD >= HASH_ASK_CHUNKS as u64 && HASH_WINDOW >= HASH_FIRST_AHEAD);
