//! The worker, step by step, on real rings and outboxes.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use capture_ring::{Bell, Consumer, HostClock, Producer, Ring, RingConfig};
use journal_format::{ByteRange, DiskId, Epoch, Frame, Lsn, Op, Stamp, codec};

use super::worker::{Pace, Worker};
use crate::drill::Drill;
use crate::limits::MIN_OUTBOX_BYTES;
use crate::outbox::adopt::{Adopted, adopt};
use crate::outbox::{Outbox, OutboxWriter, Packed};
use crate::packer::Packer;
use crate::seam::memory::DIED;
use crate::session::Ending;
use crate::spool::{Spool, SpoolPlace};

const DISK: DiskId = DiskId([6; 16]);
const EPOCH: Epoch = Epoch(4);
const FIRST: Lsn = Lsn(101);
const DISK_BYTES: u64 = 1 << 30;

/// A ring as QEMU has it, and what it has kept of the outbox.
struct Bench {
    ring: Arc<Ring>,
    clock: HostClock,
    producer: Producer,
    kept: File,
    folder: tempfile::TempDir,
    spool_bytes: u64,
    drill: Option<Drill>,
}

fn config(arena_bytes: u64) -> RingConfig {
    RingConfig { arena_bytes, slots: 256, ..RingConfig::new(DISK, EPOCH, FIRST, DISK_BYTES) }
}

fn keep(outbox: &Outbox) -> File {
    outbox.memory().file().try_clone().unwrap()
}

impl Bench {
    /// A ring, and a worker for it whose outbox dies after so many stores.
    fn new(outbox_bytes: u64, spool_bytes: u64, die_after: u64) -> (Self, Worker) {
        Self::drilled(outbox_bytes, spool_bytes, die_after, None)
    }

    fn drilled(outbox_bytes: u64, spool_bytes: u64, die_after: u64, drill: Option<&str>) -> (Self, Worker) {
        let (ring, _) = Ring::create(&config(8 << 20)).unwrap();
        let (clock, _) = HostClock::create().unwrap();
        let producer = Producer::new(Arc::clone(&ring), clock.clone(), Bell::create().unwrap());
        let packed = Packed { lsn: FIRST.prev(), stamp: Stamp::ZERO, disk_bytes: DISK_BYTES };
        let (outbox, mut writer) = Outbox::create(DISK, EPOCH, outbox_bytes, packed, packed.lsn).unwrap();
        writer.die_after(die_after);
        let folder = tempfile::tempdir().unwrap();
        let drill = drill.map(|spec| spec.parse().unwrap());
        let bench = Self { ring, clock, producer, kept: keep(&outbox), folder, spool_bytes, drill };
        let consumer = Consumer::new(Arc::clone(&bench.ring), bench.clock.clone());
        let packer = Packer::new(DISK, EPOCH, DISK_BYTES);
        let worker = bench.worker(consumer, writer, packer, packed.lsn);
        (bench, worker)
    }

    fn spool(&self) -> Spool {
        let (folder, drill) = (self.folder.path().to_owned(), self.drill.clone());
        let place = SpoolPlace { folder, limit_bytes: self.spool_bytes, drill };
        Spool::open(&place, DISK, EPOCH)
    }

    fn worker(&self, consumer: Consumer, writer: OutboxWriter, packer: Packer, packed: Lsn) -> Worker {
        Worker::new((DISK, EPOCH), Some(consumer), writer, packer, self.spool(), packed)
    }

    /// What an agent does that finds ring and outbox.
    fn adopt(&mut self) -> Worker {
        self.adopt_and_die(u64::MAX)
    }

    /// The same, dying before a store of that number in the ring's take-over.
    fn adopt_and_die(&mut self, die_after: u64) -> Worker {
        let mut adopted = self.load();
        adopted.writer.die_after(die_after);
        let mut parked = crate::drain::parked::Parked::new(adopted, self.spool(), (DISK, EPOCH)).unwrap();
        self.kept = keep(parked.outbox());
        parked.resume(Some((Arc::clone(&self.ring), self.clock.clone()))).unwrap();
        parked.into_worker()
    }

