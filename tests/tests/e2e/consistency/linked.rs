//! Writers that keep a log as a database does: a record that points to the one before it, in one or two requests; a flush;
//! a header that points to the record; a flush. Records are reused only when the header has long left them behind.
//!
//! ```text
//! stream: │ header │ slot 0 │ slot 1 │ … │ slot 31 │      4 KiB each, record i in slot i mod 32
//! header:  magic, stream, index and checksum of the newest record
//! record:  magic, stream, index, checksum of the record before it
//! ```

use std::fs::{self, File};
use std::path::Path;

use cdp_api::PointSpec;
use cdp_tests::nbd::{Command, Nbd};
use cdp_tests::qemu::{Qemu, raw_file};
use cdp_tests::random::Random;
use cdp_tests::site::{Site, Via};
use journal_format::Lsn;
use serde_json::{Value, json};

use super::{History, checksum, now_ns, read, scaled, sealed, unsealed};

const DISK_BYTES: u64 = 16 << 20;
const STREAMS: u64 = 4;
const BLOCK: usize = 4096;
const SLOTS: u64 = 32;
/// How far back a program would follow the chain.
const WINDOW: u64 = 24;
const STREAM_BYTES: usize = (1 + SLOTS as usize) * BLOCK;
const RECORD: u64 = 0x7265_636f_7264_2121;
const HEADER: u64 = 0x6865_6164_6572_2121;

/// When the writer sent a header, and when it was told that it is written.
#[derive(Clone, Copy, Debug)]
struct Written {
    begun_ns: u64,
    completed_ns: u64,
}

const fn base_of(stream: u64) -> u64 {
    stream * STREAM_BYTES.next_power_of_two() as u64
}

/// One writer.
struct Stream {
    nbd: Nbd,
    stream: u64,
    random: Random,
    written: Vec<Written>,
    last: u64,
}

impl Stream {
    fn new(socket: &Path, stream: u64, seed: u64) -> Self {
        let random = Random::of(seed ^ (stream + 1));
        Self { nbd: Nbd::connect(socket, "disk"), stream, random, written: Vec::new(), last: 0 }
    }

    fn append(&mut self) {
        let index = self.written.len() as u64 + 1;
        let filler = self.random.within(0..BLOCK as u64 - 64) as usize;
        let filler = self.random.bytes(filler);
        let record = sealed(&[RECORD, self.stream, index, self.last], &filler, BLOCK);
        self.last = checksum(&record);
        let offset = base_of(self.stream) + (1 + index % SLOTS) * BLOCK as u64;
        self.write_in_parts(offset, &record);
        self.nbd.run(&Command::Flush);
        let header = sealed(&[HEADER, self.stream, index, self.last], &[], BLOCK);
        let fua = self.random.chance(50);
        let begun_ns = now_ns();
        self.nbd.run(&Command::Write { offset: base_of(self.stream), data: header, fua });
        self.written.push(Written { begun_ns, completed_ns: now_ns() });
        if !fua {
            self.nbd.run(&Command::Flush);
        }
    }

    /// In one request, or in two that are in flight together.
    fn write_in_parts(&mut self, offset: u64, record: &[u8]) {
        let middle = self.random.within(0..BLOCK as u64 / 512) as usize * 512;
        let (first, second) = record.split_at(middle);
        for (at, part) in [(offset + middle as u64, second), (offset, first)] {
            if !part.is_empty() {
                self.nbd.send(&Command::Write { offset: at, data: part.to_vec(), fua: false });
            }
        }
        self.nbd.wait_all();
    }
}

/// Checks a stream's bytes at a point; returns the index of the newest record.
fn check(stream: u64, bytes: &[u8]) -> u64 {
    let blank = |block: &[u8]| block.iter().all(|byte| *byte == 0);
    let block = |number: usize| &bytes[number * BLOCK..(number + 1) * BLOCK];
    if blank(block(0)) {
        return 0;
    }
    let header = unsealed::<4>(block(0)).expect("the header is torn");
    let (newest, mut expected) = (header[2], header[3]);
    assert_eq!(header[..2], [HEADER, stream], "the header is another one's");
    for index in ((newest + 1).saturating_sub(WINDOW).max(1)..=newest).rev() {
        let block = block(1 + (index % SLOTS) as usize);
        let record = unsealed::<4>(block).unwrap_or_else(|| panic!("record {index} of {newest} is torn"));
        assert_eq!(record[..3], [RECORD, stream, index], "a link of {newest} leads elsewhere");
        assert_eq!(checksum(block), expected, "record {index} of {newest} is not the one that was linked");
        expected = record[3];
    }
    newest
}

/// Fails unless what was complete before the instant is there, and nothing that was begun after it.
fn check_times(written: &[Written], newest: u64, stamp_ns: u64) {
    let complete = written.partition_point(|record| record.completed_ns < stamp_ns) as u64;
    let begun = written.partition_point(|record| record.begun_ns <= stamp_ns) as u64;
    assert!(newest >= complete, "{complete} records were complete before the point, {newest} are there");
    assert!(newest <= begun, "{begun} records were begun before the point, {newest} are there");
}

