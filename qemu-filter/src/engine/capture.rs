//! The life of a request of a protected disk.
//!
//! | mode | a request |
//! | --- | --- |
//! | capturing | waits for overlapping ones, gets room in the ring, is issued from there, is numbered and stamped when the disk has done it |
//! | tracking | marks its range dirty, is issued as it is, marks the range again when it ends |
//! | off | is issued as it is |
//!
//! Capturing becomes tracking when the ring (or the in-flight table) is full: the gap-begin is published
//! before that request is issued, so before the guest can learn that an unrecorded write happened (I4).
//! Tracking becomes capturing when the agent says that there is room ([`Capture::resume`]). A fault of ours
//! ends in off, with a gap (I1); only a new capture gets out of there.
//!
//! A request that fails leaves unknown contents behind: its range becomes dirty and a gap begins, which the
//! resync ends when it has read the range back (I2). A disk that grows gets a gap as well: what a device shows
//! behind its old end need not be zeroes, so it is read.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, OnceLock};

use capture_ring::{Bell, HostClock, Mode, OpKind, Producer, Ring, Ticket};
use journal_format::limits::MAX_DISK_BYTES;
use journal_format::{ByteRange, GapReason, ImageTag, Lsn};

use super::fault::guard;
use super::grace::InFlightCount;
use super::inflight::{Entered, Slot, Span, Table};
use super::request::{InFlight, State};
use super::split::Held;
use super::waiting::{Permission, WaitList};
use super::{Begin, EngineError, Kind, Outcome, Request, Runtime, SyncWait, WaitToken};

/// What a capture is doing, for people and metrics.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Status {
    /// What happens to requests.
    pub mode: Mode,
    /// Number of the newest gap.
    pub generation: u64,
    /// Whether history has a gap now.
    pub gap_is_open: bool,
    /// The last LSN given to a record.
    pub captured_lsn: Lsn,
    /// Bytes of disk that history does not have.
    pub dirty_bytes: u64,
    /// Bytes of the ring's arena in use.
    pub ring_used_bytes: u64,
    /// Requests between begin and finish.
    pub in_flight: u64,
}

/// The capture of one disk during one epoch.
pub struct Capture {
    producer: Producer,
    table: Table,
    count: InFlightCount,
    /// Size of the disk in bytes, for the resync; see `finish_resize` for when it changes.
    disk_bytes: AtomicU64,
    resyncing: AtomicBool,
    /// A request has gone its way because capture was off.
    unseen: AtomicBool,
    fault: OnceLock<String>,
    room: WaitList,
    durable: WaitList,
    held: Held,
    permission: Permission,
    /// Nobody takes records out of the ring.
    agent_away: AtomicBool,
    now_ns: fn() -> u64,
}

impl core::fmt::Debug for Capture {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Capture").field("ring", self.producer.ring()).finish_non_exhaustive()
    }
}

impl Capture {
    /// Starts a capture with the descriptors of the agent's Attach message: every byte of the disk is dirty, the
    /// gap of the initial sync has begun, and requests are captured from here on.
    ///
    /// Before the first [`super::Resync::step`] no request of the guest may be in flight that has not passed
    /// [`Capture::begin`]: its effect could be read too early and then be forgotten. So attach to a drained disk.
    ///
    /// # Errors
    /// [`EngineError`] when a descriptor is not what it should be, or the ring has been used.
    pub fn attach(
        ring: BorrowedFd<'_>,
        clock: BorrowedFd<'_>,
        wake: OwnedFd,
        runtime: Runtime,
    ) -> Result<Arc<Self>, EngineError> {
        let ring = Ring::open(ring)?;
        ring.warm();
        let producer = Producer::new(ring, HostClock::open(clock)?, Bell::from(wake));
        Self::over(producer, runtime)
    }

    /// As [`Capture::attach`], over a producer of this process.
    pub(crate) fn over(producer: Producer, runtime: Runtime) -> Result<Arc<Self>, EngineError> {
        producer.attach().map_err(|_| EngineError::ring_used())?;
        let disk_bytes = AtomicU64::new(producer.ring().disk_bytes());
        Ok(Arc::new(Self {
            producer,
            table: Table::new(runtime.wake),
            count: InFlightCount::new(),
            disk_bytes,
            resyncing: AtomicBool::new(false),
            unseen: AtomicBool::new(false),
            fault: OnceLock::new(),
            room: WaitList::new(runtime.wake),
            durable: WaitList::new(runtime.wake),
            held: Held::new(),
            permission: Permission::new(),
            agent_away: AtomicBool::new(false),
            now_ns: runtime.now_ns,
        }))
    }

