//! Packs records and their data into frames: the part of the drain that only computes.

use std::time::Duration;

use journal_format::frame::{FrameMeta, encode_head};
use journal_format::limits::MAX_RECORD_DATA_BYTES;
use journal_format::{DiskId, Epoch, FormatError, Op, Record, codec};

use crate::limits::{
    FRAME_FEW_AGE, FRAME_FEW_BYTES, FRAME_FEW_RECORDS, FRAME_MAX_AGE, FRAME_MAX_RECORDS, FRAME_TARGET_BYTES,
    ZSTD_LEVEL,
};
use crate::outbox::PackedFrame;

/// A frame under construction.
///
/// The consumer appends at most [`Packer::room`] bytes of a record's data to [`Packer::data`]; then the record goes to
/// [`Packer::add`]. When there is not room enough, the frame is closed first.
#[derive(Debug)]
pub struct Packer {
    disk: DiskId,
    epoch: Epoch,
    disk_bytes: u64,
    records: Vec<Record>,
    data: Vec<u8>,
    /// Memory of an earlier frame, for what compression makes.
    spare: Vec<u8>,
    opened: Option<Duration>,
    /// It has the record that begins the epoch.
    begins_epoch: bool,
}

impl Packer {
    /// A packer for one epoch of a disk that has `disk_bytes` now.
    #[must_use]
    pub fn new(disk: DiskId, epoch: Epoch, disk_bytes: u64) -> Self {
        Self {
            disk,
            epoch,
            disk_bytes,
            records: Vec::with_capacity(FRAME_MAX_RECORDS),
            data: Vec::with_capacity(FRAME_TARGET_BYTES + MAX_RECORD_DATA_BYTES as usize),
            spare: Vec::new(),
            opened: None,
            begins_epoch: false,
        }
    }

    /// Takes back a frame that is in a safe place, for its memory. Fresh memory costs more than compressing into it: the
    /// kernel zeroes each page when it is first touched.
    pub fn recycle(&mut self, frame: PackedFrame) {
        self.spare = frame.data;
    }

    /// Where the next record's data is appended.
    pub fn data(&mut self) -> &mut Vec<u8> {
        &mut self.data
    }

    /// Appends data as the consumer does; returns where it begins.
    pub fn append(&mut self, data: &[u8]) -> u32 {
        let pos = u32::try_from(self.data.len()).unwrap_or(u32::MAX);
        self.data.extend_from_slice(data);
        pos
    }

    /// Whether no record waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Bytes of data that the next record may have: an empty frame takes any record.
    #[must_use]
    pub fn room(&self) -> u32 {
        if self.records.is_empty() {
            return MAX_RECORD_DATA_BYTES;
        }
        u32::try_from(FRAME_TARGET_BYTES.saturating_sub(self.data.len())).unwrap_or(0)
    }

    /// Takes a record whose data (if it has any) was just appended to [`Packer::data`], with its span.
    pub fn add(&mut self, now: Duration, record: Record) {
        if let Op::Resize { disk_bytes } = record.op {
            self.disk_bytes = disk_bytes;
        }
        self.begins_epoch |= matches!(record.op, Op::GapBegin { generation: 1, .. });
        self.opened.get_or_insert(now);
        self.records.push(record);
    }

    /// Whether the frame should be closed now. The record that begins an epoch goes alone: its frame says the disk's size
    /// at the beginning, which a resize behind it in the same frame would hide.
    #[must_use]
    pub fn is_due(&self, now: Duration) -> bool {
        let full = self.data.len() >= FRAME_TARGET_BYTES || self.records.len() >= FRAME_MAX_RECORDS;
        let few = self.records.len() < FRAME_FEW_RECORDS && self.data.len() < FRAME_FEW_BYTES;
        let age = if few { FRAME_FEW_AGE } else { FRAME_MAX_AGE };
        let old = self.opened.is_some_and(|opened| now.saturating_sub(opened) >= age);
        full || old || self.begins_epoch
    }

