//! Guest requests that wait for the agent: for room in a full ring (policies `throttle` and `strict`), and flushes for
//! the server (sync mode).
//!
//! A request that has to wait takes a *place* in one of two lists, announces itself in the ring, looks again, and parks
//! as one that overlaps does. Nobody polls in the guest's path. One thread per capture ([`Capture::serve_waiters`])
//! sleeps on the ring's event and wakes those whose room or LSN is there or whose time is over. That thread also asks
//! its host, every [`ASK_PERIOD`] while somebody waits, whether QEMU itself is waiting for the disk's requests (a
//! drain: pause, unplug, snapshot, quit): those end only when the waiters go on, so they do, as under `track`.
//!
//! A place is freed exactly once, by who wakes it or by its own request that takes it back; whoever does so retracts
//! the announcement.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use capture_ring::{Mode, Overflow, Policy, Ring, SyncState};
use journal_format::Lsn;

use super::capture::Capture;
use super::request::{InFlight, State};
use super::{Begin, WaitToken, WakeFn, guard};

/// How many can wait at once in each list; who finds no place does not wait.
const PLACES: usize = 1024;
/// How often the host is asked while somebody waits, and how often all waits are looked at for safety.
const ASK_PERIOD: Duration = Duration::from_millis(100);
/// Longest sleep of the thread while nobody waits.
const IDLE: Duration = Duration::from_secs(60);
/// How often one request may look again without parking: each time room was there, and somebody else took it.
const MAX_LOOKS: u32 = 1000;

const FREE: usize = 0;
const CLAIMED: usize = 1;
/// Tokens are stored with this added, so that none is one of the above.
const TOKEN: usize = 2;
/// No time limit.
const NEVER: u64 = u64::MAX;

/// One place of a list.
struct Entry {
    token: AtomicUsize,
    /// Bytes of room, or an LSN.
    need: AtomicU64,
    /// When the wait is over, by the capture's clock.
    until_ns: AtomicU64,
}

/// A place that a request took.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Place(u16);

/// Requests that wait for the same kind of thing.
pub(crate) struct WaitList {
    entries: Box<[Entry]>,
    wake: WakeFn,
}

impl WaitList {
    pub(crate) fn new(wake: WakeFn) -> Self {
        let entry = || Entry {
            token: AtomicUsize::new(FREE),
            need: AtomicU64::new(0),
            until_ns: AtomicU64::new(NEVER),
        };
        Self { entries: (0..PLACES).map(|_| entry()).collect(), wake }
    }

    fn park(&self, ring: &Ring, token: WaitToken, need: u64, until_ns: u64) -> Option<Place> {
        for (index, entry) in self.entries.iter().enumerate() {
            // ORDERING: Acquire pairs with the release of whoever freed it; Relaxed: the next one is tried.
            let mine =
                entry.token.compare_exchange(FREE, CLAIMED, Ordering::Acquire, Ordering::Relaxed).is_ok();
            if mine {
                // ORDERING: Relaxed: published by the store of the token.
                entry.need.store(need, Ordering::Relaxed);
                entry.until_ns.store(until_ns, Ordering::Relaxed);
                // ORDERING: Release pairs with the Acquire in `wake`.
                entry.token.store(token.0.wrapping_add(TOKEN), Ordering::Release);
                ring.announce_waiter();
                return Some(Place(index as u16));
            }
        }
        None
    }

    /// Takes a place back; `false` when its token is being woken.
    fn unpark(&self, ring: &Ring, place: Place) -> bool {
        let entry = &self.entries[usize::from(place.0)];
        // ORDERING: Relaxed: our own store, or FREE.
        let token = entry.token.load(Ordering::Relaxed);
        // ORDERING: AcqRel; exactly one of all wakers and the request itself wins.
        let mine = token >= TOKEN
            && entry.token.compare_exchange(token, FREE, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        if mine {
            ring.retract_waiter();
        }
        mine
    }

    /// Wakes whoever needs what `wanted` says is there, or has waited until `now_ns`. Returns when the next wait is over.
    fn wake(&self, ring: &Ring, now_ns: u64, wanted: impl Fn(u64) -> bool) -> u64 {
        let mut next = NEVER;
        for entry in &self.entries {
            // ORDERING: Acquire pairs with the Release in `park`.
            let token = entry.token.load(Ordering::Acquire);
            if token < TOKEN {
                continue;
            }
            // ORDERING: Relaxed: published by the token. Another's numbers, should the place have changed hands, cost
            // that request one look for nothing, or one more period of this thread.
            let (need, until_ns) =
                (entry.need.load(Ordering::Relaxed), entry.until_ns.load(Ordering::Relaxed));
            if !wanted(need) && now_ns < until_ns {
                next = next.min(until_ns);
                continue;
            }
            // ORDERING: AcqRel as in `unpark`.
            if entry.token.compare_exchange(token, FREE, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                ring.retract_waiter();
                (self.wake)(WaitToken(token.wrapping_sub(TOKEN)));
            }
        }
        next
    }
}

/// A guest's flush, or write with FUA, on its way to being durable.
#[derive(Debug)]
pub struct SyncWait {
    lsn: Lsn,
    since_ns: Option<u64>,
    looks: u32,
}

impl SyncWait {
    /// Waits until this LSN is durable.
    #[must_use]
    pub const fn new(lsn: Lsn) -> Self {
        Self { lsn, since_ns: None, looks: 0 }
    }
}

/// Who may wait.
#[derive(Debug)]
pub(crate) struct Permission {
    /// The capture is being ended.
    closing: AtomicBool,
    /// QEMU waits for the disk's requests.
    suspended: AtomicBool,
}

impl Permission {
    pub(crate) const fn new() -> Self {
        Self { closing: AtomicBool::new(false), suspended: AtomicBool::new(false) }
    }

