//! Threads of ours take no signals: those are the host program's.

use std::mem::MaybeUninit;

/// Runs `work` with all signals blocked in this thread; a thread started by it inherits that.
pub(crate) fn blocked<T>(work: impl FnOnce() -> T) -> T {
    let mut all = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `all` is memory for a signal set, which this call initialises.
    unsafe { libc::sigfillset(all.as_mut_ptr()) };
    let mut before = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `all` was initialised above; `before` is memory for the old mask.
    let failed = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, all.as_ptr(), before.as_mut_ptr()) };
    let result = work();
    if failed == 0 {
        // SAFETY: `before` was initialised by the successful call above.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), std::ptr::null_mut()) };
    }
    result
}
