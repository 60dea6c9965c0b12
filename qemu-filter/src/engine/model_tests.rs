//! The engine against a model: many guests write to a disk in memory at random, in every mode and with every kind
//! of failure, while a reader replays the records. In the end the replica is the disk, byte for byte, and at
//! every record outside a gap it is a state that the guests can explain.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use capture_ring::Mode;
use journal_format::ByteRange;

use super::testing::{Disk, Random, Replica, SECTOR, begin, capture, run_resync, tokens, wait};
use super::{Begin, Capture, Kind, Outcome, PartEnd, Piece, Request, Split, Standing, WaitToken};
use crate::ffi::testing::{bytes_of, fill};

const GUESTS: u64 = 4;
/// Below this, each guest has two sectors of its own that tell whether a point is consistent.
const WITNESS_BYTES: u64 = GUESTS * 2 * SECTOR as u64;
/// The disk never gets smaller than this. Not a multiple of the dirty chunk.
const LEAST_BYTES: u64 = (1 << 20) + 5 * SECTOR as u64;

/// What may go wrong in a run.
#[derive(Clone, Copy, Debug)]
struct Story {
    seed: u64,
    requests: u64,
    arena_bytes: u64,
    slots: u32,
    /// One in so many requests fails; 0 for none.
    failures: u64,
    resizes: bool,
    /// The reader sleeps now and then, so that the ring overflows.
    slow_reader: bool,
    contents_change: bool,
}

struct World {
    story: Story,
    disk: Disk,
    capture: Arc<Capture>,
    /// Size as the guests see it.
    bytes: AtomicU64,
    guests_left: AtomicU64,
    operator_left: AtomicBool,
    done: AtomicBool,
}

impl World {
    /// One request of a guest that is issued to the disk with random delays on both sides of it.
    fn request(&self, random: &mut Random, token: WaitToken, request: Request, data: &[u8]) -> Outcome {
        self.give_up_held(token);
        let mut in_flight = begin(&self.capture, &request, token);
        let copy = if in_flight.pieces().is_empty() {
            data.to_vec()
        } else {
            // The copy is what the disk gets, whatever the guest does to its buffer meanwhile.
            fill(in_flight.pieces(), data);
            bytes_of(in_flight.pieces())
        };
        delay(random);
        let fails = self.story.failures > 0 && random.one_in(self.story.failures);
        let outcome = if fails && random.one_in(2) {
            Outcome::NotDone
        } else {
            let sectors = if fails { random.below(4) as usize } else { usize::MAX };
            match self.disk.write(request.offset, &copy, sectors) {
                Ok(()) if !fails => Outcome::Succeeded,
                _ => Outcome::Failed,
            }
        };
        delay(random);
        self.capture.finish(&mut in_flight, outcome);
        outcome
    }

    /// A request that is issued in parts, as QEMU does it, and now and then given up between two.
    fn in_parts(&self, random: &mut Random, token: WaitToken, request: Request, data: &[u8]) {
        self.give_up_held(token);
        let (mut split, mut done) = (Split::new(request), 0);
        loop {
            while self.capture.begin_split(&mut split, token) == Begin::Wait {
                wait(token);
            }
            let rest = &data[done..];
            let length = rest.len().min((1 + random.below(8) as usize) * SECTOR);
            let offset = request.offset + done as u64;
            let mut places = [Piece::EMPTY; 64];
            let pieces = split.pieces(offset, length as u64, &mut places);
            let copy = if pieces.is_empty() {
                rest[..length].to_vec()
            } else {
                fill(pieces, &rest[..length]);
                bytes_of(pieces)
            };
            delay(random);
            let ended = match self.part_ends(random, request.kind) {
                PartEnd::NotDone => PartEnd::NotDone,
                ended => {
                    match self.disk.write(offset, &copy, if ended == PartEnd::Done { usize::MAX } else { 1 })
                    {
                        Ok(()) => ended,
                        Err(()) => PartEnd::Failed,
                    }
                }
            };
            delay(random);
            let part = ByteRange::new(offset, length as u64).expect("a range");
            if self.capture.end_part(split, part, ended, token).is_some() || random.one_in(50) {
                return;
            }
            delay(random);
            done += length;
            split = self.capture.take_held(token).expect("nobody else takes it");
            let whole = ByteRange::new(request.offset, request.length).expect("a range");
            assert!(split.continues(whole, part.end()), "what is held is another request");
        }
    }

    fn whole_or_in_parts(&self, random: &mut Random, token: WaitToken, request: Request, data: &[u8]) {
        if random.one_in(3) {
            self.in_parts(random, token, request, data);
        } else {
            self.request(random, token, request, data);
        }
    }

