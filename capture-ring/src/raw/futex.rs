//! The event's futex, and the clock by which waits are measured. Not private: the two sides are two processes.

use core::time::Duration;
use std::ptr::null;

use super::Memory;

impl Memory {
    fn event_word(&self) -> *mut u32 {
        // The low half is the first: this is a little-endian machine, as `docs/formats/ring.md` asks for.
        self.words().event.as_ptr().cast()
    }

    /// Wakes who sleeps in [`Memory::wait_event`], in any process.
    pub(crate) fn wake_event(&self) {
        // SAFETY: FUTEX_WAKE does not access the word, which is in our mapping.
        unsafe { libc::syscall(libc::SYS_futex, self.event_word(), libc::FUTEX_WAKE, i32::MAX) };
    }

    /// Sleeps while the event's low half is `seen`, at most for the time given.
    pub(crate) fn wait_event(&self, seen: u32, timeout: Duration) {
        let timeout = libc::timespec {
            tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(timeout.subsec_nanos()),
        };
        // SAFETY: FUTEX_WAIT reads the aligned word in our mapping; the timeout outlives the call.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                self.event_word(),
                libc::FUTEX_WAIT,
                seen,
                &raw const timeout,
                null::<u32>(),
                0,
            )
        };
    }
}

const _: () = assert!(cfg!(target_endian = "little"));

/// Nanoseconds of `CLOCK_MONOTONIC`, the same in all processes of a host. Read in user space.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a live place for the answer; this clock exists everywhere.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(now.tv_nsec).unwrap_or(0))
}
