//! The drain: one thread per protected disk that takes records out of the ring, packs them and puts the frames into
//! the outbox. What it does is in [`worker`]; here is only the thread that makes the steps.
//!
//! It polls on a short timer while writes come, so that no guest write has to wake anybody, and sleeps on the ring's
//! bell when nothing has come for a while. When the outbox is full, and the spool too, it waits and takes nothing
//! more: then the ring fills, and the filter goes on without capture until there is room.

pub mod parked;
pub mod worker;

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use capture_ring::Bell;
use journal_format::Stamp;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use self::worker::{Pace, Worker};
use crate::compare::{Answer, HashBox, SyncBytes};
use crate::drill::Drill;
use crate::error::AgentError;
use crate::events::Sender;
use crate::limits::{DRAIN_NAP, DRAIN_POLL};
use crate::session::{Ending, Event};

/// How long one wait for room in the outbox lasts.
const ROOM_WAIT: Duration = Duration::from_millis(50);

/// What hub and drain thread share.
#[derive(Debug, Default)]
struct Shared {
    /// 0, or how to end.
    ending: AtomicU8,
    discard: AtomicBool,
    captured_stamp: AtomicU64,
    spool_bytes: AtomicU64,
    /// Why the spool cannot be written to; empty when it can.
    spool_trouble: Mutex<String>,
}

/// A drain, begun or not.
#[derive(Debug)]
pub struct Drain {
    shared: Arc<Shared>,
    hashes: Arc<HashBox>,
    sync_bytes: Arc<SyncBytes>,
    /// Wakes the thread. The filter's bell is never used for that: who shares it could make a write to it block.
    wake: Bell,
    parked: Option<Driver>,
    thread: Option<JoinHandle<()>>,
}

impl Drain {
    /// A drain that has not begun. `bell` is the filter's; `None` when there is no ring any more. `drill` may stall it.
    ///
    /// # Errors
    /// When the kernel refuses a descriptor.
    pub fn new(
        worker: Worker,
        bell: Option<Bell>,
        events: Sender,
        drill: Option<Drill>,
    ) -> Result<Self, AgentError> {
        let ring = |error: capture_ring::RingError| AgentError::Ring(error.to_string());
        let wake = Bell::create().map_err(ring)?;
        let sleeper = Sleeper::new(bell, wake.duplicate().map_err(ring)?)?;
        let shared = Arc::new(Shared::default());
        let (hashes, sync_bytes) = (worker.hashes(), worker.sync_bytes());
        let (started, shared_too) = (Instant::now(), Arc::clone(&shared));
        let parked = Driver { worker, sleeper, events, shared: shared_too, started, drill };
        Ok(Self { shared, hashes, sync_bytes, wake, parked: Some(parked), thread: None })
    }

    /// Starts the thread, once.
    ///
    /// # Errors
    /// When the kernel refuses a thread.
    pub fn start(&mut self) -> Result<(), AgentError> {
        let Some(driver) = self.parked.take() else { return Ok(()) };
        let thread = std::thread::Builder::new().name("cdp-drain".into()).spawn(move || driver.run());
        self.thread = Some(thread.map_err(AgentError::os("cannot start a drain thread"))?);
        Ok(())
    }

    /// What wakes the thread, for producers of this process.
    ///
    /// # Errors
    /// When the kernel refuses a descriptor.
    pub fn bell(&self) -> Result<Bell, AgentError> {
        self.wake.duplicate().map_err(|error| AgentError::Ring(error.to_string()))
    }

    /// Tells the drain how to end; it answers with `Drained`.
    pub fn end(&self, ending: Ending) {
        let code = match ending {
            Ending::Detached => 1,
            Ending::Dead => 2,
            Ending::AgentStops => 3,
        };
        // ORDERING: Release pairs with `Driver::ending`. The largest wins: the agent's own end comes last.
        self.shared.ending.fetch_max(code, Ordering::Release);
        self.wake.ring();
    }

    /// The epoch cannot go on: what is not shipped is thrown away.
    pub fn discard(&self) {
        // ORDERING: Release pairs with the Acquire in `Driver::run`; a flag that stands alone.
        self.shared.discard.store(true, Ordering::Release);
        self.wake.ring();
    }

    /// Gives it an answer to a question for hashes.
    pub fn give_hashes(&self, answer: Answer) {
        self.hashes.put(answer);
    }

    /// What the running or last sync did.
    #[must_use]
    pub fn sync_bytes(&self) -> &SyncBytes {
        &self.sync_bytes
    }

