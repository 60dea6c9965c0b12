//! What guests write: the bytes of synthetic loads, packed into frames as the agent packs them.

use std::fs;
use std::path::{Path, PathBuf};

use cdp_tests::random::Random;
use journal_format::frame::{FrameMeta, encode_head};
use journal_format::limits::TARGET_FRAME_RAW_BYTES;
use journal_format::{ByteRange, Codec, DataSpan, DiskId, Epoch, GapReason, Lsn, Op, Record, Stamp, codec};

/// The level that the agent compresses with.
pub(crate) const ZSTD_LEVEL: i32 = 1;
/// Bytes of different data; longer loads repeat them.
const POOL_BYTES: usize = 64 << 20;
/// Enough of the nearly empty kind: a few frames.
const SPARSE_BYTES: usize = 8 << 20;
/// Bytes of the disks that synthetic loads write to.
pub(crate) const DISK_BYTES: u64 = 16 << 30;

/// Kinds of data.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Contents {
    /// Does not compress.
    Random,
    /// Programs, libraries and documents of this machine.
    Files,
    /// Pages of rows with numbers, words and random digits, three quarters full.
    Database,
    /// Blocks of 4 KiB that are nearly empty, so that a long history fits a small disk.
    Sparse,
}

impl Contents {
    /// Some bytes of that kind, the same ones on each call.
    pub(crate) fn bytes(self) -> Vec<u8> {
        match self {
            Self::Random => Random::of(1).bytes(POOL_BYTES),
            Self::Files => files(),
            Self::Database => pages(),
            Self::Sparse => {
                let (mut random, mut bytes) = (Random::of(3), vec![0; SPARSE_BYTES]);
                bytes
                    .chunks_exact_mut(4 << 10)
                    .for_each(|block| block[..48].copy_from_slice(&random.bytes(48)));
                bytes
            }
        }
    }
}

/// Files of this machine, one behind the other, as a copied tree lies on a disk.
fn files() -> Vec<u8> {
    let mut bytes = Vec::with_capacity(POOL_BYTES);
    let mut folders: Vec<PathBuf> = ["/usr/bin", "/usr/lib", "/usr/share"].map(PathBuf::from).to_vec();
    while bytes.len() < POOL_BYTES
        && let Some(folder) = folders.pop()
    {
        let mut entries: Vec<_> = fs::read_dir(&folder).into_iter().flatten().flatten().collect();
        entries.sort_by_key(fs::DirEntry::path);
        for entry in entries {
            let kind = entry.file_type().expect("a file's type");
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file() && bytes.len() < POOL_BYTES {
                append_file(&mut bytes, &entry.path());
            }
        }
    }
    bytes.truncate(POOL_BYTES / (1 << 20) * (1 << 20));
    bytes
}

/// Appends a file, up to the next 4 KiB with zeroes, as a file system does.
fn append_file(bytes: &mut Vec<u8>, path: &Path) {
    let contents = fs::read(path).unwrap_or_default();
    bytes.extend_from_slice(contents.get(..8 << 20).unwrap_or(&contents));
    bytes.resize(bytes.len().next_multiple_of(4 << 10), 0);
}

/// Database pages of 8 KiB: a header of zeroes and pointers, rows from the end.
fn pages() -> Vec<u8> {
    const PAGE: usize = 8 << 10;
    const WORDS: [&str; 8] =
        ["pending", "paid", "shipped", "Berlin", "Lagos", "Osaka", "standard", "returned"];
    let mut random = Random::of(2);
    let mut bytes = Vec::with_capacity(POOL_BYTES);
    while bytes.len() < POOL_BYTES {
        let mut rows = String::new();
        while rows.len() < PAGE * 3 / 4 {
            let word = WORDS[random.within(0..8) as usize];
            let (id, hex) = (random.within(0..1 << 22), random.next_u64());
            rows += &format!(
                "{id:08}|{word}|{hex:016x}|2026-11-{:02}|{:.2};",
                id % 28 + 1,
                (hex % 99_999) as f64 / 100.0
            );
        }
        let mut page = vec![0; PAGE.saturating_sub(rows.len())];
        page.extend_from_slice(rows.as_bytes());
        bytes.extend_from_slice(page.get(..PAGE).expect("a page"));
    }
    bytes
}

