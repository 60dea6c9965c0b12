//! The outbox: encoded frames of one disk's epoch, kept in a memfd until the server has made them durable.
//!
//! A frame is copied in once, ready to be sent: its wire message lies in one run of bytes. It is dropped when its LSN
//! is acknowledged. A record stays in the ring until its frame is here: so at every moment it is in the ring, in the
//! outbox, or durable, and an agent that takes over from one that was killed ([`adopt`]) loses none. Bytes and argument:
//! `docs/formats/outbox.md`.
//!
//! The area is used in *segments*, and the one that became free last is the next: while the server keeps up, frames go
//! through the same few MiB, however large the outbox is, and the rest of its memory is never touched.
//!
//! *Threads*: the drain thread owns the [`OutboxWriter`]; the hub reads and releases through the [`Outbox`].

pub mod adopt;
pub mod layout;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io;
use std::mem::offset_of;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use journal_format::wire::{MESSAGE_HEADER_BYTES, MessageHeader, MessageType};
use journal_format::{DiskId, Epoch, FormatError, Lsn, Stamp};
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U32, U64};

use self::layout::{
    AREA_START, ENTRY_HEADER_BYTES, HEADER_MAGIC, Header, KIND_FRAME, KIND_SKIP, RawEntry, SEGMENT_BYTES,
    VERSION, entry_bytes,
};
use crate::seam::memory::{Memory, MemoryWriter};

/// How far the records of an epoch have been packed into frames.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Packed {
    /// The last record in a frame.
    pub lsn: Lsn,
    /// Its stamp; 0 when there is none.
    pub stamp: Stamp,
    /// Size of the disk after it.
    pub disk_bytes: u64,
}

/// A frame that waits for its acknowledgement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// First LSN in it.
    pub first_lsn: Lsn,
    /// Last LSN in it.
    pub last_lsn: Lsn,
    /// Where its message begins in the memory.
    pub at: usize,
    /// Bytes of the message.
    pub len: usize,
    /// Raw bytes of data in it.
    pub raw_bytes: u32,
    /// Its position, for head and tail.
    start: u64,
}

/// There is no room now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

#[derive(Debug)]
struct State {
    entries: VecDeque<Entry>,
    head: u64,
    tail: u64,
    segments: Segments,
    raw_bytes: u64,
    durable: Lsn,
}

/// Which segment of the area each run of [`SEGMENT_BYTES`] positions is in.
#[derive(Debug)]
struct Segments {
    /// Those of positions in use, in order.
    used: VecDeque<u64>,
    /// Number of the first of these runs.
    first: u64,
    /// The others. The last is the next: its memory was used a moment ago.
    free: Vec<u64>,
}

impl Segments {
    fn new(count: u64) -> Self {
        Self { used: VecDeque::new(), first: 0, free: (0..count).rev().collect() }
    }

    /// Takes a segment for the run that begins at `start`, the one after the last; false when there is none.
    fn open(&mut self, start: u64) -> bool {
        let Some(segment) = self.free.pop() else { return false };
        if self.used.is_empty() {
            self.first = start / SEGMENT_BYTES;
        }
        self.used.push_back(segment);
        true
    }

    /// Gives back what lies before the run of `head`.
    fn free_before(&mut self, head: u64) {
        while self.first < head / SEGMENT_BYTES {
            let Some(segment) = self.used.pop_front() else { break };
            self.free.push(segment);
            self.first += 1;
        }
    }

    /// Where a position in use lies in the memory.
    fn at(&self, position: u64) -> usize {
        let run = position / SEGMENT_BYTES - self.first;
        let segment = usize::try_from(run).ok().and_then(|run| self.used.get(run));
        let segment = segment.unwrap_or_else(|| panic!("position {position} is in no segment"));
        // The area's length is a usize, so what lies in it is too.
        AREA_START + (segment * SEGMENT_BYTES + position % SEGMENT_BYTES) as usize
    }
}

/// A place for an entry.
#[derive(Debug)]
struct Room {
    start: u64,
    at: usize,
    /// Position and place of what is left of the segment before, which is not used.
    skipped: Option<(u64, usize)>,
    head: u64,
}

/// The reading side.
#[derive(Debug)]
pub struct Outbox {
    memory: Arc<Memory>,
    area: u64,
    state: Mutex<State>,
    room: Condvar,
}

/// The writing side; one per outbox.
#[derive(Debug)]
pub struct OutboxWriter {
    outbox: Arc<Outbox>,
    memory: MemoryWriter,
}

