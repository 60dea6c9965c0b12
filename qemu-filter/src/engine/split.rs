//! Requests that reach us in parts.
//!
//! QEMU's block layer hands some of a guest's requests to the disk's driver in several calls, one after the other in
//! one coroutine: zeroes that are not aligned to the driver's unit as head, middle and tail, long ones at the driver's
//! limits. The disk then holds a part of the request for a while, which no crash of the guest's own making explains.
//! So the parts are one request here: it begins with the first part, with its whole range, and its record is published
//! after the last. Between the calls a [`Split`] is kept under the caller's token ([`Capture::hold`]).
//!
//! | whole request | its record |
//! | --- | --- |
//! | zeroes | one zero; how the driver's callbacks got them there does not matter, but every byte of data must be 0 |
//! | discard | one discard of what was done: drivers refuse the parts that they cannot discard |
//! | write, up to [`MAX_WRITE_BYTES`] | one write |
//! | longer write | one for each part, inside a gap that ends after the last |
//!
//! A request that ends early ends as a failed one: its range is read back.
//!
//! # A request whose end is not seen
//!
//! The block layer may give a request up between two parts, out of memory or when a flush fails. What was held for it
//! would keep others that overlap waiting for good. So the glue looks after requests that stay held
//! ([`Capture::longest_held`]) and asks QEMU how they stand ([`Capture::look_after_held`]): those that are over end. And
//! when the same coroutine comes with another request, [`Split::continues`] says so.
//!
//! Where a disk has several threads, QEMU may also make a request wait between two parts, for one that came at the same
//! moment and that waits for it here: neither would ever go on. (A part of zeroes that are padded waits for requests
//! that QEMU has just noted; one of these then takes it for one that is waiting already, and passes it.) Then the held
//! request gives way: it goes on without a record, in a gap that lasts until it ends, and its range is read back.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use capture_ring::Producer;
use journal_format::{ByteRange, GapReason};

use super::capture::Capture;
use super::grace::Phase;
use super::inflight::ENTRIES;
use super::request::State;
use super::{Begin, InFlight, Kind, MAX_WRITE_BYTES, Outcome, Piece, Request, SyncWait, WaitToken};

/// A request of which not all parts have come.
#[derive(Debug)]
pub struct Split {
    progress: Progress,
    /// Idle for one whose parts are requests of their own.
    in_flight: InFlight,
}

/// How far a request has come.
#[derive(Debug)]
struct Progress {
    request: Request,
    begun: bool,
    /// Where the next part begins.
    next: u64,
    /// What was done; empty for nothing.
    done: ByteRange,
    /// It cannot be told what the disk holds.
    spoilt: bool,
}

impl Split {
    /// A whole request, before its first part.
    #[must_use]
    pub fn new(request: Request) -> Self {
        let progress = Progress { request, begun: false, next: request.offset, done: NOTHING, spoilt: false };
        Self { progress, in_flight: InFlight::default() }
    }

    /// The whole request.
    #[must_use]
    pub const fn request(&self) -> &Request {
        &self.progress.request
    }

    /// Whether a part at `offset` of the request on `whole` goes on with this one.
    #[must_use]
    pub fn continues(&self, whole: ByteRange, offset: u64) -> bool {
        self.progress.range() == whole && self.progress.next == offset
    }

    /// Whether each part is recorded by itself: begin and finish it as a request, and then [`Capture::end_part`].
    #[must_use]
    pub const fn is_recorded_in_parts(&self) -> bool {
        let request = self.request();
        matches!(request.kind, Kind::Write { .. }) && request.length > MAX_WRITE_BYTES
    }

    /// The memory of a part of `length` bytes at `offset`, cut into `places`. Empty when the part is to be issued from
    /// the caller's own buffers.
    #[must_use]
    pub fn pieces<'a>(&self, offset: u64, length: u64, places: &'a mut [Piece]) -> &'a [Piece] {
        let mut skip = offset.saturating_sub(self.request().offset) as usize;
        let (mut left, mut used) = (length as usize, 0);
        for piece in self.in_flight.pieces() {
            if skip >= piece.len {
                skip -= piece.len;
                continue;
            }
            let Some(place) = places.get_mut(used).filter(|_| left > 0) else { break };
            *place = piece.tail(skip).first(left);
            left -= place.len;
            (skip, used) = (0, used + 1);
        }
        // Bytes behind the request's end have no place.
        if left == 0 { places.get(..used).unwrap_or(&[]) } else { &[] }
    }

    /// The disk was given other bytes than the request's kind says: what it holds has to be read back.
    pub const fn spoil(&mut self) {
        self.progress.spoilt = true;
    }

    /// After it has ended: what has to be durable before the guest is told.
    #[must_use]
    pub fn sync_wait(&self) -> Option<SyncWait> {
        self.in_flight.sync_wait()
    }
}

