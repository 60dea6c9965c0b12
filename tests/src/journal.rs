//! The records of a disk, read from a store's metadata files as `docs/formats` describes them.

use std::fs;
use std::path::Path;

use journal_format::recovery::{MetaSeen, see_next};
use journal_format::segment::{Place, SEGMENT_HEADER_PAGE_BYTES, SegmentMeta};
use journal_format::{DiskId, Lsn, Op, Record};

/// All records of a disk in LSN order.
///
/// # Panics
/// When the files are not as documented, or an LSN is missing.
#[must_use]
pub fn records(store: &Path, disk: &str) -> Vec<Record> {
    let directory = store.join("disks").join(disk);
    let mut files: Vec<_> = fs::read_dir(&directory)
        .unwrap_or_else(|e| panic!("{}: {e}", directory.display()))
        .map(|entry| entry.expect("entry").path())
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("meta-")))
        .collect();
    files.sort();
    let id: DiskId = disk.parse().expect("a disk id");
    let mut records = Vec::new();
    for file in files {
        read_segment(&fs::read(&file).expect("segment"), id, &mut records);
    }
    let numbered = records.iter().zip(1..).all(|(record, lsn)| record.lsn == Lsn(lsn));
    assert!(numbered, "the LSNs of {disk} have holes");
    records
}

fn read_segment(bytes: &[u8], disk: DiskId, records: &mut Vec<Record>) {
    let meta = SegmentMeta::parse(bytes).expect("segment header");
    let mut end = Place { disk, segment: meta.segment, position: SEGMENT_HEADER_PAGE_BYTES as u64 };
    loop {
        let next = records.last().map_or(meta.first_lsn, |last: &Record| last.lsn.next());
        let (place, seen) = see_next(bytes.get(end.position as usize..).unwrap_or(&[]), &end, next);
        match seen {
            MetaSeen::Valid(entry) => {
                records.extend(entry.frame.records());
                end = Place { position: place.position + entry.header.entry_bytes(), ..place };
            }
            MetaSeen::Absent => return,
            MetaSeen::Torn(error) => panic!("metadata at {}: {error}", place.position),
        }
    }
}

/// Whether a record changes the disk on a guest's behalf.
#[must_use]
pub fn is_guest_change(record: &Record) -> bool {
    match record.op {
        Op::Write { fill, .. } | Op::Zero { fill, .. } => !fill,
        Op::Discard { .. } | Op::Resize { .. } => true,
        _ => false,
    }
}
