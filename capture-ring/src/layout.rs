//! The bytes of the ring and clock memfds. Authority: `docs/formats/ring.md`; a test compares it with this module.
//!
//! Everything that both sides change is a 64-bit atomic word. Fields that different sides write often lie 128 bytes
//! apart (two cache lines, because the processor fetches lines in pairs).

use journal_format::limits::{DIRTY_CHUNK_BYTES, MAX_DISK_BYTES};
use journal_format::{DiskId, Epoch, GapReason, Lsn};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::{RingError, RingErrorKind};
use crate::limits::{
    MAX_ARENA_BYTES, MAX_CONTROL_RESERVE, MAX_SLOTS, MIN_ARENA_BYTES, MIN_DIRTY_BYTES, MIN_SLOTS, SLAB_BYTES,
    SLAB_UNITS, UNIT_BYTES,
};
use crate::ring::RingConfig;
use crate::sync::{AtomicU64, Pad};

/// First eight bytes of a ring.
pub const RING_MAGIC: [u8; 8] = *b"CDPRING\0";
/// First eight bytes of a clock page.
pub const CLOCK_MAGIC: u64 = u64::from_le_bytes(*b"CDPCLOCK");
/// The version of both layouts that this code writes, and the only one it opens.
pub const VERSION: u32 = 1;
/// Bytes of the description at offset 0.
pub const DESCRIPTION_BYTES: usize = 192;
/// Bytes before the first region: the description's page and the page of shared words.
pub const HEADER_BYTES: u64 = 8192;
/// Bytes of the clock memfd.
pub const CLOCK_BYTES: u64 = 4096;
/// Everything that is mapped begins and ends on a multiple of this.
pub const PAGE_BYTES: u64 = 4096;

/// The description: written by the creator before anyone else has the descriptor, checked by the opener, and then
/// never read again, because the other process can change it.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Description {
    magic: [u8; 8],
    version: U32,
    header_bytes: U32,
    disk: [u8; 16],
    epoch: U64,
    first_lsn: U64,
    disk_bytes: U64,
    arena_bytes: U64,
    slots: U32,
    unit_bytes: U32,
    slab_units: U32,
    chunk_bytes: U32,
    dirty_bits: U64,
    dirty_at: U64,
    slots_at: U64,
    blocks_at: U64,
    slabs_at: U64,
    arena_at: U64,
    total_bytes: U64,
    begins: U32,
    reserved: [u8; 48],
    crc: U32,
}

const _: () = assert!(size_of::<Description>() == DESCRIPTION_BYTES);

/// Where everything lies in a ring's memory. Computed from the few numbers of a [`RingConfig`], never read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Record slots, a power of two.
    pub slots: u64,
    /// 4 KiB units in the arena.
    pub units: u64,
    /// Slabs in the arena.
    pub slabs: u64,
    /// Bits in the dirty bitmap, a multiple of 64.
    pub dirty_bits: u64,
    /// Byte offset of the dirty bitmap.
    pub dirty_at: u64,
    /// Byte offset of the record slots.
    pub slots_at: u64,
    /// Byte offset of the block table.
    pub blocks_at: u64,
    /// Byte offset of the slab table.
    pub slabs_at: u64,
    /// Byte offset of the arena.
    pub arena_at: u64,
    /// Size of the memfd in bytes.
    pub total_bytes: u64,
}

impl Geometry {
    /// The layout for a configuration.
    ///
    /// # Errors
    /// `Limits` when a number is out of range.
    pub fn new(config: &RingConfig) -> Result<Self, RingError> {
        let bad = |what| Err(RingError::new(RingErrorKind::Limits, what));
        if config.disk_bytes > MAX_DISK_BYTES {
            return bad("the disk is larger than 256 TiB");
        }
        let arena = config.arena_bytes;
        if !(MIN_ARENA_BYTES..=MAX_ARENA_BYTES).contains(&arena) || !arena.is_multiple_of(SLAB_BYTES) {
            return bad("the arena is not a multiple of 256 KiB from 512 KiB to 64 GiB");
        }
        if !config.slots.is_power_of_two() || !(MIN_SLOTS..=MAX_SLOTS).contains(&config.slots) {
            return bad("the number of slots is not a power of two from 4 to 2^24");
        }
        if config.first_lsn == Lsn::ZERO || config.first_lsn.0 > u64::MAX / 2 {
            return bad("the first LSN is 0 or beyond 2^63");
        }
        let covered = config.disk_bytes.saturating_mul(4).clamp(MIN_DIRTY_BYTES, MAX_DISK_BYTES);
        Ok(Self::lay_out(u64::from(config.slots), arena, covered.div_ceil(DIRTY_CHUNK_BYTES)))
    }

