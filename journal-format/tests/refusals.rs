//! What decoders refuse, one worked example each, with the kind of error that it must be.

mod common;

use common::*;
use journal_format::ImageTag;
use journal_format::index::{IndexBuilder, IndexHeader, IndexShape};
use journal_format::limits::PART_RAW_BYTES;
use journal_format::record::RawRecord;
use journal_format::segment::{
    DataEntry, DataPlace, META_ENTRY_BYTES, MetaEntry, SegmentHeader, SegmentMeta,
};
use journal_format::wire::{self, MessageHeader, MessageType};
use journal_format::{
    CheckedFrame, Codec, DataSpan, DiskId, Epoch, FormatErrorKind, Frame, FrameHeader, FrameMeta, Lsn, Op,
    Record, SegmentNumber, Stamp, codec, frame, parts,
};
use zerocopy::little_endian::{U16, U32, U64};

fn seal(header: &mut [u8]) {
    let (body, crc) = header.split_at_mut(header.len() - 4);
    crc.copy_from_slice(&crc32c::crc32c(body).to_le_bytes());
}

/// Changes a field of the header at the start of `bytes` and makes the header's checksum right again.
fn with_field(bytes: &[u8], layout: &[journal_format::layout::Field], name: &str, value: &[u8]) -> Vec<u8> {
    let (_, at, length) = *layout.iter().find(|field| field.0 == name).unwrap();
    let header = layout.iter().map(|field| field.2).sum();
    let mut out = bytes.to_vec();
    assert_eq!(value.len(), length, "{name}");
    out[at..at + length].copy_from_slice(value);
    seal(&mut out[..header]);
    out
}

#[test]
fn a_frame_header_says_why_it_is_refused() {
    use FormatErrorKind::{Invalid, Magic, Truncated, Version};
    let cases: &[(&str, &[u8], FormatErrorKind)] = &[
        ("magic", b"CDPFRAMF", Magic),
        ("version", &2_u16.to_le_bytes(), Version),
        ("header_bytes", &127_u16.to_le_bytes(), Invalid),
        ("codec", &[2], Invalid),
        ("codec", &[1], Invalid),
        ("reserved_a", &[0, 1, 0], Invalid),
        ("reserved_b", &[9; 32], Invalid),
        ("epoch", &[0; 8], Invalid),
        ("first_lsn", &[0; 8], Invalid),
        ("first_lsn", &(u64::MAX - 9).to_le_bytes(), Invalid),
        ("first_stamp", &u64::MAX.to_le_bytes(), Invalid),
        ("first_stamp", &1_u64.to_le_bytes(), Invalid),
        ("last_stamp", &9999_u64.to_le_bytes(), Invalid),
        ("disk_bytes", &((1_u64 << 48) + 1).to_le_bytes(), Invalid),
        ("record_count", &[0; 4], Invalid),
        ("record_count", &((16 << 10) + 1_u32).to_le_bytes(), Invalid),
        ("record_count", &1000_u32.to_le_bytes(), Truncated),
        ("raw_bytes", &299_u32.to_le_bytes(), Invalid),
        ("raw_bytes", &((4 << 20) + 1_u32).to_le_bytes(), Invalid),
        ("data_bytes", &301_u32.to_le_bytes(), Invalid),
    ];
    for (name, value, kind) in cases {
        let bytes = with_field(&sample_frame(11), FrameHeader::LAYOUT, name, value);
        assert_eq!(Frame::parse(&bytes).unwrap_err().kind(), *kind, "{name} = {value:?}");
    }
}

#[test]
fn checked_bytes_are_one_whole_frame_and_nothing_else() {
    let bytes = sample_frame(11);
    let (checked, parsed) = (CheckedFrame::parse(bytes.clone()).unwrap(), Frame::parse(&bytes).unwrap());
    assert_eq!((checked.frame().head(), checked.frame().data()), (parsed.head(), parsed.data()));
    assert!(checked.frame().records().eq(parsed.records()));
    assert!(CheckedFrame::parse([bytes.as_slice(), &[0]].concat()).is_err(), "a byte behind it");
    for damaged in 0..bytes.len() {
        let mut bytes = bytes.clone();
        bytes[damaged] ^= 1;
        assert!(CheckedFrame::parse(bytes).is_err(), "byte {damaged}");
    }
}