    fn part_ends(&self, random: &mut Random, kind: Kind) -> PartEnd {
        if self.story.failures > 0 && random.one_in(self.story.failures) {
            PartEnd::Failed
        } else if kind == Kind::Discard && random.one_in(4) {
            PartEnd::NotDone
        } else {
            PartEnd::Done
        }
    }

    /// Before another request of the same coroutine.
    fn give_up_held(&self, token: WaitToken) {
        if let Some(split) = self.capture.take_held(token) {
            self.capture.give_up_split(split);
        }
    }

    /// Writes the guest's next number into both of its own sectors, one after the other.
    fn witness(&self, random: &mut Random, token: WaitToken, guest: u64, number: u64) {
        for half in 0..2 {
            let data = [number.to_le_bytes(); SECTOR / 8].concat();
            let offset = (guest * 2 + half) * SECTOR as u64;
            let write = Request::write(offset, data.len() as u64, true);
            while self.request(random, token, write, &data) != Outcome::Succeeded {}
        }
    }

    fn guest(&self, guest: u64, token: WaitToken) {
        let mut random = Random(self.story.seed * 1000 + guest + 1);
        for number in 1..=self.story.requests {
            let bytes = self.bytes.load(Ordering::SeqCst);
            let sectors = (bytes - WITNESS_BYTES) / SECTOR as u64;
            let offset = WITNESS_BYTES + random.below(sectors) * SECTOR as u64;
            let length = ((1 + random.below(40)) * SECTOR as u64).min(bytes - offset);
            match random.below(16) {
                0..3 => self.witness(&mut random, token, guest, number),
                3 => {
                    let zero = Request::zero(offset, length, false, random.one_in(2));
                    self.whole_or_in_parts(&mut random, token, zero, &vec![0; length as usize]);
                }
                4 => {
                    let discard = Request::discard(offset, length);
                    self.whole_or_in_parts(&mut random, token, discard, &vec![0; length as usize]);
                }
                5 => drop(self.capture.flush()),
                _ => {
                    // Hot spots, so that requests overlap.
                    let offset = if random.one_in(2) { WITNESS_BYTES + offset % (32 << 10) } else { offset };
                    let data: Vec<u8> = (0..length).map(|_| random.next() as u8).collect();
                    self.whole_or_in_parts(&mut random, token, Request::write(offset, length, false), &data);
                }
            }
        }
        self.give_up_held(token);
        self.guests_left.fetch_sub(1, Ordering::SeqCst);
    }

    fn operator(&self, token: WaitToken) {
        let mut random = Random(self.story.seed + 77);
        while self.guests_left.load(Ordering::SeqCst) > 0 {
            std::thread::sleep(Duration::from_millis(3));
            if self.story.failures > 0 {
                // At any moment: as if QEMU had them wait for each other.
                self.capture.look_after_held(|_, _| Standing::Waits);
            }
            if self.story.contents_change && random.one_in(20) {
                self.capture.contents_changed();
            }
            if self.story.resizes {
                let bytes = LEAST_BYTES + random.below(400) * SECTOR as u64;
                self.resize(&mut random, token, bytes);
            }
        }
        self.operator_left.store(true, Ordering::SeqCst);
    }

    fn resize(&self, random: &mut Random, token: WaitToken, bytes: u64) {
        if bytes < self.bytes.load(Ordering::SeqCst) {
            self.bytes.store(bytes, Ordering::SeqCst);
        }
        let mut in_flight = begin(&self.capture, &Request::resize(bytes), token);
        delay(random);
        self.disk.resize(bytes);
        delay(random);
        self.capture.finish(&mut in_flight, Outcome::Succeeded);
        self.bytes.store(bytes, Ordering::SeqCst);
    }

