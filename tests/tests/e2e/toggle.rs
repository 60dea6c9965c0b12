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
/// Toggles before the first measurement: caches, pools and most of the allocator's arenas have then been filled.
const WARM_UP: usize = 30;
/// How many mappings may come without meaning a leak: one leaked per toggle would be twice this. QEMU's worker threads
/// come and go, each new one may bring a stack and an arena of the allocator that stay (up to 18 were seen, ever more
/// slowly over thousands of toggles).
const SLACK_MAPPINGS: usize = TOGGLES / 2;
/// How much memory may come without meaning a leak: half of what the smallest thing that a toggle makes would be, were
/// it leaked each time (64 KiB of touched slots). Arenas still grow by up to 1.5 MiB.
const SLACK_BYTES: u64 = (TOGGLES as u64 / 2) << 16;

/// Toggles `count` times while requests flow; each time some are let through in either state.
fn toggle(site: &Site, disk: &str, busy: &Busy, count: usize) {
    for _ in 0..count {
        site.switch(disk, true);
        busy.let_through(20);
        site.switch(disk, false);
        busy.let_through(20);
    }
}

/// This is waited for: QEMU's worker threads live on for some seconds, and connections close when the other side gets to
/// it.
fn assert_no_leak(what: &str, pid: u32, before: Holdings) {
    let holds_no_more = |now: &Holdings| {
        now.threads <= before.threads
            && now.fds <= before.fds
            && now.mappings < before.mappings + SLACK_MAPPINGS
            && now.dirty_bytes < before.dirty_bytes + SLACK_BYTES
    };
    let mut last = None;
    wait_for(&format!("{what} to hold hardly more than {before:?}"), || {
        let now = holdings(pid);
        if last.replace(now) != Some(now) {
            eprintln!("{what} holds {now:?}");
        }
        holds_no_more(&now).then_some(())
    });
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
    load(11, TOGGLES);
    assert_no_leak("QEMU", pids[0], before[0]);
    assert_no_leak("agent", pids[1], before[1]);

    // It still protects.
    site.protect(&disk);
    qemu.io(&["write -P 42 1M 64k"]);
    let lsn = site.bookmark(&disk, "after the toggles");
    let restored = site.restore(&disk, &PointSpec::Lsn(lsn), Via::Server);
    assert!(restored == fs::read(&image).expect("image"), "the journal differs from the disk");
}
