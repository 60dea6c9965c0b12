//! What the engine's tests share: a disk in memory, a reader of the ring, parking places, random numbers.

use std::os::fd::AsFd as _;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use capture_ring::{Bell, Consumer, HostClock, Next, Ring, RingConfig};
use journal_format::{ByteRange, DiskId, Epoch, Lsn, Op, Record};

use super::{Answer, Begin, Capture, InFlight, Outcome, Request, Resync, Runtime, Step, WaitToken};
use crate::ffi::testing::{bytes_of, fill};

pub(super) const SECTOR: usize = 512;

/// xorshift64*: the same numbers for the same seed.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(super) fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 16) % bound
    }

    pub(super) fn one_in(&mut self, chance: u64) -> bool {
        self.below(chance) == 0
    }
}

/// One parking place per token: a count of wake-ups not consumed yet.
struct Park {
    wakes: Mutex<u32>,
    changed: Condvar,
}

/// Tests run beside each other: each takes its tokens from `first_token`.
const TOKENS: usize = 1024;
static PARKS: [Park; TOKENS] = [const { Park { wakes: Mutex::new(0), changed: Condvar::new() } }; TOKENS];
static NEXT_TOKEN: Mutex<usize> = Mutex::new(0);

/// Tokens for `count` threads of a test.
pub(super) fn tokens(count: usize) -> impl Iterator<Item = WaitToken> {
    let mut next = NEXT_TOKEN.lock().expect("unpoisoned");
    let first = *next;
    *next += count;
    assert!(*next <= TOKENS, "more tokens than parking places");
    (first..first + count).map(WaitToken)
}

pub(super) fn wake(token: WaitToken) {
    let park = &PARKS[token.0];
    *park.wakes.lock().expect("unpoisoned") += 1;
    park.changed.notify_one();
}

pub(super) fn wait(token: WaitToken) {
    let park = &PARKS[token.0];
    let mut wakes = park.wakes.lock().expect("unpoisoned");
    while *wakes == 0 {
        let (next, timeout) = park.changed.wait_timeout(wakes, Duration::from_secs(60)).expect("unpoisoned");
        assert!(!timeout.timed_out(), "a parked request was forgotten");
        wakes = next;
    }
    *wakes -= 1;
}

/// A disk in memory. Requests in flight together mix sector by sector.
pub(super) struct Disk(Mutex<Vec<u8>>);

impl Disk {
    pub(super) fn new(bytes: usize) -> Self {
        Self(Mutex::new(vec![0; bytes]))
    }

    /// Writes at most `sectors` sectors of the data; an error beyond the end.
    pub(super) fn write(&self, offset: u64, data: &[u8], sectors: usize) -> Result<(), ()> {
        for (index, sector) in data.chunks(SECTOR).take(sectors).enumerate() {
            let at = offset as usize + index * SECTOR;
            let mut bytes = self.0.lock().expect("unpoisoned");
            bytes.get_mut(at..at + sector.len()).ok_or(())?.copy_from_slice(sector);
            drop(bytes);
            std::thread::yield_now();
        }
        Ok(())
    }

    pub(super) fn read(&self, offset: u64, length: u64) -> Result<Vec<u8>, ()> {
        let mut data = Vec::new();
        while (data.len() as u64) < length {
            let at = offset as usize + data.len();
            let sector = SECTOR.min((length as usize) - data.len());
            data.extend_from_slice(self.0.lock().expect("unpoisoned").get(at..at + sector).ok_or(())?);
            if at.is_multiple_of(8 * SECTOR) {
                std::thread::yield_now();
            }
        }
        Ok(data)
    }

    pub(super) fn resize(&self, bytes: u64) {
        self.0.lock().expect("unpoisoned").resize(bytes as usize, 0);
    }

    pub(super) fn contents(&self) -> Vec<u8> {
        self.0.lock().expect("unpoisoned").clone()
    }

    /// How many bytes from `offset` on are all zero, or all in sectors that are not.
    fn status(&self, offset: u64, length: u64) -> Answer {
        let bytes = self.0.lock().expect("unpoisoned");
        let Some(range) = bytes.get(offset as usize..(offset + length) as usize) else {
            return Answer::Failed;
        };
        let is_zero = |sector: &[u8]| sector.iter().all(|byte| *byte == 0);
        let mut sectors = range.chunks(SECTOR);
        let zero = sectors.next().is_some_and(is_zero);
        let more = sectors.take_while(|sector| is_zero(sector) == zero).count();
        Answer::Status { length: (((1 + more) * SECTOR) as u64).min(length), zero }
    }

    /// Does one step of a resync: the answer, or `None` when it has stopped.
    pub(super) fn answer(&self, step: Step<'_>) -> Option<Answer> {
        Some(match step {
            Step::Status { offset, length } => self.status(offset, length),
            Step::Read { offset, length, pieces } => match self.read(offset, length) {
                Ok(data) => {
                    fill(pieces, &data);
                    Answer::Read { zero: data.iter().all(|byte| *byte == 0) }
                }
                Err(()) => Answer::Failed,
            },
            Step::Pause(pause) => {
                std::thread::sleep(pause.min(Duration::from_millis(2)));
                Answer::None
            }
            Step::Stop => return None,
        })
    }
}

