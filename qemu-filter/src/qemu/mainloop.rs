//! Running something in QEMU's main thread, from a thread of ours.
//!
//! The main thread may be busy for long, or about to end; so every call has a time limit. A job that has not
//! begun by then never begins. One that has begun is waited for once more; if it still runs then, its result is
//! taken back in the main thread when it comes.

use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::Glue;
use super::types::AioContext;

/// How a job stands.
enum State<R> {
    Queued,
    Running,
    Done(R),
    Panicked,
    /// Nobody waits for it any more.
    Abandoned,
}

struct Job<R> {
    state: Mutex<State<R>>,
    changed: Condvar,
}

impl<R> Job<R> {
    fn lock(&self) -> MutexGuard<'_, State<R>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, state: State<R>) -> State<R> {
        let before = std::mem::replace(&mut *self.lock(), state);
        self.changed.notify_all();
        before
    }

    /// Runs in the main thread.
    fn run(&self, work: impl FnOnce() -> R, take_back: impl FnOnce(R)) {
        {
            let mut state = self.lock();
            if !matches!(*state, State::Queued) {
                return;
            }
            *state = State::Running;
        }
        let answer = catch_unwind(AssertUnwindSafe(work));
        let mut state = self.lock();
        match (answer, &*state) {
            (Ok(answer), State::Abandoned) => {
                drop(state);
                take_back(answer);
                return;
            }
            (Ok(answer), _) => *state = State::Done(answer),
            (Err(_), _) => *state = State::Panicked,
        }
        self.changed.notify_all();
    }

    fn wait(&self, limit: Duration) -> Result<R, String> {
        for _attempt in 0..2 {
            let state = self.lock();
            let pending = |state: &mut State<R>| matches!(state, State::Queued | State::Running);
            let (state, _) = self
                .changed
                .wait_timeout_while(state, limit, pending)
                .unwrap_or_else(PoisonError::into_inner);
            if !matches!(*state, State::Running) {
                break;
            }
        }
        match self.set(State::Abandoned) {
            State::Done(answer) => Ok(answer),
            State::Panicked => {
                Err("a fault of qemu-cdp's own was caught: see its log, and report it".to_owned())
            }
            State::Queued | State::Running | State::Abandoned => {
                Err(format!("QEMU's main thread did not answer within {} s: try again", limit.as_secs()))
            }
        }
    }
}

type Work = Box<dyn FnOnce() + Send>;

unsafe extern "C" fn bottom_half(opaque: *mut c_void) {
    // SAFETY: the box that `schedule` leaked; a one-shot bottom half runs once.
    let work = unsafe { Box::from_raw(opaque.cast::<Work>()) };
    // A panic was caught inside `Job::run`; what is left is a `take_back` that panics.
    let _caught = catch_unwind(AssertUnwindSafe(work));
}

/// Runs `work` in QEMU's main thread, some time from now. Any thread.
pub(crate) fn schedule(glue: &Glue, work: impl FnOnce() + Send + 'static) {
    // SAFETY: takes nothing; the main loop exists since before the glue.
    schedule_in(glue, unsafe { (glue.symbols.qemu_get_aio_context)() }, work);
}

/// As [`schedule`], but once the main thread is in its outermost loop: after the command that it carries out now.
pub(crate) fn schedule_at_rest(glue: &Glue, work: impl FnOnce() + Send + 'static) {
    // SAFETY: takes nothing; this context exists as long as the main loop, which alone runs what is scheduled there.
    schedule_in(glue, unsafe { (glue.symbols.iohandler_get_aio_context)() }, work);
}

fn schedule_in(glue: &Glue, context: *mut AioContext, work: impl FnOnce() + Send + 'static) {
    let work: Box<Work> = Box::new(Box::new(work));
    // SAFETY: may be called from any thread; the box stays until the bottom half takes it.
    unsafe {
        (glue.symbols.aio_bh_schedule_oneshot_full)(
            context,
            bottom_half,
            Box::into_raw(work).cast(),
            c"qemu-cdp".as_ptr(),
        );
    }
}

/// Runs `work` in QEMU's main thread and waits for its answer, at most twice `limit`. An answer that comes later is
/// given to `take_back`, in the main thread. Never call it there.
///
/// # Errors
/// A sentence for the operator, when there was no answer in time or the work panicked.
pub(crate) fn run<R: Send + 'static>(
    glue: &Glue,
    limit: Duration,
    work: impl FnOnce() -> R + Send + 'static,
    take_back: impl FnOnce(R) + Send + 'static,
) -> Result<R, String> {
    let job = Arc::new(Job { state: Mutex::new(State::Queued), changed: Condvar::new() });
    let in_main = Arc::clone(&job);
    schedule(glue, move || in_main.run(work, take_back));
    job.wait(limit)
}

/// As [`run`], but only when the main thread is in its outermost loop: a main thread that waits for requests to end, in
/// a drain or an exit, does not answer.
///
/// # Errors
/// As [`run`].
pub(crate) fn run_at_rest<R: Send + 'static>(
    glue: &Glue,
    limit: Duration,
    work: impl FnOnce() -> R + Send + 'static,
) -> Result<R, String> {
    let job = Arc::new(Job { state: Mutex::new(State::Queued), changed: Condvar::new() });
    let in_main = Arc::clone(&job);
    schedule_at_rest(glue, move || in_main.run(work, drop));
    job.wait(limit)
}
