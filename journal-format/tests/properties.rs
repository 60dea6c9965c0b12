//! Any value comes back from its encoding, and any corrupted or missing byte is refused.

mod common;

use common::*;
use journal_format::ImageTag;
use journal_format::bookmarks::{self, Bookmark};
use journal_format::durable_mark::DurableMark;
use journal_format::index::{IndexBuilder, IndexShape, Source, chunk_of};
use journal_format::limits::{INDEX_CHUNK_BYTES, MAX_DISK_BYTES, PART_RAW_BYTES, WIDE_EXTENT_BYTES};
use journal_format::manifest::{LiveSegment, Manifest, Sealed};
use journal_format::record::RawRecord;
use journal_format::segment::{DataEntry, DataPlace, MetaEntry, SegmentKind, SegmentMeta};
use journal_format::wire::{self, MESSAGE_HEADER_BYTES, MessageHeader, MessageType};
use journal_format::{
    ByteRange, Codec, DataSpan, DiskId, Epoch, Frame, FrameMeta, GapReason, Lsn, Op, Record, SegmentNumber,
    Stamp, codec, frame, parts,
};
use proptest::collection::vec;
use proptest::prelude::*;

/// Bytes of raw data of a generated frame.
const RAW_BYTES: u32 = 3000;

fn any_range(most: u64) -> impl Strategy<Value = ByteRange> {
    (0..=MAX_DISK_BYTES - most, 1..=most).prop_map(|(offset, length)| range(offset, length))
}

fn any_span(most: u32) -> impl Strategy<Value = DataSpan> {
    (0..RAW_BYTES)
        .prop_flat_map(move |pos| (1..=most.min(RAW_BYTES - pos)).prop_map(move |len| DataSpan { pos, len }))
}

fn any_op() -> impl Strategy<Value = Op> {
    let write =
        (0..=MAX_DISK_BYTES - u64::from(RAW_BYTES), any_span(RAW_BYTES), any::<bool>(), any::<bool>())
            .prop_map(|(offset, data, fill, fua)| Op::Write {
                range: range(offset, u64::from(data.len)),
                data,
                fill,
                fua,
            });
    let zero = (any_range(8 << 20), any::<bool>(), any::<bool>(), any::<bool>())
        .prop_map(|(range, fill, fua, may_unmap)| Op::Zero { range, fill, fua, may_unmap });
    let reason = (1_u8..=8).prop_map(|number| GapReason::from_u8(number).unwrap());
    prop_oneof![
        5 => write,
        2 => zero,
        1 => any_range(MAX_DISK_BYTES).prop_map(|range| Op::Discard { range }),
        1 => Just(Op::Flush),
        1 => (0..=MAX_DISK_BYTES).prop_map(|disk_bytes| Op::Resize { disk_bytes }),
        1 => any_span(255).prop_map(|name| Op::Bookmark { name }),
        1 => (reason, any::<u64>()).prop_map(|(reason, generation)| Op::GapBegin { reason, generation }),
        1 => any::<u64>().prop_map(|generation| Op::GapEnd { generation }),
        1 => Just(Op::Void),
        1 => any::<[u8; 16]>().prop_map(|tag| Op::Close { image: ImageTag(tag) }),
    ]
}

/// Records from `first_lsn` on, with stamps that stand still or advance.
fn any_records(first_lsn: u64) -> impl Strategy<Value = Vec<Record>> {
    (1..u64::MAX / 2, vec((any_op(), 0_u64..1_000_000), 1..40)).prop_map(move |(mut stamp, ops)| {
        let number = |(i, (op, step)): (usize, (Op, u64))| {
            stamp += step;
            Record { lsn: Lsn(first_lsn + i as u64), stamp: Stamp(stamp), op }
        };
        ops.into_iter().enumerate().map(number).collect()
    })
}

