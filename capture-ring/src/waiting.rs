//! How the filter waits for the agent: for room in the ring, and for durability.
//!
//! A request or flush that has to wait first *announces* itself and then *looks again*; the agent first makes room (or
//! stores the durable LSN) and then looks whether anybody is announced. A fence on either side: whoever comes second
//! sees the other, so nobody is forgotten (`tests/loom_waiting.rs`). While nobody waits the agent pays one load per
//! batch and the guest nothing.
//!
//! The waking goes through one word that both sides raise, whose low half is a futex. One thread of the filter sleeps
//! on it and wakes the guest's requests. It is in the ring, so it needs no descriptor and outlives the agent.

use core::time::Duration;

use journal_format::Lsn;

use crate::limits::{SLAB_UNITS, UNIT_BYTES};
use crate::ring::Ring;
use crate::slots::Class;
use crate::sync::{Ordering, fence};

impl Ring {
    /// One more waits. Look again after this whether it has to: with [`Ring::fits`] or [`Ring::durable_lsn`].
    pub fn announce_waiter(&self) {
        // ORDERING: Relaxed, ordered by the fence.
        self.memory().words().waiting.fetch_add(1, Ordering::Relaxed);
        // ORDERING: pairs with the fence in `tell_waiters`: either that sees us, or we see what came before it.
        fence(Ordering::SeqCst);
    }

    /// One fewer waits.
    pub fn retract_waiter(&self) {
        // ORDERING: Relaxed: somebody who sees the old count raises the event once too often.
        self.memory().words().waiting.fetch_sub(1, Ordering::Relaxed);
    }

    /// How many wait now. A gauge.
    #[must_use]
    pub fn waiting(&self) -> u64 {
        // ORDERING: a gauge.
        self.memory().words().waiting.load(Ordering::Relaxed)
    }

    /// Since when somebody has waited without a break, in nanoseconds of the host's monotonic clock; 0 for nobody.
    #[must_use]
    pub fn waiting_since_ns(&self) -> u64 {
        // ORDERING: a gauge.
        self.memory().words().waiting_since.load(Ordering::Relaxed)
    }

    /// For how long somebody has waited without a break. A gauge.
    #[cfg(not(loom))]
    #[must_use]
    pub fn waited(&self) -> Duration {
        match self.waiting_since_ns() {
            0 => Duration::ZERO,
            since_ns => Duration::from_nanos(crate::monotonic_ns().saturating_sub(since_ns)),
        }
    }

    /// Stores [`Ring::waiting_since_ns`]. The filter's waiting thread.
    pub fn set_waiting_since_ns(&self, since_ns: u64) {
        // ORDERING: a gauge.
        self.memory().words().waiting_since.store(since_ns, Ordering::Relaxed);
    }

    /// After making room, storing the durable LSN or changing the policy: wakes the filter's waiting thread, if there
    /// is anybody for it to wake. One load otherwise.
    pub fn tell_waiters(&self) {
        // ORDERING: pairs with the fence in `announce_waiter`.
        fence(Ordering::SeqCst);
        if self.waiting() > 0 {
            self.raise_event();
        }
    }

    /// Wakes the filter's waiting thread: it is to look at everything. A system call.
    pub fn raise_event(&self) {
        // ORDERING: Release pairs with `event`: who sees the new value sees what was changed before.
        self.memory().words().event.fetch_add(1, Ordering::Release);
        self.memory().wake_event();
    }

    /// The event's value, for [`Ring::wait_event`]: read it, look at everything, then wait.
    #[must_use]
    pub fn event(&self) -> u32 {
        // ORDERING: Acquire as above.
        self.memory().words().event.load(Ordering::Acquire) as u32
    }

    /// Sleeps until the event's value is not `seen`, or the time is over, or for no reason.
    pub fn wait_event(&self, seen: u32, timeout: Duration) {
        self.memory().wait_event(seen, timeout);
    }

    /// Whether a request with so many bytes of data would find room now.
    #[must_use]
    pub fn fits(&self, bytes: u64) -> bool {
        let free = self.arena().free_slabs().saturating_mul(u64::from(SLAB_UNITS));
        let units = free.saturating_add(self.arena().left_units());
        self.slots().credits() > self.slots().floor(Class::Request) && units >= units_of(bytes)
    }

    /// Whether a request with so many bytes of data could ever find room.
    #[must_use]
    pub fn can_fit(&self, bytes: u64) -> bool {
        units_of(bytes) <= self.geometry().units
    }

    /// Up to which LSN everything is durable at the server, as far as the agent has said.
    #[must_use]
    pub fn durable_lsn(&self) -> Lsn {
        // ORDERING: Acquire pairs with `set_durable_lsn`.
        Lsn(self.memory().words().durable.load(Ordering::Acquire))
    }

    /// The server has made everything up to this LSN durable: flushes that wait for it complete. The agent's side.
    pub fn set_durable_lsn(&self, lsn: Lsn) {
        // ORDERING: Release pairs with `durable_lsn`; `tell_waiters` has the fence.
        self.memory().words().durable.fetch_max(lsn.0, Ordering::Release);
        self.tell_waiters();
    }
}

/// A request without data takes one unit for its header.
fn units_of(bytes: u64) -> u64 {
    bytes.div_ceil(u64::from(UNIT_BYTES)).max(1)
}
