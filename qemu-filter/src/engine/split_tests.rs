//! Requests in parts: what their record is, and what others see meanwhile.

use std::cell::RefCell;
use std::sync::Arc;

use journal_format::Op;

use super::super::testing::{Replica, begin, capture, capture_that_wakes, run_resync, tokens, wait};
use super::super::{Mode, testing::Disk};
use super::*;
use crate::ffi::testing::fill;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

fn range(offset: u64, length: u64) -> ByteRange {
    ByteRange::new(offset, length).expect("a range")
}

fn two() -> [WaitToken; 2] {
    let mut tokens = tokens(2);
    std::array::from_fn(|_| tokens.next().expect("two"))
}

/// A part as the glue does it: goes on with what is held, or begins.
fn part(capture: &Capture, token: WaitToken, whole: Request, part: ByteRange, ended: PartEnd) -> bool {
    let mut split = capture.take_held(token).unwrap_or_else(|| Split::new(whole));
    assert!(part.offset() <= whole.offset || split.continues(split.progress.range(), part.offset()));
    assert_eq!(capture.begin_split(&mut split, token), Begin::Go);
    capture.end_part(split, part, ended, token).is_some()
}

fn newest(replica: &mut Replica) -> Option<Op> {
    replica.drain();
    replica.records.last().copied()
}

#[test]
fn zeroes_in_three_parts_are_one_record_of_what_the_guest_asked_for() {
    let (capture, mut replica) = capture(1 << 20, 1 << 20, 64);
    let token = two()[0];
    let before = newest(&mut replica);
    let whole = Request::zero(1000, 10_000, true, true);
    // The first bytes are padded to the left, the last ones to the right, and the middle comes again as data.
    assert!(!part(&capture, token, whole, range(512, 3584), PartEnd::Done));
    assert!(!part(&capture, token, whole, range(4096, 4096), PartEnd::ComesAgain));
    assert!(!part(&capture, token, whole, range(4096, 4096), PartEnd::Done));
    assert_eq!(newest(&mut replica), before, "not before the last part");
    assert!(capture.holds_any() && capture.in_flight() == 1);
    assert!(part(&capture, token, whole, range(8192, 3072), PartEnd::Done));
    let zero = Op::Zero { range: range(1000, 10_000), fill: false, fua: true, may_unmap: true };
    assert_eq!(newest(&mut replica), Some(zero));
    assert!(!capture.holds_any() && capture.in_flight() == 0);
}

#[test]
fn a_write_in_parts_is_one_record_with_the_bytes_of_all() {
    let (capture, mut replica) = capture(1 << 20, 1 << 20, 64);
    let token = two()[0];
    let data: Vec<u8> = (0..300 * KIB).map(|i| (i / 7) as u8).collect();
    let whole = Request::write(8 * KIB, data.len() as u64, false);
    for (index, bytes) in data.chunks(65_536).enumerate() {
        let offset = whole.offset + index as u64 * 65_536;
        let mut split = capture.take_held(token).unwrap_or_else(|| Split::new(whole));
        assert_eq!(capture.begin_split(&mut split, token), Begin::Go);
        let mut places = [Piece::EMPTY; 8];
        fill(split.pieces(offset, bytes.len() as u64, &mut places), bytes);
        let ended =
            capture.end_part(split, range(offset, bytes.len() as u64), PartEnd::Done, token).is_some();
        assert_eq!(ended, offset + bytes.len() as u64 == whole.offset + whole.length);
    }
    assert!(
        matches!(newest(&mut replica), Some(Op::Write { range: r, .. }) if r == range(8 * KIB, 300 * KIB))
    );
    assert!(replica.bytes[8 << 10..][..data.len()] == data);
}

#[test]
fn bytes_behind_the_requests_end_have_no_place_in_its_memory() {
    let (capture, _replica) = capture(1 << 20, 1 << 20, 64);
    let token = two()[0];
    let mut split = Split::new(Request::write(0, 5000, false));
    assert_eq!(capture.begin_split(&mut split, token), Begin::Go);
    let mut places = [Piece::EMPTY; 4];
    assert!(split.pieces(4096, 1024, &mut places).is_empty());
    assert_eq!(split.pieces(4096, 904, &mut places).len(), 1);
    capture.give_up_split(split);
}

