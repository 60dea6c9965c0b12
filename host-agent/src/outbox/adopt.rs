//! Going on from the outbox of an agent that is gone. A filter has kept it, so nothing in it is believed: it is read
//! by system call into private memory, checked to the last byte, and its frames are copied into a new outbox that
//! nobody else has ever had.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use journal_format::wire::{MESSAGE_HEADER_BYTES, MessageHeader, MessageType};
use journal_format::{DiskId, Epoch, Frame, Lsn, Stamp};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use zerocopy::FromBytes;

use super::layout::{
    AREA_START, ENTRY_HEADER_BYTES, ENTRY_MAGIC, HEADER_MAGIC, Header, KIND_FRAME, KIND_SKIP, RawEntry,
    SEGMENT_BYTES, VERSION, crc_of, entry_bytes,
};
use super::{Outbox, OutboxWriter, Packed, PackedFrame};
use crate::limits::MAX_OUTBOX_BYTES;

/// What an outbox of before held.
#[derive(Debug)]
pub struct Adopted {
    /// The new outbox, with all frames of the old one.
    pub outbox: Arc<Outbox>,
    /// Its writing side.
    pub writer: OutboxWriter,
    /// How far records were packed, into frames here or in the spool.
    pub packed: Packed,
    /// The last LSN of all frames that were in the outbox; what is behind it and packed is in the spool.
    pub last: Lsn,
    /// The record and the piece of it that was being freed in the ring last.
    pub freed: (Lsn, u8),
}

/// Reads an outbox that was kept for the disk and epoch, and makes a new one of at least `bytes`. `spooled` says how
/// far frames of the epoch reach in the spool.
///
/// # Errors
/// What is wrong with it; `InvalidData` when it is no outbox of that epoch.
pub fn adopt(
    kept: &File,
    disk: DiskId,
    epoch: Epoch,
    bytes: u64,
    spooled: Option<Packed>,
) -> io::Result<Adopted> {
    let header = read_header(kept, disk, epoch)?;
    let word = Packed {
        lsn: Lsn(header.packed_lsn.get()),
        stamp: Stamp(header.packed_stamp.get()),
        disk_bytes: header.packed_disk_bytes.get(),
    };
    let gone = Lsn(header.last_lsn.get());
    let (outbox, mut writer) = Outbox::create(disk, epoch, bytes.max(header.area_bytes.get()), word, gone)?;
    let last = copy_frames(kept, &header, disk, epoch, &mut writer)?;
    // The words are written after the frame that they speak of, wherever that went.
    let packed = [last, spooled]
        .into_iter()
        .flatten()
        .fold(word, |most, other| if other.lsn >= most.lsn { other } else { most });
    writer.note(packed);
    let last = last.map_or(gone, |last| last.lsn);
    if last > packed.lsn {
        return Err(bad("its frames reach further than what was packed"));
    }
    // What is packed and was never here must still be in the spool, or the frames behind it would come after a hole.
    if last < packed.lsn && spooled.is_none_or(|spooled| spooled.lsn < packed.lsn) {
        return Err(bad("frames that were in the spool are gone"));
    }
    let word = header.freed.get();
    let [piece, ..] = word.to_le_bytes();
    let freed = (Lsn(word >> 8), piece);
    writer.freeing(freed.0, freed.1);
    Ok(Adopted { outbox, writer, packed, last, freed })
}

