//! The byte tables of `docs/formats/` say what the code does, and the code has nothing that they leave out.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use journal_format::layout::Field;
use journal_format::recovery::CASES;
use journal_format::wire::{MessageHeader, MessageType};
use journal_format::{
    FrameHeader, GapReason, bookmarks, durable_mark, index, manifest, parts, record, segment,
};

/// Every struct that is written to a disk or sent over a socket.
const STRUCTS: &[(&str, &[Field])] = &[
    ("FrameHeader", FrameHeader::LAYOUT),
    ("RawRecord", record::RawRecord::LAYOUT),
    ("SegmentHeader", segment::SegmentHeader::LAYOUT),
    ("RawPart", parts::RawPart::LAYOUT),
    ("RawDataEntry", segment::RawDataEntry::LAYOUT),
    ("RawMetaEntry", segment::RawMetaEntry::LAYOUT),
    ("IndexHeader", index::IndexHeader::LAYOUT),
    ("RawIndexFrame", index::RawIndexFrame::LAYOUT),
    ("RawPage", index::RawPage::LAYOUT),
    ("RawChunk", index::RawChunk::LAYOUT),
    ("RawExtent", index::RawExtent::LAYOUT),
    ("RawWide", index::RawWide::LAYOUT),
    ("RawMark", index::RawMark::LAYOUT),
    ("ManifestHeader", manifest::ManifestHeader::LAYOUT),
    ("RawLiveSegment", manifest::RawLiveSegment::LAYOUT),
    ("BookmarksHeader", bookmarks::BookmarksHeader::LAYOUT),
    ("RawBookmark", bookmarks::RawBookmark::LAYOUT),
    ("RawDurableMark", durable_mark::RawDurableMark::LAYOUT),
    ("MessageHeader", MessageHeader::LAYOUT),
];

const PAGES: [&str; 5] = ["frame.md", "segment.md", "index.md", "manifest.md", "wire.md"];

/// A table under a heading of the form `### ``Name``` or `### ``Name``, N bytes`.
struct Table {
    bytes: Option<usize>,
    rows: Vec<Vec<String>>,
}

fn tables() -> BTreeMap<String, Table> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/formats");
    let mut tables = BTreeMap::new();
    for page in PAGES {
        let text = fs::read_to_string(folder.join(page)).unwrap();
        let mut current = None;
        for line in text.lines() {
            if line.starts_with('#') {
                current = heading(line);
                if let Some((name, bytes)) = &current {
                    let table = Table { bytes: *bytes, rows: Vec::new() };
                    assert!(tables.insert(name.clone(), table).is_none(), "{name} has two tables");
                }
            } else if let (Some((name, _)), Some(row)) = (&current, line.strip_prefix("| ")) {
                let cells = row.trim_end_matches('|').split(" | ").map(|cell| cell.trim().to_owned());
                tables.get_mut(name).unwrap().rows.push(cells.collect());
            } else {
                // Another line ends a table that has begun, so that the next table is not taken for a part of it.
                current = current.filter(|(name, _)| tables[name].rows.is_empty());
            }
        }
    }
    // The first row holds the columns' names, the second one dashes.
    tables.values_mut().for_each(|table| drop(table.rows.drain(..2)));
    tables
}

fn heading(line: &str) -> Option<(String, Option<usize>)> {
    let (name, rest) = line.strip_prefix("### `")?.split_once('`')?;
    let bytes = rest.strip_prefix(", ").and_then(|rest| rest.strip_suffix(" bytes"));
    Some((name.to_owned(), bytes.map(|bytes| bytes.parse().unwrap())))
}

#[test]
fn every_struct_is_documented_byte_for_byte() {
    let tables = tables();
    for (name, layout) in STRUCTS {
        let table = tables.get(*name).unwrap_or_else(|| panic!("{name} has no table in docs/formats"));
        assert_eq!(table.bytes, Some(layout.iter().map(|field| field.2).sum()), "size of {name}");
        let documented: Vec<_> = table.rows.iter().map(|row| row[..3].to_vec()).collect();
        let real: Vec<_> = layout
            .iter()
            .map(|(field, at, size)| vec![at.to_string(), size.to_string(), format!("`{field}`")])
            .collect();
        assert_eq!(documented, real, "fields of {name}");
        for row in &table.rows {
            assert!(row.len() == 5 && row.iter().all(|cell| !cell.is_empty()), "{name}: {row:?}");
        }
    }
}

#[test]
fn every_byte_table_is_of_a_struct() {
    for (name, table) in tables() {
        let known = STRUCTS.iter().any(|(known, _)| *known == name);
        assert_eq!(known, table.bytes.is_some(), "{name}");
    }
}

#[test]
fn the_recovery_table_is_the_one_in_the_code() {
    fn word<T: std::fmt::Debug>(value: Option<T>) -> String {
        value.map_or("any".to_owned(), |value| format!("{value:?}"))
    }
    let real: Vec<_> = CASES
        .iter()
        .map(|case| {
            let action = format!("{:?}", case.action);
            vec![word(case.meta), word(case.data), word(case.standing), action, case.story.to_owned()]
        })
        .collect();
    assert_eq!(tables()["CASES"].rows, real);
}

#[test]
fn the_message_types_are_those_in_the_code() {
    let real: Vec<_> = (0..=u16::MAX)
        .filter_map(MessageType::from_u16)
        .map(|kind| vec![(kind as u16).to_string(), format!("`{kind:?}`"), kind.max_body_bytes().to_string()])
        .collect();
    let rows = &tables()["MessageType"].rows;
    let documented: Vec<_> =
        rows.iter().map(|row| vec![row[0].clone(), row[1].clone(), row[3].clone()]).collect();
    assert_eq!(documented, real);
}

#[test]
fn the_gap_reasons_are_those_in_the_code() {
    let real: Vec<_> = (0..=u8::MAX)
        .filter_map(GapReason::from_u8)
        .map(|reason| vec![(reason as u8).to_string(), format!("`{}`", reason.as_str())])
        .collect();
    let documented: Vec<_> = tables()["GapReason"].rows.iter().map(|row| row[..2].to_vec()).collect();
    assert_eq!(documented, real);
}