#[test]
fn a_discard_is_a_record_of_what_was_discarded() {
    let (capture, mut replica) = capture(1 << 20, 1 << 20, 64);
    let token = two()[0];
    let whole = Request::discard(10 * KIB, 300 * KIB);
    let parts = [range(10 * KIB, 54 * KIB), range(64 * KIB, 128 * KIB), range(192 * KIB, 64 * KIB)];
    for (done, ended) in parts.iter().zip([PartEnd::NotDone, PartEnd::Done, PartEnd::Done]) {
        assert!(!part(&capture, token, whole, *done, ended));
    }
    assert!(part(&capture, token, whole, range(256 * KIB, 54 * KIB), PartEnd::NotDone));
    assert_eq!(newest(&mut replica), Some(Op::Discard { range: range(64 * KIB, 192 * KIB) }));

    // Nothing was discarded: nothing is recorded.
    assert!(!part(&capture, token, whole, parts[0], PartEnd::NotDone));
    assert!(part(&capture, token, whole, range(64 * KIB, 246 * KIB), PartEnd::NotDone));
    assert_eq!(newest(&mut replica), Some(Op::Discard { range: range(64 * KIB, 192 * KIB) }));
    assert!(capture.is_idle());
}

#[test]
fn what_overlaps_a_request_waits_for_its_last_part() {
    let (capture, mut replica) = capture(1 << 20, 1 << 20, 64);
    let [a, b] = two();
    let whole = Request::zero(0, 128 * KIB, false, false);
    assert!(!part(&capture, a, whole, range(0, 64 * KIB), PartEnd::Done));
    let write = Request::write(100 * KIB, 512, false);
    let mut parked = InFlight::default();
    assert_eq!(capture.begin(&write, b, &mut parked), Begin::Wait, "the last part was not even issued");
    let mut beside = begin(&capture, &Request::write(200 * KIB, 512, false), two()[0]);
    capture.finish(&mut beside, Outcome::Succeeded);
    assert!(matches!(newest(&mut replica), Some(Op::Write { .. })), "what does not overlap goes on");
    assert!(part(&capture, a, whole, range(64 * KIB, 64 * KIB), PartEnd::Done));
    wait(b);
    assert_eq!(capture.begin(&write, b, &mut parked), Begin::Go);
    capture.finish(&mut parked, Outcome::Succeeded);
}

/// What of a request that failed is on the disk is not known.
#[test]
fn a_request_whose_later_part_fails_is_read_back() {
    for ended in [PartEnd::Failed, PartEnd::Refused] {
        let (capture, mut replica) = synced();
        let token = two()[0];
        let whole = Request::zero(100 * KIB, 200 * KIB, false, false);
        assert!(!part(&capture, token, whole, range(100 * KIB, 28 * KIB), PartEnd::Done));
        assert!(part(&capture, token, whole, range(128 * KIB, 128 * KIB), ended));
        assert_eq!(
            newest(&mut replica),
            Some(Op::GapBegin { reason: GapReason::WriteFailed, generation: 2 })
        );
        assert_eq!(capture.status().dirty_bytes, 256 * KIB, "its chunks: 64 KiB to 320 KiB");
    }
}

#[test]
fn a_request_that_is_refused_at_once_changes_nothing() {
    let (capture, mut replica) = synced();
    let token = two()[0];
    let before = newest(&mut replica);
    let whole = Request::zero(0, 200 * KIB, false, false);
    assert!(part(&capture, token, whole, range(0, 128 * KIB), PartEnd::Refused));
    assert_eq!((newest(&mut replica), capture.status().dirty_bytes), (before, 0));
}

/// The disk's driver was given something else than zeroes, against all that is known of QEMU.
#[test]
fn a_record_never_says_zeroes_for_other_bytes() {
    let (capture, mut replica) = synced();
    let token = two()[0];
    let mut split = Split::new(Request::zero(0, 64 * KIB, false, false));
    assert_eq!(capture.begin_split(&mut split, token), Begin::Go);
    split.spoil();
    assert!(capture.end_part(split, range(0, 64 * KIB), PartEnd::Done, token).is_some());
    assert_eq!(newest(&mut replica), Some(Op::GapBegin { reason: GapReason::WriteFailed, generation: 2 }));
}

#[test]
fn a_discard_with_a_hole_in_its_midst_is_read_back() {
    let (capture, mut replica) = synced();
    let token = two()[0];
    let whole = Request::discard(0, 192 * KIB);
    assert!(!part(&capture, token, whole, range(0, 64 * KIB), PartEnd::Done));
    assert!(!part(&capture, token, whole, range(64 * KIB, 64 * KIB), PartEnd::NotDone));
    assert!(part(&capture, token, whole, range(128 * KIB, 64 * KIB), PartEnd::Done));
    assert_eq!(newest(&mut replica), Some(Op::GapBegin { reason: GapReason::WriteFailed, generation: 2 }));
}

