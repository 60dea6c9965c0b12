//! Several threads of one process over one mapping: guests that write, a consumer that reads every byte, a copier
//! that fills, and overflows in between. Under ThreadSanitizer (`scripts/sanitize`) it also shows that no two threads
//! touch a piece of the arena without an order between them.
#![cfg(not(loom))]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use capture_ring::{Bell, Consumer, HostClock, Mode, Next, Producer, Resync, Ring, RingConfig};
use journal_format::{ByteRange, DiskId, Epoch, GapReason, Lsn, Op};

const GUESTS: u64 = 3;
const WRITES: u64 = 3_000;
const DISK_BYTES: u64 = 64 << 20;

fn ends(slots: u32) -> (Arc<Producer>, Consumer, Bell) {
    let base = RingConfig::new(DiskId([5; 16]), Epoch(1), Lsn(1), DISK_BYTES);
    let (ring, _fd) = Ring::create(&RingConfig { arena_bytes: 1 << 20, slots, ..base }).expect("a ring");
    let (clock, _fd) = HostClock::create().expect("a clock");
    let bell = Bell::create().expect("a bell");
    let ours = bell.duplicate().expect("another handle");
    let producer = Producer::new(Arc::clone(&ring), clock.clone(), bell);
    (Arc::new(producer), Consumer::new(ring, clock), ours)
}

/// Each write fills its range with one byte that follows from its offset.
const fn byte_of(offset: u64) -> u8 {
    (offset / 4096 % 251) as u8
}

/// Takes records out until `done` says that enough were seen, sleeping on the bell when there are none.
fn consume(consumer: &mut Consumer, bell: &Bell, mut done: impl FnMut(&Op) -> bool) {
    let mut data = Vec::new();
    loop {
        data.clear();
        match consumer.next(&mut data, u32::MAX).expect("a healthy ring") {
            Next::Record(record) => {
                if let Op::Write { range, fill: false, .. } = record.op {
                    assert!(
                        data.iter().all(|byte| *byte == byte_of(range.offset())),
                        "bytes of another write"
                    );
                }
                if done(&record.op) {
                    return;
                }
            }
            Next::NoRoom(_) => unreachable!("there is room for any record"),
            Next::Empty => {
                if consumer.arm_sleep() {
                    bell.wait(Duration::MAX);
                }
                consumer.disarm_sleep();
            }
        }
    }
}

#[test]
fn every_write_of_every_thread_comes_out_once_and_whole() {
    let (producer, mut consumer, bell) = ends(64);
    std::thread::scope(|scope| {
        for guest in 0..GUESTS {
            let producer = Arc::clone(&producer);
            scope.spawn(move || {
                for number in 0..WRITES {
                    let offset = (number * GUESTS + guest) * 4096;
                    let length = 1 + number * 37 % 20_000;
                    let range = ByteRange::new(offset, length).expect("a valid range");
                    let ticket = loop {
                        match producer.begin_write(range, false) {
                            Ok(ticket) => break ticket,
                            Err(_) => std::thread::yield_now(),
                        }
                    };
                    assert!(producer.copy_in(&ticket, &vec![byte_of(offset); length as usize]));
                    producer.complete(ticket);
                }
            });
        }
        let mut next = vec![0; GUESTS as usize];
        let mut left = GUESTS * WRITES;
        consume(&mut consumer, &bell, |op| {
            let Op::Write { range, .. } = op else { panic!("nobody publishes {op:?}") };
            let (guest, number) = (range.offset() / 4096 % GUESTS, range.offset() / 4096 / GUESTS);
            assert_eq!(next[guest as usize], number, "a thread's writes are numbered in their order");
            next[guest as usize] += 1;
            left -= 1;
            left == 0
        });
    });
}

/// A guest's write: recorded or tracked, as the mode says; never waits, never fails.
fn guest_write(producer: &Producer, disk: &[AtomicU64], chunk: u64) {
    let range = ByteRange::new(chunk * 65536, 4096).expect("a valid range");
    let written = || disk[chunk as usize].fetch_add(1, Ordering::Relaxed);
    loop {
        match producer.ring().mode().mode {
            Mode::Capturing => match producer.begin_write(range, false) {
                Ok(ticket) => {
                    assert!(producer.copy_in(&ticket, &[byte_of(range.offset()); 4096]));
                    written();
                    producer.complete(ticket);
                    return;
                }
                Err(_) => producer.enter_tracking(GapReason::Overflow),
            },
            Mode::Tracking => {
                if let Some(tracked) = producer.begin_tracked(range) {
                    written();
                    producer.end_tracked(tracked);
                    return;
                }
            }
            Mode::Off => panic!("nothing switches capture off"),
        }
    }
}

#[test]
fn overflows_and_resyncs_under_load_end_with_a_whole_history() {
    let (producer, mut consumer, bell) = ends(64);
    producer.attach().expect("a new ring");
    let disk: Vec<AtomicU64> = (0..DISK_BYTES / 65536).map(|_| AtomicU64::new(0)).collect();
    let (disk, quiet) = (&disk, AtomicU64::new(0));
    std::thread::scope(|scope| {
        for guest in 0..GUESTS {
            let (producer, quiet) = (Arc::clone(&producer), &quiet);
            scope.spawn(move || {
                for number in 0..WRITES {
                    guest_write(&producer, disk, (number * 7 + guest) % disk.len() as u64);
                }
                quiet.fetch_add(1, Ordering::Release);
            });
        }
        scope.spawn(|| {
            // Until the guests are done and the gap is closed for good; then a last flush tells the consumer.
            while quiet.load(Ordering::Acquire) < GUESTS || producer.ring().gap_is_open() {
                resync_pass(&producer);
            }
            while producer.flush_record().is_err() {
                std::thread::yield_now();
            }
        });
        let mut open = None;
        consume(&mut consumer, &bell, |op| {
            match *op {
                Op::GapBegin { generation, .. } => open = open.max(Some(generation)),
                Op::GapEnd { generation } if Some(generation) >= open => open = None,
                _ => {}
            }
            *op == Op::Flush
        });
        assert_eq!(open, None, "the last gap is closed");
    });
    assert!(!producer.ring().dirty().any());
}

fn resync_pass(producer: &Producer) {
    if !producer.try_resume() {
        std::thread::sleep(Duration::from_micros(100));
        return;
    }
    while let Some(run) = producer.ring().dirty().take_run(0, 4 << 20) {
        match producer.reserve_fill(4096) {
            Ok(fill) => assert!(producer.complete_fill_zero(fill, run).is_ok()),
            Err(_) => {
                producer.mark_dirty(run);
                std::thread::sleep(Duration::from_micros(100));
                return;
            }
        }
    }
    if producer.finish_resync() != Resync::Dirty {
        std::thread::yield_now();
    }
}
