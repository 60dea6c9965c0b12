//! The host's clock: one page shared by all filters and the agent of a host.

use std::sync::Arc;

use journal_format::Stamp;

use crate::limits::MAX_STAMP;
use crate::raw::ClockMemory;
use crate::sync::Ordering;

/// The hybrid clock of a host: `max(last + 1, wall clock)`, so every stamp is greater than all stamps given before
/// on the host, whichever process or thread asked, and as close to wall time as that allows.
///
/// Cloning gives another handle to the same page.
#[derive(Clone)]
pub struct HostClock {
    memory: Arc<ClockMemory>,
}

impl core::fmt::Debug for HostClock {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_tuple("HostClock").field(&self.last()).finish()
    }
}

#[cfg(not(loom))]
mod shared {
    use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
    use std::sync::Arc;

    use super::HostClock;
    use crate::error::{RingError, RingErrorKind};
    use crate::layout::{CLOCK_BYTES, CLOCK_MAGIC, VERSION};
    use crate::raw::{ClockMemory, create_sealed, file_bytes};
    use crate::sync::Ordering;

    impl HostClock {
        /// A new clock page, and the descriptor to hand to every filter of the host.
        ///
        /// # Errors
        /// `Os` when the kernel refuses the memfd.
        pub fn create() -> Result<(Self, OwnedFd), RingError> {
            let fd = create_sealed(c"cdp-clock", CLOCK_BYTES)?;
            let memory = ClockMemory::map(fd.as_fd())?;
            for (word, value) in memory.signature().into_iter().zip([CLOCK_MAGIC, u64::from(VERSION)]) {
                // ORDERING: nobody else has the descriptor yet; handing it over orders everything.
                word.store(value, Ordering::Relaxed);
            }
            Ok((Self { memory: Arc::new(memory) }, fd))
        }

        /// Opens a clock page made by [`HostClock::create`], here or in another process.
        ///
        /// # Errors
        /// `Layout` when it is none, `Os` when it cannot be mapped.
        pub fn open(fd: BorrowedFd<'_>) -> Result<Self, RingError> {
            if file_bytes(fd)? != CLOCK_BYTES {
                return Err(RingError::new(RingErrorKind::Layout, "the descriptor is not a clock page"));
            }
            let memory = ClockMemory::map(fd)?;
            // ORDERING: written before the descriptor was handed over.
            let found = memory.signature().map(|word| word.load(Ordering::Relaxed));
            if found != [CLOCK_MAGIC, u64::from(VERSION)] {
                return Err(RingError::new(
                    RingErrorKind::Layout,
                    "the clock page has another magic or version",
                ));
            }
            Ok(Self { memory: Arc::new(memory) })
        }
    }
}

impl HostClock {
    /// A clock that starts at 0 and knows no wall time, so that loom's executions repeat.
    #[cfg(loom)]
    #[must_use]
    pub fn for_loom() -> Self {
        Self { memory: Arc::new(ClockMemory::new()) }
    }

    /// A stamp greater than every stamp given before on this host.
    #[inline]
    #[must_use]
    pub fn now(&self) -> Stamp {
        let wall = wall_ns();
        let last = self.memory.last();
        // ORDERING: a first guess, checked by the exchange below.
        let mut seen = last.load(Ordering::Relaxed);
        loop {
            // A page that holds nonsense is brought back to wall time rather than believed.
            let next = if seen < MAX_STAMP { wall.max(seen.saturating_add(1)) } else { wall };
            // ORDERING: only the modification order of this one word matters: a caller that learned of an earlier
            // stamp's request (through the device, the guest, or `tail` in `slots`) finds a value at least as new.
            match last.compare_exchange_weak(seen, next, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return Stamp(next),
                Err(newer) => seen = newer,
            }
        }
    }

    /// The newest stamp given out; does not move the clock.
    #[inline]
    #[must_use]
    pub fn last(&self) -> Stamp {
        // ORDERING: pairs with the exchange in `now`: a stamp that reached us through a published slot was given
        // before, so this load returns it or a newer one.
        Stamp(self.memory.last().load(Ordering::Acquire))
    }

    /// Makes every later stamp greater than `stamp`: used when the journal already holds newer ones than the wall
    /// clock says. A stamp beyond the year 2262 is ignored.
    pub fn raise_to(&self, stamp: Stamp) {
        if stamp.0 < MAX_STAMP {
            // ORDERING: as in `now`.
            self.memory.last().fetch_max(stamp.0, Ordering::AcqRel);
        }
    }
}

/// Wall time in nanoseconds since 1970, 0 before.
#[cfg(not(loom))]
#[inline]
fn wall_ns() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    since.as_secs().saturating_mul(1_000_000_000).saturating_add(u64::from(since.subsec_nanos()))
}

#[cfg(loom)]
const fn wall_ns() -> u64 {
    0
}
