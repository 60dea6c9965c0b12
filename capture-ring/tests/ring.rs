//! The ring in one process: what is begun, copied and completed comes out, in order, byte for byte.
#![cfg(not(loom))]

use std::os::fd::AsFd;
use std::sync::Arc;

use capture_ring::{
    Bell, Consumer, Full, HostClock, Mode, Next, OpKind, Producer, Resync, Ring, RingConfig, RingErrorKind,
};
use journal_format::{ByteRange, DiskId, Epoch, GapReason, Lsn, Op, Record, Stamp};
use nix::sys::resource::{UsageWho, getrusage};

const MIB: u64 = 1 << 20;

fn config() -> RingConfig {
    let base = RingConfig::new(DiskId([7; 16]), Epoch(3), Lsn(41), 16 * MIB);
    RingConfig { arena_bytes: 8 * MIB, slots: 256, ..base }
}

fn range(offset: u64, length: u64) -> ByteRange {
    ByteRange::new(offset, length).expect("a valid range")
}

/// Both ends of one ring, the producer through its own mapping of the descriptor.
fn pair(config: &RingConfig) -> (Producer, Consumer) {
    let (ring, fd) = Ring::create(config).expect("create");
    let (clock, _clock_fd) = HostClock::create().expect("clock");
    let far = Ring::open(fd.as_fd()).expect("open");
    let bell = Bell::create().expect("bell");
    (Producer::new(far, clock.clone(), bell), Consumer::new(ring, clock))
}

fn take(consumer: &mut Consumer, data: &mut Vec<u8>) -> Record {
    match consumer.next(data, u32::MAX).expect("a healthy ring") {
        Next::Record(record) => record,
        other => panic!("expected a record, found {other:?}"),
    }
}

fn drain(consumer: &mut Consumer) -> Vec<Record> {
    let mut records = Vec::new();
    while let Next::Record(record) = consumer.next(&mut Vec::new(), u32::MAX).expect("a healthy ring") {
        records.push(record);
    }
    records
}

fn write(producer: &Producer, offset: u64, bytes: &[u8]) -> Lsn {
    let ticket = producer.begin_write(range(offset, bytes.len() as u64), false).expect("room");
    assert!(producer.copy_in(&ticket, bytes));
    producer.complete(ticket)
}

#[test]
fn a_write_comes_out_with_its_data_number_and_stamp() {
    let (producer, mut consumer) = pair(&config());
    let bytes: Vec<u8> = (0..5000_u32).map(|i| i as u8).collect();
    assert_eq!(write(&producer, 8192, &bytes), Lsn(41));
    let mut data = vec![0xee; 3];
    let record = take(&mut consumer, &mut data);
    assert_eq!(record.lsn, Lsn(41));
    assert_eq!(record.stamp, producer.clock().last());
    let Op::Write { range, data: span, fill: false, fua: false } = record.op else { panic!("{record:?}") };
    assert_eq!((range.offset(), range.length(), span.pos, span.len), (8192, 5000, 3, 5000));
    assert_eq!(data[3..], bytes);
    assert_eq!(consumer.next(&mut data, u32::MAX).expect("healthy"), Next::Empty);
}

#[test]
fn the_largest_write_is_split_into_pieces_and_joined_again() {
    let (producer, mut consumer) = pair(&config());
    // One small write first, so that the first slab is begun and 17 pieces are needed.
    write(&producer, 0, &[1; 512]);
    let bytes: Vec<u8> = (0..4 * MIB).map(|i| (i / 4096 + i) as u8).collect();
    let ticket = producer.begin_write(range(MIB, 4 * MIB), true).expect("room");
    assert_eq!(ticket.piece_count(), 17);
    assert_eq!(producer.pieces(&ticket).map(|piece| u64::from(piece.bytes)).sum::<u64>(), 4 * MIB);
    assert!(producer.pieces(&ticket).all(|piece| piece.data.as_ptr().addr().is_multiple_of(4096)));
    assert!(producer.copy_in(&ticket, &bytes));
    producer.complete(ticket);
    let mut data = Vec::new();
    take(&mut consumer, &mut data);
    data.clear();
    let record = take(&mut consumer, &mut data);
    assert!(matches!(record.op, Op::Write { fua: true, .. }));
    assert!(data == bytes, "the bytes differ");
}

