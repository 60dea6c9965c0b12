//! One epoch of a disk at the agent: as the product's `Live`, with the worker's steps made by whoever asks for them
//! instead of a thread.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use capture_ring::control::CaptureFds;
use capture_ring::{Bell, Consumer, HostClock, Mode, Producer, Ring, RingConfig, SyncState};
use host_agent::drain::parked::Parked;
use host_agent::drain::worker::Worker;
use host_agent::outbox::adopt::adopt;
use host_agent::outbox::{Outbox, Packed};
use host_agent::packer::Packer;
use host_agent::session::{Attach, Ending, Sample};
use host_agent::spool::Spool;
use journal_format::{DiskId, Epoch, Lsn, Stamp};

use super::Sizes;

/// What makes the drain's steps.
pub(super) enum Work {
    /// Taken from a filter that does not hold the new outbox yet.
    Parked(Box<Parked>),
    Running(Box<Worker>),
    /// The ring could not be taken over.
    Over,
}

/// One epoch of a disk.
pub(super) struct Live {
    pub(super) epoch: Epoch,
    pub(super) outbox: Arc<Outbox>,
    pub(super) work: Work,
    /// `None` when only the spool is left of it.
    pub(super) ring: Option<(Arc<Ring>, HostClock)>,
    /// For bookmarks.
    pub(super) producer: Option<Producer>,
    /// When its thread would make the next step.
    pub(super) next: Duration,
    pub(super) ending: Option<Ending>,
    pub(super) ended: bool,
    /// The server could not go on with it: its frames are thrown away.
    pub(super) discarded: bool,
}

/// What was read of an adopted epoch: it, the new outbox, the LSN before its oldest frame, that of its newest.
pub(super) struct Loaded {
    pub(super) live: Live,
    pub(super) outbox: OwnedFd,
    pub(super) acked: Lsn,
    pub(super) packed: Lsn,
}

pub(super) fn same(fd: &OwnedFd) -> OwnedFd {
    fd.try_clone().expect("a descriptor")
}

/// Another process's descriptors of the same.
pub(crate) fn same_fds(fds: &CaptureFds) -> CaptureFds {
    CaptureFds {
        ring: same(&fds.ring),
        clock: same(&fds.clock),
        bell: same(&fds.bell),
        outbox: same(&fds.outbox),
    }
}

fn producer(ring: &Arc<Ring>, clock: &HostClock) -> Producer {
    Producer::new(Arc::clone(ring), clock.clone(), Bell::create().expect("an eventfd"))
}

fn kept(outbox: &Outbox) -> OwnedFd {
    outbox.memory().file().try_clone().expect("a descriptor").into()
}

impl Live {
    fn new(epoch: Epoch, outbox: Arc<Outbox>, work: Work, ring: Option<(Arc<Ring>, HostClock)>) -> Self {
        let producer = match &work {
            Work::Running(_) => ring.as_ref().map(|(ring, clock)| producer(ring, clock)),
            _ => None,
        };
        Self {
            epoch,
            outbox,
            work,
            ring,
            producer,
            next: Duration::ZERO,
            ending: None,
            ended: false,
            discarded: false,
        }
    }

    /// A new ring and outbox.
    pub(super) fn start(
        order: &Attach,
        (clock, clock_fd): (&HostClock, OwnedFd),
        sizes: &Sizes,
    ) -> (Self, CaptureFds) {
        clock.raise_to(order.clock_floor);
        let config = RingConfig {
            arena_bytes: sizes.arena_bytes,
            slots: sizes.slots,
            begins: order.begins,
            ..RingConfig::new(order.disk, order.epoch, order.first_lsn, order.disk_bytes)
        };
        let (ring, ring_fd) = Ring::create(&config).expect("a ring");
        ring.set_policy(order.settings.policy);
        ring.set_durable_lsn(order.first_lsn.prev());
        let bell = Bell::create().expect("an eventfd");
        let packed = Packed { lsn: order.first_lsn.prev(), stamp: Stamp::ZERO, disk_bytes: order.disk_bytes };
        let (outbox, writer) =
            Outbox::create(order.disk, order.epoch, sizes.outbox_bytes, packed, packed.lsn)
                .expect("an outbox");
        let consumer = Consumer::new(Arc::clone(&ring), clock.clone());
        let packer = Packer::new(order.disk, order.epoch, order.disk_bytes);
        let spool = Spool::begin(&sizes.spool, order.disk, order.epoch);
        let of = (order.disk, order.epoch);
        let worker = Worker::new(of, Some(consumer), writer, packer, spool, packed.lsn);
        let fds = CaptureFds {
            ring: ring_fd,
            clock: clock_fd,
            bell: bell.as_fd().try_clone_to_owned().expect("a descriptor"),
            outbox: kept(&outbox),
        };
        (Self::new(order.epoch, outbox, Work::Running(Box::new(worker)), Some((ring, clock.clone()))), fds)
    }

