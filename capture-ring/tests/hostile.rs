//! The filter's process may be owned by a guest: whatever it writes into the ring, the consumer returns records that
//! keep every rule or an error, without panic, access outside the mapping or endless loop; and so does everything
//! else that reads the memory, on either side.
//!
//! The scribbler writes through the file, so a write can hit any byte between any two instructions of the reader.
#![cfg(not(loom))]

#[path = "support/random.rs"]
mod random;

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use capture_ring::{Bell, Consumer, HostClock, Next, OpKind, Producer, Ring, RingConfig, RingErrorKind};
use journal_format::limits::{MAX_BOOKMARK_BYTES, MAX_RECORD_DATA_BYTES};
use journal_format::record::RawRecord;
use journal_format::{ByteRange, DiskId, Epoch, GapReason, Lsn, Op, Stamp};
use random::Random;

/// How long each kind of scribbling goes on.
const TIME: Duration = Duration::from_secs(2);

struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

struct Victim {
    ring: Arc<Ring>,
    clock: HostClock,
    file: File,
    pristine: Vec<u8>,
}

impl Victim {
    fn new() -> Self {
        let base = RingConfig::new(DiskId([3; 16]), Epoch(1), Lsn(1), 1 << 24);
        let (ring, fd) =
            Ring::create(&RingConfig { arena_bytes: 1 << 20, slots: 64, ..base }).expect("a ring");
        let (clock, _) = HostClock::create().expect("a clock");
        let file = File::from(fd);
        let mut pristine = vec![0; ring.geometry().arena_at as usize];
        file.read_exact_at(&mut pristine, 0).expect("the header and tables");
        Self { ring, clock, file, pristine }
    }

    fn put(&self, at: u64, value: u64) {
        self.file.write_all_at(&value.to_le_bytes(), at).expect("written");
    }

    /// As new, so that the next round gets further than the first check.
    fn heal(&self) {
        self.file.write_all_at(&self.pristine, 0).expect("written");
    }

    /// Everything an agent asks of a ring.
    fn consume(&self) -> Option<RingErrorKind> {
        let mut consumer = Consumer::new(Arc::clone(&self.ring), self.clock.clone());
        let mut data = Vec::new();
        let mut failed = None;
        for step in 0..200 {
            data.clear();
            match consumer.copy(&mut data, if step % 3 == 0 { 5000 } else { u32::MAX }) {
                Ok(Next::Record(record)) => {
                    if step % 5 == 0 || consumer.holds_much() {
                        consumer.free(record.lsn, |_, _| {});
                    }
                    let again =
                        RawRecord::encode(&record).decode(record.lsn).expect("a record keeps every rule");
                    assert_eq!(again.op, record.op);
                    let most = match record.op {
                        Op::Write { range, .. } => u32::try_from(range.length()).expect("a record's length"),
                        Op::Bookmark { .. } => MAX_BOOKMARK_BYTES,
                        _ => 0,
                    };
                    assert!(most <= MAX_RECORD_DATA_BYTES && data.len() <= most as usize);
                }
                Ok(_) => {
                    if consumer.arm_sleep() {
                        consumer.disarm_sleep();
                    }
                }
                Err(error) => {
                    failed = Some(error.kind());
                    break;
                }
            }
        }
        let _ = consumer.close_dead();
        let _ = consumer.issued_ranges();
        self.take_over();
        failed
    }

    /// What the next agent does, with an outbox that may be a lie, too.
    fn take_over(&self) {
        let dice = self.clock.now().0 / 64;
        let (next, freed) = (Lsn(1 + dice % 70), (Lsn(dice / 70 % 70), (dice / 4900) as u8 % 20));
        let (ring, clock) = (Arc::clone(&self.ring), self.clock.clone());
        let mut said = None;
        let before = |lsn, piece| {
            assert!(lsn < next && (lsn, u8::MAX - piece) > (freed.0, u8::MAX - freed.1), "{lsn}, {piece}");
            assert!(said.is_none_or(|last| last < (lsn, u8::MAX - piece)), "in the order of freeing");
            said = Some((lsn, u8::MAX - piece));
        };
        if let Ok(mut consumer) = Consumer::adopt(ring, clock, next, Stamp(1), freed, before) {
            let _ = consumer.copy(&mut Vec::new(), u32::MAX);
        }
    }

    /// Everything a filter and the gauges ask of a ring. A producer believes its agent, but must not break memory.
    fn produce(&self) {
        let producer =
            Producer::new(Arc::clone(&self.ring), self.clock.clone(), Bell::create().expect("a bell"));
        let range = |offset, length| ByteRange::new(offset, length).expect("a valid range");
        for length in [512, 4096, 70_000, 600_000] {
            if let Ok(ticket) = producer.begin_write(range(1 << 20, length), false) {
                let _ = producer.copy_in(&ticket, &vec![1; length as usize]);
                let _ = producer.pieces(&ticket).count();
                producer.complete(ticket);
            }
            if let Ok(ticket) = producer.begin_op(OpKind::Discard, range(0, length)) {
                producer.fail(ticket);
            }
        }
        if let Some(tracked) = producer.begin_tracked(range(0, 4096)) {
            producer.end_tracked(tracked);
        }
        producer.enter_tracking(GapReason::Overflow);
        let _ =
            (producer.try_resume(), producer.finish_resync(), self.ring.captured_lsn(), self.ring.backlog());
        let _ =
            (self.ring.dirty().take_run(0, 1 << 20), self.ring.dirty().bytes(), self.ring.arena_used_bytes());
    }

