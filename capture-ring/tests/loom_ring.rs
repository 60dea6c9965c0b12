//! Every interleaving (up to a bound on preemptions) of producers and consumer, over the real code with loom's
//! atomics: slots, credits, the slab allocator, sleeping and waking.
//!
//! Run by `RUSTFLAGS="--cfg loom" cargo test -p capture-ring --release --test 'loom_*'`.
#![cfg(loom)]
#![allow(clippy::arc_with_non_send_sync, reason = "loom runs its threads one at a time")]

use std::sync::Arc;

use capture_ring::{Bell, Consumer, HostClock, Next, Producer, Ring, RingConfig};
use journal_format::{ByteRange, DiskId, Epoch, Lsn, Op, Record};
use loom::thread;

const SLAB: u64 = capture_ring::limits::SLAB_BYTES;

struct Ends {
    producer: Arc<Producer>,
    consumer: Consumer,
    bell: Bell,
}

fn ends(slots: u32, slabs: u64) -> Ends {
    let base = RingConfig::new(DiskId([1; 16]), Epoch(1), Lsn(1), 1 << 20);
    let ring = Ring::for_loom(&RingConfig { slots, arena_bytes: slabs * SLAB, ..base });
    let (clock, bell) = (HostClock::for_loom(), Bell::default());
    let producer = Arc::new(Producer::new(Arc::clone(&ring), clock.clone(), bell.clone()));
    Ends { producer, consumer: Consumer::new(ring, clock), bell }
}

fn model(preemptions: usize, test: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 20_000;
    builder.check(test);
}

/// One guest write of one byte; waits for room.
fn write(producer: &Producer, offset: u64, value: u8) -> Lsn {
    let range = ByteRange::new(offset, 1).expect("a valid range");
    let ticket = loop {
        match producer.begin_write(range, false) {
            Ok(ticket) => break ticket,
            Err(_) => thread::yield_now(),
        }
    };
    assert!(producer.copy_in(&ticket, &[value]));
    producer.complete(ticket)
}

/// The next record and the byte it wrote; `None` when nothing is published.
fn take(consumer: &mut Consumer) -> Option<(Record, u64, u8)> {
    let mut data = Vec::new();
    match consumer.next(&mut data, u32::MAX).expect("a healthy ring") {
        Next::Record(record @ Record { op: Op::Write { range, .. }, .. }) => {
            Some((record, range.offset(), data[0]))
        }
        Next::Empty => None,
        other => panic!("expected a write, found {other:?}"),
    }
}

/// Takes `count` writes out and checks what every consumer relies on: numbers without holes, stamps that never run
/// backwards, and each write's own byte.
fn take_all(consumer: &mut Consumer, count: u64) {
    let mut last: Option<Record> = None;
    let mut seen = 0;
    while seen < count {
        let Some((record, offset, value)) = take(consumer) else {
            thread::yield_now();
            continue;
        };
        assert_eq!(u64::from(value), offset, "a record brought another one's data");
        if let Some(last) = last {
            assert_eq!(record.lsn, last.lsn.next());
            assert!(record.stamp >= last.stamp);
        }
        last = Some(record);
        seen += 1;
    }
}

#[test]
fn two_producers_publish_whole_records_without_holes() {
    model(2, || {
        let Ends { producer, mut consumer, bell: _ } = ends(4, 2);
        let threads = [1_u8, 2].map(|value| {
            let producer = Arc::clone(&producer);
            thread::spawn(move || write(&producer, u64::from(value), value))
        });
        take_all(&mut consumer, 2);
        let lsns = threads.map(|thread| thread.join().expect("a producer"));
        assert_ne!(lsns[0], lsns[1]);
    });
}

#[test]
fn a_slot_is_written_again_only_after_the_consumer_has_read_it() {
    model(2, || {
        let Ends { producer, mut consumer, bell: _ } = ends(4, 4);
        // Three of four slots are used once, so that the threads go round.
        for value in 1..=3 {
            write(&producer, u64::from(value), value);
        }
        take_all(&mut consumer, 2);
        let threads = [4_u8, 5].map(|value| {
            let producer = Arc::clone(&producer);
            thread::spawn(move || write(&producer, u64::from(value), value))
        });
        take_all(&mut consumer, 3);
        threads.into_iter().for_each(|thread| {
            thread.join().expect("a producer");
        });
    });
}

#[test]
fn a_slab_is_used_again_only_after_everybody_has_freed_it() {
    model(2, || {
        let Ends { producer, mut consumer, bell: _ } = ends(32, 2);
        // Three of four units are cut, so that the threads retire slabs, free them, and use them again.
        for value in 1..=3 {
            write(&producer, u64::from(value), value);
        }
        let threads = [4_u8, 5].map(|value| {
            let producer = Arc::clone(&producer);
            thread::spawn(move || write(&producer, u64::from(value), value))
        });
        take_all(&mut consumer, 5);
        threads.into_iter().for_each(|thread| {
            thread.join().expect("a producer");
        });
        // Nothing is lost: one unit of the slab in use is cut, all others can be had.
        let range = ByteRange::new(0, 1).expect("a valid range");
        let tickets: Vec<_> = std::iter::from_fn(|| producer.begin_write(range, false).ok()).collect();
        assert_eq!(tickets.len(), 3);
        tickets.into_iter().for_each(|ticket| producer.cancel(ticket));
    });
}

