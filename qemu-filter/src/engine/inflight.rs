//! Serialises captured requests that overlap while in flight, without a lock.
//!
//! Two writes to the same bytes that are in flight together may reach the disk in one order and be numbered
//! in the other; then history would end in the wrong data. So the second one waits until the first has been
//! published. Requests that do not overlap pay a few tens of nanoseconds and never wait.
//!
//! # How it works
//!
//! A fixed table of [`ENTRIES`] entries with an occupancy bitmap. A request claims an entry, takes a *ticket*
//! (a number that grows), writes its range, publishes itself as *scanning*, and then looks at every other
//! entry whose range overlaps its own. For each such entry *o*:
//!
//! | o is | and o's ticket is | then |
//! | --- | --- | --- |
//! | running | any | blocked |
//! | scanning, parked, woken | smaller | blocked (first come, first served) |
//! | scanning | larger | look again: it decides within nanoseconds, and does not wait for us to |
//! | parked, woken | larger | passed over |
//!
//! Not blocked: it becomes *running*. Blocked: it becomes *parked*, looks once more, and if it still is blocked
//! its caller sleeps. Whoever leaves the table frees its entry and then wakes each parked request that
//! overlaps; a woken one becomes scanning again, with its old ticket.
//!
//! # Why two overlapping requests never run together
//!
//! All accesses named here are SeqCst, so they have one total order. Let A and B overlap, with A's ticket
//! smaller, and let both be running at one moment. For each take its last publication as scanning `S`, which
//! comes before its look `L` at the other, which comes before it runs.
//! - `L(B) > S(A)`: B saw A as scanning with a smaller ticket, or as running: blocked. Contradiction.
//! - `L(B) < S(A)`: then `S(B) < L(B) < S(A) < L(A)`: A saw B as scanning with a larger ticket, and looked again
//!   until B was running: blocked. Contradiction.
//!
//! An entry may be freed and claimed anew while it is looked at: the state word carries the ticket, and a
//! range counts only when the state word is the same before and after it was read.
//!
//! # Why nobody is forgotten
//!
//! A request sleeps only after publishing *parked* and then seeing a blocker that had not left. A blocker
//! stops blocking only by leaving. Leaving is: free the entry, then look for parked requests. In the total
//! order `parked(A) < A sees B < free(B) < B looks`, so B finds A parked (or someone else has woken it, and A
//! looks at B again). When A finds itself unblocked while parked it takes the state back by compare-exchange;
//! if that fails, someone has claimed the waking of A and the wake-up is on its way.
//!
//! # Why it does not deadlock
//!
//! A waits for running requests, which end by themselves, and for smaller tickets. The smallest ticket waits
//! for running requests only. Looking again happens only at larger tickets, so those chains end too.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::{WaitToken, WakeFn};

/// How many captured requests of one disk can be in flight or parked at once.
pub(crate) const ENTRIES: usize = 1024;

const WORD_BITS: usize = 64;
const WORDS: usize = ENTRIES / WORD_BITS;

/// How often a scan looks again at a request that is just deciding, before it gives the time slice away.
const SPINS: u32 = 200;
/// How often it gives the time slice away before it reports [`Entered::Full`].
const YIELDS: u32 = 20_000;

const FREE: u64 = 0;
const SCANNING: u64 = 1;
const RUNNING: u64 = 2;
const PARKED: u64 = 3;
const WOKEN: u64 = 4;
const STATE_BITS: u32 = 3;
const STATE_MASK: u64 = (1 << STATE_BITS) - 1;

/// Names an entry of the table while its request is in flight.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Slot(u16);

/// What became of a request that asked to enter.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Entered {
    /// Nobody overlaps; issue it, then [`Table::leave`].
    Running(Slot),
    /// Sleep until woken, then [`Table::retry`] (or leave).
    Parked(Slot),
    /// No entry is free. Nothing is held.
    Full,
}

