//! How a thread of a C caller waits for an overlapping request.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::engine::WaitToken;

const WAITING: u32 = 0;
const WOKEN: u32 = 1;

/// Lives on the waiting thread's stack; its address is the token.
#[derive(Default)]
pub(super) struct Waiter(AtomicU32);

impl Waiter {
    pub(super) fn token(&self) -> WaitToken {
        WaitToken(std::ptr::from_ref(&self.0) as usize)
    }

    /// Blocks until [`wake`] was called with the token, and makes the waiter ready for the next time.
    pub(super) fn wait(&self) {
        // ORDERING: Acquire pairs with the Release in `wake`.
        while self.0.load(Ordering::Acquire) == WAITING {
            // SAFETY: FUTEX_WAIT reads the word, which lives as long as `self`; no timeout is given.
            unsafe {
                libc::syscall(
                    libc::SYS_futex,
                    self.0.as_ptr(),
                    libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
                    WAITING,
                    std::ptr::null::<libc::timespec>(),
                )
            };
        }
        // ORDERING: Relaxed: nobody wakes before the next park, which publishes the token.
        self.0.store(WAITING, Ordering::Relaxed);
    }
}

/// Wakes the thread that waits with this token: the engine's [`crate::engine::WakeFn`] for C callers.
pub(super) fn wake(token: WaitToken) {
    let word = token.0 as *const AtomicU32;
    // SAFETY: the token is the address of a `Waiter` whose thread does not return from `wait` before this store.
    let waiting = unsafe { &*word };
    // ORDERING: Release: what the request that left did is visible to the one that is woken.
    waiting.store(WOKEN, Ordering::Release);
    // SAFETY: FUTEX_WAKE does not access the word. It may be gone by now: then nobody waits at the address, or a
    // stranger wakes for nothing, which every user of a futex expects.
    unsafe { libc::syscall(libc::SYS_futex, word, libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG, 1) };
}
