//! The producing end: a request's life from begin to its record.

use std::sync::Arc;

use journal_format::limits::{MAX_BOOKMARK_BYTES, MAX_RECORD_DATA_BYTES};
use journal_format::{ByteRange, GapReason, Lsn, Stamp};

use crate::arena::Run;
use crate::bell::Bell;
use crate::clock::HostClock;
use crate::error::Full;
use crate::layout::{STATE_FAILED, STATE_FILL, STATE_ISSUED, STATE_PUBLISHED, flag, kind};
use crate::limits::UNIT_BYTES;
use crate::mode::Tracked;
use crate::ring::Ring;
use crate::slots::{Class, Entry};
use crate::sync::Ordering;
use crate::ticket::{FillTicket, OpKind, Pieces, Ticket, Walk};

/// One producing end of a ring. Any thread may call anything; nothing blocks, locks or allocates, and only a publish
/// to a sleeping consumer makes a system call.
#[derive(Debug)]
pub struct Producer {
    pub(crate) ring: Arc<Ring>,
    pub(crate) clock: HostClock,
    pub(crate) bell: Bell,
}

impl Producer {
    /// A producing end over a mapped ring. `bell` is what the consumer waits on.
    #[must_use]
    pub const fn new(ring: Arc<Ring>, clock: HostClock, bell: Bell) -> Self {
        Self { ring, clock, bell }
    }

    /// The ring.
    #[must_use]
    pub fn ring(&self) -> &Ring {
        &self.ring
    }

    /// The host's clock.
    #[must_use]
    pub const fn clock(&self) -> &HostClock {
        &self.clock
    }

    /// Takes a slot credit and room for a guest's write of `range`. The header of every piece says *issued* when
    /// this returns, so that a survivor finds the range.
    ///
    /// # Errors
    /// [`Full`], and nothing was taken. `Full::Length` for an empty range or one over
    /// [`MAX_RECORD_DATA_BYTES`].
    #[inline]
    pub fn begin_write(&self, range: ByteRange, fua: bool) -> Result<Ticket, Full> {
        let flags = if fua { flag::FUA } else { 0 };
        let bytes = u32::try_from(range.length()).map_err(|_| Full::Length)?;
        self.ring.slots().promise(Class::Request)?;
        let chain = self.chain(range.offset(), bytes, STATE_ISSUED);
        let (first, pieces) = chain.inspect_err(|_| self.ring.slots().give_back(1))?;
        // The slot's line is with the consumer; fetch it while the disk works.
        let slots = self.ring.slots();
        self.ring.memory().prefetch_slot(slots.index(slots.tail()));
        Ok(Ticket { range, first, pieces, kind: kind::WRITE, flags, disk_bytes: 0 })
    }

    /// Cuts pieces for `bytes` bytes, with headers that say where on the disk each belongs.
    #[inline]
    fn chain(&self, offset: u64, bytes: u32, state: u8) -> Result<(Run, u32), Full> {
        if bytes == 0 || bytes > MAX_RECORD_DATA_BYTES {
            return Err(Full::Length);
        }
        let units = bytes.div_ceil(UNIT_BYTES);
        let first = self.ring.arena().cut(units).ok_or(Full::Arena)?;
        let held = bytes.min(first.units.saturating_mul(UNIT_BYTES));
        self.ring.write_header(first, offset, u64::from(held), state, kind::WRITE);
        if first.units == units {
            return Ok((first, 1));
        }
        self.chain_on(first, offset, bytes, state)
    }

    /// The rest of a chain whose first piece was too small.
    #[cold]
    fn chain_on(&self, first: Run, offset: u64, bytes: u32, state: u8) -> Result<(Run, u32), Full> {
        let (mut last, mut pieces) = (first, 1_u32);
        let mut done = first.units.saturating_mul(UNIT_BYTES);
        while done < bytes {
            let left = bytes.saturating_sub(done);
            let Some(run) = self.ring.arena().cut(left.div_ceil(UNIT_BYTES)) else {
                self.ring.free_chain(first, pieces);
                return Err(Full::Arena);
            };
            let held = left.min(run.units.saturating_mul(UNIT_BYTES));
            let at = offset.saturating_add(u64::from(done));
            self.ring.write_header(run, at, u64::from(held), state, kind::WRITE);
            if let Some(header) = self.ring.memory().blocks().get(last.block as usize) {
                let link = u64::from(last.units) << 32 | u64::from(run.block);
                // ORDERING: Relaxed, published by the record's slot.
                header.link.store(link, Ordering::Relaxed);
            }
            (last, pieces, done) = (run, pieces.saturating_add(1), done.saturating_add(held));
        }
        Ok((first, pieces))
    }

