//! One protected disk's ring, outbox and drain.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use capture_ring::control::CaptureFds;
use capture_ring::{
    Bell, Consumer, HostClock, Mode, Policy, Producer, Ring, RingConfig, RingError, SyncState,
};
use journal_format::{DiskId, Epoch, Lsn, Stamp};

use crate::compare::Answer;
use crate::config::Config;
use crate::drain::Drain;
use crate::drain::parked::Parked;
use crate::drain::worker::Worker;
use crate::drill::Drill;
use crate::error::AgentError;
use crate::events::Sender;
use crate::outbox::adopt::adopt;
use crate::outbox::{Outbox, Packed};
use crate::packer::Packer;
use crate::session::{Attach, Ending, Sample};
use crate::spool::Spool;

/// Everything that one epoch of a disk needs. Dropping it ends the drain's thread and unmaps both memfds.
#[derive(Debug)]
pub struct Live {
    /// The capture session it serves.
    pub epoch: Epoch,
    /// Frames that wait for the server.
    pub outbox: Arc<Outbox>,
    work: Work,
    ring: Option<Shared>,
    /// The agent's own producing end, for bookmarks.
    producer: Option<Producer>,
    spool_limit: u64,
    drill: Option<Drill>,
    events: Sender,
}

/// What [`Live::adopt`] read.
#[derive(Debug)]
pub struct Loaded {
    /// It, with the ring untouched.
    pub live: Live,
    /// The new outbox, for the filter to hold.
    pub outbox: OwnedFd,
    /// The LSN before the oldest frame in it.
    pub acked: Lsn,
    /// The LSN of the newest.
    pub packed: Lsn,
}

/// The ring and the clock of its filter.
#[derive(Clone, Debug)]
struct Shared {
    ring: Arc<Ring>,
    clock: HostClock,
}

#[derive(Debug)]
enum Work {
    /// Taken from a filter that does not hold the new outbox yet.
    Parked(Box<Parked>, Bell),
    Running(Box<Drain>),
    /// The ring could not be taken over.
    Over,
}

impl Live {
    /// Makes ring and outbox and starts the drain. Returns the descriptors for the filter.
    ///
    /// # Errors
    /// When the kernel refuses memory, descriptors or a thread, or the disk's size is impossible.
    pub fn start(
        order: &Attach,
        (clock, clock_fd): (&HostClock, OwnedFd),
        settings: &Config,
        events: &Sender,
    ) -> Result<(Self, CaptureFds), AgentError> {
        clock.raise_to(order.clock_floor);
        let config = RingConfig {
            arena_bytes: match order.settings.ring_mib {
                0 => settings.ring_bytes,
                mib => u64::from(mib) << 20,
            },
            begins: order.begins,
            ..RingConfig::new(order.disk, order.epoch, order.first_lsn, order.disk_bytes)
        };
        let (ring, ring_fd) = Ring::create(&config).map_err(ring_error)?;
        ring.set_policy(order.settings.policy);
        ring.set_durable_lsn(order.first_lsn.prev());
        let bell = Bell::create().map_err(ring_error)?;
        let bell_fd =
            bell.as_fd().try_clone_to_owned().map_err(AgentError::os("cannot duplicate an eventfd"))?;
        let packed = Packed { lsn: order.first_lsn.prev(), stamp: Stamp::ZERO, disk_bytes: order.disk_bytes };
        let (outbox, writer) =
            Outbox::create(order.disk, order.epoch, settings.outbox_bytes, packed, packed.lsn)
                .map_err(AgentError::os("cannot make an outbox"))?;
        let outbox_fd = kept(&outbox)?;
        let consumer = Consumer::new(Arc::clone(&ring), clock.clone());
        let packer = Packer::new(order.disk, order.epoch, order.disk_bytes);
        let spool = Spool::begin(&settings.spool, order.disk, order.epoch);
        let of = (order.disk, order.epoch);
        let worker = Worker::new(of, Some(consumer), writer, packer, spool, packed.lsn);
        let shared = Shared { ring, clock: clock.clone() };
        let live = Self::running(worker, Some((shared, bell)), outbox, settings, events)?;
        Ok((live, CaptureFds { ring: ring_fd, clock: clock_fd, bell: bell_fd, outbox: outbox_fd }))
    }

    /// Has the kernel provide the ring's memory, before the filter gets it. May take a few tenths of a second: not for the hub.
    ///
    /// Here rather than in QEMU: a limit of the VM's memory does not count the ring then.
    pub fn provider(&self) -> impl FnOnce() + Send + use<> {
        let ring = self.ring.as_ref().map(|shared| Arc::clone(&shared.ring));
        move || {
            if let Some(ring) = ring {
                ring.provide();
            }
        }
    }

