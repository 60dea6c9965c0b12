use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use capture_ring::{Mode, Overflow, Policy, SyncState};
use journal_format::{GapReason, Lsn, Op};

use super::super::testing::{Disk, Replica, capture, run_resync, tokens, wait, write};
use super::super::{Begin, Capture, InFlight, Outcome, Request};
use super::SyncWait;

const DISK_BYTES: u64 = 1 << 20;
const BLOCK: usize = 4096;

/// A synced capture over a ring that is soon full, its waiting thread, and its reader.
struct Waited {
    capture: Arc<Capture>,
    replica: Replica,
    thread: Option<JoinHandle<()>>,
}

impl Waited {
    fn new(policy: Policy, must_go: fn() -> bool) -> Self {
        let (capture, mut replica) = capture(DISK_BYTES, 1 << 20, 16);
        let disk = Arc::new(Disk::new(DISK_BYTES as usize));
        let (resynced, over) = (Arc::clone(&capture), Arc::clone(&disk));
        // The resync pauses once all is read; it ends with the capture.
        std::thread::spawn(move || run_resync(resynced, &over));
        while capture.status().gap_is_open {
            replica.drain();
            std::thread::yield_now();
        }
        replica.drain();
        // Before the thread looks: a change of policy wakes who waits.
        replica.ring().set_policy(policy);
        let served = Arc::clone(&capture);
        let thread = std::thread::spawn(move || served.serve_waiters(must_go));
        Self { capture, replica, thread: Some(thread) }
    }

    /// Writes until the ring takes no more.
    fn fill(&self) {
        let disk = Disk::new(DISK_BYTES as usize);
        let token = tokens(1).next().expect("one");
        while self.replica.ring().fits(BLOCK as u64) {
            write(&self.capture, &disk, token, 0, &[1; BLOCK]);
        }
        assert_eq!(self.capture.mode(), Mode::Capturing);
    }

    /// One more write, in a thread of its own.
    fn writer(&self) -> JoinHandle<()> {
        let capture = Arc::clone(&self.capture);
        std::thread::spawn(move || {
            let disk = Disk::new(DISK_BYTES as usize);
            write(&capture, &disk, tokens(1).next().expect("one"), 0, &[2; BLOCK]);
        })
    }

    fn wait_until_waiting(&self) {
        while self.replica.ring().waiting() == 0 {
            std::thread::yield_now();
        }
    }

    fn overflows(&mut self) -> usize {
        self.replica.drain();
        let is_one = |op: &&Op| matches!(op, Op::GapBegin { reason: GapReason::Overflow, .. });
        self.replica.records.iter().filter(is_one).count()
    }
}

impl Drop for Waited {
    fn drop(&mut self) {
        self.capture.detach();
        self.thread.take().expect("once").join().expect("no panic");
        if !std::thread::panicking() {
            assert_eq!(self.replica.ring().waiting(), 0, "an announcement was left behind");
        }
    }
}

fn never() -> bool {
    false
}

fn strict() -> Policy {
    Policy { overflow: Overflow::Strict, ..Policy::default() }
}

fn throttle(throttle_ms: u32) -> Policy {
    Policy { overflow: Overflow::Throttle, throttle_ms, ..Policy::default() }
}

fn sync(sync_timeout_ms: u32) -> Policy {
    Policy { sync: true, sync_timeout_ms, ..Policy::default() }
}

#[test]
fn strict_waits_for_room_and_goes_on_without_a_gap() {
    let mut waited = Waited::new(strict(), never);
    waited.fill();
    let writer = waited.writer();
    waited.wait_until_waiting();
    std::thread::sleep(Duration::from_millis(250));
    assert!(!writer.is_finished(), "it has not waited");
    assert!(waited.replica.ring().waiting_since_ns() > 0);
    waited.replica.drain();
    writer.join().expect("no panic");
    assert_eq!(waited.overflows(), 0);
    assert_eq!(waited.replica.bytes[0], 2);
}

#[test]
fn throttle_waits_its_time_and_then_tracks() {
    let mut waited = Waited::new(throttle(50), never);
    waited.fill();
    let began = std::time::Instant::now();
    waited.writer().join().expect("no panic");
    assert!(began.elapsed() >= Duration::from_millis(50));
    assert_eq!(waited.capture.mode(), Mode::Tracking);
    assert_eq!(waited.overflows(), 1);
}

#[test]
fn throttle_that_finds_room_in_time_leaves_no_gap() {
    let mut waited = Waited::new(throttle(60_000), never);
    waited.fill();
    let writer = waited.writer();
    waited.wait_until_waiting();
    waited.replica.drain();
    writer.join().expect("no panic");
    assert_eq!((waited.overflows(), waited.capture.mode()), (0, Mode::Capturing));
}

#[test]
fn track_does_not_wait() {
    let mut waited = Waited::new(Policy::default(), never);
    waited.fill();
    waited.writer().join().expect("no panic");
    assert_eq!((waited.overflows(), waited.capture.mode()), (1, Mode::Tracking));
}