#[test]
fn a_frame_of_compressed_data_that_did_not_shrink_is_refused() {
    let ops = [Op::Flush];
    for (raw_bytes, data) in [(0, &b""[..]), (100, b""), (3, b"abc"), (2, b"abc")] {
        let meta = FrameMeta { codec: Codec::Zstd, ..meta(1, raw_bytes) };
        assert!(frame::encode(&meta, &records(1, &ops), data).is_err(), "{raw_bytes} bytes as {data:?}");
    }
}

#[test]
fn a_frame_that_would_not_parse_is_not_encoded() {
    let data = pattern(10);
    let write = |pos, len| {
        let range = range(0, u64::from(len));
        Op::Write { range, data: DataSpan { pos, len }, fill: false, fua: false }
    };
    let encode = |records: &[Record]| frame::encode(&meta(1, 10), records, &data);
    assert!(encode(&records(1, &[write(0, 10)])).is_ok());
    assert!(encode(&[]).is_err(), "no record");
    assert!(encode(&records(1, &[write(1, 10)])).is_err(), "data past the frame's");
    let mut backwards = records(1, &[Op::Flush, Op::Flush]);
    backwards[0].stamp = Stamp(backwards[1].stamp.0 + 1);
    assert!(encode(&backwards).is_err(), "stamps run backwards");
    let mut dip = records(1, &[Op::Flush, Op::Flush, Op::Flush]);
    dip[1].stamp = Stamp(dip[2].stamp.0 + 1);
    assert!(encode(&dip).is_err(), "stamps run backwards between the first and the last");
    assert!(encode(&records(1, &vec![Op::Flush; (16 << 10) + 1])).is_err(), "too many records");
    let late = FrameMeta { epoch: Epoch(0), ..meta(1, 10) };
    assert!(frame::encode(&late, &records(1, &[Op::Flush]), &data).is_err(), "no epoch");
}

fn raw(op: Op) -> RawRecord {
    RawRecord::encode(&Record { lsn: Lsn(1), stamp: Stamp(7), op })
}

#[test]
fn a_record_with_a_field_out_of_range_is_refused() {
    let [gap, write, _, zero, discard, flush, resize, bookmark, gap_end, void]: [Op; 10] =
        one_of_each().try_into().unwrap();
    type Change = fn(&mut RawRecord);
    let changes: &[(&str, Op, Change)] = &[
        ("unknown kind", flush, |r| r.kind = 11),
        ("close with a flag", Op::Close { image: ImageTag([1; 16]) }, |r| r.flags = 1),
        ("kind 0", void, |r| r.kind = 0),
        ("stamp 0", flush, |r| r.stamp = U64::new(0)),
        ("largest stamp", flush, |r| r.stamp = U64::new(u64::MAX)),
        ("write with may-unmap", write, |r| r.flags |= 4),
        ("write with a reserved flag", write, |r| r.flags |= 8),
        ("write of nothing", write, |r| r.length = U64::new(0)),
        ("write over 4 MiB", write, |r| r.length = U64::new((4 << 20) + 1)),
        ("write past the largest disk", write, |r| r.offset = U64::new(1 << 48)),
        ("write past 64 bits", write, |r| r.offset = U64::new(u64::MAX)),
        ("write with data past 4 GiB", write, |r| r.data_pos = U32::new(u32::MAX)),
        ("write with a reason", write, |r| r.reason = U16::new(1)),
        ("zero of nothing", zero, |r| r.length = U64::new(0)),
        ("zero with data", zero, |r| r.data_pos = U32::new(1)),
        ("discard with a flag", discard, |r| r.flags = 1),
        ("discard of nothing", discard, |r| r.length = U64::new(0)),
        ("flush with an offset", flush, |r| r.offset = U64::new(1)),
        ("flush with a length", flush, |r| r.length = U64::new(1)),
        ("flush with FUA", flush, |r| r.flags = 2),
        ("resize with a length", resize, |r| r.length = U64::new(1)),
        ("resize over the limit", resize, |r| r.offset = U64::new((1 << 48) + 1)),
        ("bookmark with an offset", bookmark, |r| r.offset = U64::new(1)),
        ("bookmark without a name", bookmark, |r| r.length = U64::new(0)),
        ("bookmark of 256 bytes", bookmark, |r| r.length = U64::new(256)),
        ("gap for no reason", gap, |r| r.reason = U16::new(0)),
        ("gap for an unknown reason", gap, |r| r.reason = U16::new(9)),
        ("gap for a reason over 255", gap, |r| r.reason = U16::new(257)),
        ("gap with a length", gap, |r| r.length = U64::new(1)),
        ("gap-end with a reason", gap_end, |r| r.reason = U16::new(1)),
        ("gap-end with a length", gap_end, |r| r.length = U64::new(1)),
        ("void with an offset", void, |r| r.offset = U64::new(1)),
    ];
    for (name, op, change) in changes {
        let mut bytes = raw(*op);
        assert!(bytes.decode(Lsn(1)).is_ok(), "{name}: before the change");
        change(&mut bytes);
        assert_eq!(bytes.decode(Lsn(1)).map_err(|e| e.kind()), Err(FormatErrorKind::Invalid), "{name}");
    }
}

