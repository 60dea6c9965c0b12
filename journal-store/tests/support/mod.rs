//! What the store's tests share: seeded random numbers, a disk that makes frames, and a model of its history.
#![allow(dead_code, reason = "each test file uses a part of it")]
#![allow(missing_docs, unreachable_pub, reason = "test code")]

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};

use journal_format::{
    ByteRange, DataSpan, DiskId, Epoch, Frame, FrameMeta, GapReason, ImageTag, Lsn, Op, Record, Stamp, codec,
    frame,
};
use journal_store::io::{Answer, Call, CallKind, Hook, MemStorage, Storage};
use journal_store::{Damage, DiskStore, Store, StoreConfig, StoreError, View};

/// Chunks are 256 KiB and wide extents are over 1 MiB: the disk has room for both.
pub const DISK_BYTES: u64 = 3 << 20;
pub const DISK: DiskId = DiskId(*b"the-tested-disk!");
pub const ROOT: &str = "/store";

/// xorshift64*: small, seeded, the same everywhere.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn block(&mut self) -> [u8; 64] {
        let words = [0; 8].map(|_: u64| self.next().to_le_bytes());
        words.concat().try_into().expect("64 bytes")
    }

    /// Below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 8) % n.max(1)
    }

    pub fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }
}

/// What a record did, for the model.
#[derive(Clone, Debug)]
pub enum Change {
    Write(u64, Vec<u8>),
    Zero(u64, u64),
    Resize(u64),
    Other,
}

#[derive(Clone, Debug)]
pub struct ModelRecord {
    pub record: Record,
    pub change: Change,
    pub name: Option<String>,
}

/// A frame's bytes and the LSNs it holds.
#[derive(Clone, Debug)]
pub struct Made {
    pub bytes: Vec<u8>,
    pub last: Lsn,
}

/// Makes the frames of a disk and remembers what they say: the vector of versions that the store is compared with.
#[derive(Clone, Debug)]
pub struct Model {
    pub disk: DiskId,
    pub records: Vec<ModelRecord>,
    pub disk_bytes: u64,
    pub epoch: Epoch,
    pub stamp: u64,
    generation: u64,
    gap_open: bool,
    names: u64,
    first_bytes: u64,
    /// Lengths of writes, in bytes.
    longest: [u64; 4],
}

impl Model {
    pub fn new(disk: DiskId) -> Self {
        Self::sized(disk, DISK_BYTES, [600, 5000, 70_000, 400_000])
    }

    /// A disk of another size, with writes up to these lengths.
    pub fn sized(disk: DiskId, disk_bytes: u64, longest: [u64; 4]) -> Self {
        Self {
            disk,
            first_bytes: disk_bytes,
            longest,
            records: Vec::new(),
            disk_bytes,
            epoch: Epoch(0),
            stamp: 1000,
            generation: 0,
            gap_open: false,
            names: 0,
        }
    }

    pub fn last(&self) -> Lsn {
        Lsn(self.records.len() as u64)
    }

    /// What the last record says of the image, if it is a close.
    pub fn closed_image(&self) -> Option<ImageTag> {
        match self.records.last()?.record.op {
            Op::Close { image } => Some(image),
            _ => None,
        }
    }

    /// Forgets everything after `lsn`, as the store did.
    pub fn cut(&mut self, lsn: Lsn) {
        self.records.truncate(lsn.0 as usize);
        self.disk_bytes = self.size_at(lsn);
    }

    /// The frame that begins an epoch: its gap-begin, a write or two, and perhaps its gap-end.
    pub fn begin_epoch(&mut self, random: &mut Random) -> Made {
        self.epoch.0 += 1;
        (self.generation, self.gap_open) = (1, true);
        let begin = (Op::GapBegin { reason: GapReason::Attach, generation: 1 }, Change::Other, None);
        let mut parts = vec![begin];
        for _ in 0..random.below(3) {
            parts.push(self.random_write(random, true));
        }
        if random.chance(2) {
            parts.push(self.gap_end());
        }
        self.frame(parts, random)
    }