    fn is_given(&self) -> bool {
        // ORDERING: SeqCst: after the announcement, in one order with the stores and their look at the lists.
        !self.closing.load(Ordering::SeqCst) && !self.suspended.load(Ordering::SeqCst)
    }
}

impl Capture {
    /// The ring is full. `Some(Wait)`: the request has parked. `Some(Go)`: look again at once. `None`: it does not wait.
    #[cold]
    pub(super) fn wait_for_room(
        &self,
        bytes: u64,
        token: WaitToken,
        in_flight: &mut InFlight,
    ) -> Option<Begin> {
        let ring = self.producer().ring();
        let policy = ring.policy();
        in_flight.looks = in_flight.looks.saturating_add(1);
        if !self.may_wait_for_room(policy) || !ring.can_fit(bytes) || in_flight.looks > MAX_LOOKS {
            return None;
        }
        let now_ns = self.now_ns();
        let since_ns = *in_flight.waiting_since_ns.get_or_insert(now_ns);
        let until_ns = match policy.overflow {
            Overflow::Throttle => after(since_ns, policy.throttle_ms),
            Overflow::Track | Overflow::Strict => NEVER,
        };
        if now_ns >= until_ns {
            return None;
        }
        let place = self.room().park(ring, token, bytes, until_ns)?;
        in_flight.state = State::Waiting(place);
        let again = ring.fits(bytes) || !self.may_wait_for_room(ring.policy());
        if again && self.room().unpark(ring, place) {
            in_flight.state = State::Entered;
            return Some(Begin::Go);
        }
        in_flight.looks = 0;
        ring.raise_event();
        Some(Begin::Wait)
    }

    fn may_wait_for_room(&self, policy: Policy) -> bool {
        policy.overflow != Overflow::Track && self.permission().is_given() && self.mode() == Mode::Capturing
    }

    /// Takes a request back that waits for room; see [`Capture::withdraw`].
    pub(super) fn leave_room(&self, place: Place) -> bool {
        self.room().unpark(self.producer().ring(), place)
    }

    /// Whether a flush may complete: `Wait` parks it with the token, which is woken; then ask again. Without sync mode,
    /// or while that is not in force, it may at once.
    pub fn wait_durable(&self, wait: &mut SyncWait, token: WaitToken) -> Begin {
        guard(|| self.try_wait_durable(wait, token)).unwrap_or_else(|message| {
            self.fault(&message);
            Begin::Go
        })
    }

    fn try_wait_durable(&self, wait: &mut SyncWait, token: WaitToken) -> Begin {
        let ring = self.producer().ring();
        while !self.is_sync_over(wait.lsn) {
            let policy = ring.policy();
            let now_ns = self.now_ns();
            let since_ns = *wait.since_ns.get_or_insert(now_ns);
            let until_ns = after(since_ns, policy.sync_timeout_ms);
            wait.looks = wait.looks.saturating_add(1);
            let place = (now_ns < until_ns && wait.looks <= MAX_LOOKS)
                .then(|| self.durable().park(ring, token, wait.lsn.0, until_ns));
            let Some(place) = place.flatten() else {
                ring.lose_sync(wait.lsn);
                return Begin::Go;
            };
            if self.is_sync_over(wait.lsn) && self.durable().unpark(ring, place) {
                continue;
            }
            ring.raise_event();
            return Begin::Wait;
        }
        if !self.permission().is_given() && ring.policy().sync && ring.durable_lsn() < wait.lsn {
            ring.lose_sync(wait.lsn);
        }
        Begin::Go
    }