#[test]
fn a_segment_header_says_why_it_is_refused() {
    use FormatErrorKind::{Invalid, Magic, Version};
    let cases: &[(&str, &[u8], FormatErrorKind)] = &[
        ("magic", b"CDPSEGMX", Magic),
        ("version", &2_u16.to_le_bytes(), Version),
        ("header_bytes", &64_u16.to_le_bytes(), Invalid),
        ("kind", &[0], Invalid),
        ("kind", &[4], Invalid),
        ("reserved_a", &[1, 0, 0], Invalid),
        ("reserved_b", &[1; 16], Invalid),
        ("first_lsn", &[0; 8], Invalid),
        ("segment", &[0; 4], Invalid),
    ];
    for (name, value, kind) in cases {
        let page = with_field(&sample_page(), SegmentHeader::LAYOUT, name, value);
        assert_eq!(SegmentMeta::parse(&page).unwrap_err().kind(), *kind, "{name} = {value:?}");
    }
}

#[test]
fn an_entry_where_none_can_be_is_not_encoded() {
    let bytes = sample_frame(11);
    let frame = Frame::parse(&bytes).unwrap();
    let data = |position| Some(DataPlace { segment: SegmentNumber(7), position });
    let no_segment = journal_format::segment::Place { segment: SegmentNumber(0), ..place(4096) };
    let other_disk = journal_format::segment::Place { disk: DiskId([1; 16]), ..place(4096) };
    for wrong in
        [place(0), place(4095), place(4100), place(64 << 30), place(u64::MAX), no_segment, other_disk]
    {
        assert!(DataEntry::encode_header(&wrong, frame.header()).is_err(), "{wrong:?}");
        assert!(MetaEntry::encode_header(&wrong, &frame, Lsn(0), data(4096)).is_err(), "{wrong:?}");
    }
    for wrong in [None, data(0), data(4100), data(64 << 30)] {
        assert!(MetaEntry::encode_header(&place(4096), &frame, Lsn(0), wrong).is_err(), "data at {wrong:?}");
    }
    assert!(
        MetaEntry::encode_header(&place(4096), &frame, Lsn(11), data(4096)).is_err(),
        "durable before written"
    );
}

#[test]
fn a_metadata_entry_whose_head_is_another_frames_is_refused() {
    let (bytes, other) = (sample_frame(11), sample_frame(12));
    let mut entry = meta_entry(&Frame::parse(&bytes).unwrap(), &place(4096), 0, 4096);
    entry.truncate(META_ENTRY_BYTES);
    entry.extend_from_slice(Frame::parse(&other).unwrap().head());
    assert_eq!(MetaEntry::parse(&entry, &place(4096)).unwrap_err().kind(), FormatErrorKind::Checksum);
}

