//! What the filter does for one write, without QEMU: the engine, the copy, and both beside a consumer that reads the ring from
//! another core. In bursts that the consumer follows.
#![allow(unsafe_code)]

use std::hint::black_box;
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use capture_ring::{Bell, Consumer, HostClock, Mode, Next, Ring, RingConfig};
use cdp_filter::engine::{Begin, Capture, InFlight, Outcome, Request, Runtime, WaitToken};
use cdp_filter::ffi::copy::copy_in;
use cdp_tests::wait_for;
use journal_format::{DiskId, Epoch, Lsn};
use nix::libc::iovec;

use crate::Effort;
use crate::machine::{self, GUEST_CORE, SINK_CORE};
use crate::report::{Report, Row};
use crate::variants::{PATTERNS, Pattern};

const DISK_BYTES: u64 = 1 << 30;
/// From one write to the next, in writes.
const STRIDE: u64 = 1021;
/// How long a burst lasts, and the pause behind it, in which the consumer catches up.
const BURST: Duration = Duration::from_millis(1);
const PAUSE: Duration = Duration::from_millis(8);
/// Memory that is written in one burst and read by the other core in the pause: what an agent that keeps up leaves in use.
const ACROSS_BYTES: u64 = 1 << 20;
/// Writes between two looks at the clock.
const WRITES_PER_LOOK: u64 = 8;
/// As the agent: its pause between two looks at the ring, and its memory for a frame.
const POLL: Duration = Duration::from_micros(75);
const FRAME_BYTES: usize = 512 << 10;

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    /// The data's copy alone, to and from memory that is in the cache: what no tee can do without.
    Copy,
    /// The engine alone: a request without data.
    Engine,
    /// A captured write: both.
    Write,
}

/// What is measured, by its name; `None` for the copy alone into memory that the other core has read: what no tee can do without
/// whose other end is there.
const STEPS: [(&str, Option<Step>); 4] = [
    ("a copy within the cache", Some(Step::Copy)),
    ("a copy to what the other core has read", None),
    ("qemu-cdp, a request without data", Some(Step::Engine)),
    ("qemu-cdp, a write", Some(Step::Write)),
];

pub(crate) fn run(effort: Effort, report: &mut Report) {
    let bursts = if effort.patient { 100 } else { 20 };
    for pattern in &PATTERNS[..3] {
        for round in 0..effort.rounds {
            report.begin_round(effort);
            for (name, step) in STEPS {
                // A thread of its own, which is all that is pinned.
                let measured = thread::scope(|scope| {
                    scope
                        .spawn(|| {
                            machine::pin_thread(GUEST_CORE);
                            match step {
                                Some(step) => measure(step, *pattern, bursts),
                                None => across(*pattern, bursts),
                            }
                        })
                        .join()
                });
                let mut row = Row::new("the filter alone", "memory", pattern.name, name, round);
                row.set("ns_per_write", measured.expect("a measurement"));
                report.add(row);
            }
        }
    }
}

/// The median of the bursts, in ns a write.
fn measure(step: Step, pattern: Pattern, bursts: usize) -> f64 {
    let config = RingConfig::new(DiskId([1; 16]), Epoch(1), Lsn(1), DISK_BYTES);
    let (ring, ring_fd) = Ring::create(&config).expect("a ring");
    // As the agent does.
    ring.provide();
    let (clock, clock_fd) = HostClock::create().expect("a clock");
    let bell = Bell::create().expect("a bell");
    let bell_fd = bell.as_fd().try_clone_to_owned().expect("a descriptor");
    let capture = Capture::attach(ring_fd.as_fd(), clock_fd.as_fd(), bell_fd, Runtime::real(nobody_waits))
        .expect("a capture");
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let _stop = Stop(&stop);
        let consumer = Consumer::new(Arc::clone(&ring), clock);
        scope.spawn(|| consume(consumer, &stop));
        let mut guest = Guest::new(step, pattern, &capture);
        let mut times: Vec<f64> = (0..bursts)
            .map(|_| {
                thread::sleep(PAUSE);
                wait_for("the consumer to catch up", || (ring.backlog() == 0).then_some(()));
                guest.burst()
            })
            .collect();
        assert_eq!(capture.mode(), Mode::Capturing, "a burst is far smaller than the ring");
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    })
}