    /// Reads what a filter holds. The ring stays as it is.
    pub(super) fn adopt(
        disk: DiskId,
        epoch: Epoch,
        fds: CaptureFds,
        sizes: &Sizes,
    ) -> std::io::Result<Loaded> {
        let ring = Ring::open(fds.ring.as_fd()).expect("the agent before made it");
        assert_eq!((ring.config().disk, ring.config().epoch), (disk, epoch), "the session asked for it");
        let clock = HostClock::open(fds.clock.as_fd()).expect("the agent before made it");
        let spool = Spool::open(&sizes.spool, disk, epoch);
        let adopted = adopt(&File::from(fds.outbox), disk, epoch, sizes.outbox_bytes, spool.last())?;
        let parked = Parked::new(adopted, spool, (disk, epoch))?;
        let outbox = Arc::clone(parked.outbox());
        let acked = outbox.oldest_lsn().map_or(parked.last(), Lsn::prev);
        let (fd, packed) = (kept(&outbox), parked.last());
        let live = Self::new(epoch, outbox, Work::Parked(Box::new(parked)), Some((ring, clock)));
        Ok(Loaded { live, outbox: fd, acked, packed })
    }

    /// Goes on with an adopted ring.
    pub(super) fn resume(&mut self) -> Result<(), String> {
        let mut parked = match core::mem::replace(&mut self.work, Work::Over) {
            Work::Parked(parked) => parked,
            other => {
                self.work = other;
                return Ok(());
            }
        };
        parked.resume(self.ring.clone()).map_err(|error| error.to_string())?;
        self.work = Work::Running(Box::new(parked.into_worker()));
        self.producer = self.ring.as_ref().map(|(ring, clock)| producer(ring, clock));
        Ok(())
    }

    /// Ships what the spool has of an epoch whose ring is gone. `None` when it does not go on after `durable`.
    pub(super) fn recover(disk: DiskId, epoch: Epoch, durable: Lsn, sizes: &Sizes) -> Option<Self> {
        let mut spool = Spool::open(&sizes.spool, disk, epoch);
        let last = spool.last()?;
        if spool.first_lsn().is_none_or(|first| first > durable.next()) {
            return None;
        }
        spool.pass(durable).ok()?;
        let (outbox, writer) = Outbox::create(disk, epoch, sizes.outbox_bytes, last, durable).ok()?;
        outbox.release(durable);
        let packer = Packer::new(disk, epoch, last.disk_bytes);
        let worker = Worker::new((disk, epoch), None, writer, packer, spool, durable);
        Some(Self::new(epoch, outbox, Work::Running(Box::new(worker)), None))
    }

    pub(super) fn worker(&mut self) -> Option<&mut Worker> {
        match &mut self.work {
            Work::Running(worker) => Some(worker),
            Work::Parked(_) | Work::Over => None,
        }
    }

    pub(super) fn sample(&mut self, spool_bytes: u64) -> Sample {
        let (outbox_used_bytes, outbox_bytes) = (self.outbox.used_bytes(), self.outbox.capacity_bytes());
        let unacked_bytes = self.outbox.raw_bytes();
        let worker = self.worker().map(|worker| {
            (
                worker.captured(),
                worker.spool().used_bytes(),
                worker.spool().trouble().unwrap_or_default().to_owned(),
            )
        });
        let (captured_stamp, spool_used_bytes, spool_trouble) = worker.unwrap_or_default();
        let sample = Sample {
            mode: "off",
            captured_stamp,
            outbox_used_bytes,
            outbox_bytes,
            spool_used_bytes,
            spool_bytes,
            spool_trouble,
            unacked_bytes,
            ..Sample::default()
        };
        let Some((ring, clock)) = &self.ring else { return sample };
        Sample {
            mode: match ring.mode().mode {
                Mode::Off => "off",
                Mode::Tracking => "tracking",
                Mode::Capturing => "capturing",
            },
            captured_lsn: ring.captured_lsn(),
            ring_has_room: ring.has_room(),
            ring_used_bytes: ring.arena_used_bytes(),
            ring_bytes: ring.config().arena_bytes,
            dirty_bytes: ring.dirty().bytes(),
            waiting: ring.waiting(),
            sync: match ring.sync_state() {
                SyncState::Off => "off",
                SyncState::InForce => "in-force",
                SyncState::Suspended => "suspended",
                SyncState::Lost => "lost",
            },
            host_stamp: clock.now(),
            ..sample
        }
    }
}
