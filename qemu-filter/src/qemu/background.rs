//! The coroutine that reads a disk back: initial sync and resync.
//!
//! It reads in the device's AioContext, where the guest's own requests run, and through the device's own
//! BlockBackend: so it follows the disk through every change of its graph, waits while the device is drained, and
//! asks for nothing that management could stumble over. What to read, and when to pause, the engine says.
//!
//! # While the device is drained
//!
//! Management changes a drained disk: a driver's tables, without its locks, as no request is in flight. A read of a
//! device waits until that is over. Two things do not, and there the coroutine itself has to hold still: reads through
//! an export's BlockBackend, which would also keep draining from ending, and asking any BlockBackend what is
//! allocated. Only the main thread may ask whether a BlockBackend is drained, and only while it runs nothing else can
//! begin to drain. So both are done in the main thread, as any node of 9.0 and later can be used from any thread.
//! (7.2 has neither: nothing is asked there, and exports are captured only in the main thread, whose drains are short
//! enough to come through.)

use std::cell::UnsafeCell;
use std::ffi::{c_int, c_uint, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::time::{Duration, Instant};

use super::devices::ContextLock;
use super::types::{AioContext, BlockBackend, CoSleep, QemuIoVector};
use super::{Glue, attach, glue, mainloop};
use crate::engine::{Answer, Capture, Piece, Resync, Step};
use crate::ffi::copy;

/// `QEMU_CLOCK_REALTIME`.
const CLOCK_REALTIME: c_uint = 0;
/// `BDRV_BLOCK_ZERO`.
const BLOCK_ZERO: c_int = 0x02;
/// Longest sleep in one piece: what a stop would wait for if its wake-up were lost.
const MAX_SLEEP: Duration = Duration::from_millis(500);
/// How often a coroutine that holds still looks whether it may go on.
const HOLD_STILL: Duration = Duration::from_millis(1);
/// How long a request may be between two parts before QEMU is asked whether it still is in flight.
const LONG_HELD: Duration = Duration::from_secs(1);
/// Sleep of a coroutine that is to leave, until the engine says so too, in nanoseconds.
const SHORT_SLEEP_NS: i64 = 1_000_000;
/// How often a stop looks whether a read that is just being issued has been issued.
const MAX_DRAINS: u32 = 64;
/// Most pieces that one read goes to.
const MAX_PIECES: usize = capture_ring::limits::MAX_PIECES as usize;

/// One device's background coroutine, shared by it and the main thread.
pub(crate) struct Background {
    /// Null from the moment on at which it has to leave.
    blk: AtomicPtr<BlockBackend>,
    /// It is using `blk`.
    busy: AtomicBool,
    /// It has left.
    finished: AtomicBool,
    /// Where it sleeps.
    context: AtomicPtr<AioContext>,
    /// Touched only by the thread of `context`.
    sleep: UnsafeCell<CoSleep>,
    /// Taken by the coroutine when it begins.
    resync: UnsafeCell<Option<Resync>>,
}

// SAFETY: `sleep` and `resync` are touched by one thread at a time, as said at the fields; the rest is atomic.
unsafe impl Sync for Background {}
// SAFETY: nothing in it belongs to a thread.
unsafe impl Send for Background {}

impl Background {
    /// Starts the coroutine of a device. QEMU's main thread.
    pub(crate) fn start(glue: &Glue, blk: *mut BlockBackend, capture: Arc<Capture>) -> Arc<Self> {
        let background = Arc::new(Self {
            blk: AtomicPtr::new(blk),
            busy: AtomicBool::new(false),
            finished: AtomicBool::new(false),
            context: AtomicPtr::new(std::ptr::null_mut()),
            sleep: UnsafeCell::new(CoSleep::new()),
            resync: UnsafeCell::new(Some(Resync::new(capture))),
        });
        background.schedule_in(glue, home(glue, blk), begin);
        background
    }

    /// Runs `entry` in a context's thread with a reference to this.
    fn schedule_in(
        self: &Arc<Self>,
        glue: &Glue,
        context: *mut AioContext,
        entry: unsafe extern "C" fn(*mut c_void),
    ) {
        let reference = Arc::into_raw(Arc::clone(self)).cast_mut().cast();
        // SAFETY: may be called from any thread for a live context; `entry` takes the reference back.
        unsafe {
            (glue.symbols.aio_bh_schedule_oneshot_full)(
                context,
                entry,
                reference,
                c"qemu-cdp-background".as_ptr(),
            );
        }
    }

    /// Tells the coroutine to leave, and does not wait. QEMU's main thread.
    pub(crate) fn stop(self: &Arc<Self>, glue: &Glue) {
        // ORDERING: SeqCst: before the loads of `busy`; the coroutine stores `busy` before it loads this.
        self.blk.store(std::ptr::null_mut(), Ordering::SeqCst);
        // ORDERING: Acquire pairs with the store before it sleeps.
        let context = self.context.load(Ordering::Acquire);
        if !context.is_null() && !self.is_finished() {
            self.schedule_in(glue, context, wake);
        }
    }

    /// After `stop`, before the BlockBackend goes: waits for a read that is in flight. QEMU's main thread.
    pub(crate) fn drain(&self, glue: &Glue, blk: *mut BlockBackend) {
        // A read that was just going to be issued is not yet counted by QEMU, so one drain may miss it. The bound is
        // for a device that its remover has drained already: QEMU then ends the waiting read with an error itself.
        for _ in 0..MAX_DRAINS {
            // ORDERING: SeqCst: see `stop`.
            if !self.busy.load(Ordering::SeqCst) {
                return;
            }
            // SAFETY: live, in the main thread.
            unsafe { (glue.symbols.blk_drain)(blk) };
        }
    }

    /// Whether the coroutine has left.
    pub(crate) fn is_finished(&self) -> bool {
        // ORDERING: Acquire pairs with the store at the coroutine's end.
        self.finished.load(Ordering::Acquire)
    }

    /// Runs `io` with the BlockBackend, in that place; `Failed` when it has gone.
    fn with_device(&self, glue: &Glue, place: Place, io: impl Fn(*mut BlockBackend) -> Answer) -> Answer {
        loop {
            // ORDERING: SeqCst: before the load of `blk`; see `stop`.
            self.busy.store(true, Ordering::SeqCst);
            // ORDERING: SeqCst: as above.
            let blk = self.blk.load(Ordering::SeqCst);
            let next = if blk.is_null() { Next::Done(Answer::Failed) } else { place.next(glue, blk, &io) };
            // ORDERING: SeqCst: all use of the BlockBackend comes before.
            self.busy.store(false, Ordering::SeqCst);
            match next {
                Next::Done(answer) => return answer,
                Next::HoldStill => self.sleep(glue, HOLD_STILL),
                // SAFETY: in a coroutine, outside any request. The BlockBackend may go meanwhile.
                Next::Move(context) => unsafe { (glue.symbols.aio_co_reschedule_self)(context) },
            }
        }
    }

    fn sleep(&self, glue: &Glue, duration: Duration) {
        let nanoseconds = i64::try_from(duration.min(MAX_SLEEP).as_nanos()).unwrap_or(0);
        // SAFETY: takes nothing.
        let context = unsafe { (glue.symbols.qemu_get_current_aio_context)() };
        // ORDERING: Release pairs with `stop` and `wake`.
        self.context.store(context, Ordering::Release);
        // ORDERING: SeqCst: after the store of `context`: who stops us now either is seen here or sees it.
        let nanoseconds =
            if self.blk.load(Ordering::SeqCst).is_null() { SHORT_SLEEP_NS } else { nanoseconds };
        // SAFETY: in a coroutine; the place stays as long as this, and only this thread touches it.
        unsafe { (glue.symbols.qemu_co_sleep_ns_wakeable)(self.sleep.get(), CLOCK_REALTIME, nanoseconds) };
    }

    fn run(&self, glue: &Glue) {
        // SAFETY: the coroutine begins once, and nobody else touches it.
        let resync = unsafe { &mut *self.resync.get() }.take();
        let Some(mut resync) = resync else { return };
        let began = Instant::now();
        let mut answer = Answer::None;
        let mut held = (None, began);
        loop {
            look_after_held(glue, resync.capture(), &mut held);
            answer = match resync.step(answer, began.elapsed()) {
                Step::Stop => break,
                Step::Pause(duration) => {
                    self.sleep(glue, duration);
                    Answer::None
                }
                // Who cannot tell whether a BlockBackend is drained does not ask.
                Step::Status { length, .. } if glue.symbols.blk_in_drain.is_none() => unknown(length),
                Step::Status { offset, length } => {
                    self.with_device(glue, Place::Main, |blk| status(glue, blk, offset, length))
                }
                Step::Read { offset, length, pieces } => {
                    self.with_device(glue, Place::Home, |blk| read(glue, blk, offset, length, pieces))
                }
            };
        }
    }
}

/// Has the main thread look at the requests between two parts when one has been there for long; `seen` is the one that
/// was there at an earlier look, and since when.
fn look_after_held(glue: &Glue, capture: &Capture, seen: &mut (Option<u64>, Instant)) {
    let longest = capture.longest_held();
    if longest.is_none() || longest != seen.0 {
        *seen = (longest, Instant::now());
    } else if seen.1.elapsed() >= LONG_HELD {
        seen.1 = Instant::now();
        mainloop::schedule(glue, || {
            if let Some(glue) = super::glue() {
                attach::look_after_held(glue);
            }
        });
    }
}

/// Whether this program serves exports, and the coroutine runs in its main thread.
fn serves_exports(glue: &Glue) -> bool {
    glue.symbols.qemu_add_machine_init_done_notifier.is_none() && glue.symbols.blk_in_drain.is_some()
}

/// Where a device's coroutine runs now.
fn home(glue: &Glue, blk: *mut BlockBackend) -> *mut AioContext {
    if serves_exports(glue) {
        // SAFETY: takes nothing.
        unsafe { (glue.symbols.qemu_get_aio_context)() }
    } else {
        // SAFETY: live: the caller is `busy`, or the main thread.
        unsafe { (glue.symbols.blk_get_aio_context)(blk) }
    }
}

/// Where something is done with a BlockBackend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Place {
    /// At its [`home`].
    Home,
    /// In the main thread.
    Main,
}