#[test]
fn every_kind_of_record_comes_out_as_it_went_in() {
    let (producer, mut consumer) = pair(&config());
    for op in [
        OpKind::Zero { fua: true, may_unmap: true },
        OpKind::Discard,
        OpKind::Resize { disk_bytes: 32 * MIB },
    ] {
        let ticket = producer.begin_op(op, range(4096, 1 << 33)).expect("room");
        producer.complete(ticket);
    }
    producer.flush_record().expect("room");
    let (lsn, stamp) = producer.bookmark("vor dem Update ü").expect("room");
    producer.resized(48 * MIB).expect("room");
    let mut data = Vec::new();
    let records: Vec<Record> = (0..6).map(|_| take(&mut consumer, &mut data)).collect();
    assert_eq!(
        records[0].op,
        Op::Zero { range: range(4096, 1 << 33), fill: false, fua: true, may_unmap: true }
    );
    assert_eq!(records[1].op, Op::Discard { range: range(4096, 1 << 33) });
    assert_eq!(records[2].op, Op::Resize { disk_bytes: 32 * MIB });
    assert_eq!(records[3].op, Op::Flush);
    assert_eq!((records[4].lsn, records[4].stamp), (lsn, stamp));
    assert_eq!(data, "vor dem Update ü".as_bytes());
    assert_eq!(records[5].op, Op::Resize { disk_bytes: 48 * MIB });
    assert_eq!(producer.ring().disk_bytes(), 48 * MIB);
}

#[test]
fn a_completion_never_finds_the_ring_full() {
    let config = RingConfig { slots: 16, ..config() };
    let (producer, mut consumer) = pair(&config);
    let mut tickets = Vec::new();
    let full = loop {
        match producer.begin_write(range(0, 4096), false) {
            Ok(ticket) => tickets.push(ticket),
            Err(full) => break full,
        }
    };
    assert_eq!(full, Full::Slots);
    assert_eq!(tickets.len(), 12, "a quarter is kept for control records");
    producer.bookmark("b").expect("bookmarks may use half of the reserve");
    for ticket in tickets {
        producer.complete(ticket);
    }
    assert_eq!(drain(&mut consumer).len(), 13);
    assert!(producer.begin_write(range(0, 4096), false).is_ok());
}

#[test]
fn a_full_arena_comes_back_when_the_consumer_has_read_it() {
    let config = RingConfig { arena_bytes: MIB, slots: 1024, ..config() };
    let (producer, mut consumer) = pair(&config);
    for round in 0..20_u8 {
        let mut written = 0;
        while let Ok(ticket) = producer.begin_write(range(0, 20_000), false) {
            assert!(producer.copy_in(&ticket, &[round; 20_000]));
            producer.complete(ticket);
            written += 1;
        }
        assert!(written >= 50, "{written} writes of 5 units fit 256 units");
        assert_eq!(drain(&mut consumer).len(), written);
    }
}

#[test]
fn cancelled_and_failed_requests_leave_no_trace_but_dirt() {
    let (producer, mut consumer) = pair(&RingConfig { arena_bytes: MIB, ..config() });
    producer.attach().expect("new ring");
    drain(&mut consumer);
    while producer.ring().dirty().take_run(0, MIB).is_some() {}
    assert!(matches!(producer.finish_resync(), Resync::Done(_)));
    for _ in 0..1000 {
        producer.cancel(producer.begin_write(range(0, 300_000), false).expect("room"));
    }
    assert!(!producer.ring().dirty().any());
    producer.fail(producer.begin_write(range(3 * MIB, 100), false).expect("room"));
    let records = drain(&mut consumer);
    assert_eq!(records[1].op, Op::GapBegin { reason: GapReason::WriteFailed, generation: 2 });
    assert!(producer.ring().gap_is_open());
    assert_eq!(producer.ring().dirty().take_run(0, MIB), Some(range(3 * MIB, 65536)));
    assert!(matches!(producer.finish_resync(), Resync::Done(_)));
    assert_eq!(producer.finish_resync(), Resync::Whole);
}

