//! Files that version 1 wrote. They are never edited: what was written once must be read for ever, and what is written
//! today must be the same bytes. A new version gets a folder of its own beside `golden/v1`.

mod common;

use std::path::Path;

use common::*;
use journal_format::durable_mark::DurableMark;
use journal_format::index::IndexShape;
use journal_format::manifest::Manifest;
use journal_format::segment::{DataEntry, MetaEntry, SegmentMeta};
use journal_format::wire::{self, MESSAGE_HEADER_BYTES, MessageHeader};
use journal_format::{Codec, Frame, FrameMeta, Lsn, Op, bookmarks, codec, frame};

/// Reads a golden file. `CDP_WRITE_GOLDEN=1` writes those that are missing, for a new version.
fn golden(name: &str, now: &[u8]) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1").join(name);
    if std::env::var_os("CDP_WRITE_GOLDEN").is_some() && !now.is_empty() && !path.exists() {
        std::fs::write(&path, now).unwrap();
    }
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

const MARK: DurableMark = DurableMark { disk: DISK, durable_lsn: Lsn(77) };

fn sample_marks() -> Vec<bookmarks::Bookmark> {
    vec![bookmark(9, "before upgrade"), bookmark(3, "ä")]
}

#[test]
fn what_is_written_today_is_what_version_1_wrote() {
    let frame = sample_frame(11);
    let parsed = Frame::parse(&frame).unwrap();
    let files = [
        ("frame.bin", frame.clone()),
        ("segment-header.bin", sample_page()),
        ("data-entry.bin", data_entry(&parsed, &place(8192))),
        ("meta-entry.bin", meta_entry(&parsed, &place(4096), 10, 8192)),
        ("index.bin", sample_index()),
        ("manifest.bin", sample_manifest().encode().unwrap()),
        ("bookmarks.bin", bookmarks::encode(DISK, &sample_marks()).unwrap()),
        ("durable-mark.bin", MARK.encode().to_vec()),
        ("message.bin", wire::encode(&wire::Ping { number: 77 }).unwrap()),
    ];
    for (name, now) in files {
        assert!(golden(name, &now) == now, "{name} would be written differently");
    }
}

#[test]
fn what_version_1_wrote_is_read() {
    let read = |name| golden(name, &[]);
    let (frame, data, meta) = (read("frame.bin"), read("data-entry.bin"), read("meta-entry.bin"));
    let frame = Frame::parse(&frame).unwrap();
    assert_eq!(frame.records().collect::<Vec<_>>(), records(11, &one_of_each()));
    assert_eq!(DataEntry::parse(&data, &place(8192)).unwrap().data, frame.data());
    assert_eq!(MetaEntry::parse(&meta, &place(4096)).unwrap().frame.head(), frame.head());
    assert!(SegmentMeta::parse(&read("segment-header.bin")).is_ok());
    let index = read("index.bin");
    assert_eq!(IndexShape::check(&index).unwrap().open(&index).frames().count(), 2);
    assert_eq!(Manifest::parse(&read("manifest.bin")).unwrap(), sample_manifest());
    assert_eq!(bookmarks::parse(&read("bookmarks.bin")).unwrap(), (DISK, sample_marks()));
    assert_eq!(DurableMark::parse(&read("durable-mark.bin")).unwrap(), MARK);
    let message = read("message.bin");
    MessageHeader::parse(&message).unwrap();
    assert_eq!(wire::decode::<wire::Ping>(&message[MESSAGE_HEADER_BYTES..]).unwrap().number, 77);
}

/// Another release of zstd may compress differently, so these bytes are only read, not compared with today's.
#[test]
fn compressed_data_of_version_1_is_read() {
    let raw = [pattern(200), vec![7; 3800]].concat();
    let mut packed = Vec::new();
    let codec = codec::compress(&mut raw.clone(), 3, &mut packed);
    let meta = FrameMeta { codec, ..meta(1, raw.len()) };
    let now = frame::encode(&meta, &records(1, &[Op::Flush]), &packed).unwrap();
    let bytes = golden("frame-zstd.bin", &now);
    let frame = Frame::parse(&bytes).unwrap();
    assert_eq!(frame.header().codec(), Codec::Zstd);
    assert_eq!(codec::decompress(Codec::Zstd, frame.data(), frame.header().raw_bytes()).unwrap(), raw);
}
