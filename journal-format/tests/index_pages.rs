//! The large tables of an index are checked page by page: rot in a page is found by the first lookup that comes to it, and by
//! no other; nothing is answered from it.

mod common;

use common::*;
use journal_format::index::{
    BadPage, Extent, IndexBuilder, IndexHeader, IndexShape, RawChunk, RawExtent, RawPage,
};
use journal_format::segment::DataPlace;
use journal_format::{DataSpan, Frame, Lsn, Op, SegmentNumber, frame};

const CHUNK: u64 = 256 << 10;
/// Three pages of chunks, the last with one entry.
const CHUNKS: u32 = 2 * 341 + 1;
/// So many versions of this chunk are four pages and more.
const HOT: u32 = 100;
const VERSIONS: u64 = 700;

/// A write to each chunk, and many to one.
fn large_index() -> Vec<u8> {
    let data = pattern(8);
    let write = |chunk: u32, at: u64| Op::Write {
        range: range(u64::from(chunk) * CHUNK + at, 8),
        data: DataSpan { pos: 0, len: 8 },
        fill: false,
        fua: false,
    };
    let each = (0..CHUNKS).map(|chunk| write(2 * chunk, 0));
    let hot = (0..VERSIONS).map(|at| write(2 * HOT, 8 * at));
    let ops: Vec<_> = each.chain(hot).collect();
    let bytes = frame::encode(&meta(11, data.len()), &records(11, &ops), &data).unwrap();
    let mut builder = IndexBuilder::new(DISK, SegmentNumber(7));
    let at = DataPlace { segment: SegmentNumber(7), position: 4096 };
    builder.push(&Frame::parse(&bytes).unwrap(), 4096, Some(at)).unwrap();
    builder.finish().unwrap()
}

/// Where in the file chunks and extents begin, and where the file ends.
fn places(bytes: &[u8]) -> [usize; 3] {
    let count = |name: &str| {
        let (_, at, size) = *IndexHeader::LAYOUT.iter().find(|field| field.0 == name).unwrap();
        u32::from_le_bytes(bytes[4096 + at..][..size].try_into().unwrap()) as usize
    };
    let extents = bytes.len() - count("extent_count") * size_of::<RawExtent>();
    [extents - count("chunk_count") * size_of::<RawChunk>(), extents, bytes.len()]
}

/// All answers: the chunks, and of each that there is, and of one that there is not, the extents.
fn answers(shape: &IndexShape, bytes: &[u8]) -> Vec<Result<Vec<Extent>, BadPage>> {
    let index = shape.open(bytes);
    (0..2 * CHUNKS).map(|chunk| extents(&index, chunk, 0, u64::MAX)).collect()
}

fn flipped(bytes: &[u8], at: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at] ^= 1 << (at % 8);
    bytes
}

/// Where the pages begin, and where the last one ends.
fn borders(bytes: &[u8]) -> Vec<usize> {
    let [chunks_at, extents_at, end] = places(bytes);
    let chunks = (chunks_at..extents_at).step_by(341 * 12);
    chunks.chain((extents_at..end).step_by(170 * 24)).chain([end]).collect()
}

#[test]
fn opening_checks_no_page_and_a_lookup_few() {
    let bytes = large_index();
    let all = borders(&bytes).len() as u32 - 1;
    assert_eq!(all, 3 + 9, "{:?}", places(&bytes));
    let shape = IndexShape::parse(&bytes).unwrap();
    assert_eq!(shape.checked_pages(), 0);
    let index = shape.open(&bytes);
    assert_eq!(extents(&index, 2 * 5, 0, u64::MAX).unwrap().len(), 1);
    assert_eq!(shape.checked_pages(), 1 + 1, "one of the chunks, one of the extents");
    assert_eq!(extents(&index, 2 * 5, 0, u64::MAX).unwrap().len(), 1);
    assert_eq!(shape.checked_pages(), 2, "once is enough");
    let mut newest = None;
    index.newest_first(2 * HOT, Lsn::ZERO, Lsn::MAX, |extent| newest.replace(extent.lsn).is_some()).unwrap();
    assert_eq!(newest, Some(Lsn(11 + u64::from(CHUNKS) + VERSIONS - 1)));
    assert!(
        shape.checked_pages() < all,
        "of many versions the newest needs few pages: {}",
        shape.checked_pages()
    );
    assert_eq!(IndexShape::check(&bytes).unwrap().checked_pages(), all);
}