    /// Before the disk request. Never blocks and never fails the guest; panics of ours are caught here.
    #[inline]
    pub fn begin(&self, request: &Request, token: WaitToken, in_flight: &mut InFlight) -> Begin {
        guard(|| self.try_begin(request, token, in_flight)).unwrap_or_else(|message| {
            self.fault(&message);
            self.give_up(in_flight);
            Begin::Go
        })
    }

    /// Takes back a request that was told to wait: `true`, and it never began. `false` when its token is being woken:
    /// wait for that, then begin again.
    #[must_use]
    pub fn withdraw(&self, in_flight: &mut InFlight) -> bool {
        let withdrawn = match in_flight.state {
            State::Parked(slot) => self.table.unpark(slot),
            State::Waiting(place) => self.leave_room(place),
            _ => false,
        };
        if !withdrawn {
            return false;
        }
        self.leave_table(in_flight);
        in_flight.state = State::Idle;
        self.count.leave(in_flight.phase);
        true
    }

    /// After the disk has answered, before the guest is told. Panics of ours are caught here.
    #[inline]
    pub fn finish(&self, in_flight: &mut InFlight, outcome: Outcome) {
        let counted = in_flight.is_active();
        if let Err(message) = guard(|| self.try_finish(in_flight, outcome)) {
            self.fault(&message);
            in_flight.state = State::Idle;
            if counted {
                self.count.leave(in_flight.phase);
            }
        }
    }

    /// At the start of a guest's flush: marks the point. Without room in the ring the mark is left out, which
    /// loses nothing else. What is returned has to be durable before the flush completes: see
    /// [`Capture::wait_durable`].
    #[must_use]
    pub fn flush(&self) -> Option<SyncWait> {
        let mark = || {
            // Without a mark: everything that the guest has seen complete has a record by now.
            let lsn = || self.producer.flush_record().unwrap_or_else(|_| self.producer.ring().captured_lsn());
            (self.mode() == Mode::Capturing).then(lsn)
        };
        let lsn = guard(mark).unwrap_or_else(|message| {
            self.fault(&message);
            None
        });
        lsn.map(SyncWait::new)
    }

    /// The contents were changed behind the guest's back (snapshot revert, migration, a commit into the node):
    /// all of it has to be read again, and history has a gap until then.
    pub fn contents_changed(&self) {
        self.forget_contents(Producer::begin_gap);
    }

    fn forget_contents(&self, open_gap: impl FnOnce(&Producer, GapReason)) {
        self.protect(|| {
            // Counted, so that nothing is read back before the gap-begin is published.
            let phase = self.count.enter();
            self.mark_dirty_to_end(0);
            open_gap(&self.producer, GapReason::ContentsChanged);
            self.count.leave(phase);
        });
    }

    /// As [`Capture::contents_changed`], for a change that takes a while and has just not begun: no point is offered
    /// before [`Capture::end_contents_change`], whatever is read meanwhile.
    pub fn begin_contents_change(&self) {
        self.forget_contents(Producer::hold_gap);
    }

    /// The change is over: all has to be read again, also what was read meanwhile.
    pub fn end_contents_change(&self) {
        self.contents_changed();
        self.protect(|| self.producer.release_gap());
    }

    /// The disk has another size now without a request for it, because another node took its place. Call it while no
    /// request is in flight. What the new node holds behind the old end is read.
    pub fn size_changed(&self, disk_bytes: u64) {
        self.protect(|| {
            if self.mode() != Mode::Off {
                let phase = self.count.enter();
                self.finish_resize(disk_bytes, || self.publish_resized(disk_bytes));
                self.count.leave(phase);
            }
        });
    }

    /// The agent says that there is room again. Returns whether requests are captured now.
    pub fn resume(&self) -> bool {
        guard(|| self.producer.try_resume()).unwrap_or_else(|message| {
            self.fault(&message);
            false
        })
    }

    /// A fault of ours, here or in the glue: capture ends with a gap, the guest goes on (I1).
    pub fn fault(&self, message: &str) {
        // A second panic while cleaning up after the first one is swallowed: nothing is left to be done about it.
        let _ = guard(|| {
            let _ = self.fault.set(message.to_owned());
            self.producer.turn_off(GapReason::FilterFault);
            self.let_parked_go();
        });
    }

    /// Whether an agent is connected: a ring that fills up without one is told as such.
    pub fn set_agent(&self, is_there: bool) {
        // ORDERING: Relaxed: it stands alone, and only says what history tells people.
        self.agent_away.store(!is_there, Ordering::Relaxed);
    }

    pub(crate) fn has_agent(&self) -> bool {
        // ORDERING: Relaxed, as above.
        !self.agent_away.load(Ordering::Relaxed)
    }

