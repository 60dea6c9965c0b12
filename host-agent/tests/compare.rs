//! Comparing instead of copying changes no image: two journals, one with every fill as it was read back, one with what
//! the comparer left of it, are the same at every LSN, whatever the records and whatever the server answers.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use host_agent::compare::{Answer, Comparer, HashBox, SyncBytes, Wanted};
use journal_format::chunk_hash::CHUNK_BYTES;
use journal_format::{
    ByteRange, ChunkHash, Codec, DataSpan, DiskId, Epoch, Frame, FrameMeta, GapReason, Lsn, Op, Record,
    Stamp, frame,
};
use journal_store::io::MemStorage;
use journal_store::{Store, StoreConfig};
use proptest::prelude::*;

const DISK: DiskId = DiskId([5; 16]);
const CHUNK: u64 = CHUNK_BYTES as u64;
/// The last chunk is cut.
const DISK_BYTES: u64 = 6 * CHUNK + 5120;

/// Where the bytes of a chunk that a fill reads come from.
#[derive(Clone, Copy, Debug)]
enum From {
    /// What the journal shows now: nothing has changed.
    Now,
    /// What it showed at the epoch's begin: a stale read, or a write that was undone.
    Begin,
    /// Something new: changed while nobody looked, or by a write that gets a later LSN.
    New(u8),
}

#[derive(Clone, Debug)]
enum Do {
    Write(u64, u64, u8),
    Zero(u64, u64, bool),
    Discard(u64, u64),
    /// First chunk, and where each chunk of it comes from; shifted by some bytes at both ends.
    Fill(u64, Vec<From>, u64, u64),
    Resize(u64),
    GapBegin(GapReason),
    GapEnd,
    Flush,
    NewEpoch(u64),
}

/// What the server does with a question.
#[derive(Clone, Copy, Debug)]
enum Server {
    Answers,
    AnswersLate,
    CannotSay,
    HasDamage(u64),
    IsGone,
}

fn doings() -> impl Strategy<Value = Do> {
    let place = || (0..DISK_BYTES, 1..3 * CHUNK);
    let from =
        prop_oneof![4 => Just(From::Now), 2 => Just(From::Begin), 1 => any::<u8>().prop_map(From::New)];
    let shift = || prop_oneof![5 => Just(0_u64), 1 => 0..9000_u64];
    prop_oneof![
        4 => (place(), any::<u8>()).prop_map(|((at, len), byte)| Do::Write(at, len, byte)),
        1 => (place(), any::<bool>()).prop_map(|((at, len), fill)| Do::Zero(at, len, fill)),
        1 => place().prop_map(|(at, len)| Do::Discard(at, len)),
        12 => (0..7_u64, prop::collection::vec(from, 1..5), shift(), shift())
            .prop_map(|(chunk, from, head, tail)| Do::Fill(chunk, from, head, tail)),
        1 => (1..9 * CHUNK).prop_map(Do::Resize),
        2 => prop::sample::select(vec![GapReason::Overflow, GapReason::AgentLost, GapReason::ContentsChanged])
            .prop_map(Do::GapBegin),
        2 => Just(Do::GapEnd),
        1 => Just(Do::Flush),
        1 => prop_oneof![3 => Just(0), 1 => 1..9 * CHUNK].prop_map(Do::NewEpoch),
    ]
}

fn servers() -> impl Strategy<Value = Server> {
    prop_oneof![
        8 => Just(Server::Answers),
        2 => Just(Server::AnswersLate),
        1 => Just(Server::CannotSay),
        1 => (0..8_u64).prop_map(Server::HasDamage),
        1 => Just(Server::IsGone),
    ]
}

fn store() -> Store {
    Store::open_with("/store", Arc::new(MemStorage::new()), StoreConfig::default()).unwrap()
}