/// Writes to the rest of the disk, many requests in flight, until `done` says so.
fn noise(socket: &Path, seed: u64, done: &std::sync::atomic::AtomicBool) {
    let mut nbd = Nbd::connect(socket, "disk");
    let mut random = Random::of(seed);
    // ORDERING: Relaxed; the flag stands alone.
    while !done.load(std::sync::atomic::Ordering::Relaxed) {
        let length = random.within(1..64) * 512;
        let offset = (4 << 20) + random.within(0..(DISK_BYTES - (5 << 20)) / 512) * 512;
        nbd.send(&Command::Write { offset, data: random.bytes(length as usize), fua: false });
        if nbd.in_flight() > 6 {
            nbd.wait();
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    nbd.wait_all();
}

/// Every stream appends `count` records; what happens meanwhile is `meanwhile`.
fn write(streams: &mut [Stream], count: usize, socket: &Path, seed: u64, meanwhile: impl FnOnce()) {
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| noise(socket, seed, &done));
        let writers: Vec<_> = streams
            .iter_mut()
            .map(|stream| scope.spawn(move || (0..count).for_each(|_| stream.append())))
            .collect();
        meanwhile();
        let joined: Vec<_> = writers.into_iter().map(|writer| writer.join()).collect();
        // ORDERING: Relaxed; the flag stands alone.
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        joined.into_iter().for_each(|writer| writer.expect("a writer"));
    });
}

fn every_point_holds_whole_chains(
    name: &str,
    node: impl FnOnce(&Site) -> Value,
    interrupted: bool,
    seed: u64,
) {
    let mut random = Random::seeded(seed);
    let mut site = Site::start();
    let node = node(&site);
    let qemu = Qemu::storage_daemon(&site, name, &[node], "disk");
    let disk = site.disk(qemu.vm(), "");
    site.protect(&disk);
    let socket = qemu.nbd_socket().to_owned();
    let mut streams: Vec<_> = (0..STREAMS).map(|stream| Stream::new(&socket, stream, seed)).collect();
    write(&mut streams, scaled(150), &socket, seed, || {});
    if interrupted {
        write(&mut streams, scaled(60), &socket, seed + 1, || {
            site.server.kill();
            site.restart_server();
        });
        write(&mut streams, scaled(60), &socket, seed + 2, || {
            site.agent.kill();
            site.restart_agent();
        });
        site.protect(&disk);
        write(&mut streams, scaled(60), &socket, seed + 3, || {});
    }
    let end = site.bookmark(&disk, "end");

    let history = History::open(&site.store(), &disk);
    let view = history.view(Lsn(end));
    for (stream, writer) in (0..).zip(&streams) {
        let newest = check(stream, &read(&view, base_of(stream), STREAM_BYTES));
        assert_eq!(newest, writer.written.len() as u64, "records of stream {stream} at the end");
    }
    let points = scaled(1500);
    for _ in 0..points {
        let point = history.any_point(&mut random);
        let view = history.view(point.lsn);
        for (stream, writer) in (0..).zip(&streams) {
            let newest = check(stream, &read(&view, base_of(stream), STREAM_BYTES));
            check_times(&writer.written, newest, point.stamp.0);
        }
    }
    let restores = scaled(4);
    for number in 0..restores {
        let point = history.any_point(&mut random);
        let via = if number % 2 == 0 { Via::Server } else { Via::Store };
        let image = site.restore(&disk, &PointSpec::Lsn(point.lsn.0), via);
        for (stream, writer) in (0..).zip(&streams) {
            let base = base_of(stream) as usize;
            check_times(&writer.written, check(stream, &image[base..base + STREAM_BYTES]), point.stamp.0);
        }
    }
    println!("{name}: {points} points and {restores} restores of {} records hold", history.records.len());
}

fn raw(site: &Site) -> Value {
    let image = site.directory().join("disk.raw");
    File::create(&image).expect("image").set_len(DISK_BYTES).expect("size");
    raw_file(&image)
}

fn qcow2(site: &Site) -> Value {
    let image = site.directory().join("disk.qcow2");
    let create = ["create", "-q", "-f", "qcow2"];
    let status = std::process::Command::new("qemu-img").args(create).arg(&image).arg("16M").status();
    assert!(status.expect("qemu-img runs").success());
    assert!(fs::metadata(&image).expect("image").len() < DISK_BYTES);
    json!({"driver": "qcow2", "node-name": "disk", "file": {"driver": "file", "filename": image}})
}

#[test]
fn linked_records_are_whole_at_every_point_of_a_raw_disk() {
    every_point_holds_whole_chains("linked-raw", raw, false, 51);
}

#[test]
fn linked_records_are_whole_at_every_point_of_a_qcow2_disk() {
    every_point_holds_whole_chains("linked-qcow2", qcow2, false, 52);
}

#[test]
fn linked_records_are_whole_at_every_point_between_interruptions() {
    every_point_holds_whole_chains("linked-interrupted", raw, true, 53);
}

/// The checks above can fail: each kind of damage is seen.
#[test]
fn a_chain_with_any_damage_is_no_chain() {
    let mut bytes = vec![0; STREAM_BYTES];
    let mut last = 0;
    for index in 1..=40_u64 {
        let record = sealed(&[RECORD, 2, index, last], &[7; 99], BLOCK);
        last = checksum(&record);
        let at = (1 + (index % SLOTS) as usize) * BLOCK;
        bytes[at..at + BLOCK].copy_from_slice(&record);
    }
    bytes[..BLOCK].copy_from_slice(&sealed(&[HEADER, 2, 40, last], &[], BLOCK));
    assert_eq!(check(2, &bytes), 40);
    for index in [40, 39, 40 - WINDOW + 1] {
        let mut damaged = bytes.clone();
        damaged[(1 + (index % SLOTS) as usize) * BLOCK + 1000] ^= 1;
        assert!(std::panic::catch_unwind(|| check(2, &damaged)).is_err(), "record {index}");
    }
    let at = |ns| Written { begun_ns: ns, completed_ns: ns + 5 };
    let written = [at(10), at(20)];
    check_times(&written, 1, 20);
    assert!(std::panic::catch_unwind(|| check_times(&written, 1, 26)).is_err(), "a complete one is missing");
    assert!(std::panic::catch_unwind(|| check_times(&written, 2, 19)).is_err(), "one is from the future");
}