    fn load(&self) -> Adopted {
        adopt(&self.kept, DISK, EPOCH, 0, self.spool().last()).unwrap()
    }

    fn write(&self, number: u64, bytes: usize) -> bool {
        let range = ByteRange::new(number * 65536, bytes as u64).unwrap();
        let Ok(ticket) = self.producer.begin_write(range, false) else { return false };
        assert!(self.producer.copy_in(&ticket, &vec![u8::try_from(number % 251).unwrap(); bytes]));
        self.producer.complete(ticket);
        true
    }

    /// Some writes of many sizes, a few of them in several pieces, and what else a ring carries.
    fn scribble(&self, from: u64, to: u64) {
        for number in from..to {
            let bytes = [512, 4096, 9000, 300_000][usize::try_from(number % 4).unwrap()];
            assert!(self.write(number, bytes), "the ring is made for it");
            if number % 5 == 0 {
                self.producer.flush_record().unwrap();
            }
            if number % 11 == 0 {
                self.producer.bookmark("here").unwrap();
            }
        }
    }
}

/// Ships all frames of an outbox and returns what they hold.
fn ship(outbox: &Outbox, seen: &mut Vec<(Lsn, Op, Vec<u8>)>) {
    ship_to(outbox, Lsn::MAX, seen);
}

/// The same, up to an LSN.
fn ship_to(outbox: &Outbox, to: Lsn, seen: &mut Vec<(Lsn, Op, Vec<u8>)>) {
    use std::os::unix::fs::FileExt;
    for entry in outbox.entries(Lsn::ZERO, to, usize::MAX, usize::MAX) {
        let mut bytes = vec![0; entry.len];
        outbox.memory().file().read_exact_at(&mut bytes, entry.at as u64).unwrap();
        let frame = Frame::parse(&bytes[16..]).unwrap();
        let header = frame.header();
        let raw = codec::decompress(header.codec(), frame.data(), header.raw_bytes()).unwrap();
        for record in frame.records() {
            let data = match record.op {
                Op::Write { data, .. } | Op::Bookmark { name: data } => {
                    raw[data.pos as usize..data.end() as usize].to_vec()
                }
                _ => Vec::new(),
            };
            seen.push((record.lsn, record.op, data));
        }
        outbox.release(entry.last_lsn);
    }
}

/// LSNs without holes, and every write's own bytes.
fn assert_whole(seen: &[(Lsn, Op, Vec<u8>)], writes: u64) {
    let mut expected = 0;
    for (at, (lsn, op, data)) in seen.iter().enumerate() {
        assert_eq!(*lsn, Lsn(FIRST.0 + at as u64), "a record is missing or came twice");
        if let Op::Write { range, .. } = op {
            assert_eq!(range.offset(), expected * 65536, "the writes come in order");
            assert_eq!(data.len() as u64, range.length());
            assert!(
                data.iter().all(|byte| u64::from(*byte) == expected % 251),
                "write {expected} has other bytes"
            );
            expected += 1;
        }
    }
    assert_eq!(expected, writes);
}

/// Steps until the ring is empty; the time advances so that frames are due.
fn run(worker: &mut Worker, now: &mut Duration, ending: Option<Ending>) -> Pace {
    loop {
        *now += Duration::from_millis(1);
        match worker.step(*now, ending).unwrap().pace {
            Pace::Busy | Pace::Poll => {}
            pace => return pace,
        }
    }
}

