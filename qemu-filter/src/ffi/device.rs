//! A disk opened through the C interface: the [`Host`] of its control thread, and the requests' way to the capture
//! of the moment.
//!
//! Requests find the capture through one atomic pointer, read while the request counts in `count`. Whoever changes
//! the pointer (the control thread) waits for a grace period: then no request uses the old capture any more, and
//! after an attach no request is in flight that the new capture has not seen, as [`Capture::attach`] asks for.

use std::ffi::{c_int, c_void};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use journal_format::ImageTag;

use super::copy::all_zero;
use super::error::Failure;
use super::types::{cdp_block_status_fn, cdp_pread_fn};
use super::{futex, signals};
use crate::control::{self, DiskInfo, Host, Identity};
use crate::engine::{Answer, Capture, InFlightCount, Phase, Piece, Resync, Step, WakeFn};

/// How long an attach or detach waits for requests in flight.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);
/// How often it looks meanwhile.
const DRAIN_POLL: Duration = Duration::from_millis(1);

/// The caller's functions.
#[derive(Clone, Copy)]
pub(super) struct Callbacks {
    pub(super) pread: unsafe extern "C" fn(*mut c_void, *mut c_void, usize, u64) -> c_int,
    pub(super) block_status: cdp_block_status_fn,
    pub(super) opaque: *mut c_void,
}

// SAFETY: the interface's contract says that the functions are called, with `opaque`, from threads of the library.
unsafe impl Send for Callbacks {}
// SAFETY: as above.
unsafe impl Sync for Callbacks {}

impl Callbacks {
    pub(super) fn new(
        pread: cdp_pread_fn,
        block_status: cdp_block_status_fn,
        opaque: *mut c_void,
    ) -> Result<Self, Failure> {
        let pread =
            pread.ok_or_else(|| Failure::invalid("options.pread is NULL; the initial sync needs it"))?;
        Ok(Self { pread, block_status, opaque })
    }

    fn answer(&self, step: Step<'_>) -> Option<Answer> {
        Some(match step {
            Step::Status { offset, length } => self.status(offset, length),
            Step::Read { offset, pieces, .. } => self.read(offset, pieces),
            Step::Pause(pause) => {
                std::thread::sleep(pause);
                Answer::None
            }
            Step::Stop => return None,
        })
    }

    fn status(&self, offset: u64, length: u64) -> Answer {
        let Some(block_status) = self.block_status else { return Answer::Status { length, zero: false } };
        let mut known = 0;
        // SAFETY: the caller's function, with its own `opaque`; `known` is a valid place for the answer.
        match unsafe { block_status(self.opaque, offset, length, &raw mut known) } {
            zero @ (0 | 1) if known > 0 => Answer::Status { length: known.min(length), zero: zero == 1 },
            _ => Answer::Failed,
        }
    }

    fn read(&self, offset: u64, pieces: &[Piece]) -> Answer {
        let mut at = offset;
        for piece in pieces {
            // SAFETY: the caller's function, with its own `opaque`; the piece is writable for its whole length until
            // the step is answered.
            let result = unsafe { (self.pread)(self.opaque, piece.ptr.as_ptr().cast(), piece.len, at) };
            if result < 0 {
                return Answer::Failed;
            }
            at += piece.len as u64;
        }
        // SAFETY: the pieces are those of the step that this answers, and the read has returned.
        Answer::Read { zero: unsafe { all_zero(pieces) } }
    }
}

/// A capture and the thread of its resync.
struct Attached {
    capture: Arc<Capture>,
    resync: Option<JoinHandle<()>>,
}

/// An opened disk.
pub(super) struct Device {
    identity: Identity,
    name: String,
    disk_bytes: AtomicU64,
    callbacks: Callbacks,
    /// The capture of the moment or null; keeps one strong count of its own.
    current: AtomicPtr<Capture>,
    count: InFlightCount,
    attached: Mutex<Option<Attached>>,
}

impl Device {
    pub(super) fn new(identity: Identity, name: String, disk_bytes: u64, callbacks: Callbacks) -> Self {
        Self {
            identity,
            name,
            disk_bytes: AtomicU64::new(disk_bytes),
            callbacks,
            current: AtomicPtr::new(std::ptr::null_mut()),
            count: InFlightCount::new(),
            attached: Mutex::new(None),
        }
    }

    /// Counts a request; until [`Device::leave`] the capture stays alive.
    pub(super) fn enter(&self) -> (Phase, *const Capture) {
        let phase = self.count.enter();
        // ORDERING: Acquire pairs with the swap in `attach`.
        (phase, self.current.load(Ordering::Acquire))
    }

    pub(super) fn leave(&self, phase: Phase) {
        self.count.leave(phase);
    }

    pub(super) fn disk_bytes(&self) -> u64 {
        // ORDERING: a gauge.
        self.disk_bytes.load(Ordering::Relaxed)
    }

    pub(super) fn set_disk_bytes(&self, disk_bytes: u64) {
        // ORDERING: a gauge.
        self.disk_bytes.store(disk_bytes, Ordering::Relaxed);
    }