    /// Stamp of the newest record taken out.
    #[must_use]
    pub fn captured_stamp(&self) -> Stamp {
        // ORDERING: a gauge.
        Stamp(self.shared.captured_stamp.load(Ordering::Relaxed))
    }

    /// Bytes in the spool, and why it cannot be written to now; empty when it can.
    #[must_use]
    pub fn spool(&self) -> (u64, String) {
        let trouble = self.shared.spool_trouble.lock().unwrap_or_else(PoisonError::into_inner);
        // ORDERING: a gauge.
        (self.shared.spool_bytes.load(Ordering::Relaxed), trouble.clone())
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

/// Waits for the filter's bell or our own. Neither is ever read (only edges count), so that no peer can make it block.
#[derive(Debug)]
struct Sleeper {
    epoll: Epoll,
    _bells: (Option<Bell>, Bell),
}

impl Sleeper {
    fn new(bell: Option<Bell>, wake: Bell) -> Result<Self, AgentError> {
        let what = "cannot make a drain's epoll";
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(AgentError::errno(what))?;
        let edge = || EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 0);
        epoll.add(wake.as_fd(), edge()).map_err(AgentError::errno(what))?;
        if let Some(bell) = &bell {
            epoll.add(bell.as_fd(), edge()).map_err(AgentError::errno(what))?;
        }
        Ok(Self { epoll, _bells: (bell, wake) })
    }

    fn wait(&self, timeout: Duration) {
        let timeout = EpollTimeout::try_from(timeout).unwrap_or(EpollTimeout::ZERO);
        // An interrupted or failed wait is an early return, which the loop expects anyway.
        let _ = self.epoll.wait(&mut [EpollEvent::empty(); 2], timeout);
    }
}

#[derive(Debug)]
struct Driver {
    worker: Worker,
    sleeper: Sleeper,
    events: Sender,
    shared: Arc<Shared>,
    started: Instant,
    drill: Option<Drill>,
}

impl Driver {
    fn run(mut self) {
        let (disk, epoch) = self.worker.of();
        loop {
            // ORDERING: Acquire pairs with `Drain::discard`.
            if self.shared.discard.load(Ordering::Acquire) {
                self.worker.discard();
            }
            if let Some(left) = self.drill.as_ref().and_then(Drill::stalls_drains)
                && self.ending().is_none()
            {
                std::thread::sleep(left.min(ROOM_WAIT));
                continue;
            }
            let now = self.started.elapsed();
            let step = self.worker.step(now, self.ending());
            self.publish();
            while let Some(wanted) = self.worker.ask(now) {
                if self.events.event(Event::HashesWanted(disk, epoch, wanted)).is_err() {
                    return;
                }
            }
            let packed = match &step {
                Ok(step) => step.packed,
                Err(_) => Some(self.worker.packed()),
            };
            if let Some(lsn) = packed
                && self.events.event(Event::Packed(disk, epoch, lsn)).is_err()
            {
                return;
            }
            let last = match step.map(|step| step.pace) {
                Ok(Pace::Ended) => Event::Drained(disk, epoch, self.worker.packed()),
                Ok(pace) => {
                    self.pause(pace);
                    continue;
                }
                Err(stop) => Event::RingFault(disk, epoch, stop.reason(), stop.to_string()),
            };
            let _ = self.events.event(last);
            return;
        }
    }

    fn publish(&self) {
        let (shared, spool) = (&self.shared, self.worker.spool());
        // ORDERING: gauges.
        shared.captured_stamp.store(self.worker.captured().0, Ordering::Relaxed);
        shared.spool_bytes.store(spool.used_bytes(), Ordering::Relaxed);
        let trouble = spool.trouble().unwrap_or_default();
        let mut told = shared.spool_trouble.lock().unwrap_or_else(PoisonError::into_inner);
        if *told != trouble {
            trouble.clone_into(&mut told);
        }
    }

    fn pause(&mut self, pace: Pace) {
        match pace {
            Pace::Busy | Pace::Ended => {}
            Pace::Poll => std::thread::sleep(DRAIN_POLL),
            Pace::Blocked => self.worker.writer().wait_for_release(ROOM_WAIT),
            Pace::Idle => {
                if self.worker.arm_sleep() {
                    self.sleeper.wait(DRAIN_NAP);
                }
                self.worker.disarm_sleep();
            }
        }
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
}

#[cfg(test)]
mod tests;