/// What the journal shows at that LSN, also inside a gap.
fn image(store: &Store, lsn: Lsn) -> Vec<u8> {
    if lsn == Lsn::ZERO {
        return Vec::new();
    }
    let view = store.disk(DISK).unwrap().view_in_gap(lsn).unwrap();
    let mut image = vec![0; usize::try_from(view.disk_bytes()).unwrap()];
    view.read(0, &mut image).unwrap();
    image
}

struct World {
    /// Gets every record as it is.
    plain: Store,
    /// Gets what the comparer makes of it; its hashes are what the comparer is told.
    compared: Store,
    comparer: Comparer,
    answers: HashBox,
    bytes: Arc<SyncBytes>,
    epoch: Epoch,
    disk_bytes: u64,
    generation: u64,
    lsn: Lsn,
    begin: Vec<u8>,
    now: Duration,
    server: Vec<Server>,
    questions: usize,
    late: Vec<Wanted>,
}

impl World {
    fn new(server: Vec<Server>) -> Self {
        Self {
            plain: store(),
            compared: store(),
            comparer: Comparer::new(Lsn::ZERO, DISK_BYTES),
            answers: HashBox::default(),
            bytes: Arc::default(),
            epoch: Epoch(0),
            disk_bytes: DISK_BYTES,
            generation: 0,
            lsn: Lsn::ZERO,
            begin: Vec::new(),
            now: Duration::ZERO,
            server,
            questions: 0,
            late: Vec::new(),
        }
    }

    fn new_epoch(&mut self, disk_bytes: u64) {
        self.epoch.0 += 1;
        self.disk_bytes = disk_bytes;
        self.generation = 1;
        self.begin = image(&self.plain, self.lsn);
        self.comparer = Comparer::new(self.lsn, disk_bytes);
        self.bytes = self.comparer.bytes();
        self.late.clear();
        for store in [&self.plain, &self.compared] {
            store.open_or_create(DISK, disk_bytes).unwrap();
        }
        self.record(Op::GapBegin { reason: GapReason::Attach, generation: 1 }, Vec::new());
    }

    /// The next record goes to both journals.
    fn record(&mut self, op: Op, data: Vec<u8>) {
        self.lsn = self.lsn.next();
        let record = Record { lsn: self.lsn, stamp: Stamp(self.lsn.0), op };
        let (epoch, disk_bytes) = (self.epoch, self.disk_bytes);
        let meta = |record: &Record, data: &[u8]| FrameMeta {
            disk: DISK,
            epoch,
            first_lsn: record.lsn,
            disk_bytes,
            codec: Codec::Raw,
            raw_bytes: u32::try_from(data.len()).unwrap(),
        };
        let bytes = frame::encode(&meta(&record, &data), &[record], &data).unwrap();
        append(&self.plain, &bytes);
        self.questions();
        while self.comparer.holds(self.now, &record, true) {
            self.now += Duration::from_millis(50);
            for wanted in core::mem::take(&mut self.late) {
                self.answer(wanted, None);
            }
            self.questions();
        }
        // In front of it stands what was packed before.
        let mut packed = vec![0xee; 100];
        packed.extend(&data);
        let mut moved = record;
        if let Op::Write { data, .. } = &mut moved.op {
            data.pos += 100;
        }
        let mut shipped = self.comparer.admit(moved, &mut packed);
        assert_eq!(packed[..100], [0xee; 100], "what was packed before stays as it was");
        let data = packed.split_off(100);
        if let Op::Write { data, .. } = &mut shipped.op {
            data.pos -= 100;
        }
        assert_eq!((shipped.lsn, shipped.stamp), (record.lsn, record.stamp));
        append(&self.compared, &frame::encode(&meta(&record, &data), &[shipped], &data).unwrap());
        self.questions();
    }

    /// Takes the comparer's questions to the server.
    fn questions(&mut self) {
        while let Some(wanted) = self.comparer.ask(self.now) {
            let server = self.server[self.questions % self.server.len()];
            self.questions += 1;
            match server {
                Server::Answers => self.answer(wanted, None),
                Server::AnswersLate => self.late.push(wanted),
                Server::CannotSay => self.answers.put(Answer { wanted, hashes: None }),
                Server::HasDamage(chunk) => self.answer(wanted, Some(chunk)),
                Server::IsGone => {}
            }
        }
        self.comparer.take_answers(self.now, &self.answers);
    }

