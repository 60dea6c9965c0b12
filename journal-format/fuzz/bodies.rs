//! What each fuzz target does with its input. Shared by the libFuzzer targets in `fuzz_targets/` and by the seeded
//! in-tree test `tests/fuzz_smoke.rs`.
//!
//! Each body tries the input twice: as it is, which exercises the first checks, and *repaired*: with magic, version,
//! lengths and checksums made right, because no fuzzer guesses a checksum and the checks behind it must hold too. What a
//! decoder accepts must come out of the encoder again, byte for byte.

use journal_format::durable_mark::{DurableMark, MARK_BYTES, MARK_MAGIC, RawDurableMark};
use journal_format::index::{BadPage, Index, IndexHeader, IndexShape, Source};
use journal_format::layout::Field;
use journal_format::limits::{MAX_FRAME_DATA_BYTES, PART_RAW_BYTES};
use journal_format::manifest::{MANIFEST_SEGMENT_BYTES, Manifest, ManifestHeader};
use journal_format::parts::PART_ENTRY_BYTES;
use journal_format::recovery::{durable_floor, see_data, see_meta, see_next};
use journal_format::segment::{
    DATA_ENTRY_BYTES, DataEntry, META_ENTRY_BYTES, MetaEntry, Place, RawDataEntry, RawMetaEntry,
    SEGMENT_HEADER_PAGE_BYTES, SegmentHeader, SegmentMeta,
};
use journal_format::wire::{self, MESSAGE_HEADER_BYTES, MessageHeader};
use journal_format::{
    Codec, DiskId, Frame, FrameHeader, FrameMeta, Lsn, SegmentNumber, bookmarks, codec, frame, parts, record,
};

/// Does something with an input, and panics if that goes wrong.
pub type Body = fn(&[u8]);

/// Every body by the name of its fuzz target.
pub const BODIES: &[(&str, Body)] = &[
    ("frame", frame),
    ("segment", segment),
    ("data_entry", data_entry),
    ("meta_entry", meta_entry),
    ("index", index),
    ("manifest", manifest),
    ("bookmarks", bookmarks),
    ("durable_mark", durable_mark),
    ("wire", wire),
    ("codec", codec),
    ("text", text),
];

/// The place that entries are read from.
pub const PLACE: Place = Place { disk: DiskId([0xd1; 16]), segment: SegmentNumber(7), position: 8192 };

fn offset(layout: &[Field], name: &str) -> usize {
    layout.iter().find(|field| field.0 == name).unwrap().1
}

fn put(bytes: &mut [u8], layout: &[Field], name: &str, value: &[u8]) {
    let at = offset(layout, name);
    if let Some(field) = bytes.get_mut(at..at + value.len()) {
        field.copy_from_slice(value);
    }
}

fn get_u32(bytes: &[u8], layout: &[Field], name: &str) -> usize {
    let at = offset(layout, name);
    bytes.get(at..at + 4).map_or(0, |field| u32::from_le_bytes(field.try_into().unwrap()) as usize)
}

/// Puts the checksum of the first `length - 4` bytes into the next four.
fn seal(bytes: &mut [u8], length: usize) {
    if let Some(header) = bytes.get_mut(..length) {
        let crc = crc32c::crc32c(&header[..length - 4]);
        header[length - 4..].copy_from_slice(&crc.to_le_bytes());
    }
}

fn crc(bytes: Option<&[u8]>) -> [u8; 4] {
    crc32c::crc32c(bytes.unwrap_or(&[])).to_le_bytes()
}

fn repair_frame(bytes: &mut [u8]) {
    let layout = FrameHeader::LAYOUT;
    put(bytes, layout, "magic", &frame::FRAME_MAGIC);
    put(bytes, layout, "version", &1_u16.to_le_bytes());
    put(bytes, layout, "header_bytes", &128_u16.to_le_bytes());
    put(bytes, layout, "reserved_a", &[0; 3]);
    put(bytes, layout, "reserved_b", &[0; 32]);
    let head =
        128_usize.saturating_add(get_u32(bytes, layout, "record_count").saturating_mul(record::RECORD_BYTES));
    let end = head.saturating_add(get_u32(bytes, layout, "data_bytes"));
    let records_crc = crc(bytes.get(128..head));
    let codec = bytes.get(12).and_then(|codec| Codec::from_u8(*codec)).unwrap_or(Codec::Raw);
    let (raw_bytes, data) = (get_u32(bytes, layout, "raw_bytes") as u32, bytes.get(head..end));
    let data_crc = parts::data_crc(codec, raw_bytes, data.unwrap_or(&[])).to_le_bytes();
    put(bytes, layout, "records_crc", &records_crc);
    put(bytes, layout, "data_crc", &data_crc);
    seal(bytes, 128);
}