#[test]
fn killed_at_any_store_an_adopting_agent_loses_and_repeats_nothing() {
    std::panic::set_hook(Box::new(|info| {
        if info.payload().downcast_ref::<&str>() != Some(&DIED) {
            eprintln!("{info}");
        }
    }));
    let (mut deaths, mut deaths_again, mut slabs_lost) = (0, 0, 0);
    for die_after in 0.. {
        let (mut bench, worker) = Bench::new(MIN_OUTBOX_BYTES, 0, die_after);
        let total = bench.ring.geometry().slabs;
        bench.scribble(0, 12);
        let (mut now, mut seen) = (Duration::ZERO, Vec::new());
        let (mut worker, mut written) = (Some(worker), 12);
        let lived = catch_unwind(AssertUnwindSafe(|| {
            let mut worker = worker.take().unwrap();
            run(&mut worker, &mut now, None);
            bench.scribble(12, 20);
            written = 20;
            ship(worker.writer().outbox(), &mut seen);
            run(&mut worker, &mut now, None);
            worker
        }));
        let died = lived.is_err();
        let before = seen.len();
        drop(lived);
        // Every second time the one that takes over dies, too, while it frees what was left.
        if die_after % 2 == 1 {
            let die_again = die_after / 2 % 12;
            deaths_again +=
                u64::from(catch_unwind(AssertUnwindSafe(|| drop(bench.adopt_and_die(die_again)))).is_err());
        }
        let mut worker = bench.adopt();
        bench.scribble(written, 30);
        run(&mut worker, &mut now, None);
        ship(worker.writer().outbox(), &mut seen);
        // What was shipped and acknowledged before may come once more, as it was.
        let again: Vec<_> = seen.split_off(before);
        seen.truncate(usize::try_from(again[0].0.0 - FIRST.0).unwrap());
        seen.extend(again);
        assert_whole(&seen, 30);
        // One slab is being filled; one may have been given up at the piece in doubt.
        let lost = bench.ring.arena_used_bytes() / (256 << 10);
        assert!(lost <= 2, "{lost} of {total} slabs are lost, died after {die_after}");
        slabs_lost += lost.saturating_sub(1);
        if !died {
            break;
        }
        deaths += 1;
    }
    let _ = std::panic::take_hook();
    assert!(deaths > 70 && deaths_again > 10, "only {deaths} places to die, and {deaths_again} again");
    assert!(slabs_lost < deaths / 2, "{slabs_lost} slabs were lost in {deaths} deaths");
}

/// A fill of zeroes that the resync has read at 512 MiB: it waits for what the server has there, which nobody says.
fn fill_that_waits(bench: &Bench) {
    let fill = bench.producer.reserve_fill(64 << 10).unwrap();
    assert!(bench.producer.copy_in_fill(&fill, &[0; 64 << 10]));
    let range = ByteRange::new(512 << 20, 64 << 10).unwrap();
    bench.producer.complete_fill_write(fill, range).unwrap();
}

/// A finished frame that found no room was dropped when the next reason to finish one came before it had its place: a fill
/// that waits and much that is held, or an end.
#[test]
fn a_frame_that_finds_no_room_is_kept_while_a_fill_waits() {
    for ending in [None, Some(Ending::Detached)] {
        let (bench, mut worker) = Bench::new(MIN_OUTBOX_BYTES, 0, u64::MAX);
        let (mut now, mut seen) = (Duration::ZERO, Vec::new());
        for (number, bytes) in [(0, 4 << 20), (1, 4 << 20), (2, 4 << 20), (3, 900_000)] {
            assert!(noisy(&bench, number, bytes), "the ring has room");
            assert_eq!(run(&mut worker, &mut now, None), Pace::Idle, "and the outbox");
        }
        for number in 4..7 {
            assert!(noisy(&bench, number, 64 << 10), "more than the outbox has room for");
        }
        if ending.is_none() {
            assert!((7..67).all(|number| bench.write(number, 512)));
        } else {
            // Then the fill is the first that the step finds.
            while worker.step(now, None).unwrap().pace == Pace::Busy {}
        }
        fill_that_waits(&bench);
        let packed = worker.packed();
        assert_eq!(worker.step(now, ending).unwrap().pace, Pace::Blocked);
        assert_eq!(worker.packed(), packed);
        for _ in 0..1000 {
            ship(worker.writer().outbox(), &mut seen);
            if matches!(run(&mut worker, &mut now, ending), Pace::Idle | Pace::Ended) {
                break;
            }
        }
        ship(worker.writer().outbox(), &mut seen);
        assert_eq!(lsns(&seen), (FIRST.0..=bench.ring.captured_lsn().0).collect::<Vec<_>>(), "{ending:?}");
    }
}