    fn answer(&mut self, wanted: Wanted, damaged: Option<u64>) {
        let durable = self.compared.disk(DISK).map_or(Lsn::ZERO, |disk| disk.durable_lsn());
        if wanted.lsn > durable {
            return self.answers.put(Answer { wanted, hashes: None });
        }
        let image = image(&self.compared, wanted.lsn);
        let hash = |chunk: u64| {
            let start = usize::try_from(chunk * CHUNK).unwrap().min(image.len());
            let end = (start + CHUNK_BYTES).min(image.len());
            if damaged == Some(chunk) { ChunkHash::UNKNOWN } else { ChunkHash::of(&image[start..end]) }
        };
        let chunks = wanted.first_chunk..wanted.first_chunk + u64::from(wanted.chunks);
        self.answers.put(Answer { wanted, hashes: Some(chunks.map(hash).collect()) });
    }

    /// The part of a range that is on the disk.
    fn on_disk(&self, offset: u64, length: u64) -> Option<ByteRange> {
        let end = (offset + length).min(self.disk_bytes);
        ByteRange::new(offset, end.checked_sub(offset)?).filter(|range| !range.is_empty())
    }

    fn write(&mut self, range: ByteRange, data: Vec<u8>, fill: bool) {
        let span = DataSpan { pos: 0, len: u32::try_from(data.len()).unwrap() };
        self.record(Op::Write { range, data: span, fill, fua: false }, data);
    }

    fn fill(&mut self, first: u64, from: &[From], head: u64, tail: u64) {
        let length = (from.len() as u64 * CHUNK).saturating_sub(head + tail);
        let Some(range) = self.on_disk(first * CHUNK + head, length) else { return };
        let now = image(&self.plain, self.lsn);
        let byte = |at: u64| {
            let index = usize::try_from(at).unwrap();
            match from[usize::try_from(at / CHUNK - first).unwrap()] {
                From::Now => now.get(index).copied().unwrap_or(0),
                From::Begin => self.begin.get(index).copied().unwrap_or(0),
                From::New(byte) => byte,
            }
        };
        let data = (range.offset()..range.end()).map(byte).collect();
        self.write(range, data, true);
    }

    fn perform(&mut self, doing: &Do) {
        match *doing {
            Do::Write(at, length, byte) => {
                let Some(range) = self.on_disk(at, length) else { return };
                self.write(range, vec![byte; usize::try_from(range.length()).unwrap()], false);
            }
            Do::Zero(at, length, fill) => {
                let Some(range) = self.on_disk(at, length) else { return };
                self.record(Op::Zero { range, fill, fua: false, may_unmap: false }, Vec::new());
            }
            Do::Discard(at, length) => {
                let Some(range) = self.on_disk(at, length) else { return };
                self.record(Op::Discard { range }, Vec::new());
            }
            Do::Fill(first, ref from, head, tail) => self.fill(first, from, head, tail),
            Do::Resize(disk_bytes) => {
                self.disk_bytes = disk_bytes;
                self.record(Op::Resize { disk_bytes }, Vec::new());
            }
            Do::GapBegin(reason) => {
                self.generation += 1;
                self.record(Op::GapBegin { reason, generation: self.generation }, Vec::new());
            }
            Do::GapEnd => self.record(Op::GapEnd { generation: self.generation }, Vec::new()),
            Do::Flush => self.record(Op::Flush, Vec::new()),
            Do::NewEpoch(0) => self.new_epoch(self.disk_bytes),
            Do::NewEpoch(disk_bytes) => self.new_epoch(disk_bytes),
        }
    }
}

