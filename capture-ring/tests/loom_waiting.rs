//! Waiting for the agent under loom: whatever the interleaving, a request that waits for room is woken by the record that
//! is taken out, and a flush by the LSN that becomes durable. A wake-up that is lost is a deadlock, which loom reports.
#![cfg(loom)]
#![allow(clippy::arc_with_non_send_sync, reason = "loom runs its threads one at a time")]

use std::sync::Arc;
use std::time::Duration;

use capture_ring::{Bell, Consumer, HostClock, Next, Producer, Ring, RingConfig};
use journal_format::{ByteRange, DiskId, Epoch, Lsn};
use loom::thread;

fn ring() -> (Arc<Producer>, Consumer, Arc<Ring>) {
    let base = RingConfig::new(DiskId([1; 16]), Epoch(1), Lsn(1), 1 << 20);
    let arena_bytes = 2 * capture_ring::limits::SLAB_BYTES;
    let ring = Ring::for_loom(&RingConfig { slots: 4, arena_bytes, ..base });
    let clock = HostClock::for_loom();
    let producer = Arc::new(Producer::new(Arc::clone(&ring), clock.clone(), Bell::default()));
    (producer, Consumer::new(Arc::clone(&ring), clock), ring)
}

fn write(producer: &Producer) -> bool {
    let range = ByteRange::new(0, 1).expect("a valid range");
    let ticket = producer.begin_write(range, false);
    ticket.map(|ticket| producer.complete(ticket)).is_ok()
}

#[test]
fn a_request_that_waits_for_room_is_woken() {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(|| {
        let (producer, mut consumer, ring) = ring();
        while write(&producer) {}
        // The consumer stays on the model's own stack: its records are large for a thread's of loom.
        let guest = thread::spawn(move || {
            while !write(&producer) {
                ring.announce_waiter();
                while !ring.fits(1) {
                    let seen = ring.event();
                    if !ring.fits(1) {
                        ring.wait_event(seen, Duration::MAX);
                    }
                }
                ring.retract_waiter();
            }
        });
        let mut data = Vec::new();
        assert!(matches!(consumer.next(&mut data, u32::MAX), Ok(Next::Record(_))));
        consumer.return_credits();
        guest.join().expect("no panic");
    });
}

#[test]
fn a_flush_that_waits_for_durability_is_woken() {
    loom::model(|| {
        let (_, _, ring) = ring();
        let told = Arc::clone(&ring);
        let agent = thread::spawn(move || told.set_durable_lsn(Lsn(7)));
        ring.announce_waiter();
        while ring.durable_lsn() < Lsn(7) {
            let seen = ring.event();
            if ring.durable_lsn() < Lsn(7) {
                ring.wait_event(seen, Duration::MAX);
            }
        }
        ring.retract_waiter();
        agent.join().expect("no panic");
    });
}
