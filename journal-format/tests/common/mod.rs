//! Values that the tests share.
#![allow(dead_code, reason = "each test file uses its own part")]

use journal_format::bookmarks::Bookmark;
use journal_format::index::{BadPage, Extent, Index, IndexBuilder};
use journal_format::manifest::{LiveSegment, Manifest, Sealed};
use journal_format::segment::{
    DATA_ENTRY_BYTES, DataEntry, DataPlace, META_ENTRY_BYTES, MetaEntry, Place, SegmentKind, SegmentMeta,
};
use journal_format::{
    ByteRange, Codec, DataSpan, DiskId, Epoch, Frame, FrameMeta, GapReason, Lsn, Op, Record, SegmentNumber,
    Stamp, frame,
};

/// The disk of all examples.
pub(crate) const DISK: DiskId = DiskId([0xd1; 16]);

/// A range that is known to be possible.
pub(crate) fn range(offset: u64, length: u64) -> ByteRange {
    ByteRange::new(offset, length).unwrap()
}

/// The header fields of a frame with raw data.
pub(crate) fn meta(first_lsn: u64, raw_bytes: usize) -> FrameMeta {
    FrameMeta {
        disk: DISK,
        epoch: Epoch(3),
        first_lsn: Lsn(first_lsn),
        disk_bytes: 1 << 30,
        codec: Codec::Raw,
        raw_bytes: raw_bytes.try_into().unwrap(),
    }
}

/// Numbers operations from `first_lsn` on, one nanosecond apart.
pub(crate) fn records(first_lsn: u64, ops: &[Op]) -> Vec<Record> {
    let number = |i: usize| first_lsn + i as u64;
    ops.iter()
        .enumerate()
        .map(|(i, op)| Record { lsn: Lsn(number(i)), stamp: Stamp(1000 + number(i)), op: *op })
        .collect()
}

/// One operation of each kind, over 300 bytes of data.
pub(crate) fn one_of_each() -> Vec<Op> {
    vec![
        Op::GapBegin { reason: GapReason::Attach, generation: 1 },
        Op::Write { range: range(512, 256), data: DataSpan { pos: 0, len: 256 }, fill: false, fua: true },
        Op::Zero { range: range(1 << 20, 8 << 20), fill: true, fua: false, may_unmap: false },
        Op::Zero { range: range(4096, 512), fill: false, fua: true, may_unmap: true },
        Op::Discard { range: range((256 << 10) - 512, 1024) },
        Op::Flush,
        Op::Resize { disk_bytes: 1 << 30 },
        Op::Bookmark { name: DataSpan { pos: 256, len: 6 } },
        Op::GapEnd { generation: 1 },
        Op::Void,
    ]
}

/// Bytes that look different everywhere.
pub(crate) fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i * 31 + i / 251) as u8).collect()
}

/// An encoded frame with one record of each kind.
pub(crate) fn sample_frame(first_lsn: u64) -> Vec<u8> {
    let data = pattern(300);
    frame::encode(&meta(first_lsn, data.len()), &records(first_lsn, &one_of_each()), &data).unwrap()
}

/// A place in segment 7 of the disk.
pub(crate) fn place(position: u64) -> Place {
    Place { disk: DISK, segment: SegmentNumber(7), position }
}

/// An encoded entry of the data volume.
pub(crate) fn data_entry(frame: &Frame<'_>, place: &Place) -> Vec<u8> {
    let mut out = DataEntry::encode_header(place, frame.header()).unwrap().to_vec();
    assert_eq!(out.len(), DATA_ENTRY_BYTES);
    out.extend_from_slice(frame.data());
    out
}

/// An encoded entry of the metadata volume whose data lies at `data_position` of the same segment.
pub(crate) fn meta_entry(frame: &Frame<'_>, place: &Place, durable: u64, data_position: u64) -> Vec<u8> {
    let data = DataPlace { segment: place.segment, position: data_position };
    let data = (!frame.data().is_empty()).then_some(data);
    let mut out = MetaEntry::encode_header(place, frame, Lsn(durable), data).unwrap().to_vec();
    assert_eq!(out.len(), META_ENTRY_BYTES);
    out.extend_from_slice(frame.head());
    out
}

/// An encoded manifest with a sealed and an active segment.
pub(crate) fn sample_manifest() -> Manifest {
    let sealed = Sealed {
        last_lsn: Lsn(10),
        first_stamp: Stamp(100),
        last_stamp: Stamp(200),
        data_bytes: 1 << 20,
        meta_bytes: 8192,
        index_bytes: 5000,
    };
    Manifest {
        revision: 5,
        last_epoch: Epoch(2),
        next_segment: SegmentNumber(3),
        segments: vec![
            LiveSegment { segment: SegmentNumber(1), first_lsn: Lsn(1), sealed: Some(sealed) },
            LiveSegment { segment: SegmentNumber(2), first_lsn: Lsn(11), sealed: None },
        ],
        ..Manifest::new(DISK, 1 << 30)
    }
}

/// A bookmark at that LSN.
pub(crate) fn bookmark(lsn: u64, name: &str) -> Bookmark {
    Bookmark { lsn: Lsn(lsn), stamp: Stamp(lsn), name: name.to_owned() }
}

/// The encoded index of a segment with two sample frames, LSNs 11 to 30.
pub(crate) fn sample_index() -> Vec<u8> {
    let mut builder = IndexBuilder::new(DISK, SegmentNumber(7));
    for (i, first_lsn) in [11, 21].into_iter().enumerate() {
        let at = 4096 * (i as u64 + 1);
        let data = DataPlace { segment: SegmentNumber(7), position: at };
        builder.push(&Frame::parse(&sample_frame(first_lsn)).unwrap(), at, Some(data)).unwrap();
    }
    builder.finish().unwrap()
}

/// The chunks of an index that have extents.
pub(crate) fn chunks(index: &Index<'_>) -> Result<Vec<u32>, BadPage> {
    let (mut chunks, mut from) = (Vec::new(), 0);
    while let Some(chunk) = index.next_chunk(from, u32::MAX)? {
        chunks.push(chunk);
        from = chunk + 1;
    }
    Ok(chunks)
}

/// The extents of a chunk with LSNs in `(after, upto]`, in LSN order.
pub(crate) fn extents(index: &Index<'_>, chunk: u32, after: u64, upto: u64) -> Result<Vec<Extent>, BadPage> {
    let mut extents = Vec::new();
    index.newest_first(chunk, Lsn(after), Lsn(upto), |extent| {
        extents.push(extent);
        true
    })?;
    extents.reverse();
    Ok(extents)
}

/// The encoded header page of a metadata file.
pub(crate) fn sample_page() -> Vec<u8> {
    SegmentMeta { kind: SegmentKind::Meta, disk: DISK, segment: SegmentNumber(7), first_lsn: Lsn(11) }
        .encode()
}