#[test]
fn a_write_larger_than_the_ring_does_not_wait_for_what_never_comes() {
    let waited = Waited::new(strict(), never);
    let mut request = InFlight::default();
    let token = tokens(1).next().expect("one");
    assert_eq!(waited.capture.begin(&Request::write(0, 3 << 20, false), token, &mut request), Begin::Go);
    waited.capture.finish(&mut request, Outcome::Succeeded);
    assert_eq!(waited.capture.mode(), Mode::Tracking);
}

#[test]
fn waiters_go_on_when_the_policy_changes() {
    let mut waited = Waited::new(strict(), never);
    waited.fill();
    let writer = waited.writer();
    waited.wait_until_waiting();
    // What is announced and not parked yet looks at the policy itself; the waking is what this is about.
    std::thread::sleep(Duration::from_millis(50));
    waited.replica.ring().set_policy(Policy::default());
    writer.join().expect("no panic");
    assert_eq!(waited.overflows(), 1);
}

#[test]
fn waiters_go_on_when_capture_ends_or_is_about_to() {
    let waited = Waited::new(strict(), never);
    waited.fill();
    let writer = waited.writer();
    waited.wait_until_waiting();
    waited.capture.release_waiters();
    writer.join().expect("no panic");
    // Nobody waits any more before the detach.
    waited.writer().join().expect("no panic");

    let waited = Waited::new(strict(), never);
    waited.fill();
    let writer = waited.writer();
    waited.wait_until_waiting();
    waited.capture.detach();
    writer.join().expect("no panic");
}

#[test]
fn waiters_go_on_when_the_process_waits_for_them() {
    let mut waited = Waited::new(strict(), || true);
    waited.fill();
    waited.writer().join().expect("no panic");
    assert_eq!(waited.overflows(), 1);
}

#[test]
fn a_request_that_waits_for_room_can_be_withdrawn() {
    let waited = Waited::new(strict(), never);
    waited.fill();
    let mut request = InFlight::default();
    let token = tokens(1).next().expect("one");
    assert_eq!(waited.capture.begin(&Request::write(0, 4096, false), token, &mut request), Begin::Wait);
    assert!(waited.capture.withdraw(&mut request));
    assert_eq!((waited.capture.in_flight(), waited.replica.ring().waiting()), (0, 0));
}

/// A guest's flush; returns the LSN that had to be durable.
fn flush(capture: &Capture) -> Lsn {
    let token = tokens(1).next().expect("one");
    let mut waits: SyncWait = capture.flush().expect("capturing");
    let lsn = waits.lsn;
    while capture.wait_durable(&mut waits, token) == Begin::Wait {
        wait(token);
    }
    lsn
}

#[test]
fn with_sync_a_flush_completes_when_its_own_record_is_durable() {
    let waited = Waited::new(sync(60_000), never);
    assert_eq!(waited.replica.ring().sync_state(), SyncState::InForce);
    let capture = Arc::clone(&waited.capture);
    let flusher = std::thread::spawn(move || flush(&capture));
    waited.wait_until_waiting();
    let lsn = waited.capture.status().captured_lsn;
    waited.replica.ring().set_durable_lsn(lsn.prev());
    std::thread::sleep(Duration::from_millis(250));
    assert!(!flusher.is_finished(), "it did not wait for its own record");
    waited.replica.ring().set_durable_lsn(lsn);
    assert_eq!(flusher.join().expect("no panic"), lsn);
}

#[test]
fn a_write_with_fua_waits_as_a_flush_does_and_another_does_not() {
    let waited = Waited::new(sync(60_000), never);
    for (fua, waits) in [(false, false), (true, true)] {
        let mut request = InFlight::default();
        let token = tokens(1).next().expect("one");
        assert_eq!(waited.capture.begin(&Request::write(0, 512, fua), token, &mut request), Begin::Go);
        waited.capture.finish(&mut request, Outcome::Succeeded);
        assert_eq!(request.sync_wait().is_some(), waits);
    }
}

#[test]
fn sync_is_lost_after_its_time_and_comes_back_by_itself() {
    let waited = Waited::new(sync(30), never);
    let lost = flush(&waited.capture);
    assert_eq!(waited.replica.ring().sync_state(), SyncState::Lost);
    // While it is lost, flushes do not wait again.
    waited.replica.ring().set_policy(sync(600_000));
    flush(&waited.capture);
    waited.replica.ring().set_durable_lsn(lost);
    assert_eq!(waited.replica.ring().sync_state(), SyncState::InForce);
    let capture = Arc::clone(&waited.capture);
    let flusher = std::thread::spawn(move || flush(&capture));
    waited.wait_until_waiting();
    waited.replica.ring().set_durable_lsn(waited.capture.status().captured_lsn);
    flusher.join().expect("no panic");
}

#[test]
fn in_a_gap_flushes_complete_at_once() {
    let waited = Waited::new(sync(600_000), never);
    waited.capture.producer().enter_tracking(GapReason::Overflow);
    assert_eq!(waited.replica.ring().sync_state(), SyncState::Suspended);
    assert!(waited.capture.flush().is_none());
    // One that was captured just before.
    let token = tokens(1).next().expect("one");
    assert_eq!(waited.capture.wait_durable(&mut SyncWait::new(Lsn(1 << 40)), token), Begin::Go);
}
