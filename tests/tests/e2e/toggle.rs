//! Switching protection on and off, again and again, under load.

use std::fs::{self, File};

use cdp_api::PointSpec;
use cdp_tests::load::{Busy, Load};
use cdp_tests::procfs::{Holdings, holdings};
use cdp_tests::qemu::{Qemu, raw_file};
use cdp_tests::site::{Site, Via};
use cdp_tests::wait_for;

const DISK_BYTES: u64 = 4 << 20;
const TOGGLES: usize = 100;
/// Toggles before the first measurement: caches, pools and the allocator's arenas have then been filled.
const WARM_UP: usize = 10;
/// How much private memory may differ between two measurements without meaning a leak. A leak of one mapped ring
/// structure per toggle (64 KiB of touched slots and more) would show as several times this after 90 toggles.
const SLACK_BYTES: u64 = 8 << 20;

/// Toggles `count` times while requests flow; each time some are let through in either state.
fn toggle(site: &Site, disk: &str, busy: &Busy, count: usize) {
    for _ in 0..count {
        site.switch(disk, true);
        busy.let_through(20);
        site.switch(disk, false);
        busy.let_through(20);
    }
}

/// Threads and descriptors are waited for: QEMU's worker threads live on for some seconds, and connections close when
/// the other side gets to it.
fn assert_no_leak(what: &str, pid: u32, before: Holdings) {
    let after = wait_for(&format!("{what} to hold no more than {before:?}"), || {
        let now = holdings(pid);
        (now.threads <= before.threads && now.fds <= before.fds).then_some(now)
    });
    // The allocator may keep a mapping or two more; a leaked one per toggle would be 90.
    assert!(after.mappings < before.mappings + 20, "{what}: mappings {before:?} → {after:?}");
    assert!(
        after.private_bytes < before.private_bytes + SLACK_BYTES,
        "{what}: memory {before:?} → {after:?}"
    );
}

#[test]
fn a_hundred_toggles_under_load_fail_nothing_and_leak_nothing() {
    let site = Site::start();
    let image = site.directory().join("disk.raw");
    File::create(&image).expect("image").set_len(DISK_BYTES).expect("size");
    let mut qemu = Qemu::storage_daemon(&site, "toggled", &[raw_file(&image)], "disk");
    let disk = site.disk(qemu.vm(), "");

    let pids = [qemu.process.pid(), site.agent.pid()];
    let load = |seed, toggles| {
        let busy = Busy::start(Load::new(seed, DISK_BYTES, 512, site.directory()), &qemu.nbd_url());
        toggle(&site, &disk, &busy, toggles);
        busy.finish();
        site.unprotect(&disk);
    };
    load(10, WARM_UP);
    let before = pids.map(holdings);
    load(11, TOGGLES - WARM_UP);
    assert_no_leak("QEMU", pids[0], before[0]);
    assert_no_leak("agent", pids[1], before[1]);

    // It still protects.
    site.protect(&disk);
    qemu.io(&["write -P 42 1M 64k"]);
    let lsn = site.bookmark(&disk, "after the toggles");
    let restored = site.restore(&disk, &PointSpec::Lsn(lsn), Via::Server);
    assert!(restored == fs::read(&image).expect("image"), "the journal differs from the disk");
}