/// Contents of a frame: little or many parts, of which some compress and some do not.
fn any_contents() -> impl Strategy<Value = Vec<u8>> {
    let parts = vec((any::<bool>(), any::<u32>()), 1..6).prop_map(|kinds| {
        let part = |(noise, seed): (bool, u32)| {
            let mut x = seed | 1;
            (0..PART_RAW_BYTES / 2 + seed % PART_RAW_BYTES).map(move |_| {
                x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                if noise { (x >> 24) as u8 } else { (x >> 31) as u8 }
            })
        };
        kinds.into_iter().flat_map(part).collect()
    });
    prop_oneof![vec(0_u8..4, 0..5000), parts]
}

fn any_data() -> impl Strategy<Value = (Codec, Vec<u8>)> {
    let raw = vec(any::<u8>(), RAW_BYTES as usize).prop_map(|data| (Codec::Raw, data));
    let zstd = any::<u8>().prop_map(|byte| {
        let mut packed = Vec::new();
        (codec::compress(&mut vec![byte; RAW_BYTES as usize], 1, &mut packed), packed)
    });
    prop_oneof![raw, zstd]
}

/// A frame's parts, and its bytes.
type Example = (FrameMeta, Vec<Record>, Vec<u8>, Vec<u8>);

fn any_frame() -> impl Strategy<Value = Example> {
    let fields = (any::<[u8; 16]>(), 1..=u64::MAX, 1..u64::MAX / 2, 0..=MAX_DISK_BYTES);
    (fields, any_data()).prop_flat_map(|((disk, epoch, first_lsn, disk_bytes), (codec, data))| {
        any_records(first_lsn).prop_map(move |records| {
            let (disk, epoch, first_lsn) = (DiskId(disk), Epoch(epoch), Lsn(first_lsn));
            let meta = FrameMeta { disk, epoch, first_lsn, disk_bytes, codec, raw_bytes: RAW_BYTES };
            let bytes = frame::encode(&meta, &records, &data).unwrap();
            (meta, records, data.clone(), bytes)
        })
    })
}

fn any_manifest() -> impl Strategy<Value = Manifest> {
    let segment = (0_u64..1000, 0_u64..1000, 0_u64..1000, 0_u64..1 << 30, 0_u64..1 << 30, 0_u64..1 << 30);
    (vec(segment, 0..20), 1..u64::MAX / 2, any::<bool>(), 0_u64..9, any::<[u8; 16]>()).prop_map(
        |(lengths, mut lsn, active, last_epoch, disk)| {
            let mut segments = Vec::new();
            let mut number = SegmentNumber(1);
            for (records, first, more, data_bytes, meta_bytes, index_bytes) in lengths {
                let (first_stamp, last_stamp) = (Stamp(first), Stamp(first + more));
                let last_lsn = Lsn(lsn + records);
                let sealed =
                    Sealed { last_lsn, first_stamp, last_stamp, data_bytes, meta_bytes, index_bytes };
                segments.push(LiveSegment { segment: number, first_lsn: Lsn(lsn), sealed: Some(sealed) });
                (lsn, number) = (last_lsn.next().0, number.next());
            }
            if active {
                segments.push(LiveSegment { segment: number, first_lsn: Lsn(lsn), sealed: None });
            }
            Manifest {
                revision: lsn,
                last_epoch: Epoch(last_epoch),
                next_segment: number.next(),
                segments,
                ..Manifest::new(DiskId(disk), lsn % MAX_DISK_BYTES)
            }
        },
    )
}

fn any_bookmarks() -> impl Strategy<Value = Vec<Bookmark>> {
    proptest::collection::btree_map("\\PC{1,60}", (1..u64::MAX, any::<u64>()), 0..20).prop_map(|named| {
        let mark = |(name, (lsn, stamp))| Bookmark { lsn: Lsn(lsn), stamp: Stamp(stamp), name };
        named.into_iter().map(mark).collect()
    })
}

/// `parse` refuses every change of one byte to `bytes`, and every shorter beginning.
fn refuses_damage(bytes: &[u8], accepts: impl Fn(&[u8]) -> bool) {
    assert!(accepts(bytes), "the sample itself");
    let mut damaged = bytes.to_vec();
    for at in 0..bytes.len() {
        let original = bytes[at];
        let bits = (0..8).map(|bit| original ^ (1 << bit));
        for value in
            bits.chain([0, 0xff, !original, original.wrapping_add(1)]).filter(|value| *value != original)
        {
            damaged[at] = value;
            assert!(!accepts(&damaged), "byte {at} changed from {original:#04x} to {value:#04x}");
        }
        damaged[at] = original;
        assert!(!accepts(&bytes[..at]), "cut to {at} bytes");
    }
}

