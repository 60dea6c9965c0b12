//! Single steps of the resync, and the races that its order is there for.

use journal_format::{ByteRange, GapReason, Op};

use super::super::testing::{Disk, Replica, SECTOR, begin, capture, tokens, write};
use super::super::{Answer, Capture, Outcome, Request, Step};
use super::*;
use crate::ffi::testing::fill;

const CHUNK: u64 = DIRTY_CHUNK_BYTES;

/// Steps until the resync wants to pause for long (it has nothing to do) and returns where it read, and where it asked.
/// An answer speaks of at most `clip` bytes; `each` comes after each step.
fn follow(resync: &mut Resync, disk: &Disk, clip: u64, mut each: impl FnMut()) -> (Vec<u64>, Vec<u64>) {
    let (mut answer, mut now) = (Answer::None, Duration::ZERO);
    let (mut reads, mut asked) = (Vec::new(), Vec::new());
    for _ in 0..100_000 {
        let step = resync.step(answer, now);
        match step {
            Step::Status { offset, .. } => asked.push(offset),
            Step::Read { offset, .. } => reads.push(offset),
            Step::Pause(pause) if pause >= IDLE_PAUSE => return (reads, asked),
            Step::Pause(pause) => now += pause,
            Step::Stop => return (reads, asked),
        }
        answer = match disk.answer(step).expect("not stopped") {
            Answer::Status { length, zero } => Answer::Status { length: length.min(clip), zero },
            answer => answer,
        };
        each();
    }
    panic!("the resync never comes to rest");
}

/// The same, with whole answers: how often it read.
fn settle(resync: &mut Resync, disk: &Disk) -> usize {
    follow(resync, disk, u64::MAX, || {}).0.len()
}

fn synced(bytes: u64) -> (Arc<Capture>, Replica, Resync, Disk) {
    let (capture, mut replica) = capture(bytes, 4 << 20, 1024);
    let disk = Disk::new(bytes as usize);
    let mut resync = Resync::new(Arc::clone(&capture));
    settle(&mut resync, &disk);
    replica.drain();
    assert_eq!(replica.gap, None);
    (capture, replica, resync, disk)
}

fn ends_with(replica: &Replica, ops: &[Op]) {
    assert_eq!(&replica.records[replica.records.len() - ops.len()..], ops);
}

fn zero_fill(offset: u64, length: u64) -> Op {
    let range = ByteRange::new(offset, length).expect("a range");
    Op::Zero { range, fill: true, fua: false, may_unmap: false }
}

#[test]
fn an_empty_disk_is_one_zero_record_whatever_its_size() {
    let bytes = 1 << 30;
    let (capture, mut replica) = capture(bytes, 4 << 20, 64);
    let mut resync = Resync::new(capture);
    let mut answer = Answer::None;
    loop {
        answer = match resync.step(answer, Duration::ZERO) {
            Step::Status { length, .. } => Answer::Status { length, zero: true },
            Step::Pause(pause) if pause < IDLE_PAUSE => Answer::None,
            Step::Pause(_) => break,
            step => panic!("{step:?}"),
        }
    }
    replica.drain();
    let begin = Op::GapBegin { reason: GapReason::Attach, generation: 1 };
    assert_eq!(replica.records, [begin, zero_fill(0, bytes), Op::GapEnd { generation: 1 }]);
}

#[test]
fn data_that_is_all_zero_becomes_a_zero_record() {
    let bytes = CHUNK + 3 * SECTOR as u64;
    let (capture, mut replica) = capture(bytes, 4 << 20, 64);
    let mut resync = Resync::new(capture);
    let mut answer = Answer::None;
    loop {
        answer = match resync.step(answer, Duration::ZERO) {
            Step::Status { length, .. } => Answer::Status { length, zero: false },
            Step::Read { pieces, length, .. } => {
                fill(pieces, &vec![0; length as usize]);
                Answer::Read { zero: true }
            }
            Step::Pause(pause) if pause < IDLE_PAUSE => Answer::None,
            _ => break,
        }
    }
    replica.drain();
    ends_with(&replica, &[zero_fill(0, bytes), Op::GapEnd { generation: 1 }]);
}