impl Outbox {
    /// Makes an empty outbox with room for `bytes` of entries, in whole segments and at least one, for records after `packed`; frames up to `last` have
    /// been in an outbox before.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn create(
        disk: DiskId,
        epoch: Epoch,
        bytes: u64,
        packed: Packed,
        last: Lsn,
    ) -> io::Result<(Arc<Self>, OutboxWriter)> {
        let segments = (bytes / SEGMENT_BYTES).max(1);
        let area = segments * SEGMENT_BYTES;
        let len = usize::try_from(area).map_err(io::Error::other)?.saturating_add(AREA_START);
        let (memory, mut writer) = Memory::create(c"cdp-outbox", len)?;
        let mut header = Header {
            magic: HEADER_MAGIC,
            version: U32::new(VERSION),
            reserved: U32::new(0),
            area_bytes: U64::new(area),
            disk: disk.0,
            epoch: U64::new(epoch.0),
            reserved2: [0; 12],
            crc: U32::new(0),
            head: U64::new(0),
            tail: U64::new(0),
            packed_lsn: U64::new(packed.lsn.0),
            packed_stamp: U64::new(packed.stamp.0),
            packed_disk_bytes: U64::new(packed.disk_bytes),
            freed: U64::new(0),
            last_lsn: U64::new(last.0),
        };
        header.crc = U32::new(header.computed_crc());
        writer.copy_in(0, header.as_bytes());
        let (entries, segments) = (VecDeque::new(), Segments::new(segments));
        let state = State { entries, head: 0, tail: 0, segments, raw_bytes: 0, durable: Lsn::ZERO };
        let outbox = Arc::new(Self { memory, area, state: Mutex::new(state), room: Condvar::new() });
        Ok((Arc::clone(&outbox), OutboxWriter { outbox, memory: writer }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every critical section below leaves the state whole before it could panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The memory that [`Entry::at`] points into.
    #[must_use]
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Frames in LSN order from the one that holds `from` to the one that ends with `to`, up to `most_bytes` and `most`
    /// of them, at least one if there is one.
    #[must_use]
    pub fn entries(&self, from: Lsn, to: Lsn, most_bytes: usize, most: usize) -> Vec<Entry> {
        let state = self.lock();
        let start = state.entries.partition_point(|entry| entry.last_lsn < from);
        let mut bytes = 0_usize;
        let fits = |entry: &&Entry| {
            let first = bytes == 0;
            bytes = bytes.saturating_add(entry.len);
            entry.last_lsn <= to && (first || bytes <= most_bytes)
        };
        state.entries.range(start..).take(most).take_while(fits).copied().collect()
    }

    /// Drops the frames that end at or before `durable`.
    pub fn release(&self, durable: Lsn) {
        let mut state = self.lock();
        state.durable = state.durable.max(durable);
        while let Some(entry) = state.entries.front().copied().filter(|entry| entry.last_lsn <= durable) {
            state.entries.pop_front();
            state.head = state.entries.front().map_or(state.tail, |next| next.start);
            state.raw_bytes = state.raw_bytes.saturating_sub(u64::from(entry.raw_bytes));
        }
        let head = state.head;
        state.segments.free_before(head);
        drop(state);
        self.room.notify_all();
    }

    /// The last LSN that [`Outbox::release`] was told.
    #[must_use]
    pub fn durable(&self) -> Lsn {
        self.lock().durable
    }

    /// First LSN that can still be sent; `None` when the outbox is empty.
    #[must_use]
    pub fn oldest_lsn(&self) -> Option<Lsn> {
        self.lock().entries.front().map(|entry| entry.first_lsn)
    }

    /// Bytes in use, with what is left over at the ends of segments.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        let state = self.lock();
        state.tail.saturating_sub(state.head)
    }

    /// Bytes for entries.
    #[must_use]
    pub fn capacity_bytes(&self) -> u64 {
        self.area
    }

    /// Raw bytes of data in the frames that wait.
    #[must_use]
    pub fn raw_bytes(&self) -> u64 {
        self.lock().raw_bytes
    }
}

impl OutboxWriter {
    /// The reading side.
    #[must_use]
    pub fn outbox(&self) -> &Arc<Outbox> {
        &self.outbox
    }

    /// Notes that piece `number` of the record `lsn`, whose frame is in a safe place, is about to be freed in the ring.
    pub fn freeing(&mut self, lsn: Lsn, number: u8) {
        self.memory.store(offset_of!(Header, freed), lsn.0.wrapping_shl(8) | u64::from(number));
    }

    /// Copies a frame in that comes from the ring: `head` (header and records) and `data` as encoded.
    ///
    /// # Errors
    /// [`Full`] when there is no room now; nothing has changed then.
    ///
    /// # Panics
    /// When the frame is larger than the format allows: the packer made it.
    pub fn push(&mut self, frame: &PackedFrame) -> Result<(), Full> {
        self.refill(frame)?;
        self.note(frame.packed());
        Ok(())
    }

    /// As [`OutboxWriter::push`], for a frame that was elsewhere before: how far records are packed was noted then.
    ///
    /// # Errors
    /// [`Full`] when there is no room now; nothing has changed then.
    ///
    /// # Panics
    /// When the frame is larger than the format allows.
    pub fn refill(&mut self, frame: &PackedFrame) -> Result<(), Full> {
        let message_bytes = MESSAGE_HEADER_BYTES + frame.bytes();
        let need = entry_bytes(message_bytes);
        let Room { start, at, skipped, head } = self.find_room(need).ok_or(Full)?;
        // Before anything that the old head might still point to is overwritten.
        self.memory.store(offset_of!(Header, head), head);
        if let Some((position, at)) = skipped {
            self.memory.copy_in(at, RawEntry::new(position, KIND_SKIP, frame, 0).as_bytes());
        }
        let wire = MessageHeader::new(MessageType::Frame, frame.bytes());
        let wire =
            wire.unwrap_or_else(|error: FormatError| panic!("the packer made too large a frame: {error}"));
        self.memory.copy_in(at, RawEntry::new(start, KIND_FRAME, frame, message_bytes).as_bytes());
        let at = at + ENTRY_HEADER_BYTES;
        self.memory.copy_in(at, wire.as_bytes());
        self.memory.copy_in(at + MESSAGE_HEADER_BYTES, &frame.head);
        self.memory.copy_in(at + MESSAGE_HEADER_BYTES + frame.head.len(), &frame.data);
        self.memory.store(offset_of!(Header, tail), start + need);
        self.memory.store(offset_of!(Header, last_lsn), frame.last_lsn.0);
        self.publish(
            frame,
            Entry {
                first_lsn: frame.first_lsn,
                last_lsn: frame.last_lsn,
                at,
                len: message_bytes,
                raw_bytes: frame.raw_bytes,
                start,
            },
        );
        Ok(())
    }

    /// Notes how far the records of the ring are in frames, here or elsewhere: what comes before may be freed there.
    pub fn note(&mut self, packed: Packed) {
        self.memory.store(offset_of!(Header, packed_disk_bytes), packed.disk_bytes);
        self.memory.store(offset_of!(Header, packed_stamp), packed.stamp.0);
        self.memory.store(offset_of!(Header, packed_lsn), packed.lsn.0);
    }

    /// Dies before its copy or store of that number.
    #[cfg(test)]
    pub fn die_after(&mut self, count: u64) {
        self.memory.die_after(count);
    }

    /// Waits until something was released, or `timeout`.
    pub fn wait_for_release(&self, timeout: Duration) {
        let state = self.outbox.lock();
        let _ = self.outbox.room.wait_timeout(state, timeout);
    }

    fn publish(&mut self, frame: &PackedFrame, entry: Entry) {
        let mut state = self.outbox.lock();
        debug_assert!(state.entries.back().is_none_or(|last| last.last_lsn.next() == frame.first_lsn));
        state.entries.push_back(entry);
        state.tail = entry.start + entry_bytes(entry.len);
        state.raw_bytes += u64::from(frame.raw_bytes);
    }

    /// A place for `need` bytes in one segment.
    fn find_room(&self, need: u64) -> Option<Room> {
        let mut state = self.outbox.lock();
        let State { entries, head, tail, segments, .. } = &mut *state;
        if entries.is_empty() {
            // From the beginning of the same segment again.
            *tail = tail.next_multiple_of(SEGMENT_BYTES);
            *head = *tail;
            segments.free_before(*head);
        }
        let (used, end) = (*tail % SEGMENT_BYTES, tail.next_multiple_of(SEGMENT_BYTES));
        if used > 0 && used + need <= SEGMENT_BYTES {
            return Some(Room { start: *tail, at: segments.at(*tail), skipped: None, head: *head });
        }
        let skipped = (used > 0).then(|| (*tail, segments.at(*tail)));
        segments.open(end).then(|| Room { start: end, at: segments.at(end), skipped, head: *head })
    }
}

/// A frame as the packer made it.
#[derive(Clone, Debug)]
pub struct PackedFrame {
    /// First LSN.
    pub first_lsn: Lsn,
    /// Last LSN.
    pub last_lsn: Lsn,
    /// Its stamp.
    pub last_stamp: Stamp,
    /// Size of the disk after it.
    pub disk_bytes: u64,
    /// Raw bytes of data.
    pub raw_bytes: u32,
    /// Encoded header and records.
    pub head: Vec<u8>,
    /// Encoded data.
    pub data: Vec<u8>,
}

impl PackedFrame {
    /// How far records are packed with it.
    #[must_use]
    pub fn packed(&self) -> Packed {
        Packed { lsn: self.last_lsn, stamp: self.last_stamp, disk_bytes: self.disk_bytes }
    }

    /// Bytes of the encoded frame.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.head.len() + self.data.len()
    }
}
