//! What the drain does, one step at a time, without a thread, a sleep or a clock of its own.

use std::sync::Arc;
use std::time::Duration;

use capture_ring::{Consumer, Next, RingError};
use journal_format::{DiskId, Epoch, GapReason, Lsn, Op, Record, Stamp};

use crate::compare::{Comparer, HashBox, SyncBytes, Wanted};
use crate::limits::{DRAIN_IDLE, REFILL_BATCH};
use crate::outbox::{OutboxWriter, PackedFrame};
use crate::packer::Packer;
use crate::session::Ending;
use crate::spool::Spool;

/// Records taken in one step.
const BATCH: usize = 256;

/// How long a detached filter may leave a reserved slot unpublished before it is taken for dead.
const STUCK: Duration = Duration::from_secs(5);

/// When to make the next step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pace {
    /// At once: there is more.
    Busy,
    /// After a short pause: records come now and then.
    Poll,
    /// When a record is published, or something else wakes: nothing has come for a while.
    Idle,
    /// When the outbox has room again.
    Blocked,
    /// Never: the end was reached.
    Ended,
}

/// What a step did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Step {
    /// The last LSN in the outbox, when that has changed.
    pub packed: Option<Lsn>,
    /// When to go on.
    pub pace: Pace,
}

/// Why a drain cannot go on.
#[derive(Debug)]
pub enum Stop {
    /// What is in the ring is no ring any more.
    Ring(RingError),
    /// Its records do not make a frame.
    Format(journal_format::FormatError),
    /// Frames that were spooled cannot be read back.
    Spool(std::io::Error),
}

impl Stop {
    /// Why history has a gap then.
    #[must_use]
    pub fn reason(&self) -> GapReason {
        match self {
            Self::Ring(_) | Self::Format(_) => GapReason::FilterFault,
            Self::Spool(_) => GapReason::AgentLost,
        }
    }
}

impl core::fmt::Display for Stop {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Ring(error) => error.fmt(f),
            Self::Format(error) => error.fmt(f),
            Self::Spool(error) => write!(f, "frames in the spool cannot be read back: {error}"),
        }
    }
}

impl From<RingError> for Stop {
    fn from(error: RingError) -> Self {
        Self::Ring(error)
    }
}

impl From<journal_format::FormatError> for Stop {
    fn from(error: journal_format::FormatError) -> Self {
        Self::Format(error)
    }
}

/// Takes records out of one ring, packs them, and puts the frames into the outbox, or into the spool while the outbox
/// is well filled.
#[derive(Debug)]
pub struct Worker {
    disk: DiskId,
    epoch: Epoch,
    /// `None` when only what was spooled is left of the epoch, and from when all of an ended ring is in a safe place.
    consumer: Option<Consumer>,
    comparer: Comparer,
    hashes: Arc<HashBox>,
    /// A fill that waits until it is known what the server has: copied out of the ring and still in it, too.
    held: Option<(Record, Vec<u8>)>,
    writer: OutboxWriter,
    packer: Packer,
    spool: Spool,
    /// A finished frame that has found no room yet. Its records are still in the ring.
    closed: Option<PackedFrame>,
    /// Last LSN in the outbox.
    packed: Lsn,
    told: Lsn,
    captured: Stamp,
    /// When the ring was seen empty first.
    quiet: Option<Duration>,
    /// Since when the ring has been ending.
    ended: Option<Duration>,
    /// Why the ring gives nothing more; what came before is being put away.
    fault: Option<Stop>,
    /// The epoch's frames are of no use any more.
    discard: bool,
}

impl Worker {
    /// A worker for an epoch whose frames in the outbox end at `packed`.
    #[must_use]
    pub fn new(
        (disk, epoch): (DiskId, Epoch),
        consumer: Option<Consumer>,
        writer: OutboxWriter,
        packer: Packer,
        spool: Spool,
        packed: Lsn,
    ) -> Self {
        // All records from here on pass the comparer, whatever came before.
        let base = consumer.as_ref().map_or(Lsn::ZERO, |consumer| consumer.next_lsn().prev());
        let disk_bytes = consumer.as_ref().map_or(0, |consumer| consumer.ring().config().disk_bytes);
        Self {
            disk,
            epoch,
            consumer,
            comparer: Comparer::new(base, disk_bytes),
            hashes: Arc::default(),
            held: None,
            writer,
            packer,
            spool,
            closed: None,
            packed,
            told: packed,
            captured: Stamp::ZERO,
            quiet: None,
            ended: None,
            fault: None,
            discard: false,
        }
    }