/// First byte and one past the last byte.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Span {
    pub(crate) start: u64,
    pub(crate) end: u64,
}

impl Span {
    const fn overlaps(self, other: Self) -> bool {
        self.start < other.end && other.start < self.end
    }
}

/// On a cache line of its own: neighbours belong to other threads.
#[repr(align(64))]
struct Entry {
    /// `ticket << STATE_BITS | state`; 0 when free.
    word: AtomicU64,
    start: AtomicU64,
    end: AtomicU64,
    token: AtomicUsize,
}

impl Entry {
    const fn new() -> Self {
        Self {
            word: AtomicU64::new(FREE),
            start: AtomicU64::new(0),
            end: AtomicU64::new(0),
            token: AtomicUsize::new(0),
        }
    }

    /// The state word and range, read together. `None` while the entry is free.
    fn load(&self) -> Option<(u64, Span)> {
        loop {
            // ORDERING: SeqCst, the look `L` of the module's argument; pairs with the stores in `publish`,
            // `settle` and `leave`.
            let word = self.word.load(Ordering::SeqCst);
            if word == FREE {
                return None;
            }
            // ORDERING: Acquire keeps the second look at the word behind these; the values were stored before
            // the word, whose load above is an acquire of that store.
            let span =
                Span { start: self.start.load(Ordering::Acquire), end: self.end.load(Ordering::Acquire) };
            // ORDERING: SeqCst as above. Same ticket before and after: the range is that ticket's.
            let again = self.word.load(Ordering::SeqCst);
            if again >> STATE_BITS == word >> STATE_BITS {
                return (again != FREE).then_some((again, span));
            }
        }
    }
}

/// What a look at the other entries found.
enum Scan {
    Clear,
    Blocked,
    /// Another thread stayed undecided for too long.
    Stuck,
}

/// The in-flight table of one disk.
pub(crate) struct Table {
    occupied: [AtomicU64; WORDS],
    entries: Box<[Entry]>,
    next_ticket: AtomicU64,
    parked: AtomicU64,
    wake: WakeFn,
}

impl Table {
    /// An empty table whose parked requests are woken through `wake`.
    pub(crate) fn new(wake: WakeFn) -> Self {
        Self {
            occupied: [const { AtomicU64::new(0) }; WORDS],
            entries: (0..ENTRIES).map(|_| Entry::new()).collect(),
            next_ticket: AtomicU64::new(1),
            parked: AtomicU64::new(0),
            wake,
        }
    }

    /// Asks to run a request on `span` (not empty).
    pub(crate) fn enter(&self, span: Span, token: WaitToken) -> Entered {
        let Some(slot) = self.claim() else { return Entered::Full };
        // ORDERING: Relaxed: only the numbers matter, each is handed out once.
        let ticket = self.next_ticket.fetch_add(1, Ordering::Relaxed);
        let entry = self.entry(slot);
        // ORDERING: Relaxed: published by the store of the state word in `settle`.
        entry.start.store(span.start, Ordering::Relaxed);
        entry.end.store(span.end, Ordering::Relaxed);
        entry.token.store(token.0, Ordering::Relaxed);
        self.settle(slot, ticket, span)
    }

    /// Asks again for a parked request that has been woken.
    pub(crate) fn retry(&self, slot: Slot, token: WaitToken) -> Entered {
        let entry = self.entry(slot);
        // ORDERING: Acquire pairs with the waker's compare-exchange to WOKEN; the range and the ticket are our own.
        let word = entry.word.load(Ordering::Acquire);
        assert!(word & STATE_MASK == WOKEN, "retry of a request that was not woken");
        let span =
            Span { start: entry.start.load(Ordering::Relaxed), end: entry.end.load(Ordering::Relaxed) };
        // ORDERING: Relaxed: published by the store of PARKED in `settle`.
        entry.token.store(token.0, Ordering::Relaxed);
        self.settle(slot, word >> STATE_BITS, span)
    }

