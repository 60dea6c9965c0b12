//! Single requests, and what a fault does.

use std::os::fd::AsFd as _;

use capture_ring::RingConfig;
use journal_format::{DiskId, Epoch, Op};

use super::super::testing::{Replica, SECTOR, begin, capture, tokens, wait};
use super::super::{EngineErrorKind, MAX_WRITE_BYTES, Mode};
use super::*;
use crate::ffi::testing::{bytes_of, fill};

fn two() -> [WaitToken; 2] {
    let mut tokens = tokens(2);
    std::array::from_fn(|_| tokens.next().expect("two"))
}

#[test]
fn the_largest_write_fits_and_keeps_its_bytes() {
    let (capture, mut replica) = capture(2 * MAX_WRITE_BYTES, 8 << 20, 64);
    let data: Vec<u8> = (0..MAX_WRITE_BYTES).map(|i| (i / 4096) as u8 ^ i as u8).collect();
    // An odd start, so that its first slab is begun already.
    let mut small = begin(&capture, &Request::write(0, 512, false), two()[0]);
    let mut request = begin(&capture, &Request::write(512, MAX_WRITE_BYTES, false), two()[1]);
    fill(request.pieces(), &data);
    assert!(bytes_of(request.pieces()) == data);
    assert!(request.pieces().iter().all(|piece| (piece.ptr.as_ptr() as usize).is_multiple_of(4096)));
    fill(small.pieces(), &[0; 512]);
    capture.finish(&mut small, Outcome::Succeeded);
    capture.finish(&mut request, Outcome::Succeeded);
    replica.drain();
    assert!(replica.bytes[512..][..data.len()] == data);
}

#[test]
fn a_request_longer_than_a_record_is_tracked_rather_than_refused() {
    let (capture, _replica) = capture(4 * MAX_WRITE_BYTES, 8 << 20, 64);
    let mut request = begin(&capture, &Request::write(0, MAX_WRITE_BYTES + 1, false), two()[0]);
    assert!(request.pieces().is_empty());
    assert_eq!(capture.mode(), Mode::Tracking);
    capture.finish(&mut request, Outcome::Succeeded);
}

#[test]
fn the_gap_is_published_before_the_first_unrecorded_write_ends() {
    for (agent_is_there, reason) in [(true, GapReason::Overflow), (false, GapReason::AgentLost)] {
        overflow(agent_is_there, reason);
    }
}

fn overflow(agent_is_there: bool, reason: GapReason) {
    let (capture, mut replica) = capture(64 << 20, 512 << 10, 64);
    capture.set_agent(agent_is_there);
    let mut last = None;
    for i in 0..100 {
        let mut request = begin(&capture, &Request::write(i * 65536, 65536, false), two()[0]);
        if request.pieces().is_empty() {
            last = Some(request);
            break;
        }
        capture.finish(&mut request, Outcome::Succeeded);
    }
    let mut request = last.expect("512 KiB are full after a few writes");
    replica.drain();
    let begins = Op::GapBegin { reason, generation: 2 };
    assert_eq!(replica.records.last(), Some(&begins), "before the write has even been issued");
    capture.finish(&mut request, Outcome::Succeeded);
    assert!(capture.resume(), "there is room again");
}

#[test]
fn an_empty_request_is_none_of_our_business() {
    let (capture, mut replica) = capture(1 << 20, 1 << 20, 64);
    let mut request = begin(&capture, &Request::write(0, 0, false), two()[0]);
    capture.finish(&mut request, Outcome::Succeeded);
    replica.drain();
    assert_eq!(replica.records.len(), 1, "only the begin of the epoch");
    assert!(capture.is_idle());
}

#[test]
fn every_kind_of_request_is_recorded_as_itself() {
    let (capture, mut replica) = capture(1 << 20, 1 << 20, 64);
    replica.drain();
    let requests = [
        Request::write(0, SECTOR as u64, true),
        Request::zero(4096, 8192, true, true),
        Request::zero(4096, 8192, false, false),
        Request::discard(65536, 65536),
        Request::resize(512 << 10),
    ];
    for request in requests {
        let mut in_flight = begin(&capture, &request, two()[0]);
        capture.finish(&mut in_flight, Outcome::Succeeded);
    }
    assert!(capture.flush().is_some());
    replica.drain();
    let range = |offset, length| ByteRange::new(offset, length).expect("a range");
    let [Op::GapBegin { .. }, Op::Write { fua: true, fill: false, .. }, rest @ ..] = &replica.records[..]
    else {
        panic!("{:?}", replica.records)
    };
    let expected = [
        Op::Zero { range: range(4096, 8192), fill: false, fua: true, may_unmap: true },
        Op::Zero { range: range(4096, 8192), fill: false, fua: false, may_unmap: false },
        Op::Discard { range: range(65536, 65536) },
        Op::Resize { disk_bytes: 512 << 10 },
        Op::Flush,
    ];
    assert_eq!(rest, expected);
}