/// Frames: whatever is accepted is encoded again to the same bytes.
pub fn frame(input: &[u8]) {
    let mut repaired = input.to_vec();
    repair_frame(&mut repaired);
    for bytes in [input, &repaired] {
        let Ok(frame) = Frame::parse(bytes) else { continue };
        let header = frame.header();
        let records: Vec<_> = frame.records().collect();
        assert_eq!(records.len(), header.record_count() as usize);
        assert_eq!(records.last().map(|record| record.lsn), Some(header.last_lsn()));
        let meta = FrameMeta {
            disk: header.disk(),
            epoch: header.epoch(),
            first_lsn: header.first_lsn(),
            disk_bytes: header.disk_bytes(),
            codec: header.codec(),
            raw_bytes: header.raw_bytes(),
        };
        assert_eq!(frame::encode(&meta, &records, frame.data()).unwrap(), &bytes[..header.frame_len()]);
        if let Ok(raw) = codec::decompress(header.codec(), frame.data(), header.raw_bytes()) {
            assert_eq!(raw.len(), header.raw_bytes() as usize);
        }
    }
}

fn repair_page(bytes: &mut [u8], kind: Option<u8>) {
    let layout = SegmentHeader::LAYOUT;
    put(bytes, layout, "magic", &journal_format::segment::SEGMENT_MAGIC);
    put(bytes, layout, "version", &1_u16.to_le_bytes());
    put(bytes, layout, "header_bytes", &4096_u16.to_le_bytes());
    put(bytes, layout, "reserved_a", &[0; 3]);
    put(bytes, layout, "reserved_b", &[0; 16]);
    if let Some(kind) = kind {
        put(bytes, layout, "kind", &[kind]);
    }
    seal(bytes, size_of::<SegmentHeader>());
    if let Some(rest) = bytes.get_mut(size_of::<SegmentHeader>()..SEGMENT_HEADER_PAGE_BYTES) {
        rest.fill(0);
    }
}

/// Header pages of segments. (A short input is taken as a page with zeroes behind it.)
pub fn segment(input: &[u8]) {
    let mut repaired = input.to_vec();
    repaired.resize(repaired.len().max(SEGMENT_HEADER_PAGE_BYTES), 0);
    repair_page(&mut repaired, None);
    for bytes in [input, &repaired] {
        if let Ok(meta) = SegmentMeta::parse(bytes) {
            assert_eq!(meta.encode(), &bytes[..SEGMENT_HEADER_PAGE_BYTES]);
        }
    }
}

/// Entries of the data volume.
pub fn data_entry(input: &[u8]) {
    let mut repaired = input.to_vec();
    let layout = RawDataEntry::LAYOUT;
    put(&mut repaired, layout, "magic", &journal_format::segment::DATA_ENTRY_MAGIC);
    put(&mut repaired, layout, "disk", &PLACE.disk.0);
    put(&mut repaired, layout, "segment", &PLACE.segment.0.to_le_bytes());
    put(&mut repaired, layout, "position", &PLACE.position.to_le_bytes());
    put(&mut repaired, layout, "parts_of", &[0; 4]);
    put(&mut repaired, layout, "reserved", &[0; 4]);
    let end = DATA_ENTRY_BYTES.saturating_add(get_u32(&repaired, layout, "data_bytes"));
    let data_crc = crc(repaired.get(DATA_ENTRY_BYTES..end));
    put(&mut repaired, layout, "data_crc", &data_crc);
    seal(&mut repaired, DATA_ENTRY_BYTES);
    for bytes in [input, &repaired] {
        if let Ok(entry) = DataEntry::parse(bytes, &PLACE) {
            assert_eq!(entry.data, &bytes[DATA_ENTRY_BYTES..DATA_ENTRY_BYTES + entry.data.len()]);
            assert!(!entry.data.is_empty() && entry.first_lsn != Lsn::ZERO);
        }
    }
}

