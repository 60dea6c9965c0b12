//! What the engine keeps about one request between begin and finish, on its caller's stack.

use core::ptr::NonNull;

use capture_ring::limits::MAX_PIECES;
use capture_ring::{Pieces, Ticket, Tracked};
use journal_format::{ByteRange, Lsn};

use super::grace::Phase;
use super::inflight::Slot;
use super::waiting::Place;
use super::{Kind, Request, SyncWait};

/// A contiguous part of a request's memory in the ring, aligned to 4 KiB.
///
/// Laid out like an `iovec`, so that a list of pieces can be handed to whoever issues the write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Piece {
    /// First byte; writable until the request is finished (or the resync's step answered).
    pub ptr: NonNull<u8>,
    /// Length in bytes, at least 1.
    pub len: usize,
}

const _: () = assert!(size_of::<Piece>() == size_of::<libc::iovec>());
const _: () = assert!(std::mem::offset_of!(Piece, ptr) == std::mem::offset_of!(libc::iovec, iov_base));
const _: () = assert!(std::mem::offset_of!(Piece, len) == std::mem::offset_of!(libc::iovec, iov_len));

/// The pieces of one request, in the order of the disk's bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PieceList {
    pieces: [Piece; MAX_PIECES as usize],
    count: usize,
}

impl PieceList {
    pub(crate) const EMPTY: Self = Self { pieces: [Piece::EMPTY; MAX_PIECES as usize], count: 0 };

    pub(crate) fn set(&mut self, pieces: Pieces<'_>) {
        self.count = 0;
        for (place, piece) in self.pieces.iter_mut().zip(pieces) {
            *place = Piece { ptr: piece.data, len: piece.bytes as usize };
            self.count += 1;
        }
    }

    pub(crate) const fn clear(&mut self) {
        self.count = 0;
    }

    pub(crate) fn as_slice(&self) -> &[Piece] {
        &self.pieces[..self.count]
    }

    pub(crate) fn total_bytes(&self) -> u64 {
        self.as_slice().iter().map(|piece| piece.len as u64).sum()
    }
}

/// Where a request stands.
#[derive(Debug, Default)]
pub(crate) enum State {
    /// Not begun, or finished.
    #[default]
    Idle,
    /// Counted, nothing else held.
    Entered,
    /// Waits for an overlapping request.
    Parked(Slot),
    /// Waits for room in the ring; is not in the table.
    Waiting(Place),
    /// Running: nobody that overlaps runs.
    Captured(Slot, Ticket),
    /// Goes to the disk unrecorded; its range is dirty.
    Tracked(Tracked),
    /// None of our business.
    Passed,
}

/// One request between [`super::Capture::begin`] and [`super::Capture::finish`].
///
/// Plain data without a destructor, so that it may live on a coroutine's stack or in C. One that is dropped
/// between begin and finish keeps its room in the ring and its place in the table: don't.
#[derive(Debug)]
pub struct InFlight {
    pub(crate) request: Request,
    pub(crate) phase: Phase,
    pub(crate) state: State,
    pub(crate) pieces: PieceList,
    /// Since when it has waited for room, in nanoseconds of the monotonic clock.
    pub(crate) waiting_since_ns: Option<u64>,
    /// How often it has looked for room without waiting.
    pub(crate) looks: u32,
    /// The LSN that has to be durable before the guest is told.
    pub(crate) durable: Option<Lsn>,
}

impl Default for InFlight {
    fn default() -> Self {
        Self {
            request: Request { kind: Kind::Discard, offset: 0, length: 0 },
            phase: Phase::default(),
            state: State::Idle,
            pieces: PieceList::EMPTY,
            waiting_since_ns: None,
            looks: 0,
            durable: None,
        }
    }
}

impl InFlight {
    /// The memory to copy the guest's data to and to issue the disk write from, as many bytes as the request
    /// has; empty when the request is to be issued from the guest's own buffers.
    #[must_use]
    pub fn pieces(&self) -> &[Piece] {
        self.pieces.as_slice()
    }

    /// The disk changed only `range` of what a request without data covers.
    pub(crate) fn narrow(&mut self, range: ByteRange) {
        if let State::Captured(_, ticket) = &mut self.state {
            ticket.narrow(range);
        }
    }

    /// After a finished request with FUA: what has to be durable before the guest is told, for
    /// [`super::Capture::wait_durable`].
    #[must_use]
    pub fn sync_wait(&self) -> Option<SyncWait> {
        self.durable.map(SyncWait::new)
    }

    /// Whether the request has begun and not finished (parked ones too).
    #[must_use]
    pub const fn is_active(&self) -> bool {
        !matches!(self.state, State::Idle)
    }
}

impl Piece {
    /// A place for one in a list.
    pub(crate) const EMPTY: Self = Self { ptr: NonNull::dangling(), len: 0 };

    /// Without its first `bytes` bytes, which are fewer than it has.
    pub(crate) fn tail(self, bytes: usize) -> Self {
        debug_assert!(bytes < self.len, "a piece is not empty");
        let ptr = self.ptr.as_ptr().wrapping_add(bytes);
        Self { ptr: NonNull::new(ptr).unwrap_or(self.ptr), len: self.len.saturating_sub(bytes) }
    }

    /// Its first `bytes` bytes at most.
    pub(crate) fn first(self, bytes: usize) -> Self {
        Self { len: self.len.min(bytes), ..self }
    }
}

impl Request {
    /// A write of `length` bytes at `offset`.
    #[must_use]
    pub const fn write(offset: u64, length: u64, fua: bool) -> Self {
        Self { kind: Kind::Write { fua }, offset, length }
    }

    /// `length` bytes at `offset` shall read as zeroes.
    #[must_use]
    pub const fn zero(offset: u64, length: u64, fua: bool, may_unmap: bool) -> Self {
        Self { kind: Kind::Zero { fua, may_unmap }, offset, length }
    }

    /// `length` bytes at `offset` are no longer needed.
    #[must_use]
    pub const fn discard(offset: u64, length: u64) -> Self {
        Self { kind: Kind::Discard, offset, length }
    }

    /// The disk shall have `disk_bytes`.
    #[must_use]
    pub const fn resize(disk_bytes: u64) -> Self {
        Self { kind: Kind::Resize, offset: 0, length: disk_bytes }
    }
}