/// A misuse stands for any bug: it panics inside, and the guest must not notice.
#[test]
fn a_panic_ends_capture_with_a_gap_and_lets_everybody_go_on() {
    let (capture, mut replica) = capture(1 << 20, 1 << 20, 64);
    let [a, b] = two();
    let request = Request::write(0, SECTOR as u64, false);
    let mut first = begin(&capture, &request, a);
    let mut parked = InFlight::default();
    assert_eq!(capture.begin(&request, b, &mut parked), Begin::Wait);
    // Begins what is in flight already.
    assert_eq!(capture.begin(&request, a, &mut first), Begin::Go);
    assert!(first.pieces().is_empty());
    assert_eq!(capture.mode(), Mode::Off);
    assert!(capture.fault_message().is_some_and(|message| message.contains("in flight already")));
    // Nobody will ever leave the table for it; it is let go all the same.
    wait(b);
    assert_eq!(capture.begin(&request, b, &mut parked), Begin::Go);
    assert!(parked.pieces().is_empty());
    for request in [&mut first, &mut parked] {
        capture.finish(request, Outcome::Succeeded);
    }
    replica.drain();
    let begins = Op::GapBegin { reason: GapReason::FilterFault, generation: 2 };
    assert_eq!(replica.records.last(), Some(&begins));
    assert!(capture.is_idle());
}

#[test]
fn a_finish_too_many_is_a_fault_and_not_a_crash() {
    let (capture, _replica) = capture(1 << 20, 1 << 20, 64);
    capture.finish(&mut InFlight::default(), Outcome::Succeeded);
    assert_eq!(capture.mode(), Mode::Off);
    assert!(capture.is_idle());
}

#[test]
fn a_ring_serves_one_capture_only() {
    let config = RingConfig::new(DiskId([1; 16]), Epoch(1), Lsn::FIRST, 1 << 20);
    let (_ring, ring) = Ring::create(&config).expect("a ring");
    let (_clock, clock) = HostClock::create().expect("a clock");
    let bell = || Bell::create().expect("an eventfd").as_fd().try_clone_to_owned().expect("a descriptor");
    let _first =
        Capture::attach(ring.as_fd(), clock.as_fd(), bell(), Runtime::real(|_| {})).expect("a capture");
    let error =
        Capture::attach(ring.as_fd(), clock.as_fd(), bell(), Runtime::real(|_| {})).expect_err("used");
    assert_eq!(error.kind(), EngineErrorKind::RingUsed);
    let error =
        Capture::attach(clock.as_fd(), clock.as_fd(), bell(), Runtime::real(|_| {})).expect_err("no ring");
    assert_eq!(error.kind(), EngineErrorKind::Ring);
}

/// A capture whose history is whole.
fn whole() -> (Arc<Capture>, Replica) {
    let (capture, mut replica) = capture(1 << 20, 1 << 20, 64);
    capture.unchanged();
    assert!(matches!(capture.producer().finish_resync(), capture_ring::Resync::Done(_)));
    replica.drain();
    (capture, replica)
}

fn is_closed(replica: &mut Replica) -> bool {
    replica.drain();
    replica.records.iter().any(|record| matches!(record, Op::Close { .. }))
}

fn image() -> ImageTag {
    ImageTag::from_halves([1, 2])
}

#[test]
fn a_disk_closed_at_rest_is_left_as_it_is() {
    let (capture, mut replica) = whole();
    capture.close(|| Some(image()));
    replica.drain();
    assert_eq!(replica.records.last(), Some(&Op::Close { image: image() }));
}

#[test]
fn a_close_after_capture_was_switched_off_says_nothing_of_the_image() {
    let (capture, mut replica) = whole();
    capture.detach();
    // What the guest writes from here on need not even come past the capture.
    capture.close(|| Some(image()));
    assert!(!is_closed(&mut replica));
}

#[test]
fn a_request_that_came_unseen_while_the_image_was_looked_at_is_in_no_closed_history() {
    let (capture, mut replica) = whole();
    capture.close(|| {
        let mut request = begin(&capture, &Request::write(0, 512, false), two()[0]);
        assert!(request.pieces().is_empty(), "capture is off");
        capture.finish(&mut request, Outcome::Succeeded);
        Some(image())
    });
    assert!(!is_closed(&mut replica));
}