#[test]
fn a_disk_that_is_not_whole_chunks_is_copied_to_its_last_byte() {
    let bytes = 3 * CHUNK + 5 * SECTOR as u64;
    let (capture, mut replica) = capture(bytes, 4 << 20, 64);
    let disk = Disk::new(bytes as usize);
    let data: Vec<u8> = (0..bytes).map(|i| (i % 251) as u8 + 1).collect();
    disk.write(0, &data, usize::MAX).expect("inside");
    let mut resync = Resync::new(capture);
    assert!(settle(&mut resync, &disk) >= 1);
    replica.drain();
    assert_eq!((replica.bytes, replica.gap), (data, None));
}

#[test]
fn a_guest_write_that_races_with_the_read_wins() {
    let (capture, mut replica) = capture(CHUNK, 4 << 20, 64);
    let disk = Disk::new(CHUNK as usize);
    disk.write(0, &[1; SECTOR], 1).expect("inside");
    let mut resync = Resync::new(Arc::clone(&capture));
    let token = tokens(1).next().expect("one");
    let mut answer = Answer::None;
    loop {
        let step = resync.step(answer, Duration::ZERO);
        if let Step::Read { .. } = step {
            // The read sees the old data, and the write is complete before the read is.
            answer = disk.answer(step).expect("an answer");
            write(&capture, &disk, token, 0, &[2; SECTOR]);
            break;
        }
        answer = disk.answer(step).expect("an answer");
    }
    let _ = resync.step(answer, Duration::ZERO);
    replica.drain();
    assert_eq!(replica.bytes[..SECTOR], [2; SECTOR]);
}

#[test]
fn what_is_written_into_a_hole_between_the_two_looks_is_read_wherever_it_is() {
    let bytes = 8 * CHUNK + 3 * SECTOR as u64;
    for at in [0, 2 * CHUNK + SECTOR as u64, 8 * CHUNK + SECTOR as u64] {
        let (capture, mut replica) = capture(bytes, 4 << 20, 64);
        let disk = Disk::new(bytes as usize);
        let mut resync = Resync::new(capture);
        let (mut answer, mut now, mut looks) = (Answer::None, Duration::ZERO, 0);
        loop {
            let step = resync.step(answer, now);
            let is_look = matches!(step, Step::Status { .. });
            match step {
                Step::Pause(pause) if pause >= IDLE_PAUSE => break,
                Step::Pause(pause) => now += pause,
                _ => {}
            }
            answer = disk.answer(step).expect("an answer");
            looks += usize::from(is_look);
            if is_look && looks == 1 {
                disk.write(at, &[3; SECTOR], 1).expect("inside");
            }
        }
        replica.drain();
        assert!(looks >= 2, "{looks} looks");
        assert_eq!(replica.gap, None, "written at {at}");
        assert!(replica.bytes == disk.contents(), "written at {at}");
    }
}

#[test]
fn a_failed_write_opens_a_gap_until_its_range_is_read_back() {
    let (capture, mut replica, mut resync, disk) = synced(4 * CHUNK);
    let token = tokens(1).next().expect("one");
    let mut request = begin(&capture, &Request::write(CHUNK, 8 * SECTOR as u64, false), token);
    fill(request.pieces(), &[7; 8 * SECTOR]);
    // Half of it reached the disk.
    disk.write(CHUNK, &[7; 8 * SECTOR], 4).expect("inside");
    capture.finish(&mut request, Outcome::Failed);
    replica.drain();
    ends_with(&replica, &[Op::GapBegin { reason: GapReason::WriteFailed, generation: 2 }]);
    assert_eq!(settle(&mut resync, &disk), 1, "only the chunk that was written to");
    replica.drain();
    assert_eq!((replica.bytes, replica.gap), (disk.contents(), None));
}

#[test]
fn a_request_that_was_not_done_leaves_no_trace() {
    let (capture, mut replica, ..) = synced(4 * CHUNK);
    let before = replica.records.len();
    let token = tokens(1).next().expect("one");
    let mut request = begin(&capture, &Request::zero(0, CHUNK, false, true), token);
    capture.finish(&mut request, Outcome::NotDone);
    replica.drain();
    assert_eq!((replica.records.len(), replica.gap), (before, None));
}

#[test]
fn growth_opens_a_gap_until_the_new_part_was_read() {
    let (capture, mut replica, mut resync, disk) = synced(CHUNK);
    let token = tokens(1).next().expect("one");
    let mut request = begin(&capture, &Request::resize(3 * CHUNK), token);
    disk.resize(3 * CHUNK);
    // What a block device may show behind its old end.
    disk.write(2 * CHUNK, &[9; SECTOR], 1).expect("inside");
    capture.finish(&mut request, Outcome::Succeeded);
    while replica.records.last() != Some(&Op::Resize { disk_bytes: 3 * CHUNK }) {
        replica.step().expect("the resize is recorded");
    }
    assert!(replica.gap.is_some(), "what lies behind the old end is not known at the resize itself");
    settle(&mut resync, &disk);
    replica.drain();
    assert!(replica.records.contains(&Op::GapBegin { reason: GapReason::ContentsChanged, generation: 2 }));
    assert_eq!((replica.bytes, replica.gap), (disk.contents(), None));
}