    /// The agent: takes records out, asks for a resync when there is room, checks every point outside a gap.
    fn reader(&self, replica: &mut Replica) -> u64 {
        let mut random = Random(self.story.seed + 99);
        let mut good_points = 0;
        while self.story.slow_reader && self.capture.mode() == Mode::Capturing {
            // So that there is at least one overflow.
            std::thread::sleep(Duration::from_millis(1));
        }
        loop {
            let finished = self.done.load(Ordering::SeqCst);
            while let Some(record) = replica.step() {
                if replica.gap.is_none() {
                    good_points += 1;
                    check_witnesses(replica, record.lsn.0);
                }
                if self.story.slow_reader && random.one_in(300) {
                    std::thread::sleep(Duration::from_millis(random.below(30)));
                }
            }
            if finished {
                return good_points;
            }
            if self.capture.mode() == Mode::Tracking && replica.ring().has_room() {
                self.capture.resume();
            }
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// Waits until guests and operator are done and the gap has ended. False when that takes too long.
    fn wait_until_whole(&self) -> bool {
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(120) {
            if self.operator_left.load(Ordering::SeqCst) && !self.capture.status().gap_is_open {
                return true;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        false
    }
}

fn delay(random: &mut Random) {
    match random.below(64) {
        0 => std::thread::sleep(Duration::from_micros(random.below(2000))),
        1..24 => std::thread::yield_now(),
        _ => {}
    }
}

/// A guest writes its number to its first sector and, once that is complete, to its second. So no crash can leave
/// the second one ahead of the first, or more than one step behind.
fn check_witnesses(replica: &Replica, lsn: u64) {
    for guest in 0..GUESTS as usize {
        let sector = |half: usize| {
            let sector = &replica.bytes[(guest * 2 + half) * SECTOR..][..SECTOR];
            let numbers: Vec<u64> = sector
                .chunks(8)
                .map(|bytes| u64::from_le_bytes(bytes.try_into().expect("8 bytes")))
                .collect();
            assert!(numbers.iter().all(|number| *number == numbers[0]), "a torn sector at LSN {lsn}");
            numbers[0]
        };
        let (first, second) = (sector(0), sector(1));
        assert!(second <= first, "guest {guest} at LSN {lsn}: first {first}, second {second}");
    }
}

fn run(story: Story) {
    let bytes = LEAST_BYTES + 200 * SECTOR as u64;
    let (capture, mut replica) = capture(bytes, story.arena_bytes, story.slots);
    let world = World {
        story,
        disk: Disk::new(bytes as usize),
        capture,
        bytes: AtomicU64::new(bytes),
        guests_left: AtomicU64::new(GUESTS),
        operator_left: AtomicBool::new(false),
        done: AtomicBool::new(false),
    };
    let (whole, good_points) = std::thread::scope(|scope| {
        let mut tokens = tokens(GUESTS as usize + 1);
        let mut token = || tokens.next().expect("a token for each thread");
        for guest in 0..GUESTS {
            let (world, token) = (&world, token());
            scope.spawn(move || world.guest(guest, token));
        }
        let (operator, world) = (token(), &world);
        scope.spawn(move || world.operator(operator));
        let resync = scope.spawn(|| run_resync(Arc::clone(&world.capture), &world.disk));
        let reader = scope.spawn(|| world.reader(&mut replica));
        let whole = world.wait_until_whole();
        world.capture.detach();
        resync.join().expect("the resync stops");
        world.done.store(true, Ordering::SeqCst);
        (whole, reader.join().expect("no point was wrong"))
    });
    assert!(whole, "the gap never ends: {story:?} {:?}", world.capture.status());
    assert!(world.capture.is_idle(), "{story:?}");
    assert_eq!(world.capture.fault_message(), None, "{story:?}");
    assert!(replica.gap.is_none() && good_points > 0, "{story:?}");
    let disk = world.disk.contents();
    assert_eq!(disk.len(), replica.bytes.len(), "{story:?}");
    let wrong = disk.iter().zip(&replica.bytes).position(|(disk, replica)| disk != replica);
    assert_eq!(wrong, None, "the replica differs from the disk at this byte: {story:?}");
    assert!(!story.slow_reader || world.capture.status().generation > 1, "no overflow: {story:?}");
}

const CALM: Story = Story {
    seed: 1,
    requests: 600,
    arena_bytes: 4 << 20,
    slots: 4096,
    failures: 0,
    resizes: false,
    slow_reader: false,
    contents_change: false,
};

#[test]
fn a_replica_of_a_busy_disk_is_the_disk() {
    run(CALM);
}

#[test]
fn a_replica_survives_overflow_after_overflow() {
    for seed in 1..=3 {
        run(Story { seed, arena_bytes: 1 << 20, slots: 128, slow_reader: true, ..CALM });
    }
}

#[test]
fn a_replica_survives_failing_requests() {
    run(Story { seed: 5, failures: 20, ..CALM });
}

#[test]
fn a_replica_follows_resizes() {
    run(Story { seed: 7, resizes: true, ..CALM });
}

#[test]
fn a_replica_survives_everything_at_once() {
    for seed in 11..=14 {
        run(Story {
            seed,
            requests: 500,
            arena_bytes: 1 << 20,
            slots: 256,
            failures: 30,
            resizes: true,
            slow_reader: true,
            contents_change: true,
        });
    }
}
