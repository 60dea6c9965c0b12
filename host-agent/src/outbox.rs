//! The outbox: encoded frames of one disk's epoch, kept in a memfd until the server has made them durable.
//!
//! A frame is copied in once, ready to be sent: its wire message lies in one run of bytes. It is dropped when its LSN
//! is acknowledged. The memfd says everything that is needed to go on from it, so that a later agent can adopt it:
//!
//! ```text
//! page 0, the header                          from 4096: entries, each aligned to 64 bytes
//!   0  8  magic "CDPOUTBX"                      0  4  magic "OENT"
//!   8  4  version, 1                            4  4  kind: 1 frame, 2 rest of the area is unused
//!  12  4  reserved, 0                           8  8  first LSN
//!  16  8  area: bytes for entries              16  8  last LSN
//!  24 16  disk id                              24  4  length of the message that follows
//!  40  8  epoch                                28  4  raw (uncompressed) bytes of data in it
//!  48  8  head: position of the oldest entry   32  8  position of this entry
//!  56  8  tail: position after the newest      40 20  reserved, 0
//!  64  4  crc32c of bytes 0..48                60  4  crc32c of bytes 0..60
//!                                              64  …  wire message: 16 B header, encoded frame
//! ```
//!
//! Positions count bytes since the outbox was made and never wrap; an entry lies at `4096 + position % area`. An entry
//! never crosses the end of the area: where it would, an entry of kind 2 fills the rest. The tail is written after
//! its entry and the head before anything behind it is overwritten (it may lag: frames before it are only sent again),
//! so what lies between them is whole. A head that is not below the tail means that there is nothing.
//!
//! *Threads*: the drain thread owns the [`OutboxWriter`]; the hub reads and releases through the [`Outbox`].

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use journal_format::wire::{MESSAGE_HEADER_BYTES, MessageHeader, MessageType};
use journal_format::{DiskId, Epoch, FormatError, Lsn};
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use crate::limits::OUTBOX_REUSE_BYTES;
use crate::seam::memory::{Memory, MemoryWriter};

/// Where the entries begin.
pub const AREA_START: usize = 4096;
/// Alignment of entries.
pub const ENTRY_ALIGN: u64 = 64;
/// Bytes in front of a message.
pub const ENTRY_HEADER_BYTES: usize = 64;

const HEADER_MAGIC: [u8; 8] = *b"CDPOUTBX";
const ENTRY_MAGIC: [u8; 4] = *b"OENT";
const KIND_FRAME: u32 = 1;
const KIND_SKIP: u32 = 2;
const HEAD_AT: usize = 48;
const TAIL_AT: usize = 56;

/// The header page's used part.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    version: U32,
    reserved: U32,
    area: U64,
    disk: [u8; 16],
    epoch: U64,
    head: U64,
    tail: U64,
    crc: U32,
}

/// What stands in front of each message.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawEntry {
    magic: [u8; 4],
    kind: U32,
    first_lsn: U64,
    last_lsn: U64,
    message_bytes: U32,
    raw_bytes: U32,
    position: U64,
    reserved: [u8; 20],
    crc: U32,
}

const _: () = assert!(size_of::<RawEntry>() == ENTRY_HEADER_BYTES);

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
    /// Position behind it, for the head.
    end: u64,
}

/// There is no room now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