/// What a coroutine does next.
enum Next {
    /// It has been done.
    Done(Answer),
    /// Wait: the BlockBackend is drained.
    HoldStill,
    /// Go there.
    Move(*mut AioContext),
}

impl Place {
    /// Does it, if this is the place and the time. In a coroutine, which is `busy`.
    fn next(self, glue: &Glue, blk: *mut BlockBackend, io: impl Fn(*mut BlockBackend) -> Answer) -> Next {
        // SAFETY: takes nothing.
        let here = unsafe { (glue.symbols.qemu_get_current_aio_context)() };
        // SAFETY: takes nothing.
        let main = unsafe { (glue.symbols.qemu_get_aio_context)() };
        let there = if self == Self::Main { main } else { home(glue, blk) };
        if here != there {
            return Next::Move(there);
        }
        match glue.symbols.blk_in_drain {
            // SAFETY: live while we are `busy`, in the main thread.
            Some(in_drain) if here == main && unsafe { in_drain(blk) } => Next::HoldStill,
            _ => Next::Done(io(blk)),
        }
    }
}

/// In the main thread.
fn status(glue: &Glue, blk: *mut BlockBackend, offset: u64, length: u64) -> Answer {
    let Some(block_status) = glue.symbols.blk_co_block_status_above else { return unknown(length) };
    let (mut known, mut map, mut file) = (0, 0, std::ptr::null_mut());
    // SAFETY: in a coroutine, the device is live; the three places outlive the call.
    let answer = unsafe {
        block_status(
            blk,
            std::ptr::null_mut(),
            offset as i64,
            length as i64,
            &raw mut known,
            &raw mut map,
            &raw mut file,
        )
    };
    match u64::try_from(known) {
        Ok(known) if answer >= 0 && known > 0 => {
            Answer::Status { length: known.min(length), zero: answer & BLOCK_ZERO != 0 }
        }
        _ => unknown(length),
    }
}

