//! The files of a store: worked examples of what is read back and of each refusal.

mod common;

use common::*;
use journal_format::index::{IndexBuilder, IndexShape, Source};
use journal_format::manifest::Manifest;
use journal_format::recovery::{DataState, MetaSeen, durable_floor, see_data, see_meta, see_next};
use journal_format::segment::{
    DataEntry, DataPlace, MetaEntry, PAGE_BYTES, Place, SegmentKind, SegmentMeta, next_commit, next_entry,
};
use journal_format::{DataSpan, FormatErrorKind, Frame, Lsn, Op, SegmentNumber, Stamp, bookmarks, frame};

#[test]
fn entries_start_on_64_bytes_and_commits_on_pages() {
    assert_eq!((next_entry(4096), next_entry(4097), next_commit(4097)), (4096, 4160, 8192));
    assert_eq!(next_commit(u64::MAX), u64::MAX, "no overflow on a hostile position");
}

#[test]
fn both_entries_of_a_frame_are_read_back() {
    let bytes = sample_frame(11);
    let frame = Frame::parse(&bytes).unwrap();
    let data = data_entry(&frame, &place(8192));
    let meta = meta_entry(&frame, &place(4096), 10, 8192);

    let entry = MetaEntry::parse(&meta, &place(4096)).unwrap();
    assert_eq!(entry.header.entry_bytes(), meta.len() as u64);
    assert_eq!(entry.header.durable_lsn, Lsn(10));
    assert_eq!(entry.header.data, Some(DataPlace { segment: SegmentNumber(7), position: 8192 }));
    let data = DataEntry::parse(&data, &place(8192)).unwrap();
    let whole = Frame::from_parts(entry.frame.head(), data.data).unwrap();
    assert!(whole.records().eq(frame.records()));
}

#[test]
fn an_entry_at_another_place_is_refused() {
    let bytes = sample_frame(11);
    let frame = Frame::parse(&bytes).unwrap();
    let (data, meta) = (data_entry(&frame, &place(8192)), meta_entry(&frame, &place(8192), 0, 8192));
    let elsewhere = [
        place(4096),
        Place { segment: SegmentNumber(8), ..place(8192) },
        Place { disk: journal_format::DiskId([1; 16]), ..place(8192) },
    ];
    for wrong in elsewhere {
        assert_eq!(DataEntry::parse(&data, &wrong).unwrap_err().kind(), FormatErrorKind::Invalid);
        assert_eq!(MetaEntry::parse(&meta, &wrong).unwrap_err().kind(), FormatErrorKind::Invalid);
    }
}

#[test]
fn a_frame_without_data_has_no_data_entry() {
    let bytes = frame::encode(&meta(5, 0), &records(5, &[Op::Flush]), &[]).unwrap();
    let frame = Frame::parse(&bytes).unwrap();
    assert!(DataEntry::encode_header(&place(4096), frame.header()).is_err());
    let meta = meta_entry(&frame, &place(4096), 4, 0);
    let entry = MetaEntry::parse(&meta, &place(4096)).unwrap();
    assert_eq!(entry.header.data, None);
    assert_eq!(see_data(&[], &place(0), Some(&entry)), DataState::Valid);
}

#[test]
fn a_segment_file_of_another_disk_is_refused() {
    let header =
        SegmentMeta { kind: SegmentKind::Meta, disk: DISK, segment: SegmentNumber(7), first_lsn: Lsn(11) };
    let page = header.encode();
    assert_eq!(page.len() as u64, PAGE_BYTES);
    let read = SegmentMeta::parse(&page).unwrap();
    assert_eq!(read, header);
    assert!(read.expect(SegmentKind::Meta, DISK, SegmentNumber(7)).is_ok());
    assert!(read.expect(SegmentKind::Data, DISK, SegmentNumber(7)).is_err());
    assert!(read.expect(SegmentKind::Meta, DISK, SegmentNumber(6)).is_err());
}