impl Progress {
    fn range(&self) -> ByteRange {
        ByteRange::new(self.request.offset, self.request.length).unwrap_or(NOTHING)
    }

    /// Notes how a part ended; how the whole has, if it has.
    fn note(&mut self, part: ByteRange, ended: PartEnd) -> Option<Outcome> {
        match ended {
            PartEnd::Failed => return Some(Outcome::Failed),
            PartEnd::Refused if self.done.is_empty() => return Some(Outcome::NotDone),
            PartEnd::Refused => return Some(Outcome::Failed),
            PartEnd::ComesAgain => {
                self.next = part.offset();
                return None;
            }
            PartEnd::NotDone => {}
            PartEnd::Done => {
                let within = part.intersection(self.range()).unwrap_or(NOTHING);
                self.spoilt |= !self.done.is_empty() && self.done.end() != within.offset();
                let start = if self.done.is_empty() { within.offset() } else { self.done.offset() };
                self.done = ByteRange::new(start, within.end().saturating_sub(start)).unwrap_or(NOTHING);
            }
        }
        self.next = part.end();
        (part.end() >= self.range().end()).then(|| self.outcome())
    }

    fn outcome(&self) -> Outcome {
        let is_whole = self.done == self.range() || self.request.kind == Kind::Discard;
        match (self.done.is_empty(), self.spoilt) {
            (true, _) => Outcome::NotDone,
            (false, false) if is_whole => Outcome::Succeeded,
            (false, _) => Outcome::Failed,
        }
    }
}

/// How a part of a request ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PartEnd {
    /// The disk did it.
    Done,
    /// The disk did not do it, and the request goes on.
    NotDone,
    /// The disk did not do it, and the part comes again in another way.
    ComesAgain,
    /// The disk did not do it, and the request ends.
    Refused,
    /// The request has failed.
    Failed,
}

/// How a request stands of which the next part has not come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Standing {
    /// It is in flight.
    GoesOn,
    /// It is in flight, and QEMU has it wait for another request.
    Waits,
    /// It has ended.
    Over,
}

const NOTHING: ByteRange = match ByteRange::new(0, 0) {
    Some(range) => range,
    None => panic!("the empty range is a range"),
};

const FREE: u64 = 0;
const BUSY: u64 = 1;

/// One held request.
struct Entry {
    /// [`FREE`], [`BUSY`], or the number of the holding, used once.
    number: AtomicU64,
    token: AtomicUsize,
    /// Where the whole request ends.
    end: AtomicU64,
    /// It was found waiting at a look.
    waits: AtomicBool,
    /// Touched only by who has made the entry busy, so nobody ever waits for the lock.
    split: Mutex<Option<Kept>>,
}

/// A request between two parts, without the addresses of its memory.
struct Kept {
    progress: Progress,
    phase: Phase,
    state: State,
}

impl Kept {
    fn of(split: Split) -> Self {
        Self { progress: split.progress, phase: split.in_flight.phase, state: split.in_flight.state }
    }

    fn split(self, producer: &Producer) -> Split {
        let mut in_flight =
            InFlight { request: self.progress.request, phase: self.phase, ..InFlight::default() };
        if let (Kind::Write { .. }, State::Captured(_, ticket)) = (self.progress.request.kind, &self.state) {
            in_flight.pieces.set(producer.pieces(ticket));
        }
        in_flight.state = self.state;
        Split { progress: self.progress, in_flight }
    }
}

/// The requests of a disk that are between two parts.
pub(super) struct Held {
    count: AtomicUsize,
    /// One past the highest entry that was ever used.
    ever_used: AtomicUsize,
    next_number: AtomicU64,
    entries: Box<[Entry]>,
}

impl Held {
    pub(super) fn new() -> Self {
        let entry = |_| Entry {
            number: AtomicU64::new(FREE),
            token: AtomicUsize::new(0),
            end: AtomicU64::new(0),
            waits: AtomicBool::new(false),
            split: Mutex::new(None),
        };
        Self {
            count: AtomicUsize::new(0),
            ever_used: AtomicUsize::new(0),
            next_number: AtomicU64::new(BUSY + 1),
            // As many as there can be requests in flight that are recorded.
            entries: (0..ENTRIES).map(entry).collect(),
        }
    }

