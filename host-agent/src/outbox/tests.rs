//! Tests of the outbox.

use std::collections::BTreeSet;
use std::os::unix::fs::FileExt;

use journal_format::{ByteRange, DataSpan, Op, Record};

use super::adopt::adopt;
use super::*;
use crate::packer::Packer;

fn frame(first: u64, last: u64, data: usize) -> PackedFrame {
    let byte = u8::try_from(first % 251).unwrap();
    PackedFrame {
        first_lsn: Lsn(first),
        last_lsn: Lsn(last),
        last_stamp: Stamp(last),
        disk_bytes: 1 << 30,
        raw_bytes: 7,
        head: vec![byte; 100],
        data: vec![byte ^ 0xff; data],
    }
}

fn outbox(bytes: u64) -> (Arc<Outbox>, OutboxWriter) {
    let packed = Packed { lsn: Lsn(0), stamp: Stamp(0), disk_bytes: 1 << 30 };
    Outbox::create(DiskId([1; 16]), Epoch(1), bytes, packed, Lsn(0)).unwrap()
}

fn message(outbox: &Outbox, entry: &Entry) -> Vec<u8> {
    let mut bytes = vec![0; entry.len];
    outbox.memory().file().read_exact_at(&mut bytes, entry.at as u64).unwrap();
    bytes
}

#[test]
fn frames_come_back_in_order_as_whole_wire_messages() {
    let (outbox, mut writer) = outbox(1 << 16);
    writer.push(&frame(1, 10, 50)).unwrap();
    writer.push(&frame(11, 11, 60)).unwrap();
    let entries = outbox.entries(Lsn(1), Lsn::MAX, usize::MAX, 100);
    assert_eq!(entries.len(), 2);
    let bytes = message(&outbox, &entries[1]);
    let (kind, len) = MessageHeader::parse(&bytes).unwrap();
    assert_eq!((kind, len), (MessageType::Frame, 160));
    assert_eq!(bytes[16..116], [11; 100]);
    assert_eq!(bytes[116..], [11 ^ 0xff; 60]);
    assert_eq!(outbox.raw_bytes(), 14);
}

#[test]
fn sending_starts_at_the_frame_that_holds_the_lsn() {
    let (outbox, mut writer) = outbox(1 << 16);
    for first in [1, 11, 21] {
        writer.push(&frame(first, first + 9, 50)).unwrap();
    }
    let firsts = |from, bytes, most| -> Vec<u64> {
        outbox.entries(Lsn(from), Lsn::MAX, bytes, most).iter().map(|e| e.first_lsn.0).collect()
    };
    assert_eq!(firsts(11, usize::MAX, 9), [11, 21]);
    assert_eq!(firsts(15, usize::MAX, 9), [11, 21], "half acknowledged: the whole frame again");
    assert_eq!(firsts(31, usize::MAX, 9), Vec::<u64>::new());
    assert_eq!(firsts(1, 1, 9), [1], "at least one");
    assert_eq!(firsts(1, usize::MAX, 2), [1, 11]);
    let to_20 = outbox.entries(Lsn(1), Lsn(29), usize::MAX, 9);
    assert_eq!(to_20.last().unwrap().last_lsn, Lsn(20), "not what ends behind the bound");
}

#[test]
fn a_full_outbox_takes_more_only_after_a_release() {
    let (outbox, mut writer) = outbox(2 * SEGMENT_BYTES);
    let mut lsn = 1;
    while writer.push(&frame(lsn, lsn, 1_000_000)).is_ok() {
        lsn += 1;
    }
    assert_eq!(lsn, 11, "five in each segment");
    outbox.release(Lsn(4));
    assert_eq!(writer.push(&frame(lsn, lsn, 1_000_000)), Err(Full), "the segment is still in use");
    outbox.release(Lsn(5));
    assert_eq!(outbox.oldest_lsn(), Some(Lsn(6)));
    writer.push(&frame(lsn, lsn, 1_000_000)).unwrap();
}

/// Bytes of the memory that were ever written to.
fn touched(outbox: &Outbox) -> u64 {
    use std::os::unix::fs::MetadataExt;
    outbox.memory().file().metadata().unwrap().blocks() * 512
}

#[test]
fn an_outbox_that_keeps_up_touches_little_memory() {
    // Always empty, and always a few frames behind.
    for (behind, most) in [(0, 1_000_000), (1, SEGMENT_BYTES * 2), (15, SEGMENT_BYTES * 3)] {
        let (outbox, mut writer) = outbox(64 << 20);
        for lsn in 1..400 {
            writer.push(&frame(lsn, lsn, 500_000)).unwrap();
            let newest = outbox.entries(Lsn(lsn), Lsn::MAX, 1, 1)[0];
            let bytes = message(&outbox, &newest);
            assert_eq!(bytes[bytes.len() - 1], u8::try_from(lsn % 251).unwrap() ^ 0xff);
            outbox.release(Lsn(lsn.saturating_sub(behind)));
        }
        let touched = touched(&outbox);
        assert!(touched <= most + 4096, "{touched} bytes when {behind} frames are not acknowledged");
        assert!(outbox.used_bytes() <= (behind + 1) * 1_000_000);
    }
}