/// Reading it tells more than its status.
const fn unknown(length: u64) -> Answer {
    Answer::Status { length, zero: false }
}

fn read(glue: &Glue, blk: *mut BlockBackend, offset: u64, length: u64, pieces: &[Piece]) -> Answer {
    let mut list = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; MAX_PIECES];
    for (entry, piece) in list.iter_mut().zip(pieces) {
        *entry = libc::iovec { iov_base: piece.ptr.as_ptr().cast(), iov_len: piece.len };
    }
    let Some(used) = list.get_mut(..pieces.len()) else { return Answer::Failed };
    let mut qiov = QemuIoVector::over(used, length as usize);
    // SAFETY: in a coroutine, the device is live; the pieces are ours until the next step.
    let answer = unsafe { (glue.symbols.blk_co_preadv)(blk, offset as i64, length as i64, &raw mut qiov, 0) };
    if answer < 0 {
        return Answer::Failed;
    }
    // SAFETY: the pieces of the step that is being answered.
    Answer::Read { zero: unsafe { copy::all_zero(pieces) } }
}

/// Bottom half in the device's context: makes the coroutine and enters it.
unsafe extern "C" fn begin(reference: *mut c_void) {
    let Some(glue) = glue() else { return };
    // SAFETY: takes nothing.
    let context = unsafe { (glue.symbols.qemu_get_current_aio_context)() };
    let _lock = ContextLock::of(glue, context);
    // SAFETY: outside a coroutine; `main` takes the reference.
    let coroutine = unsafe { (glue.symbols.qemu_coroutine_create)(main, reference) };
    // SAFETY: made just now, in this thread.
    unsafe { (glue.symbols.qemu_coroutine_enter)(coroutine) };
}

/// The coroutine.
unsafe extern "C" fn main(reference: *mut c_void) {
    // SAFETY: the reference that `schedule_in` gave away.
    let background = unsafe { Arc::from_raw(reference.cast_const().cast::<Background>()) };
    if let Some(glue) = glue() {
        background.run(glue);
    }
    // ORDERING: Release pairs with `is_finished`.
    background.finished.store(true, Ordering::Release);
}

/// Bottom half in the context where the coroutine sleeps: wakes it.
unsafe extern "C" fn wake(reference: *mut c_void) {
    // SAFETY: the reference that `schedule_in` gave away.
    let background = unsafe { Arc::from_raw(reference.cast_const().cast::<Background>()) };
    let Some(glue) = glue() else { return };
    // SAFETY: takes nothing.
    let here = unsafe { (glue.symbols.qemu_get_current_aio_context)() };
    // ORDERING: Acquire pairs with the store in `sleep`. Equal: it last slept in this thread, and only this thread
    // touches the place where it sleeps.
    if background.context.load(Ordering::Acquire) == here && !background.is_finished() {
        // SAFETY: in the thread of the sleeper; does nothing when nobody sleeps.
        unsafe { (glue.symbols.qemu_co_sleep_wake)(background.sleep.get()) };
    }
}