#[test]
fn every_damage_to_a_frame_is_refused() {
    refuses_damage(&sample_frame(11), |bytes| Frame::parse(bytes).is_ok());
}

#[test]
fn every_damage_to_a_segment_header_is_refused() {
    refuses_damage(&sample_page(), |bytes| SegmentMeta::parse(bytes).is_ok());
}

#[test]
fn every_damage_to_a_data_entry_is_refused() {
    let bytes = sample_frame(11);
    let entry = data_entry(&Frame::parse(&bytes).unwrap(), &place(8192));
    refuses_damage(&entry, |bytes| DataEntry::parse(bytes, &place(8192)).is_ok());
}

#[test]
fn every_damage_to_a_metadata_entry_is_refused() {
    let bytes = sample_frame(11);
    let entry = meta_entry(&Frame::parse(&bytes).unwrap(), &place(4096), 10, 8192);
    refuses_damage(&entry, |bytes| MetaEntry::parse(bytes, &place(4096)).is_ok());
}

#[test]
fn every_damage_to_an_index_is_refused() {
    refuses_damage(&sample_index(), |bytes| IndexShape::check(bytes).is_ok());
}

#[test]
fn every_damage_to_a_manifest_is_refused() {
    refuses_damage(&sample_manifest().encode().unwrap(), |bytes| Manifest::parse(bytes).is_ok());
}

#[test]
fn every_damage_to_a_durable_mark_is_refused() {
    let mark = DurableMark { disk: DISK, durable_lsn: Lsn(77) };
    assert_eq!(DurableMark::parse(&mark.encode()), Ok(mark));
    refuses_damage(&mark.encode(), |bytes| DurableMark::parse(bytes).is_ok());
}

#[test]
fn every_damage_to_bookmarks_is_refused() {
    let bytes = bookmarks::encode(DISK, &[bookmark(9, "before upgrade"), bookmark(3, "ä")]).unwrap();
    refuses_damage(&bytes, |bytes| bookmarks::parse(bytes).is_ok());
}

#[test]
fn every_damage_to_a_message_header_is_refused() {
    let message = wire::encode(&wire::Ping { number: 77 }).unwrap();
    refuses_damage(&message[..MESSAGE_HEADER_BYTES], |bytes| MessageHeader::parse(bytes).is_ok());
}

