//! Requests that overlap while they are in flight, through two connections at once, on a small part of the disk.
//!
//! The witness (`blklogwrites`) tells what each request wrote, the journal in which order they took effect; the disk itself
//! tells, whenever nothing is in flight, whether that order was the true one. In between, every single point must be the
//! witness's data in the journal's order. No two requests of a round have the same range, so that each record is one
//! request.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::Path;

use cdp_tests::nbd::{Command, Nbd};
use cdp_tests::qemu::{Qemu, raw_file, witness_above_disk};
use cdp_tests::random::Random;
use cdp_tests::site::Site;
use cdp_tests::witness::{self, Logged};
use journal_format::{ByteRange, Record};

use super::{History, guest_changes, range_of, read, scaled};

const DISK_BYTES: u64 = 256 << 10;
/// Requests of a round: all of them in flight together, as far as QEMU takes them.
const ROUND: usize = 20;

/// What was done together.
struct Round {
    /// In the order of sending; every other one on the same connection.
    sent: Vec<ByteRange>,
    /// What the disk held when all had completed.
    disk: Vec<u8>,
}

/// A random range that is not among `taken`.
fn range(random: &mut Random, taken: &[ByteRange]) -> ByteRange {
    loop {
        let length = random.within(1..65) * 512;
        let offset = random.within(0..(DISK_BYTES - length) / 512 + 1) * 512;
        let range = ByteRange::new(offset, length).expect("a range");
        if !taken.contains(&range) {
            return range;
        }
    }
}

/// A random request for it.
fn request(random: &mut Random, range: ByteRange) -> Command {
    let (offset, length) = (range.offset(), range.length());
    match random.within(0..10) {
        0 => Command::Zero { offset, length, unmap: random.chance(50) },
        1 => Command::Discard { offset, length },
        _ => Command::Write { offset, data: random.bytes(length as usize), fua: false },
    }
}

fn write(socket: &Path, image: &Path, rounds: usize, random: &mut Random) -> Vec<Round> {
    let mut connections = [Nbd::connect(socket, "disk"), Nbd::connect(socket, "disk")];
    let round = |_| {
        let mut sent = Vec::new();
        for number in 0..ROUND {
            sent.push(range(random, &sent));
            connections[number % 2].send(&request(random, sent[number]));
        }
        connections.iter_mut().for_each(Nbd::wait_all);
        Round { sent, disk: fs::read(image).expect("the disk") }
    };
    (0..rounds).map(round).collect()
}

/// How many records come before one of a request that was sent earlier on the same connection.
fn overtaking(sent: &[ByteRange], records: &[Record]) -> usize {
    let order: Vec<_> =
        records.iter().map(|record| sent.iter().position(|range| *range == range_of(record))).collect();
    let of_connection =
        |parity| order.iter().flatten().filter(move |number| **number % 2 == parity).collect::<Vec<_>>();
    let overtakes = |numbers: Vec<&usize>| numbers.windows(2).filter(|pair| pair[0] > pair[1]).count();
    overtakes(of_connection(0)) + overtakes(of_connection(1))
}

fn logged_range(request: &Logged) -> ByteRange {
    let range = match request {
        Logged::Write { offset, data } => ByteRange::new(*offset, data.len() as u64),
        Logged::Discard { offset, length } => ByteRange::new(*offset, *length),
        Logged::Flush => None,
    };
    range.expect("a request with a range")
}

#[test]
fn requests_that_overlap_in_flight_have_one_order_in_journal_and_disk() {
    let mut random = Random::seeded(81);
    let site = Site::start();
    let (image, log) = (site.directory().join("disk.raw"), site.directory().join("writes"));
    File::create(&image).expect("image").set_len(DISK_BYTES).expect("size");
    File::create(&log).expect("log");
    let qemu =
        Qemu::storage_daemon(&site, "overlap", &[raw_file(&image), witness_above_disk(&log)], "witness");
    let disk = site.disk(qemu.vm(), "");
    site.protect(&disk);
    let rounds = scaled(60);
    let done = write(qemu.nbd_socket(), &image, rounds, &mut random);
    site.bookmark(&disk, "end");

    let history = History::open(&site.store(), &disk);
    let records = guest_changes(&history);
    let log: Vec<_> = witness::read(&log).into_iter().filter(|request| *request != Logged::Flush).collect();
    assert_eq!(
        (records.len(), log.len()),
        (rounds * ROUND, rounds * ROUND),
        "records, requests the witness saw"
    );
    let mut model = vec![0; DISK_BYTES as usize];
    let mut overtook = 0;
    for (round, (records, log)) in records.chunks(ROUND).zip(log.chunks(ROUND)).enumerate() {
        overtook += overtaking(&done[round].sent, records);
        let by_range: HashMap<_, _> = log.iter().map(|request| (logged_range(request), request)).collect();
        for record in records {
            let request =
                by_range.get(&range_of(record)).unwrap_or_else(|| panic!("nobody wrote {record:?}"));
            witness::apply(&mut model, request);
            let restored = read(&history.view(record.lsn), 0, model.len());
            let differs = restored.iter().zip(&model).position(|(a, b)| a != b);
            assert_eq!(differs, None, "LSN {} in round {round}: first differing byte", record.lsn);
        }
        let differs = done[round].disk.iter().zip(&model).position(|(a, b)| a != b);
        assert_eq!(
            differs, None,
            "round {round}: the journal has another order than the disk, first at this byte"
        );
    }
    assert!(overtook > 0, "the requests were never in flight together: nothing was tried");
    println!(
        "{} points equal the witness, {rounds} rounds the disk; {overtook} requests overtook others",
        records.len()
    );
}