/// A frame as it comes from the packer, of one write that does not compress.
fn real_frame(lsn: u64, bytes: usize, random: &mut impl FnMut(u64) -> u64) -> PackedFrame {
    let mut packer = Packer::new(DiskId([1; 16]), Epoch(1), 1 << 30);
    let data: Vec<u8> =
        std::iter::repeat_with(|| random(u64::MAX).to_le_bytes()).take(bytes / 8).flatten().collect();
    let (pos, len) = (packer.append(&data), u32::try_from(data.len()).unwrap());
    let range = ByteRange::new(0, u64::from(len)).unwrap();
    let op = Op::Write { range, data: DataSpan { pos, len }, fill: false, fua: false };
    packer.add(Duration::ZERO, Record { lsn: Lsn(lsn), stamp: Stamp(lsn), op });
    packer.close().unwrap().unwrap()
}

/// Whatever is pushed and released, what waits is there and whole, for whoever reads it and for whoever adopts it.
#[test]
fn frames_stay_whole_in_segments_that_are_used_again_and_again() {
    let mut state = 12345_u64;
    let mut random = |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 16) % below
    };
    let (outbox, mut writer) = outbox(4 * SEGMENT_BYTES);
    let (mut lsn, mut released, mut full, mut orders) = (1, 0, 0, BTreeSet::new());
    let mut sent: VecDeque<Vec<u8>> = VecDeque::new();
    for step in 0..900 {
        let bytes = 8 + if random(20) == 0 { random(4 << 20) } else { random(400_000) };
        let frame = real_frame(lsn, usize::try_from(bytes).unwrap(), &mut random);
        let is_full = writer.push(&frame).is_err();
        full += u32::from(is_full);
        if !is_full {
            sent.push_back([&frame.head[..], &frame.data[..]].concat());
            lsn += 1;
        }
        if is_full || random(80) == 0 {
            // Now all, now some.
            let waiting = lsn - 1 - released;
            let now = if random(4) == 0 { waiting } else { random(waiting + 1) };
            drop(sent.drain(..usize::try_from(now).unwrap()));
            released += now;
            outbox.release(Lsn(released));
        }
        assert!(outbox.used_bytes() <= outbox.capacity_bytes());
        if step % 10 > 0 {
            continue;
        }
        let entries = outbox.entries(Lsn(0), Lsn::MAX, usize::MAX, usize::MAX);
        assert_eq!(entries.len(), sent.len());
        let places: Vec<usize> = entries.iter().map(|entry| entry.at / SEGMENT_BYTES as usize).collect();
        orders.insert(places.windows(2).any(|pair| pair[0] > pair[1]));
        // Who adopts begins with what was acknowledged since the last frame, which is still there.
        let adopted = adopt(outbox.memory().file(), DiskId([1; 16]), Epoch(1), 0, None).unwrap();
        assert_eq!((adopted.packed.lsn, adopted.last), (Lsn(lsn - 1), Lsn(lsn - 1)));
        adopted.outbox.release(Lsn(released));
        let again = adopted.outbox.entries(Lsn(0), Lsn::MAX, usize::MAX, usize::MAX);
        for (of, entries) in [(&outbox, entries), (&adopted.outbox, again)] {
            assert_eq!(entries.len(), sent.len());
            for ((entry, expected), number) in entries.iter().zip(&sent).zip(released + 1..) {
                assert_eq!((entry.first_lsn, entry.last_lsn), (Lsn(number), Lsn(number)));
                assert!(message(of, entry)[MESSAGE_HEADER_BYTES..] == expected[..], "frame {number}");
            }
        }
    }
    assert!(full > 10 && lsn > 600, "{full} times full, {lsn} frames");
    assert_eq!(orders.len(), 2, "segments are used in another order than they lie in");
    outbox.release(Lsn(lsn));
    assert_eq!((outbox.used_bytes(), outbox.oldest_lsn()), (0, None));
}

#[test]
fn a_waiting_writer_is_woken_by_a_release() {
    let (outbox, mut writer) = outbox(SEGMENT_BYTES);
    let mut lsn = 1;
    while writer.push(&frame(lsn, lsn, 2_000_000)).is_ok() {
        lsn += 1;
    }
    let other = Arc::clone(&outbox);
    let thread = std::thread::spawn(move || other.release(Lsn(2)));
    while writer.push(&frame(lsn, lsn, 2_000_000)).is_err() {
        writer.wait_for_release(Duration::from_millis(20));
    }
    thread.join().unwrap();
    assert_eq!(outbox.oldest_lsn(), Some(Lsn(3)));
}