/// Where the index's tables begin: header page, own header, then two frames, two wide extents, eight marks, two pages, two
/// chunks, eight extents.
const INDEX_BODY: usize = 4096 + 96;
/// From there.
const WIDE: usize = 2 * 72;
const MARKS: usize = WIDE + 2 * 24;
const PAGES: usize = MARKS + 8 * 40;
const CHUNKS: usize = PAGES + 2 * 8;
const EXTENTS: usize = CHUNKS + 2 * 12;
const END: usize = EXTENTS + 8 * 24;

/// Changes `value.len()` bytes of a table and makes all checksums right again.
fn with_entry(bytes: &[u8], at: usize, value: &[u8]) -> Vec<u8> {
    let mut out = bytes.to_vec();
    let body = &mut out[INDEX_BODY..];
    body[at..][..value.len()].copy_from_slice(value);
    for (page, entries) in [CHUNKS..EXTENTS, EXTENTS..END].into_iter().enumerate() {
        let crc = crc32c::crc32c(&body[entries]).to_le_bytes();
        body[PAGES + 8 * page..][..4].copy_from_slice(&crc);
    }
    let crc = crc32c::crc32c(&body[..CHUNKS]).to_le_bytes();
    let (_, at, _) = *IndexHeader::LAYOUT.iter().find(|field| field.0 == "body_crc").unwrap();
    out[4096 + at..][..4].copy_from_slice(&crc);
    seal(&mut out[4096..INDEX_BODY]);
    out
}

#[test]
fn an_index_entry_that_cannot_be_is_refused() {
    let (bytes, one) = (sample_index(), 1_u32.to_le_bytes());
    // Chunks 0 and 1; chunk 0 has the write, the zero and the first half of the discard of both frames.
    assert_eq!(bytes.len(), INDEX_BODY + END);
    let cases: &[(&str, usize, &[u8])] = &[
        ("frames with a hole between them", 72, &[99]),
        ("frame before its header's first stamp", 8, &[1]),
        ("second frame before the first", 72 + 8, &[0; 8]),
        ("frame that ends before it begins", 16, &[0; 8]),
        ("frame without an epoch", 24, &[0; 8]),
        ("frame on no multiple of 64", 32, &[1]),
        ("frame in the header page", 32, &[0; 8]),
        ("data in the header page", 40, &[0; 8]),
        ("data in no segment", 48, &[0; 4]),
        ("frame without records", 52, &[0; 4]),
        ("raw data of another length than stored", 56, &one),
        ("unknown codec", 68, &[2]),
        ("compressed data that did not shrink", 68, &[1]),
        ("reserved byte in a frame", 69, &[1]),
        ("page that begins with another chunk", CHUNKS, &one),
        ("page that is said to begin with another chunk", PAGES + 4, &one),
        ("page of extents with a first chunk", PAGES + 8 + 4, &one),
        ("chunks out of order", CHUNKS + 12, &[0]),
        ("chunk whose extents are not next", CHUNKS + 4, &one),
        ("chunk without extents", CHUNKS + 8, &[0; 4]),
        ("chunk with more extents than there are", CHUNKS + 12 + 8, &[200]),
        ("extents out of order", EXTENTS, &[255]),
        ("two extents of one record", EXTENTS + 24, &[12]),
        ("extent before the segment", EXTENTS, &[1]),
        ("extent over the end of its chunk", EXTENTS + 8, &[0, 0, 4, 0]),
        ("empty extent", EXTENTS + 12, &[0; 4]),
        ("extent of no frame", EXTENTS + 16, &[2, 0, 0, 0]),
        ("extent of another frame", EXTENTS + 16, &one),
        ("extent past its frame's data", EXTENTS + 20, &[45, 0, 0, 0]),
        ("wide extents out of order", WIDE, &[255]),
        ("wide extent that is not wide", WIDE + 16, &[0; 8]),
        ("wide extent past the largest disk", WIDE + 8, &[0xff; 8]),
        ("marks out of order", MARKS, &[255]),
        ("mark that is no record", MARKS + 8 + 24, &[77]),
        ("mark that is a flush", MARKS + 8, &raw_bytes(Op::Flush)),
    ];
    assert!(IndexShape::check(&with_entry(&bytes, 0, &[])).is_ok());
    for (name, at, value) in cases {
        let changed = with_entry(&bytes, *at, value);
        let error = IndexShape::check(&changed).expect_err(name);
        assert_eq!(error.kind(), FormatErrorKind::Invalid, "{name}: {error}");
        let lazily = IndexShape::parse(&changed).map(|shape| {
            let index = shape.open(&changed);
            let looked = chunks(&index).and_then(|_| extents(&index, 0, 0, u64::MAX));
            looked.map_err(|bad| (bad.offset as usize, bad.error))
        });
        match lazily {
            Err(opening) => assert!(*at < CHUNKS && opening == error, "{name}: {opening}"),
            Ok(Err((offset, looking))) => {
                let page = if *at < EXTENTS { CHUNKS } else { EXTENTS };
                assert_eq!((offset, looking), (INDEX_BODY + page, error), "{name}");
            }
            // The one rule for extents that speaks of several.
            Ok(Ok(_)) => assert_eq!(error.to_string(), "index: invalid: a chunk's extents are out of order"),
        }
    }
}