    /// Takes a parked request back before anyone has woken it; `true` if that worked. When `false`, its token
    /// is being woken, and its caller has to wait for that.
    pub(crate) fn unpark(&self, slot: Slot) -> bool {
        let entry = self.entry(slot);
        // ORDERING: Relaxed: our own word, and the compare-exchange checks it.
        let word = entry.word.load(Ordering::Relaxed);
        let woken = (word & !STATE_MASK) | WOKEN;
        // ORDERING: SeqCst; competes with the same exchange in `wake`.
        let mine = word & STATE_MASK == PARKED
            && entry.word.compare_exchange(word, woken, Ordering::SeqCst, Ordering::Relaxed).is_ok();
        if mine {
            // ORDERING: SeqCst; see `settle`.
            self.parked.fetch_sub(1, Ordering::SeqCst);
        }
        mine
    }

    /// Ends a request in whatever state and wakes who may have waited for it.
    pub(crate) fn leave(&self, slot: Slot) {
        let entry = self.entry(slot);
        // ORDERING: Relaxed: we stored these ourselves.
        let span =
            Span { start: entry.start.load(Ordering::Relaxed), end: entry.end.load(Ordering::Relaxed) };
        // ORDERING: SeqCst: freeing comes before looking for parked requests, in the total order.
        entry.word.swap(FREE, Ordering::SeqCst);
        let (word, bit) = Self::position(slot);
        // ORDERING: Release pairs with the claim of the next user of the entry.
        self.occupied[word].fetch_and(!bit, Ordering::Release);
        // ORDERING: SeqCst pairs with the increment in `settle`, which comes before PARKED is stored.
        if self.parked.load(Ordering::SeqCst) > 0 {
            self.wake_parked(|parked| parked.overlaps(span));
        }
    }

    /// Wakes every parked request, whatever it waits for. Used when capture goes off.
    pub(crate) fn wake_all(&self) {
        self.wake_parked(|_| true);
    }

    fn wake_parked(&self, wanted: impl Fn(Span) -> bool) {
        self.for_each_occupied(|slot| {
            if let Some((word, span)) = self.entry(slot).load()
                && word & STATE_MASK == PARKED
                && wanted(span)
            {
                self.wake(slot, word);
            }
            true
        });
    }

    fn wake(&self, slot: Slot, word: u64) {
        let entry = self.entry(slot);
        let woken = (word & !STATE_MASK) | WOKEN;
        // ORDERING: SeqCst; exactly one of all wakers, `unpark` and the request itself wins.
        if entry.word.compare_exchange(word, woken, Ordering::SeqCst, Ordering::Relaxed).is_ok() {
            // ORDERING: Acquire: the token was stored before PARKED. The request cannot leave or change it before
            // it has been woken, which is what we do next.
            let token = entry.token.load(Ordering::Acquire);
            // ORDERING: SeqCst; see `settle`.
            self.parked.fetch_sub(1, Ordering::SeqCst);
            (self.wake)(WaitToken(token));
        }
    }

    /// Decides whether the request of this slot may run. Its range and token are stored.
    fn settle(&self, slot: Slot, ticket: u64, span: Span) -> Entered {
        let entry = self.entry(slot);
        let word = ticket << STATE_BITS;
        // ORDERING: SeqCst, the publication `S` of the module's argument: comes before the looks of `scan`.
        entry.word.store(word | SCANNING, Ordering::SeqCst);
        loop {
            match self.scan(slot, ticket, span) {
                Scan::Clear => {
                    // ORDERING: Release is enough: who still reads SCANNING looks again or parks.
                    entry.word.store(word | RUNNING, Ordering::Release);
                    return Entered::Running(slot);
                }
                Scan::Blocked => {}
                Scan::Stuck => return self.give_up(slot),
            }
            // ORDERING: SeqCst: the count is raised before PARKED can be seen, so who frees an entry after that
            // finds it above 0.
            self.parked.fetch_add(1, Ordering::SeqCst);
            // ORDERING: SeqCst: parked before the second look.
            entry.word.store(word | PARKED, Ordering::SeqCst);
            if matches!(self.scan(slot, ticket, span), Scan::Blocked) {
                return Entered::Parked(slot);
            }
            // ORDERING: SeqCst, success is a new publication `S`. Failure: a waker has claimed us.
            let back = entry.word.compare_exchange(
                word | PARKED,
                word | SCANNING,
                Ordering::SeqCst,
                Ordering::Relaxed,
            );
            if back.is_err() {
                return Entered::Parked(slot);
            }
            // ORDERING: SeqCst; see above.
            self.parked.fetch_sub(1, Ordering::SeqCst);
        }
    }

