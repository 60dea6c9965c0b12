//! The dirty bitmap against a set of chunks, under random marks and takes.
#![cfg(not(loom))]

use std::collections::BTreeSet;
use std::sync::Arc;

use capture_ring::{Bell, HostClock, Producer, Ring, RingConfig};
use journal_format::{ByteRange, DiskId, Epoch, Lsn};
use proptest::prelude::*;

const CHUNK: u64 = 65536;

#[derive(Clone, Debug)]
enum Step {
    Mark(u64, u64),
    Take(u64, u64),
}

fn step(disk_bytes: u64) -> impl Strategy<Value = Step> {
    let length = prop_oneof![Just(0), Just(1), 1..CHUNK, 1..200 * CHUNK];
    prop_oneof![
        (0..disk_bytes, length).prop_map(move |(at, length)| Step::Mark(at, length.min(disk_bytes - at))),
        (0..disk_bytes, prop_oneof![Just(1), Just(CHUNK), 1..300 * CHUNK])
            .prop_map(|(from, most)| Step::Take(from, most)),
    ]
}

fn producer(disk_bytes: u64) -> Producer {
    let base = RingConfig::new(DiskId([1; 16]), Epoch(1), Lsn(1), disk_bytes);
    let (ring, _fd) = Ring::create(&RingConfig { arena_bytes: 1 << 20, slots: 64, ..base }).expect("a ring");
    Producer::new(Arc::clone(&ring), HostClock::create().expect("a clock").0, Bell::create().expect("a bell"))
}

proptest! {
    #[test]
    fn the_bitmap_is_a_set_of_chunks(
        (disk_bytes, steps) in (1_u64..500 * CHUNK).prop_flat_map(|disk_bytes| {
            (Just(disk_bytes), proptest::collection::vec(step(disk_bytes), 1..40))
        })
    ) {
        let producer = producer(disk_bytes);
        let dirty = producer.ring().dirty();
        let mut model = BTreeSet::new();
        for step in steps {
            match step {
                Step::Mark(at, length) => {
                    prop_assert!(dirty.mark(ByteRange::new(at, length).expect("a valid range")));
                    if length > 0 {
                        model.extend(at / CHUNK..=(at + length - 1) / CHUNK);
                    }
                }
                Step::Take(from, most) => {
                    let taken = dirty.take_run(from, most);
                    let first = model.range(from / CHUNK..).next().copied();
                    prop_assert_eq!(taken.map(ByteRange::offset), first.map(|chunk| chunk * CHUNK));
                    if let (Some(taken), Some(first)) = (taken, first) {
                        let limit = first + (most / CHUNK).max(1);
                        let end = (first..limit).find(|chunk| !model.contains(chunk)).unwrap_or(limit);
                        prop_assert_eq!(taken.end(), (end * CHUNK).min(disk_bytes));
                        model.retain(|chunk| !(first..end).contains(chunk));
                    }
                }
            }
            prop_assert_eq!(dirty.any(), !model.is_empty());
            prop_assert_eq!(dirty.bytes(), (model.len() as u64 * CHUNK).min(disk_bytes));
        }
    }
}