/// A frame's data, compressed, and what its records are.
#[derive(Debug)]
pub(crate) struct Batch {
    pub(crate) codec: Codec,
    pub(crate) data: Vec<u8>,
    pub(crate) raw: Vec<u8>,
    /// Bytes of each record.
    record_bytes: usize,
}

/// Cuts contents into batches of at most `batch_bytes`, records of `record_bytes`.
pub(crate) fn batches(contents: &[u8], record_bytes: usize, batch_bytes: usize) -> Vec<Batch> {
    let most = batch_bytes.clamp(record_bytes, TARGET_FRAME_RAW_BYTES as usize) / record_bytes * record_bytes;
    let mut packed = Vec::new();
    let whole = contents.chunks_exact(most);
    whole
        .map(|raw| {
            let codec = codec::compress(&mut raw.to_vec(), ZSTD_LEVEL, &mut packed);
            Batch { codec, data: packed.clone(), raw: raw.to_vec(), record_bytes }
        })
        .collect()
}

/// Makes the heads of one disk's frames, in LSN order.
#[derive(Debug)]
pub(crate) struct Journal {
    pub(crate) disk: DiskId,
    pub(crate) disk_bytes: u64,
    epoch: Epoch,
    next: Lsn,
    stamp: u64,
    random: Random,
}

impl Journal {
    /// A journal that has nothing yet.
    pub(crate) fn new(disk: DiskId, disk_bytes: u64, epoch: Epoch) -> Self {
        let stamp = 1_700_000_000_000_000_000;
        Self { disk, disk_bytes, epoch, next: Lsn::FIRST, stamp, random: Random::of(u64::from(disk.0[0])) }
    }

    /// The same journal, going on behind what somebody has of it.
    pub(crate) fn behind(self, lsn: Lsn, stamp: u64) -> Self {
        Self { next: lsn.next(), stamp: self.stamp.max(stamp), ..self }
    }

    /// The LSN of the newest record.
    pub(crate) fn last(&self) -> Lsn {
        self.next.prev()
    }

    /// The two frames that every epoch begins with: its gap, and the end of that.
    pub(crate) fn begin(&mut self) -> [Vec<u8>; 2] {
        let begin = Op::GapBegin { reason: GapReason::Attach, generation: 1 };
        [begin, Op::GapEnd { generation: 1 }].map(|op| self.head(&[op], Codec::Raw, 0, &[]))
    }

    /// The head of a frame with that batch; its records go to random places, or one behind the other from `begin` on.
    pub(crate) fn frame(&mut self, batch: &Batch, begin: Option<u64>) -> Vec<u8> {
        let (length, raw) = (batch.record_bytes as u64, batch.raw.len());
        let places = self.disk_bytes / length;
        let ops: Vec<Op> = (0..raw / batch.record_bytes)
            .map(|number| {
                let random = self.random.within(0..places) * length;
                let offset = begin.map_or(random, |begin| begin + number as u64 * length);
                let span = DataSpan { pos: (number * batch.record_bytes) as u32, len: length as u32 };
                let range = ByteRange::new(offset, length).expect("on the disk");
                Op::Write { range, data: span, fill: false, fua: false }
            })
            .collect();
        self.head(&ops, batch.codec, raw as u32, &batch.data)
    }

    fn head(&mut self, ops: &[Op], codec: Codec, raw_bytes: u32, data: &[u8]) -> Vec<u8> {
        let first_lsn = self.next;
        let records: Vec<Record> = ops
            .iter()
            .map(|&op| {
                self.stamp += 10_000;
                let record = Record { lsn: self.next, stamp: Stamp(self.stamp), op };
                self.next = self.next.next();
                record
            })
            .collect();
        let (disk, epoch, disk_bytes) = (self.disk, self.epoch, self.disk_bytes);
        let meta = FrameMeta { disk, epoch, first_lsn, disk_bytes, codec, raw_bytes };
        encode_head(&meta, &records, data).expect("a frame that parses")
    }
}
