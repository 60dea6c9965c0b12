//! Limits that both ends of the API know.

use core::ops::RangeInclusive;

/// Most bytes that one `data` request returns: 16 MiB.
pub const MAX_DATA_BYTES: u64 = 16 << 20;

/// Most extents in one answer of `extents`; the answer then says where to go on.
pub const MAX_EXTENTS: usize = 10_000;

/// Most damaged parts that one verification lists; more say the same: this volume is to be replaced.
pub const MAX_DAMAGED_PARTS: usize = 10_000;

/// Longest bookmark name, in bytes of UTF-8. The same as the journal's (a test of the server compares them).
pub const MAX_BOOKMARK_BYTES: usize = 255;

/// Longest text of a point in time, in bytes: the longest bookmark name and its prefix.
pub const MAX_POINT_BYTES: usize = MAX_BOOKMARK_BYTES + "bookmark:".len();

/// How long a guest's write may wait for room under the policy `throttle`, in milliseconds.
pub const THROTTLE_MS: RangeInclusive<u32> = 1..=600_000;

/// Sizes of a disk's capture ring in MiB: the smallest takes two of the largest writes.
pub const RING_MIB: RangeInclusive<u32> = 8..=16_384;

/// How long a guest's flush may wait in sync mode, in milliseconds.
pub const SYNC_TIMEOUT_MS: RangeInclusive<u32> = 1..=3_600_000;
