//! What a request holds while the disk works on it: a ticket, and through it a chain of pieces of the arena.

use core::ptr::NonNull;

use journal_format::{ByteRange, Stamp};

use crate::arena::Run;
use crate::layout::{STATE_FREE, kind};
use crate::limits::{SLAB_UNITS, UNIT_BYTES};
use crate::ring::Ring;
use crate::sync::Ordering;

/// A request other than a write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OpKind {
    /// The range is to read as zeroes.
    Zero {
        /// The request asked for force-unit-access.
        fua: bool,
        /// The guest allowed the range to be unmapped.
        may_unmap: bool,
    },
    /// The guest no longer needs the range.
    Discard,
    /// The disk is to have this size; the range is what lies between the old and the new one.
    Resize {
        /// The new size in bytes.
        disk_bytes: u64,
    },
}

/// A request that has room in the ring: plain data, to be kept until the disk has answered, then given to exactly
/// one of [`complete`], [`fail`] and [`cancel`]. One that is lost keeps its room and its range counts as issued.
///
/// [`complete`]: crate::Producer::complete
/// [`fail`]: crate::Producer::fail
/// [`cancel`]: crate::Producer::cancel
#[derive(Debug)]
#[must_use = "its slot and its part of the arena come back only through complete, fail or cancel"]
pub struct Ticket {
    pub(crate) range: ByteRange,
    pub(crate) first: Run,
    pub(crate) pieces: u32,
    pub(crate) kind: u8,
    pub(crate) flags: u8,
    /// For a resize, the new size.
    pub(crate) disk_bytes: u64,
}

impl Ticket {
    /// What the request covers.
    #[must_use]
    pub const fn range(&self) -> ByteRange {
        self.range
    }

    /// The disk changed only `range` of what the request covers: its record says so. Nothing happens to a request with
    /// data, or when `range` is no part of it.
    pub fn narrow(&mut self, range: ByteRange) {
        if self.kind != kind::WRITE && !range.is_empty() && self.range.intersection(range) == Some(range) {
            self.range = range;
        }
    }

    /// How many pieces of the arena hold its data: 0 for a request without data, at most
    /// [`crate::limits::MAX_PIECES`].
    #[must_use]
    pub const fn piece_count(&self) -> u32 {
        if self.kind == kind::WRITE { self.pieces } else { 0 }
    }
}

/// A background read that has its LSN and room for its data; to be given to exactly one of [`complete_fill_write`],
/// [`complete_fill_zero`] and [`cancel_fill`]. While it is not, the consumer cannot pass its slot.
///
/// [`complete_fill_write`]: crate::Producer::complete_fill_write
/// [`complete_fill_zero`]: crate::Producer::complete_fill_zero
/// [`cancel_fill`]: crate::Producer::cancel_fill
#[derive(Debug)]
#[must_use = "the consumer waits at its slot until the fill is completed or cancelled"]
pub struct FillTicket {
    pub(crate) number: u64,
    pub(crate) stamp: Stamp,
    pub(crate) first: Run,
    pub(crate) pieces: u32,
    pub(crate) max_bytes: u32,
}

impl FillTicket {
    /// Bytes that the fill has room for.
    #[must_use]
    pub const fn max_bytes(&self) -> u32 {
        self.max_bytes
    }

    /// How many pieces that room has.
    #[must_use]
    pub const fn piece_count(&self) -> u32 {
        self.pieces
    }
}

/// A contiguous part of a request's data in the arena, aligned to 4 KiB.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    /// First byte; mapped and writable while the ring is, and the request's own until its ticket is given back.
    pub data: NonNull<u8>,
    /// Length in bytes, 1 to 256 KiB.
    pub bytes: u32,
}

/// The pieces of a ticket in the order of the disk's bytes.
#[derive(Clone, Debug)]
pub struct Pieces<'a> {
    pub(crate) ring: &'a Ring,
    pub(crate) walk: Walk,
}

impl Iterator for Pieces<'_> {
    type Item = Piece;

    #[inline]
    fn next(&mut self) -> Option<Piece> {
        let (block, bytes) = self.walk.next(self.ring)?;
        Some(Piece { data: self.ring.memory().piece(block, bytes)?, bytes })
    }
}

/// A walk along a chain that this process built: bounded by the number of pieces and of bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Walk {
    pub(crate) run: Option<Run>,
    pub(crate) pieces: u32,
    pub(crate) bytes: u32,
}

impl Walk {
    /// The next piece: its block and how many of the request's bytes it holds.
    #[inline]
    pub(crate) fn next(&mut self, ring: &Ring) -> Option<(u32, u32)> {
        let run = self.run.take()?;
        let bytes = self.bytes.min(run.units.saturating_mul(UNIT_BYTES));
        self.bytes = self.bytes.saturating_sub(bytes);
        self.pieces = self.pieces.saturating_sub(1);
        if self.pieces > 0 {
            self.run = ring.next_run(run.block);
        }
        (bytes > 0).then_some((run.block, bytes))
    }
}

impl Ring {
    /// The piece behind the one at `block`, if that is possible at all.
    pub(crate) fn next_run(&self, block: u32) -> Option<Run> {
        let blocks = self.memory().blocks();
        // ORDERING: Relaxed: this process wrote it, in the thread that made the ticket, and the ticket came from there.
        let next = blocks.get(block as usize)?.link.load(Ordering::Relaxed) as u32;
        let units = (blocks.get(next as usize)?.link.load(Ordering::Relaxed) >> 32) as u32;
        (units > 0 && units <= SLAB_UNITS).then_some(Run { block: next, units })
    }

    /// Marks the header at `block`.
    #[inline]
    pub(crate) fn set_state(&self, block: u32, state: u8, kind: u8) {
        if let Some(header) = self.memory().blocks().get(block as usize) {
            // ORDERING: Release: the rest of the header is written before its state says that it counts, and in
            // that order it survives the death of the process.
            header.state.store(u64::from(state) | u64::from(kind) << 8, Ordering::Release);
        }
    }

    #[inline]
    pub(crate) fn write_header(&self, run: Run, offset: u64, length: u64, state: u8, kind: u8) {
        if let Some(header) = self.memory().blocks().get(run.block as usize) {
            // ORDERING: Relaxed, published by the state (for survivors) or by the record's slot (for the consumer).
            header.offset.store(offset, Ordering::Relaxed);
            header.length.store(length, Ordering::Relaxed);
            header.link.store(u64::from(run.units) << 32, Ordering::Relaxed);
        }
        self.set_state(run.block, state, kind);
    }

    /// Frees a chain that this process built.
    pub(crate) fn free_chain(&self, first: Run, pieces: u32) {
        let mut run = Some(first);
        for left in (0..pieces).rev() {
            let Some(this) = run else { return };
            // Read before the header is anyone else's.
            run = if left > 0 { self.next_run(this.block) } else { None };
            self.set_state(this.block, STATE_FREE, 0);
            self.arena().free(this.block);
        }
    }
}