fn raw_bytes(op: Op) -> [u8; 32] {
    zerocopy::transmute!(raw(op))
}

#[test]
fn an_index_header_says_why_it_is_refused() {
    use FormatErrorKind::{Invalid, Magic, Truncated};
    let cases: &[(&str, &[u8], FormatErrorKind)] = &[
        ("magic", b"CDPINDEY", Magic),
        ("first_lsn", &12_u64.to_le_bytes(), Invalid),
        ("last_lsn", &31_u64.to_le_bytes(), Invalid),
        ("last_lsn", &u64::MAX.to_le_bytes(), Invalid),
        ("first_stamp", &1_u64.to_le_bytes(), Invalid),
        ("last_stamp", &9999_u64.to_le_bytes(), Invalid),
        ("disk_bytes", &((1_u64 << 48) + 1).to_le_bytes(), Invalid),
        ("chunk_count", &9_u32.to_le_bytes(), Invalid),
        ("extent_count", &u32::MAX.to_le_bytes(), Truncated),
        ("extent_count", &7_u32.to_le_bytes(), Invalid),
        ("frame_count", &u32::MAX.to_le_bytes(), Truncated),
        ("mark_count", &7_u32.to_le_bytes(), Invalid),
        ("reserved", &[1; 20], Invalid),
    ];
    for (name, value, kind) in cases {
        let mut bytes = sample_index();
        let own = with_field(&bytes[4096..], IndexHeader::LAYOUT, name, value);
        bytes.splice(4096.., own);
        assert_eq!(IndexShape::check(&bytes).unwrap_err().kind(), *kind, "{name} = {value:?}");
    }
}

#[test]
fn a_frame_that_is_not_next_is_not_indexed() {
    let (bytes, again) = (sample_frame(11), sample_frame(21));
    let (frame, next) = (Frame::parse(&bytes).unwrap(), Frame::parse(&again).unwrap());
    let at = Some(DataPlace { segment: SegmentNumber(7), position: 4096 });
    let mut builder = IndexBuilder::new(DiskId([1; 16]), SegmentNumber(7));
    assert!(builder.push(&frame, 4096, at).is_err(), "another disk's");
    let mut builder = IndexBuilder::new(DISK, SegmentNumber(7));
    builder.push(&next, 4096, at).unwrap();
    assert!(builder.push(&frame, 8192, at).is_err(), "an earlier one");
    assert!(IndexBuilder::new(DISK, SegmentNumber(7)).finish().is_err(), "no frame at all");
}