#[test]
fn rot_anywhere_in_the_large_tables_is_found_by_who_comes_to_it_and_by_nobody_else() {
    let bytes = large_index();
    let good: Vec<_> =
        answers(&IndexShape::check(&bytes).unwrap(), &bytes).into_iter().map(Result::unwrap).collect();
    let borders = borders(&bytes);
    for page in borders.windows(2) {
        // The first and last byte of a page, and some between.
        let between = (page[0]..page[1]).step_by(997);
        for at in between.chain([page[1] - 1]) {
            let rotten = flipped(&bytes, at);
            assert!(IndexShape::check(&rotten).is_err(), "byte {at}: all is checked");
            let shape = IndexShape::parse(&rotten).unwrap_or_else(|error| panic!("byte {at}: {error}"));
            let found = answers(&shape, &rotten);
            let (mut refused, mut right) = (0, 0);
            for (found, good) in found.into_iter().zip(&good) {
                match found {
                    Ok(found) => {
                        assert!(found == *good, "byte {at}: a wrong answer");
                        right += 1;
                    }
                    Err(bad) => {
                        assert_eq!(bad.offset, page[0] as u64, "byte {at}: {bad}");
                        refused += 1;
                    }
                }
            }
            assert!(refused > 0, "byte {at}: nobody noticed");
            // The page in the middle of the chunks is in the way of every search.
            assert!(right > 0 || page[0] == borders[1], "byte {at}: nothing can be looked up");
        }
    }
}

#[test]
fn rot_before_the_large_tables_is_found_at_opening() {
    let bytes = large_index();
    let [chunks_at, ..] = places(&bytes);
    for at in (0..chunks_at).step_by(3).chain(chunks_at - 4 * 12..chunks_at) {
        assert!(IndexShape::parse(&flipped(&bytes, at)).is_err(), "byte {at}");
    }
}

#[test]
fn a_file_that_is_too_short_or_too_long_is_refused_at_opening() {
    let bytes = large_index();
    let [_, _, end] = places(&bytes);
    for length in borders(&bytes).into_iter().flat_map(|at| [at - 1, at]).filter(|length| *length < end) {
        assert!(IndexShape::parse(&bytes[..length]).is_err(), "{length}");
    }
    assert!(IndexShape::parse(&[&bytes[..], &[0]].concat()).is_err());
}

#[test]
fn pages_of_chunks_that_are_out_of_order_are_refused_at_opening() {
    let mut bytes = large_index();
    let [chunks_at, ..] = places(&bytes);
    let pages_at = chunks_at - (borders(&bytes).len() - 1) * size_of::<RawPage>();
    let first_of_second = &mut bytes[pages_at + size_of::<RawPage>() + 4..][..4];
    assert_eq!(*first_of_second, (2 * 341_u32).to_le_bytes());
    first_of_second.copy_from_slice(&[0; 4]);
    // With checksums that are right.
    let crc_of = |bytes: &[u8]| crc32c::crc32c(bytes).to_le_bytes();
    let (body, header) = (4096 + size_of::<IndexHeader>(), 4096);
    let (_, at, _) = *IndexHeader::LAYOUT.iter().find(|field| field.0 == "body_crc").unwrap();
    let crc = crc_of(&bytes[body..chunks_at]);
    bytes[header + at..][..4].copy_from_slice(&crc);
    let crc = crc_of(&bytes[header..body - 4]);
    bytes[body - 4..body].copy_from_slice(&crc);
    let refused = IndexShape::parse(&bytes).unwrap_err();
    assert_eq!(refused.to_string(), "index: invalid: the pages of chunks are out of order");
}