    #[cold]
    fn reason_of(&self, full: NoRoom) -> GapReason {
        match full {
            NoRoom::Ring if !self.has_agent() => GapReason::AgentLost,
            NoRoom::Ring | NoRoom::Table => GapReason::Overflow,
        }
    }

    /// Why capture was switched off, if a fault did it.
    #[must_use]
    pub fn fault_message(&self) -> Option<&str> {
        self.fault.get().map(String::as_str)
    }

    /// Ends the capture in order: later requests are not seen, and the resync stops at its next step. Records of
    /// requests in flight are still published; [`Capture::is_idle`] says when the last one was.
    pub fn detach(&self) {
        self.protect(|| {
            self.switch_off();
        });
    }

    /// Call it right after [`Capture::attach`], while the disk is drained: it is as the journal's last epoch left it. The gap of
    /// the initial sync ends without a read.
    pub fn unchanged(&self) {
        self.protect(|| self.producer.unchanged());
    }

    /// As [`Capture::detach`], for a disk that is drained and will not be written through this process any more. `image` says
    /// how it looks from outside, or that nobody can tell; it is asked when later requests are no longer seen and none is
    /// in flight. Then history ends with a close, if it is whole and no request has come unseen since capture ended. When it had
    /// ended before this call, nobody knows that.
    pub fn close(&self, image: impl FnOnce() -> Option<ImageTag>) {
        self.protect(|| {
            if self.switch_off()
                && self.count.total() == 0
                && let Some(image) = image()
                // ORDERING: SeqCst pairs with `pass_unseen`. After the image: a request that comes later shows in its tag.
                && !self.unseen.load(Ordering::SeqCst)
            {
                // Without it the next epoch begins with a comparison.
                let _published = self.producer.close(image);
            }
        });
    }