/// Entries of the metadata volume, and recovery's way to them.
pub fn meta_entry(input: &[u8]) {
    let mut repaired = input.to_vec();
    let layout = RawMetaEntry::LAYOUT;
    put(&mut repaired, layout, "magic", &journal_format::segment::META_ENTRY_MAGIC);
    put(&mut repaired, layout, "disk", &PLACE.disk.0);
    put(&mut repaired, layout, "segment", &PLACE.segment.0.to_le_bytes());
    put(&mut repaired, layout, "position", &PLACE.position.to_le_bytes());
    put(&mut repaired, layout, "reserved", &[0; 16]);
    if let Some(head) = repaired.get_mut(META_ENTRY_BYTES..) {
        put(head, FrameHeader::LAYOUT, "disk", &PLACE.disk.0);
        repair_frame(head);
    }
    let end = META_ENTRY_BYTES.saturating_add(get_u32(&repaired, layout, "head_bytes"));
    let head_crc = crc(repaired.get(META_ENTRY_BYTES..end));
    put(&mut repaired, layout, "head_crc", &head_crc);
    seal(&mut repaired, META_ENTRY_BYTES);
    for bytes in [input, &repaired] {
        let _ = (durable_floor(bytes, &PLACE), see_next(bytes, &PLACE, Lsn(1)));
        let Ok(entry) = MetaEntry::parse(bytes, &PLACE) else { continue };
        let again =
            MetaEntry::encode_header(&PLACE, &entry.frame, entry.header.durable_lsn, entry.header.data)
                .unwrap();
        assert_eq!(again, bytes[..META_ENTRY_BYTES]);
        assert_eq!(entry.frame.head(), &bytes[META_ENTRY_BYTES..entry.header.entry_bytes() as usize]);
        let _ = see_meta(bytes, &PLACE, entry.header.first_lsn);
        let _ = (see_data(bytes, &PLACE, Some(&entry)), see_data(bytes, &PLACE, None));
    }
}

/// Indexes: accessors hold what was checked, and give no panic over other bytes than the checked ones.
pub fn index(input: &[u8]) {
    let mut repaired = input.to_vec();
    repair_page(&mut repaired, Some(3));
    let (page_lsn, own) = (offset(SegmentHeader::LAYOUT, "first_lsn"), SEGMENT_HEADER_PAGE_BYTES);
    let page_lsn: Vec<u8> = repaired.get(page_lsn..page_lsn + 8).unwrap_or(&[]).to_vec();
    if let Some(own) = repaired.get_mut(own..) {
        let (layout, length) = (IndexHeader::LAYOUT, size_of::<IndexHeader>());
        put(own, layout, "magic", &journal_format::index::INDEX_MAGIC);
        put(own, layout, "first_lsn", &page_lsn);
        put(own, layout, "reserved", &[0; 20]);
        let chunks_at = repair_pages(own).unwrap_or(own.len());
        let body_crc = crc(own.get(length..chunks_at));
        put(own, layout, "body_crc", &body_crc);
        seal(own, length);
    }
    for bytes in [input, &repaired] {
        let Ok(shape) = IndexShape::parse(bytes) else { continue };
        let index = shape.open(bytes);
        let looked = look_up(&index);
        assert!(looked.is_ok() || IndexShape::check(bytes).is_err(), "{looked:?} of what was checked");
        assert!(index.wide(Lsn::ZERO, Lsn::MAX).all(|extent| extent.source == Source::Zero));
        assert!(index.marks().all(|mark| shape.first_lsn() <= mark.lsn && mark.lsn <= shape.last_lsn()));
        let mut other = bytes.to_vec();
        other[SEGMENT_HEADER_PAGE_BYTES..].iter_mut().for_each(|byte| *byte ^= 0x5a);
        // Its pages were checked, so these are believed.
        let wrong = shape.open(&other);
        for chunk in 0..8 {
            let _ =
                (wrong.next_chunk(chunk, u32::MAX), wrong.newest_first(chunk, Lsn::ZERO, Lsn::MAX, |_| true));
        }
        let _ = (
            wrong.frames().count(),
            wrong.frame_of(Lsn(9)),
            wrong.marks().count(),
            wrong.wide(Lsn::ZERO, Lsn::MAX).count(),
        );
        let short = shape.open(&bytes[..bytes.len() / 2]);
        let _ = (short.frames().count(), short.marks().count(), short.next_chunk(0, u32::MAX));
    }
}

