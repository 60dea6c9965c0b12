//! Nobody who looks at QEMU sees the filter, and with nothing protected it is not there.

use std::fs::File;

use cdp_tests::procfs::pointers_into_filter;
use cdp_tests::qemu::{Qemu, raw_file};
use cdp_tests::site::Site;

fn start(site: &Site, start: fn(&Site, &str, &[serde_json::Value], &str) -> Qemu) -> (Qemu, String) {
    let image = site.directory().join("disk.raw");
    File::create(&image).expect("image").set_len(4 << 20).expect("size");
    let qemu = start(site, "unseen", &[raw_file(&image)], "disk");
    let disk = site.disk(qemu.vm(), "");
    (qemu, disk)
}

fn tables_are_qemus_own_while_off(start_qemu: fn(&Site, &str, &[serde_json::Value], &str) -> Qemu) {
    let site = Site::start();
    let (mut qemu, disk) = start(&site, start_qemu);
    let pid = qemu.process.pid();
    qemu.io(&["write -P 1 0 64k", "flush"]);
    assert_eq!(pointers_into_filter(pid), 0, "before it was ever protected");
    for _ in 0..2 {
        site.protect(&disk);
        assert_ne!(pointers_into_filter(pid), 0, "while protected");
        qemu.io(&["write -P 2 0 64k", "write -z 64k 64k", "discard 128k 64k", "flush"]);
        site.unprotect(&disk);
        assert_eq!(pointers_into_filter(pid), 0, "after it was protected");
    }
}

#[test]
fn with_protection_off_a_storage_daemon_has_its_own_functions() {
    tables_are_qemus_own_while_off(Qemu::storage_daemon);
}

#[test]
fn with_protection_off_a_machine_has_its_own_functions() {
    tables_are_qemus_own_while_off(Qemu::system);
}

#[test]
fn the_block_graph_is_the_same_with_protection() {
    for start_qemu in [Qemu::storage_daemon, Qemu::system] {
        let site = Site::start();
        let (mut qemu, disk) = start(&site, start_qemu);
        qemu.io(&["write -P 1 0 64k", "flush"]);
        let before = qemu.block_graph();
        site.protect(&disk);
        assert_eq!(qemu.block_graph(), before, "while protected");
        site.unprotect(&disk);
        assert_eq!(qemu.block_graph(), before, "after it was protected");
    }
}