    /// Whose.
    #[must_use]
    pub fn of(&self) -> (DiskId, Epoch) {
        (self.disk, self.epoch)
    }

    /// The last LSN in the outbox.
    #[must_use]
    pub fn packed(&self) -> Lsn {
        self.packed
    }

    /// Stamp of the newest record taken out.
    #[must_use]
    pub fn captured(&self) -> Stamp {
        self.captured
    }

    /// Where the answers to [`Worker::ask`] go.
    #[must_use]
    pub fn hashes(&self) -> Arc<HashBox> {
        Arc::clone(&self.hashes)
    }

    /// What the running or last sync did.
    #[must_use]
    pub fn sync_bytes(&self) -> Arc<SyncBytes> {
        self.comparer.bytes()
    }

    /// What to ask the server for now.
    pub fn ask(&mut self, now: Duration) -> Option<Wanted> {
        self.comparer.ask(now)
    }

    /// The spool, for its gauges.
    #[must_use]
    pub fn spool(&self) -> &Spool {
        &self.spool
    }

    /// The writing side of the outbox, to wait for room.
    #[must_use]
    pub fn writer(&self) -> &OutboxWriter {
        &self.writer
    }

    /// From now on frames are thrown away instead of being kept.
    pub fn discard(&mut self) {
        if !self.discard {
            self.discard = true;
            self.spool.clear();
        }
    }

    /// Announces to the producers that this end is about to sleep; false when there is something to do.
    #[must_use]
    pub fn arm_sleep(&mut self) -> bool {
        self.consumer.as_mut().is_none_or(Consumer::arm_sleep)
    }

    /// Takes [`Worker::arm_sleep`] back.
    pub fn disarm_sleep(&self) {
        if let Some(consumer) = &self.consumer {
            consumer.disarm_sleep();
        }
    }

    /// Does what there is to do now, up to a batch of it. `ending` says how the epoch comes to its end, if it does.
    ///
    /// # Errors
    /// Why nothing more will come. What was taken before is in the outbox, or goes there with later steps.
    pub fn step(&mut self, now: Duration, ending: Option<Ending>) -> Result<Step, Stop> {
        self.spool.release(self.writer.outbox().durable());
        self.spool.tend(now);
        self.comparer.take_answers(now, &self.hashes);
        let refilled = self.refill()?;
        let pace = self.go_on(now, ending, refilled)?;
        let packed = (self.packed > self.told).then_some(self.packed);
        self.told = self.packed;
        Ok(Step { packed, pace })
    }

    fn go_on(&mut self, now: Duration, ending: Option<Ending>, refilled: bool) -> Result<Pace, Stop> {
        if !self.place(now) {
            // What found no room stays in the ring, for the agent that comes next.
            return Ok(if ending == Some(Ending::AgentStops) { Pace::Ended } else { Pace::Blocked });
        }
        if ending == Some(Ending::AgentStops) {
            if !self.put_away(now)? {
                tracing::info!(disk = %self.disk, "stopping with a full outbox; the last records stay in the ring");
            }
            return Ok(Pace::Ended);
        }
        if self.fault.is_none() {
            let taken = self.take(now).and_then(|taken| self.pace(now, ending, taken || refilled));
            match taken {
                Ok(pace) => return Ok(pace),
                Err(stop) => self.fault = Some(stop),
            }
            // What was taken before the fault is good.
            if !self.put_away(now)? {
                return Ok(Pace::Blocked);
            }
        }
        match self.fault.take_if(|_| self.spool.is_read()) {
            Some(fault) => Err(fault),
            None => Ok(Pace::Blocked),
        }
    }

