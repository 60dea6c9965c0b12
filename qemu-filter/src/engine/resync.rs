//! Reads back what history does not have and ends the gap: the initial sync, the resync after an overflow, after
//! a failed write and after changed contents are this one loop with different bits set.
//!
//! It is a state machine without I/O: [`Resync::step`] says what is to be done, its driver (a coroutine in QEMU, a
//! thread behind the C interface) does it and comes back with the answer. Nothing here yields, so a panic
//! never crosses a switch of stacks.
//!
//! # Order
//!
//! For each run of dirty chunks: *take the bits*, then *reserve the record's slot*, then *look at the disk*.
//! - A write that ends unrecorded after the bits were taken sets them again at its end.
//! - A recorded write that ends after the slot was reserved has a greater LSN and wins on replay.
//!
//! # Holes
//!
//! A hole becomes one zero record and is not read, as far as QEMU's answer goes (a raw file's goes to its end, that of a
//! qcow2 image 32 MiB). That is asked twice: once as a hint, before a slot is reserved, to know what to reserve, and, if
//! it is one, once more with the slot in hand. Asking has a price: QEMU asks the file system where the data ends,
//! however little it was asked about, and the whole program waits for that (7 ms for a file of 1 GiB on tmpfs, which
//! looks at each page). So it is asked before reading only where most may never have been written: when capture
//! begins and when all contents have changed. What a guest has written meanwhile is read, and asked about only
//! behind zeroes.
//!
//! Before the first chunk of a generation, two grace periods pass; `grace` says why. The gap ends when no bit is
//! set, nothing taken is left and the generation is still the same.
//!
//! Fills happen only inside a gap whose gap-begin is published: what they read may hold a part of writes that are
//! not numbered yet, so a point between two fills is not crash-consistent. Whoever begins a gap is counted as in
//! flight until the record is published, so the grace periods see to that as well.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use capture_ring::{FillTicket, Mode, Resync as End};
use journal_format::limits::DIRTY_CHUNK_BYTES;
use journal_format::{ByteRange, GapReason};

use super::capture::Capture;
use super::fault::guard;
use super::limits::{
    FILL_BYTES, FILL_BYTES_PER_S, FIRST_ERROR_PAUSE, IDLE_PAUSE, LONGEST_ERROR_PAUSE, MAX_RUN_BYTES,
    SHORT_PAUSE,
};
use super::request::PieceList;
use super::{Answer, Step};

/// What the driver is doing for us.
enum Asked {
    Nothing,
    /// The status of the first bytes of `pending`.
    Hint,
    /// The status of the range, again, with the slot reserved.
    Zero(FillTicket, ByteRange),
    /// The data of the range.
    Data(FillTicket, ByteRange),
}

/// How far the grace periods before the first chunk of a generation have come.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Grace {
    Due,
    First,
    Second,
    Over,
}

/// What the next bytes of the disk are, as far as asked.
#[derive(Clone, Copy)]
struct Extent {
    end: u64,
    zero: bool,
}

/// [`Step`] without the pieces.
#[derive(Clone, Copy)]
enum Next {
    Status(ByteRange),
    Read(ByteRange),
    Pause(Duration),
    /// Something has changed: decide again, at once.
    Again,
    Stop,
}

/// The resync of one capture; there is at most one at a time, in one coroutine or thread.
pub struct Resync {
    capture: Arc<Capture>,
    asked: Asked,
    pieces: PieceList,
    generation: u64,
    grace: Grace,
    /// Taken out of the bitmap and not read yet; empty for none.
    pending: ByteRange,
    extent: Extent,
    /// What came last in this run was zeroes, read or a hole: a hole may follow.
    zeroes: bool,
    /// Where the bitmap is searched from.
    cursor: u64,
    /// No data is read before then.
    not_before: Duration,
    error_pause: Duration,
    ended: bool,
}

const NOTHING: ByteRange = match ByteRange::new(0, 0) {
    Some(range) => range,
    None => panic!("the empty range is a range"),
};

impl Resync {
    /// The resync of this capture. The capture is not idle until it is dropped or has answered [`Step::Stop`].
    #[must_use]
    pub fn new(capture: Arc<Capture>) -> Self {
        // ORDERING: Relaxed: `is_idle` is asked by who detaches, after the resync was started.
        capture.resyncing().store(true, Ordering::Relaxed);
        Self {
            capture,
            asked: Asked::Nothing,
            pieces: PieceList::EMPTY,
            generation: 0,
            grace: Grace::Due,
            pending: NOTHING,
            extent: Extent { end: 0, zero: false },
            zeroes: false,
            cursor: 0,
            not_before: Duration::ZERO,
            error_pause: FIRST_ERROR_PAUSE,
            ended: false,
        }
    }

    /// What it reads back for.
    #[must_use]
    pub fn capture(&self) -> &Capture {
        &self.capture
    }

