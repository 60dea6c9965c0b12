//! What `--drill` makes of an agent: each knob of `docs/operating/drills.md`, and that everything is whole after it.

mod common;

use std::time::{Duration, Instant};

use capture_ring::Mode;
use common::filter::DISK_BYTES;
use common::{Bench, noise, wait_for};

/// An agent with a drill, and when it began or earlier.
fn start(drill: &str, spool_mib: u64) -> (Bench, Instant) {
    let before = Instant::now();
    let bench = Bench::start_with(|config| {
        config.drill = Some(drill.parse().unwrap());
        (config.spool.limit_bytes, config.spool.drill) = (spool_mib << 20, config.drill.clone());
    });
    (bench, before)
}

/// Protects the disk, writes to it, and compares what arrives.
fn assert_works(bench: Bench) {
    let id = bench.protect();
    let disk = bench.filter.disk("virtio0");
    for number in 0..50 {
        disk.write(number * 65536, &noise(number, 20_000));
    }
    disk.resync();
    let captured = disk.producer().ring().captured_lsn().0;
    let journal =
        bench.server.wait_for_journal(&id, "everything captured", |journal| journal.durable >= captured);
    assert!(journal.image(DISK_BYTES) == *disk.image.lock().unwrap(), "the journal is not the disk");
    bench.agent.stop().unwrap();
}

#[test]
fn a_network_that_is_cut_is_there_before_and_after() {
    let (bench, before) = start("cut-for=2s@1s", 0);
    wait_for("a first connection", || (bench.server.connections() == 1).then_some(()));
    wait_for("a second one", || (bench.server.connections() == 2).then_some(()));
    assert!(before.elapsed() >= Duration::from_secs(3), "it came while the network was cut");
    assert_works(bench);
}

#[test]
fn nothing_is_sent_while_sending_stalls() {
    let (bench, before) = start("send-stall-for=3s@0s", 0);
    bench.disk();
    assert!(before.elapsed() >= Duration::from_secs(3), "it was told of before");
    assert_works(bench);
}

#[test]
fn nothing_is_taken_out_of_a_ring_while_drains_stall() {
    let (bench, before) = start("drain-stall-for=4s@0s", 0);
    let id = bench.protect();
    bench.server.wait_for_journal(&id, "its first record", |journal| journal.durable > 0);
    assert!(before.elapsed() >= Duration::from_secs(4), "it was taken before");
    assert_works(bench);
}

#[test]
fn a_stalled_drain_fills_the_ring_and_keeps_nobody_from_stopping() {
    let (bench, _) = start("drain-stall-for=100000s@0s", 0);
    bench.protect();
    let disk = bench.filter.disk("virtio0");
    for number in 0..300 {
        disk.write(number * 65536 % DISK_BYTES, &noise(number, 65536));
    }
    assert_eq!(disk.mode(), Mode::Tracking, "the ring has 16 MiB");
    bench.agent.stop().unwrap();
}

#[test]
fn a_spool_that_is_full_says_so() {
    let (bench, _) = start("spool-full-for=100000s@0s", 64);
    let id = bench.protect();
    let status = wait_for("a status that says so", || {
        bench.server.status(&id).filter(|status| !status.spool_trouble.is_empty())
    });
    assert!(status.spool_trouble.contains("drill: no space left"), "{}", status.spool_trouble);
    assert_works(bench);
}