    fn pace(&mut self, now: Duration, ending: Option<Ending>, moved: bool) -> Result<Pace, Stop> {
        // What waits for room or for the server needs no fuller frame, nor does an end.
        let waits = self.consumer.as_ref().is_some_and(|consumer| consumer.ring().waiting() > 0);
        let hurry = !moved && (waits || ending.is_some());
        if (hurry || self.is_due(now)) && !self.put_away(now)? {
            return Ok(Pace::Blocked);
        }
        if moved {
            self.quiet = None;
            return Ok(Pace::Busy);
        }
        if self.held.is_some() {
            return Ok(Pace::Poll);
        }
        if self.is_finished(now, ending)? {
            self.consumer = None;
            // Spooled frames go out through the outbox; it wakes us when it has room.
            return Ok(if self.spool.is_read() { Pace::Ended } else { Pace::Blocked });
        }
        let quiet = *self.quiet.get_or_insert(now);
        let idle = self.packer.is_empty() && now.saturating_sub(quiet) >= DRAIN_IDLE && ending.is_none();
        Ok(match (idle, self.spool.is_read()) {
            (false, _) => Pace::Poll,
            (true, true) => Pace::Idle,
            // What is in the spool goes on when the outbox has room.
            (true, false) => Pace::Blocked,
        })
    }

    /// Takes some records; false when none was there, or the next one waits.
    fn take(&mut self, now: Duration) -> Result<bool, Stop> {
        if let Some((record, data)) = self.held.take() {
            if self.must_wait(now, &record) {
                self.held = Some((record, data));
                return Ok(false);
            }
            let pos = self.packer.append(&data);
            self.admit(now, moved(record, pos));
        }
        for taken in 0..BATCH {
            if self.is_due(now) {
                return Ok(true);
            }
            let room = self.packer.room();
            let Some(consumer) = &mut self.consumer else { return Ok(false) };
            match consumer.copy(self.packer.data(), room)? {
                Next::Record(record) if self.must_wait(now, &record) => {
                    self.hold(now, record)?;
                    return Ok(taken > 0);
                }
                Next::Record(record) => self.admit(now, record),
                Next::NoRoom(_) => {
                    self.put_away(now)?;
                    return Ok(true);
                }
                Next::Empty => return Ok(taken > 0),
            }
        }
        Ok(true)
    }

    /// Takes the record that was copied last into the frame, or what the comparison leaves of it. It stays in the ring.
    fn admit(&mut self, now: Duration, record: Record) {
        self.captured = record.stamp;
        let record = self.comparer.admit(record, self.packer.data());
        self.packer.add(now, record);
    }

    /// Whether the frame should be closed now: it is full or old, or the ring wants its room back.
    fn is_due(&self, now: Duration) -> bool {
        self.packer.is_due(now) || self.consumer.as_ref().is_some_and(Consumer::holds_much)
    }

    /// Gives the ring the room of the records up to `to` back: they are in a safe place.
    fn free(&mut self, to: Lsn) {
        let Some(consumer) = &mut self.consumer else { return };
        let writer = &mut self.writer;
        consumer.free(to, |lsn, piece| writer.freeing(lsn, piece));
        consumer.return_credits();
    }

    /// Fills leave a quarter of the ring to the guest; when it needs that, there is no time to wait.
    fn must_wait(&mut self, now: Duration, record: &Record) -> bool {
        let Some(consumer) = &self.consumer else { return false };
        let ring = consumer.ring();
        let (arena, slots) = (ring.config().arena_bytes, u64::from(ring.config().slots));
        let has_room = ring.arena_used_bytes() <= arena / 8 * 7 && ring.backlog() <= slots / 8 * 7;
        self.comparer.holds(now, record, has_room)
    }

    /// Sets the record that was copied last aside. What came before it does not wait.
    fn hold(&mut self, now: Duration, record: Record) -> Result<(), Stop> {
        if let Op::Write { data, .. } = record.op {
            self.held = Some((record, self.packer.data().split_off(data.pos as usize)));
        }
        self.put_away(now)?;
        Ok(())
    }

    /// Finishes the frame, if there is one, and finds a place for it; false when one has none now, which may be one that
    /// was finished before.
    fn put_away(&mut self, now: Duration) -> Result<bool, Stop> {
        if !self.place(now) {
            return Ok(false);
        }
        self.closed = self.packer.close()?;
        Ok(self.place(now))
    }