    /// All inputs are within their limits, so nothing here saturates.
    fn lay_out(slots: u64, arena_bytes: u64, chunks: u64) -> Self {
        let dirty_bits = chunks.next_multiple_of(64);
        let (units, slabs) =
            ((arena_bytes / SLAB_BYTES).saturating_mul(SLAB_UNITS as u64), arena_bytes / SLAB_BYTES);
        let after = |at: u64, count: u64, bytes: usize, align: u64| {
            at.saturating_add(count.saturating_mul(bytes as u64)).next_multiple_of(align)
        };
        let dirty_at = HEADER_BYTES;
        let slots_at = after(dirty_at, dirty_bits / 64, 8, PAGE_BYTES);
        let blocks_at = after(slots_at, slots, SLOT_BYTES, PAGE_BYTES);
        let slabs_at = after(blocks_at, units, BLOCK_BYTES, PAGE_BYTES);
        let arena_at = after(slabs_at, slabs, SLAB_ENTRY_BYTES, SLAB_BYTES.max(PAGE_BYTES));
        let total_bytes = after(arena_at, arena_bytes, 1, PAGE_BYTES);
        Self {
            slots,
            units,
            slabs,
            dirty_bits,
            dirty_at,
            slots_at,
            blocks_at,
            slabs_at,
            arena_at,
            total_bytes,
        }
    }

    /// Slot credits that requests leave to control records.
    #[must_use]
    pub const fn control_reserve(&self) -> u64 {
        let quarter = self.slots / 4;
        if quarter < MAX_CONTROL_RESERVE { quarter } else { MAX_CONTROL_RESERVE }
    }
}

impl Description {
    /// The description of a new ring.
    #[must_use]
    pub fn new(config: &RingConfig, geometry: &Geometry) -> Self {
        let mut this = Self {
            magic: RING_MAGIC,
            version: U32::new(VERSION),
            header_bytes: U32::new(HEADER_BYTES as u32),
            disk: config.disk.0,
            epoch: U64::new(config.epoch.0),
            first_lsn: U64::new(config.first_lsn.0),
            disk_bytes: U64::new(config.disk_bytes),
            arena_bytes: U64::new(config.arena_bytes),
            slots: U32::new(config.slots),
            unit_bytes: U32::new(UNIT_BYTES),
            slab_units: U32::new(SLAB_UNITS),
            chunk_bytes: U32::new(DIRTY_CHUNK_BYTES as u32),
            dirty_bits: U64::new(geometry.dirty_bits),
            dirty_at: U64::new(geometry.dirty_at),
            slots_at: U64::new(geometry.slots_at),
            blocks_at: U64::new(geometry.blocks_at),
            slabs_at: U64::new(geometry.slabs_at),
            arena_at: U64::new(geometry.arena_at),
            total_bytes: U64::new(geometry.total_bytes),
            begins: U32::new(config.begins as u32),
            reserved: [0; 48],
            crc: U32::new(0),
        };
        this.crc = U32::new(this.computed_crc());
        this
    }

