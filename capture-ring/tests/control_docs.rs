//! `docs/formats/control.md` has the kinds, fields and limits that the code has: each row of its table is taken for
//! a recipe, and the message that it makes must be what the code encodes.
#![cfg(not(loom))]

use journal_format::ImageTag;
use std::path::Path;

use capture_ring::control::{DiskInfo, Hello, MESSAGE_HEADER_BYTES, Message, PROTOCOL_VERSION, encode};

/// One row: kind, name, body.
fn rows() -> Vec<(u16, String, String)> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/formats/control.md");
    let text = std::fs::read_to_string(page).expect("the page");
    let (_, kinds) = text.split_once("### Kinds").expect("the table of kinds");
    let rows = kinds.lines().filter_map(|line| {
        let cells: Vec<&str> =
            line.strip_prefix("| ")?.trim_end_matches('|').split(" | ").map(str::trim).collect();
        Some((cells.first()?.parse().ok()?, cells[1].trim_matches('`').to_owned(), cells[3].to_owned()))
    });
    rows.collect()
}

/// A message of that kind with every text as long as the code allows and every number 1.
fn largest(name: &str) -> Message {
    let text = |bytes: usize| "x".repeat(bytes);
    let device = text(128);
    let disk = DiskInfo {
        device: device.clone(),
        node: text(64),
        driver: text(32),
        disk_bytes: 1,
        read_only: true,
        refused: text(256),
    };
    match name {
        "Hello" => Message::Hello(Hello {
            protocol: 1,
            pid: 1,
            program: text(64),
            qemu_version: text(128),
            vm_name: text(128),
            vm_uuid: [1; 16],
            refused: text(256),
        }),
        "Disks" => Message::Disks { disks: vec![disk], more: true },
        "List" => Message::List,
        "Attach" => Message::Attach { request: 1, device, image: Some(ImageTag([1; 16])) },
        "Detach" => Message::Detach { request: 1, device },
        "Resync" => Message::Resync { request: 1, device },
        "Result" => Message::Result { request: 1, ok: true, message: text(512) },
        "Held" => Message::Held { device, ended: true },
        "Hold" => Message::Hold { request: 1, device },
        "Forget" => Message::Forget { device },
        "Fault" => Message::Fault { device, message: text(512) },
        other => panic!("control.md has a kind {other} that the code has not"),
    }
}

/// The bytes that a row's recipe makes for that message.
fn recipe(body: &str) -> Vec<u8> {
    let mut out = Vec::new();
    let body = body.split(';').next().expect("a body");
    for field in body.split(", ").filter(|field| field.contains('`')) {
        let field = field.rsplit_once(": ").map_or(field, |(_, field)| field);
        let (_, shape) = field.trim_start_matches('`').split_once("` ").expect("a name and a shape");
        match shape.split(' ').collect::<Vec<_>>()[..] {
            ["flag"] => out.push(1),
            ["u16"] => out.extend(1_u16.to_le_bytes()),
            ["u32"] => out.extend(1_u32.to_le_bytes()),
            ["u64"] => out.extend(1_u64.to_le_bytes()),
            ["16", "bytes"] => out.extend([1; 16]),
            ["text", most] => {
                let most: u16 = most.parse().expect("a limit");
                out.extend(most.to_le_bytes());
                out.extend(vec![b'x'; usize::from(most)]);
            }
            _ => panic!("control.md has a shape {shape}"),
        }
    }
    out
}

#[test]
fn control_md_and_the_code_have_the_same_messages() {
    let rows = rows();
    assert_eq!(rows.iter().map(|row| row.0).collect::<Vec<_>>(), (1..=11).collect::<Vec<_>>());
    for (kind, name, body) in rows {
        let bytes = encode(&largest(&name)).expect("within limits");
        assert_eq!(bytes[..4], *b"CDPC");
        assert_eq!(bytes[4..8], [PROTOCOL_VERSION.to_le_bytes(), kind.to_le_bytes()].concat(), "{name}");
        assert_eq!(bytes[MESSAGE_HEADER_BYTES..], recipe(&body), "{name}");
    }
}