    /// Whether no request is between begin and finish and no resync is alive. Once detached it stays so.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        // ORDERING: Acquire pairs with the Release at the resync's end.
        self.count.total() == 0 && !self.resyncing.load(Ordering::Acquire)
    }

    /// Requests between begin and finish now.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        self.count.total()
    }

    /// What happens to requests now.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.producer.ring().mode().mode
    }

    /// The state, for people. Counts the dirty bitmap: not for every request.
    #[must_use]
    pub fn status(&self) -> Status {
        let ring = self.producer.ring();
        let word = ring.mode();
        Status {
            mode: word.mode,
            generation: word.generation,
            gap_is_open: ring.gap_is_open(),
            captured_lsn: ring.captured_lsn(),
            dirty_bytes: ring.dirty().bytes(),
            ring_used_bytes: ring.arena_used_bytes(),
            in_flight: self.count.total(),
        }
    }

    pub(crate) const fn producer(&self) -> &Producer {
        &self.producer
    }

    pub(super) const fn room(&self) -> &WaitList {
        &self.room
    }

    pub(super) const fn durable(&self) -> &WaitList {
        &self.durable
    }

    pub(super) const fn table(&self) -> &Table {
        &self.table
    }

    pub(super) const fn held(&self) -> &Held {
        &self.held
    }

    pub(super) const fn permission(&self) -> &Permission {
        &self.permission
    }

    pub(super) fn now_ns(&self) -> u64 {
        (self.now_ns)()
    }

    pub(crate) const fn count(&self) -> &InFlightCount {
        &self.count
    }

    pub(crate) const fn resyncing(&self) -> &AtomicBool {
        &self.resyncing
    }

    /// Size of the disk in bytes as the resync may use it.
    pub(crate) fn disk_bytes(&self) -> u64 {
        // ORDERING: SeqCst pairs with the stores in `finish_resize`.
        self.disk_bytes.load(Ordering::SeqCst)
    }

    fn try_begin(&self, request: &Request, token: WaitToken, in_flight: &mut InFlight) -> Begin {
        match in_flight.state {
            State::Idle => {
                in_flight.request = *request;
                in_flight.phase = self.count.enter();
                in_flight.state = State::Entered;
                (in_flight.waiting_since_ns, in_flight.looks, in_flight.durable) = (None, 0, None);
            }
            State::Parked(_) => {}
            State::Waiting(_) => in_flight.state = State::Entered,
            _ => panic!("begin of a request that is in flight already"),
        }
        let Some(range) = self.range_of(request) else { return self.pass(in_flight) };
        loop {
            match self.mode() {
                Mode::Capturing => match self.begin_captured(range, token, in_flight) {
                    Ok(begin) => return begin,
                    Err(full) => match self.wait_if_allowed(full, token, in_flight) {
                        Some(Begin::Wait) => return Begin::Wait,
                        Some(Begin::Go) => {}
                        None => self.producer.enter_tracking(self.reason_of(full)),
                    },
                },
                Mode::Tracking => {
                    self.leave_table(in_flight);
                    if let Some(tracked) = self.producer.begin_tracked(range) {
                        in_flight.state = State::Tracked(tracked);
                        return Begin::Go;
                    }
                }
                Mode::Off => return self.pass_unseen(in_flight),
            }
        }
    }

    /// No room: what the disk's policy says.
    #[cold]
    fn wait_if_allowed(&self, full: NoRoom, token: WaitToken, in_flight: &mut InFlight) -> Option<Begin> {
        let request = in_flight.request;
        let bytes = if matches!(request.kind, Kind::Write { .. }) { request.length } else { 0 };
        match full {
            NoRoom::Ring => self.wait_for_room(bytes, token, in_flight),
            NoRoom::Table => None,
        }
    }

    /// What a request may change: for a resize, what lies between the old and the new end. `None` for nothing.
    fn range_of(&self, request: &Request) -> Option<ByteRange> {
        if request.kind == Kind::Resize {
            let (old, new) = (self.disk_bytes(), request.length);
            return ByteRange::new(old.min(new), old.abs_diff(new)).or_else(|| {
                self.fault("a disk larger than 256 TiB cannot be captured; detach it");
                None
            });
        }
        let range = ByteRange::new(request.offset, request.length);
        if range.is_none() {
            self.fault("a request lies beyond 256 TiB, which no disk reaches");
        }
        range.filter(|range| !range.is_empty())
    }

    fn begin_captured(
        &self,
        range: ByteRange,
        token: WaitToken,
        in_flight: &mut InFlight,
    ) -> Result<Begin, NoRoom> {
        let entered = match in_flight.state {
            State::Parked(slot) => self.table.retry(slot, token),
            _ => self.table.enter(span_of(range, in_flight.request.kind), token),
        };
        match entered {
            Entered::Running(slot) => self.reserve(range, slot, in_flight),
            Entered::Parked(slot) => {
                in_flight.state = State::Parked(slot);
                // ORDERING: pairs with the fence in `let_parked_go`: either that finds us parked, or we see that
                // capture is off.
                fence(Ordering::SeqCst);
                let go = self.mode() == Mode::Off && self.table.unpark(slot);
                Ok(if go { self.pass_unseen(in_flight) } else { Begin::Wait })
            }
            Entered::Full => {
                in_flight.state = State::Entered;
                Err(NoRoom::Table)
            }
        }
    }

    /// Gets room in the ring; without it the table is left again.
    #[inline]
    fn reserve(&self, range: ByteRange, slot: Slot, in_flight: &mut InFlight) -> Result<Begin, NoRoom> {
        let request = in_flight.request;
        let ticket = match request.kind {
            Kind::Write { fua } => self.producer.begin_write(range, fua),
            Kind::Zero { fua, may_unmap } => self.producer.begin_op(OpKind::Zero { fua, may_unmap }, range),
            Kind::Discard => self.producer.begin_op(OpKind::Discard, range),
            Kind::Resize => self.producer.begin_op(OpKind::Resize { disk_bytes: request.length }, range),
        };
        let Ok(ticket) = ticket else {
            in_flight.state = State::Entered;
            self.table.leave(slot);
            return Err(NoRoom::Ring);
        };
        if matches!(request.kind, Kind::Write { .. }) {
            in_flight.pieces.set(self.producer.pieces(&ticket));
        }
        in_flight.state = State::Captured(slot, ticket);
        Ok(Begin::Go)
    }

    fn try_finish(&self, in_flight: &mut InFlight, outcome: Outcome) {
        in_flight.pieces.clear();
        match std::mem::take(&mut in_flight.state) {
            State::Captured(slot, ticket) => {
                in_flight.durable = self.finish_captured(ticket, &in_flight.request, outcome);
                // After the record has its LSN: who waits for us gets a greater one.
                self.table.leave(slot);
            }
            State::Tracked(tracked) => {
                if in_flight.request.kind == Kind::Resize && outcome == Outcome::Succeeded {
                    let disk_bytes = in_flight.request.length;
                    self.finish_resize(disk_bytes, || self.publish_resized(disk_bytes));
                }
                self.producer.end_tracked(tracked);
            }
            State::Passed => {}
            State::Idle | State::Entered | State::Parked(_) | State::Waiting(_) => {
                panic!("finish of a request that was not told to go")
            }
        }
        self.count.leave(in_flight.phase);
    }

    /// Returns the LSN of a successful request with FUA.
    #[inline]
    fn finish_captured(&self, ticket: Ticket, request: &Request, outcome: Outcome) -> Option<Lsn> {
        match outcome {
            Outcome::Succeeded if request.kind == Kind::Resize => self.finish_resize(request.length, || {
                self.producer.complete(ticket);
            }),
            Outcome::Succeeded => {
                let lsn = self.producer.complete(ticket);
                return matches!(request.kind, Kind::Write { fua: true } | Kind::Zero { fua: true, .. })
                    .then_some(lsn);
            }
            Outcome::Failed => self.producer.fail(ticket),
            Outcome::NotDone => self.producer.cancel(ticket),
        }
        None
    }

    /// A resize that has no ticket: it happened while only tracking, or without a request.
    fn publish_resized(&self, disk_bytes: u64) {
        if self.producer.resized(disk_bytes).is_err() {
            self.fault("no room in the ring for the record of a resize; attach again");
        }
    }

    /// Publishes a resize and lets the resync know the new size. A background read must never be numbered before
    /// the growth that made its range exist, nor after the cut that removed it: so a smaller size is known before the
    /// record is numbered and a greater one after, and the resync looks at the size on both sides of taking its number.
    fn finish_resize(&self, new: u64, publish: impl FnOnce()) {
        let old = self.disk_bytes();
        if new <= old {
            // ORDERING: SeqCst pairs with `disk_bytes`.
            self.disk_bytes.store(new, Ordering::SeqCst);
            publish();
        } else {
            // The record itself lies in the gap: what the disk shows behind its old end is not known there yet.
            self.producer.begin_gap(GapReason::ContentsChanged);
            publish();
            // ORDERING: SeqCst as above.
            self.disk_bytes.store(new, Ordering::SeqCst);
            self.mark_dirty_to_end(old);
            // A resync that found nothing dirty meanwhile may have ended that gap.
            self.producer.begin_gap(GapReason::ContentsChanged);
        }
    }

    fn mark_dirty_to_end(&self, from: u64) {
        if let Some(range) = ByteRange::new(from, self.disk_bytes().saturating_sub(from)) {
            self.producer.mark_dirty(range);
        }
    }

    /// The request goes its way without us.
    fn pass(&self, in_flight: &mut InFlight) -> Begin {
        self.leave_table(in_flight);
        in_flight.state = State::Passed;
        Begin::Go
    }

    /// As [`Capture::pass`], because capture is off: what the request changes is in no record.
    fn pass_unseen(&self, in_flight: &mut InFlight) -> Begin {
        // ORDERING: SeqCst, before the disk gets the request: pairs with the load in `close`.
        self.unseen.store(true, Ordering::SeqCst);
        self.pass(in_flight)
    }

    fn leave_table(&self, in_flight: &mut InFlight) {
        if let State::Parked(slot) = in_flight.state {
            in_flight.state = State::Entered;
            self.table.leave(slot);
        }
    }

    /// After a panic in begin: the request goes its way without us. Its table entry is left to rot: capture is off.
    fn give_up(&self, in_flight: &mut InFlight) {
        if !in_flight.is_active() {
            in_flight.phase = self.count.enter();
        }
        in_flight.pieces.clear();
        if let State::Waiting(place) = in_flight.state {
            // Where it is being woken already, that wake-up finds nobody parked, as one that comes early does.
            let _ = self.leave_room(place);
        }
        in_flight.state = State::Passed;
    }

    /// Whether this call did it: false when capture was off.
    fn switch_off(&self) -> bool {
        let switched = self.producer.detach();
        self.let_parked_go();
        switched
    }

    /// Wakes all parked requests once capture is off: nobody may be left waiting for a request that was lost.
    fn let_parked_go(&self) {
        // ORDERING: pairs with the fence in `begin_captured`.
        fence(Ordering::SeqCst);
        self.table.wake_all();
        self.wake_waiters();
    }

    pub(super) fn protect(&self, work: impl FnOnce()) {
        if let Err(message) = guard(work) {
            self.fault(&message);
        }
    }
}

/// Why a request cannot be captured now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum NoRoom {
    /// The in-flight table is full. Its requests end by themselves, but nobody tells when.
    Table,
    /// The ring is full, or the request larger than it may be.
    Ring,
}

/// What a request excludes others from. A resize excludes everything from the nearer end on.
fn span_of(range: ByteRange, kind: Kind) -> Span {
    let end = if kind == Kind::Resize { MAX_DISK_BYTES + 1 } else { range.end() };
    Span { start: range.offset(), end }
}

#[cfg(test)]
#[path = "capture_tests.rs"]
mod tests;