    fn running(
        worker: Worker,
        ring: Option<(Shared, Bell)>,
        outbox: Arc<Outbox>,
        settings: &Config,
        events: &Sender,
    ) -> Result<Self, AgentError> {
        let (_, epoch) = worker.of();
        let (ring, bell) = ring.unzip();
        let mut drain = Drain::new(worker, bell, events.clone(), settings.drill.clone())?;
        let producer = ring.as_ref().map(|shared| producer(shared, &drain)).transpose()?;
        drain.start()?;
        let (work, events) = (Work::Running(Box::new(drain)), events.clone());
        let (spool_limit, drill) = (settings.spool.limit_bytes, settings.drill.clone());
        Ok(Self { epoch, outbox, work, ring, producer, spool_limit, drill, events })
    }

    /// Reads what a filter holds of an epoch, checks all of it, and makes a new outbox. The ring is left as it is until
    /// [`Live::resume`]. May take as long as copying an outbox takes.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn adopt(
        disk: DiskId,
        epoch: Epoch,
        fds: CaptureFds,
        settings: &Config,
        events: &Sender,
    ) -> Result<Loaded, AgentError> {
        let ring = Ring::open(fds.ring.as_fd()).map_err(ring_error)?;
        if (ring.config().disk, ring.config().epoch) != (disk, epoch) {
            return Err(AgentError::Ring("it is of another disk or epoch".to_owned()));
        }
        let clock = HostClock::open(fds.clock.as_fd()).map_err(ring_error)?;
        let link = std::fs::read_link(format!("/proc/self/fd/{}", fds.bell.as_raw_fd()));
        if !link.is_ok_and(|link| link.as_os_str() == "anon_inode:[eventfd]") {
            return Err(AgentError::Ring("its bell is no eventfd".to_owned()));
        }
        let spool = Spool::open(&settings.spool, disk, epoch);
        let outbox = File::from(fds.outbox);
        let adopted = adopt(&outbox, disk, epoch, settings.outbox_bytes, spool.last())
            .map_err(AgentError::os("the outbox that was kept"))?;
        let parked =
            Parked::new(adopted, spool, (disk, epoch)).map_err(AgentError::os("the disk's spool"))?;
        let outbox = Arc::clone(parked.outbox());
        let acked = outbox.oldest_lsn().map_or(parked.last(), Lsn::prev);
        let (fd, packed) = (kept(&outbox)?, parked.last());
        let live = Self {
            epoch,
            outbox,
            work: Work::Parked(Box::new(parked), Bell::from(fds.bell)),
            ring: Some(Shared { ring, clock }),
            producer: None,
            spool_limit: settings.spool.limit_bytes,
            drill: settings.drill.clone(),
            events: events.clone(),
        };
        Ok(Loaded { live, outbox: fd, acked, packed })
    }

    /// Goes on with an adopted ring. Does nothing for one that runs.
    ///
    /// # Errors
    /// When the ring does not go on where the outbox ends, or the kernel refuses something.
    pub fn resume(&mut self) -> Result<(), AgentError> {
        let (mut parked, bell) = match core::mem::replace(&mut self.work, Work::Over) {
            Work::Parked(parked, bell) => (parked, bell),
            other => {
                self.work = other;
                return Ok(());
            }
        };
        let shared = self.ring.as_ref().map(|shared| (Arc::clone(&shared.ring), shared.clock.clone()));
        parked.resume(shared).map_err(ring_error)?;
        let mut drain =
            Drain::new(parked.into_worker(), Some(bell), self.events.clone(), self.drill.clone())?;
        self.producer = self.ring.as_ref().map(|shared| producer(shared, &drain)).transpose()?;
        drain.start()?;
        self.work = Work::Running(Box::new(drain));
        Ok(())
    }

    /// Ships what the spool has of an epoch whose ring is gone, after `durable`.
    ///
    /// # Errors
    /// When the spool does not go on there, or the kernel refuses something.
    pub fn recover(
        disk: DiskId,
        epoch: Epoch,
        durable: Lsn,
        settings: &Config,
        events: &Sender,
    ) -> Result<Self, AgentError> {
        let nothing = || AgentError::os("the spool")(std::io::ErrorKind::InvalidData.into());
        let mut spool = Spool::open(&settings.spool, disk, epoch);
        let last = spool.last().ok_or_else(nothing)?;
        if spool.first_lsn().is_none_or(|first| first > durable.next()) {
            return Err(nothing());
        }
        spool.pass(durable).map_err(AgentError::os("the spool"))?;
        let (outbox, writer) = Outbox::create(disk, epoch, settings.outbox_bytes, last, durable)
            .map_err(AgentError::os("cannot make an outbox"))?;
        outbox.release(durable);
        let packer = Packer::new(disk, epoch, last.disk_bytes);
        let worker = Worker::new((disk, epoch), None, writer, packer, spool, durable);
        Self::running(worker, None, outbox, settings, events)
    }

    fn drain(&self) -> Option<&Drain> {
        match &self.work {
            Work::Running(drain) => Some(drain),
            Work::Parked(..) | Work::Over => None,
        }
    }

    /// Tells the drain how to end. False when there is none that could answer.
    #[must_use]
    pub fn end(&self, ending: Ending) -> bool {
        self.drain().map(|drain| drain.end(ending)).is_some()
    }

    /// Gives the drain an answer to its question.
    pub fn give_hashes(&self, answer: Answer) {
        if let Some(drain) = self.drain() {
            drain.give_hashes(answer);
        }
    }

    /// What is not shipped is thrown away.
    pub fn discard(&self) {
        if let Some(drain) = self.drain() {
            drain.discard();
        }
    }

    /// Puts a bookmark into the ring.
    ///
    /// # Errors
    /// Why not, in words for the operator.
    pub fn bookmark(&self, name: &str) -> Result<(Lsn, Stamp), String> {
        let producer = self.producer.as_ref().ok_or("the disk is not being captured now")?;
        producer.bookmark(name).map_err(|full| format!("{full}; try again in a moment"))
    }

    /// The server has made everything up to this LSN durable.
    pub fn set_durable(&self, lsn: Lsn) {
        if let Some(shared) = &self.ring {
            shared.ring.set_durable_lsn(lsn);
        }
    }

    /// Changes what happens when the ring is full, and at a guest's flush.
    pub fn set_policy(&self, policy: Policy) {
        if let Some(shared) = &self.ring {
            shared.ring.set_policy(policy);
        }
    }

    /// Whether requests go by uncaptured until there is room.
    #[must_use]
    pub fn is_tracking(&self) -> bool {
        self.ring.as_ref().is_some_and(|shared| shared.ring.mode().mode == Mode::Tracking)
    }

    /// What it looks like now. Counts the dirty bitmap's bits, so not for every tick.
    #[must_use]
    pub fn sample(&self) -> Sample {
        let (spool_used_bytes, spool_trouble) = self.drain().map(Drain::spool).unwrap_or_default();
        let [sync_read_bytes, sync_compared_bytes, sync_equal_bytes, sync_shipped_bytes] =
            self.drain().map(|drain| drain.sync_bytes().get()).unwrap_or_default();
        let sample = Sample {
            mode: "off",
            sync_read_bytes,
            sync_compared_bytes,
            sync_equal_bytes,
            sync_shipped_bytes,
            captured_stamp: self.drain().map(Drain::captured_stamp).unwrap_or_default(),
            outbox_used_bytes: self.outbox.used_bytes(),
            outbox_bytes: self.outbox.capacity_bytes(),
            spool_used_bytes,
            spool_bytes: self.spool_limit,
            spool_trouble,
            unacked_bytes: self.outbox.raw_bytes(),
            ..Sample::default()
        };
        let Some(Shared { ring, clock }) = &self.ring else { return sample };
        // The clock first: what is older and was captured has its LSN by the time the ring is looked at.
        let host_stamp = clock.now();
        let mode = match ring.mode().mode {
            Mode::Off => "off",
            Mode::Tracking => "tracking",
            Mode::Capturing => "capturing",
        };
        Sample {
            mode,
            captured_lsn: ring.captured_lsn(),
            ring_has_room: ring.has_room(),
            ring_used_bytes: ring.arena_used_bytes(),
            ring_bytes: ring.config().arena_bytes,
            dirty_bytes: ring.dirty().bytes(),
            waiting: ring.waiting(),
            waited: ring.waited(),
            sync: match ring.sync_state() {
                SyncState::Off => "off",
                SyncState::InForce => "in-force",
                SyncState::Suspended => "suspended",
                SyncState::Lost => "lost",
            },
            host_stamp,
            ..sample
        }
    }
}

fn producer(shared: &Shared, drain: &Drain) -> Result<Producer, AgentError> {
    Ok(Producer::new(Arc::clone(&shared.ring), shared.clock.clone(), drain.bell()?))
}

/// A descriptor of an outbox for the filter to hold.
fn kept(outbox: &Outbox) -> Result<OwnedFd, AgentError> {
    let kept = outbox.memory().file().try_clone().map_err(AgentError::os("cannot duplicate the outbox"))?;
    Ok(kept.into())
}

fn ring_error(error: RingError) -> AgentError {
    AgentError::Ring(match std::error::Error::source(&error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    })
}
