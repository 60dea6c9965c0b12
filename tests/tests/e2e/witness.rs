//! The restored image equals what QEMU's own `blklogwrites` filter saw the guest write, at many points, byte by byte.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::PathBuf;
use std::time::Duration;

use cdp_api::{Gap, PointSpec, ProtectionPhase};
use cdp_tests::journal::{self, is_guest_change};
use cdp_tests::load::Load;
use cdp_tests::qemu::{Qemu, create_qcow2, qcow2_file, raw_file, witness_above_disk};
use cdp_tests::random::Random;
use cdp_tests::site::{Site, Via};
use cdp_tests::wait_for;
use cdp_tests::witness::{self, Logged};
use journal_format::{ByteRange, Op, Record};
use serde_json::Value;

const DISK_BYTES: u64 = 16 << 20;

/// A QEMU program with a disk under a witness.
struct Witnessed {
    qemu: Qemu,
    disk: String,
    log: PathBuf,
    /// What the disk discards, in bytes.
    unit: u64,
}

type Start = fn(&Site, &str, &[Value], &str) -> Qemu;

/// On a raw file.
fn start(site: &Site, name: &str, start: Start) -> Witnessed {
    let image = site.directory().join(format!("{name}.raw"));
    File::create(&image).expect("image").set_len(DISK_BYTES).expect("size");
    start_on(site, name, start, raw_file(&image), 1)
}

/// On a qcow2 image, which takes zeroes and discards in clusters of 64 KiB.
fn start_on_qcow2(site: &Site, name: &str, start: Start) -> Witnessed {
    let image = site.directory().join(format!("{name}.qcow2"));
    create_qcow2(&image, DISK_BYTES);
    start_on(site, name, start, qcow2_file(&image), 64 << 10)
}

fn start_on(site: &Site, name: &str, start: Start, disk: Value, unit: u64) -> Witnessed {
    let log = site.directory().join(format!("{name}.writes"));
    File::create(&log).expect("log");
    let nodes = [disk, witness_above_disk(&log)];
    let qemu = start(site, name, &nodes, "witness");
    let disk = site.disk(qemu.vm(), "");
    Witnessed { qemu, disk, log, unit }
}

/// Random requests, as commands.
pub(crate) fn requests(load: &mut Load, count: usize) -> Vec<String> {
    (0..count)
        .map(|_| {
            let request = load.next_request();
            load.command(&request)
        })
        .collect()
}

/// What a driver makes of a discard: only whole units of this many bytes (clusters of qcow2).
fn discarded(range: ByteRange, unit: u64) -> ByteRange {
    let (start, end) = (range.offset().next_multiple_of(unit), range.end() / unit * unit);
    ByteRange::new(start, end.saturating_sub(start)).expect("a range")
}

/// The log as the disk saw it: its changes, and what each covers.
fn changes(log: &[Logged], unit: u64) -> Vec<(ByteRange, Logged)> {
    let change = |request: &Logged| match request {
        Logged::Write { offset, data } => {
            Some((ByteRange::new(*offset, data.len() as u64).expect("a range"), request.clone()))
        }
        Logged::Discard { offset, length } => {
            let range = discarded(ByteRange::new(*offset, *length).expect("a range"), unit);
            let request = Logged::Discard { offset: range.offset(), length: range.length() };
            (!range.is_empty()).then_some((range, request))
        }
        Logged::Flush => None,
    };
    log.iter().filter_map(change).collect()
}

/// Every point that is offered between two LSNs, and how many of the log's requests the disk then had.
///
/// The witness may have begun earlier than the journal, so requests and records are matched from the newest backwards.
/// A request is one record. It may be several only where no point is offered between them: in a gap.
fn offered(
    changes: &[(ByteRange, Logged)],
    records: &[Record],
    (after, before): (u64, u64),
) -> Vec<(u64, usize)> {
    let mut offered = Vec::new();
    let mut gap = None;
    for record in records {
        match record.op {
            Op::GapBegin { generation, .. } => gap = Some(generation),
            Op::GapEnd { generation } => gap = gap.filter(|open| *open > generation),
            _ => {}
        }
        if gap.is_none() && record.lsn.0 > after && record.lsn.0 < before {
            offered.push(record.lsn.0);
        }
    }
    // How many requests the disk has at the records from this one on.
    let mut counts: Vec<(u64, usize)> = Vec::new();
    let guests = records.iter().filter(|r| r.lsn.0 > after && r.lsn.0 < before && is_guest_change(r));
    let mut guests = guests.rev();
    for (index, (range, _)) in changes.iter().enumerate().rev() {
        let Some(last) = guests.next() else { break };
        let (mut first, mut seen) = (last.lsn.0, piece_of(last, *range));
        while seen < range.length() {
            let piece = guests.next().expect("the rest of a request");
            (first, seen) = (piece.lsn.0, seen + piece_of(piece, *range));
        }
        assert_eq!(seen, range.length(), "the records up to LSN {} cover more than {range:?}", last.lsn);
        let within = offered.iter().find(|lsn| (first..last.lsn.0).contains(*lsn));
        assert_eq!(within, None, "this point has a part of the request {range:?}");
        counts.push((last.lsn.0, index + 1));
    }
    assert!(guests.next().is_none(), "the journal knows more requests than the witness");
    let count = |lsn: &u64| counts.iter().find(|(last, _)| last <= lsn).map(|(_, count)| (*lsn, *count));
    offered.iter().filter_map(count).collect()
}