/// The block layer gave a request up between two parts, and its coroutine never comes back.
#[test]
fn a_request_that_was_given_up_is_read_back_and_lets_others_go() {
    let (capture, mut replica) = synced();
    let [a, b] = two();
    let [live, _] = two();
    let whole = Request::zero(0, 128 * KIB, false, false);
    assert!(!part(&capture, a, whole, range(0, 64 * KIB), PartEnd::Done));
    let other = Request::zero(512 * KIB, 128 * KIB, false, false);
    assert!(!part(&capture, live, other, range(512 * KIB, 64 * KIB), PartEnd::Done));
    let mut parked = InFlight::default();
    let write = Request::write(0, 512, false);
    assert_eq!(capture.begin(&write, b, &mut parked), Begin::Wait);
    let longest = capture.longest_held();
    assert!(longest.is_some());
    capture.look_after_held(|token, end| match token == a && end == 128 * KIB {
        true => Standing::Over,
        false => Standing::GoesOn,
    });
    assert_eq!(newest(&mut replica), Some(Op::GapBegin { reason: GapReason::WriteFailed, generation: 2 }));
    wait(b);
    assert_eq!(capture.begin(&write, b, &mut parked), Begin::Go);
    capture.finish(&mut parked, Outcome::Succeeded);
    assert!(capture.longest_held() > longest, "the other one is left alone");
    assert!(part(&capture, live, other, range(576 * KIB, 64 * KIB), PartEnd::Done));
    assert!(capture.in_flight() == 0 && !capture.holds_any());
}

/// QEMU has it wait for a request that waits for it here.
#[test]
fn a_request_that_waits_between_two_parts_gives_way_in_a_gap_that_lasts_until_it_ends() {
    let (capture, mut replica) = synced();
    let [a, b] = two();
    let whole = Request::zero(0, 128 * KIB, false, false);
    assert!(!part(&capture, a, whole, range(0, 64 * KIB), PartEnd::Done));
    let mut parked = InFlight::default();
    let write = Request::write(100 * KIB, 512, false);
    assert_eq!(capture.begin(&write, b, &mut parked), Begin::Wait);
    let before = newest(&mut replica);
    capture.look_after_held(|_, _| Standing::Waits);
    assert_eq!(newest(&mut replica), before, "it may have been for a moment");
    capture.look_after_held(|_, _| Standing::Waits);
    assert_eq!(newest(&mut replica), Some(Op::GapBegin { reason: GapReason::WriteFailed, generation: 2 }));
    wait(b);
    assert_eq!(capture.begin(&write, b, &mut parked), Begin::Go);
    capture.finish(&mut parked, Outcome::Succeeded);
    let dirty = capture.producer().ring().dirty();
    assert_eq!(dirty.take_run(0, MIB), Some(range(0, 128 * KIB)));
    assert_eq!(capture.producer().finish_resync(), capture_ring::Resync::Busy, "its last part is to come");
    assert!(part(&capture, a, whole, range(64 * KIB, 64 * KIB), PartEnd::Done));
    assert_eq!(dirty.take_run(0, MIB), Some(range(0, 128 * KIB)), "the last part is on the disk since");
    assert!(matches!(capture.producer().finish_resync(), capture_ring::Resync::Done(_)));
    assert!(capture.in_flight() == 0 && !capture.holds_any());
}

/// QEMU may send the next part in another thread as soon as the request that it waited for goes on. It was once not found
/// then, and the request ended up waiting for itself.
#[test]
fn the_next_part_of_a_request_that_gives_way_finds_it() {
    type Hook = Box<dyn FnOnce()>;
    thread_local! { static ON_WAKE: RefCell<Option<Hook>> = const { RefCell::new(None) } }
    let wake = |_| {
        if let Some(hook) = ON_WAKE.take() {
            hook();
        }
    };
    let (capture, mut replica) = capture_that_wakes(wake, MIB, MIB, 64);
    sync(&capture, &mut replica);
    let [a, b] = two();
    let whole = Request::zero(0, 128 * KIB, false, false);
    assert!(!part(&capture, a, whole, range(0, 64 * KIB), PartEnd::Done));
    let mut other = InFlight::default();
    assert_eq!(capture.begin(&Request::write(100 * KIB, 512, false), b, &mut other), Begin::Wait);
    capture.look_after_held(|_, _| Standing::Waits);
    let (engine, found) = (Arc::clone(&capture), Arc::new(AtomicBool::new(false)));
    let seen = Arc::clone(&found);
    ON_WAKE.set(Some(Box::new(move || {
        let Some(split) = engine.take_held(a) else { return };
        assert!(split.continues(range(0, 128 * KIB), 64 * KIB));
        // ORDERING: SeqCst: a test.
        seen.store(
            engine.end_part(split, range(64 * KIB, 64 * KIB), PartEnd::Done, a).is_some(),
            Ordering::SeqCst,
        );
    })));
    capture.look_after_held(|_, _| Standing::Waits);
    // ORDERING: SeqCst: a test.
    assert!(found.load(Ordering::SeqCst) && !capture.holds_any(), "the next part found nothing");
    assert_eq!(capture.begin(&Request::write(100 * KIB, 512, false), b, &mut other), Begin::Go);
    capture.finish(&mut other, Outcome::Succeeded);
    assert_eq!(capture.in_flight(), 0);
}