#[test]
fn a_read_error_is_tried_again_later_and_the_gap_stays_open_until_then() {
    let (capture, mut replica) = capture(8 * CHUNK, 4 << 20, 64);
    let mut resync = Resync::new(capture);
    let mut answer = Answer::None;
    let mut now = Duration::ZERO;
    let mut reads = Vec::new();
    while reads.len() < 3 {
        answer = match resync.step(answer, now) {
            Step::Status { length, .. } => Answer::Status { length, zero: false },
            Step::Read { offset, .. } => {
                reads.push(offset);
                if reads.len() == 1 { Answer::Failed } else { Answer::Read { zero: true } }
            }
            Step::Pause(pause) => {
                if reads.len() == 1 {
                    assert!(pause >= FIRST_ERROR_PAUSE / 2 || now >= FIRST_ERROR_PAUSE / 2);
                }
                now += pause;
                Answer::None
            }
            Step::Stop => panic!("stopped"),
        };
    }
    assert_eq!(reads, [0, FILL_BYTES, 0], "the rest first, then again");
    replica.drain();
    assert!(replica.gap.is_some());
}

/// The story of `grace`: an overlapping captured request is finished after the tracked one that the disk did last.
/// A read between the two ends would be numbered before the captured one, and lose against the wrong data.
#[test]
fn nothing_is_read_before_what_ran_beside_a_tracked_request_has_ended() {
    let (capture, mut replica, mut resync, disk) = synced(CHUNK);
    capture.producer().enter_tracking(GapReason::Overflow);
    let mut tokens = tokens(2);
    let mut token = || tokens.next().expect("two");
    let sector = Request::write(0, SECTOR as u64, false);
    let mut tracked = begin(&capture, &sector, token());
    assert!(tracked.pieces().is_empty());
    assert!(capture.resume());
    // The first grace period begins before the captured request does: it takes the second one to wait for that.
    assert!(matches!(resync.step(Answer::None, Duration::ZERO), Step::Pause(_)));
    let mut captured = begin(&capture, &sector, token());
    fill(captured.pieces(), &[1; SECTOR]);
    disk.write(0, &[1; SECTOR], 1).expect("inside");
    disk.write(0, &[2; SECTOR], 1).expect("inside");
    // However often it is asked, the resync waits.
    for _ in 0..10 {
        assert!(matches!(resync.step(Answer::None, Duration::ZERO), Step::Pause(_)));
    }
    capture.finish(&mut tracked, Outcome::Succeeded);
    for _ in 0..10 {
        assert!(matches!(resync.step(Answer::None, Duration::ZERO), Step::Pause(_)));
    }
    capture.finish(&mut captured, Outcome::Succeeded);
    assert_eq!(settle(&mut resync, &disk), 1);
    replica.drain();
    assert_eq!((replica.bytes, replica.gap), (disk.contents(), None));
}

#[test]
fn a_new_gap_during_a_sync_ends_only_with_its_own_end() {
    let bytes = 2 * FILL_BYTES;
    let (capture, mut replica) = capture(bytes, 4 << 20, 64);
    let disk = Disk::new(bytes as usize);
    disk.write(0, &vec![4; bytes as usize], usize::MAX).expect("inside");
    let mut resync = Resync::new(Arc::clone(&capture));
    // Half of it has been read when the contents change.
    let (mut answer, mut reads) = (Answer::None, 0);
    while reads < 1 {
        let step = resync.step(answer, Duration::ZERO);
        reads += usize::from(matches!(step, Step::Read { .. }));
        answer = disk.answer(step).expect("an answer");
    }
    capture.contents_changed();
    disk.write(0, &[5; SECTOR], 1).expect("inside");
    disk.write(FILL_BYTES, &[6; SECTOR], 1).expect("inside");
    let _ = resync.step(answer, Duration::ZERO);
    settle(&mut resync, &disk);
    replica.drain();
    assert_eq!(replica.gap, None);
    assert!(replica.bytes == disk.contents(), "the new contents");
    ends_with(&replica, &[Op::GapEnd { generation: 2 }]);
}

