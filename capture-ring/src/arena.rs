//! The data arena: slabs filled by bumping, the slab freed last used first.
//!
//! One word holds the slab being filled, how many pieces were cut from it and how many units are used, so an
//! allocation is one compare-and-swap. Freeing is one subtraction from the slab's own counter, which stays at minus
//! the pieces freed until the slab is *retired* (full), when the pieces cut are added: whoever brings it to zero puts
//! the slab on the free stack. So a slab with a slow write in it holds up nobody.
//!
//! No ABA hazard in the current word: it describes its state completely, so an exchange that succeeds is right
//! whatever happened between. The stack's top carries a tag that every change raises; its 32 bits would have to wrap
//! while one thread is stopped between two instructions for a stale exchange to succeed.

use crate::layout::{Slab, Words};
use crate::limits::{MAX_CAS_TRIES, SLAB_UNITS};
use crate::sync::Ordering;

/// A run of units cut from a slab.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Run {
    /// The first unit; its block-table entry is the run's header.
    pub(crate) block: u32,
    /// How many units, at least 1.
    pub(crate) units: u32,
}

/// The slab being filled.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Current {
    /// Slab plus one; 0 for none.
    slab: u32,
    /// Pieces cut from it.
    cut: u32,
    /// Units used.
    used: u32,
}

impl Current {
    const fn unpack(word: u64) -> Self {
        Self { slab: (word >> 32) as u32, cut: (word >> 16) as u32 & 0xffff, used: word as u32 & 0xffff }
    }

    const fn pack(self) -> u64 {
        (self.slab as u64) << 32 | (self.cut as u64) << 16 | self.used as u64
    }
}

/// The allocator of one ring.
#[derive(Clone, Copy)]
pub(crate) struct Arena<'a> {
    pub(crate) words: &'a Words,
    pub(crate) slabs: &'a [Slab],
}