    fn give_up(&self, slot: Slot) -> Entered {
        self.leave(slot);
        Entered::Full
    }

    /// Looks at all other entries that overlap.
    fn scan(&self, own: Slot, ticket: u64, span: Span) -> Scan {
        let mut found = Scan::Clear;
        self.for_each_occupied(|slot| {
            if slot != own {
                found = self.look(slot, ticket, span);
            }
            matches!(found, Scan::Clear)
        });
        found
    }

    /// Looks at one other entry until it has decided.
    fn look(&self, slot: Slot, ticket: u64, span: Span) -> Scan {
        let entry = self.entry(slot);
        let mut looks = 0_u32;
        loop {
            let Some((word, other)) = entry.load() else { return Scan::Clear };
            if !span.overlaps(other) {
                return Scan::Clear;
            }
            match (word & STATE_MASK, word >> STATE_BITS < ticket) {
                (RUNNING, _) | (_, true) => return Scan::Blocked,
                (SCANNING, false) => {}
                (_, false) => return Scan::Clear,
            }
            looks += 1;
            if looks < SPINS {
                std::hint::spin_loop();
            } else if looks < SPINS + YIELDS {
                // The other thread was interrupted between publishing and deciding.
                std::thread::yield_now();
            } else {
                return Scan::Stuck;
            }
        }
    }

    /// Calls `visit` for each claimed entry until it answers `false`.
    fn for_each_occupied(&self, mut visit: impl FnMut(Slot) -> bool) {
        for (index, word) in self.occupied.iter().enumerate() {
            // ORDERING: SeqCst: a claim that this misses comes later in the total order than everything we
            // stored before, so its owner sees us.
            let mut bits = word.load(Ordering::SeqCst);
            while bits != 0 {
                let bit = bits.trailing_zeros() as usize;
                bits &= bits - 1;
                if !visit(Slot((index * WORD_BITS + bit) as u16)) {
                    return;
                }
            }
        }
    }

    /// Takes the lowest free entry: at small depths the same few cache lines are used again and again.
    fn claim(&self) -> Option<Slot> {
        for (index, word) in self.occupied.iter().enumerate() {
            // ORDERING: Relaxed: a hint; the fetch_or decides.
            let mut bits = word.load(Ordering::Relaxed);
            while bits != u64::MAX {
                let bit = (!bits).trailing_zeros() as usize;
                // ORDERING: SeqCst: the claim comes before our publication in the total order; it also acquires
                // what the previous user released.
                bits = word.fetch_or(1 << bit, Ordering::SeqCst);
                if bits & (1 << bit) == 0 {
                    return Some(Slot((index * WORD_BITS + bit) as u16));
                }
            }
        }
        None
    }

    fn entry(&self, slot: Slot) -> &Entry {
        &self.entries[usize::from(slot.0)]
    }

    const fn position(slot: Slot) -> (usize, u64) {
        let index = slot.0 as usize;
        (index / WORD_BITS, 1 << (index % WORD_BITS))
    }
}

#[cfg(test)]
#[path = "inflight_tests.rs"]
mod tests;