    /// Closes the frame: compresses and encodes it. `None` when no record waits.
    ///
    /// # Errors
    /// When it does not encode: the ring's consumer has let something through that it must not.
    pub fn close(&mut self) -> Result<Option<PackedFrame>, FormatError> {
        let (Some(first), Some(last)) = (self.records.first(), self.records.last()) else { return Ok(None) };
        let (first_lsn, last_lsn, last_stamp) = (first.lsn, last.lsn, last.stamp);
        let raw_bytes = u32::try_from(self.data.len()).unwrap_or(u32::MAX);
        let mut data = std::mem::take(&mut self.spare);
        let codec = codec::compress(&mut self.data, ZSTD_LEVEL, &mut data);
        let meta = FrameMeta {
            disk: self.disk,
            epoch: self.epoch,
            first_lsn,
            disk_bytes: self.disk_bytes,
            codec,
            raw_bytes,
        };
        let head = encode_head(&meta, &self.records, &data)?;
        self.records.clear();
        self.data.clear();
        self.opened = None;
        self.begins_epoch = false;
        let disk_bytes = self.disk_bytes;
        Ok(Some(PackedFrame { first_lsn, last_lsn, last_stamp, disk_bytes, raw_bytes, head, data }))
    }
}

#[cfg(test)]
mod tests {
    use journal_format::{ByteRange, DataSpan, Frame, GapReason, Lsn, Stamp};
    use proptest::prelude::*;

    use super::*;

    fn packer() -> Packer {
        Packer::new(DiskId([3; 16]), Epoch(2), 1 << 30)
    }

    /// Appends a write as the consumer does, closing the frame first when there is no room.
    fn put(packer: &mut Packer, now: Duration, lsn: u64, data: &[u8]) -> Option<PackedFrame> {
        let full = data.len() > packer.room() as usize;
        let ready = if full { packer.close().unwrap() } else { None };
        let pos = u32::try_from(packer.data().len()).unwrap();
        packer.data().extend_from_slice(data);
        packer.add(now, write(lsn, pos, data.len()));
        ready
    }

    fn write(lsn: u64, pos: u32, len: usize) -> Record {
        let len = u32::try_from(len).unwrap();
        let range = ByteRange::new(lsn * 4096, u64::from(len)).unwrap();
        let op = Op::Write { range, data: DataSpan { pos, len }, fill: false, fua: false };
        Record { lsn: Lsn(lsn), stamp: Stamp(lsn), op }
    }

    fn bytes(frame: &PackedFrame) -> Vec<u8> {
        [frame.head.as_slice(), frame.data.as_slice()].concat()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
        #[test]
        fn every_record_comes_out_once_with_its_own_bytes(
            sizes in prop::collection::vec(prop_oneof![1_usize..9000, 200_000_usize..700_000], 1..60)
        ) {
            let mut packer = packer();
            let mut frames = Vec::new();
            let now = Duration::ZERO;
            for (i, len) in sizes.iter().enumerate() {
                frames.extend(put(&mut packer, now, i as u64 + 1, &vec![u8::try_from(i).unwrap(); *len]));
                if packer.is_due(now) {
                    frames.extend(packer.close().unwrap());
                }
            }
            frames.extend(packer.close().unwrap());
            let mut next = 0_usize;
            for packed in &frames {
                let encoded = bytes(packed);
                let frame = Frame::parse(&encoded).unwrap();
                let header = frame.header();
                let raw = codec::decompress(header.codec(), frame.data(), header.raw_bytes()).unwrap();
                prop_assert!(raw.len() <= FRAME_TARGET_BYTES || header.record_count() == 1);
                for record in frame.records() {
                    prop_assert_eq!(record.lsn, Lsn(next as u64 + 1));
                    let Op::Write { data, .. } = record.op else { panic!("only writes went in") };
                    let span = &raw[data.pos as usize..data.end() as usize];
                    prop_assert_eq!(span.len(), sizes[next]);
                    prop_assert!(span.iter().all(|b| usize::from(*b) == next));
                    next += 1;
                }
            }
            prop_assert_eq!(next, sizes.len());
        }
    }