#[test]
fn a_detached_capture_stops_its_resync_and_is_idle_then() {
    let (capture, mut replica) = capture(2 * CHUNK, 4 << 20, 64);
    let mut resync = Resync::new(Arc::clone(&capture));
    let mut answer = Answer::None;
    loop {
        match resync.step(answer, Duration::ZERO) {
            Step::Status { length, .. } => answer = Answer::Status { length, zero: false },
            Step::Read { .. } => break,
            _ => answer = Answer::None,
        }
    }
    capture.detach();
    assert!(!capture.is_idle(), "a read is under way");
    assert!(matches!(resync.step(Answer::Read { zero: true }, Duration::ZERO), Step::Stop));
    assert!(capture.is_idle());
    replica.drain();
    assert!(replica.gap.is_some(), "the sync did not finish");
}

/// What a resync does that reads back what a guest has written while its ring was full: all of a disk of `bytes`, whose
/// `data` is not zero and all else a hole, of which an answer says at most `clip` bytes. Where it reads, and asks.
fn looks(bytes: u64, data: std::ops::Range<u64>, clip: u64) -> (Vec<u64>, Vec<u64>) {
    let (capture, mut replica, mut resync, disk) = synced(bytes);
    capture.producer().enter_tracking(GapReason::Overflow);
    capture.producer().mark_dirty(ByteRange::new(0, bytes).expect("a range"));
    let noise = vec![7; (data.end - data.start) as usize];
    disk.write(data.start, &noise, usize::MAX).expect("inside");
    assert!(capture.resume());
    let seen = follow(&mut resync, &disk, clip, || replica.drain());
    replica.drain();
    assert_eq!(replica.gap, None);
    assert!(replica.bytes == disk.contents(), "what was read back is the disk");
    seen
}

fn fills(range: std::ops::Range<u64>) -> Vec<u64> {
    range.map(|at| at * FILL_BYTES).collect()
}

#[test]
fn what_a_guest_has_written_is_read_without_asking_whether_it_is_there() {
    let bytes = 32 * FILL_BYTES;
    assert_eq!(looks(bytes, 0..bytes, u64::MAX), (fills(0..32), vec![]));
}

#[test]
fn behind_a_read_of_zeroes_it_is_asked_how_far_they_reach() {
    let (bytes, data) = (64 * FILL_BYTES, 16 * FILL_BYTES..32 * FILL_BYTES);
    let (reads, asked) = looks(bytes, data.clone(), u64::MAX);
    // Each hole twice, and once where the first ends.
    assert_eq!(asked, [FILL_BYTES, FILL_BYTES, data.start, data.end + FILL_BYTES, data.end + FILL_BYTES]);
    assert_eq!(reads, [fills(0..1), fills(16..33)].concat());
}

#[test]
fn of_a_hole_that_is_answered_in_pieces_only_the_beginning_is_read() {
    let (reads, asked) = looks(64 * FILL_BYTES, 0..FILL_BYTES, 4 * FILL_BYTES);
    assert_eq!(reads, fills(0..2));
    assert_eq!(asked.len(), 2 * 62_usize.div_ceil(4));
}

#[test]
fn zeroes_of_one_run_are_no_reason_to_ask_in_the_next() {
    let bytes = 8 * CHUNK;
    let (capture, mut replica, mut resync, disk) = synced(bytes);
    capture.producer().enter_tracking(GapReason::Overflow);
    // A chunk of zeroes, then one of data.
    for chunk in [1, 4] {
        capture.producer().mark_dirty(ByteRange::new(chunk * CHUNK, CHUNK).expect("a range"));
    }
    disk.write(4 * CHUNK, &vec![7; CHUNK as usize], usize::MAX).expect("inside");
    assert!(capture.resume());
    assert_eq!(follow(&mut resync, &disk, u64::MAX, || {}), (vec![CHUNK, 4 * CHUNK], vec![]));
    replica.drain();
    assert!(replica.gap.is_none() && replica.bytes == disk.contents());
}

#[test]
fn when_all_contents_have_changed_holes_are_looked_for_first() {
    let bytes = 32 * FILL_BYTES;
    let (capture, mut replica, mut resync, disk) = synced(bytes);
    capture.contents_changed();
    assert_eq!(settle(&mut resync, &disk), 0, "reads of an empty disk");
    replica.drain();
    assert_eq!(replica.gap, None);
}
