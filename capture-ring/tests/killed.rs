//! Two processes: a producer with several threads is killed (SIGKILL) at a random moment under load; the survivor
//! reads every published record, byte for byte and without holes, closes the slots that nobody will publish as void,
//! and finds the range of every request that was begun and has no record.
//!
//! The program is its own producer: with `child` as its first argument it opens the parent's memfds through /proc and
//! writes until it is killed.

#[path = "support/random.rs"]
mod random;

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use capture_ring::{Bell, Consumer, Full, HostClock, Next, OpKind, Producer, Ring, RingConfig, Ticket};
use journal_format::{ByteRange, DiskId, Epoch, Lsn, Op, Record};
use random::Random;

const THREADS: u64 = 3;
const DEPTH: usize = 4;
const ROUNDS: u64 = 40;
/// Each request has its own place on the disk: `thread << 40 | number * SPACING`.
const SPACING: u64 = 1 << 20;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.get(1).map(String::as_str) {
        Some("child") => child(&arguments[2], &arguments[3], arguments[4].parse().expect("a seed")),
        Some("--list") => println!("killed: test"),
        _ => {
            let mut total = Totals::default();
            for seed in 0..ROUNDS {
                round(seed, &mut total);
            }
            println!("test killed ... ok: {ROUNDS} rounds, {total:?}");
            // The load is such that most rounds leave something behind; if none did, the test tests nothing.
            assert!(total.records > 1000 && total.issued > 20, "too little was under way");
        }
    }
}

#[derive(Default, Debug)]
struct Totals {
    records: u64,
    voids: u64,
    issued: usize,
}

/// Byte `index` of the request at `offset`.
fn pattern(offset: u64, index: usize) -> u8 {
    (offset / SPACING * 31 + (offset >> 40) * 7 + index as u64 / 13) as u8
}

// ---- the process that is killed

fn child(ring: &str, clock: &str, seed: u64) {
    // If the survivor fails, this process does not go on for ever.
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL).expect("a death signal");
    let open = |path: &str| File::options().read(true).write(true).open(path).expect("the parent's memfd");
    let ring = Ring::open(open(ring).as_fd()).expect("a ring");
    let clock = HostClock::open(open(clock).as_fd()).expect("a clock");
    let producer = &Producer::new(ring, clock, Bell::create().expect("a bell"));
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            scope.spawn(move || load(producer, thread, Random::new(seed * THREADS + thread + 1)));
        }
        scope.spawn(move || fill(producer));
    });
}

/// Begins requests and completes them in any order, for ever.
fn load(producer: &Producer, thread: u64, mut random: Random) {
    let mut open: Vec<Ticket> = Vec::new();
    for number in 1.. {
        let offset = thread << 40 | (number * SPACING);
        let ticket = begin(producer, offset, &mut open, &mut random);
        open.push(ticket);
        if open.len() >= DEPTH {
            let ticket = open.swap_remove(random.below(DEPTH as u64) as usize);
            producer.complete(ticket);
        }
        if random.below(50) == 0 {
            let _ = producer.flush_record();
        }
    }
}