    /// Takes a slot credit and a header for a request without data, so that a survivor finds it unfinished.
    ///
    /// # Errors
    /// [`Full`], and nothing was taken. `Full::Length` for an empty range, unless it is a resize.
    pub fn begin_op(&self, op: OpKind, range: ByteRange) -> Result<Ticket, Full> {
        let on = |set: bool, bit: u8| if set { bit } else { 0 };
        let (kind, flags, disk_bytes) = match op {
            OpKind::Zero { fua, may_unmap } => {
                (kind::ZERO, on(fua, flag::FUA) | on(may_unmap, flag::MAY_UNMAP), 0)
            }
            OpKind::Discard => (kind::DISCARD, 0, 0),
            OpKind::Resize { disk_bytes } => (kind::RESIZE, 0, disk_bytes),
        };
        if range.is_empty() && kind != kind::RESIZE {
            return Err(Full::Length);
        }
        self.ring.slots().promise(Class::Request)?;
        let Some(first) = self.ring.arena().cut(1) else {
            self.ring.slots().give_back(1);
            return Err(Full::Arena);
        };
        self.ring.write_header(first, range.offset(), range.length(), STATE_ISSUED, kind);
        Ok(Ticket { range, first, pieces: 1, kind, flags, disk_bytes })
    }

    /// The pieces of a write, for the guest's data and for the disk request that is issued from them.
    #[inline]
    #[must_use]
    pub fn pieces(&self, ticket: &Ticket) -> Pieces<'_> {
        let bytes = if ticket.kind == kind::WRITE { ticket.range.length() as u32 } else { 0 };
        Pieces { ring: &self.ring, walk: Walk { run: Some(ticket.first), pieces: ticket.pieces, bytes } }
    }

    /// The room of a fill.
    #[must_use]
    pub fn fill_pieces(&self, ticket: &FillTicket) -> Pieces<'_> {
        let walk = Walk { run: Some(ticket.first), pieces: ticket.pieces, bytes: ticket.max_bytes };
        Pieces { ring: &self.ring, walk }
    }

    /// Copies `bytes` to the start of a write's data; false when they are more than it has. For callers that have
    /// the data in one slice; others use [`Producer::pieces`].
    #[must_use]
    pub fn copy_in(&self, ticket: &Ticket, bytes: &[u8]) -> bool {
        let room = if ticket.kind == kind::WRITE { ticket.range.length() as u32 } else { 0 };
        self.copy_along(Walk { run: Some(ticket.first), pieces: ticket.pieces, bytes: room }, bytes)
    }

    /// Copies `bytes` to the start of a fill's room; false when they are more than it has.
    #[must_use]
    pub fn copy_in_fill(&self, ticket: &FillTicket, bytes: &[u8]) -> bool {
        self.copy_along(
            Walk { run: Some(ticket.first), pieces: ticket.pieces, bytes: ticket.max_bytes },
            bytes,
        )
    }

    fn copy_along(&self, mut walk: Walk, bytes: &[u8]) -> bool {
        let mut rest = bytes;
        while !rest.is_empty() {
            let Some((block, room)) = walk.next(&self.ring) else { return false };
            let Some((now, later)) = rest.split_at_checked(rest.len().min(room as usize)) else {
                return false;
            };
            if !self.ring.memory().copy_in(block, 0, now) {
                return false;
            }
            rest = later;
        }
        true
    }

    /// The disk did what was asked: gives the request its stamp and its LSN and publishes its record. To be called
    /// before the guest learns of the completion.
    #[inline]
    pub fn complete(&self, ticket: Ticket) -> Lsn {
        self.mark_chain(&ticket, STATE_PUBLISHED);
        let (offset, length) = match ticket.kind {
            kind::RESIZE => (ticket.disk_bytes, 0),
            _ => (ticket.range.offset(), ticket.range.length()),
        };
        if ticket.kind == kind::RESIZE {
            self.note_size(ticket.disk_bytes);
        }
        // The stamp comes first: see `docs/formats/ring.md`, "Why any instant is consistent".
        let stamp = self.clock.now();
        let number = self.ring.slots().reserve();
        let entry = Entry {
            stamp: stamp.0,
            offset,
            length,
            kind: ticket.kind,
            flags: ticket.flags,
            reason: 0,
            pieces: ticket.pieces,
            block: ticket.first.block,
        };
        self.publish(number, &entry)
    }

    #[inline]
    fn publish(&self, number: u64, entry: &Entry) -> Lsn {
        let slots = self.ring.slots();
        if slots.publish(number, entry) {
            self.bell.ring();
        }
        slots.lsn(number)
    }

    #[inline]
    fn mark_chain(&self, ticket: &Ticket, state: u8) {
        self.ring.set_state(ticket.first.block, state, ticket.kind);
        let mut run = ticket.first;
        for _ in 1..ticket.pieces {
            let Some(next) = self.ring.next_run(run.block) else { return };
            self.ring.set_state(next.block, state, ticket.kind);
            run = next;
        }
    }

    /// The disk refused, so nobody knows what the range now holds: marks it dirty, opens a gap
    /// ([`GapReason::WriteFailed`]) that the next resync closes, and frees the request's room. To be called before
    /// the guest learns of the failure.
    pub fn fail(&self, ticket: Ticket) {
        self.mark_chain(&ticket, STATE_FAILED);
        self.mark_dirty(ticket.range);
        self.begin_gap(GapReason::WriteFailed);
        self.release(ticket);
    }

    /// As [`Producer::fail`], for a request that is still under way and goes on as one that is only tracked: the gap
    /// lasts at least until [`Producer::end_tracked`].
    pub fn lose(&self, ticket: Ticket) -> Tracked {
        let tracked = self.track_anyhow(ticket.range);
        self.fail(ticket);
        tracked
    }

    /// The request came to nothing and changed nothing on the disk (a driver that answers "not supported", say):
    /// frees its room without a record.
    pub fn cancel(&self, ticket: Ticket) {
        self.release(ticket);
    }

    fn release(&self, ticket: Ticket) {
        self.ring.free_chain(ticket.first, ticket.pieces);
        self.ring.slots().give_back(1);
    }

    /// A guest flush begins.
    ///
    /// # Errors
    /// [`Full`]; then the point after this flush is not marked as one, and nothing else is lost.
    pub fn flush_record(&self) -> Result<Lsn, Full> {
        self.bare(Class::Request, Entry { kind: kind::FLUSH, ..Entry::default() }).map(|(lsn, _)| lsn)
    }

    /// The disk has a new size although no ticket was held (the ring was full): publishes the resize from the
    /// control reserve. Call it in any mode, before the guest learns of the new size.
    ///
    /// # Errors
    /// [`Full`] when even the reserve is used up; then end capture.
    pub fn resized(&self, disk_bytes: u64) -> Result<Lsn, Full> {
        self.note_size(disk_bytes);
        self.bare(Class::Control, Entry { kind: kind::RESIZE, offset: disk_bytes, ..Entry::default() })
            .map(|(lsn, _)| lsn)
    }

    fn note_size(&self, disk_bytes: u64) {
        // ORDERING: Release pairs with `Ring::disk_bytes`.
        self.ring.memory().words().disk_bytes.store(disk_bytes, Ordering::Release);
    }

    /// A named point. Used by the agent, which holds a producing end for it.
    ///
    /// # Errors
    /// `Full::Length` for an empty name or one over 255 bytes, else [`Full`]: try again when records were taken out.
    pub fn bookmark(&self, name: &str) -> Result<(Lsn, Stamp), Full> {
        let length = u32::try_from(name.len()).map_err(|_| Full::Length)?;
        if length == 0 || length > MAX_BOOKMARK_BYTES {
            return Err(Full::Length);
        }
        self.ring.slots().promise(Class::Bookmark)?;
        let Some(run) = self.ring.arena().cut(1) else {
            self.ring.slots().give_back(1);
            return Err(Full::Arena);
        };
        self.ring.write_header(run, 0, 0, STATE_FILL, kind::BOOKMARK);
        let copied = self.ring.memory().copy_in(run.block, 0, name.as_bytes());
        debug_assert!(copied, "a name fits one unit");
        let stamp = self.clock.now();
        let number = self.ring.slots().reserve();
        let entry = Entry {
            stamp: stamp.0,
            length: u64::from(length),
            kind: kind::BOOKMARK,
            pieces: 1,
            block: run.block,
            ..Entry::default()
        };
        Ok((self.publish(number, &entry), stamp))
    }

    /// Publishes a record without data from the credits of `class`.
    pub(crate) fn bare(&self, class: Class, mut entry: Entry) -> Result<(Lsn, Stamp), Full> {
        self.ring.slots().promise(class)?;
        let stamp = self.clock.now();
        entry.stamp = stamp.0;
        let number = self.ring.slots().reserve();
        Ok((self.publish(number, &entry), stamp))
    }

    /// Reserves the LSN of a background read, and room for up to `max_bytes` of data.
    ///
    /// The order matters: *take* the dirty bits ([`crate::Dirty::take_run`]), *reserve*, then *read* the disk. A
    /// recorded write that ends after the slot was reserved has a greater LSN and wins on replay; one that ended
    /// before has a smaller LSN and is in what is read. Reserving first would be wrong: the fill could take the bit
    /// of an unrecorded write that came after a recorded one with a greater LSN than the fill's, and replay would
    /// bring the recorded one back. When this fails, mark the run dirty again.
    ///
    /// # Errors
    /// [`Full`] when less than a quarter of the slots or of the arena is free: fills yield to the guest.
    pub fn reserve_fill(&self, max_bytes: u32) -> Result<FillTicket, Full> {
        if self.ring.arena().free_slabs() <= self.ring.geometry().slabs / 4 {
            return Err(Full::Arena);
        }
        self.ring.slots().promise(Class::Fill)?;
        let chain = self.chain(0, max_bytes, STATE_FILL);
        let (first, pieces) = chain.inspect_err(|_| self.ring.slots().give_back(1))?;
        // ORDERING: SeqCst pairs with `finish_resync`: a gap does not end while a fill is under way.
        self.ring.memory().words().fills.fetch_add(1, Ordering::SeqCst);
        let stamp = self.clock.now();
        let number = self.ring.slots().reserve();
        Ok(FillTicket { number, stamp, first, pieces, max_bytes })
    }

    /// The range was read into the fill's pieces: publishes it.
    ///
    /// # Errors
    /// `Full::Length` when the range is empty or larger than the room; it is then dirty again and the slot is void.
    pub fn complete_fill_write(&self, ticket: FillTicket, range: ByteRange) -> Result<Lsn, Full> {
        if range.is_empty() || range.length() > u64::from(ticket.max_bytes) {
            self.cancel_fill(ticket, range);
            return Err(Full::Length);
        }
        let entry = Entry {
            stamp: ticket.stamp.0,
            offset: range.offset(),
            length: range.length(),
            kind: kind::WRITE,
            flags: flag::FILL,
            reason: 0,
            pieces: ticket.pieces,
            block: ticket.first.block,
        };
        Ok(self.end_fill(ticket.number, &entry))
    }

    /// The range reads as zeroes (a hole): publishes that. The range may be larger than the fill's room.
    ///
    /// # Errors
    /// `Full::Length` when the range is empty; the slot is then void.
    pub fn complete_fill_zero(&self, ticket: FillTicket, range: ByteRange) -> Result<Lsn, Full> {
        if range.is_empty() {
            self.cancel_fill(ticket, range);
            return Err(Full::Length);
        }
        self.ring.free_chain(ticket.first, ticket.pieces);
        let entry = Entry {
            stamp: ticket.stamp.0,
            offset: range.offset(),
            length: range.length(),
            kind: kind::ZERO,
            flags: flag::FILL,
            ..Entry::default()
        };
        Ok(self.end_fill(ticket.number, &entry))
    }

    /// The read came to nothing: closes the slot as void. `unread` (perhaps empty) is marked dirty again first.
    pub fn cancel_fill(&self, ticket: FillTicket, unread: ByteRange) {
        self.mark_dirty(unread);
        self.ring.free_chain(ticket.first, ticket.pieces);
        self.end_fill(ticket.number, &Entry { stamp: ticket.stamp.0, kind: kind::VOID, ..Entry::default() });
    }

    fn end_fill(&self, number: u64, entry: &Entry) -> Lsn {
        let lsn = self.publish(number, entry);
        // ORDERING: SeqCst as in `reserve_fill`; dirty bits marked again come before.
        self.ring.memory().words().fills.fetch_sub(1, Ordering::SeqCst);
        lsn
    }
}