    /// Takes the answer to the previous step and says what to do next. `now` is the time of any clock that only
    /// goes forward. Panics of ours are caught here.
    ///
    /// Between [`Step::Read`] and its answer the driver writes to the ring's memory: the `Resync` must not be dropped
    /// there.
    pub fn step(&mut self, answer: Answer, now: Duration) -> Step<'_> {
        let next = guard(|| {
            self.take_answer(answer, now);
            loop {
                let next = self.next(now);
                if !matches!(next, Next::Again) {
                    return next;
                }
            }
        });
        match next {
            Ok(Next::Status(range)) => Step::Status { offset: range.offset(), length: range.length() },
            Ok(Next::Read(range)) => {
                Step::Read { offset: range.offset(), length: range.length(), pieces: self.pieces.as_slice() }
            }
            Ok(Next::Pause(pause)) => Step::Pause(pause),
            Ok(Next::Stop | Next::Again) => {
                self.end();
                Step::Stop
            }
            Err(message) => {
                self.capture.fault(&message);
                self.end();
                Step::Stop
            }
        }
    }

    fn take_answer(&mut self, answer: Answer, now: Duration) {
        match std::mem::replace(&mut self.asked, Asked::Nothing) {
            Asked::Nothing => {}
            Asked::Hint => self.take_hint(answer),
            Asked::Zero(ticket, range) => self.take_zero(answer, ticket, range),
            Asked::Data(ticket, range) => self.take_data(answer, ticket, range, now),
        }
    }

    fn take_hint(&mut self, answer: Answer) {
        let (length, zero) = match answer {
            Answer::Status { length, zero } => (length.clamp(1, self.pending.length()), zero),
            // A driver that cannot say: read all of it.
            _ => (self.pending.length(), false),
        };
        self.extent = Extent { end: self.pending.offset() + length, zero };
    }

    /// The hole was looked at again with its slot reserved.
    fn take_zero(&mut self, answer: Answer, ticket: FillTicket, range: ByteRange) {
        let sure = match answer {
            Answer::Status { length, zero: true } => whole_chunks(range, length),
            _ => 0,
        };
        let (hole, rest) = split(range, sure);
        if hole.is_empty() {
            // Written meanwhile, or the driver is of two minds: read the beginning of it.
            self.capture.producer().cancel_fill(ticket, NOTHING);
            let end = self.pending.end().max(range.end());
            self.pending = ByteRange::new(range.offset(), end - range.offset()).unwrap_or(NOTHING);
            self.extent = Extent { end: range.end().min(range.offset() + FILL_BYTES), zero: false };
        } else {
            self.capture.producer().mark_dirty(rest);
            // It cannot fail: the range is not empty.
            let _ = self.capture.producer().complete_fill_zero(ticket, hole);
            self.zeroes = true;
        }
    }

    fn take_data(&mut self, answer: Answer, ticket: FillTicket, range: ByteRange, now: Duration) {
        self.pieces.clear();
        let producer = self.capture.producer();
        self.zeroes = matches!(answer, Answer::Read { zero: true });
        match answer {
            Answer::Read { zero } => {
                // Neither can fail: the range is not empty and is what was reserved.
                let _ = if zero {
                    producer.complete_fill_zero(ticket, range)
                } else {
                    producer.complete_fill_write(ticket, range)
                };
                self.error_pause = FIRST_ERROR_PAUSE;
                let cost = Duration::from_nanos(range.length() * 1_000_000_000 / FILL_BYTES_PER_S);
                self.not_before = self.not_before.max(now.saturating_sub(SHORT_PAUSE)) + cost;
            }
            // Not readable now (a bad sector, or a shrink that is under way): the rest first, then again.
            _ => {
                producer.cancel_fill(ticket, range);
                self.cursor = range.end();
                self.not_before = now + self.error_pause;
                self.error_pause = (self.error_pause * 2).min(LONGEST_ERROR_PAUSE);
            }
        }
    }

    fn next(&mut self, now: Duration) -> Next {
        let word = self.capture.producer().ring().mode();
        if word.mode != Mode::Capturing || word.generation != self.generation {
            // Whatever was taken belongs to a sync that is over.
            self.put_back();
        }
        match word.mode {
            Mode::Off => return Next::Stop,
            Mode::Tracking => return Next::Pause(IDLE_PAUSE),
            Mode::Capturing => {}
        }
        if word.generation != self.generation && matches!(self.grace, Grace::Over) {
            self.grace = Grace::Due;
        }
        if self.grace != Grace::Over {
            return self.wait_for_grace(word.generation);
        }
        if !self.capture.producer().ring().gap_is_open() {
            return Next::Pause(IDLE_PAUSE);
        }
        if self.pending.is_empty() && !self.take_run() {
            return self.finish();
        }
        let ask_first = word.generation == 1 || word.reason == Some(GapReason::ContentsChanged);
        self.ask(now, ask_first)
    }

    /// Two grace periods after the generation was seen to be capturing.
    fn wait_for_grace(&mut self, generation: u64) -> Next {
        let count = self.capture.count();
        match self.grace {
            Grace::Due => {
                self.generation = generation;
                count.begin_grace();
                self.grace = Grace::First;
            }
            Grace::First | Grace::Second if !count.is_over() => return Next::Pause(SHORT_PAUSE),
            // Another generation has begun meanwhile: from the start.
            Grace::First | Grace::Second if generation != self.generation => self.grace = Grace::Due,
            Grace::First => {
                count.begin_grace();
                self.grace = Grace::Second;
            }
            Grace::Second | Grace::Over => self.grace = Grace::Over,
        }
        Next::Again
    }

    /// Takes the next run of dirty chunks; false when there is none.
    fn take_run(&mut self) -> bool {
        let dirty = self.capture.producer().ring().dirty();
        let run = dirty.take_run(self.cursor, MAX_RUN_BYTES).or_else(|| dirty.take_run(0, MAX_RUN_BYTES));
        // A part beyond the end is that of a growth that is not finished; it sets the bits again when it is.
        let run = run.and_then(|run| run.intersection(ByteRange::new(0, self.capture.disk_bytes())?));
        self.pending = run.unwrap_or(NOTHING);
        self.cursor = self.pending.end();
        self.extent.end = 0;
        self.zeroes = false;
        !self.pending.is_empty()
    }

    fn finish(&self) -> Next {
        match self.capture.producer().finish_resync() {
            End::Done(_) | End::Whole | End::Paused => Next::Pause(IDLE_PAUSE),
            End::Dirty => Next::Again,
            End::Busy | End::Full => Next::Pause(SHORT_PAUSE),
        }
    }

    /// Asks for the next bytes of `pending`; with `ask_first` whether they are a hole before they are read.
    fn ask(&mut self, now: Duration, ask_first: bool) -> Next {
        let start = self.pending.offset();
        if self.extent.end <= start || self.extent.end > self.pending.end() {
            if ask_first || self.zeroes {
                self.asked = Asked::Hint;
                return Next::Status(self.pending);
            }
            self.extent = Extent { end: self.pending.end().min(start + FILL_BYTES), zero: false };
        }
        let hole = whole_chunks(self.pending, self.extent.end - start);
        if self.extent.zero && hole > 0 {
            return self.reserve(hole, true);
        }
        if let Some(wait) = self.not_before.checked_sub(now).filter(|wait| !wait.is_zero()) {
            return Next::Pause(wait.min(LONGEST_ERROR_PAUSE));
        }
        let known = (self.extent.end - start).next_multiple_of(DIRTY_CHUNK_BYTES);
        self.reserve(known.min(FILL_BYTES).min(self.pending.length()), false)
    }

    /// Reserves the slot for the first `length` bytes of `pending`.
    fn reserve(&mut self, length: u64, hole: bool) -> Next {
        let producer = self.capture.producer();
        let Ok(ticket) = producer.reserve_fill(if hole { 1 } else { length as u32 }) else {
            // The guest's own writes come first.
            return Next::Pause(SHORT_PAUSE);
        };
        let (range, rest) = split(self.pending, length);
        if range.end() > self.capture.disk_bytes() {
            // The disk was cut since the bits were taken; see `Capture::finish_resize`.
            self.pending = NOTHING;
            producer.cancel_fill(ticket, range);
            producer.mark_dirty(rest);
            return Next::Again;
        }
        self.pending = rest;
        if hole {
            self.asked = Asked::Zero(ticket, range);
            return Next::Status(range);
        }
        self.pieces.set(producer.fill_pieces(&ticket));
        assert!(self.pieces.total_bytes() == length, "a fill has as much room as was asked for");
        self.asked = Asked::Data(ticket, range);
        Next::Read(range)
    }

    /// Marks again what was taken and not read.
    fn put_back(&mut self) {
        self.capture.producer().mark_dirty(self.pending);
        self.pending = NOTHING;
        self.extent.end = 0;
    }

    fn end(&mut self) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        let asked = std::mem::replace(&mut self.asked, Asked::Nothing);
        // Without a panic there is nothing to catch; with one, the capture is off already.
        let _ = guard(|| {
            if let Asked::Zero(ticket, range) | Asked::Data(ticket, range) = asked {
                self.capture.producer().cancel_fill(ticket, range);
            }
            self.put_back();
        });
        // ORDERING: Release pairs with `Capture::is_idle`: the ring is not touched after this.
        self.capture.resyncing().store(false, Ordering::Release);
    }
}

impl Drop for Resync {
    fn drop(&mut self) {
        self.end();
    }
}

/// How many of the first `length` bytes of the range make whole chunks; a last chunk cut by the range's end counts.
fn whole_chunks(range: ByteRange, length: u64) -> u64 {
    if length >= range.length() { range.length() } else { length - length % DIRTY_CHUNK_BYTES }
}

/// The first `length` bytes of a range, and the rest.
fn split(range: ByteRange, length: u64) -> (ByteRange, ByteRange) {
    let length = length.min(range.length());
    let part = |offset, length| ByteRange::new(offset, length).unwrap_or(NOTHING);
    (part(range.offset(), length), part(range.offset() + length, range.length() - length))
}

#[cfg(test)]
#[path = "resync_tests.rs"]
mod tests;