    /// Runs `act` while another thread scribbles.
    fn under_fire(&self, scribble: impl Fn(&mut Random) + Sync, mut act: impl FnMut()) {
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut random = Random::new(1);
                while !done.load(Ordering::Relaxed) {
                    scribble(&mut random);
                }
            });
            // Also when `act` panics, or the test would hang instead of failing.
            let _stop = Stop(&done);
            let start = Instant::now();
            while start.elapsed() < TIME {
                act();
            }
        });
    }

    /// One random word anywhere.
    fn scribble_anywhere(&self, random: &mut Random) {
        let at = random.below(self.ring.geometry().arena_at / 8) * 8;
        self.put(at, random.next() >> random.below(64));
    }

    /// A record that looks published, with fields that are nearly right, in a slot that is about to be read.
    fn scribble_slot(&self, random: &mut Random) {
        let geometry = self.ring.geometry();
        let (number, units) = (random.below(4), geometry.units);
        let at = geometry.slots_at + number * 64;
        let (kind, pieces) = (random.below(11), random.below(20));
        let flags = if random.below(4) == 0 { random.below(16) } else { 0 };
        let reason = if kind == 7 { random.below(9) } else { 0 };
        let lengths = [0, 1, 255, 4096, 300_000, 4 << 20, (4 << 20) + 1, 1 << 33, u64::MAX];
        self.put(at + 8, if random.below(9) == 0 { random.next() } else { self.clock.now().0 });
        self.put(at + 16, [0, 4096, 1 << 47, u64::MAX][random.below(4) as usize]);
        self.put(at + 24, lengths[random.below(9) as usize]);
        self.put(at + 32, kind | flags << 8 | reason << 16 | pieces << 32);
        self.put(at + 40, random.below(units + 2));
        for _ in 0..8 {
            let block = geometry.blocks_at + random.below(units) * 32;
            self.put(block + 16, random.below(66) << 32 | random.below(units + 2));
            self.put(block + 24, random.below(6));
        }
        self.put(at, number + 1);
    }
}

#[test]
fn random_words_anywhere_break_nothing_on_either_side() {
    let victim = Victim::new();
    let mut random = Random::new(2);
    victim.under_fire(
        |random| victim.scribble_anywhere(random),
        || {
            victim.heal();
            victim.produce();
            for _ in 0..random.below(30) {
                victim.scribble_anywhere(&mut random);
            }
            victim.consume();
            victim.produce();
        },
    );
}

#[test]
fn records_that_are_nearly_right_break_nothing_and_most_are_refused() {
    let victim = Victim::new();
    let mut found = [0_u64; 2];
    let mut random = Random::new(3);
    victim.under_fire(
        |random| victim.scribble_slot(random),
        || {
            victim.heal();
            for _ in 0..4 {
                victim.scribble_slot(&mut random);
            }
            found[usize::from(victim.consume() == Some(RingErrorKind::Corrupt))] += 1;
        },
    );
    let [read, refused] = found;
    assert!(
        refused > 0 && read > 0,
        "read {read}, refused {refused}: the scribbler does not reach both outcomes"
    );
}

/// A stack of free slabs that never ends, counters that go wild: allocation and freeing come back.
#[test]
fn allocator_words_that_lie_cannot_trap_either_side() {
    let victim = Victim::new();
    let words = 4096;
    victim.under_fire(
        |random| {
            let at = words + random.below(4) * 128 + random.below(2) * 8;
            victim.put(at, random.next() >> random.below(64));
            let slab = victim.ring.geometry().slabs_at + random.below(victim.ring.geometry().slabs) * 64;
            victim.put(slab, random.below(70));
            victim.put(slab + 8, random.below(victim.ring.geometry().slabs + 2));
        },
        || {
            victim.heal();
            victim.produce();
            victim.consume();
        },
    );
}

#[test]
fn a_description_with_any_byte_changed_is_refused() {
    let victim = Victim::new();
    assert!(Ring::open(victim.file.as_fd()).is_ok());
    for at in 0..192 {
        let mut byte = [0];
        victim.file.read_exact_at(&mut byte, at).expect("read");
        victim.file.write_all_at(&[byte[0] ^ 1], at).expect("written");
        assert!(Ring::open(victim.file.as_fd()).is_err(), "byte {at} is not checked");
        victim.file.write_all_at(&byte, at).expect("written");
    }
    assert!(Ring::open(victim.file.as_fd()).is_ok());
}

/// A record of the first or the last of all stamps would be refused by whoever reads the frame, for ever.
#[test]
fn a_record_stamped_in_the_future_or_never_is_refused() {
    let victim = Victim::new();
    let at = victim.ring.geometry().slots_at;
    let now = victim.clock.now().0;
    for (stamp, outcome) in [
        (now + 3_600_000_000_000, Some(RingErrorKind::Corrupt)),
        (u64::MAX, Some(RingErrorKind::Corrupt)),
        (0, Some(RingErrorKind::Corrupt)),
        (now, None),
    ] {
        // A flush.
        for (field, value) in [(8, stamp), (32, 4), (0, 1)] {
            victim.put(at + field, value);
        }
        assert_eq!(victim.consume(), outcome, "stamp {stamp}");
    }
}