/// Background reads, which hold their slot for a while: most rounds kill one there.
fn fill(producer: &Producer) {
    for number in 1.. {
        if let Ok(ticket) = producer.reserve_fill(4096) {
            std::thread::sleep(Duration::from_micros(200));
            let range = ByteRange::new(THREADS << 40 | (number * SPACING), 4096).expect("a valid range");
            assert!(producer.complete_fill_zero(ticket, range).is_ok());
        }
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// Begins one request; when the ring is full, completes one of its own first, or waits for the survivor.
fn begin(producer: &Producer, offset: u64, open: &mut Vec<Ticket>, random: &mut Random) -> Ticket {
    let length = match random.below(20) {
        0 => 1 + random.below(300_000),
        1..10 => 1 + random.below(9000),
        _ => 4096,
    };
    let range = ByteRange::new(offset, length).expect("a valid range");
    let op = OpKind::Zero { fua: false, may_unmap: true };
    let begin =
        |zero: bool| if zero { producer.begin_op(op, range) } else { producer.begin_write(range, false) };
    let zero = random.below(8) == 0;
    loop {
        match begin(zero) {
            Ok(ticket) => {
                if !zero {
                    let bytes: Vec<u8> = (0..length as usize).map(|index| pattern(offset, index)).collect();
                    assert!(producer.copy_in(&ticket, &bytes));
                }
                return ticket;
            }
            Err(Full::Length) => panic!("every length is a valid one"),
            Err(_) => match open.pop() {
                Some(ticket) => {
                    producer.complete(ticket);
                }
                None => std::thread::sleep(Duration::from_micros(20)),
            },
        }
    }
}

// ---- the survivor

fn spawn(ring: &OwnedFd, clock: &OwnedFd, seed: u64) -> Child {
    let path = |fd: &OwnedFd| format!("/proc/{}/fd/{}", std::process::id(), fd.as_raw_fd());
    let program = std::env::current_exe().expect("this program");
    Command::new(program)
        .args(["child", &path(ring), &path(clock), &seed.to_string()])
        .stdin(Stdio::null())
        .spawn()
        .expect("a second process")
}

/// What the survivor has seen.
struct Seen {
    consumer: Consumer,
    data: Vec<u8>,
    last: Option<Record>,
    /// Offsets of the requests that have a record.
    published: BTreeSet<u64>,
    voids: u64,
}

impl Seen {
    /// Takes up to `most` records.
    fn drain(&mut self, most: u64) -> u64 {
        let mut records = 0;
        while records < most {
            self.data.clear();
            match self.consumer.next(&mut self.data, u32::MAX).expect("a killed producer corrupts nothing") {
                Next::Record(record) => self.check(record),
                Next::NoRoom(_) => unreachable!("there is room for any record"),
                Next::Empty => return records,
            }
            records += 1;
        }
        records
    }

    fn check(&mut self, record: Record) {
        if let Some(last) = self.last {
            assert_eq!(record.lsn, last.lsn.next(), "a hole");
            assert!(record.stamp >= last.stamp, "stamps run backwards");
        }
        self.last = Some(record);
        match record.op {
            Op::Write { range, data, .. } => {
                assert_eq!(u64::from(data.len), range.length());
                let wrong =
                    self.data.iter().enumerate().find(|(i, byte)| **byte != pattern(range.offset(), *i));
                assert_eq!(wrong, None, "a byte of {range:?} is not what was written");
                assert!(self.published.insert(range.offset()), "published twice");
            }
            Op::Zero { range, .. } => assert!(self.published.insert(range.offset()), "published twice"),
            Op::Void => self.voids += 1,
            Op::Flush => {}
            other => panic!("nobody publishes {other:?}"),
        }
    }

    /// Every request up to the newest published one of its thread was begun, so it is published or found issued.
    fn check_issued(&self, issued: &[ByteRange]) {
        for thread in 0..THREADS {
            let mine = thread << 40..(thread + 1) << 40;
            let Some(newest) = self.published.range(mine.clone()).next_back() else { continue };
            for offset in (mine.start + SPACING..=*newest).step_by(SPACING as usize) {
                let found = issued.iter().any(|range| range.offset() <= offset && offset < range.end());
                assert_ne!(found, self.published.contains(&offset), "{offset:#x}: found issued: {found}");
            }
        }
        assert!(issued.len() as u64 <= THREADS * DEPTH as u64, "no thread has more open than that");
    }
}

fn round(seed: u64, total: &mut Totals) {
    let base = RingConfig::new(DiskId([3; 16]), Epoch(1), Lsn(1), 1 << 47);
    let (ring, ring_fd) =
        Ring::create(&RingConfig { arena_bytes: 4 << 20, slots: 256, ..base }).expect("a ring");
    let (clock, clock_fd) = HostClock::create().expect("a clock");
    let consumer = Consumer::new(Arc::clone(&ring), clock);
    let mut seen = Seen { consumer, data: Vec::new(), last: None, published: BTreeSet::new(), voids: 0 };
    let mut child = spawn(&ring_fd, &clock_fd, seed);
    let mut random = Random::new(seed);
    // The moment is counted in records from the first one on, so that it does not depend on how fast a process
    // starts here; the kill itself lands wherever the threads are.
    let enough = 1 + random.below(300);
    let (mut records, mut progress) = (0, Instant::now());
    while records < enough {
        let taken = seen.drain(enough - records);
        records += taken;
        if taken > 0 {
            progress = Instant::now();
        }
        assert!(progress.elapsed() < Duration::from_secs(60), "the producer makes no progress");
        assert!(child.try_wait().expect("a child").is_none(), "the producer ended by itself");
        std::thread::sleep(Duration::from_micros(random.below(200)));
    }
    std::thread::sleep(Duration::from_micros(random.below(400)));
    child.kill().expect("killed");
    child.wait().expect("reaped");
    seen.consumer.close_dead().expect("a sane tail");
    records += seen.drain(u64::MAX);
    let issued = seen.consumer.issued_ranges().expect("sane headers");
    seen.check_issued(&issued);
    assert!(seen.voids <= THREADS + 1, "a thread dies in at most one slot");
    assert_eq!(seen.consumer.next_lsn(), ring.captured_lsn().next(), "every reserved slot was handed out");
    total.records += records;
    total.voids += seen.voids;
    total.issued += issued.len();
}
