//! The capture mode and the gap protocol. `docs/formats/ring.md` has the argument; `tests/loom_mode.rs` walks it.
//!
//! One word holds `(generation, reason, mode)`. Everything that makes history lose a change raises the generation
//! *before* the guest can learn that the change happened, and every generation has its gap-begin published before
//! that, too. A resync may end generation `g` only while the word still says `g`; readers ignore an end of an older
//! generation than the one open. So an end that races with a new loss closes nothing.

use journal_format::{ByteRange, GapReason, ImageTag, Lsn};

use crate::layout::kind;
use crate::producer::Producer;
use crate::slots::{Class, Entry};
use crate::sync::{Ordering, fence};

/// What capture does with a guest's request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Mode {
    /// Nothing: not attached yet, detached, or ended by a fault.
    Off = 0,
    /// Only marks what it changes as dirty: the ring was full.
    Tracking = 1,
    /// Records it.
    Capturing = 2,
}

/// The mode word, taken apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ModeWord {
    /// Number of the newest gap of this ring; 0 before the first.
    pub generation: u64,
    /// Why that gap began; `None` before the first.
    pub reason: Option<GapReason>,
    /// What happens to requests now.
    pub mode: Mode,
}

impl ModeWord {
    pub(crate) const fn unpack(word: u64) -> Self {
        let mode = match word as u8 {
            1 => Mode::Tracking,
            2 => Mode::Capturing,
            _ => Mode::Off,
        };
        Self { generation: word >> 16, reason: GapReason::from_u8((word >> 8) as u8), mode }
    }

    const fn pack(self) -> u64 {
        let reason = match self.reason {
            Some(reason) => reason as u64,
            None => 0,
        };
        self.generation << 16 | reason << 8 | self.mode as u64
    }

    const fn next(self, reason: GapReason, mode: Mode) -> Self {
        Self { generation: self.generation.saturating_add(1), reason: Some(reason), mode }
    }
}

/// A request that goes to the disk without a record: its range is dirty.
#[derive(Debug)]
#[must_use = "the gap cannot end until end_tracked is called"]
pub struct Tracked {
    range: ByteRange,
}

/// What became of an attempt to end the gap.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Resync {
    /// The gap is closed; every point from this LSN on is restorable.
    Done(Lsn),
    /// There is no open gap.
    Whole,
    /// Chunks are dirty, or a fill is under way: go on copying.
    Dirty,
    /// Requests that went untracked are still in flight, the gap is held, or a new one is beginning: try again shortly.
    Busy,
    /// Not capturing: the agent has to make room first ([`Producer::try_resume`]), or capture is off.
    Paused,
    /// No slot is left for the record: try again when the agent has taken some out.
    Full,
}

impl Producer {
    /// Starts the epoch: everything is dirty, the first record is a gap-begin of generation 1 for the reason that the
    /// ring was made with, and requests are captured from here on. Call it once per ring.
    ///
    /// # Errors
    /// [`crate::Full`] when the ring has been used already.
    pub fn attach(&self) -> Result<Lsn, crate::Full> {
        let ring = &self.ring;
        if ring.mode().generation != 0 || ring.slots().tail() != 0 {
            return Err(crate::Full::Slots);
        }
        if let Some(disk) = ByteRange::new(0, ring.disk_bytes()) {
            self.mark_dirty(disk);
        }
        let begins = ring.config().begins;
        let entry = Entry { kind: kind::GAP_BEGIN, offset: 1, reason: begins as u16, ..Entry::default() };
        let (lsn, _) = self.bare(Class::Control, entry)?;
        let words = ring.memory().words();
        // ORDERING: Release pairs with the loads of both words: the gap-begin is published.
        words.gap_begun.fetch_max(1, Ordering::Release);
        let word = ModeWord { generation: 1, reason: Some(begins), mode: Mode::Capturing };
        // ORDERING: SeqCst, like every change of the mode.
        words.mode.store(word.pack(), Ordering::SeqCst);
        Ok(lsn)
    }

    /// Ends the epoch in order: requests are no longer captured. The caller waits for those in flight. False when that
    /// had been done, or capture has ended some other way: the disk may have been written since.
    pub fn detach(&self) -> bool {
        self.change(|word| (word.mode != Mode::Off).then_some(ModeWord { mode: Mode::Off, ..word }))
    }