fn append(store: &Store, bytes: &[u8]) {
    store.append(&Frame::parse(bytes).unwrap()).unwrap();
    assert!(store.commit().is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]
    #[test]
    fn leaving_out_what_is_equal_changes_no_image(
        doings in prop::collection::vec(doings(), 1..60),
        servers in prop::collection::vec(servers(), 1..12),
    ) {
        let mut world = World::new(servers);
        world.new_epoch(DISK_BYTES);
        for doing in &doings {
            world.perform(doing);
        }
        for lsn in 1..=world.lsn.0 {
            prop_assert!(image(&world.plain, Lsn(lsn)) == image(&world.compared, Lsn(lsn)), "LSN {} differs", lsn);
        }
    }
}

/// A disk of distinct chunks, synced, and a new epoch of it.
fn second_epoch() -> World {
    let mut world = World::new(vec![Server::Answers]);
    world.new_epoch(DISK_BYTES);
    for chunk in 0..7_u8 {
        world.fill(u64::from(chunk), &[From::New(chunk + 1)], 0, 0);
    }
    world.perform(&Do::GapEnd);
    world.new_epoch(DISK_BYTES);
    world
}

fn shipped(world: &World) -> u64 {
    world.bytes.shipped.load(Ordering::Relaxed)
}

#[test]
fn of_an_unchanged_disk_nothing_is_shipped() {
    let mut world = second_epoch();
    world.fill(0, &[From::Now; 4], 0, 0);
    world.fill(4, &[From::Now; 3], 0, 0);
    assert_eq!(shipped(&world), 0);
    assert_eq!(world.bytes.equal.load(Ordering::Relaxed), DISK_BYTES);
}

#[test]
fn of_a_fill_only_the_part_that_differs_is_shipped() {
    let mut world = second_epoch();
    world.fill(0, &[From::Now, From::New(99), From::Now, From::Now], 0, 0);
    assert_eq!(shipped(&world), CHUNK);
}

#[test]
fn a_new_gap_is_compared_with_where_it_began() {
    let mut world = second_epoch();
    world.fill(0, &[From::New(99); 4], 0, 0);
    world.fill(4, &[From::Now; 3], 0, 0);
    world.perform(&Do::GapEnd);
    world.perform(&Do::Write(0, 100, 7));
    world.perform(&Do::GapBegin(GapReason::AgentLost));
    world.fill(0, &[From::Now, From::New(98), From::Now, From::Now], 0, 0);
    assert_eq!(shipped(&world), CHUNK, "only what was written without a record");
}

#[test]
fn what_was_written_while_the_ring_was_full_is_not_compared() {
    let begun = |reason| {
        let mut world = second_epoch();
        world.perform(&Do::GapEnd);
        world.perform(&Do::GapBegin(reason));
        world.fill(0, &[From::Now; 4], 0, 0);
        world
    };
    for reason in [GapReason::WriteFailed, GapReason::LargeRequest] {
        assert_eq!(shipped(&begun(reason)), 4 * CHUNK, "{reason:?}");
    }
    let mut world = begun(GapReason::Overflow);
    assert_eq!(shipped(&world), 4 * CHUNK);
    // Now all of the disk may be read back, and most of it is what the journal has.
    world.perform(&Do::GapBegin(GapReason::ContentsChanged));
    world.fill(4, &[From::Now; 3], 0, 0);
    assert_eq!(shipped(&world), 4 * CHUNK);
}

#[test]
fn a_server_that_is_gone_holds_nothing_up_for_long() {
    let mut world = World::new(vec![Server::IsGone]);
    world.new_epoch(DISK_BYTES);
    world.perform(&Do::Write(0, 512, 1));
    world.new_epoch(DISK_BYTES);
    let begun = world.now;
    for chunk in 0..7 {
        world.fill(chunk, &[From::New(9)], 0, 0);
    }
    assert!(world.now - begun <= host_agent::limits::COMPARE_WAIT, "one wait, not one for each fill");
    assert_eq!(shipped(&world), DISK_BYTES);
}