#[derive(Debug)]
struct State {
    entries: VecDeque<Entry>,
    head: u64,
    tail: u64,
    raw_bytes: u64,
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
    /// Makes an empty outbox with room for `bytes` of entries.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn create(disk: DiskId, epoch: Epoch, bytes: u64) -> io::Result<(Arc<Self>, OutboxWriter)> {
        let area = bytes / ENTRY_ALIGN * ENTRY_ALIGN;
        let len = usize::try_from(area).map_err(io::Error::other)?.saturating_add(AREA_START);
        let (memory, mut writer) = Memory::create(c"cdp-outbox", len)?;
        let mut header = RawHeader {
            magic: HEADER_MAGIC,
            version: U32::new(1),
            reserved: U32::new(0),
            area: U64::new(area),
            disk: disk.0,
            epoch: U64::new(epoch.0),
            head: U64::new(0),
            tail: U64::new(0),
            crc: U32::new(0),
        };
        header.crc = U32::new(crc32c::crc32c(header.as_bytes().get(..HEAD_AT).unwrap_or_default()));
        writer.copy_in(0, header.as_bytes());
        let state = State { entries: VecDeque::new(), head: 0, tail: 0, raw_bytes: 0 };
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
        while let Some(entry) = state.entries.front().copied().filter(|entry| entry.last_lsn <= durable) {
            state.entries.pop_front();
            state.head = entry.end;
            state.raw_bytes = state.raw_bytes.saturating_sub(u64::from(entry.raw_bytes));
        }
        drop(state);
        self.room.notify_all();
    }

    /// First LSN that can still be sent; `None` when the outbox is empty.
    #[must_use]
    pub fn oldest_lsn(&self) -> Option<Lsn> {
        self.lock().entries.front().map(|entry| entry.first_lsn)
    }

    /// Bytes in use.
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

    /// Copies a frame in: `head` (header and records) and `data` as encoded.
    ///
    /// # Errors
    /// [`Full`] when there is no room now; nothing has changed then.
    ///
    /// # Panics
    /// When the frame is larger than the format allows: the packer made it.
    pub fn push(&mut self, frame: &PackedFrame) -> Result<(), Full> {
        let message_bytes = MESSAGE_HEADER_BYTES + frame.bytes();
        let need = align_up((ENTRY_HEADER_BYTES + message_bytes) as u64);
        let (start, skip, head) = self.find_room(need).ok_or(Full)?;
        // Before anything that the old head might still point to is overwritten.
        self.memory.copy_in(HEAD_AT, &head.to_le_bytes());
        if skip > 0 {
            self.write_entry(start - skip, KIND_SKIP, frame, 0);
        }
        let wire = MessageHeader::new(MessageType::Frame, frame.bytes());
        let wire =
            wire.unwrap_or_else(|error: FormatError| panic!("the packer made too large a frame: {error}"));
        let at = self.at(start) + ENTRY_HEADER_BYTES;
        self.write_entry(start, KIND_FRAME, frame, message_bytes);
        self.memory.copy_in(at, wire.as_bytes());
        self.memory.copy_in(at + MESSAGE_HEADER_BYTES, &frame.head);
        self.memory.copy_in(at + MESSAGE_HEADER_BYTES + frame.head.len(), &frame.data);
        self.publish(
            frame,
            Entry {
                first_lsn: frame.first_lsn,
                last_lsn: frame.last_lsn,
                at,
                len: message_bytes,
                raw_bytes: frame.raw_bytes,
                end: start + need,
            },
        );
        Ok(())
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
        state.tail = entry.end;
        state.raw_bytes += u64::from(frame.raw_bytes);
        drop(state);
        self.memory.copy_in(TAIL_AT, &entry.end.to_le_bytes());
    }

    /// Position for `need` bytes in one run, how many bytes before it are skipped to reach it, and the head.
    fn find_room(&self, need: u64) -> Option<(u64, u64, u64)> {
        let area = self.outbox.area;
        let mut state = self.outbox.lock();
        if state.entries.is_empty() && state.tail % area > OUTBOX_REUSE_BYTES {
            state.tail = state.tail.next_multiple_of(area);
            state.head = state.tail;
        }
        let to_end = area - state.tail % area;
        let skip = if need > to_end { to_end } else { 0 };
        let free = area - (state.tail - state.head);
        (skip + need <= free).then_some((state.tail + skip, skip, state.head))
    }

    fn at(&self, position: u64) -> usize {
        // The area's length is a usize, so a remainder by it is too.
        AREA_START + (position % self.outbox.area) as usize
    }

    fn write_entry(&mut self, position: u64, kind: u32, frame: &PackedFrame, message_bytes: usize) {
        let mut entry = RawEntry {
            magic: ENTRY_MAGIC,
            kind: U32::new(kind),
            first_lsn: U64::new(frame.first_lsn.0),
            last_lsn: U64::new(frame.last_lsn.0),
            message_bytes: U32::new(u32::try_from(message_bytes).unwrap_or(u32::MAX)),
            raw_bytes: U32::new(frame.raw_bytes),
            position: U64::new(position),
            reserved: [0; 20],
            crc: U32::new(0),
        };
        entry.crc = U32::new(crc32c::crc32c(entry.as_bytes().get(..60).unwrap_or_default()));
        self.memory.copy_in(self.at(position), entry.as_bytes());
    }
}

