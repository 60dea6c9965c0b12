//! The gap protocol under loom: a guest that writes and overflows, a resync that copies what is dirty, and a reader
//! who replays the log by the reader's rule. Whatever the interleaving, every point outside a gap holds everything
//! that the guest had been told before it.
#![cfg(loom)]
#![allow(clippy::arc_with_non_send_sync, reason = "loom runs its threads one at a time")]

use std::sync::Arc;

use capture_ring::{Bell, Consumer, HostClock, Mode, Next, Producer, Resync, Ring, RingConfig};
use journal_format::{ByteRange, DiskId, Epoch, GapReason, Lsn, Op};
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;

const CHUNK: u64 = 64 << 10;

/// A VM with one disk of one chunk that holds a number.
struct Vm {
    producer: Producer,
    disk: AtomicU64,
}

fn chunk() -> ByteRange {
    ByteRange::new(0, 1).expect("a valid range")
}

impl Vm {
    /// Attached and synced: history is whole.
    fn new() -> (Arc<Self>, Consumer) {
        let base = RingConfig::new(DiskId([1; 16]), Epoch(1), Lsn(1), CHUNK);
        let arena_bytes = 32 * capture_ring::limits::SLAB_BYTES;
        let ring = Ring::for_loom(&RingConfig { slots: 32, arena_bytes, ..base });
        let clock = HostClock::for_loom();
        let producer = Producer::new(Arc::clone(&ring), clock.clone(), Bell::default());
        producer.attach().expect("a new ring");
        assert!(producer.ring().dirty().take_run(0, CHUNK).is_some());
        assert!(matches!(producer.finish_resync(), Resync::Done(_)));
        (Arc::new(Self { producer, disk: AtomicU64::new(0) }), Consumer::new(ring, clock))
    }

    /// The device. Both accesses are read-modify-writes, so that they have one order, and relaxed, so that the
    /// protocol gets no ordering from them.
    fn write_disk(&self, value: u64) {
        self.disk.swap(value, Ordering::Relaxed);
    }

    /// The newest value, whoever wrote it.
    fn read_disk(&self) -> u64 {
        self.disk.fetch_or(0, Ordering::Relaxed)
    }

    /// One guest write; the last LSN reserved when the guest is told.
    fn guest_write(&self, value: u64) -> Lsn {
        loop {
            match self.producer.ring().mode().mode {
                Mode::Capturing => {
                    let ticket = self.producer.begin_write(chunk(), false).expect("a large ring");
                    assert!(self.producer.copy_in(&ticket, &[value as u8]));
                    self.write_disk(value);
                    self.producer.complete(ticket);
                }
                Mode::Tracking => {
                    let Some(tracked) = self.producer.begin_tracked(chunk()) else { continue };
                    self.write_disk(value);
                    self.producer.end_tracked(tracked);
                }
                Mode::Off => panic!("nothing switches this VM off"),
            }
            return self.producer.ring().captured_lsn();
        }
    }

    /// One pass of the background copy: resume, copy what is dirty, try to end the gap.
    fn resync_pass(&self) {
        if !self.producer.try_resume() {
            return;
        }
        if self.producer.ring().dirty().take_run(0, CHUNK).is_some() {
            let fill = self.producer.reserve_fill(1).expect("a large ring");
            assert!(self.producer.copy_in_fill(&fill, &[self.read_disk() as u8]));
            self.producer.complete_fill_write(fill, chunk()).expect("it fits");
        }
        self.producer.finish_resync();
    }
}