/// Looks up everything: each extent that is given is one that its frame has.
fn look_up(index: &Index<'_>) -> Result<(), BadPage> {
    let mut from = 0;
    while let Some(chunk) = index.next_chunk(from, u32::MAX)? {
        index.newest_first(chunk, Lsn::ZERO, Lsn::MAX, |extent| {
            if let Source::Data { frame, pos } = extent.source {
                let frame = index.frame(frame).unwrap();
                assert!(u64::from(pos) + extent.range.length() <= u64::from(frame.raw_bytes));
                assert_eq!(index.frame_of(extent.lsn).unwrap().first_lsn, frame.first_lsn);
            }
            true
        })?;
        // Over pages that were checked each by itself they may be in any order.
        from = chunk.max(from) + 1;
    }
    Ok(())
}

/// Makes the checksums of an index's pages right, from its own header on; where the pages begin.
fn repair_pages(own: &mut [u8]) -> Option<usize> {
    let layout = IndexHeader::LAYOUT;
    let count = |name| get_u32(own, layout, name);
    let tables = [("frame_count", 72), ("wide_count", 24), ("mark_count", 40)];
    let pages_at = tables.iter().fold(size_of::<IndexHeader>(), |at, (name, size)| at + count(name) * size);
    let (chunks, extents) = (count("chunk_count"), count("extent_count"));
    let chunks_at = pages_at + 4 * (chunks.div_ceil(4096 / 12) + extents.div_ceil(4096 / 24));
    let extents_at = chunks_at + chunks * 12;
    let pages = own.get(chunks_at..extents_at)?.chunks(4096 / 12 * 12);
    let pages = pages.chain(own.get(extents_at..extents_at + extents * 24)?.chunks(4096 / 24 * 24));
    let crcs: Vec<u8> = pages.flat_map(|page| crc(Some(page))).collect();
    own.get_mut(pages_at..chunks_at)?.copy_from_slice(&crcs);
    Some(chunks_at)
}

/// Manifests.
pub fn manifest(input: &[u8]) {
    let mut repaired = input.to_vec();
    let layout = ManifestHeader::LAYOUT;
    put(&mut repaired, layout, "magic", &journal_format::manifest::MANIFEST_MAGIC);
    put(&mut repaired, layout, "version", &1_u16.to_le_bytes());
    put(&mut repaired, layout, "header_bytes", &128_u16.to_le_bytes());
    put(&mut repaired, layout, "reserved_a", &[0; 3]);
    put(&mut repaired, layout, "reserved_b", &[0; 48]);
    let count = (repaired.len().saturating_sub(128) / MANIFEST_SEGMENT_BYTES) as u32;
    repaired.truncate(128 + count as usize * MANIFEST_SEGMENT_BYTES);
    put(&mut repaired, layout, "segment_count", &count.to_le_bytes());
    let segments_crc = crc(repaired.get(128..));
    put(&mut repaired, layout, "segments_crc", &segments_crc);
    seal(&mut repaired, 128);
    for bytes in [input, &repaired] {
        if let Ok(manifest) = Manifest::parse(bytes) {
            assert_eq!(manifest.encode().unwrap(), bytes);
        }
    }
}

/// Bookmark files.
pub fn bookmarks(input: &[u8]) {
    let mut repaired = input.to_vec();
    let layout = bookmarks::BookmarksHeader::LAYOUT;
    put(&mut repaired, layout, "magic", &bookmarks::BOOKMARKS_MAGIC);
    put(&mut repaired, layout, "version", &1_u16.to_le_bytes());
    put(&mut repaired, layout, "header_bytes", &64_u16.to_le_bytes());
    put(&mut repaired, layout, "reserved", &[0; 20]);
    let body = repaired.len().saturating_sub(64) as u32;
    put(&mut repaired, layout, "body_bytes", &body.to_le_bytes());
    let body_crc = crc(repaired.get(64..));
    put(&mut repaired, layout, "body_crc", &body_crc);
    seal(&mut repaired, 64);
    for bytes in [input, &repaired] {
        if let Ok((disk, list)) = bookmarks::parse(bytes) {
            assert_eq!(bookmarks::encode(disk, &list).unwrap(), bytes);
        }
    }
}

