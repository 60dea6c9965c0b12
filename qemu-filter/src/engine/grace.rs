//! Counts requests in flight, and tells when all that had begun by a given moment have ended.
//!
//! Two counters and a phase: a request counts in the counter of the phase that it began in. A *grace period*
//! changes the phase and waits until the old counter is 0. Requests that begin meanwhile count in the other
//! one, so a grace period ends under any load, as soon as the requests that it found have ended.
//!
//! # Why the resync waits for two of them
//!
//! In tracking, requests go to the disk unserialised and unrecorded. Suppose capture resumes while such a
//! request T is in flight, and an overlapping captured request C begins. The disk may do C first and T second,
//! and still C may be *finished* last. A background read between the two ends of them would be numbered before
//! C, and replaying C over it would leave C's data where the disk has T's, for good.
//!
//! So when capture has (re)started with generation g, no chunk is read before
//! 1. every request that began before has ended (no tracked request, no captured one of an older generation is
//!    in flight any more), and then
//! 2. every request that began before *that* has ended: whatever ran beside a tracked request is over.
//!
//! From then on all requests in flight are captured and serialised against each other, and the disk holds
//! the result of everything else: a read numbered now is overtaken only by records whose order is the disk's.
//! Tracked requests themselves need no serialisation: their range stays dirty until after step 2.

use std::sync::atomic::{AtomicU64, Ordering};

/// In which counter a request counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Phase(bool);

/// On cache lines of its own: every request writes to it.
#[repr(align(128))]
pub(crate) struct InFlightCount {
    phase: AtomicU64,
    counts: [AtomicU64; 2],
}

impl InFlightCount {
    pub(crate) const fn new() -> Self {
        Self { phase: AtomicU64::new(0), counts: [const { AtomicU64::new(0) }; 2] }
    }

    /// Counts a request that begins. What it reads after this is at least as new as what was written before the
    /// last grace period began.
    pub(crate) fn enter(&self) -> Phase {
        loop {
            // ORDERING: a first guess; checked below.
            let seen = self.phase.load(Ordering::Relaxed);
            let phase = Phase(seen & 1 == 1);
            // ORDERING: SeqCst, before the second look at the phase in the total order: either that look sees the
            // change, or `is_over` sees this count.
            self.count(phase).fetch_add(1, Ordering::SeqCst);
            // ORDERING: SeqCst as above; also acquires what was done before the phase changed.
            if self.phase.load(Ordering::SeqCst) == seen {
                return phase;
            }
            // ORDERING: nobody has relied on this count.
            self.count(phase).fetch_sub(1, Ordering::Release);
        }
    }

    /// The request has ended.
    pub(crate) fn leave(&self, phase: Phase) {
        // ORDERING: Release pairs with `is_over` and `total`: all that the request did comes before.
        self.count(phase).fetch_sub(1, Ordering::Release);
    }

    /// Begins a grace period; the previous one has to be over. One thread at a time (the resync's).
    pub(crate) fn begin_grace(&self) {
        // ORDERING: SeqCst, see `enter`.
        self.phase.fetch_add(1, Ordering::SeqCst);
    }

    /// Whether every request that had entered before `begin_grace` has left.
    pub(crate) fn is_over(&self) -> bool {
        // ORDERING: only the resync changes it.
        let old = Phase(self.phase.load(Ordering::Relaxed) & 1 == 0);
        // ORDERING: SeqCst, see `enter`; acquires what the leaving requests did.
        self.count(old).load(Ordering::SeqCst) == 0
    }

    /// Requests in flight now.
    pub(crate) fn total(&self) -> u64 {
        // ORDERING: SeqCst: whoever has made sure that no request begins any more sees the last one leave.
        self.counts.iter().map(|count| count.load(Ordering::SeqCst)).sum()
    }

    const fn count(&self, phase: Phase) -> &AtomicU64 {
        &self.counts[phase.0 as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grace_period_waits_for_requests_that_began_before_it_only() {
        let count = InFlightCount::new();
        let before = count.enter();
        count.begin_grace();
        assert!(!count.is_over());
        let after = count.enter();
        count.leave(before);
        assert!(count.is_over(), "the later request does not hold it up");
        count.begin_grace();
        assert!(!count.is_over(), "but it holds up the next one");
        count.leave(after);
        assert!(count.is_over());
        assert_eq!(count.total(), 0);
    }
}