    /// Finds a place for the finished frame: the outbox, or the spool while frames are there or the outbox is well
    /// filled. False when there is none now.
    fn place(&mut self, now: Duration) -> bool {
        let Some(frame) = self.closed.take() else { return true };
        if self.discard {
            self.writer.note(frame.packed());
            self.packed = frame.last_lsn;
            self.free(frame.last_lsn);
            self.packer.recycle(frame);
            return true;
        }
        let outbox = self.writer.outbox();
        let filled = outbox.used_bytes() > outbox.capacity_bytes() / 2;
        // A small outbox may have no segment for a large frame before it is half full.
        let is_placed = match filled {
            true => self.put_in_spool(now, &frame) || self.put_in_outbox(&frame),
            false => self.put_in_outbox(&frame) || self.put_in_spool(now, &frame),
        };
        if is_placed {
            self.free(frame.last_lsn);
            self.packer.recycle(frame);
        } else {
            self.closed = Some(frame);
        }
        is_placed
    }

    /// Puts a frame into the outbox, unless frames in the spool come before it or there is no room now.
    fn put_in_outbox(&mut self, frame: &PackedFrame) -> bool {
        let is_there = self.spool.is_read() && self.writer.push(frame).is_ok();
        if is_there {
            self.packed = frame.last_lsn;
        }
        is_there
    }

    /// Puts a frame into the spool, unless it takes none now.
    fn put_in_spool(&mut self, now: Duration, frame: &PackedFrame) -> bool {
        let is_there = self.spool.append(now, frame);
        if is_there {
            self.writer.note(frame.packed());
        }
        is_there
    }

    /// Moves frames from the spool into an outbox that has room; false when there was nothing to do.
    fn refill(&mut self) -> Result<bool, Stop> {
        let mut moved = false;
        for _ in 0..REFILL_BATCH {
            let outbox = self.writer.outbox();
            if self.spool.is_read() || outbox.used_bytes() > outbox.capacity_bytes() / 4 {
                break;
            }
            let Some(frame) = self.spool.peek().map_err(Stop::Spool)? else { break };
            if self.writer.refill(frame).is_err() {
                break;
            }
            self.packed = frame.last_lsn;
            self.spool.advance();
            moved = true;
        }
        Ok(moved)
    }

    /// Nothing is published now; whether nothing can come any more.
    fn is_finished(&mut self, now: Duration, ending: Option<Ending>) -> Result<bool, Stop> {
        let Some(consumer) = &mut self.consumer else { return Ok(true) };
        let Some(ending) = ending else { return Ok(false) };
        let since = *self.ended.get_or_insert(now);
        if ending == Ending::Detached {
            if consumer.next_lsn() > consumer.ring().captured_lsn() {
                return Ok(true);
            }
            if now.saturating_sub(since) < STUCK {
                return Ok(false);
            }
            tracing::warn!(disk = %self.disk, "the filter detached and left slots unpublished; they are closed as void");
        }
        self.close_dead()
    }

    /// Closes what a dead process left open; true when there was nothing.
    fn close_dead(&mut self) -> Result<bool, Stop> {
        let Some(consumer) = &mut self.consumer else { return Ok(true) };
        consumer.close_dead()?;
        if consumer.is_ready() {
            return Ok(false);
        }
        match consumer.issued_ranges() {
            Ok(ranges) if ranges.is_empty() => {}
            Ok(ranges) => tracing::warn!(
                disk = %self.disk,
                count = ranges.len(),
                bytes = ranges.iter().map(|range| range.length()).sum::<u64>(),
                ?ranges,
                "writes were issued and never completed; the next epoch reads these ranges back"
            ),
            Err(error) => {
                tracing::warn!(disk = %self.disk, %error, "which writes were in flight is not known")
            }
        }
        Ok(true)
    }
}

/// A fill whose data begins at `at` now.
fn moved(mut record: Record, at: u32) -> Record {
    if let Op::Write { data, .. } = &mut record.op {
        data.pos = at;
    }
    record
}