#[test]
fn another_request_of_the_same_coroutine_does_not_go_on_with_the_old_one() {
    let (capture, _replica) = synced();
    let token = two()[0];
    let whole = Request::zero(4 * KIB, 128 * KIB, false, false);
    assert!(!part(&capture, token, whole, range(4 * KIB, 60 * KIB), PartEnd::Done));
    let split = capture.take_held(token).expect("held");
    assert!(split.continues(range(4 * KIB, 128 * KIB), 64 * KIB));
    assert!(!split.continues(range(4 * KIB, 128 * KIB), 4 * KIB), "the same one from the start");
    assert!(!split.continues(range(4 * KIB, 256 * KIB), 64 * KIB), "a longer one");
    capture.give_up_split(split);
    assert!(capture.take_held(token).is_none());
}

/// A gap that a resync cannot end before the last record of the write.
#[test]
fn a_write_longer_than_a_record_is_a_gap() {
    let (capture, mut replica) = capture(8 << 20, 32 << 20, 256);
    let token = two()[0];
    let resynced = Arc::clone(&capture);
    // It ends with the capture.
    std::thread::spawn(move || run_resync(resynced, &Disk::new(8 << 20)));
    wait_until(|| !capture.status().gap_is_open);
    let whole = Request::write(0, 6 << 20, false);
    for (offset, last) in [(0, false), (3 << 20, true)] {
        let mut split = capture.take_held(token).unwrap_or_else(|| Split::new(whole));
        assert!(split.is_recorded_in_parts());
        assert_eq!(capture.begin_split(&mut split, token), Begin::Go);
        let mut write = begin(&capture, &Request::write(offset, 3 << 20, false), two()[0]);
        capture.finish(&mut write, Outcome::Succeeded);
        assert_eq!(capture.producer().finish_resync(), capture_ring::Resync::Busy, "at {offset}");
        let ended = capture.end_part(split, range(offset, 3 << 20), PartEnd::Done, token);
        assert_eq!(ended.is_some(), last);
    }
    wait_until(|| !capture.status().gap_is_open);
    capture.detach();
    replica.drain();
    let is_write = |op: &Op| matches!(op, Op::Write { fill: false, .. });
    let from = replica.records.iter().position(is_write).expect("written");
    let tail = &replica.records[from - 1..];
    assert!(matches!(tail[0], Op::GapBegin { reason: GapReason::LargeRequest, generation: 2 }), "{tail:?}");
    assert!(matches!(tail[3], Op::GapEnd { generation: 2 }) && tail.len() == 4, "{tail:?}");
}

#[test]
fn without_capture_parts_go_their_way() {
    let (capture, mut replica) = capture(1 << 20, 1 << 20, 64);
    let token = two()[0];
    let before = newest(&mut replica);
    capture.detach();
    let whole = Request::discard(0, 128 * KIB);
    assert!(!part(&capture, token, whole, range(0, 64 * KIB), PartEnd::Done));
    assert!(part(&capture, token, whole, range(64 * KIB, 64 * KIB), PartEnd::Done));
    assert_eq!(newest(&mut replica), before);
    assert!(capture.is_idle());
}

/// While only tracking, the gap cannot end before the last part.
#[test]
fn parts_of_an_unrecorded_request_keep_the_gap_open() {
    let (capture, _replica) = synced();
    capture.producer().enter_tracking(GapReason::Overflow);
    let token = two()[0];
    let whole = Request::zero(0, 128 * KIB, false, false);
    assert!(!part(&capture, token, whole, range(0, 64 * KIB), PartEnd::Done));
    assert!(capture.resume() && capture.mode() == Mode::Capturing);
    assert_eq!(capture.producer().finish_resync(), capture_ring::Resync::Busy);
    assert!(part(&capture, token, whole, range(64 * KIB, 64 * KIB), PartEnd::Done));
    assert_eq!(capture.producer().finish_resync(), capture_ring::Resync::Dirty);
}

/// A capture of a 1 MiB disk whose initial sync has ended.
fn synced() -> (Arc<Capture>, Replica) {
    let (capture, mut replica) = capture(MIB, MIB, 64);
    sync(&capture, &mut replica);
    (capture, replica)
}

/// Ends the initial sync.
fn sync(capture: &Capture, replica: &mut Replica) {
    let taken = capture.producer().ring().dirty().take_run(0, MIB);
    assert!(taken.is_some());
    assert!(matches!(capture.producer().finish_resync(), capture_ring::Resync::Done(_)));
    replica.drain();
}

fn wait_until(is_so: impl Fn() -> bool) {
    let began = std::time::Instant::now();
    while !is_so() {
        assert!(began.elapsed() < std::time::Duration::from_secs(60), "it never becomes so");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}