    #[test]
    fn a_frame_is_due_when_full_or_old() {
        let mut packer = packer();
        let now = Duration::ZERO;
        assert!(!packer.is_due(now + FRAME_FEW_AGE), "nothing waits");
        put(&mut packer, now, 1, &[1; 100]);
        assert!(!packer.is_due(now + FRAME_MAX_AGE), "few records wait for more");
        assert!(packer.is_due(now + FRAME_FEW_AGE), "but not for ever");
        for lsn in 2..=FRAME_FEW_RECORDS as u64 {
            put(&mut packer, now, lsn, &[1; 100]);
        }
        assert!(!packer.is_due(now));
        assert!(packer.is_due(now + FRAME_MAX_AGE));
        let rest = FRAME_TARGET_BYTES - 100 * FRAME_FEW_RECORDS;
        assert!(put(&mut packer, now, FRAME_FEW_RECORDS as u64 + 1, &vec![1; rest]).is_none());
        assert!(packer.is_due(now));
    }

    #[test]
    fn few_large_records_wait_no_longer_than_many_small_ones() {
        let mut packer = packer();
        let now = Duration::ZERO;
        put(&mut packer, now, 1, &vec![1; FRAME_FEW_BYTES - 1]);
        assert!(!packer.is_due(now + FRAME_MAX_AGE), "a byte less than what is worth a frame");
        put(&mut packer, now, 2, &[1]);
        assert!(!packer.is_due(now) && packer.is_due(now + FRAME_MAX_AGE));
    }

    #[test]
    fn frames_carry_the_size_after_a_resize() {
        let mut packer = packer();
        let op = Op::Resize { disk_bytes: 2 << 30 };
        packer.add(Duration::ZERO, Record { lsn: Lsn(1), stamp: Stamp(1), op });
        let frame = packer.close().unwrap().unwrap();
        let encoded = bytes(&frame);
        assert_eq!(Frame::parse(&encoded).unwrap().header().disk_bytes(), 2 << 30);
    }

    #[test]
    fn the_frame_that_begins_an_epoch_says_the_size_at_its_beginning() {
        let mut packer = packer();
        let op = Op::GapBegin { reason: GapReason::Attach, generation: 1 };
        packer.add(Duration::ZERO, Record { lsn: Lsn(1), stamp: Stamp(1), op });
        assert!(packer.is_due(Duration::ZERO), "nothing goes behind it");
        let frame = packer.close().unwrap().unwrap();
        assert_eq!(Frame::parse(&bytes(&frame)).unwrap().header().disk_bytes(), 1 << 30);
        packer.add(Duration::ZERO, Record { lsn: Lsn(2), stamp: Stamp(2), op: Op::Flush });
        assert!(!packer.is_due(Duration::ZERO));
    }

    fn noise(bytes: usize, seed: u64) -> Vec<u8> {
        let mut x = seed;
        let next = || {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (x >> 56) as u8
        };
        std::iter::repeat_with(next).take(bytes).collect()
    }

    #[test]
    fn data_that_does_not_shrink_is_kept_raw() {
        let mut packer = packer();
        put(&mut packer, Duration::ZERO, 1, &noise(4096, 1));
        let frame = packer.close().unwrap().unwrap();
        assert_eq!(frame.data, noise(4096, 1));
    }

    #[test]
    fn memory_that_is_used_again_brings_nothing_along() {
        let mut packer = packer();
        let contents = |number: u64| match number % 3 {
            0 => vec![u8::try_from(number).unwrap(); 300_000 - number as usize],
            _ => noise(100_000 + 10_000 * (number as usize % 7), number),
        };
        for number in 1..20 {
            put(&mut packer, Duration::ZERO, number, &contents(number));
            let frame = packer.close().unwrap().unwrap();
            let encoded = bytes(&frame);
            let parsed = Frame::parse(&encoded).unwrap();
            let header = parsed.header();
            let raw = codec::decompress(header.codec(), parsed.data(), header.raw_bytes()).unwrap();
            assert_eq!(raw, contents(number), "frame {number}");
            packer.recycle(frame);
        }
    }
}
