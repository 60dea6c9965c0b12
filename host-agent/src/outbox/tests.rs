//! Tests of the outbox.

use std::os::unix::fs::FileExt;

use super::*;

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
    let (outbox, mut writer) = outbox(4096);
    let mut lsn = 1;
    while writer.push(&frame(lsn, lsn, 500)).is_ok() {
        lsn += 1;
    }
    assert!(lsn > 3);
    outbox.release(Lsn(0));
    assert_eq!(writer.push(&frame(lsn, lsn, 500)), Err(Full));
    outbox.release(Lsn(1));
    assert_eq!(outbox.oldest_lsn(), Some(Lsn(2)));
    writer.push(&frame(lsn, lsn, 500)).unwrap();
}

#[test]
fn an_outbox_that_keeps_running_empty_touches_little_memory() {
    use std::os::unix::fs::MetadataExt;
    let (outbox, mut writer) = outbox(64 << 20);
    for lsn in 1..400 {
        writer.push(&frame(lsn, lsn, 500_000)).unwrap();
        assert_eq!(outbox.entries(Lsn(lsn), Lsn::MAX, 1, 1)[0].first_lsn, Lsn(lsn));
        outbox.release(Lsn(lsn));
    }
    let touched = outbox.memory().file().metadata().unwrap().blocks() * 512;
    assert!(touched < 2 * OUTBOX_REUSE_BYTES, "{touched} bytes");
}

#[test]
fn a_waiting_writer_is_woken_by_a_release() {
    let (outbox, mut writer) = outbox(4096);
    let mut lsn = 1;
    while writer.push(&frame(lsn, lsn, 500)).is_ok() {
        lsn += 1;
    }
    let other = Arc::clone(&outbox);
    let thread = std::thread::spawn(move || other.release(Lsn(2)));
    while writer.push(&frame(lsn, lsn, 500)).is_err() {
        writer.wait_for_release(Duration::from_millis(20));
    }
    thread.join().unwrap();
    assert_eq!(outbox.oldest_lsn(), Some(Lsn(3)));
}