/// A frame that is neither full nor old is closed when the ring wants its room back: a guest must not wait for its age.
#[test]
fn a_frame_holds_no_more_of_the_ring_than_the_guest_can_spare() {
    let (bench, mut worker) = Bench::new(MIN_OUTBOX_BYTES, 0, u64::MAX);
    assert!((0..100).all(|number| bench.write(number, 512)), "the ring has room");
    while worker.step(Duration::ZERO, None).unwrap().pace == Pace::Busy {}
    let held = bench.ring.backlog();
    assert!((1..64).contains(&held), "{held} of 256 slots are held");
}

/// Writes that do not compress, so that the outbox fills.
fn noisy(bench: &Bench, number: u64, bytes: usize) -> bool {
    let range = ByteRange::new(number * 65536, bytes as u64).unwrap();
    let Ok(ticket) = bench.producer.begin_write(range, false) else { return false };
    let mut x = number | 1;
    let data: Vec<u8> = std::iter::repeat_with(|| {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (x >> 56) as u8
    })
    .take(bytes)
    .collect();
    assert!(bench.producer.copy_in(&ticket, &data));
    bench.producer.complete(ticket);
    true
}

/// Fills ring, outbox and spool until the ring takes no more; returns the number of writes.
fn fill(bench: &Bench, worker: &mut Worker, now: &mut Duration) -> u64 {
    let mut number = 0;
    loop {
        for _ in 0..8 {
            if !noisy(bench, number, 64 << 10) {
                return number;
            }
            number += 1;
        }
        run(worker, now, None);
    }
}

fn lsns(seen: &[(Lsn, Op, Vec<u8>)]) -> Vec<u64> {
    seen.iter().map(|(lsn, ..)| lsn.0).collect()
}

#[test]
fn a_full_outbox_spools_and_everything_comes_out_in_order() {
    let (bench, mut worker) = Bench::new(MIN_OUTBOX_BYTES, 64 << 20, u64::MAX);
    let (mut now, mut seen, mut queued) = (Duration::ZERO, Vec::new(), 0);
    let writes = fill(&bench, &mut worker, &mut now);
    assert!(worker.spool().used_bytes() > 48 << 20, "the spool is used to its limit");
    assert_eq!(run(&mut worker, &mut now, None), Pace::Blocked);
    for number in 0..10_000 {
        ship(worker.writer().outbox(), &mut seen);
        if run(&mut worker, &mut now, None) == Pace::Idle {
            break;
        }
        // New writes queue behind.
        queued += u64::from(number < 100 && noisy(&bench, 10_000 + number, 4096));
    }
    ship(worker.writer().outbox(), &mut seen);
    run(&mut worker, &mut now, None);
    assert!(queued > 0 && seen.len() as u64 == writes + queued);
    assert_eq!(lsns(&seen), (FIRST.0..=bench.ring.captured_lsn().0).collect::<Vec<_>>());
    assert_eq!(worker.spool().used_bytes(), 0, "its files are gone");
}

/// A small outbox has three segments: begun in the middle of one, all may be in use before it is half full.
#[test]
fn a_frame_that_no_segment_takes_goes_to_the_spool() {
    let (bench, mut worker) = Bench::new(MIN_OUTBOX_BYTES, 64 << 20, u64::MAX);
    let (mut now, mut seen, mut number) = (Duration::ZERO, Vec::new(), 0);
    let mut put = |worker: &mut Worker, now: &mut Duration, bytes| {
        assert!(noisy(&bench, number, bytes), "the ring has room");
        number += 1;
        run(worker, now, None);
    };
    for _ in 0..10 {
        put(&mut worker, &mut now, 512 << 10);
    }
    let first = worker.writer().outbox().entries(Lsn(0), Lsn::MAX, usize::MAX, usize::MAX)[7].last_lsn;
    ship_to(worker.writer().outbox(), first, &mut seen);
    while worker.writer().outbox().used_bytes() <= 7 << 20 {
        put(&mut worker, &mut now, 512 << 10);
    }
    assert!(worker.writer().outbox().used_bytes() <= worker.writer().outbox().capacity_bytes() / 2);
    assert_eq!(worker.spool().used_bytes(), 0);
    put(&mut worker, &mut now, 4 << 20);
    assert!(worker.spool().used_bytes() > 4 << 20, "nobody waits for an acknowledgement");
    while run(&mut worker, &mut now, None) != Pace::Idle || worker.spool().used_bytes() > 0 {
        ship(worker.writer().outbox(), &mut seen);
    }
    ship(worker.writer().outbox(), &mut seen);
    assert_eq!(lsns(&seen), (FIRST.0..=bench.ring.captured_lsn().0).collect::<Vec<_>>());
}

