//! Agent and server on one host, with a Unix socket between them.

use std::fs::{self, File};

use cdp_api::PointSpec;
use cdp_tests::load::{Busy, Load};
use cdp_tests::qemu::{Qemu, raw_file};
use cdp_tests::site::{Site, Via};

const DISK_BYTES: u64 = 16 << 20;

#[test]
fn what_went_over_a_unix_socket_is_restored_whoever_was_restarted_meanwhile() {
    let mut site = Site::start_over_unix();
    let image = site.directory().join("disk.raw");
    File::create(&image).expect("image").set_len(DISK_BYTES).expect("size");
    let qemu = Qemu::storage_daemon(&site, "beside", &[raw_file(&image)], "disk");
    let disk = site.disk(qemu.vm(), "");
    site.protect(&disk);

    let busy = Busy::start(Load::new(3, DISK_BYTES, 512, site.directory()), &qemu.nbd_url());
    busy.let_through(200);
    // A kill leaves the socket's file behind, a clean stop does not; either way agents find the next server there.
    site.server.kill();
    site.restart_server();
    busy.let_through(200);
    site.server.terminate();
    busy.let_through(200);
    site.restart_server();
    site.agent.kill();
    site.restart_agent();
    busy.let_through(200);
    busy.finish();

    let connected = site.agent.log();
    assert!(
        connected.contains("unix:") && !connected.contains(site.data()),
        "only the socket is used: {connected}"
    );
    site.wait_for_phase(&disk, cdp_api::ProtectionPhase::Protected);
    let lsn = site.bookmark(&disk, "after the load");
    let written = fs::read(&image).expect("image");
    for via in [Via::Server, Via::Store] {
        assert!(
            site.restore(&disk, &PointSpec::Lsn(lsn), via) == written,
            "{via:?}: the journal is not the disk"
        );
    }
}
