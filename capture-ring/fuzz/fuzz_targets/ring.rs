//! A ring whose memory says anything: the agent takes records that keep every rule, or an error, and comes to an end.
//!
//! The ring begins with a few honest records. The input is a list of changes to its memory, 11 bytes each: where (three
//! bytes, in words of eight, from the start of the header to the start of the arena) and the word to write there; after
//! each, some records are taken.
#![no_main]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use capture_ring::{Bell, Consumer, HostClock, Next, OpKind, Producer, Ring, RingConfig};
use journal_format::limits::{MAX_BOOKMARK_BYTES, MAX_RECORD_DATA_BYTES};
use journal_format::record::RawRecord;
use journal_format::{ByteRange, DiskId, Epoch, Lsn, Op, Stamp};

/// Records that may be taken after one change, at most: a consumer that finds more than the ring has slots for turns
/// in circles.
const STEPS: usize = 300;

fn fill(ring: &Arc<Ring>, clock: &HostClock) {
    let producer = Producer::new(Arc::clone(ring), clock.clone(), Bell::create().expect("a bell"));
    for (offset, length) in [(0, 512), (4096, 70_000), (1 << 20, 4096)] {
        let range = ByteRange::new(offset, length).expect("a range");
        let ticket = producer.begin_write(range, offset == 0).expect("room");
        assert!(producer.copy_in(&ticket, &vec![7; length as usize]));
        producer.complete(ticket);
        let ticket = producer.begin_op(OpKind::Discard, range).expect("room");
        producer.complete(ticket);
    }
    // In flight, for ever.
    let _ = producer.begin_write(ByteRange::new(8192, 9000).expect("a range"), false);
}

/// Takes records as the agent does; false when the ring is refused.
fn take(consumer: &mut Consumer, steps: usize) -> bool {
    let mut data = Vec::new();
    for step in 0..steps {
        data.clear();
        match consumer.copy(&mut data, if step % 3 == 0 { 5000 } else { u32::MAX }) {
            Ok(Next::Record(record)) => {
                if step % 5 == 0 || consumer.holds_much() {
                    consumer.free(record.lsn, |_, _| {});
                }
                let again = RawRecord::encode(&record).decode(record.lsn).expect("a record keeps every rule");
                assert_eq!(again.op, record.op);
                let most = match record.op {
                    Op::Write { .. } => MAX_RECORD_DATA_BYTES,
                    Op::Bookmark { .. } => MAX_BOOKMARK_BYTES,
                    _ => 0,
                };
                assert!(data.len() <= most as usize);
            }
            Ok(Next::Empty) => return true,
            Ok(Next::NoRoom(bytes)) => assert!(bytes > 5000 && bytes <= MAX_RECORD_DATA_BYTES),
            Err(_) => return false,
        }
    }
    panic!("{steps} records out of a ring of 64 slots");
}

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let config = RingConfig::new(DiskId([3; 16]), Epoch(1), Lsn(1), 1 << 24);
    let (ring, fd) = Ring::create(&RingConfig { arena_bytes: 1 << 20, slots: 64, ..config }).expect("a ring");
    let (clock, _) = HostClock::create().expect("a clock");
    fill(&ring, &clock);
    let (file, words) = (File::from(fd), ring.geometry().arena_at / 8);
    let mut consumer = Consumer::new(Arc::clone(&ring), clock.clone());
    for change in input.chunks_exact(11).take(64) {
        let (place, word) = change.split_at(3);
        let place = u64::from(place[0]) | u64::from(place[1]) << 8 | u64::from(place[2]) << 16;
        file.write_all_at(word, place % words * 8).expect("written");
        let _ = (ring.captured_lsn(), ring.backlog(), ring.arena_used_bytes(), ring.dirty().bytes());
        if !take(&mut consumer, STEPS) {
            break;
        }
    }
    let _ = consumer.close_dead();
    let _ = take(&mut consumer, STEPS);
    let _ = consumer.issued_ranges();
    // The next agent, with what an outbox says that may be a lie, too.
    let [next, lsn, piece] = *input.last_chunk().unwrap_or(&[3, 2, 1]);
    let freed = (Lsn(u64::from(lsn)), piece);
    let adopted = Consumer::adopt(ring, clock, Lsn(u64::from(next)), Stamp(1), freed, |_, _| {});
    if let Ok(mut consumer) = adopted {
        let _ = take(&mut consumer, STEPS);
    }
});