    /// A frame of random requests.
    pub fn random_frame(&mut self, random: &mut Random) -> Made {
        let count = 1 + random.below(12);
        let parts = (0..count).map(|_| self.random_op(random)).collect();
        self.frame(parts, random)
    }

    fn gap_end(&mut self) -> (Op, Change, Option<String>) {
        self.gap_open = false;
        (Op::GapEnd { generation: self.generation }, Change::Other, None)
    }

    fn random_op(&mut self, random: &mut Random) -> (Op, Change, Option<String>) {
        match random.below(40) {
            0 => (Op::Flush, Change::Other, None),
            1 if random.chance(2) => (Op::Void, Change::Other, None),
            1 => (Op::Close { image: ImageTag([self.stamp as u8; 16]) }, Change::Other, None),
            2..=5 => {
                let range = self.random_range(random, self.disk_bytes);
                (Op::Discard { range }, Change::Zero(range.offset(), range.length()), None)
            }
            6..=9 => {
                let longest = if random.chance(2) { self.disk_bytes } else { 100_000 };
                let range = self.random_range(random, longest);
                let op = Op::Zero { range, fill: false, fua: false, may_unmap: true };
                (op, Change::Zero(range.offset(), range.length()), None)
            }
            10 => {
                self.disk_bytes = 512 * (1 + random.below(2 * self.first_bytes / 512));
                (Op::Resize { disk_bytes: self.disk_bytes }, Change::Resize(self.disk_bytes), None)
            }
            11 => {
                self.names += 1;
                let name = format!("mark-{}-é", self.names);
                let name_of = Op::Bookmark { name: DataSpan { pos: 0, len: name.len() as u32 } };
                (name_of, Change::Other, Some(name))
            }
            12 if !self.gap_open => {
                self.generation += 1;
                self.gap_open = true;
                let op = Op::GapBegin { reason: GapReason::Overflow, generation: self.generation };
                (op, Change::Other, None)
            }
            13..=19 if self.gap_open => self.gap_end(),
            _ => self.random_write(random, false),
        }
    }

    fn random_range(&self, random: &mut Random, longest: u64) -> ByteRange {
        let offset = random.below(self.disk_bytes);
        let length = 1 + random.below(longest.min(self.disk_bytes - offset));
        ByteRange::new(offset, length).expect("inside the disk")
    }

    fn random_write(&self, random: &mut Random, fill: bool) -> (Op, Change, Option<String>) {
        let longest = self.longest[random.below(4) as usize];
        let range = self.random_range(random, longest);
        // Half of the writes compress. (Built from long copies: tests run unoptimised.)
        let kind = random.next();
        let mut bytes = vec![kind as u8; range.length() as usize];
        if kind & 1 == 1 {
            bytes.chunks_mut(64).for_each(|part| part.copy_from_slice(&random.block()[..part.len()]));
        }
        let data = DataSpan { pos: 0, len: bytes.len() as u32 };
        (Op::Write { range, data, fill, fua: false }, Change::Write(range.offset(), bytes), None)
    }

    /// Encodes a frame of these requests, with data laid out and LSNs and stamps given.
    pub fn frame(&mut self, parts: Vec<(Op, Change, Option<String>)>, random: &mut Random) -> Made {
        let (first_lsn, mut raw, mut records) = (self.last().next(), Vec::new(), Vec::new());
        for (mut op, change, name) in parts {
            let pos = raw.len() as u32;
            match (&mut op, &change, &name) {
                (Op::Write { data, .. }, Change::Write(_, bytes), _) => {
                    data.pos = pos;
                    raw.extend_from_slice(bytes);
                }
                (Op::Bookmark { name: span }, _, Some(name)) => {
                    span.pos = pos;
                    raw.extend_from_slice(name.as_bytes());
                }
                _ => {}
            }
            // Stamps may repeat: the consumer raises one to the record's before where threads raced.
            self.stamp += random.below(5);
            let record = Record { lsn: self.last().next(), stamp: Stamp(self.stamp), op };
            records.push(record);
            self.records.push(ModelRecord { record, change, name });
        }
        let mut packed = Vec::new();
        let raw_bytes = raw.len();
        let codec = codec::compress(&mut raw, 1, &mut packed);
        let meta = FrameMeta {
            disk: self.disk,
            epoch: self.epoch,
            first_lsn,
            disk_bytes: self.disk_bytes,
            codec,
            raw_bytes: raw_bytes as u32,
        };
        Made { bytes: frame::encode(&meta, &records, &packed).expect("frame"), last: self.last() }
    }