    /// Checks a copy of the description: magic, version, checksum, then that every number is the one this release
    /// computes for such a ring and that the file has exactly that size.
    ///
    /// # Errors
    /// `Layout` (or `Limits`) with what is wrong.
    pub fn check(
        bytes: &[u8; DESCRIPTION_BYTES],
        file_bytes: u64,
    ) -> Result<(RingConfig, Geometry), RingError> {
        let bad = |what| RingError::new(RingErrorKind::Layout, what);
        let this = Self::read_from_bytes(bytes).map_err(|_| bad("the ring's description is cut"))?;
        if this.magic != RING_MAGIC {
            return Err(bad("the descriptor is not a capture ring"));
        }
        if this.version.get() != VERSION {
            return Err(bad(
                "the ring has another version; filter and agent must come from the same release",
            ));
        }
        if this.crc.get() != this.computed_crc() {
            return Err(bad("the ring's description is corrupt"));
        }
        let begins = u8::try_from(this.begins.get()).ok().and_then(GapReason::from_u8);
        let config = RingConfig {
            disk: DiskId(this.disk),
            epoch: Epoch(this.epoch.get()),
            first_lsn: Lsn(this.first_lsn.get()),
            disk_bytes: this.disk_bytes.get(),
            arena_bytes: this.arena_bytes.get(),
            slots: this.slots.get(),
            begins: begins.ok_or(bad("the ring's epoch begins for no known reason"))?,
        };
        let geometry = Geometry::new(&config)?;
        if Self::new(&config, &geometry).as_bytes() != bytes || geometry.total_bytes != file_bytes {
            return Err(bad(
                "the ring's regions are not where this release puts them, or the file has another size",
            ));
        }
        Ok((config, geometry))
    }

    fn computed_crc(&self) -> u32 {
        let bytes = self.as_bytes();
        crc32c::crc32c(bytes.get(..DESCRIPTION_BYTES.saturating_sub(4)).unwrap_or(bytes))
    }
}

/// Bytes of one record slot.
pub const SLOT_BYTES: usize = 64;
/// Bytes of one block-table entry.
pub const BLOCK_BYTES: usize = 32;
/// Bytes of one slab-table entry.
pub const SLAB_ENTRY_BYTES: usize = 64;

/// One record slot. Slot `n % slots` holds record `n`, whose LSN is `first_lsn + n`.
#[repr(C)]
pub(crate) struct Slot {
    /// `n + 1` once record `n` is published; `n + 1 - slots` (or 0) before.
    pub(crate) word: AtomicU64,
    /// When, before the consumer raises it to the record before.
    pub(crate) stamp: AtomicU64,
    /// Disk offset; new size for resize; generation for gap records.
    pub(crate) offset: AtomicU64,
    /// Bytes of disk; of the name for bookmarks.
    pub(crate) length: AtomicU64,
    /// Byte 0 kind, 1 flags, 2 and 3 gap reason, 4 to 7 number of pieces.
    pub(crate) what: AtomicU64,
    /// First block, when there are pieces.
    pub(crate) block: AtomicU64,
    pub(crate) pad: Pad<2>,
}

/// One entry of the block table: the header of the piece that begins at this unit.
#[repr(C)]
pub(crate) struct Block {
    /// Disk offset of the piece.
    pub(crate) offset: AtomicU64,
    /// Bytes of disk that it covers.
    pub(crate) length: AtomicU64,
    /// Low half: block of the next piece (when the chain goes on); high half: units of this piece.
    pub(crate) link: AtomicU64,
    /// Byte 0 state, byte 1 kind.
    pub(crate) state: AtomicU64,
}

/// One entry of the slab table.
#[repr(C)]
pub(crate) struct Slab {
    /// Pieces alive, once the slab is retired; before that, minus the number already freed (wrapping).
    pub(crate) live: AtomicU64,
    /// Next free slab plus one; 0 ends the list. Meaningful only while the slab is on the free list.
    pub(crate) next: AtomicU64,
    pub(crate) pad: Pad<6>,
}

/// The page of shared words behind the description. Each group of fields is 128 bytes.
#[repr(C)]
pub(crate) struct Words {
    /// Number of slots ever reserved. Written by every producer, at each completion.
    pub(crate) tail: AtomicU64,
    pub(crate) pad_tail: Pad<15>,

    /// Slots that may still be promised. Taken by producers at begin, given back by the consumer.
    pub(crate) credits: AtomicU64,
    pub(crate) pad_credits: Pad<15>,

    /// The slab being filled: see `arena`. Written by producers at each begin.
    pub(crate) current: AtomicU64,
    pub(crate) pad_current: Pad<15>,

    /// Top of the free-slab stack: tag in the high half, slab plus one in the low half.
    pub(crate) free_top: AtomicU64,
    /// Slabs on the stack, for gauges and for yielding to guest requests.
    pub(crate) free_slabs: AtomicU64,
    pub(crate) pad_free: Pad<14>,