/// Runs the resync of a capture until it stops.
pub(super) fn run_resync(capture: Arc<Capture>, disk: &Disk) {
    let mut resync = Resync::new(capture);
    let began = Instant::now();
    let mut answer = Answer::None;
    loop {
        match disk.answer(resync.step(answer, began.elapsed())) {
            Some(next) => answer = next,
            None => return,
        }
    }
}

/// Begins a request and waits for its turn.
pub(super) fn begin(capture: &Capture, request: &Request, token: WaitToken) -> InFlight {
    let mut in_flight = InFlight::default();
    while capture.begin(request, token, &mut in_flight) == Begin::Wait {
        wait(token);
    }
    in_flight
}

/// A guest's write, as the glue does it: copied, issued from the copy while the guest scribbles over its buffer.
pub(super) fn write(capture: &Capture, disk: &Disk, token: WaitToken, offset: u64, data: &[u8]) {
    let mut in_flight = begin(capture, &Request::write(offset, data.len() as u64, false), token);
    let copy = if in_flight.pieces().is_empty() {
        data.to_vec()
    } else {
        fill(in_flight.pieces(), data);
        bytes_of(in_flight.pieces())
    };
    disk.write(offset, &copy, usize::MAX).expect("inside the disk");
    capture.finish(&mut in_flight, Outcome::Succeeded);
}

/// What a reader of the records knows: the disk's contents and the gap.
pub(super) struct Replica {
    pub(super) bytes: Vec<u8>,
    /// Generation of the open gap.
    pub(super) gap: Option<u64>,
    pub(super) records: Vec<Op>,
    consumer: Consumer,
    data: Vec<u8>,
    last: Lsn,
}

impl Replica {
    /// Takes one record out and applies it.
    pub(super) fn step(&mut self) -> Option<Record> {
        self.data.clear();
        let next = self.consumer.next(&mut self.data, u32::MAX).expect("a sound ring");
        let Next::Record(record) = next else { return None };
        assert_eq!(record.lsn, self.last.next(), "LSNs have no holes");
        self.last = record.lsn;
        self.apply(&record);
        self.records.push(record.op);
        Some(record)
    }

    fn apply(&mut self, record: &Record) {
        match record.op {
            Op::Write { range, data, .. } => {
                let data = &self.data[data.pos as usize..data.end() as usize];
                let within = self.within(range);
                let length = within.len();
                self.bytes[within].copy_from_slice(&data[..length]);
            }
            Op::Zero { range, .. } | Op::Discard { range } => {
                let within = self.within(range);
                self.bytes[within].fill(0);
            }
            Op::Resize { disk_bytes } => self.bytes.resize(disk_bytes as usize, 0),
            Op::GapBegin { generation, .. } => self.gap = Some(self.gap.unwrap_or(0).max(generation)),
            Op::GapEnd { generation } => self.gap = self.gap.filter(|open| *open > generation),
            Op::Flush | Op::Bookmark { .. } | Op::Void | Op::Close { .. } => {}
        }
    }

    /// Where a change lies in the disk. In a gap it may end after the resize that cut it off.
    fn within(&self, range: ByteRange) -> std::ops::Range<usize> {
        let end = self.bytes.len() as u64;
        assert!(range.end() <= end || self.gap.is_some(), "a change beyond the disk's end");
        range.offset().min(end) as usize..range.end().min(end) as usize
    }

    pub(super) fn drain(&mut self) {
        while self.step().is_some() {}
    }

    pub(super) fn ring(&self) -> &Ring {
        self.consumer.ring()
    }
}

/// A capture over a new ring, and its reader.
pub(super) fn capture(disk_bytes: u64, arena_bytes: u64, slots: u32) -> (Arc<Capture>, Replica) {
    capture_that_wakes(wake, disk_bytes, arena_bytes, slots)
}

/// As [`capture`], with its own way to wake a request that waits.
pub(super) fn capture_that_wakes(
    wake: fn(WaitToken),
    disk_bytes: u64,
    arena_bytes: u64,
    slots: u32,
) -> (Arc<Capture>, Replica) {
    let mut config = RingConfig::new(DiskId([1; 16]), Epoch(1), Lsn::FIRST, disk_bytes);
    (config.arena_bytes, config.slots) = (arena_bytes, slots);
    let (ring, ring_fd) = Ring::create(&config).expect("a ring");
    let (clock, clock_fd) = HostClock::create().expect("a clock");
    let bell = Bell::create().expect("an eventfd");
    let bell_fd = bell.as_fd().try_clone_to_owned().expect("a descriptor");
    let capture =
        Capture::attach(ring_fd.as_fd(), clock_fd.as_fd(), bell_fd, Runtime::real(wake)).expect("a capture");
    let replica = Replica {
        bytes: vec![0xee; disk_bytes as usize],
        gap: None,
        records: Vec::new(),
        consumer: Consumer::new(ring, clock),
        data: Vec::new(),
        last: Lsn::ZERO,
    };
    (capture, replica)
}