/// The ABA story: one thread is about to take slab 0 and has read that slab 1 lies below it; meanwhile another takes
/// both and gives slab 0 back. Without the tag the first would make slab 1, which is in use, the new top.
#[test]
fn a_slab_in_use_is_never_handed_out_again() {
    model(2, || {
        let Ends { producer, mut consumer, bell: _ } = ends(32, 4);
        let other = Arc::clone(&producer);
        let first = thread::spawn(move || {
            for value in 1..=3 {
                write(&other, u64::from(value), value);
            }
        });
        let begin = |offset| {
            let range = ByteRange::new(offset, 1).expect("a valid range");
            let ticket = producer.begin_write(range, false).expect("room");
            assert!(producer.copy_in(&ticket, &[offset as u8]));
            ticket
        };
        let given_back = [begin(4), begin(5)];
        let kept = [begin(6), begin(7)];
        given_back.into_iter().for_each(|ticket| producer.cancel(ticket));
        first.join().expect("the first");
        for ticket in kept {
            producer.complete(ticket);
        }
        take_all(&mut consumer, 5);
    });
}

#[test]
fn cancelling_and_completing_at_once_lose_no_room() {
    model(2, || {
        let Ends { producer, mut consumer, bell: _ } = ends(16, 2);
        let range = ByteRange::new(9, 1).expect("a valid range");
        let other = Arc::clone(&producer);
        let canceller = thread::spawn(move || {
            for _ in 0..2 {
                if let Ok(ticket) = other.begin_write(range, false) {
                    other.cancel(ticket);
                }
            }
        });
        write(&producer, 1, 1);
        write(&producer, 2, 2);
        take_all(&mut consumer, 2);
        canceller.join().expect("the canceller");
        let tickets: Vec<_> = std::iter::from_fn(|| producer.begin_write(range, false).ok()).collect();
        assert!(
            tickets.len() >= 3,
            "{} of 4 units, of which one may lie behind a retired half slab",
            tickets.len()
        );
        tickets.into_iter().for_each(|ticket| producer.cancel(ticket));
    });
}

/// Loom reports a deadlock if the consumer can sleep through a publication.
#[test]
fn a_consumer_that_goes_to_sleep_is_always_woken() {
    model(3, || {
        let Ends { producer, mut consumer, bell } = ends(8, 2);
        let writer = thread::spawn(move || {
            write(&producer, 1, 1);
            write(&producer, 2, 2);
        });
        let mut seen = 0;
        while seen < 2 {
            if take(&mut consumer).is_some() {
                seen += 1;
            } else if consumer.arm_sleep() {
                bell.wait_for_ring();
                consumer.disarm_sleep();
            }
        }
        writer.join().expect("the writer");
    });
}

#[test]
fn the_publisher_of_the_awaited_record_rings_whoever_it_is() {
    model(2, || {
        let Ends { producer, mut consumer, bell } = ends(8, 2);
        let threads = [1_u8, 2].map(|value| {
            let producer = Arc::clone(&producer);
            thread::spawn(move || write(&producer, u64::from(value), value))
        });
        let mut seen = 0;
        while seen < 2 {
            if take(&mut consumer).is_some() {
                seen += 1;
            } else if consumer.arm_sleep() {
                bell.wait_for_ring();
                consumer.disarm_sleep();
            }
        }
        threads.into_iter().for_each(|thread| {
            thread.join().expect("a producer");
        });
    });
}

/// A ring of a host with that clock. (Not inlined: loom's coroutines have a small stack, and two rings in the making do
/// not fit.)
#[inline(never)]
fn disk_of(clock: &HostClock) -> (Arc<Producer>, Box<Consumer>) {
    let base = RingConfig::new(DiskId([1; 16]), Epoch(1), Lsn(1), 1 << 20);
    let ring = Ring::for_loom(&RingConfig { slots: 8, arena_bytes: 2 * SLAB, ..base });
    let producer = Arc::new(Producer::new(Arc::clone(&ring), clock.clone(), Bell::default()));
    (producer, Box::new(Consumer::new(ring, clock.clone())))
}

/// Invariant I3 across two disks of a host: if B was issued after A was seen complete, every stamp that A's record
/// can carry is smaller than B's.
#[test]
fn stamps_order_causally_related_writes_of_two_disks() {
    model(2, || {
        let clock = HostClock::for_loom();
        let (first, mut from_first) = disk_of(&clock);
        let (second, mut from_second) = disk_of(&clock);
        let racer = {
            let first = Arc::clone(&first);
            // A write of the same disk that races with A and may push A's stamp up.
            thread::spawn(move || write(&first, 1, 1))
        };
        let lsn = write(&first, 2, 2);
        write(&second, 3, 3);
        racer.join().expect("the racer");
        let records = [take(&mut from_first), take(&mut from_first)].map(|taken| taken.expect("published").0);
        let a = records.into_iter().find(|record| record.lsn == lsn).expect("A's record");
        let b = take(&mut from_second).expect("published").0;
        assert!(a.stamp < b.stamp, "A {:?} is not before B {:?}", a.stamp, b.stamp);
    });
}