    /// Whether a flush with that LSN has nothing to wait for (any more).
    fn is_sync_over(&self, lsn: Lsn) -> bool {
        let ring = self.producer().ring();
        ring.durable_lsn() >= lsn || ring.sync_state() != SyncState::InForce || !self.permission().is_given()
    }

    /// From now on nobody waits in this capture, and who does goes on. Call it before draining the disk in order to end
    /// the capture: draining waits for all requests.
    pub fn release_waiters(&self) {
        // ORDERING: SeqCst: before the look at the lists.
        self.permission().closing.store(true, Ordering::SeqCst);
        self.wake_waiters();
    }

    /// Wakes everybody who waits, to look again.
    pub(super) fn wake_waiters(&self) {
        let ring = self.producer().ring();
        let _ = self.room().wake(ring, NEVER, |_| true);
        let _ = self.durable().wake(ring, NEVER, |_| true);
        ring.raise_event();
    }

    /// Wakes who waits, when it is time; returns when capture is off. The body of a thread of this capture's own.
    /// `must_go` is asked whether QEMU waits for the disk's requests; it may block for a second or so.
    pub fn serve_waiters(&self, mut must_go: impl FnMut() -> bool) {
        let ring = self.producer().ring();
        let mut waiters = Waiters::new(self);
        loop {
            let seen = ring.event();
            let Some(most) = waiters.step(self, &mut must_go) else { return };
            ring.wait_event(seen, most);
        }
    }

    /// Wakes who need not wait any more, or everybody; returns when the next wait is over.
    fn wake_ready(&self, everybody: bool) -> u64 {
        let ring = self.producer().ring();
        let now_ns = self.now_ns();
        let no_room = everybody || !self.may_wait_for_room(ring.policy());
        let room = self.room().wake(ring, now_ns, |bytes| no_room || ring.fits(bytes));
        let durable = self.durable().wake(ring, now_ns, |lsn| everybody || self.is_sync_over(Lsn(lsn)));
        room.min(durable)
    }
}

/// Who waits in one capture, as the one who wakes them sees it: [`Capture::serve_waiters`] without its thread and its sleep.
#[derive(Debug)]
pub struct Waiters {
    known: Policy,
    /// Since when somebody has waited without a break; 0 for nobody.
    since_ns: u64,
    /// When the host was asked last.
    asked_ns: u64,
}

impl Waiters {
    /// Nobody has waited yet.
    #[must_use]
    pub fn new(capture: &Capture) -> Self {
        Self { known: capture.producer().ring().policy(), since_ns: 0, asked_ns: 0 }
    }

    /// Wakes whoever need not wait any more. Returns how long to sleep at most, unless the ring's event comes; `None` when
    /// capture is off and nobody waits, for ever.
    pub fn step(&mut self, capture: &Capture, must_go: impl FnOnce() -> bool) -> Option<Duration> {
        let ring = capture.producer().ring();
        if capture.mode() == Mode::Off {
            capture.wake_waiters();
            ring.set_waiting_since_ns(0);
            return None;
        }
        // ORDERING: SeqCst as in `is_given`; only this thread stores it.
        let suspended = capture.permission().suspended.load(Ordering::SeqCst);
        if ring.waiting() == 0 && !suspended {
            self.since_ns = 0;
            ring.set_waiting_since_ns(0);
            return Some(IDLE);
        }
        let now_ns = capture.now_ns();
        if self.since_ns == 0 || ring.waiting() == 0 {
            self.asked_ns = if self.since_ns == 0 { now_ns } else { self.asked_ns };
            self.since_ns = now_ns;
            ring.set_waiting_since_ns(now_ns);
        }
        if now_ns.saturating_sub(self.asked_ns) >= ASK_PERIOD.as_nanos() as u64 {
            self.asked_ns = now_ns;
            let suspend = must_go();
            // ORDERING: SeqCst as above, before the look at the lists.
            capture.permission().suspended.store(suspend, Ordering::SeqCst);
        }
        let policy = ring.policy();
        let next_ns = capture.wake_ready(policy != core::mem::replace(&mut self.known, policy));
        let left = Duration::from_nanos(next_ns.saturating_sub(capture.now_ns()));
        Some(left.min(ASK_PERIOD))
    }
}

fn after(since_ns: u64, milliseconds: u32) -> u64 {
    since_ns.saturating_add(u64::from(milliseconds).saturating_mul(1_000_000))
}

#[cfg(test)]
#[path = "waiting_tests.rs"]
mod tests;
