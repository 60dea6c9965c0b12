//! The restored image equals what QEMU's own `blklogwrites` filter saw the guest write, at many points, byte by byte.

use std::fs::{self, File};
use std::path::PathBuf;
use std::time::Duration;

use cdp_api::{PointSpec, ProtectionPhase};
use cdp_tests::journal::{self, is_guest_change};
use cdp_tests::load::Load;
use cdp_tests::qemu::{Qemu, raw_file, witness_above_disk};
use cdp_tests::site::{Site, Via};
use cdp_tests::witness::{self, Logged};
use journal_format::{ByteRange, Op, Record};

const DISK_BYTES: u64 = 16 << 20;

/// A QEMU program with a raw disk under a witness.
struct Witnessed {
    qemu: Qemu,
    disk: String,
    log: PathBuf,
}

type Start = fn(&Site, &str, &[serde_json::Value], &str) -> Qemu;

fn start(site: &Site, name: &str, start: Start) -> Witnessed {
    let image = site.directory().join(format!("{name}.raw"));
    File::create(&image).expect("image").set_len(DISK_BYTES).expect("size");
    let log = site.directory().join(format!("{name}.writes"));
    File::create(&log).expect("log");
    let nodes = [raw_file(&image), witness_above_disk(&log)];
    let qemu = start(site, name, &nodes, "witness");
    let disk = site.disk(qemu.vm(), "");
    Witnessed { qemu, disk, log }
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

/// A point, and what the disk then held.
struct Moment {
    lsn: u64,
    image: Vec<u8>,
}

/// `count` of the moments right after each request that both logs know, evenly spread and with the last one. The witness
/// may have begun earlier, so they are matched from the newest backwards; `image` is the disk when it began. QEMU may have
/// split one request into several below the witness.
fn moments(mut image: Vec<u8>, log: &[Logged], records: &[Record], count: usize) -> Vec<Moment> {
    let mut records = records.iter().rev();
    let mut lsns = vec![None; log.len()];
    for (request, lsn) in log.iter().zip(&mut lsns).rev() {
        let range = match request {
            Logged::Write { offset, data } => ByteRange::new(*offset, data.len() as u64),
            Logged::Discard { offset, length } => ByteRange::new(*offset, *length),
            Logged::Flush => continue,
        };
        let range = range.expect("a range");
        let Some(last) = records.next() else { break };
        *lsn = Some(last.lsn.0);
        let mut seen = piece_of(last, range);
        while seen < range.length() {
            seen += piece_of(records.next().expect("the rest of a request"), range);
        }
        assert_eq!(seen, range.length(), "the records up to LSN {} cover more than {range:?}", last.lsn);
    }
    assert!(records.next().is_none(), "the journal knows more requests than the witness");
    let known: Vec<u64> = lsns.iter().flatten().copied().collect();
    assert!(known.len() >= count, "only {} moments are comparable", known.len());
    let chosen: Vec<u64> = known.iter().rev().step_by(known.len().div_ceil(count)).copied().collect();
    let mut moments = Vec::new();
    for (request, lsn) in log.iter().zip(lsns) {
        witness::apply(&mut image, request);
        let lsn = lsn.filter(|lsn| chosen.contains(lsn));
        moments.extend(lsn.map(|lsn| Moment { lsn, image: image.clone() }));
    }
    moments
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

/// Restores at `count` points of the guest's, which have LSNs between these two, and compares with what the witness saw.
pub(crate) fn compare(
    site: &Site,
    disk: &str,
    (after, before): (u64, u64),
    image: Vec<u8>,
    log: &[Logged],
    count: usize,
) {
    let records = journal::records(&site.store(), disk);
    let guests = |r: &Record| r.lsn.0 > after && r.lsn.0 < before && is_guest_change(r);
    let records: Vec<_> = records.into_iter().filter(guests).collect();
    for (i, moment) in moments(image, log, &records, count).iter().enumerate() {
        let via = if i % 4 == 0 { Via::Server } else { Via::Store };
        let image = site.restore(disk, &PointSpec::Lsn(moment.lsn), via);
        assert_eq!(image.len(), moment.image.len(), "size at LSN {}", moment.lsn);
        let differs = image.iter().zip(&moment.image).position(|(a, b)| a != b);
        assert_eq!(differs, None, "LSN {}: first differing byte", moment.lsn);
    }
}

fn check(site: &Site, witnessed: &mut Witnessed, count: usize) {
    let last = site.bookmark(&witnessed.disk, "end");
    let records = journal::records(&site.store(), &witnessed.disk);
    let whole = records.iter().find(|r| matches!(r.op, Op::GapEnd { .. })).expect("the sync has ended").lsn;
    let (blank, log) = (vec![0; DISK_BYTES as usize], witness::read(&witnessed.log));
    compare(site, &witnessed.disk, (whole.0, last), blank, &log, count);
    witnessed.qemu.process.assert_alive();
}

#[test]
fn every_point_equals_the_witness_over_nbd() {
    let site = Site::start();
    let mut witnessed = start(&site, "nbd", Qemu::storage_daemon);
    site.protect(&witnessed.disk);
    let mut load = Load::new(1, DISK_BYTES, 512, site.directory());
    witnessed.qemu.io(&requests(&mut load, 250));
    check(&site, &mut witnessed, 40);
}

#[test]
fn every_point_equals_the_witness_through_a_device() {
    let site = Site::start();
    let mut witnessed = start(&site, "device", Qemu::system);
    site.protect(&witnessed.disk);
    let mut load = Load::new(2, DISK_BYTES, 512, site.directory());
    witnessed.qemu.io(&requests(&mut load, 200));
    check(&site, &mut witnessed, 25);
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
    let mut random = cdp_tests::random::Random::seeded(6);
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
    let mut witnessed = start(&site, "bytes", Qemu::storage_daemon);
    site.protect(&witnessed.disk);
    let mut load = Load::new(4, DISK_BYTES, 1, site.directory());
    witnessed.qemu.io(&requests(&mut load, 120));
    check(&site, &mut witnessed, 20);
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
        let mut random = cdp_tests::random::Random::of(round);
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