#[test]
fn recovery_tells_zeroes_from_torn_and_whole_entries() {
    let bytes = sample_frame(11);
    let frame = Frame::parse(&bytes).unwrap();
    let entry = meta_entry(&frame, &place(4096), 10, 8192);
    assert!(matches!(see_meta(&[], &place(4096), Lsn(11)), MetaSeen::Absent));
    assert!(matches!(see_meta(&[0; 9000], &place(4096), Lsn(11)), MetaSeen::Absent));
    assert!(matches!(see_meta(&entry, &place(4096), Lsn(11)), MetaSeen::Valid(_)));
    assert!(
        matches!(see_meta(&entry, &place(4096), Lsn(12)), MetaSeen::Torn(_)),
        "another LSN than the next one"
    );
    assert!(matches!(see_meta(&entry[..200], &place(4096), Lsn(11)), MetaSeen::Torn(_)));

    let parsed = MetaEntry::parse(&entry, &place(4096)).unwrap();
    let mut data = data_entry(&frame, &place(8192));
    assert_eq!(see_data(&data, &place(8192), Some(&parsed)), DataState::Valid);
    assert_eq!(see_data(&[0; 4096], &place(8192), Some(&parsed)), DataState::Absent);
    let other = sample_frame(21);
    let other = data_entry(&Frame::parse(&other).unwrap(), &place(8192));
    assert_eq!(see_data(&other, &place(8192), Some(&parsed)), DataState::Torn, "another frame's data");
    let ops =
        [Op::Write { range: range(0, 300), data: DataSpan { pos: 0, len: 300 }, fill: false, fua: false }];
    let other = frame::encode(&meta(11, 300), &records(11, &ops), &[7; 300]).unwrap();
    let other = data_entry(&Frame::parse(&other).unwrap(), &place(8192));
    assert_eq!(see_data(&other, &place(8192), Some(&parsed)), DataState::Torn, "other data for the same LSN");
    assert_eq!(see_data(&data[..100], &place(8192), Some(&parsed)), DataState::Torn);
    assert_eq!(see_data(&data, &place(8192), None), DataState::Valid, "data without records");
    assert_eq!(see_data(&[], &place(8192), None), DataState::Absent);
    *data.last_mut().unwrap() ^= 1;
    assert_eq!(see_data(&data, &place(8192), None), DataState::Torn);
    assert_eq!(see_data(&data, &place(8192), Some(&parsed)), DataState::Torn);
}

#[test]
fn a_later_entry_says_how_far_the_disk_was_durable() {
    let (first, second) = (sample_frame(11), sample_frame(21));
    let first = meta_entry(&Frame::parse(&first).unwrap(), &place(4096), 10, 8192);
    let mut file = first.clone();
    file.resize(4096, 0);
    assert_eq!(durable_floor(&file, &place(4096)), Lsn(10));
    file.extend(meta_entry(&Frame::parse(&second).unwrap(), &place(8192), 20, 12288));
    file[100] ^= 1;
    assert!(matches!(see_meta(&file, &place(4096), Lsn(11)), MetaSeen::Torn(_)));
    assert_eq!(durable_floor(&file, &place(4096)), Lsn(20), "so LSN 11 was durable: corrupt, not a tail");
    assert_eq!(durable_floor(&file[..4096], &place(4096)), Lsn(10));
}

#[test]
fn a_manifest_is_read_back() {
    for manifest in [Manifest::new(DISK, 0), sample_manifest()] {
        assert_eq!(Manifest::parse(&manifest.encode().unwrap()).unwrap(), manifest);
    }
}

#[test]
fn impossible_manifests_are_refused() {
    let changes: [fn(&mut Manifest); 7] = [
        |m| m.segments[1].first_lsn = Lsn(12),
        |m| m.segments[1].segment = SegmentNumber(1),
        |m| m.segments.swap(0, 1),
        |m| m.next_segment = SegmentNumber(2),
        |m| m.segments[0].sealed.as_mut().unwrap().last_lsn = Lsn::ZERO,
        |m| m.disk_bytes = u64::MAX,
        |m| m.segments[0].segment = SegmentNumber(0),
    ];
    for (i, change) in changes.iter().enumerate() {
        let mut manifest = sample_manifest();
        change(&mut manifest);
        assert!(manifest.encode().is_err(), "change {i}");
    }
}

#[test]
fn bookmarks_are_read_back_and_names_are_unique() {
    for marks in [vec![], vec![bookmark(9, "before upgrade"), bookmark(3, "ä")]] {
        let bytes = bookmarks::encode(DISK, &marks).unwrap();
        assert_eq!(bookmarks::parse(&bytes).unwrap(), (DISK, marks));
    }
    assert!(bookmarks::encode(DISK, &[bookmark(1, "a"), bookmark(2, "a")]).is_err());
    assert!(bookmarks::encode(DISK, &[bookmark(1, "")]).is_err());
    assert!(bookmarks::encode(DISK, &[bookmark(0, "a")]).is_err());
    assert!(bookmarks::encode(DISK, &[bookmark(1, &"a".repeat(256))]).is_err());
}

