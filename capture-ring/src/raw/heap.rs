//! The same interface over loom's atomics on the heap: one tracked cell per arena unit, so that loom reports two
//! threads that touch one piece at a time.

use core::ptr::NonNull;

use loom::cell::UnsafeCell;

use crate::layout::{Block, Geometry, Slab, Slot, Words};
use crate::limits::SLAB_UNITS;
use crate::sync::{AtomicU64, Pad};

/// A ring's memory under loom.
pub(crate) struct Memory {
    geometry: Geometry,
    words: Words,
    /// The event's futex.
    futex: loom::sync::Notify,
    dirty: Vec<AtomicU64>,
    slots: Vec<Slot>,
    blocks: Vec<Block>,
    slabs: Vec<Slab>,
    arena: Vec<UnsafeCell<Vec<u8>>>,
}

fn word() -> AtomicU64 {
    AtomicU64::new(0)
}

fn many<T>(count: u64, make: impl Fn() -> T) -> Vec<T> {
    (0..count).map(|_| make()).collect()
}

impl Memory {
    /// An all-zero ring, as a new memfd is.
    pub(crate) fn new(geometry: Geometry, dirty_words: u64) -> Self {
        let words = Words {
            tail: word(),
            pad_tail: Pad::new(),
            credits: word(),
            pad_credits: Pad::new(),
            current: word(),
            pad_current: Pad::new(),
            free_top: word(),
            free_slabs: word(),
            pad_free: Pad::new(),
            head: word(),
            pad_head: Pad::new(),
            mode: word(),
            awaited: word(),
            stopped: word(),
            stopped_at: word(),
            gap_begun: word(),
            gap_ended: word(),
            disk_bytes: word(),
            pad_mode: Pad::new(),
            untracked: word(),
            fills: word(),
            pad_untracked: Pad::new(),
            event: word(),
            waiting: word(),
            waiting_since: word(),
            sync_lost: word(),
            pad_event: Pad::new(),
            policy: word(),
            sync: word(),
            durable: word(),
            pad_policy: Pad::new(),
        };
        let slot = || Slot {
            word: word(),
            stamp: word(),
            offset: word(),
            length: word(),
            what: word(),
            block: word(),
            pad: Pad::new(),
        };
        let block = || Block { offset: word(), length: word(), link: word(), state: word() };
        Self {
            geometry,
            words,
            futex: loom::sync::Notify::new(),
            dirty: many(dirty_words, word),
            slots: many(geometry.slots, slot),
            blocks: many(geometry.units, block),
            slabs: many(geometry.slabs, || Slab { live: word(), next: word(), pad: Pad::new() }),
            arena: many(geometry.units, || UnsafeCell::new(Vec::new())),
        }
    }

    pub(crate) const fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    pub(crate) const fn words(&self) -> &Words {
        &self.words
    }

    pub(crate) fn wake_event(&self) {
        self.futex.notify();
    }

    /// Without a timeout: loom reports a deadlock when nobody can wake.
    pub(crate) fn wait_event(&self, seen: u32, _timeout: core::time::Duration) {
        if self.words.event.load(crate::sync::Ordering::Acquire) as u32 == seen {
            self.futex.wait();
        }
    }

    pub(crate) fn dirty(&self) -> &[AtomicU64] {
        &self.dirty
    }

    pub(crate) fn slots(&self) -> &[Slot] {
        &self.slots
    }

    pub(crate) fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    pub(crate) fn slabs(&self) -> &[Slab] {
        &self.slabs
    }

    /// Loom's cells have no address to hand out; the copies below are what its tests use.
    pub(crate) fn piece(&self, _block: u32, _length: u32) -> Option<NonNull<u8>> {
        None
    }

    /// Only pieces that fit one unit have data under loom.
    pub(crate) fn copy_in(&self, block: u32, at: u32, bytes: &[u8]) -> bool {
        let Some(cell) = self.arena.get(block as usize).filter(|_| at == 0) else { return false };
        cell.with_mut(|data| {
            // SAFETY: loom checks that no other thread is in `with` or `with_mut` of this cell.
            let data = unsafe { &mut *data };
            data.clear();
            data.extend_from_slice(bytes);
        });
        true
    }

    /// See `copy_in`; also touches the other units of the piece so that loom sees who owns them.
    pub(crate) fn copy_out(&self, block: u32, length: u32, out: &mut Vec<u8>) -> bool {
        debug_assert!(length.div_ceil(crate::limits::UNIT_BYTES) <= SLAB_UNITS);
        let Some(cell) = self.arena.get(block as usize) else { return false };
        cell.with(|data| {
            // SAFETY: loom checks that no other thread is in `with_mut` of this cell.
            out.extend_from_slice(unsafe { &*data });
        });
        true
    }

    pub(crate) const fn prefetch_slot(&self, _index: u64) {}
}

/// The clock under loom.
pub(crate) struct ClockMemory(AtomicU64);

impl ClockMemory {
    pub(crate) fn new() -> Self {
        Self(word())
    }

    pub(crate) const fn last(&self) -> &AtomicU64 {
        &self.0
    }
}