#[test]
fn a_message_header_says_why_it_is_refused() {
    use FormatErrorKind::{Magic, TooLarge, Version};
    let message = wire::encode(&wire::Ping { number: 1 }).unwrap();
    let cases: &[(&str, &[u8], FormatErrorKind)] = &[
        ("magic", b"HTTP", Magic),
        ("kind", &[0, 0], Version),
        ("kind", &[0, 1], Version),
        ("reserved", &[1, 0], Version),
        ("body_bytes", &((64 << 10) + 1_u32).to_le_bytes(), TooLarge),
    ];
    for (name, value, kind) in cases {
        let bytes = with_field(&message[..16], MessageHeader::LAYOUT, name, value);
        assert_eq!(MessageHeader::parse(&bytes).unwrap_err().kind(), *kind, "{name} = {value:?}");
    }
    let most = MessageType::Frame.max_body_bytes();
    assert!(MessageHeader::new(MessageType::Frame, most).is_ok());
    assert_eq!(MessageHeader::new(MessageType::Frame, most + 1).unwrap_err().kind(), TooLarge);
    assert!(wire::disk_id(&[0; 15]).is_err() && wire::disk_id(&[0; 17]).is_err());
    assert!(wire::decode::<wire::Ping>(&[0xff; 3]).is_err());
}

#[test]
fn data_of_another_length_than_the_header_says_is_refused() {
    let mut packed = Vec::new();
    let codec = codec::compress(&mut vec![0; 4096], 1, &mut packed);
    assert!(codec::decompress(codec, &packed, 4096).is_ok());
    for wrong in [0, 4095, 4097] {
        assert!(codec::decompress(codec, &packed, wrong).is_err(), "{wrong}");
    }
    let over = codec::decompress(codec, &packed, (4 << 20) + 1).unwrap_err();
    assert_eq!(over.kind(), FormatErrorKind::TooLarge, "nothing is allocated by a length over its limit");
    assert!(codec::decompress(Codec::Raw, &[1, 2, 3], 4).is_err());
}

#[test]
fn texts_that_are_no_disk_id_are_refused() {
    let good = "6a7d0a54-8a2c-4c0e-9d0b-1f2e3d4c5b6a";
    assert!(good.parse::<DiskId>().is_ok());
    let wrong = ["", "6a7d0a548a2c4c0e9d0b1f2e3d4c5b6a", &good[1..], "6a7d0a54-8a2c-4c0e-9d0b-1f2e3d4c5b6g"];
    let multibyte = "6a7d0a54-8a2c-4c0e-9d0b-1f2e3d4c5bé";
    let dashes = "6a7d0a548-a2c-4c0e-9d0b-1f2e3d4c5b6a";
    for text in wrong.into_iter().chain([multibyte, dashes]) {
        assert!(text.parse::<DiskId>().is_err(), "{text}");
    }
}

/// A frame in four parts: zeroes, noise, zeroes, and a short last one.
fn frame_in_parts() -> (Vec<u8>, Vec<u8>) {
    let part = PART_RAW_BYTES as usize;
    let mut x = 1_u32;
    let noise = std::iter::repeat_with(|| {
        x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (x >> 24) as u8
    });
    let raw: Vec<u8> = [vec![0; part], noise.take(part).collect(), vec![1; part], vec![2; 100]].concat();
    let mut data = Vec::new();
    let codec = codec::compress(&mut raw.clone(), 1, &mut data);
    assert_eq!(codec, Codec::Parts);
    let meta = FrameMeta { codec, ..meta(1, raw.len()) };
    (raw, frame::encode(&meta, &records(1, &[Op::Flush]), &data).unwrap())
}