/// Replays the log. `told[i]` is the last LSN reserved when the guest learned that value `i + 1` is written.
fn check(mut consumer: Consumer, told: &[Lsn]) -> Option<u64> {
    let (mut image, mut open) = (0_u64, None::<u64>);
    let mut data = Vec::new();
    let mut log = Vec::new();
    while let Next::Record(record) = consumer.next(&mut data, u32::MAX).expect("a healthy ring") {
        log.push((record.lsn, record.op));
        match record.op {
            Op::Write { data: span, .. } => image = u64::from(data[span.pos as usize]),
            Op::GapBegin { generation, .. } => {
                open = Some(open.map_or(generation, |now| now.max(generation)))
            }
            Op::GapEnd { generation } if open.is_some_and(|now| generation >= now) => open = None,
            _ => {}
        }
        if open.is_none() {
            // The write that the guest was told of at `told` has a record or a gap at or before that LSN.
            let least = told.iter().filter(|told| **told <= record.lsn).count() as u64;
            assert!(
                image >= least,
                "LSN {} holds {image}, the guest was told of {least} at {told:?}: {log:?} {data:?}",
                record.lsn
            );
        }
    }
    open.is_none().then_some(image)
}

fn model(preemptions: usize, test: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 20_000;
    builder.check(test);
}

#[test]
fn an_overflow_that_races_with_the_end_of_a_resync_is_never_hidden() {
    model(3, || {
        let (vm, consumer) = Vm::new();
        vm.producer.enter_tracking(GapReason::Overflow);
        let guest = {
            let vm = Arc::clone(&vm);
            thread::spawn(move || {
                let one = vm.guest_write(1);
                vm.producer.enter_tracking(GapReason::Overflow);
                [one, vm.guest_write(2)]
            })
        };
        vm.resync_pass();
        let told = guest.join().expect("the guest");
        // When it is quiet, resync comes to an end and history to the disk's state.
        vm.resync_pass();
        vm.resync_pass();
        assert!(!vm.producer.ring().gap_is_open());
        assert_eq!(check(consumer, &told), Some(vm.read_disk()));
    });
}

#[test]
fn a_tracked_write_that_races_with_resume_and_resync_is_never_lost() {
    model(3, || {
        let (vm, consumer) = Vm::new();
        vm.producer.enter_tracking(GapReason::Overflow);
        let guest = {
            let vm = Arc::clone(&vm);
            thread::spawn(move || [vm.guest_write(1), vm.guest_write(2)])
        };
        vm.resync_pass();
        vm.resync_pass();
        let told = guest.join().expect("the guest");
        vm.resync_pass();
        assert_eq!(check(consumer, &told), Some(vm.read_disk()));
    });
}

#[test]
fn two_threads_that_overflow_at_once_leave_one_gap_that_closes() {
    model(3, || {
        let (vm, consumer) = Vm::new();
        let guests = [1_u64, 1].map(|value| {
            let vm = Arc::clone(&vm);
            thread::spawn(move || {
                vm.producer.enter_tracking(GapReason::Overflow);
                vm.guest_write(value)
            })
        });
        let told = guests.map(|guest| guest.join().expect("a guest")).into_iter().min().expect("two");
        vm.resync_pass();
        assert!(!vm.producer.ring().gap_is_open());
        assert_eq!(check(consumer, &[told]), Some(1));
    });
}

#[test]
fn a_failed_write_that_races_with_the_end_of_a_resync_is_read_back() {
    model(3, || {
        let (vm, consumer) = Vm::new();
        vm.producer.begin_gap(GapReason::ContentsChanged);
        let guest = {
            let vm = Arc::clone(&vm);
            thread::spawn(move || {
                let ticket = vm.producer.begin_write(chunk(), false).expect("a large ring");
                assert!(vm.producer.copy_in(&ticket, &[1]));
                // The disk wrote it and then answered with an error.
                vm.write_disk(1);
                vm.producer.fail(ticket);
                vm.producer.ring().captured_lsn()
            })
        };
        vm.resync_pass();
        let told = guest.join().expect("the guest");
        vm.resync_pass();
        vm.resync_pass();
        assert!(!vm.producer.ring().gap_is_open());
        assert_eq!(check(consumer, &[told]), Some(1));
    });
}