/// The copy alone, into memory that a thread of the other core reads in each pause; the median of the bursts, in ns a write.
fn across(pattern: Pattern, bursts: usize) -> f64 {
    let memory = Mutex::new(Buffer::new(ACROSS_BYTES, 0));
    let (is_written, is_read) = (Barrier::new(2), Barrier::new(2));
    let data = Buffer::new(pattern.bytes, 1);
    thread::scope(|scope| {
        scope.spawn(|| {
            machine::pin_thread(SINK_CORE);
            for _ in 0..bursts {
                is_written.wait();
                black_box(
                    memory.lock().expect("a lock").bytes().iter().map(|&byte| u64::from(byte)).sum::<u64>(),
                );
                is_read.wait();
            }
        });
        let burst = || {
            let mut memory = memory.lock().expect("a lock");
            let began = Instant::now();
            memory.bytes_mut().chunks_exact_mut(pattern.bytes as usize).for_each(|to| {
                to.copy_from_slice(black_box(data.bytes()));
            });
            began.elapsed().as_secs_f64() * 1e9 / (ACROSS_BYTES / pattern.bytes) as f64
        };
        let mut times: Vec<f64> = (0..bursts)
            .map(|_| {
                is_written.wait();
                is_read.wait();
                burst()
            })
            .collect();
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    })
}

/// Stops the consumer however the measurement ends.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        // ORDERING: Relaxed: the flag stands alone.
        self.0.store(true, Ordering::Relaxed);
    }
}

fn nobody_waits(_: WaitToken) {
    unreachable!("no two writes overlap");
}

/// Takes records out as the agent does.
fn consume(mut consumer: Consumer, stop: &AtomicBool) {
    machine::pin_thread(SINK_CORE);
    let mut frame = Vec::with_capacity(2 * FRAME_BYTES);
    // ORDERING: Relaxed: the flag stands alone.
    while !stop.load(Ordering::Relaxed) {
        while let Next::Record(_) = consumer.next(&mut frame, u32::MAX).expect("a ring") {
            if frame.len() >= FRAME_BYTES {
                frame.clear();
            }
        }
        thread::sleep(POLL);
    }
}

/// The requests of a guest, as many in flight as the pattern says.
struct Guest<'a> {
    step: Step,
    capture: &'a Capture,
    bytes: u64,
    in_flight: Vec<InFlight>,
    /// One buffer for each.
    buffers: Vec<Buffer>,
    copy: Buffer,
    writes: u64,
}

impl<'a> Guest<'a> {
    fn new(step: Step, pattern: Pattern, capture: &'a Capture) -> Self {
        let depth = pattern.depth as usize;
        let mut guest = Self {
            step,
            capture,
            bytes: pattern.bytes,
            in_flight: (0..depth).map(|_| InFlight::default()).collect(),
            buffers: (0..depth).map(|at| Buffer::new(pattern.bytes, at as u8 + 1)).collect(),
            copy: Buffer::new(pattern.bytes, 0),
            writes: 0,
        };
        (0..depth).for_each(|at| guest.begin(at));
        guest
    }

    /// Nanoseconds a write.
    fn burst(&mut self) -> f64 {
        let (began, before) = (Instant::now(), self.writes);
        while began.elapsed() < BURST {
            for _ in 0..WRITES_PER_LOOK {
                let at = (self.writes % self.in_flight.len() as u64) as usize;
                if self.step != Step::Copy {
                    self.capture.finish(&mut self.in_flight[at], Outcome::Succeeded);
                }
                self.begin(at);
            }
        }
        began.elapsed().as_secs_f64() * 1e9 / (self.writes - before) as f64
    }

    fn begin(&mut self, at: usize) {
        let offset = self.writes * STRIDE * self.bytes % DISK_BYTES;
        self.writes += 1;
        let buffer = self.buffers[at].bytes();
        let request = match self.step {
            Step::Copy => {
                self.copy.bytes_mut().copy_from_slice(buffer);
                black_box(self.copy.bytes());
                return;
            }
            Step::Engine => Request::zero(offset, self.bytes, false, false),
            Step::Write => Request::write(offset, self.bytes, false),
        };
        let in_flight = &mut self.in_flight[at];
        assert!(self.capture.begin(&request, WaitToken(at), in_flight) == Begin::Go, "no two writes overlap");
        let pieces = in_flight.pieces();
        if !pieces.is_empty() {
            let list = iovec { iov_base: buffer.as_ptr() as *mut _, iov_len: buffer.len() };
            // SAFETY: one entry, which describes a live slice; the request has begun and not finished.
            let copied = unsafe { copy_in(pieces, &raw const list, 1, 0) };
            assert_eq!(copied, buffer.len(), "all of it");
        }
    }
}

/// Memory that begins a page, as a guest's buffers do: copies between other places in a page can be ten times slower.
struct Buffer {
    memory: Vec<u8>,
    from: usize,
}

impl Buffer {
    const PAGE: usize = 4096;

    fn new(bytes: u64, byte: u8) -> Self {
        let memory = vec![byte; bytes as usize + Self::PAGE];
        let from = memory.as_ptr().align_offset(Self::PAGE);
        Self { memory, from }
    }

    fn bytes(&self) -> &[u8] {
        &self.memory[self.from..][..self.memory.len() - Self::PAGE]
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        let length = self.memory.len() - Self::PAGE;
        &mut self.memory[self.from..][..length]
    }
}
