//! Programs that go away and come back.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::PathBuf;

use cdp_api::{PointSpec, ProtectionPhase};
use cdp_tests::load::{Busy, Load};
use cdp_tests::nbd::{Command, Nbd};
use cdp_tests::qemu::{Qemu, raw_file};
use cdp_tests::site::{Site, Via};
use cdp_tests::wait_for;

const DISK_BYTES: u64 = 8 << 20;

struct Protected {
    qemu: Qemu,
    disk: String,
    image: PathBuf,
}

fn protected(site: &Site, name: &str) -> Protected {
    let image = site.directory().join("disk.raw");
    File::create(&image).expect("image").set_len(DISK_BYTES).expect("size");
    let qemu = Qemu::storage_daemon(site, name, &[raw_file(&image)], "disk");
    let disk = site.disk(qemu.vm(), "");
    site.protect(&disk);
    Protected { qemu, disk, image }
}

fn busy(site: &Site, qemu: &Qemu, seed: u64) -> Busy {
    Busy::start(Load::new(seed, DISK_BYTES, 512, site.directory()), &qemu.nbd_url())
}

fn let_through(busy: &Busy, requests: u64) {
    let goal = busy.sent() + requests;
    wait_for("requests under way", || (busy.sent() >= goal).then_some(()));
}

fn assert_restores_the_disk(site: &Site, protected: &Protected, name: &str) {
    let lsn = site.bookmark(&protected.disk, name);
    let restored = site.restore(&protected.disk, &PointSpec::Lsn(lsn), Via::Server);
    let disk = fs::read(&protected.image).expect("image");
    let differs = restored.iter().zip(&disk).position(|(a, b)| a != b);
    assert_eq!((restored.len(), differs), (disk.len(), None), "{name}: size, first differing byte");
}

#[test]
fn a_server_that_dies_under_load_costs_no_history() {
    let mut site = Site::start();
    let protected = protected(&site, "reconnect");
    let gaps = site.points(&protected.disk).gaps;
    let load = busy(&site, &protected.qemu, 30);
    for _ in 0..3 {
        let_through(&load, 100);
        site.server.kill();
        let_through(&load, 100);
        site.restart_server();
    }
    let_through(&load, 100);
    load.finish();
    wait_for("the agent to be back", || {
        let phase = site.client().disk(&protected.disk).expect("disk").summary.protection.phase;
        (phase == ProtectionPhase::Protected).then_some(())
    });
    assert_restores_the_disk(&site, &protected, "after the restarts");
    assert_eq!(site.points(&protected.disk).gaps, gaps, "no new gap");
}

#[test]
fn a_stopped_server_and_a_running_one_restore_the_same() {
    let mut site = Site::start();
    let mut protected = protected(&site, "offline");
    protected.qemu.io(&["write -P 1 0 1M", "flush", "write -P 2 512k 1M", "write -z 100k 4k", "flush"]);
    let last = site.bookmark(&protected.disk, "end");
    let first = site.points(&protected.disk).recoverable.last().expect("a range").from_lsn;
    let points: Vec<_> =
        (first..=last).map(PointSpec::Lsn).chain([PointSpec::Bookmark("end".into())]).collect();
    let through_server: Vec<_> =
        points.iter().map(|at| site.restore(&protected.disk, at, Via::Server)).collect();
    site.server.terminate();
    for (at, expected) in points.iter().zip(through_server) {
        // Without a server the disk still has its name.
        for name in [protected.disk.clone(), site_name(&protected)] {
            assert!(site.restore(&name, at, Via::Store) == expected, "{at} of {name} differs");
        }
    }
}

fn site_name(protected: &Protected) -> String {
    format!("{}/disk", protected.qemu.vm())
}

#[test]
fn a_point_in_the_first_gap_is_refused_with_the_next_good_one() {
    let site = Site::start();
    let protected = protected(&site, "refused");
    for via in [Via::Server, Via::Store] {
        let (path, output) = site.try_restore(&protected.disk, "lsn:1", via);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(3), "{via:?}: {said}");
        assert!(said.contains("nearest point after"), "{via:?}: {said}");
        assert!(!path.exists(), "{via:?}: an image was left");
    }
}

#[test]
fn an_agent_that_dies_under_load_harms_no_guest() {
    let mut site = Site::start();
    let protected = protected(&site, "agentless");
    let load = busy(&site, &protected.qemu, 31);
    let_through(&load, 100);
    site.agent.kill();
    let_through(&load, 200);
    site.restart_agent();
    site.wait_for_phase(&protected.disk, ProtectionPhase::Protected);
    let_through(&load, 100);
    load.finish();
    assert_restores_the_disk(&site, &protected, "after the agent came back");
}

/// Every write that was acknowledged before QEMU was killed is in the newest point, wherever QEMU stood.
#[test]
fn what_was_acknowledged_before_qemu_was_killed_is_in_the_newest_point() {
    let site = Site::start();
    let mut random = cdp_tests::random::Random::seeded(40);
    for round in 0..8 {
        let mut protected = protected(&site, &format!("victim-{round}"));
        let mut guest = Nbd::connect(protected.qemu.nbd_socket(), "disk");
        let (writes, mut sent, mut acknowledged) = (random.within(20..300), BTreeMap::new(), Vec::new());
        while acknowledged.len() < writes as usize {
            // Eight in flight, each in a place of its own.
            while guest.in_flight() < 8 {
                let block = sent.len() as u64;
                let data = vec![random.within(1..256) as u8; 4096];
                let id = guest.send(&Command::Write { offset: block * 4096, data: data.clone(), fua: false });
                sent.insert(id, (block, data));
            }
            acknowledged.push(guest.wait());
        }
        protected.qemu.process.kill();
        wait_for("the end of the capture", || {
            let log = site.agent.log();
            log.lines()
                .any(|line| line.contains("capture closed") && line.contains(&protected.disk))
                .then_some(())
        });
        let image = site.restore(&protected.disk, &PointSpec::Latest, Via::Server);
        for id in &acknowledged {
            let (block, data) = &sent[id];
            let at = (block * 4096) as usize;
            assert!(
                image[at..at + 4096] == *data,
                "round {round}: block {block} was acknowledged and is not in the newest point"
            );
        }
    }
}
