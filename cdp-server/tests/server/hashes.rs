//! What the journal holds, as hashes for an agent that compares.

use std::path::Path;

use journal_format::chunk_hash::CHUNK_BYTES;
use journal_format::{ChunkHash, Lsn, wire};

use crate::agent::{Agent, Capture, DISK, DISK_BYTES};
use crate::{Fixture, now_ns};

const CHUNK: u64 = CHUNK_BYTES as u64;

fn request(lsn: u64, first_chunk: u64, chunks: u32) -> wire::HashRequest {
    wire::HashRequest { disk: DISK.0.to_vec(), epoch: 7, lsn, first_chunk, chunks }
}

fn ask(agent: &mut Agent, lsn: u64, first_chunk: u64, chunks: u32) -> Vec<ChunkHash> {
    agent.send(&request(lsn, first_chunk, chunks));
    let answer: wire::Hashes = agent.expect();
    assert_eq!((answer.epoch, answer.lsn, answer.first_chunk, answer.chunks), (7, lsn, first_chunk, chunks));
    ChunkHash::all_in(&answer.hashes).collect()
}

fn hashes_of(image: &[u8]) -> Vec<ChunkHash> {
    image.chunks(CHUNK_BYTES).map(ChunkHash::of).collect()
}

#[test]
fn hashes_are_those_of_the_image_at_that_lsn_also_inside_a_gap() {
    let fixture = Fixture::start();
    let mut agent = Agent::with_disk(fixture.data());
    let mut capture = Capture::new(&agent.open(None), now_ns() - 1_000_000_000);
    let count = u32::try_from(DISK_BYTES.div_ceil(CHUNK)).expect("a small disk");
    let frame = capture.begin().write(100, &[1; 5000]).write(3 * CHUNK - 7, &[2; 20]).frame();
    agent.ship(&frame, Lsn(4));
    let old = capture.image.clone();
    let frame = capture
        .gap_begin(journal_format::GapReason::Overflow, 2)
        .write(DISK_BYTES - 512, &[3; 512])
        .write(100, &[9; 10])
        .frame();
    agent.ship(&frame, Lsn(7));
    assert_eq!(ask(&mut agent, 4, 0, count), hashes_of(&old));
    assert_eq!(ask(&mut agent, 7, 0, count), hashes_of(&capture.image), "inside the gap");
    assert_eq!(ask(&mut agent, 7, 2, 2), hashes_of(&capture.image)[2..4]);
    let behind = ask(&mut agent, 7, u64::from(count) - 1, 3);
    assert_eq!(behind[1..], [ChunkHash::of(&[]); 2], "behind the end there are zeroes");
}

#[test]
fn what_the_server_cannot_say_is_answered_with_nothing() {
    let fixture = Fixture::start();
    let mut agent = Agent::with_disk(fixture.data());
    let mut capture = Capture::new(&agent.open(None), now_ns() - 1_000_000_000);
    let frame = capture.begin().write(0, &[1; 512]).frame();
    agent.ship(&frame, Lsn(3));
    assert_eq!(ask(&mut agent, 4, 0, 1), [], "not durable yet");
    assert_eq!(ask(&mut agent, 0, 0, 1), [], "before the first record");
    assert_eq!(ask(&mut agent, 3, u64::MAX, 1), [ChunkHash::of(&[])]);
    agent.send(&wire::HashRequest { disk: vec![9; 16], ..request(1, 0, 1) });
    assert_eq!(agent.expect::<wire::Hashes>().hashes, Vec::<u8>::new(), "a disk that nobody knows");
}

#[test]
fn a_request_that_no_agent_makes_ends_the_connection() {
    let fixture = Fixture::start();
    for chunks in [0, wire::MAX_HASH_CHUNKS + 1, u32::MAX] {
        let mut agent = Agent::with_disk(fixture.data());
        agent.send(&request(1, 0, chunks));
        agent.expect_closed();
    }
}

#[test]
fn a_damaged_chunk_is_not_known_and_its_neighbours_are() {
    let mut fixture = Fixture::start();
    let mut agent = Agent::with_disk(fixture.data());
    let mut capture = Capture::new(&agent.open(None), now_ns() - 1_000_000_000);
    let frame = capture.begin().write(0, &[0xa1; 512]).frame();
    agent.ship(&frame, Lsn(3));
    let frame = capture.write(CHUNK, &[0xa2; 512]).frame();
    agent.ship(&frame, Lsn(4));
    let good = hashes_of(&capture.image);
    fixture.restart_after(|dir| flip(dir, &[0xa1; 512]));
    let mut agent = Agent::with_disk(fixture.data());
    assert_eq!(ask(&mut agent, 4, 0, 3), [ChunkHash::UNKNOWN, good[1], good[2]]);
}

/// Flips a bit in the data volume's file, where `pattern` stands.
fn flip(dir: &Path, pattern: &[u8]) {
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).expect("a folder").flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if entry.file_name().to_string_lossy().starts_with("data-") {
                let mut bytes = std::fs::read(&path).expect("the data volume");
                let found = bytes.windows(pattern.len()).position(|window| window == pattern);
                bytes[found.expect("stored as it was sent")] ^= 1;
                return std::fs::write(path, bytes).expect("written");
            }
        }
    }
    panic!("no data volume");
}
