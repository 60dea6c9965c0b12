//! What the operator chose for a disk, in two words of the ring that the agent writes and the filter reads when it
//! matters: when the ring is full, and at a guest's flush. Both may change at any time.

use crate::ring::Ring;
use crate::sync::Ordering;

/// What happens to a guest's request that finds the ring full.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(u8)]
pub enum Overflow {
    /// It goes on unrecorded at once: a gap begins.
    #[default]
    Track = 0,
    /// It waits for room up to [`Policy::throttle_ms`], then goes on unrecorded.
    Throttle = 1,
    /// It waits for room without bound.
    Strict = 2,
}

/// A disk's policies.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Policy {
    /// When the ring is full.
    pub overflow: Overflow,
    /// With [`Overflow::Throttle`]: longest wait of one request in milliseconds.
    pub throttle_ms: u32,
    /// Whether a guest's flush completes only when everything before it is durable at the server.
    pub sync: bool,
    /// Longest wait of one flush in milliseconds.
    pub sync_timeout_ms: u32,
}

/// Whether flushes are what sync mode promises.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(u8)]
pub enum SyncState {
    /// Sync mode is off.
    #[default]
    Off = 0,
    /// A flush that completes is durable at the server.
    InForce = 1,
    /// It cannot be: history has a gap, or the disk is only tracked. Flushes complete at once.
    Suspended = 2,
    /// A flush has waited for too long. Flushes complete at once until the server has caught up.
    Lost = 3,
}

const fn pack(what: u8, milliseconds: u32) -> u64 {
    what as u64 | (milliseconds as u64) << 32
}

impl Ring {
    /// The policies now. What is not known counts as the default.
    #[must_use]
    pub fn policy(&self) -> Policy {
        let words = self.memory().words();
        // ORDERING: Relaxed: each word is whole by itself, and who waits is told to look again after a change.
        let (policy, sync) = (words.policy.load(Ordering::Relaxed), words.sync.load(Ordering::Relaxed));
        let overflow = match policy as u8 {
            1 => Overflow::Throttle,
            2 => Overflow::Strict,
            _ => Overflow::Track,
        };
        Policy {
            overflow,
            throttle_ms: (policy >> 32) as u32,
            sync: sync as u8 == 1,
            sync_timeout_ms: (sync >> 32) as u32,
        }
    }

    /// Changes the policies; who waits under the old ones looks again. The agent's side.
    pub fn set_policy(&self, policy: Policy) {
        let words = self.memory().words();
        // ORDERING: Relaxed: see `policy`; `tell_waiters` has the fence.
        words.policy.store(pack(policy.overflow as u8, policy.throttle_ms), Ordering::Relaxed);
        words.sync.store(pack(u8::from(policy.sync), policy.sync_timeout_ms), Ordering::Relaxed);
        self.tell_waiters();
    }

    /// What the last flush, or the wait that ended it, said of sync mode. Off and suspended show without a flush.
    #[must_use]
    pub fn sync_state(&self) -> SyncState {
        if !self.policy().sync {
            return SyncState::Off;
        }
        if self.mode().mode != crate::Mode::Capturing || self.gap_is_open() {
            return SyncState::Suspended;
        }
        // ORDERING: Relaxed: compared with another gauge.
        let lost = self.memory().words().sync_lost.load(Ordering::Relaxed);
        if lost > self.durable_lsn().0 { SyncState::Lost } else { SyncState::InForce }
    }

    /// A flush that needed this LSN durable has waited for too long. The filter's side.
    pub fn lose_sync(&self, lsn: journal_format::Lsn) {
        // ORDERING: Relaxed: only its own value counts.
        self.memory().words().sync_lost.fetch_max(lsn.0, Ordering::Relaxed);
    }
}