#[test]
fn a_fill_keeps_the_number_it_got_before_the_read() {
    let (producer, mut consumer) = pair(&config());
    let fill = producer.reserve_fill(65536).expect("room");
    let hole = producer.reserve_fill(65536).expect("room");
    let late = write(&producer, 0, &[2; 4096]);
    assert_eq!(consumer.next(&mut Vec::new(), u32::MAX).expect("healthy"), Next::Empty);
    assert!(producer.copy_in_fill(&fill, &[1; 40_000]));
    let early = producer.complete_fill_write(fill, range(0, 40_000)).expect("it fits");
    assert_eq!((early, late), (Lsn(41), Lsn(43)));
    producer.complete_fill_zero(hole, range(MIB, 8 * MIB)).expect("not empty");
    let mut data = Vec::new();
    assert!(matches!(take(&mut consumer, &mut data).op, Op::Write { fill: true, .. }));
    assert_eq!(data, [1; 40_000]);
    let zero = take(&mut consumer, &mut data).op;
    assert_eq!(zero, Op::Zero { range: range(MIB, 8 * MIB), fill: true, fua: false, may_unmap: false });
    assert!(matches!(take(&mut consumer, &mut data).op, Op::Write { fill: false, .. }));
}

#[test]
fn an_overflow_goes_to_tracking_and_a_resync_closes_its_gap() {
    let (producer, mut consumer) = pair(&config());
    producer.attach().expect("new ring");
    producer.enter_tracking(GapReason::Overflow);
    assert_eq!(producer.ring().mode().mode, Mode::Tracking);
    while producer.ring().dirty().take_run(0, MIB).is_some() {}
    let tracked = producer.begin_tracked(range(MIB, 4096)).expect("tracking");
    assert!(producer.try_resume());
    assert!(producer.begin_tracked(range(0, 1)).is_none());
    assert_eq!(producer.finish_resync(), Resync::Busy);
    assert_eq!(producer.ring().dirty().take_run(0, MIB), Some(range(MIB, 65536)));
    producer.end_tracked(tracked);
    assert_eq!(producer.finish_resync(), Resync::Dirty, "marked again at its end");
    let fill = producer.reserve_fill(65536).expect("room");
    assert!(producer.ring().dirty().take_run(0, MIB).is_some());
    assert_eq!(producer.finish_resync(), Resync::Dirty, "a fill is under way");
    producer.complete_fill_zero(fill, range(MIB, 65536)).expect("not empty");
    let Resync::Done(end) = producer.finish_resync() else { panic!("everything is copied") };
    let ops: Vec<Op> = drain(&mut consumer).iter().map(|record| record.op).collect();
    assert_eq!(ops[0], Op::GapBegin { reason: GapReason::Attach, generation: 1 });
    assert_eq!(ops[1], Op::GapBegin { reason: GapReason::Overflow, generation: 2 });
    assert_eq!(ops.last(), Some(&Op::GapEnd { generation: 2 }));
    assert_eq!(end, consumer.next_lsn().prev());
}

#[test]
fn an_epoch_begins_for_the_reason_that_its_ring_was_made_with() {
    for reason in [GapReason::Attach, GapReason::AgentLost, GapReason::FilterFault, GapReason::UncleanEnd] {
        let (producer, mut consumer) = pair(&RingConfig { begins: reason, ..config() });
        producer.attach().expect("new ring");
        assert_eq!(drain(&mut consumer)[0].op, Op::GapBegin { reason, generation: 1 });
        assert_eq!(producer.ring().mode().reason, Some(reason));
    }
}

#[test]
fn what_a_dead_producer_left_is_void_and_dirty() {
    let (producer, mut consumer) = pair(&config());
    let open = producer.begin_write(range(5 * MIB, 600_000), false).expect("room");
    let fill = producer.reserve_fill(4096).expect("room");
    write(&producer, 0, &[9; 10]);
    drop((open, fill, producer));
    consumer.close_dead().expect("a sane tail");
    let records = drain(&mut consumer);
    let ops: Vec<Op> = records.iter().map(|record| record.op).collect();
    assert!(matches!(ops[..], [Op::Void, Op::Write { .. }]), "{ops:?}");
    assert_ne!(records[0].stamp, Stamp::ZERO, "no record may have it");
    assert_eq!(consumer.issued_ranges().expect("sane headers"), [range(5 * MIB, 600_000)]);
}