    /// Changes what is under the entry's number, if that is still the same; it stays under it, also when `change` panics.
    fn change<T>(&self, entry: &Entry, number: u64, change: impl FnOnce(&mut Kept) -> T) -> Option<T> {
        struct Again<'a>(&'a Entry, u64);
        impl Drop for Again<'_> {
            fn drop(&mut self) {
                // ORDERING: Release pairs with the Acquire in `take` and `each`.
                self.0.number.store(self.1, Ordering::Release);
            }
        }
        // ORDERING: as in `take`.
        entry.number.compare_exchange(number, BUSY, Ordering::Acquire, Ordering::Relaxed).ok()?;
        let _again = Again(entry, number);
        entry.split.lock().unwrap_or_else(PoisonError::into_inner).as_mut().map(change)
    }

    /// Takes what that token holds. Waits while somebody changes it: a few instructions, once in the life of a request
    /// that gives way.
    fn take_of(&self, token: WaitToken) -> Option<Kept> {
        // ORDERING: Relaxed: see `put`.
        let used = self.ever_used.load(Ordering::Relaxed).min(self.entries.len());
        for entry in &self.entries[..used] {
            loop {
                // ORDERING: Acquire as in `each`.
                let number = entry.number.load(Ordering::Acquire);
                // ORDERING: Relaxed: as in `each`.
                if number == FREE || entry.token.load(Ordering::Relaxed) != token.0 {
                    break;
                }
                if number == BUSY {
                    std::hint::spin_loop();
                } else if let Some(kept) = self.take(entry, number) {
                    return Some(kept);
                }
            }
        }
        None
    }

    /// Takes what is under the entry's number, if that is still the same.
    fn take(&self, entry: &Entry, number: u64) -> Option<Kept> {
        // ORDERING: Acquire pairs with the Release in `put`: the split is there. One of all takers wins.
        entry.number.compare_exchange(number, BUSY, Ordering::Acquire, Ordering::Relaxed).ok()?;
        let split = entry.split.lock().unwrap_or_else(PoisonError::into_inner).take();
        // ORDERING: Relaxed: published by the number.
        entry.token.store(0, Ordering::Relaxed);
        // ORDERING: Release pairs with the Acquire of the next one to claim the entry.
        entry.number.store(FREE, Ordering::Release);
        // ORDERING: Relaxed: see `any`.
        self.count.fetch_sub(1, Ordering::Relaxed);
        split
    }

    fn put(&self, token: WaitToken, split: Split) -> Result<(), Box<Split>> {
        for (index, entry) in self.entries.iter().enumerate() {
            // ORDERING: Acquire pairs with the Release in `take`.
            if entry.number.compare_exchange(FREE, BUSY, Ordering::Acquire, Ordering::Relaxed).is_err() {
                continue;
            }
            // ORDERING: Relaxed: all three are published by the number.
            entry.token.store(token.0, Ordering::Relaxed);
            entry.end.store(split.progress.range().end(), Ordering::Relaxed);
            entry.waits.store(false, Ordering::Relaxed);
            *entry.split.lock().unwrap_or_else(PoisonError::into_inner) = Some(Kept::of(split));
            // ORDERING: Relaxed: only the numbers matter, each is handed out once.
            let number = self.next_number.fetch_add(1, Ordering::Relaxed);
            // ORDERING: Relaxed: see `any`; who sees an entry too few has none of its own there.
            self.ever_used.fetch_max(index + 1, Ordering::Relaxed);
            self.count.fetch_add(1, Ordering::Relaxed);
            // ORDERING: Release pairs with the Acquire in `take` and `each`.
            entry.number.store(number, Ordering::Release);
            return Ok(());
        }
        Err(Box::new(split))
    }

    /// Whether any request is held. A coroutine always sees what it holds itself.
    fn any(&self) -> bool {
        // ORDERING: Relaxed: a coroutine's own steps are ordered by whoever moves it between threads.
        self.count.load(Ordering::Relaxed) > 0
    }

    /// The entries that hold something: number and token.
    fn each(&self) -> impl Iterator<Item = (&Entry, u64, WaitToken)> {
        // ORDERING: Relaxed: see `put`.
        let used = self.ever_used.load(Ordering::Relaxed).min(self.entries.len());
        self.entries[..used].iter().filter_map(|entry| {
            // ORDERING: Acquire pairs with `put`: the token is that number's, or a later one's.
            let number = entry.number.load(Ordering::Acquire);
            // ORDERING: Relaxed: as above.
            (number > BUSY).then(|| (entry, number, WaitToken(entry.token.load(Ordering::Relaxed))))
        })
    }
}

