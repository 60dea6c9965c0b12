//! What the tee costs a guest's 4 KiB write, in nanoseconds: begin, copy, finish, with a live consumer thread.
//!
//! ```text
//! cargo run --release -p qemu-filter --example tee_cost [MILLION_WRITES]
//! ```
//!
//! Pins the writer to one core and the consumer to another (as far as there are two). A guest's disk gives the consumer
//! time between writes; here it gets that time between bursts of 64 writes, which is not counted. Prints the median and
//! the extremes of several rounds at depth 1 and 32, for a buffer that is in the cache.
#![allow(unsafe_code)]

use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use capture_ring::{Bell, Consumer, HostClock, Next, Ring, RingConfig};
use cdp_filter::engine::{Begin, Capture, InFlight, Mode, Outcome, Request, Runtime, WaitToken};
use cdp_filter::ffi::copy::copy_in;
use journal_format::{DiskId, Epoch, Lsn};

const BYTES: usize = 4096;
const DISK_BYTES: u64 = 1 << 30;
const ROUNDS: usize = 9;
const BURST: u64 = 64;

/// Processor time of this thread: what other programs take of the core does not count.
fn now() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a place for the answer.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn pin(core: usize) {
    // SAFETY: all zero bytes are an empty set of cores.
    let mut cores: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: `core` is far below the size of the set.
    unsafe { libc::CPU_SET(core, &mut cores) };
    // SAFETY: the set is initialised; a refusal only makes the numbers noisier.
    unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const cores) };
}

/// Takes records out as the agent does: everything there is, then a short sleep.
fn consume(ring: Arc<Ring>, clock: HostClock, stop: &AtomicBool) {
    pin(1);
    let mut consumer = Consumer::new(ring, clock);
    let mut data = Vec::with_capacity(1 << 20);
    // ORDERING: Relaxed: a request to end.
    while !stop.load(Ordering::Relaxed) {
        while let Next::Record(_) = consumer.next(&mut data, u32::MAX).expect("a sound ring") {
            if data.len() > 512 << 10 {
                data.clear();
            }
        }
        std::thread::sleep(Duration::from_micros(50));
    }
}

struct Bench {
    ring: Arc<Ring>,
    capture: Arc<Capture>,
    source: Vec<u8>,
}

impl Bench {
    fn begin(&self, number: u64, request: &mut InFlight) {
        let offset = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) % (DISK_BYTES / BYTES as u64) * BYTES as u64;
        let write = Request::write(offset, BYTES as u64, false);
        assert_eq!(self.capture.begin(&write, WaitToken(0), request), Begin::Go, "nothing overlaps");
        let iov = libc::iovec { iov_base: self.source.as_ptr() as *mut _, iov_len: BYTES };
        // SAFETY: one entry, which describes a live vector; the request has begun and not finished.
        unsafe { copy_in(request.pieces(), &raw const iov, 1, 0) };
    }

    /// Nanoseconds per write with `depth` of them in flight.
    fn round(&mut self, depth: usize, writes: u64) -> f64 {
        let mut requests: Vec<InFlight> = (0..depth).map(|_| InFlight::default()).collect();
        let mut spent = Duration::ZERO;
        for burst in 0..writes / BURST {
            let began = now();
            for number in 0..BURST / depth as u64 {
                for (index, request) in requests.iter_mut().enumerate() {
                    self.begin(burst * BURST + number * depth as u64 + index as u64, request);
                }
                for request in &mut requests {
                    self.capture.finish(request, Outcome::Succeeded);
                }
            }
            spent += now() - began;
            while self.ring.backlog() > 0 {
                std::hint::spin_loop();
            }
        }
        assert_eq!(self.capture.mode(), Mode::Capturing, "the ring never overflows");
        spent.as_nanos() as f64 / writes as f64
    }
}

fn main() {
    let millions: f64 = std::env::args().nth(1).map_or(0.1, |text| text.parse().expect("a number"));
    let writes = (millions * 1e6) as u64;
    let config = RingConfig::new(DiskId([1; 16]), Epoch(1), Lsn::FIRST, DISK_BYTES);
    let (ring, ring_fd) = Ring::create(&config).expect("a ring");
    let (clock, clock_fd) = HostClock::create().expect("a clock");
    let bell = Bell::create().expect("an eventfd").as_fd().try_clone_to_owned().expect("a descriptor");
    let capture =
        Capture::attach(ring_fd.as_fd(), clock_fd.as_fd(), bell, Runtime::real(|_| {})).expect("a capture");
    let stop = Arc::new(AtomicBool::new(false));
    let consumer = {
        let (ring, stop) = (Arc::clone(&ring), Arc::clone(&stop));
        std::thread::spawn(move || consume(ring, clock, &stop))
    };
    pin(0);
    let mut bench = Bench { ring, capture, source: vec![0xa5; BYTES] };
    for depth in [1, 32] {
        bench.round(depth, writes);
        let mut spent: Vec<f64> = (0..ROUNDS).map(|_| bench.round(depth, writes)).collect();
        spent.sort_by(f64::total_cmp);
        println!(
            "depth {depth:2}: {:4.0} ns per 4 KiB write (of {ROUNDS} rounds: {:.0} to {:.0})",
            spent[ROUNDS / 2],
            spent[0],
            spent[ROUNDS - 1],
        );
    }
    // ORDERING: Relaxed: as in `consume`.
    stop.store(true, Ordering::Relaxed);
    consumer.join().expect("the consumer found nothing wrong");
}