    pub fn size_at(&self, lsn: Lsn) -> u64 {
        let upto = &self.records[..lsn.0 as usize];
        let size =
            |record: &ModelRecord| if let Change::Resize(size) = record.change { Some(size) } else { None };
        upto.iter().rev().find_map(size).unwrap_or(self.first_bytes)
    }

    /// The disk after `lsn`, by replaying everything.
    pub fn image(&self, lsn: Lsn) -> Vec<u8> {
        let mut image = vec![0; self.first_bytes as usize];
        for record in &self.records[..lsn.0 as usize] {
            match &record.change {
                Change::Write(at, bytes) => image[*at as usize..][..bytes.len()].copy_from_slice(bytes),
                Change::Zero(at, length) => image[*at as usize..][..*length as usize].fill(0),
                Change::Resize(size) => image.resize(*size as usize, 0),
                Change::Other => {}
            }
        }
        image
    }

    /// Which LSNs are restorable, by walking the records: `good[lsn - 1]`.
    pub fn restorable(&self) -> Vec<bool> {
        let (mut good, mut open, mut epoch) = (Vec::new(), None::<(u64, u64)>, 0);
        for record in &self.records {
            match record.record.op {
                Op::GapBegin { reason, generation } => {
                    epoch += u64::from(reason == GapReason::Attach);
                    open = open.max(Some((epoch, generation)));
                }
                Op::GapEnd { generation } if open <= Some((epoch, generation)) => open = None,
                _ => {}
            }
            good.push(open.is_none());
        }
        good
    }

    /// Bookmarks that came as records.
    pub fn names(&self) -> BTreeMap<String, Lsn> {
        self.records.iter().filter_map(|r| Some((r.name.clone()?, r.record.lsn))).collect()
    }
}

/// Small segments, so that tests seal often; one thread, so that I/O has one order; some frames wait, some do not.
pub fn config() -> StoreConfig {
    StoreConfig {
        segment_data_bytes: 300_000,
        segment_meta_bytes: 1 << 20,
        segment_records: 60,
        cache_bytes: 1 << 20,
        sync_threads: 1,
        waiting_bytes: 4 << 10,
        piece_bytes: 8 << 10,
        whole_pieces: 1,
        pieces_under_way: 0,
    }
}

pub fn open(storage: &MemStorage) -> Store {
    try_open(Arc::new(storage.clone())).expect("open the store")
}

/// As [`try_open`], with so many pieces that a thread of the store may have before it.
pub fn try_open_behind(storage: Arc<dyn Storage>, pieces_under_way: usize) -> Result<Store, StoreError> {
    Store::open_with(ROOT, storage, StoreConfig { pieces_under_way, ..config() })
}

pub fn try_open(storage: Arc<dyn Storage>) -> Result<Store, StoreError> {
    Store::open_with(ROOT, storage, config())
}

pub fn append(store: &Store, made: &Made) -> Result<(), StoreError> {
    store.append(&Frame::parse(&made.bytes).expect("the model's frame"))
}

pub fn read_all(view: &View) -> Result<Vec<u8>, StoreError> {
    let mut bytes = vec![0xaa; view.disk_bytes() as usize];
    view.read(0, &mut bytes)?;
    Ok(bytes)
}