    pub(super) fn in_flight(&self) -> u64 {
        self.count.total()
    }

    /// Makes `capture` the one that requests find, and waits until none uses the old one.
    fn exchange(&self, capture: Option<Arc<Capture>>) -> Result<(), String> {
        let new = capture.map_or(std::ptr::null_mut(), |capture| Arc::into_raw(capture).cast_mut());
        // ORDERING: AcqRel: what the capture is made of is visible to who loads it.
        let old = self.current.swap(new, Ordering::AcqRel);
        let drained = self.drain();
        if !old.is_null() && drained {
            // SAFETY: the pointer came from `Arc::into_raw` in an earlier call; it was swapped out just now, and no
            // request that may have loaded it is in flight any more. Where one is, the count is leaked.
            drop(unsafe { Arc::from_raw(old) });
        }
        if drained { Ok(()) } else { Err("requests in flight did not end within 10 s; try again".to_owned()) }
    }

    /// Waits until every request that is in flight now has ended.
    fn drain(&self) -> bool {
        let began = Instant::now();
        // The rest of a drain that took too long.
        while !self.count.is_over() {
            if began.elapsed() > DRAIN_LIMIT {
                return false;
            }
            std::thread::sleep(DRAIN_POLL);
        }
        self.count.begin_grace();
        while !self.count.is_over() {
            if began.elapsed() > DRAIN_LIMIT {
                return false;
            }
            std::thread::sleep(DRAIN_POLL);
        }
        true
    }

    fn start_resync(&self, capture: &Arc<Capture>) -> Result<JoinHandle<()>, String> {
        let (callbacks, capture) = (self.callbacks, Arc::clone(capture));
        let thread = std::thread::Builder::new().name("cdp-resync".to_owned());
        signals::blocked(|| thread.spawn(move || run_resync(capture, callbacks)))
            .map_err(|error| format!("cannot start the resync's thread: {error}"))
    }
}

fn run_resync(capture: Arc<Capture>, callbacks: Callbacks) {
    let mut resync = Resync::new(capture);
    let began = Instant::now();
    let mut answer = Answer::None;
    while let Some(next) = callbacks.answer(resync.step(answer, began.elapsed())) {
        answer = next;
    }
}

impl Host for Device {
    fn identity(&self) -> Identity {
        self.identity.clone()
    }

    fn disks(&self) -> Result<Vec<DiskInfo>, String> {
        Ok(vec![DiskInfo {
            device: self.name.clone(),
            node: String::new(),
            driver: "cdp_filter.h".to_owned(),
            disk_bytes: self.disk_bytes(),
            read_only: false,
            refused: String::new(),
        }])
    }

    fn wake_fn(&self) -> WakeFn {
        futex::wake
    }

    /// What the caller's device holds is always read: nothing is known of its image.
    fn attach(&self, device: &str, capture: Arc<Capture>, _image: Option<ImageTag>) -> Result<(), String> {
        if device != self.name {
            return Err(format!("this process has no device '{device}', only '{}'", self.name));
        }
        let mut attached = self.attached.lock().unwrap_or_else(PoisonError::into_inner);
        self.exchange(Some(Arc::clone(&capture)))
            .and_then(|()| {
                let resync = self.start_resync(&capture)?;
                *attached = Some(Attached { capture: Arc::clone(&capture), resync: Some(resync) });
                Ok(())
            })
            .inspect_err(|_| {
                capture.detach();
                // What could not be drained stays in flight without us; the capture lives until then.
                let _ = self.exchange(None);
            })
    }

    /// Attach and detach release who waits themselves; nothing else of the caller's waits for its requests.
    fn must_go(&self, _device: &str) -> bool {
        false
    }

    fn detach(&self, _device: &str) -> Result<(), String> {
        self.end_capture()
    }
}

impl Device {
    /// Ends the capture if there is one: drained, its resync stopped.
    pub(super) fn end_capture(&self) -> Result<(), String> {
        let mut attached = self.attached.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Attached { capture, resync }) = attached.as_mut() else { return Ok(()) };
        capture.release_waiters();
        self.exchange(None)?;
        capture.detach();
        if let Some(resync) = resync.take() {
            // A panic of that thread has ended the capture already.
            let _ = resync.join();
        }
        *attached = None;
        Ok(())
    }
}

/// The control thread of one disk.
pub(super) struct ControlThread {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl ControlThread {
    pub(super) fn start(device: &Arc<Device>, socket: PathBuf) -> Result<Self, Failure> {
        let stop = Arc::new(AtomicBool::new(false));
        let host = Arc::clone(device) as Arc<dyn Host>;
        let thread = control::start_until(host, socket, Arc::clone(&stop)).map_err(|error| {
            Failure::new(libc::EAGAIN, format!("cannot start the control thread: {error}"))
        })?;
        Ok(Self { stop, thread })
    }

    /// Ends the thread; takes up to two seconds.
    pub(super) fn stop(self) {
        // ORDERING: Relaxed: a request to end; `join` orders the rest.
        self.stop.store(true, Ordering::Relaxed);
        // A panic there was reported when it happened.
        let _ = self.thread.join();
    }
}
