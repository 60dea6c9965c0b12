//! The capture engine: what happens to one request of a protected disk, and how lost ranges are read back.
//!
//! *Owns* the life of a request (reserve, copy, issue from the copy, publish), the serialisation of
//! requests that overlap while in flight, the three modes of a disk and the resync that ends a gap.
//! *Must not know* QEMU, sockets or files: the glue in `qemu` and the C interface in `ffi` call it.
//!
//! *Threads*: [`Capture`] is shared by any number of threads. [`Capture::begin`], [`Capture::finish`] and
//! [`Capture::flush`] never block, lock, allocate, log or make a system call in a normal moment, and use no
//! thread-local, so that a coroutine may resume on another thread between them. [`Resync`] belongs to one
//! background coroutine or thread.
//!
//! # How a caller uses it
//!
//! ```text
//! let mut request = InFlight::default();                    // on the coroutine's stack
//! loop {
//!     match capture.begin(&Request::write(offset, length, fua), WaitToken(co as usize), &mut request) {
//!         Begin::Go => break,
//!         Begin::Wait => qemu_coroutine_yield(),            // the WakeFn given at attach fires for the token
//!     }
//! }
//! if request.pieces().is_empty() { /* issue from the guest's buffers */ }
//! else { copy::copy_in(request.pieces(), guest_iov); /* issue from the pieces */ }
//! capture.finish(&mut request, Outcome::Succeeded);         // before the guest is told
//! ```
//!
//! Writes longer than [`MAX_WRITE_BYTES`] are issued by the caller as several requests, one after another, between
//! [`Capture::begin_large`] and [`Capture::end_large`]. A caller that itself gets one request of the guest in several
//! calls makes them one with a [`Split`].

mod capture;
mod error;
mod fault;
mod grace;
mod inflight;
mod limits;
#[cfg(test)]
mod model_tests;
mod request;
mod resync;
mod split;
#[cfg(test)]
mod testing;
mod waiting;

pub use capture::{Capture, Status};
pub use capture_ring::Mode;
pub use error::{EngineError, EngineErrorKind};
pub(crate) use fault::guard;
pub(crate) use grace::{InFlightCount, Phase};
pub use request::{InFlight, Piece};
pub use resync::Resync;
pub use split::{PartEnd, Split, Standing};
pub use waiting::{SyncWait, Waiters};

/// Largest write that one request may carry, in bytes; longer ones are split by the caller.
pub const MAX_WRITE_BYTES: u64 = journal_format::limits::MAX_RECORD_DATA_BYTES as u64;

/// What the caller is woken with: the address of its coroutine or futex, opaque to the engine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WaitToken(pub usize);

/// Wakes the request that parked with this token. Called from any thread, perhaps before the request has
/// parked (`aio_co_wake` allows that), exactly once for each [`Begin::Wait`]. Must not block.
pub type WakeFn = fn(WaitToken);

/// What a capture needs of the program that it runs in. Time is an input (I8): a simulation has its own.
#[derive(Clone, Copy, Debug)]
pub struct Runtime {
    /// Wakes parked requests.
    pub wake: WakeFn,
    /// A clock for time-outs that never goes back, in nanoseconds from any origin.
    pub now_ns: fn() -> u64,
}

impl Runtime {
    /// A real program's: time is the host's monotonic clock.
    #[must_use]
    pub const fn real(wake: WakeFn) -> Self {
        Self { wake, now_ns: capture_ring::monotonic_ns }
    }
}

/// What a guest asks of its disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// New data for the range.
    Write {
        /// Force unit access.
        fua: bool,
    },
    /// The range shall read as zeroes.
    Zero {
        /// Force unit access.
        fua: bool,
        /// The range may be unmapped.
        may_unmap: bool,
    },
    /// The range is no longer needed.
    Discard,
    /// The disk gets a new size: the request's `length`, in bytes; its `offset` is 0.
    Resize,
}

/// One request, before it is issued.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    /// What to do.
    pub kind: Kind,
    /// First byte on the disk.
    pub offset: u64,
    /// Bytes of disk covered; for [`Kind::Resize`] the new size.
    pub length: u64,
}

/// Whether a request may be issued now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum Begin {
    /// Issue it: from [`InFlight::pieces`] after copying the data there, or from the guest's buffers when
    /// there are none. [`Capture::finish`] must follow, whatever happens to the request.
    Go,
    /// A request that overlaps is in flight, or the ring is full and the disk's policy is to wait. Park until the token is woken, then call `begin` again with the
    /// same request and the same [`InFlight`].
    Wait,
}

/// How a request ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// The disk did all of it.
    Succeeded,
    /// The disk reported an error: what it now holds in the range is not known.
    Failed,
    /// The request was refused before anything was changed (`-ENOTSUP`): there is nothing to record.
    NotDone,
}

/// What the resync wants from its driver next; see [`Resync::step`].
#[derive(Clone, Copy, Debug)]
pub enum Step<'a> {
    /// Ask the disk what the range holds and answer [`Answer::Status`] about a prefix of it.
    Status {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// Read `length` bytes at `offset` into the pieces (which hold exactly that many) and answer [`Answer::Read`].
    Read {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
        /// Where to.
        pieces: &'a [Piece],
    },
    /// Nothing to do for that long; then step with [`Answer::None`].
    Pause(core::time::Duration),
    /// The capture has ended: leave the loop.
    Stop,
}

/// The driver's answer to the previous [`Step`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Answer {
    /// To `Pause`, and at the first step.
    None,
    /// To `Status`: the first `length` bytes of the range all read as zeroes, or may hold data.
    Status {
        /// How many bytes from the start of the range the answer covers, at least 1.
        length: u64,
        /// They read as zeroes for sure.
        zero: bool,
    },
    /// To `Read`: the pieces hold the data; `zero` when every byte of it is 0.
    Read {
        /// All bytes are 0 (`copy::all_zero`).
        zero: bool,
    },
    /// The disk answered with an error.
    Failed,
}
