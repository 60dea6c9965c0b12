//! The drain: one thread per protected disk that takes records out of the ring, packs them and puts the frames into
//! the outbox.
//!
//! It polls on a short timer while writes come, so that no guest write has to wake anybody, and sleeps on the ring's
//! bell when nothing has come for a while. When the outbox is full it waits and takes nothing more: then the ring
//! fills, and the filter goes on without capture until there is room.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use capture_ring::{Bell, Consumer, Next, RingError};
use journal_format::{DiskId, Epoch, Lsn, Stamp};

use crate::error::AgentError;
use crate::events::{Gone, Sender};
use crate::limits::{DRAIN_IDLE, DRAIN_NAP, DRAIN_POLL};
use crate::outbox::OutboxWriter;
use crate::packer::Packer;
use crate::session::{Ending, Event};

/// Records taken between two looks at the clock.
const BATCH: usize = 256;

/// How long a detached filter may leave a reserved slot unpublished before it is taken for dead.
const STUCK: Duration = Duration::from_secs(5);

/// How long one wait for room in the outbox lasts.
const ROOM_WAIT: Duration = Duration::from_millis(50);

/// What hub and drain thread share.
#[derive(Debug)]
struct Shared {
    /// An [`Ending`] plus one, or 0.
    ending: AtomicU8,
    captured_stamp: AtomicU64,
}

/// A running drain.
#[derive(Debug)]
pub struct Drain {
    shared: Arc<Shared>,
    bell: Bell,
    thread: Option<JoinHandle<()>>,
}

/// Why a drain ended early.
enum Stop {
    Ring(RingError),
    Format(journal_format::FormatError),
    Gone,
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

impl From<Gone> for Stop {
    fn from(_: Gone) -> Self {
        Self::Gone
    }
}

impl Drain {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the kernel refuses a thread or descriptor.
    pub fn start(
        consumer: Consumer,
        writer: OutboxWriter,
        bell: Bell,
        events: Sender,
    ) -> Result<Self, AgentError> {
        let shared = Arc::new(Shared { ending: AtomicU8::new(0), captured_stamp: AtomicU64::new(0) });
        let config = *consumer.ring().config();
        let mine = bell.duplicate().map_err(|error| AgentError::Ring(error.to_string()))?;
        let worker = Worker {
            packer: Packer::new(config.disk, config.epoch, config.disk_bytes),
            disk: config.disk,
            epoch: config.epoch,
            packed: config.first_lsn.prev(),
            consumer,
            writer,
            bell,
            events,
            shared: Arc::clone(&shared),
            ended: None,
        };
        let thread = std::thread::Builder::new()
            .name("cdp-drain".into())
            .spawn(move || worker.run())
            .map_err(AgentError::os("cannot start a drain thread"))?;
        Ok(Self { shared, bell: mine, thread: Some(thread) })
    }

    /// Tells the drain how to end; it answers with `Drained`.
    pub fn end(&self, ending: Ending) {
        let code = match ending {
            Ending::Detached => 1,
            Ending::Dead => 2,
            Ending::AgentStops => 3,
        };
        // ORDERING: Release pairs with `Worker::ending`. The largest wins: the agent's own end comes last.
        self.shared.ending.fetch_max(code, Ordering::Release);
        self.bell.ring();
    }

    /// Stamp of the newest record taken out.
    #[must_use]
    pub fn captured_stamp(&self) -> Stamp {
        // ORDERING: a gauge.
        Stamp(self.shared.captured_stamp.load(Ordering::Relaxed))
    }
}

impl Drop for Drain {
    /// Ends the thread and waits for it: a capture that is dropped leaves nothing behind.
    fn drop(&mut self) {
        self.end(Ending::AgentStops);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a drain thread panicked; this is a bug, please report it");
        }
    }
}

struct Worker {
    consumer: Consumer,
    writer: OutboxWriter,
    packer: Packer,
    bell: Bell,
    events: Sender,
    shared: Arc<Shared>,
    disk: DiskId,
    epoch: Epoch,
    packed: Lsn,
    /// Since when the ring has been ending.
    ended: Option<(Ending, Instant)>,
}

