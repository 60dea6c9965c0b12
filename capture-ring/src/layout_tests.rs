//! The byte tables of `docs/formats/ring.md` say what the code does, and the code has nothing that they leave out.

use std::collections::BTreeMap;
use std::mem::{offset_of, size_of};
use std::path::Path;

use crate::layout::{Block, Description, Slab, Slot, Words};
use crate::raw::CLOCK_WORDS_AT;

/// Field, offset, size.
type Fields = Vec<(String, usize, usize)>;

macro_rules! fields {
    ($kind:ty, $($field:ident),* $(,)?) => {{
        let offsets = [$((stringify!($field), offset_of!($kind, $field))),*];
        let mut fields = Fields::new();
        for (index, (name, offset)) in offsets.iter().enumerate() {
            let end = offsets.get(index + 1).map_or(size_of::<$kind>(), |next| next.1);
            assert!(end > *offset, "{name} is not listed in the order of its place");
            fields.push(((*name).to_owned(), *offset, end - offset));
        }
        (size_of::<$kind>(), fields)
    }};
}

fn code() -> BTreeMap<&'static str, (usize, Fields)> {
    let description = fields!(
        Description,
        magic,
        version,
        header_bytes,
        disk,
        epoch,
        first_lsn,
        disk_bytes,
        arena_bytes,
        slots,
        unit_bytes,
        slab_units,
        chunk_bytes,
        dirty_bits,
        dirty_at,
        slots_at,
        blocks_at,
        slabs_at,
        arena_at,
        total_bytes,
        begins,
        reserved,
        crc,
    );
    let words = fields!(
        Words,
        tail,
        pad_tail,
        credits,
        pad_credits,
        current,
        pad_current,
        free_top,
        free_slabs,
        pad_free,
        head,
        pad_head,
        mode,
        awaited,
        stopped,
        stopped_at,
        gap_begun,
        gap_ended,
        disk_bytes,
        pad_mode,
        untracked,
        fills,
        pad_untracked,
        event,
        waiting,
        waiting_since,
        sync_lost,
        pad_event,
        policy,
        sync,
        durable,
        pad_policy,
    );
    let clock = ["magic", "version", "last"].iter().zip(CLOCK_WORDS_AT);
    let clock = clock.map(|(name, at)| ((*name).to_owned(), at, 8)).collect();
    BTreeMap::from([
        ("Description", description),
        ("Words", words),
        ("Slot", fields!(Slot, word, stamp, offset, length, what, block, pad)),
        ("Block", fields!(Block, offset, length, link, state)),
        ("Slab", fields!(Slab, live, next, pad)),
        ("Clock", (crate::layout::CLOCK_BYTES as usize, clock)),
    ])
}

/// The tables under headings of the form `### ``Name``, N bytes`.
fn documented() -> BTreeMap<String, (usize, Fields)> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/formats/ring.md");
    let text = std::fs::read_to_string(page).expect("the page");
    let mut tables = BTreeMap::new();
    let mut current: Option<String> = None;
    for line in text.lines() {
        if let Some(heading) = line.strip_prefix("### `") {
            let (name, rest) = heading.split_once("`, ").expect("a name and a size");
            let bytes = rest.trim_end_matches(" bytes").parse().expect("a size in bytes");
            tables.insert(name.to_owned(), (bytes, Fields::new()));
            current = Some(name.to_owned());
        } else if line.starts_with('#') {
            current = None;
        } else if let (Some(name), Some(row)) = (&current, line.strip_prefix("| ")) {
            let cells: Vec<&str> = row.split(" | ").map(str::trim).collect();
            if let (Ok(offset), Ok(size)) = (cells[0].parse(), cells[1].parse()) {
                let field = cells[2].trim_matches('`').to_owned();
                tables.get_mut(name).expect("inserted above").1.push((field, offset, size));
            }
        }
    }
    tables
}

#[test]
fn ring_md_and_the_code_have_the_same_tables() {
    let documented = documented();
    let code = code();
    assert_eq!(documented.keys().collect::<Vec<_>>(), code.keys().collect::<Vec<_>>());
    for (name, table) in code {
        assert_eq!(documented[name], table, "{name}");
    }
}