/// Checks everything and returns what is damaged.
pub fn verify(disk: &DiskStore) -> Vec<Damage> {
    let mut last = 0;
    let verified = disk.verify(Lsn::FIRST..=Lsn::MAX, &mut |progress| {
        assert!(last <= progress.done_bytes && progress.done_bytes <= progress.total_bytes);
        last = progress.done_bytes;
        ControlFlow::Continue(())
    });
    assert_eq!((verified.resume_at, verified.data_bytes), (None, last));
    verified.damage
}

/// Says where two images differ, instead of printing megabytes.
pub fn assert_same(got: &[u8], want: &[u8], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: size");
    if got == want {
        return; // a fast comparison; the one below is slow in unoptimised tests
    }
    if let Some(at) = got.iter().zip(want).position(|(got, want)| got != want) {
        panic!("{what}: byte {at} is {:#x}, should be {:#x}", got[at], want[at]);
    }
}

/// Compares the disk at `lsn` with the model: whole image, and what the extents say.
pub fn check_point(disk: &Arc<DiskStore>, model: &Model, lsn: Lsn, random: &mut Random) {
    let what = format!("LSN {lsn}");
    let view = disk.view_in_gap(lsn).expect("view");
    let want = model.image(lsn);
    assert_same(&read_all(&view).expect("read"), &want, &what);
    let range = ByteRange::new(0, view.disk_bytes()).expect("disk");
    let (mut end, mut last) = (0, None);
    for extent in view.extents(range).expect("extents") {
        let extent = extent.expect("extent");
        assert_eq!(extent.range.offset(), end, "{what}: extents leave a hole");
        assert_ne!(last.replace(extent.kind), Some(extent.kind), "{what}: extents are not merged");
        let bytes = &want[extent.range.offset() as usize..extent.range.end() as usize];
        let zero = extent.kind == journal_store::ExtentKind::Zero;
        assert!(!zero || bytes == vec![0; bytes.len()], "{what}: {:?} is not zero", extent.range);
        end = extent.range.end();
    }
    assert_eq!(end, view.disk_bytes(), "{what}: extents end early");
    if view.disk_bytes() > 0 {
        let offset = random.below(view.disk_bytes());
        let mut part = vec![0; (1 + random.below(view.disk_bytes() - offset)) as usize];
        view.read(offset, &mut part).expect("read a part");
        assert_same(&part, &want[offset as usize..][..part.len()], &format!("{what} from {offset}"));
    }
}

/// Which calls may fail.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Failing {
    /// One call; later ones work.
    Once,
    /// From one call on everything that would change something, as on a volume that is full or went read-only.
    FromThenOn,
}

/// Lets the N-th call fail, of those that change something or of all. A failed durability step loses what it should have made
/// durable, though it can still be read.
#[derive(Debug)]
pub struct FailAt {
    memory: MemStorage,
    reads_too: bool,
    state: Mutex<(u64, u64, Failing, ErrorKind)>,
}

impl FailAt {
    pub fn new(memory: &MemStorage, reads_too: bool) -> Arc<Self> {
        let state = Mutex::new((0, 0, Failing::Once, ErrorKind::Other));
        Arc::new(Self { memory: memory.clone(), reads_too, state })
    }

    /// The `n`-th call from now on fails, counted from 1; 0 switches failures off.
    pub fn fail_at(&self, n: u64, failing: Failing, kind: ErrorKind) {
        *self.state.lock().expect("lock") = (0, n, failing, kind);
    }

    /// Calls since the last [`FailAt::fail_at`].
    pub fn calls(&self) -> u64 {
        self.state.lock().expect("lock").0
    }
}

impl Hook for FailAt {
    fn before(&self, call: &Call<'_>) -> Answer {
        let mut state = self.state.lock().expect("lock");
        if !self.reads_too && !call.kind.changes() {
            return Answer::Go;
        }
        state.0 += 1;
        let (calls, at, failing, kind) = *state;
        let after = failing == Failing::FromThenOn && calls > at && call.kind.changes();
        if at == 0 || (calls != at && !after) {
            return Answer::Go;
        }
        if call.kind == CallKind::Sync {
            self.memory.forget(call.path);
        }
        Answer::Fail(kind.into())
    }
}
