//! A guest that changes the buffers of its writes while they are in flight. Whatever reaches the disk, the journal must hold
//! the same, and in the same order where the writes overlap as well.

use std::fs::{self, File};
use std::sync::atomic::{AtomicBool, Ordering};

use cdp_api::PointSpec;
use cdp_tests::qemu::{Qemu, raw_file};
use cdp_tests::random::Random;
use cdp_tests::site::{Site, Via};
use cdp_tests::vhost::{BUFFER_BYTES, Memory, SLOTS, VhostBlk};
use serde_json::json;

use super::{History, guest_changes, read, scaled};

const DISK_BYTES: u64 = 1 << 20;

/// Scribbles over all buffers until `done` says so; returns how often.
fn scribble(memory: &Memory, seed: u64, done: &AtomicBool) -> u64 {
    let mut random = Random::of(seed);
    let mut scribbles = 0;
    // ORDERING: Relaxed; the flag stands alone.
    while !done.load(Ordering::Relaxed) {
        let byte = random.next_u64() as u8;
        for slot in 0..SLOTS {
            memory.fill(slot, &[byte; BUFFER_BYTES]);
        }
        scribbles += 1;
    }
    scribbles
}

/// Submits `SLOTS` overlapping writes at once and waits for them.
fn round(disk: &mut VhostBlk, random: &mut Random) {
    for slot in 0..SLOTS {
        let length = random.within(1..BUFFER_BYTES as u64 / 512 + 1) * 512;
        let offset = random.within(0..(DISK_BYTES - length) / 512 + 1) * 512;
        disk.submit(slot, offset, length as usize);
    }
    disk.kick();
    disk.wait_all();
}

#[test]
fn buffers_changed_in_flight_leave_the_journal_equal_to_the_disk() {
    let mut random = Random::seeded(91);
    let site = Site::start();
    let image = site.directory().join("disk.raw");
    File::create(&image).expect("image").set_len(DISK_BYTES).expect("size");
    let socket = site.directory().join("vhost");
    let address = json!({"type": "unix", "path": socket});
    let export =
        json!({"type": "vhost-user-blk", "id": "e", "node-name": "disk", "writable": true, "addr": address});
    let qemu = Qemu::storage_daemon_with(&site, "vhost", &[raw_file(&image)], &[], &[export]);
    let mut guest = VhostBlk::connect(&socket);
    let disk = site.disk(qemu.vm(), "");
    site.protect(&disk);

    let rounds = scaled(100);
    let done = AtomicBool::new(false);
    let scribbled = guest.memory().shared();
    let (disk_after, scribbles) = std::thread::scope(|scope| {
        let scribbler = scope.spawn(|| scribble(&scribbled, 91, &done));
        let round = |_| {
            round(&mut guest, &mut random);
            fs::read(&image).expect("the disk")
        };
        let disk_after: Vec<_> = (0..rounds).map(round).collect();
        // ORDERING: Relaxed; the flag stands alone.
        done.store(true, Ordering::Relaxed);
        (disk_after, scribbler.join().expect("the scribbler"))
    });
    let last = site.bookmark(&disk, "end");

    let history = History::open(&site.store(), &disk);
    let records = guest_changes(&history);
    assert_eq!(records.len(), rounds * SLOTS, "one record for each request");
    for (round, (records, disk)) in records.chunks(SLOTS).zip(&disk_after).enumerate() {
        let restored = read(&history.view(records[SLOTS - 1].lsn), 0, disk.len());
        let differs = restored.iter().zip(disk).position(|(a, b)| a != b);
        assert_eq!(differs, None, "round {round}: first byte in which journal and disk differ");
    }
    let restored = site.restore(&disk, &PointSpec::Lsn(last), Via::Server);
    assert!(restored == fs::read(&image).expect("the disk"), "the restored image differs from the disk");
    println!(
        "{rounds} rounds of {SLOTS} writes equal the disk; their buffers were overwritten {scribbles} times"
    );
}