/// How many bytes of `range` a record changes; it must not change anything else.
fn piece_of(record: &Record, range: ByteRange) -> u64 {
    let piece = match record.op {
        Op::Write { range, .. } | Op::Zero { range, .. } | Op::Discard { range } => range,
        _ => panic!("not a change of the guest: {record:?}"),
    };
    assert_eq!(
        piece.intersection(range),
        Some(piece),
        "LSN {} is no part of the request {range:?}",
        record.lsn
    );
    piece.length()
}

/// Every point that is offered between two LSNs has whole requests of the witness's log, `image` being the disk when
/// the log begins; `count` of them, evenly spread, are restored and compared with its bytes (all, if they are fewer).
pub(crate) fn compare(
    site: &Site,
    disk: &str,
    between: (u64, u64),
    mut image: Vec<u8>,
    log: &[Logged],
    (unit, count): (u64, usize),
) {
    let changes = changes(log, unit);
    let records = journal::records(&site.store(), disk);
    let points = offered(&changes, &records, between);
    let done: BTreeSet<_> = points.iter().map(|(_, done)| *done).collect();
    assert!(done.len() >= count.min(changes.len()), "only {} of the log's states are points", done.len());
    let chosen: Vec<_> = points.iter().rev().step_by((points.len() / count).max(1)).rev().collect();
    let mut applied = 0;
    for (i, (lsn, done)) in chosen.into_iter().enumerate() {
        for (_, request) in &changes[applied..*done] {
            witness::apply(&mut image, request);
        }
        applied = *done;
        let via = if i % 4 == 0 { Via::Server } else { Via::Store };
        let restored = site.restore(disk, &PointSpec::Lsn(*lsn), via);
        assert_eq!(restored.len(), image.len(), "size at LSN {lsn}");
        let differs = restored.iter().zip(&image).position(|(a, b)| a != b);
        assert_eq!(differs, None, "LSN {lsn}: first differing byte");
    }
}

fn check(site: &Site, witnessed: &mut Witnessed, count: usize) {
    let last = site.bookmark(&witnessed.disk, "end");
    let records = journal::records(&site.store(), &witnessed.disk);
    let whole = records.iter().find(|r| matches!(r.op, Op::GapEnd { .. })).expect("the sync has ended").lsn;
    let (blank, log) = (vec![0; DISK_BYTES as usize], witness::read(&witnessed.log));
    let between = (whole.0, last);
    compare(site, &witnessed.disk, between, blank, &log, (witnessed.unit, count));
    witnessed.qemu.process.assert_alive();
}

/// Requests of the load with that seed, in units of that many bytes; then `count` points are compared.
fn loaded_points_equal(
    site: &Site,
    mut witnessed: Witnessed,
    (seed, unit): (u64, u64),
    (commands, count): (usize, usize),
) {
    site.protect(&witnessed.disk);
    let mut load = Load::new(seed, DISK_BYTES, unit, site.directory());
    witnessed.qemu.io(&requests(&mut load, commands));
    check(site, &mut witnessed, count);
}

#[test]
fn every_point_equals_the_witness_over_nbd() {
    let site = Site::start();
    let witnessed = start(&site, "nbd", Qemu::storage_daemon);
    loaded_points_equal(&site, witnessed, (1, 512), (250, 40));
}

#[test]
fn every_point_equals_the_witness_through_a_device() {
    let site = Site::start();
    let witnessed = start(&site, "device", Qemu::system);
    loaded_points_equal(&site, witnessed, (2, 512), (200, 25));
}

#[test]
fn every_point_equals_the_witness_when_protection_comes_late() {
    let site = Site::start();
    let mut witnessed = start(&site, "late", Qemu::storage_daemon);
    let mut load = Load::new(3, DISK_BYTES, 512, site.directory());
    witnessed.qemu.io(&requests(&mut load, 100));
    site.protect(&witnessed.disk);
    witnessed.qemu.io(&requests(&mut load, 150));
    check(&site, &mut witnessed, 25);
}

#[test]
fn agents_killed_under_load_leave_no_gap_and_every_point_equals_the_witness() {
    let mut site = Site::start();
    let mut witnessed = start(&site, "killed", Qemu::storage_daemon);
    site.protect(&witnessed.disk);
    let gaps = site.points(&witnessed.disk).gaps;
    let mut load = Load::new(5, DISK_BYTES, 512, site.directory());
    let mut random = Random::seeded(6);
    for _ in 0..10 {
        let commands = requests(&mut load, 30);
        let pause = Duration::from_millis(random.within(0..60));
        std::thread::scope(|scope| {
            let qemu = &mut witnessed.qemu;
            scope.spawn(move || qemu.io(&commands));
            std::thread::sleep(pause);
            site.agent.kill();
            site.restart_agent();
        });
    }
    site.wait_for_phase(&witnessed.disk, ProtectionPhase::Protected);
    check(&site, &mut witnessed, 40);
    assert_eq!(site.points(&witnessed.disk).gaps, gaps, "no new gap");
}

