//! One protected disk's ring, outbox and drain.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use capture_ring::{Bell, Consumer, HostClock, Mode, Producer, Ring, RingConfig, RingError};
use journal_format::{Epoch, Lsn, Stamp};

use crate::config::Config;
use crate::drain::Drain;
use crate::drain::worker::Worker;
use crate::error::AgentError;
use crate::events::Sender;
use crate::outbox::{Outbox, Packed};
use crate::packer::Packer;
use crate::session::{Attach, Sample};
use crate::spool::Spool;

/// Everything that one epoch of a disk needs. Dropping it ends the drain's thread and unmaps both memfds.
#[derive(Debug)]
pub struct Live {
    /// The capture session it serves.
    pub epoch: Epoch,
    /// Frames that wait for the server.
    pub outbox: Arc<Outbox>,
    /// The thread that fills the outbox.
    pub drain: Drain,
    ring: Arc<Ring>,
    /// The agent's own producing end, for bookmarks.
    producer: Producer,
    spool_limit: u64,
}

/// Descriptors for the filter.
#[derive(Debug)]
pub struct RingFds {
    /// The ring.
    pub ring: OwnedFd,
    /// What wakes the drain.
    pub bell: OwnedFd,
}

impl Live {
    /// Makes ring and outbox and starts the drain.
    ///
    /// # Errors
    /// When the kernel refuses memory, descriptors or a thread, or the disk's size is impossible.
    pub fn start(
        order: &Attach,
        clock: &HostClock,
        settings: &Config,
        events: &Sender,
    ) -> Result<(Self, RingFds), AgentError> {
        clock.raise_to(order.clock_floor);
        let config = RingConfig {
            arena_bytes: settings.ring_bytes,
            ..RingConfig::new(order.disk, order.epoch, order.first_lsn, order.disk_bytes)
        };
        let (ring, ring_fd) = Ring::create(&config).map_err(ring_error)?;
        let bell = Bell::create().map_err(ring_error)?;
        let bell_fd =
            bell.as_fd().try_clone_to_owned().map_err(AgentError::os("cannot duplicate an eventfd"))?;
        let packed = Packed { lsn: order.first_lsn.prev(), stamp: Stamp::ZERO, disk_bytes: order.disk_bytes };
        let (outbox, writer) = Outbox::create(order.disk, order.epoch, settings.outbox_bytes, packed)
            .map_err(AgentError::os("cannot make an outbox"))?;
        let consumer = Consumer::new(Arc::clone(&ring), clock.clone());
        let packer = Packer::new(order.disk, order.epoch, order.disk_bytes);
        let spool = Spool::open(&settings.spool, order.disk, order.epoch);
        let of = (order.disk, order.epoch);
        let worker = Worker::new(of, Some(consumer), writer, packer, spool, packed.lsn);
        let mut drain = Drain::new(worker, Some(bell), events.clone())?;
        let producer = Producer::new(Arc::clone(&ring), clock.clone(), drain.bell()?);
        drain.start()?;
        let spool_limit = settings.spool.limit_bytes;
        let live = Self { epoch: order.epoch, outbox, drain, ring, producer, spool_limit };
        Ok((live, RingFds { ring: ring_fd, bell: bell_fd }))
    }

    /// Puts a bookmark into the ring.
    ///
    /// # Errors
    /// Why not, in words for the operator.
    pub fn bookmark(&self, name: &str) -> Result<(Lsn, Stamp), String> {
        self.producer.bookmark(name).map_err(|full| format!("{full}; try again in a moment"))
    }

    /// Whether requests go by uncaptured until there is room.
    #[must_use]
    pub fn is_tracking(&self) -> bool {
        self.ring.mode().mode == Mode::Tracking
    }

    /// What it looks like now. Counts the dirty bitmap's bits, so not for every tick.
    #[must_use]
    pub fn sample(&self, clock: &HostClock) -> Sample {
        // The clock first: what is older and was captured has its LSN by the time the ring is looked at.
        let host_stamp = clock.now();
        let mode = match self.ring.mode().mode {
            Mode::Off => "off",
            Mode::Tracking => "tracking",
            Mode::Capturing => "capturing",
        };
        Sample {
            mode,
            captured_lsn: self.ring.captured_lsn(),
            captured_stamp: self.drain.captured_stamp(),
            ring_has_room: self.ring.has_room(),
            ring_used_bytes: self.ring.arena_used_bytes(),
            ring_bytes: self.ring.config().arena_bytes,
            dirty_bytes: self.ring.dirty().bytes(),
            outbox_used_bytes: self.outbox.used_bytes(),
            outbox_bytes: self.outbox.capacity_bytes(),
            spool_used_bytes: self.drain.spool().0,
            spool_bytes: self.spool_limit,
            spool_failing: self.drain.spool().1,
            unacked_bytes: self.outbox.raw_bytes(),
            host_stamp,
        }
    }
}

fn ring_error(error: RingError) -> AgentError {
    AgentError::Ring(match std::error::Error::source(&error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    })
}