    /// Right after a [`Producer::detach`] that was true, when no request is in flight: history is whole up to here, and
    /// the disk is left as `image`. Publishes that as the last record. False, and nothing is published, when history has
    /// a gap or the ring no slot.
    #[must_use]
    pub fn close(&self, image: ImageTag) -> bool {
        let ring = &self.ring;
        let words = ring.memory().words();
        // ORDERING: Acquire as in `finish_resync`: whoever had something to mark or to publish has done it.
        let busy = words.untracked.load(Ordering::Acquire) != 0 || words.fills.load(Ordering::Acquire) != 0;
        // ORDERING: pairs with the store in `stop`.
        let stopped = words.stopped.load(Ordering::SeqCst) != 0;
        if ring.mode().mode != Mode::Off || busy || stopped || ring.gap_is_open() || ring.dirty().any() {
            return false;
        }
        let [offset, length] = image.halves();
        let entry = Entry { kind: kind::CLOSE, offset, length, ..Entry::default() };
        self.bare(Class::Control, entry).is_ok()
    }

    /// After [`Producer::attach`], before the first request: the disk is as the last epoch left it, so nothing has to be
    /// read. The gap ends as soon as somebody asks for it ([`Producer::finish_resync`]).
    pub fn unchanged(&self) {
        let dirty = self.ring.dirty();
        while dirty.take_run(0, u64::MAX).is_some() {}
    }

    /// Ends capture because of a fault, with a gap record so that history says so.
    pub fn turn_off(&self, reason: GapReason) {
        self.count_untracked();
        if self.change(|word| (word.mode != Mode::Off).then_some(word.next(reason, Mode::Off))) {
            self.ensure_gap_begun();
        }
        self.uncount_untracked();
    }

    /// The ring is full: requests are only tracked from here on. Publishes the gap-begin. Does nothing unless
    /// capturing.
    pub fn enter_tracking(&self, reason: GapReason) {
        self.count_untracked();
        if self.change(|word| (word.mode == Mode::Capturing).then_some(word.next(reason, Mode::Tracking))) {
            self.ensure_gap_begun();
        }
        self.uncount_untracked();
    }

    /// History has lost something although requests are captured (a failed write, contents changed behind the
    /// guest's back): opens a gap, in the same mode. The caller has marked what is dirty.
    pub fn begin_gap(&self, reason: GapReason) {
        self.count_untracked();
        if self.change(|word| (word.mode != Mode::Off).then_some(word.next(reason, word.mode))) {
            self.ensure_gap_begun();
        }
        self.uncount_untracked();
    }

    /// Opens a gap that does not end before [`Producer::release_gap`]: no point between the two may be offered.
    pub fn hold_gap(&self, reason: GapReason) {
        self.count_untracked();
        self.begin_gap(reason);
    }

    /// The gap of one [`Producer::hold_gap`] may end.
    pub fn release_gap(&self) {
        self.uncount_untracked();
    }

    /// Begins a request that is only tracked: marks its range dirty. `None` when the mode is no longer tracking:
    /// look at the mode again.
    #[must_use]
    pub fn begin_tracked(&self, range: ByteRange) -> Option<Tracked> {
        self.count_untracked();
        // ORDERING: the fence pairs with the one in `finish_resync`: either we see that capture has resumed, or the
        // one that ends the gap sees that we are in flight.
        fence(Ordering::SeqCst);
        if self.ring.mode().mode != Mode::Tracking {
            self.uncount_untracked();
            return None;
        }
        self.mark_dirty(range);
        Some(Tracked { range })
    }

    /// As [`Producer::begin_tracked`], in any mode, for a request whose range the caller marks.
    pub(crate) fn track_anyhow(&self, range: ByteRange) -> Tracked {
        self.count_untracked();
        Tracked { range }
    }

    /// The disk has answered a tracked request, well or not. To be called before the guest learns of it: publishes
    /// the gap-begin if nobody has, and marks the range again, because a resync may have read it too early.
    pub fn end_tracked(&self, tracked: Tracked) {
        self.ensure_gap_begun();
        self.mark_dirty(tracked.range);
        self.uncount_untracked();
    }

    /// There is room again: goes from tracking back to capturing, if the ring really has room. True when capturing.
    #[must_use]
    pub fn try_resume(&self) -> bool {
        match self.ring.mode().mode {
            Mode::Capturing => true,
            Mode::Off => false,
            Mode::Tracking => {
                self.ring.has_room()
                    && self.change(|word| {
                        (word.mode == Mode::Tracking).then_some(ModeWord { mode: Mode::Capturing, ..word })
                    })
            }
        }
    }