impl Worker {
    fn run(mut self) {
        let message = match self.drain() {
            Ok(()) => None,
            Err(Stop::Ring(error)) => Some(error.to_string()),
            Err(Stop::Format(error)) => Some(error.to_string()),
            Err(Stop::Gone) => return,
        };
        let event = match message {
            None => Event::Drained(self.disk, self.epoch, self.packed),
            Some(message) => Event::RingFault(self.disk, self.epoch, message),
        };
        let _ = self.events.event(event);
    }

    fn drain(&mut self) -> Result<(), Stop> {
        let mut quiet = Instant::now();
        loop {
            if self.ending() == Some(Ending::AgentStops) {
                return self.flush();
            }
            let moved = match self.take() {
                Ok(moved) => moved,
                Err(stop) => {
                    // What was taken before the fault is good.
                    self.flush()?;
                    return Err(stop);
                }
            };
            let now = Instant::now();
            if self.packer.is_due(now) {
                self.flush()?;
            }
            if moved {
                quiet = now;
            } else if self.is_finished(now)? {
                return self.flush();
            } else if self.packer.is_empty() && now.duration_since(quiet) >= DRAIN_IDLE {
                self.sleep();
                quiet = Instant::now();
            } else {
                std::thread::sleep(DRAIN_POLL);
            }
        }
    }

    /// Takes some records; false when none was there.
    fn take(&mut self) -> Result<bool, Stop> {
        let now = Instant::now();
        for taken in 0..BATCH {
            let room = self.packer.room();
            match self.consumer.next(self.packer.data(), room)? {
                Next::Record(record) => {
                    // ORDERING: a gauge.
                    self.shared.captured_stamp.store(record.stamp.0, Ordering::Relaxed);
                    self.packer.add(now, record);
                }
                Next::NoRoom(_) => {
                    self.flush()?;
                    return Ok(true);
                }
                Next::Empty => return Ok(taken > 0),
            }
            if self.packer.is_due(now) {
                return Ok(true);
            }
        }
        Ok(true)
    }

    /// Closes the frame and puts it into the outbox, waiting for room.
    fn flush(&mut self) -> Result<(), Stop> {
        let Some(frame) = self.packer.close()? else { return Ok(()) };
        while self.writer.push(&frame).is_err() {
            if self.ending() == Some(Ending::AgentStops) {
                tracing::warn!(disk = %self.disk, lsn = %frame.last_lsn, "stopping with a full outbox; a frame is lost");
                return Ok(());
            }
            self.writer.wait_for_release(ROOM_WAIT);
        }
        self.packed = frame.last_lsn;
        self.events.event(Event::Packed(self.disk, self.epoch, frame.last_lsn))?;
        Ok(())
    }

    fn sleep(&mut self) {
        if self.consumer.arm_sleep() {
            self.bell.wait(DRAIN_NAP);
        }
        self.consumer.disarm_sleep();
    }

    fn ending(&self) -> Option<Ending> {
        // ORDERING: Acquire pairs with `Drain::end`.
        match self.shared.ending.load(Ordering::Acquire) {
            1 => Some(Ending::Detached),
            2 => Some(Ending::Dead),
            3 => Some(Ending::AgentStops),
            _ => None,
        }
    }

    /// Nothing is published now; whether nothing can come any more.
    fn is_finished(&mut self, now: Instant) -> Result<bool, Stop> {
        let Some(ending) = self.ending() else { return Ok(false) };
        let (_, since) = *self.ended.get_or_insert((ending, now));
        if ending == Ending::Detached {
            if self.consumer.next_lsn() > self.consumer.ring().captured_lsn() {
                return Ok(true);
            }
            if now.duration_since(since) < STUCK {
                return Ok(false);
            }
            tracing::warn!(disk = %self.disk, "the filter detached and left slots unpublished; they are closed as void");
        }
        self.close_dead()
    }

    /// Closes what a dead process left open; true when there was nothing.
    fn close_dead(&mut self) -> Result<bool, Stop> {
        self.consumer.close_dead()?;
        if self.consumer.is_ready() {
            return Ok(false);
        }
        match self.consumer.issued_ranges() {
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
