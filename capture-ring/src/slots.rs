//! Record slots: credits, reservation, publication. The heart of the ring; `docs/formats/ring.md` has the argument.
//!
//! A *credit* is the promise of a slot. `free slots = credits + promised + reserved-but-not-consumed`, so whoever
//! holds a credit finds its slot free when it takes a number, and completion can never find the ring full.

use journal_format::Lsn;

use crate::error::Full;
use crate::layout::{Geometry, Slot, Words};
use crate::limits::MAX_CAS_TRIES;
use crate::sync::{Ordering, fence};

/// Who asks for a credit; what each must leave to the next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Class {
    /// A background read: leaves a quarter of the slots to the guest.
    Fill,
    /// A guest's request: leaves the whole reserve.
    Request,
    /// A bookmark: leaves half of the reserve.
    Bookmark,
    /// Gap records and resizes: may take the last one.
    Control,
}

/// The fields of a record slot, as plain numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Entry {
    pub(crate) stamp: u64,
    pub(crate) offset: u64,
    pub(crate) length: u64,
    pub(crate) kind: u8,
    pub(crate) flags: u8,
    pub(crate) reason: u16,
    pub(crate) pieces: u32,
    pub(crate) block: u32,
}

impl Entry {
    const fn what(&self) -> u64 {
        self.kind as u64 | (self.flags as u64) << 8 | (self.reason as u64) << 16 | (self.pieces as u64) << 32
    }
}

/// What a slot says when the consumer looks at it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Look {
    /// Its record is published; this is a private copy.
    Published(Entry),
    /// Its record is not published yet.
    Pending,
    /// Its word is one that no producer writes.
    Corrupt,
}

/// The slots of one ring.
#[derive(Clone, Copy)]
pub(crate) struct Slots<'a> {
    pub(crate) words: &'a Words,
    pub(crate) slots: &'a [Slot],
    pub(crate) geometry: &'a Geometry,
    pub(crate) first: Lsn,
}