/// Frames went to the spool, were read back, and others went to the outbox directly before the next ones came to the spool:
/// its file then had a hole, and the agent that came next took what was behind it for torn, and threw it away.
#[test]
fn what_is_spooled_after_a_while_without_survives_the_agent() {
    let (mut bench, mut worker) = Bench::new(MIN_OUTBOX_BYTES, 64 << 20, u64::MAX);
    let (mut now, mut seen, mut number) = (Duration::ZERO, Vec::new(), 0);
    let mut until = |worker: &mut Worker, now: &mut Duration, what: &dyn Fn(&Worker) -> bool| {
        while !what(worker) {
            assert!(noisy(&bench, number, 64 << 10), "the ring has room");
            number += 1;
            run(worker, now, None);
        }
    };
    until(&mut worker, &mut now, &|worker| worker.spool().used_bytes() > 1 << 20);
    ship(worker.writer().outbox(), &mut seen);
    run(&mut worker, &mut now, None);
    assert!(worker.spool().is_read() && worker.spool().used_bytes() > 0, "read back, and not durable");
    let most = worker.writer().outbox().capacity_bytes() / 2;
    until(&mut worker, &mut now, &|worker| worker.writer().outbox().used_bytes() > most);
    until(&mut worker, &mut now, &|worker| !worker.spool().is_read());
    drop(worker);
    let mut worker = bench.adopt();
    while run(&mut worker, &mut now, None) == Pace::Blocked {
        ship(worker.writer().outbox(), &mut seen);
    }
    ship(worker.writer().outbox(), &mut seen);
    assert_eq!(lsns(&seen), (FIRST.0..=bench.ring.captured_lsn().0).collect::<Vec<_>>());
}

/// What a dead process left open was looked for, and warned of, every 50 ms for as long as frames waited in the spool.
#[test]
fn an_ended_ring_is_let_go_while_its_frames_wait_in_the_spool() {
    for ending in [Ending::Dead, Ending::Detached] {
        let (bench, mut worker) = Bench::new(MIN_OUTBOX_BYTES, 64 << 20, u64::MAX);
        let (mut now, mut seen, mut number) = (Duration::ZERO, Vec::new(), 0);
        while worker.spool().used_bytes() < 1 << 20 {
            assert!(noisy(&bench, number, 64 << 10), "the ring has room");
            number += 1;
            run(&mut worker, &mut now, None);
        }
        let _never_completed = bench.producer.begin_write(ByteRange::new(0, 4096).unwrap(), false).unwrap();
        let holders = Arc::strong_count(&bench.ring);
        assert_eq!(run(&mut worker, &mut now, Some(ending)), Pace::Blocked);
        assert!(!worker.spool().is_read(), "the server has acknowledged nothing");
        assert_eq!(Arc::strong_count(&bench.ring), holders - 1, "{ending:?}: nobody reads it any more");
        while run(&mut worker, &mut now, Some(ending)) == Pace::Blocked {
            ship(worker.writer().outbox(), &mut seen);
        }
        ship(worker.writer().outbox(), &mut seen);
        assert_eq!(lsns(&seen), (FIRST.0..=bench.ring.captured_lsn().0).collect::<Vec<_>>(), "{ending:?}");
    }
}