fn bad(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn read_header(kept: &File, disk: DiskId, epoch: Epoch) -> io::Result<Header> {
    // Only memory files have seals: what follows cannot block, and cannot become shorter.
    let seals = fcntl(kept.as_fd(), FcntlArg::F_GET_SEALS).map_err(|_| bad("it is no memory file"))?;
    if !SealFlag::from_bits_retain(seals).contains(SealFlag::F_SEAL_SHRINK) {
        return Err(bad("it can be shortened"));
    }
    let mut bytes = [0; size_of::<Header>()];
    kept.read_exact_at(&mut bytes, 0)?;
    let header = Header::read_from_bytes(&bytes).map_err(|_| bad("its header is cut"))?;
    if header.magic != HEADER_MAGIC || header.version.get() != VERSION {
        return Err(bad("it is no outbox, or one of another release"));
    }
    if header.crc.get() != header.computed_crc() || header.reserved.get() != 0 || header.reserved2 != [0; 12]
    {
        return Err(bad("its header is corrupt"));
    }
    if header.disk != disk.0 || header.epoch.get() != epoch.0 {
        return Err(bad("it is the outbox of another disk or epoch"));
    }
    let area = header.area_bytes.get();
    let size = (AREA_START as u64).checked_add(area);
    if area > MAX_OUTBOX_BYTES || !area.is_multiple_of(SEGMENT_BYTES) || Some(kept.metadata()?.len()) != size
    {
        return Err(bad("its size is impossible"));
    }
    // The word of what was freed has room for so many.
    if header.packed_lsn.get().max(header.last_lsn.get()) >= 1 << 56 {
        return Err(bad("its last LSN is impossible"));
    }
    Ok(header)
}

/// Copies every frame; returns how far they reach.
fn copy_frames(
    kept: &File,
    header: &Header,
    disk: DiskId,
    epoch: Epoch,
    writer: &mut OutboxWriter,
) -> io::Result<Option<Packed>> {
    let (mut at, tail, area) = (header.head.get(), header.tail.get(), header.area_bytes.get());
    if at >= tail {
        return Ok(None);
    }
    if area == 0 || tail.wrapping_sub(at) > area {
        return Err(bad("more bytes are in use than it has"));
    }
    let segments = read_segments(kept, area);
    let mut last: Option<Packed> = None;
    while at < tail {
        let (run, used) = (at / SEGMENT_BYTES, at % SEGMENT_BYTES);
        let segment = segments.get(&run).ok_or(bad("a segment is not there"))?;
        let (place, to_end) = (segment.saturating_add(used), SEGMENT_BYTES.saturating_sub(used));
        let entry = read_entry(kept, at, (AREA_START as u64, place))?;
        if entry.kind.get() == KIND_SKIP {
            at = at.saturating_add(to_end);
            continue;
        }
        let need = entry_bytes(entry.message_bytes());
        if entry.kind.get() != KIND_FRAME || need > to_end || need > tail.wrapping_sub(at) {
            return Err(bad("an entry is of no known kind, or longer than its place"));
        }
        let message = read_message(kept, &entry, (AREA_START as u64, place))?;
        let frame = packed_frame(message, disk, epoch)?;
        if last.is_some_and(|last| last.lsn.next() != frame.first_lsn) {
            return Err(bad("its frames do not follow each other"));
        }
        last = Some(frame.packed());
        writer.refill(&frame).map_err(|_| bad("its frames do not fit"))?;
        at = at.saturating_add(need);
    }
    Ok(last)
}

/// Where in the area each run of positions lies. The first entry of a segment says it, also when it is not in use any more; of what
/// is no such entry nothing is known.
fn read_segments(kept: &File, area: u64) -> HashMap<u64, u64> {
    let mut segments = HashMap::new();
    for number in 0..area / SEGMENT_BYTES {
        let place = number.saturating_mul(SEGMENT_BYTES);
        let mut bytes = [0; ENTRY_HEADER_BYTES];
        let read = kept.read_exact_at(&mut bytes, (AREA_START as u64).saturating_add(place));
        if let (Ok(()), Ok(entry)) = (read, RawEntry::read_from_bytes(&bytes))
            && entry.position.get().is_multiple_of(SEGMENT_BYTES)
            && entry.crc.get() == crc_of(&bytes)
        {
            segments.insert(entry.position.get() / SEGMENT_BYTES, place);
        }
    }
    segments
}

/// Reads the entry at a position: where its area begins in the file, and where in the area it lies.
///
/// # Errors
/// `InvalidData` when there is none.
pub fn read_entry(file: &File, position: u64, (area, place): (u64, u64)) -> io::Result<RawEntry> {
    let mut bytes = [0; ENTRY_HEADER_BYTES];
    file.read_exact_at(&mut bytes, area.saturating_add(place))?;
    let entry = RawEntry::read_from_bytes(&bytes).map_err(|_| bad("an entry is cut"))?;
    let good = entry.magic == ENTRY_MAGIC
        && entry.position.get() == position
        && entry.reserved == [0; 20]
        && entry.crc.get() == crc_of(&bytes);
    if good { Ok(entry) } else { Err(bad("an entry is corrupt")) }
}

/// Reads the encoded frame of an entry.
///
/// # Errors
/// `InvalidData` when it holds none.
pub fn read_message(file: &File, entry: &RawEntry, (area, place): (u64, u64)) -> io::Result<Vec<u8>> {
    let start = area.saturating_add(place).saturating_add(ENTRY_HEADER_BYTES as u64);
    let mut header = [0; MESSAGE_HEADER_BYTES];
    file.read_exact_at(&mut header, start)?;
    let (kind, len) = MessageHeader::parse(&header).map_err(|_| bad("a message's header is corrupt"))?;
    let message_bytes = entry.message_bytes();
    if kind != MessageType::Frame || len.checked_add(MESSAGE_HEADER_BYTES) != Some(message_bytes) {
        return Err(bad("an entry holds no frame"));
    }
    let mut message = vec![0; len];
    file.read_exact_at(&mut message, start.saturating_add(MESSAGE_HEADER_BYTES as u64))?;
    Ok(message)
}

/// Checks an encoded frame that came from outside.
///
/// # Errors
/// `InvalidData` when it is no whole frame of that disk and epoch.
pub fn packed_frame(encoded: Vec<u8>, disk: DiskId, epoch: Epoch) -> io::Result<PackedFrame> {
    let frame = Frame::parse(&encoded).map_err(|_| bad("a frame is corrupt"))?;
    let header = frame.header();
    if header.disk() != disk || header.epoch() != epoch {
        return Err(bad("a frame is of another disk or epoch"));
    }
    Ok(PackedFrame {
        first_lsn: header.first_lsn(),
        last_lsn: header.last_lsn(),
        last_stamp: header.last_stamp(),
        disk_bytes: header.disk_bytes(),
        raw_bytes: header.raw_bytes(),
        data: Vec::new(),
        head: encoded,
    })
}