impl Slots<'_> {
    /// How many credits a class leaves to the others.
    pub(crate) const fn floor(&self, class: Class) -> u64 {
        let reserve = self.geometry.control_reserve();
        match class {
            Class::Fill => self.geometry.slots / 4,
            Class::Request => reserve,
            Class::Bookmark => reserve / 2,
            Class::Control => 0,
        }
    }

    /// Takes a credit.
    #[inline]
    pub(crate) fn promise(&self, class: Class) -> Result<(), Full> {
        let floor = self.floor(class);
        let credits = &self.words.credits;
        // ORDERING: a first guess, checked by the exchange below.
        let mut seen = credits.load(Ordering::Relaxed);
        for _ in 0..MAX_CAS_TRIES {
            if seen <= floor {
                return Err(Full::Slots);
            }
            // ORDERING: Acquire pairs with the Release in `give_back`: the consumer's reads of the slot's last
            // record come before our writes to it (also when the slot's number goes to another thread: see
            // `reserve`).
            match credits.compare_exchange_weak(
                seen,
                seen.wrapping_sub(1),
                Ordering::AcqRel,
                Ordering::Relaxed,
            ) {
                Ok(_) => return Ok(()),
                Err(newer) => seen = newer,
            }
        }
        Err(Full::Slots)
    }

    /// Gives credits back: a request that came to nothing, or the consumer's batch.
    pub(crate) fn give_back(&self, count: u64) {
        // ORDERING: Release pairs with `promise`: everything read from the slots is read.
        self.words.credits.fetch_add(count, Ordering::Release);
    }

    /// Credits left, for decisions that may be a moment old.
    pub(crate) fn credits(&self) -> u64 {
        // ORDERING: a gauge.
        self.words.credits.load(Ordering::Relaxed)
    }

    /// Takes the next number. The caller holds a credit and has taken its stamp before.
    #[inline]
    pub(crate) fn reserve(&self) -> u64 {
        // ORDERING: AcqRel chains all reservations: (1) the stamps of all smaller numbers were taken before this one
        // was reserved, which is what the consumer's raising of stamps relies on; (2) number n says that n+1 credits
        // were taken, so one of their holders saw the consumer give this slot back, and through the chain we do.
        self.words.tail.fetch_add(1, Ordering::AcqRel)
    }

    /// Numbers reserved so far.
    pub(crate) fn tail(&self) -> u64 {
        // ORDERING: pairs with `reserve`.
        self.words.tail.load(Ordering::Acquire)
    }

    /// Writes and publishes record `number`; true when its consumer sleeps and has to be woken.
    #[inline]
    pub(crate) fn publish(&self, number: u64, entry: &Entry) -> bool {
        let Some(slot) = self.slot(number) else { return false };
        // ORDERING: Relaxed, published by the word below.
        slot.stamp.store(entry.stamp, Ordering::Relaxed);
        slot.offset.store(entry.offset, Ordering::Relaxed);
        slot.length.store(entry.length, Ordering::Relaxed);
        slot.what.store(entry.what(), Ordering::Relaxed);
        slot.block.store(u64::from(entry.block), Ordering::Relaxed);
        // ORDERING: Release pairs with the Acquire in `look`.
        slot.word.store(number.wrapping_add(1), Ordering::Release);
        // ORDERING: pairs with the fence in `sleep_until`: either we see that the consumer sleeps, or it sees our
        // record before it does.
        fence(Ordering::SeqCst);
        let awaited = &self.words.awaited;
        // ORDERING: ordered by the fence; the exchange only makes sure that one thread rings.
        awaited.load(Ordering::Relaxed) == number.wrapping_add(1)
            && awaited
                .compare_exchange(number.wrapping_add(1), 0, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
    }

    /// Announces that the consumer sleeps until record `number` is published; false when it already is.
    pub(crate) fn sleep_until(&self, number: u64) -> bool {
        // ORDERING: ordered against the publisher by the fence.
        self.words.awaited.store(number.wrapping_add(1), Ordering::Relaxed);
        // ORDERING: pairs with the fence in `publish`.
        fence(Ordering::SeqCst);
        let pending = matches!(self.look(number), Look::Pending);
        if !pending {
            self.awake();
        }
        pending
    }

    /// Takes the announcement back.
    pub(crate) fn awake(&self) {
        // ORDERING: a producer that still sees the old value rings once too often, which is harmless.
        self.words.awaited.store(0, Ordering::Relaxed);
    }

    /// Copies record `number` out of its slot, if it is published.
    #[inline]
    pub(crate) fn look(&self, number: u64) -> Look {
        let Some(slot) = self.slot(number) else { return Look::Corrupt };
        // ORDERING: Acquire pairs with the Release in `publish`.
        let word = slot.word.load(Ordering::Acquire);
        let done = number.wrapping_add(1);
        if word != done {
            let before = done.saturating_sub(self.geometry.slots);
            return if word == before { Look::Pending } else { Look::Corrupt };
        }
        // ORDERING: Relaxed, made visible by the word. Each field is read once.
        let what = slot.what.load(Ordering::Relaxed);
        let block = slot.block.load(Ordering::Relaxed);
        let [kind, flags, reason_low, reason_high, ..] = what.to_le_bytes();
        Look::Published(Entry {
            stamp: slot.stamp.load(Ordering::Relaxed),
            offset: slot.offset.load(Ordering::Relaxed),
            length: slot.length.load(Ordering::Relaxed),
            kind,
            flags,
            reason: u16::from_le_bytes([reason_low, reason_high]),
            pieces: (what >> 32) as u32,
            block: u32::try_from(block).unwrap_or(u32::MAX),
        })
    }

    fn slot(&self, number: u64) -> Option<&Slot> {
        self.slots.get(self.index(number) as usize)
    }

    /// Which slot holds record `number`.
    #[inline]
    pub(crate) const fn index(&self, number: u64) -> u64 {
        number & self.geometry.slots.wrapping_sub(1)
    }

    /// The LSN of record `number`.
    #[inline]
    pub(crate) const fn lsn(&self, number: u64) -> Lsn {
        self.first.plus(number)
    }
}