#[test]
fn stopping_with_everything_full_loses_nothing() {
    for spool_bytes in [0, 64 << 20] {
        let (mut bench, mut worker) = Bench::new(MIN_OUTBOX_BYTES, spool_bytes, u64::MAX);
        let (mut now, mut seen) = (Duration::ZERO, Vec::new());
        fill(&bench, &mut worker, &mut now);
        assert_eq!(run(&mut worker, &mut now, Some(Ending::AgentStops)), Pace::Ended);
        let packed = worker.packed();
        drop(worker);
        let mut worker = bench.adopt();
        assert_eq!(worker.packed(), packed);
        while run(&mut worker, &mut now, None) == Pace::Blocked {
            ship(worker.writer().outbox(), &mut seen);
        }
        ship(worker.writer().outbox(), &mut seen);
        assert_eq!(lsns(&seen), (FIRST.0..=bench.ring.captured_lsn().0).collect::<Vec<_>>());
    }
}

#[test]
fn a_spool_that_cannot_be_written_costs_nothing_but_itself() {
    let (bench, worker) = Bench::new(MIN_OUTBOX_BYTES, 64 << 20, u64::MAX);
    // A file where the disk's folder should be.
    std::fs::write(bench.folder.path().join(DISK.to_string()), b"").unwrap();
    let (mut now, mut seen, mut worker) = (Duration::ZERO, Vec::new(), worker);
    fill(&bench, &mut worker, &mut now);
    assert!(worker.spool().trouble().is_some());
    assert!(
        worker.writer().outbox().used_bytes() > MIN_OUTBOX_BYTES / 4 * 3,
        "the outbox is used to its end"
    );
    while run(&mut worker, &mut now, None) == Pace::Blocked {
        ship(worker.writer().outbox(), &mut seen);
    }
    ship(worker.writer().outbox(), &mut seen);
    assert_eq!(lsns(&seen), (FIRST.0..=bench.ring.captured_lsn().0).collect::<Vec<_>>());
    std::fs::remove_file(bench.folder.path().join(DISK.to_string())).unwrap();
    now += crate::limits::SPOOL_RETRY;
    fill(&bench, &mut worker, &mut now);
    assert!(worker.spool().trouble().is_none() && worker.spool().used_bytes() > 0, "it is tried again");
}

/// Writes that fail, each after a part of it got there: once now and then, once for good.
#[test]
fn a_spool_whose_writes_fail_in_the_middle_has_no_hole() {
    for (drill, most_mib) in [("spool-error-every=7", 64), ("spool-full-after=3MiB", 3)] {
        let (mut bench, mut worker) = Bench::drilled(MIN_OUTBOX_BYTES, 64 << 20, u64::MAX, Some(drill));
        let (mut now, mut seen, mut number, mut troubles) = (Duration::ZERO, Vec::new(), 0, 0);
        let mut spooled = 0;
        for round in 0..60 {
            // (Until the ring is full, when the spool is.)
            for _ in 0..8 {
                number += u64::from(noisy(&bench, number, 64 << 10));
            }
            run(&mut worker, &mut now, None);
            troubles += u32::from(worker.spool().trouble().is_some());
            spooled = spooled.max(worker.spool().used_bytes() >> 20);
            now += crate::limits::SPOOL_RETRY;
            if round % 19 == 18 {
                // Killed, and gone on with by another.
                drop(worker);
                worker = bench.adopt();
            }
        }
        assert!(troubles > 0, "{drill}");
        assert!((1..most_mib).contains(&spooled), "{drill}: {spooled} MiB were spooled");
        while run(&mut worker, &mut now, None) == Pace::Blocked {
            ship(worker.writer().outbox(), &mut seen);
        }
        ship(worker.writer().outbox(), &mut seen);
        assert_eq!(lsns(&seen), (FIRST.0..=bench.ring.captured_lsn().0).collect::<Vec<_>>(), "{drill}");
    }
}