    /// Ends the gap if everything that was lost has been copied. Called by whoever copies dirty chunks, when it
    /// finds no more of them.
    pub fn finish_resync(&self) -> Resync {
        let words = self.ring.memory().words();
        let word = self.ring.mode();
        if word.mode != Mode::Capturing {
            return Resync::Paused;
        }
        if !self.ring.gap_is_open() {
            return Resync::Whole;
        }
        // ORDERING: pairs with the fence in `begin_tracked`.
        fence(Ordering::SeqCst);
        // ORDERING: Acquire pairs with `uncount_untracked`: when nobody is in flight, their last marks and their
        // gap-begin are visible below. Before the bitmap, because they mark and then leave.
        if words.untracked.load(Ordering::Acquire) != 0 {
            return Resync::Busy;
        }
        // ORDERING: Acquire pairs with `end_fill`, likewise.
        if words.fills.load(Ordering::Acquire) != 0 || self.ring.dirty().any() {
            return Resync::Dirty;
        }
        // ORDERING: Acquire pairs with `ensure_gap_begun`. An end without its begin would close nothing.
        if words.gap_begun.load(Ordering::Acquire) < word.generation || self.ring.mode() != word {
            return Resync::Busy;
        }
        let entry = Entry { kind: kind::GAP_END, offset: word.generation, ..Entry::default() };
        let Ok((lsn, _)) = self.bare(Class::Control, entry) else { return Resync::Full };
        // ORDERING: Release pairs with `Ring::gap_is_open`.
        words.gap_ended.fetch_max(word.generation, Ordering::Release);
        Resync::Done(lsn)
    }

    /// Marks a range dirty; a range beyond the bitmap ends capture, because it would be forgotten.
    pub fn mark_dirty(&self, range: ByteRange) {
        if !self.ring.dirty().mark(range) {
            self.stop();
        }
    }

    /// Publishes the gap-begin of the present generation, unless that was done. More than one thread may do it.
    fn ensure_gap_begun(&self) {
        let words = self.ring.memory().words();
        let word = self.ring.mode();
        // ORDERING: Acquire pairs with the fetch_max below: the record was published before.
        if words.gap_begun.load(Ordering::Acquire) >= word.generation {
            return;
        }
        let reason = word.reason.map_or(0, |reason| reason as u16);
        let entry = Entry { kind: kind::GAP_BEGIN, offset: word.generation, reason, ..Entry::default() };
        if self.bare(Class::Control, entry).is_err() {
            self.stop();
            return;
        }
        // ORDERING: Release as above.
        words.gap_begun.fetch_max(word.generation, Ordering::Release);
    }

    /// The last resort: capture has lost something and has no slot to say so. Says it in the header instead:
    /// nothing that is reserved from now on may be used. The guest goes on.
    fn stop(&self) {
        let words = self.ring.memory().words();
        // ORDERING: before the RMW on `tail`, which every later reservation follows in its modification order, so
        // the consumer of any later record sees it.
        words.stopped.store(1, Ordering::SeqCst);
        let from = words.tail.fetch_add(0, Ordering::AcqRel).wrapping_add(1);
        // ORDERING: Release pairs with the consumer's Acquire. The first one to stop has the smallest number.
        let _ = words.stopped_at.compare_exchange(0, from, Ordering::Release, Ordering::Relaxed);
        self.detach();
    }

    /// Counts a request, a held gap or a gap-begin that `finish_resync` has to wait for. Before the mode is read.
    fn count_untracked(&self) {
        // ORDERING: AcqRel chains it to whoever counted down before: their gap-begin is visible to us.
        self.ring.memory().words().untracked.fetch_add(1, Ordering::AcqRel);
    }

    fn uncount_untracked(&self) {
        // ORDERING: Release pairs with the Acquire in `finish_resync`: our marks and our gap-begin are visible.
        self.ring.memory().words().untracked.fetch_sub(1, Ordering::AcqRel);
    }

    /// Changes the mode word if `next` has a successor for it; true when it did.
    fn change(&self, next: impl Fn(ModeWord) -> Option<ModeWord>) -> bool {
        let words = self.ring.memory().words();
        // ORDERING: SeqCst, like every change of the mode.
        words
            .mode
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |seen| {
                next(ModeWord::unpack(seen)).map(ModeWord::pack)
            })
            .is_ok()
    }
}