/// Durable marks.
pub fn durable_mark(input: &[u8]) {
    let mut repaired = input.to_vec();
    let layout = RawDurableMark::LAYOUT;
    put(&mut repaired, layout, "magic", &MARK_MAGIC);
    put(&mut repaired, layout, "version", &1_u16.to_le_bytes());
    put(&mut repaired, layout, "reserved_a", &[0; 6]);
    put(&mut repaired, layout, "reserved_b", &[0; 20]);
    seal(&mut repaired, MARK_BYTES);
    for bytes in [input, &repaired] {
        if let Ok(mark) = DurableMark::parse(bytes) {
            assert!(bytes.starts_with(&mark.encode()));
        }
    }
}

/// Messages: the header, and the body as every protobuf message there is.
pub fn wire(input: &[u8]) {
    let mut repaired = input.to_vec();
    put(&mut repaired, MessageHeader::LAYOUT, "magic", &wire::MESSAGE_MAGIC);
    seal(&mut repaired, MESSAGE_HEADER_BYTES);
    for bytes in [input, &repaired] {
        if let Ok((kind, length)) = MessageHeader::parse(bytes) {
            assert!(length <= kind.max_body_bytes());
        }
    }
    let body = input.get(MESSAGE_HEADER_BYTES..).unwrap_or(input);
    again::<wire::Hello>(body);
    again::<wire::Welcome>(body);
    again::<wire::Inventory>(body);
    again::<wire::OpenDisk>(body);
    again::<wire::DiskOpened>(body);
    again::<wire::Ack>(body);
    again::<wire::Refused>(body);
    again::<wire::SetProtection>(body);
    again::<wire::InsertBookmark>(body);
    again::<wire::CommandResult>(body);
    again::<wire::DiskStatus>(body);
    again::<wire::Ping>(body);
    again::<wire::CloseDisk>(body);
}

/// A message that is accepted means the same after encoding and decoding. (Protobuf has several encodings of one message,
/// so the bytes may differ.)
fn again<M: wire::Control + PartialEq + core::fmt::Debug>(body: &[u8]) {
    if let Ok(message) = wire::decode::<M>(body)
        && let Ok(bytes) = wire::encode(&message)
    {
        assert_eq!(wire::decode::<M>(&bytes[MESSAGE_HEADER_BYTES..]), Ok(message));
    }
}

/// Compressed data: the first four bytes are the length that a header would claim.
pub fn codec(input: &[u8]) {
    let Some((claimed, data)) = input.split_first_chunk::<4>() else { return };
    for codec in [Codec::Raw, Codec::Zstd, Codec::Parts] {
        if let Ok(raw) = codec::decompress(codec, data, u32::from_le_bytes(*claimed)) {
            assert_eq!(raw.len(), u32::from_le_bytes(*claimed) as usize);
        }
    }
    // The table alone, of as many parts as fit it: whatever is accepted fills the data, part behind part.
    let stored = u32::from_le_bytes(*claimed) % MAX_FRAME_DATA_BYTES;
    let raw_bytes = (data.len() / PART_ENTRY_BYTES) as u32 * PART_RAW_BYTES;
    if let Ok(parts) = parts::parse_table(data, raw_bytes, stored) {
        let end = parts.iter().fold(0, |end, part| {
            assert_eq!(part.stored().start, end);
            part.stored().end
        });
        assert_eq!(end + data.len(), stored as usize);
        assert_eq!(parts.iter().map(|part| part.raw_bytes).sum::<u32>(), raw_bytes);
    }
    let mut packed = Vec::new();
    let codec = codec::compress(&mut data.to_vec(), 1, &mut packed);
    assert_eq!(codec::decompress(codec, &packed, data.len() as u32).as_deref(), Ok(data));
}

/// Texts: disk ids.
pub fn text(input: &[u8]) {
    let Ok(text) = core::str::from_utf8(input) else { return };
    if let Ok(disk) = text.parse::<DiskId>() {
        assert_eq!(disk.to_string(), text.to_ascii_lowercase());
    }
}