impl Arena<'_> {
    /// Puts every slab of a new ring on the free stack, the first on top.
    pub(crate) fn init(&self) {
        for index in (0..self.slabs.len()).rev() {
            self.push(index as u32);
        }
    }

    /// Slabs on the free stack, for gauges and for yielding to the guest.
    pub(crate) fn free_slabs(&self) -> u64 {
        // ORDERING: a gauge.
        self.words.free_slabs.load(Ordering::Relaxed)
    }

    /// Units left in the slab being filled, for a look at whether a request would fit.
    pub(crate) fn left_units(&self) -> u64 {
        // ORDERING: Acquire as in `cut`, though it is only a look.
        let current = Current::unpack(self.words.current.load(Ordering::Acquire));
        if current.slab == 0 { 0 } else { u64::from(SLAB_UNITS.saturating_sub(current.used)) }
    }

    /// Cuts up to `want` units (at least one) from the slab being filled; `None` when the arena is full.
    #[inline]
    pub(crate) fn cut(&self, want: u32) -> Option<Run> {
        // ORDERING: Acquire pairs with the Release of whoever put the slab there, who had it from the consumer.
        let mut word = self.words.current.load(Ordering::Acquire);
        for _ in 0..MAX_CAS_TRIES {
            let current = Current::unpack(word);
            let left = SLAB_UNITS.saturating_sub(current.used);
            if current.slab == 0 || left == 0 {
                word = self.refill(word)?;
                continue;
            }
            let units = want.min(left);
            let next = Current {
                cut: current.cut.wrapping_add(1),
                used: current.used.wrapping_add(units),
                ..current
            };
            // ORDERING: AcqRel keeps the chain from the slab's last owner to each next allocation.
            match self.words.current.compare_exchange_weak(
                word,
                next.pack(),
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(_) => return Self::run(current, units),
                Err(newer) => word = newer,
            }
        }
        None
    }

    fn run(current: Current, units: u32) -> Option<Run> {
        let block = current.slab.wrapping_sub(1).checked_mul(SLAB_UNITS)?.checked_add(current.used)?;
        Some(Run { block, units })
    }

    /// Retires a full slab and puts a free one in its place; the new value of the current word.
    #[cold]
    fn refill(&self, seen: u64) -> Option<u64> {
        let full = Current::unpack(seen);
        let current = &self.words.current;
        if full.slab != 0 {
            // ORDERING: AcqRel as in `cut`.
            if let Err(newer) = current.compare_exchange(seen, 0, Ordering::AcqRel, Ordering::Acquire) {
                return Some(newer);
            }
            // Retired before a new slab is looked for: when the consumer keeps up, this very slab is free again and
            // still in the cache.
            self.retire(full);
        }
        let Some(index) = self.pop() else {
            // ORDERING: Acquire as in `cut`. Another thread may have put the last free slab there.
            let newer = current.load(Ordering::Acquire);
            return (newer != 0).then_some(newer);
        };
        let fresh = Current { slab: index.wrapping_add(1), cut: 0, used: 0 }.pack();
        // ORDERING: AcqRel as in `cut`.
        match current.compare_exchange(0, fresh, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => Some(fresh),
            Err(newer) => {
                self.push(index);
                Some(newer)
            }
        }
    }

    fn retire(&self, full: Current) {
        let index = full.slab.wrapping_sub(1);
        let Some(slab) = self.slabs.get(index as usize) else { return };
        // ORDERING: AcqRel chains us to every `free` of the slab, whichever comes last.
        let before = slab.live.fetch_add(u64::from(full.cut), Ordering::AcqRel);
        if before.wrapping_add(u64::from(full.cut)) == 0 {
            self.push(index);
        }
    }

    /// Frees the run that begins at `block`; the caller has marked its header free and is done with its bytes.
    #[inline]
    pub(crate) fn free(&self, block: u32) {
        let index = block / SLAB_UNITS;
        let Some(slab) = self.slabs.get(index as usize) else { return };
        // ORDERING: AcqRel: our accesses to the bytes come before the slab's next use, and if we are the last, so
        // do those of everyone who freed before.
        if slab.live.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.push(index);
        }
    }

    fn push(&self, index: u32) {
        let Some(slab) = self.slabs.get(index as usize) else { return };
        let top = &self.words.free_top;
        // ORDERING: a first guess, checked by the exchange below.
        let mut seen = top.load(Ordering::Relaxed);
        for _ in 0..MAX_CAS_TRIES {
            // ORDERING: Relaxed, published by the exchange.
            slab.next.store(seen & 0xffff_ffff, Ordering::Relaxed);
            let next = tag_after(seen) | u64::from(index.wrapping_add(1));
            // ORDERING: Release pairs with the Acquire in `pop`; the stack's other entries stay published because
            // every exchange continues the release sequence.
            match top.compare_exchange_weak(seen, next, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => {
                    // ORDERING: a gauge.
                    self.words.free_slabs.fetch_add(1, Ordering::Relaxed);
                    return;
                }
                Err(newer) => seen = newer,
            }
        }
        // Only a hostile peer gets here: the slab is lost to it, nothing else.
    }

    fn pop(&self) -> Option<u32> {
        let top = &self.words.free_top;
        // ORDERING: Acquire pairs with the Release in `push`: `next` below is the pusher's.
        let mut seen = top.load(Ordering::Acquire);
        for _ in 0..MAX_CAS_TRIES {
            let index = (seen as u32).checked_sub(1)?;
            let slab = self.slabs.get(index as usize)?;
            // ORDERING: Relaxed: if another thread changed it meanwhile, the tag has changed and the exchange fails.
            let next = tag_after(seen) | (slab.next.load(Ordering::Relaxed) & 0xffff_ffff);
            // ORDERING: Acquire as above, for the slab's bytes and counter too.
            match top.compare_exchange_weak(seen, next, Ordering::Acquire, Ordering::Acquire) {
                Ok(_) => {
                    // ORDERING: a gauge.
                    self.words.free_slabs.fetch_sub(1, Ordering::Relaxed);
                    return Some(index);
                }
                Err(newer) => seen = newer,
            }
        }
        None
    }
}

const fn tag_after(top: u64) -> u64 {
    ((top >> 32).wrapping_add(1)) << 32
}