    /// Records taken out. Written by the consumer, once per batch.
    pub(crate) head: AtomicU64,
    pub(crate) pad_head: Pad<15>,

    /// Generation, reason and mode: see `mode`. Read by producers at each begin, seldom written, like all of this
    /// group.
    pub(crate) mode: AtomicU64,
    /// `n + 1` while the consumer sleeps until record `n` is published, else 0.
    pub(crate) awaited: AtomicU64,
    /// Not 0 once capture has ended without a gap record.
    pub(crate) stopped: AtomicU64,
    /// With `stopped`: the first record that may not be used, plus one; 0 while it is being worked out.
    pub(crate) stopped_at: AtomicU64,
    /// Highest generation whose gap-begin is published.
    pub(crate) gap_begun: AtomicU64,
    /// Highest generation whose gap-end is published.
    pub(crate) gap_ended: AtomicU64,
    /// Size of the disk in bytes.
    pub(crate) disk_bytes: AtomicU64,
    pub(crate) pad_mode: Pad<9>,

    /// Untracked requests in flight and threads about to publish a gap-begin.
    pub(crate) untracked: AtomicU64,
    /// Background reads that hold a slot.
    pub(crate) fills: AtomicU64,
    pub(crate) pad_untracked: Pad<14>,

    /// Raised whenever the filter's waiting thread has to look again; see `waiting`. The low half is a futex.
    pub(crate) event: AtomicU64,
    /// Guest requests and flushes that wait.
    pub(crate) waiting: AtomicU64,
    /// Since when without a break, in nanoseconds of the monotonic clock; 0 for nobody.
    pub(crate) waiting_since: AtomicU64,
    /// Highest LSN for which a flush has waited too long; see `policy`.
    pub(crate) sync_lost: AtomicU64,
    pub(crate) pad_event: Pad<12>,

    /// What to do when the ring is full; see `policy`. Written by the agent, like all of this group.
    pub(crate) policy: AtomicU64,
    /// Whether flushes wait for the server; see `policy`.
    pub(crate) sync: AtomicU64,
    /// Last LSN that is durable at the server.
    pub(crate) durable: AtomicU64,
    pub(crate) pad_policy: Pad<13>,
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<Slot>() == SLOT_BYTES && size_of::<Block>() == BLOCK_BYTES);
#[cfg(not(loom))]
const _: () = assert!(size_of::<Slab>() == SLAB_ENTRY_BYTES && size_of::<Words>() == 9 * 128);
#[cfg(not(loom))]
const _: () = assert!(size_of::<Words>() as u64 <= HEADER_BYTES - PAGE_BYTES);

/// State of a block: nobody's.
pub(crate) const STATE_FREE: u8 = 0;
/// State of a block: a disk request was, or is about to be, issued from it.
pub(crate) const STATE_ISSUED: u8 = 1;
/// State of a block: the disk answered; its record is published or about to be.
pub(crate) const STATE_PUBLISHED: u8 = 2;
/// State of a block: the disk refused; about to be freed.
pub(crate) const STATE_FAILED: u8 = 3;
/// State of a block: room for a background read; if its owner dies nothing is lost.
pub(crate) const STATE_FILL: u8 = 4;

/// Kinds of records in a slot; the numbers of `docs/formats/frame.md`.
pub(crate) mod kind {
    pub(crate) const WRITE: u8 = 1;
    pub(crate) const ZERO: u8 = 2;
    pub(crate) const DISCARD: u8 = 3;
    pub(crate) const FLUSH: u8 = 4;
    pub(crate) const RESIZE: u8 = 5;
    pub(crate) const BOOKMARK: u8 = 6;
    pub(crate) const GAP_BEGIN: u8 = 7;
    pub(crate) const GAP_END: u8 = 8;
    pub(crate) const VOID: u8 = 9;
    pub(crate) const CLOSE: u8 = 10;
}

/// Flags of a record in a slot; the bits of `docs/formats/frame.md`.
pub(crate) mod flag {
    pub(crate) const FILL: u8 = 1;
    pub(crate) const FUA: u8 = 2;
    pub(crate) const MAY_UNMAP: u8 = 4;
}

#[cfg(all(test, not(loom)))]
#[path = "layout_tests.rs"]
mod tests;