impl Capture {
    /// Whether any request of this disk is between two parts.
    #[inline]
    #[must_use]
    pub fn holds_any(&self) -> bool {
        self.held().any()
    }

    /// Before a part: begins the whole request, once. As [`Capture::begin`].
    pub fn begin_split(&self, split: &mut Split, token: WaitToken) -> Begin {
        if split.progress.begun {
            return Begin::Go;
        }
        let begin = if split.is_recorded_in_parts() {
            self.begin_large();
            Begin::Go
        } else {
            self.begin(&split.progress.request, token, &mut split.in_flight)
        };
        split.progress.begun = begin == Begin::Go;
        begin
    }

    /// After a part: finishes the whole request when it has ended, and gives it back; else keeps it for the next part.
    pub fn end_part(
        &self,
        mut split: Split,
        part: ByteRange,
        ended: PartEnd,
        token: WaitToken,
    ) -> Option<Split> {
        if let Some(outcome) = split.progress.note(part, ended) {
            self.finish_split(&mut split, outcome);
            return Some(split);
        }
        self.hold(token, split);
        None
    }

    fn hold(&self, token: WaitToken, split: Split) {
        if let Err(mut split) = self.held().put(token, split) {
            self.fault("more requests came in parts than can be in flight; attach again");
            self.finish_split(&mut split, Outcome::Failed);
        }
    }

    /// The request that the caller's last part left open.
    #[must_use]
    pub fn take_held(&self, token: WaitToken) -> Option<Split> {
        if !self.holds_any() {
            return None;
        }
        self.held().take_of(token).map(|kept| kept.split(self.producer()))
    }

    /// A request that was held and goes on no more: what it has done is read back.
    pub fn give_up_split(&self, mut split: Split) {
        self.finish_split(&mut split, Outcome::Failed);
    }

    /// The number of the request that has been held for longest.
    #[must_use]
    pub fn longest_held(&self) -> Option<u64> {
        if !self.holds_any() {
            return None;
        }
        self.held().each().map(|(_, number, _)| number).min()
    }

    /// Gives up each held request that is over, and lets one give way that is found waiting a second time. `standing` is
    /// asked with its token and where it ends. Any thread.
    pub fn look_after_held(&self, mut standing: impl FnMut(WaitToken, u64) -> Standing) {
        let held = self.held();
        for (entry, number, token) in held.each() {
            // By its number: the token's next request is left alone.
            // ORDERING: Relaxed: published by the number; another's costs one look that finds nothing.
            match standing(token, entry.end.load(Ordering::Relaxed)) {
                // ORDERING: Relaxed: as above; one look too early costs a gap.
                Standing::Waits if entry.waits.swap(true, Ordering::Relaxed) => self.give_way(entry, number),
                Standing::GoesOn | Standing::Waits => {}
                Standing::Over => {
                    if let Some(kept) = held.take(entry, number) {
                        self.give_up_split(kept.split(self.producer()));
                    }
                }
            }
        }
    }

    /// The held request has no record any more, and then excludes nobody. It stays held throughout: as soon as the others
    /// go on, its next part may come.
    fn give_way(&self, entry: &Entry, number: u64) {
        self.protect(|| {
            let lost = self.held().change(entry, number, |kept| match std::mem::take(&mut kept.state) {
                State::Captured(slot, ticket) => {
                    kept.state = State::Tracked(self.producer().lose(ticket));
                    Some(slot)
                }
                state => {
                    kept.state = state;
                    None
                }
            });
            if let Some(slot) = lost.flatten() {
                self.table().leave(slot);
            }
        });
    }

    /// A write begins that is longer than a record can be: a gap, which does not end before [`Capture::end_large`].
    pub fn begin_large(&self) {
        self.protect(|| {
            // Counted, so that nothing is read back before the gap-begin is published.
            let phase = self.count().enter();
            self.producer().hold_gap(GapReason::LargeRequest);
            self.count().leave(phase);
        });
    }

    /// Its last record is published.
    pub fn end_large(&self) {
        self.protect(|| self.producer().release_gap());
    }

    fn finish_split(&self, split: &mut Split, outcome: Outcome) {
        if split.is_recorded_in_parts() {
            self.end_large();
        } else if split.in_flight.is_active() {
            if split.request().kind == Kind::Discard && outcome == Outcome::Succeeded {
                split.in_flight.narrow(split.progress.done);
            }
            self.finish(&mut split.in_flight, outcome);
        }
    }
}

#[cfg(test)]
#[path = "split_tests.rs"]
mod tests;