#[test]
fn an_index_answers_by_chunk_lsn_and_stamp() {
    let chunk = 256 << 10;
    let data = pattern(1024);
    let write = Op::Write {
        range: range(chunk - 512, 1024),
        data: DataSpan { pos: 0, len: 1024 },
        fill: false,
        fua: false,
    };
    let wide = Op::Discard { range: range(0, 2 << 20) };
    let first = frame::encode(&meta(11, data.len()), &records(11, &[write, Op::Flush, wide]), &data).unwrap();
    let second = sample_frame(14);

    let mut builder = IndexBuilder::new(DISK, SegmentNumber(7));
    let at = |position| Some(DataPlace { segment: SegmentNumber(7), position });
    builder.push(&Frame::parse(&first).unwrap(), 4096, at(4096)).unwrap();
    assert!(builder.push(&Frame::parse(&first).unwrap(), 8192, at(8192)).is_err(), "the same LSNs again");
    builder.push(&Frame::parse(&second).unwrap(), 8192, at(8192)).unwrap();
    let bytes = builder.finish().unwrap();

    let shape = IndexShape::check(&bytes).unwrap();
    let index = shape.open(&bytes);
    assert_eq!((shape.first_lsn(), shape.last_lsn(), shape.disk_bytes()), (Lsn(11), Lsn(23), 1 << 30));
    assert_eq!(chunks(&index).unwrap(), [0, 1]);
    let next = |from, to| index.next_chunk(from, to).unwrap();
    assert_eq!((next(1, 2), next(2, u32::MAX), next(0, 0), next(1, 1)), (Some(1), None, None, None));

    let in_second_chunk = extents(&index, 1, 0, u64::MAX).unwrap();
    assert_eq!(in_second_chunk[0].lsn, Lsn(11));
    assert_eq!(in_second_chunk[0].range, range(chunk, 512));
    assert_eq!(in_second_chunk[0].source, Source::Data { frame: 0, pos: 512 });
    assert_eq!(in_second_chunk[1].lsn, Lsn(18), "the second half of the discard");
    assert_eq!(in_second_chunk[1].source, Source::Zero);
    assert_eq!(extents(&index, 1, 11, 17).unwrap(), [], "after 11, up to 17");
    assert_eq!(extents(&index, 2, 0, u64::MAX).unwrap(), []);

    assert_eq!(index.wide(Lsn::ZERO, Lsn::MAX).map(|e| e.lsn).collect::<Vec<_>>(), [Lsn(13), Lsn(16)]);
    assert_eq!(index.marks().map(|r| r.lsn.0).collect::<Vec<_>>(), [14, 20, 21, 22]);
    assert_eq!(index.frame_of(Lsn(13)).unwrap().first_lsn, Lsn(11));
    assert_eq!(index.frame_of(Lsn(14)).unwrap().meta_position, 8192);
    assert!(index.frame_of(Lsn(10)).is_none() && index.frame_of(Lsn(24)).is_none());
    assert!(index.frame_at(Stamp(1010)).is_none());
    assert_eq!(index.frame_at(Stamp(1013)).unwrap().first_lsn, Lsn(11));
    assert_eq!(index.frame_at(Stamp::MAX).unwrap().last_lsn(), Lsn(23));
}

#[test]
fn the_next_entry_is_found_behind_the_last_or_on_the_next_page() {
    let (first, second, third) = (sample_frame(11), sample_frame(21), sample_frame(31));
    let entry = |bytes: &[u8], position, durable| {
        meta_entry(&Frame::parse(bytes).unwrap(), &place(position), durable, 1 << 20)
    };
    let mut file = vec![0; 4096];
    file.extend(entry(&first, 4096, 10));
    let (end_of_first, second_at) = (file.len() as u64, next_entry(file.len() as u64));
    file.resize(second_at as usize, 0);
    file.extend(entry(&second, second_at, 10));
    let end_of_second = file.len() as u64;
    file.resize(8192, 0);
    file.extend(entry(&third, 8192, 30));
    let end_of_third = file.len() as u64;
    file.resize(65536, 0);

    let next = |end: u64, expected| see_next(&file[end as usize..], &place(end), Lsn(expected));
    for (end, expected, at) in [(4096, 11, 4096), (end_of_first, 21, second_at), (end_of_second, 31, 8192)] {
        let (found, seen) = next(end, expected);
        assert_eq!(found.position, at);
        assert!(matches!(seen, MetaSeen::Valid(entry) if entry.header.first_lsn == Lsn(expected)));
    }
    assert!(matches!(next(end_of_third, 41).1, MetaSeen::Absent));
    assert!(matches!(see_next(&[], &place(4096), Lsn(11)).1, MetaSeen::Absent));
}

/// After 118 or 119 records 64 bytes are left before the next page: fewer than an entry has for a header, and no more than
/// those may be looked at. (A whole later commit was once taken for a torn tail.)
#[test]
fn the_next_commit_is_found_wherever_the_last_entry_ended() {
    for count in 1..260 {
        let first = frame::encode(&meta(1, 0), &records(1, &vec![Op::Flush; count]), &[]).unwrap();
        let second =
            frame::encode(&meta(1 + count as u64, 0), &records(1 + count as u64, &[Op::Flush]), &[]).unwrap();
        let mut file = meta_entry(&Frame::parse(&first).unwrap(), &place(4096), 0, 0);
        let end = 4096 + file.len() as u64;
        let at = place(next_commit(end));
        file.resize((at.position - 4096) as usize, 0);
        file.extend(meta_entry(&Frame::parse(&second).unwrap(), &at, count as u64, 0));
        let (found, seen) = see_next(&file[(end - 4096) as usize..], &place(end), Lsn(1 + count as u64));
        assert!(found == at && matches!(seen, MetaSeen::Valid(_)), "after {count} records");
    }
}

#[test]
fn an_empty_range_overlaps_nothing() {
    assert!(!range(5, 0).overlaps(range(0, 10)) && !range(0, 10).overlaps(range(5, 0)));
    assert!(range(5, 1).overlaps(range(0, 10)) && !range(10, 1).overlaps(range(0, 10)));
}
