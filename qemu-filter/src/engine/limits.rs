//! Sizes and periods of the engine.

use std::time::Duration;

use journal_format::limits::DIRTY_CHUNK_BYTES;

/// Data read back in one step: one slab of the ring's arena, and short enough that a guest's request waiting
/// behind it on the disk hardly notices.
pub(crate) const FILL_BYTES: u64 = 256 << 10;

/// Dirty chunks taken out of the bitmap at once: with a hole that long, one record says so.
pub(crate) const MAX_RUN_BYTES: u64 = 16 << 30;

/// How fast data is read back at most, in bytes per second.
pub(crate) const FILL_BYTES_PER_S: u64 = 512 << 20;

/// How long a resync that has nothing to do sleeps before it looks again.
pub(crate) const IDLE_PAUSE: Duration = Duration::from_millis(50);

/// How long it sleeps when something that ends by itself in a moment is in its way.
pub(crate) const SHORT_PAUSE: Duration = Duration::from_millis(1);

/// How long it leaves the disk alone after a read error; doubled with each further one.
pub(crate) const FIRST_ERROR_PAUSE: Duration = Duration::from_millis(100);
/// The longest such pause.
pub(crate) const LONGEST_ERROR_PAUSE: Duration = Duration::from_secs(5);

const _: () = assert!(FILL_BYTES.is_multiple_of(DIRTY_CHUNK_BYTES));
const _: () = assert!(MAX_RUN_BYTES.is_multiple_of(DIRTY_CHUNK_BYTES));