/// Not even the reserve has a slot for the gap record: the loss is said in the header, and the guest goes on.
#[test]
fn a_loss_that_no_record_can_tell_ends_the_epoch_where_it_happened() {
    let (producer, mut consumer) = pair(&RingConfig { slots: 16, ..config() });
    producer.attach().expect("new ring");
    while producer.resized(16 * MIB).is_ok() {}
    producer.enter_tracking(GapReason::Overflow);
    assert_eq!(producer.ring().mode().mode, Mode::Off);
    assert!(producer.begin_tracked(range(0, 4096)).is_none());
    let taken = (0..16).map(|_| take(&mut consumer, &mut Vec::new())).count();
    assert_eq!(taken, 16, "what came before the loss is good");
    for _ in 0..2 {
        let error =
            consumer.next(&mut Vec::new(), u32::MAX).expect_err("nothing behind the loss may be used");
        assert_eq!((error.kind(), error.lsn()), (RingErrorKind::Stopped, Some(Lsn(41 + 16))));
        let _ = producer.flush_record();
    }
}

#[test]
fn a_range_beyond_the_bitmap_ends_capture_rather_than_being_forgotten() {
    let (producer, _consumer) = pair(&config());
    producer.attach().expect("new ring");
    producer.mark_dirty(range(1 << 40, 1));
    assert_eq!(producer.ring().mode().mode, Mode::Off);
}

#[test]
fn a_record_that_does_not_fit_stays() {
    let (producer, mut consumer) = pair(&config());
    write(&producer, 0, &[1; 4096]);
    let mut data = Vec::new();
    assert_eq!(consumer.next(&mut data, 4095).expect("healthy"), Next::NoRoom(4096));
    assert!(data.is_empty() && consumer.is_ready());
    take(&mut consumer, &mut data);
}

#[test]
fn a_sleeping_consumer_is_woken_by_the_record_it_awaits() {
    let (ring, _fd) = Ring::create(&config()).expect("create");
    let (clock, _clock_fd) = HostClock::create().expect("clock");
    let bell = Bell::create().expect("bell");
    let producer = Producer::new(Arc::clone(&ring), clock.clone(), bell.duplicate().expect("dup"));
    let mut consumer = Consumer::new(ring, clock);
    assert!(consumer.arm_sleep());
    let writer = std::thread::spawn(move || write(&producer, 0, &[1; 4096]));
    // Without the ring of the bell this waits for ever, and the test times out.
    bell.wait(std::time::Duration::MAX);
    consumer.disarm_sleep();
    writer.join().expect("the writer");
    assert!(!consumer.arm_sleep(), "a record is there");
}

#[test]
fn stamps_never_run_backwards_and_follow_the_wall() {
    let (clock, fd) = HostClock::create().expect("clock");
    let far = HostClock::open(fd.as_fd()).expect("open");
    let before = clock.now();
    assert!(far.now() > before);
    let raised = Stamp(before.0 + 3_600_000_000_000);
    far.raise_to(raised);
    assert!(clock.now() > raised);
    assert!(before.0 > 1_700_000_000_000_000_000, "nanoseconds since 1970");
}

/// Page faults of this thread while it fills a new ring with 200 writes of 64 KiB, after both sides have prepared.
fn faults_of_writes(prepare: impl FnOnce(&Ring, &Ring)) -> i64 {
    let arena_bytes = 200 * (64 << 10);
    let (near, fd) = Ring::create(&RingConfig { slots: 1024, arena_bytes, ..config() }).expect("create");
    let (clock, _clock_fd) = HostClock::create().expect("clock");
    let far = Ring::open(fd.as_fd()).expect("open");
    prepare(&near, &far);
    let producer = Producer::new(far, clock, Bell::create().expect("bell"));
    let faults = || getrusage(UsageWho::RUSAGE_THREAD).expect("usage").minor_page_faults();
    let before = faults();
    for number in 0..200 {
        write(&producer, number << 16, &[1; 64 << 10]);
    }
    faults() - before
}

#[test]
fn a_warm_rings_first_writes_touch_no_new_page() {
    let (cold, warm) = (faults_of_writes(|_, _| ()), faults_of_writes(|_, far| far.warm()));
    // 3200 pages are written, some of the tables; under a sanitizer each has others beside it, warm or not.
    assert!(cold - warm > 3000, "{warm} page faults, {cold} without warming");
}

#[test]
fn a_ring_whose_memory_was_provided_is_mapped_in_huge_pages() {
    // The other side maps an extent of 2 MiB with the first fault in it, if it is one page.
    let (cold, huge) = (faults_of_writes(|_, _| ()), faults_of_writes(|near, _| near.provide()));
    assert!(
        cold - huge > 2500,
        "{huge} page faults, {cold} before; needs Linux 6.1 and memory for huge pages"
    );
}