#[test]
fn a_damaged_spool_ends_the_epoch_before_the_damage() {
    let (bench, mut worker) = Bench::new(MIN_OUTBOX_BYTES, 64 << 20, u64::MAX);
    let (mut now, mut seen) = (Duration::ZERO, Vec::new());
    fill(&bench, &mut worker, &mut now);
    let folder = bench.folder.path().join(DISK.to_string());
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().path()).collect();
    files.sort();
    let mut bytes = std::fs::read(&files[1]).unwrap();
    // All frames are alike: the middle of the file may be between two of them, where nobody looks.
    let middle = bytes.len() / 2 + 5000;
    bytes[middle] ^= 1;
    std::fs::write(&files[1], bytes).unwrap();
    let stop = loop {
        ship(worker.writer().outbox(), &mut seen);
        now += Duration::from_millis(1);
        match worker.step(now, None) {
            Ok(step) => assert_ne!(step.pace, Pace::Ended),
            Err(stop) => break stop,
        }
    };
    assert!(stop.to_string().contains("spool"), "{stop}");
    ship(worker.writer().outbox(), &mut seen);
    let last = seen.last().unwrap().0;
    assert_eq!(lsns(&seen), (FIRST.0..=last.0).collect::<Vec<_>>());
    assert_eq!(last, worker.packed());
    assert!(last < bench.ring.captured_lsn());
}

fn spool_files(bench: &Bench) -> Vec<(std::path::PathBuf, Vec<u8>)> {
    let folder = bench.folder.path().join(DISK.to_string());
    let files = std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().path());
    let mut files: Vec<_> = files.map(|path| (path.clone(), std::fs::read(path).unwrap())).collect();
    files.sort();
    files
}

/// The agent was killed, and before the next one came something happened to the files of its spool. The outbox says how
/// far frames were packed: once it was believed, and the frames behind the lost ones were sent next.
#[test]
fn what_the_spool_lost_while_no_agent_ran_never_makes_a_hole() {
    let (bench, mut worker) = Bench::new(MIN_OUTBOX_BYTES, 64 << 20, u64::MAX);
    let (mut now, mut number) = (Duration::ZERO, 0);
    while worker.spool().used_bytes() < 18 << 20 {
        assert!(noisy(&bench, number, 64 << 10), "the ring has room");
        number += 1;
        run(&mut worker, &mut now, None);
    }
    drop(worker);
    let files = spool_files(&bench);
    assert_eq!(files.len(), 2);
    let captured = bench.ring.captured_lsn();
    let (mut whole, mut refused, mut stopped) = (0, 0, 0);
    let mut cases: Vec<(usize, Option<usize>)> = vec![(0, None), (1, None)];
    for (file, (_, bytes)) in files.iter().enumerate() {
        let places = [0, 64, 100, 4096, bytes.len() / 2, bytes.len() - 100, bytes.len()];
        cases.extend(places.map(|at| (file, Some(at))));
    }
    for (damaged, at) in cases {
        let folder = bench.folder.path().join(DISK.to_string());
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir(&folder).unwrap();
        for (file, (path, bytes)) in files.iter().enumerate() {
            match at {
                _ if file != damaged => std::fs::write(path, bytes).unwrap(),
                Some(at) => std::fs::write(path, &bytes[..at]).unwrap(),
                None => {}
            }
        }
        let spool = bench.spool();
        let Ok(adopted) = adopt(&bench.kept, DISK, EPOCH, 0, spool.last()) else {
            refused += 1;
            continue;
        };
        let Ok(parked) = crate::drain::parked::Parked::new(adopted, spool, (DISK, EPOCH)) else {
            stopped += 1;
            continue;
        };
        // The ring is left alone: what was taken out of it is here.
        let (mut worker, mut seen) = (parked.into_worker(), Vec::new());
        while run(&mut worker, &mut now, None) == Pace::Blocked {
            ship(worker.writer().outbox(), &mut seen);
        }
        ship(worker.writer().outbox(), &mut seen);
        assert_eq!(lsns(&seen), (FIRST.0..=captured.0).collect::<Vec<_>>(), "file {damaged} cut at {at:?}");
        whole += 1;
    }
    assert!(whole == 2 && refused > 9 && stopped > 0, "{whole} whole, {refused} refused, {stopped} stopped");
}