fn align_up(bytes: u64) -> u64 {
    bytes.div_ceil(ENTRY_ALIGN) * ENTRY_ALIGN
}

/// A frame as the packer made it.
#[derive(Clone, Debug)]
pub struct PackedFrame {
    /// First LSN.
    pub first_lsn: Lsn,
    /// Last LSN.
    pub last_lsn: Lsn,
    /// Raw bytes of data.
    pub raw_bytes: u32,
    /// Encoded header and records.
    pub head: Vec<u8>,
    /// Encoded data.
    pub data: Vec<u8>,
}

impl PackedFrame {
    /// Bytes of the encoded frame.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.head.len() + self.data.len()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    fn frame(first: u64, last: u64, data: usize) -> PackedFrame {
        let byte = u8::try_from(first % 251).unwrap();
        PackedFrame {
            first_lsn: Lsn(first),
            last_lsn: Lsn(last),
            raw_bytes: 7,
            head: vec![byte; 100],
            data: vec![byte ^ 0xff; data],
        }
    }

    fn outbox(bytes: u64) -> (Arc<Outbox>, OutboxWriter) {
        Outbox::create(DiskId([1; 16]), Epoch(1), bytes).unwrap()
    }

    fn message(outbox: &Outbox, entry: &Entry) -> Vec<u8> {
        let mut bytes = vec![0; entry.len];
        outbox.memory().file().read_exact_at(&mut bytes, entry.at as u64).unwrap();
        bytes
    }

    #[test]
    fn frames_come_back_in_order_as_whole_wire_messages() {
        let (outbox, mut writer) = outbox(1 << 16);
        writer.push(&frame(1, 10, 50)).unwrap();
        writer.push(&frame(11, 11, 60)).unwrap();
        let entries = outbox.entries(Lsn(1), Lsn::MAX, usize::MAX, 100);
        assert_eq!(entries.len(), 2);
        let bytes = message(&outbox, &entries[1]);
        let (kind, len) = MessageHeader::parse(&bytes).unwrap();
        assert_eq!((kind, len), (MessageType::Frame, 160));
        assert_eq!(bytes[16..116], [11; 100]);
        assert_eq!(bytes[116..], [11 ^ 0xff; 60]);
        assert_eq!(outbox.raw_bytes(), 14);
    }

    #[test]
    fn sending_starts_at_the_frame_that_holds_the_lsn() {
        let (outbox, mut writer) = outbox(1 << 16);
        for first in [1, 11, 21] {
            writer.push(&frame(first, first + 9, 50)).unwrap();
        }
        let firsts = |from, bytes, most| -> Vec<u64> {
            outbox.entries(Lsn(from), Lsn::MAX, bytes, most).iter().map(|e| e.first_lsn.0).collect()
        };
        assert_eq!(firsts(11, usize::MAX, 9), [11, 21]);
        assert_eq!(firsts(15, usize::MAX, 9), [11, 21], "half acknowledged: the whole frame again");
        assert_eq!(firsts(31, usize::MAX, 9), Vec::<u64>::new());
        assert_eq!(firsts(1, 1, 9), [1], "at least one");
        assert_eq!(firsts(1, usize::MAX, 2), [1, 11]);
        let to_20 = outbox.entries(Lsn(1), Lsn(29), usize::MAX, 9);
        assert_eq!(to_20.last().unwrap().last_lsn, Lsn(20), "not what ends behind the bound");
    }

    #[test]
    fn a_full_outbox_takes_more_only_after_a_release() {
        let (outbox, mut writer) = outbox(4096);
        let mut lsn = 1;
        while writer.push(&frame(lsn, lsn, 500)).is_ok() {
            lsn += 1;
        }
        assert!(lsn > 3);
        outbox.release(Lsn(0));
        assert_eq!(writer.push(&frame(lsn, lsn, 500)), Err(Full));
        outbox.release(Lsn(1));
        assert_eq!(outbox.oldest_lsn(), Some(Lsn(2)));
        writer.push(&frame(lsn, lsn, 500)).unwrap();
    }

    #[test]
    fn the_memfd_alone_tells_what_is_left() {
        let (outbox, mut writer) = outbox(4096);
        // Sizes that force a skipped rest: 3 × 1088 of 4096 leave 832.
        for lsn in 1..200_u64 {
            while writer.push(&frame(lsn, lsn, 900)).is_err() {
                outbox.release(outbox.oldest_lsn().unwrap());
            }
        }
        let kept: Vec<u64> =
            outbox.entries(Lsn(0), Lsn::MAX, usize::MAX, 99).iter().map(|e| e.first_lsn.0).collect();
        let mut page = [0; 68];
        outbox.memory().file().read_exact_at(&mut page, 0).unwrap();
        let header = RawHeader::read_from_bytes(&page).unwrap();
        assert_eq!(header.crc.get(), crc32c::crc32c(&page[..48]));
        let (mut at, mut found) = (header.head.get(), Vec::new());
        while at < header.tail.get() {
            let mut bytes = [0; ENTRY_HEADER_BYTES];
            let place = AREA_START as u64 + at % header.area.get();
            outbox.memory().file().read_exact_at(&mut bytes, place).unwrap();
            let entry = RawEntry::read_from_bytes(&bytes).unwrap();
            assert_eq!((entry.magic, entry.position.get()), (ENTRY_MAGIC, at));
            assert_eq!(entry.crc.get(), crc32c::crc32c(&bytes[..60]));
            if entry.kind.get() == KIND_SKIP {
                at += header.area.get() - at % header.area.get();
            } else {
                found.push(entry.first_lsn.get());
                at += align_up(ENTRY_HEADER_BYTES as u64 + u64::from(entry.message_bytes.get()));
            }
        }
        assert_eq!(found, kept);
    }

    #[test]
    fn an_outbox_that_keeps_running_empty_touches_little_memory() {
        use std::os::unix::fs::MetadataExt;
        let (outbox, mut writer) = outbox(64 << 20);
        for lsn in 1..400 {
            writer.push(&frame(lsn, lsn, 500_000)).unwrap();
            assert_eq!(outbox.entries(Lsn(lsn), Lsn::MAX, 1, 1)[0].first_lsn, Lsn(lsn));
            outbox.release(Lsn(lsn));
        }
        let touched = outbox.memory().file().metadata().unwrap().blocks() * 512;
        assert!(touched < 2 * OUTBOX_REUSE_BYTES, "{touched} bytes");
    }

    #[test]
    fn a_waiting_writer_is_woken_by_a_release() {
        let (outbox, mut writer) = outbox(4096);
        let mut lsn = 1;
        while writer.push(&frame(lsn, lsn, 500)).is_ok() {
            lsn += 1;
        }
        let other = Arc::clone(&outbox);
        let thread = std::thread::spawn(move || other.release(Lsn(2)));
        while writer.push(&frame(lsn, lsn, 500)).is_err() {
            writer.wait_for_release(Duration::from_millis(20));
        }
        thread.join().unwrap();
        assert_eq!(outbox.oldest_lsn(), Some(Lsn(3)));
    }
}