proptest! {
    #[test]
    fn a_record_comes_back(op in any_op(), lsn in 1..u64::MAX, stamp in 1..u64::MAX) {
        let record = Record { lsn: Lsn(lsn), stamp: Stamp(stamp), op };
        prop_assert_eq!(RawRecord::encode(&record).decode(Lsn(lsn)), Ok(record));
    }

    #[test]
    fn a_frame_comes_back((meta, records, data, bytes) in any_frame()) {
        let frame = Frame::parse(&bytes).unwrap();
        prop_assert_eq!(frame.records().collect::<Vec<_>>(), records);
        prop_assert_eq!(frame.data(), data);
        let header = frame.header();
        let fields = (header.disk(), header.epoch(), header.first_lsn(), header.disk_bytes(), header.codec());
        prop_assert_eq!(fields, (meta.disk, meta.epoch, meta.first_lsn, meta.disk_bytes, meta.codec));
        prop_assert_eq!(header.raw_bytes(), RAW_BYTES);
        prop_assert_eq!(header.frame_len(), bytes.len());
        prop_assert_eq!(codec::decompress(header.codec(), frame.data(), RAW_BYTES).unwrap().len(), RAW_BYTES as usize);
    }

    #[test]
    fn a_damaged_frame_is_refused(
        (_, _, _, mut bytes) in any_frame(),
        at in any::<prop::sample::Index>(),
        change in 1..=u8::MAX,
    ) {
        let at = at.index(bytes.len());
        prop_assert!(Frame::parse(&bytes[..at]).is_err());
        bytes[at] ^= change;
        prop_assert!(Frame::parse(&bytes).is_err());
    }

    #[test]
    fn a_frame_comes_back_from_its_two_entries((meta, records, data, bytes) in any_frame(), page in 1_u64..1 << 20) {
        let frame = Frame::parse(&bytes).unwrap();
        let place = journal_format::segment::Place { disk: meta.disk, ..place(page * 4096) };
        let durable = meta.first_lsn.prev().0;
        let (meta_bytes, data_bytes) =
            (meta_entry(&frame, &place, durable, page * 64 + 4096), data_entry(&frame, &place));
        let entry = MetaEntry::parse(&meta_bytes, &place).unwrap();
        let segment = place.segment;
        prop_assert_eq!(entry.header.data, Some(DataPlace { segment, position: page * 64 + 4096 }));
        prop_assert_eq!(entry.frame.records().collect::<Vec<_>>(), records);
        prop_assert_eq!(DataEntry::parse(&data_bytes, &place).unwrap().data, data);
    }

    #[test]
    fn a_segment_header_comes_back(disk in any::<[u8; 16]>(), number in 1..=u32::MAX, lsn in 1..=u64::MAX, kind in 1_u8..=3) {
        let kind = SegmentKind::from_u8(kind).unwrap();
        let meta = SegmentMeta { kind, disk: DiskId(disk), segment: SegmentNumber(number), first_lsn: Lsn(lsn) };
        prop_assert_eq!(SegmentMeta::parse(&meta.encode()), Ok(meta));
    }

    #[test]
    fn a_manifest_comes_back(manifest in any_manifest()) {
        prop_assert_eq!(Manifest::parse(&manifest.encode().unwrap()), Ok(manifest));
    }

    #[test]
    fn bookmarks_come_back(marks in any_bookmarks()) {
        let bytes = bookmarks::encode(DISK, &marks).unwrap();
        prop_assert_eq!(bookmarks::parse(&bytes), Ok((DISK, marks)));
    }

    #[test]
    fn a_message_header_comes_back(kind in 1_u16..=14, length in 0_usize..64 << 10) {
        let kind = MessageType::from_u16(kind).unwrap();
        let header = MessageHeader::new(kind, length).unwrap();
        prop_assert_eq!(MessageHeader::parse(zerocopy::IntoBytes::as_bytes(&header)), Ok((kind, length)));
    }

    #[test]
    fn a_message_comes_back(number in any::<u64>(), name in ".*", disk in vec(any::<u8>(), 0..20)) {
        let message = wire::InsertBookmark { request: number, disk, name };
        let bytes = wire::encode(&message).unwrap();
        let (kind, length) = MessageHeader::parse(&bytes).unwrap();
        prop_assert_eq!((kind, length), (MessageType::InsertBookmark, bytes.len() - MESSAGE_HEADER_BYTES));
        prop_assert_eq!(wire::decode::<wire::InsertBookmark>(&bytes[MESSAGE_HEADER_BYTES..]), Ok(message));
    }

    #[test]
    fn a_disk_id_comes_back(disk in any::<[u8; 16]>()) {
        let text = DiskId(disk).to_string();
        prop_assert_eq!(text.parse(), Ok(DiskId(disk)));
        prop_assert_eq!(text.to_uppercase().parse(), Ok(DiskId(disk)));
    }

    #[test]
    fn compression_comes_back(data in any_contents(), level in 1_i32..6) {
        let mut packed = Vec::new();
        let codec = codec::compress(&mut data.clone(), level, &mut packed);
        prop_assert!(packed.len() <= data.len() + parts::table_bytes(data.len() as u32) as usize);
        prop_assert_eq!(codec::decompress(codec, &packed, data.len() as u32), Ok(data));
    }

    /// The model: all records, looked through one by one.
    #[test]
    fn an_index_answers_as_its_records_do(
        first_lsn in 1_u64..1000,
        ops in vec(vec(any_op_near_zero(), 1..12), 1..6),
        chunk in 0_u32..10,
        (after, upto) in (0_u64..80, 0_u64..80),
    ) {
        let (after, upto) = (first_lsn - 1 + after, first_lsn - 1 + upto);
        let mut builder = IndexBuilder::new(DISK, SegmentNumber(7));
        let (mut all, mut next) = (Vec::new(), first_lsn);
        for (i, ops) in ops.iter().enumerate() {
            let records = records(next, ops);
            let data = pattern(RAW_BYTES as usize);
            let bytes = frame::encode(&meta(next, data.len()), &records, &data).unwrap();
            let position = 4096 * (i as u64 + 1);
            let data = DataPlace { segment: SegmentNumber(7), position };
            builder.push(&Frame::parse(&bytes).unwrap(), position, Some(data)).unwrap();
            next += records.len() as u64;
            all.extend(records.into_iter().map(|record| (i as u32, record)));
        }
        let bytes = builder.finish().unwrap();
        let shape = IndexShape::check(&bytes).unwrap();
        let index = shape.open(&bytes);
        let mut live = Vec::new();
        builder.newest_first(chunk, Lsn(after), Lsn(upto), |extent| {
            live.insert(0, extent);
            true
        });
        let sealed = extents(&index, chunk, after, upto).unwrap();
        prop_assert_eq!(live, &sealed[..], "before and after sealing");
        prop_assert_eq!(builder.next_chunk(chunk, 10), index.next_chunk(chunk, 10).unwrap());
        prop_assert!(builder.tables().frames().eq(index.frames()) && builder.tables().marks().eq(index.marks()));
        let whole = range(u64::from(chunk) * INDEX_CHUNK_BYTES, INDEX_CHUNK_BYTES);
        let wanted = |record: &Record| after < record.lsn.0 && record.lsn.0 <= upto;
        let (mut changed, mut wides) = (Vec::new(), Vec::new());
        for (frame, record) in all.iter().filter(|(_, record)| wanted(record)) {
            match record.op {
                Op::Write { range, data, .. } => {
                    if let Some(part) = whole.intersection(range) {
                        let pos = data.pos + (part.offset() - range.offset()) as u32;
                        changed.push((record.lsn, part, Source::Data { frame: *frame, pos }));
                    }
                }
                Op::Zero { range, .. } | Op::Discard { range } if range.length() > WIDE_EXTENT_BYTES => {
                    wides.push((record.lsn, range));
                }
                Op::Zero { range, .. } | Op::Discard { range } => {
                    changed.extend(whole.intersection(range).map(|part| (record.lsn, part, Source::Zero)));
                }
                _ => {}
            }
        }
        let found: Vec<_> = sealed.iter().map(|e| (e.lsn, e.range, e.source)).collect();
        prop_assert_eq!(&found, &changed);
        prop_assert!(found.is_empty() || index.next_chunk(chunk, chunk + 1).unwrap() == Some(chunk));
        let found: Vec<_> = index.wide(Lsn(after), Lsn(upto)).map(|e| (e.lsn, e.range)).collect();
        prop_assert_eq!(found, wides);
        for (number, record) in &all {
            prop_assert_eq!(index.frame_of(record.lsn), index.frame(*number));
            prop_assert!(index.frame_at(record.stamp).unwrap().first_lsn <= record.lsn);
        }
    }
}

/// Operations within the first ten chunks, so that they meet.
fn any_op_near_zero() -> impl Strategy<Value = Op> {
    let bound = 10 * INDEX_CHUNK_BYTES;
    any_op().prop_map(move |op| {
        let near =
            |range: ByteRange, most: u64| self::range(range.offset() % bound, range.length().min(most));
        match op {
            Op::Write { range, data, fill, fua } => Op::Write { range: near(range, bound), data, fill, fua },
            Op::Zero { range, fill, fua, may_unmap } => {
                Op::Zero { range: near(range, bound), fill, fua, may_unmap }
            }
            Op::Discard { range } => Op::Discard { range: near(range, 1 + range.offset() % bound) },
            other => other,
        }
    })
}

#[test]
fn chunks_are_counted_from_the_start_of_the_disk() {
    assert_eq!((chunk_of(0), chunk_of(INDEX_CHUNK_BYTES - 1), chunk_of(INDEX_CHUNK_BYTES)), (0, 0, 1));
}