#[test]
fn a_consumer_holds_much_by_slots_by_memory_and_in_large_rings() {
    // A quarter of the slots; a quarter of the arena; 4 MiB; 4096 records.
    for (slots, arena_bytes, most) in
        [(256, 8 * MIB, 64), (4096, MIB, 64), (8192, 64 * MIB, 1024), (16384, 64 * MIB, 1024)]
    {
        let (producer, mut consumer) = pair(&RingConfig { slots, arena_bytes, ..config() });
        for number in 0..most {
            assert!(!consumer.holds_much(), "{number} records of 4 KiB are held");
            write(&producer, 0, &[1; 512]);
            assert!(matches!(consumer.copy(&mut Vec::new(), u32::MAX), Ok(Next::Record(_))));
        }
        assert!(consumer.holds_much());
        consumer.free(consumer.next_lsn().prev().prev(), |_, _| {});
        assert!(!consumer.holds_much(), "one is left");
        assert_eq!(producer.ring().backlog(), 1 + (most - 1) % 64);
        consumer.free(Lsn::MAX, |_, _| {});
        consumer.return_credits();
        assert_eq!(producer.ring().backlog(), 0);
    }
}

/// Stops a consumer at the piece of that number that it frees, before it `noted` which or after, and has another take
/// over: how many writes of 64 KiB the arena takes then. `None` when it did not stop.
fn taken_over(stop_at: u32, noted: bool) -> Option<u64> {
    let (ring, fd) = Ring::create(&config()).expect("create");
    let (clock, _clock_fd) = HostClock::create().expect("clock");
    let far = Ring::open(fd.as_fd()).expect("open");
    let producer = Producer::new(far, clock.clone(), Bell::create().expect("bell"));
    let mut consumer = Consumer::new(Arc::clone(&ring), clock.clone());
    let lengths = [512, 4 << 20, 4096, 300_000, 300_000, 70_000];
    for (number, length) in lengths.into_iter().enumerate() {
        write(&producer, number as u64 * 8192, &vec![number as u8; length]);
    }
    producer.flush_record().expect("room");
    let (mut data, mut taken) = (Vec::new(), Lsn(0));
    for _ in 0..5 {
        let Next::Record(record) = consumer.copy(&mut data, u32::MAX).expect("a healthy ring") else {
            panic!("five records are there");
        };
        (taken, data) = (record.lsn, Vec::new());
    }
    let (mut calls, mut last) = (0, (Lsn(0), 0));
    let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        consumer.free(taken, |lsn, piece| {
            let stops = calls == stop_at;
            if noted || !stops {
                last = (lsn, piece);
            }
            if stops {
                std::panic::resume_unwind(Box::new("stopped"));
            }
            calls += 1;
        });
    }));
    drop(consumer);
    let mut consumer =
        Consumer::adopt(ring, clock, taken.next(), Stamp(1), last, |_, _| {}).expect("its ring");
    // What was not taken out is there; what is free is so once.
    assert_eq!(consumer.next(&mut data, u32::MAX).map(|_| data.clone()).expect("healthy"), vec![5; 70_000]);
    assert_eq!(drain(&mut consumer).len(), 1, "the flush");
    let mut written = 0;
    while let Ok(ticket) = producer.begin_write(range(0, 64 << 10), false) {
        assert!(producer.copy_in(&ticket, &[written as u8; 64 << 10]));
        producer.complete(ticket);
        written += 1;
    }
    for number in 0..written {
        data.clear();
        take(&mut consumer, &mut data);
        assert!(data == vec![number as u8; 64 << 10], "write {number}: its memory belongs to another, too");
    }
    ended.err().map(|_| written)
}

/// A consumer may be stopped before it says which piece it frees next, and after.
#[test]
fn stopped_while_freeing_another_frees_the_rest_and_nothing_twice() {
    let all = 8 * MIB / (64 << 10);
    let mut stops = 0;
    while let Some(written) = taken_over(stops, false) {
        // (One slab is begun.)
        assert!(written + 4 >= all, "stopped before {stops}: room for {written} of {all}");
        // The piece in doubt is left alone, and its slab with it.
        let written = taken_over(stops, true).expect("it stops there, too");
        assert!(written + 8 >= all, "stopped at {stops}: room for {written} of {all}");
        stops += 1;
    }
    assert!(stops > 20, "the largest write alone has 17 pieces");
}