#[test]
fn each_part_is_read_by_itself_and_no_byte_of_it_can_change_unseen() {
    let (raw, bytes) = frame_in_parts();
    let parsed = Frame::parse(&bytes).unwrap();
    let (header, data) = (*parsed.header(), parsed.data());
    let at_end = parts::table_place(header.raw_bytes(), header.data_bytes()).unwrap();
    let table = &data[at_end.start as usize..at_end.end as usize];
    assert_eq!(crc32c::crc32c(table), header.data_crc(), "who knows the frame knows its table");
    let parts = parts::parse_table(table, header.raw_bytes(), header.data_bytes()).unwrap();
    let stored: Vec<u32> = parts.iter().map(|part| part.stored_bytes).collect();
    assert!(
        stored[0] < 100 && stored[1] == PART_RAW_BYTES && stored[2] < 100 && stored[3] < 100,
        "{stored:?}"
    );
    let mut from = 0;
    for part in &parts {
        let mut out = vec![9];
        codec::decompress_part(part, &data[part.stored()], &mut out).unwrap();
        let upto = from + part.raw_bytes as usize;
        assert!(out[1..] == raw[from..upto], "appended");
        from = upto;
        for at in part.stored().step_by(997) {
            let mut wrong = data[part.stored()].to_vec();
            wrong[at - part.stored().start] ^= 4;
            let refused = codec::decompress_part(part, &wrong, &mut out).unwrap_err();
            assert_eq!(refused.kind(), FormatErrorKind::Checksum);
        }
        assert!(codec::decompress_part(part, &data[part.stored()][1..], &mut out).is_err(), "one byte less");
    }
    let entry = data_entry(&parsed, &place(8192));
    assert_eq!(DataEntry::parse(&entry, &place(8192)).unwrap().data, data);
    for at in
        (bytes.len() - data.len()..bytes.len()).step_by(89).chain(bytes.len() - table.len()..bytes.len())
    {
        let mut wrong = bytes.clone();
        wrong[at] ^= 1;
        assert!(Frame::parse(&wrong).is_err(), "byte {at} of the frame");
        let mut wrong = entry.clone();
        let at = at + entry.len() - bytes.len();
        wrong[at] ^= 1;
        assert!(DataEntry::parse(&wrong, &place(8192)).is_err(), "byte {at} of the entry");
    }
}

#[test]
fn a_table_of_parts_that_do_not_fill_the_data_is_refused() {
    let (raw, bytes) = frame_in_parts();
    let parsed = Frame::parse(&bytes).unwrap();
    let data = parsed.data();
    let header = parsed.header();
    let (raw_bytes, data_bytes) = (header.raw_bytes(), header.data_bytes());
    let place = parts::table_place(raw_bytes, data_bytes).unwrap();
    let table = data[place.start as usize..].to_vec();
    let refused =
        |table: &[u8], raw_bytes, data_bytes| parts::parse_table(table, raw_bytes, data_bytes).is_err();
    assert!(!refused(&table, raw_bytes, data_bytes));
    assert!(refused(&table[8..], raw_bytes, data_bytes) && refused(&[], raw_bytes, data_bytes), "too short");
    assert!(refused(&table, raw_bytes, data_bytes + 1) && refused(&table, raw_bytes, data_bytes - 1));
    assert!(refused(&table, raw_bytes + PART_RAW_BYTES, data_bytes), "a part more");
    let mut swapped = table.clone();
    // The first part takes a byte from the second: together they are as long as before.
    for (at, by) in [(0, 1), (8, u32::MAX)] {
        let length = u32::from_le_bytes(swapped[at..at + 4].try_into().unwrap()).wrapping_add(by);
        swapped[at..at + 4].copy_from_slice(&length.to_le_bytes());
    }
    assert!(!refused(&swapped, raw_bytes, data_bytes), "the lengths alone fit");
    let seen = [&data[..place.start as usize], &swapped].concat();
    assert!(codec::decompress(Codec::Parts, &seen, raw_bytes).is_err(), "the checksums do not");
    let mut longer = table;
    longer[8..12].copy_from_slice(&(PART_RAW_BYTES + 1).to_le_bytes());
    assert!(refused(&longer, raw_bytes, data_bytes + 1), "longer than raw");
    let whole = FrameMeta { codec: Codec::Parts, ..meta(1, raw.len()) };
    assert!(frame::encode(&whole, &records(1, &[Op::Flush]), &raw).is_err(), "no table");
    let little = FrameMeta { codec: Codec::Parts, ..meta(1, 100) };
    assert!(
        frame::encode(&little, &records(1, &[Op::Flush]), &data[..90]).is_err(),
        "one part is not in parts"
    );
}
