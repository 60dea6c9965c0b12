//! What the ring costs a guest's 4 KiB write: begin, copy, complete, in nanoseconds per write, without and with a
//! consumer that keeps up on another thread.
//!
//! `cargo run -p capture-ring --release --example tee [-- rounds]`. Pin it (`taskset -c 0,1`) and compare medians of
//! the same run only; `docs/formats/ring.md` says what to expect.
#![cfg(not(loom))]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use capture_ring::{Bell, Consumer, HostClock, Next, Producer, Ring, RingConfig};
use journal_format::{ByteRange, DiskId, Epoch, Lsn};

const WRITES: u64 = 200_000;
const POLL: Duration = Duration::from_micros(50);

fn ends() -> (Producer, Consumer) {
    let config = RingConfig::new(DiskId([1; 16]), Epoch(1), Lsn(1), 1 << 40);
    let (ring, _fd) = Ring::create(&config).expect("a ring");
    let (clock, _fd) = HostClock::create().expect("a clock");
    let producer = Producer::new(Arc::clone(&ring), clock.clone(), Bell::create().expect("a bell"));
    (producer, Consumer::new(ring, clock))
}

/// One guest write; false when the ring is full.
fn write(producer: &Producer, number: u64, bytes: &[u8]) -> bool {
    let range = ByteRange::new(number % (1 << 20) * 4096, bytes.len() as u64).expect("a valid range");
    let Ok(ticket) = producer.begin_write(range, false) else { return false };
    assert!(producer.copy_in(&ticket, bytes));
    producer.complete(ticket);
    true
}

fn drain(consumer: &mut Consumer, data: &mut Vec<u8>) -> u64 {
    let mut taken = 0;
    loop {
        match consumer.next(data, 512 << 10).expect("a healthy ring") {
            Next::Record(_) => taken += 1,
            Next::NoRoom(_) => {}
            Next::Empty => return taken,
        }
        if data.len() > (508 << 10) {
            data.clear();
        }
    }
}

/// Producer and consumer take turns on one thread: what the instructions cost, without traffic between cores.
fn alone(producer: &Producer, consumer: &mut Consumer, bytes: &[u8]) -> f64 {
    let mut data = Vec::new();
    let mut spent = Duration::ZERO;
    for batch in 0..WRITES / 64 {
        let start = Instant::now();
        for number in batch * 64..(batch + 1) * 64 {
            assert!(write(producer, number, bytes));
        }
        spent += start.elapsed();
        drain(consumer, &mut data);
    }
    spent.as_nanos() as f64 / WRITES as f64
}

/// A consumer polls on another thread, as the agent does; `pause_ns` is the rest of the guest's work per write.
/// Returns the cost per write (the pause taken off) and how many writes found the ring full.
fn together(producer: &Producer, consumer: &mut Consumer, bytes: &[u8], pause_ns: u64) -> (f64, u64) {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut data = Vec::new();
            while !done.load(Ordering::Acquire) {
                if drain(consumer, &mut data) == 0 {
                    std::thread::sleep(POLL);
                }
            }
        });
        let (mut full, mut paused) = (0, Duration::ZERO);
        let start = Instant::now();
        for number in 0..WRITES {
            while !write(producer, number, bytes) {
                full += 1;
                std::thread::yield_now();
            }
            if pause_ns > 0 {
                let from = Instant::now();
                while (from.elapsed().as_nanos() as u64) < pause_ns {
                    std::hint::spin_loop();
                }
                paused += from.elapsed();
            }
        }
        let spent = start.elapsed() - paused;
        done.store(true, Ordering::Release);
        (spent.as_nanos() as f64 / WRITES as f64, full)
    })
}

/// The copy alone, into 1 MiB used again and again: what the rest is measured against.
fn copy_only(bytes: &[u8]) -> f64 {
    let mut arena = vec![0_u8; 1 << 20];
    let start = Instant::now();
    for number in 0..WRITES as usize {
        let at = number * bytes.len() % (arena.len() - bytes.len());
        arena[at..at + bytes.len()].copy_from_slice(bytes);
        std::hint::black_box(&mut arena);
    }
    start.elapsed().as_nanos() as f64 / WRITES as f64
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let rounds: usize = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(7);
    let bytes = vec![0x5a_u8; 4096];
    let mut columns: [Vec<f64>; 5] = Default::default();
    let mut full = 0;
    // One ring for all rounds, used once before: what is measured is a ring that has run for a while.
    let (producer, mut consumer) = ends();
    together(&producer, &mut consumer, &bytes, 0);
    drain(&mut consumer, &mut Vec::new());
    for _ in 0..rounds {
        columns[0].push(copy_only(&bytes));
        columns[1].push(alone(&producer, &mut consumer, &bytes));
        for (column, pause_ns) in [(2, 0), (3, 500), (4, 2000)] {
            let (cost, overruns) = together(&producer, &mut consumer, &bytes, pause_ns);
            drain(&mut consumer, &mut Vec::new());
            columns[column].push(cost);
            full += if pause_ns > 0 { overruns } else { 0 };
        }
    }
    let names = [
        "copy only",
        "begin, copy, complete; consumer idle",
        "with a live consumer, no pause (saturated)",
        "with a live consumer, 500 ns between writes",
        "with a live consumer, 2 us between writes",
    ];
    println!("ns per 4 KiB write, median of {rounds} rounds of {WRITES} writes");
    for (name, column) in names.iter().zip(columns) {
        println!("{:8.0}  {name}", median(column));
    }
    println!("{full:8}  writes that found the ring full (paced runs)");
}