#[test]
fn requests_of_any_byte_length_equal_the_witness() {
    let site = Site::start();
    let witnessed = start(&site, "bytes", Qemu::storage_daemon);
    loaded_points_equal(&site, witnessed, (4, 1), (120, 20));
}

/// Zeroes and discards that begin and end anywhere in a cluster, many at once with plain writes between them, none of
/// which overlaps another: so what is told first is the log's order, too. All points are looked at, `count` restored.
fn every_point_of_requests_in_parts(site: &Site, witnessed: &mut Witnessed, seed: u64, count: usize) {
    const SLICE_SECTORS: u64 = DISK_BYTES / 16 / 512;
    site.protect(&witnessed.disk);
    let mut random = Random::seeded(seed);
    let before = site.points(&witnessed.disk).gaps.len();
    let (client, disk) = (site.client(), witnessed.disk.clone());
    let gaps = || client.points(&disk).expect("points").gaps.split_off(before);
    for round in 0..4 {
        let mut commands = Vec::new();
        for slice in 0..16 {
            // A slice of the disk for each, from 1 KiB to all of it.
            let sectors = random.within(2..SLICE_SECTORS + 1);
            let first = random.within(0..SLICE_SECTORS - sectors + 1);
            let (offset, length) = ((slice * SLICE_SECTORS + first) << 9, sectors << 9);
            commands.push(match random.within(0..8) {
                0..3 => format!("aio_write -z -q {offset} {length}"),
                3 => format!("aio_write -z -u -q {offset} {length}"),
                4 => format!("discard -q {offset} {length}"),
                _ => format!("aio_write -q -P {} {offset} {length}", random.within(1..256)),
            });
        }
        for index in 0..commands.len() {
            commands.swap(index, random.within(index as u64..16) as usize);
        }
        commands.push("aio_flush".to_owned());
        witnessed.qemu.io(&commands);
        if round % 2 == 1 {
            // More than a record can hold. The point after it is the end of its gap.
            let offset = random.within(0..20_000) << 9;
            witnessed.qemu.io(&[format!("write -q -P {} {offset} 5M", round + 1)]);
            let ended =
                |gaps: &Vec<Gap>| gaps.len() == round / 2 + 1 && gaps.iter().all(|gap| gap.to_lsn.is_some());
            let gaps = wait_for("the end of its gap", || Some(gaps()).filter(ended));
            assert!(gaps.iter().all(|gap| gap.reason == "large-request"), "{gaps:?}");
        }
    }
    check(site, witnessed, count);
    let gaps = site.points(&witnessed.disk).gaps.split_off(before);
    assert_eq!(gaps.len(), 2, "one for each write that is longer than a record: {gaps:?}");
}

#[test]
fn every_point_of_requests_in_parts_equals_the_witness_on_qcow2() {
    let site = Site::start();
    let mut witnessed = start_on_qcow2(&site, "parts-qcow2", Qemu::storage_daemon);
    every_point_of_requests_in_parts(&site, &mut witnessed, 21, usize::MAX);
}

#[test]
fn every_point_of_requests_in_parts_equals_the_witness_on_raw() {
    let site = Site::start();
    let mut witnessed = start(&site, "parts-raw", Qemu::storage_daemon);
    every_point_of_requests_in_parts(&site, &mut witnessed, 22, 25);
}

#[test]
fn every_point_equals_the_witness_through_a_device_on_qcow2() {
    let site = Site::start();
    let witnessed = start_on_qcow2(&site, "device-qcow2", Qemu::system);
    loaded_points_equal(&site, witnessed, (7, 512), (200, 40));
}

#[test]
fn overlapping_requests_in_flight_leave_the_journal_equal_to_the_disk() {
    let site = Site::start();
    let image = site.directory().join("overlap.raw");
    File::create(&image).expect("image").set_len(2 << 20).expect("size");
    let mut qemu = Qemu::storage_daemon(&site, "overlap", &[raw_file(&image)], "disk");
    let disk = site.disk(qemu.vm(), "");
    site.protect(&disk);
    for round in 0..10 {
        // All in flight at once, on the same 256 KiB.
        let mut random = Random::of(round);
        let mut commands: Vec<_> = (0..60)
            .map(|_| {
                let (offset, length) = (random.within(0..256) << 10, (random.within(0..128) + 1) << 9);
                format!("aio_write -q -P {} {offset} {length}", random.within(1..256))
            })
            .collect();
        commands.push("aio_flush".to_owned());
        qemu.io(&commands);
        let lsn = site.bookmark(&disk, &format!("round {round}"));
        let restored = site.restore(&disk, &PointSpec::Lsn(lsn), Via::Server);
        assert!(
            restored == fs::read(&image).expect("image"),
            "round {round}: the journal differs from the disk"
        );
    }
}
