//! Two QEMUs that say they are the same VM: a clone that kept its UUID, on another host or on the same one. One of them has
//! the disk, and its history is that disk's alone; the other one waits, and everybody can see why.

use std::fs;
use std::path::{Path, PathBuf};

use cdp_api::{Conflict, PointSpec, ProtectionPhase};
use cdp_tests::host::Host;
use cdp_tests::network::Weather;
use cdp_tests::qemu::{Qemu, raw_file};
use cdp_tests::site::{Site, Via};
use cdp_tests::wait_for;
use serde_json::json;

const UUID: &str = "6f9619ff-8b86-d011-b42d-00c04fc964ff";
const DISK_BYTES: usize = 4 << 20;

/// An image with contents of its own.
fn image(site: &Site, name: &str, fill: u8) -> PathBuf {
    let path = site.directory().join(format!("{name}.raw"));
    fs::write(&path, vec![fill; DISK_BYTES]).expect("image");
    path
}

fn conflicts(site: &Site, disk: &str) -> Vec<Conflict> {
    site.client().disk(disk).expect("disk").summary.conflicts
}

fn wait_for_conflict(site: &Site, disk: &str, said: &str) -> Conflict {
    wait_for(&format!("a conflict that says '{said}'"), || {
        conflicts(site, disk).into_iter().find(|other| other.reason.contains(said))
    })
}

/// Waits until the disk is protected as that VM's.
fn wait_for_owner(site: &Site, disk: &str, vm: &str) {
    wait_for(&format!("{vm} to have the disk and be protected"), || {
        let summary = site.client().disk(disk).expect("disk").summary;
        (summary.vm == vm && summary.protection.phase == ProtectionPhase::Protected).then_some(())
    });
}

fn assert_history_is(site: &Site, disk: &str, image: &Path, name: &str) {
    let lsn = site.bookmark(disk, name);
    let restored = site.restore(disk, &PointSpec::Lsn(lsn), Via::Server);
    let contents = fs::read(image).expect("image");
    let differs = restored.iter().zip(&contents).position(|(a, b)| a != b);
    assert_eq!((restored.len(), differs), (contents.len(), None), "{name}: size, first differing byte");
}

fn said(log: &str, what: &str) -> usize {
    log.lines().filter(|line| line.contains("WARN") && line.contains(what)).count()
}

#[test]
fn a_clone_on_another_host_waits_until_the_first_has_ended_and_its_other_disks_go_on() {
    let site = Site::start();
    let second = Host::start(&site, "hostb");
    let (first_image, clone_image) = (image(&site, "first", 1), image(&site, "clone", 2));
    let other_image = image(&site, "other", 3);
    let mut first = Qemu::storage_daemon_as(&site, &site.agent_socket(), "first", UUID, &first_image);
    let disk = site.disk("first", "");
    site.protect(&disk);
    let socket = second.agent_socket();
    let other_uuid = UUID.replace('6', "7");
    let mut other = Qemu::storage_daemon_as(&site, socket, "other", &other_uuid, &other_image);
    let other_disk = site.disk("other", "");
    site.protect(&other_disk);
    let gaps = |disk: &str| site.points(disk).gaps;
    let (gaps_before, other_gaps) = (gaps(&disk), gaps(&other_disk));

    let mut clone = Qemu::storage_daemon_as(&site, socket, "clone", UUID, &clone_image);
    let conflict = wait_for_conflict(&site, &disk, "has this disk");
    assert_eq!((conflict.host.as_str(), conflict.vm.as_str()), ("hostb", "clone"));
    assert_eq!(conflict.vm_pid, clone.process.pid());
    for round in 0..3 {
        first.io(&[format!("write -P {} {round}M 64k", 10 + round), "flush".to_owned()]);
        clone.io(&[format!("write -P {} {round}M 128k", 20 + round), "flush".to_owned()]);
        other.io(&[format!("write -P {} {round}M 256k", 30 + round), "flush".to_owned()]);
        assert_history_is(&site, &disk, &first_image, &format!("first{round}"));
        assert_history_is(&site, &other_disk, &other_image, &format!("other{round}"));
    }
    assert_eq!((gaps(&disk), gaps(&other_disk)), (gaps_before, other_gaps), "no connection was closed");
    assert_eq!(said(&second.agent.log(), "the server does not take this disk"), 1, "once, not at every try");
    assert_eq!(said(&site.server.log(), "claims this disk"), 1);

    first.process.terminate();
    wait_for_owner(&site, &disk, "clone");
    assert_eq!(conflicts(&site, &disk), []);
    clone.io(&["write -P 99 3M 4k", "flush"]);
    assert_history_is(&site, &disk, &clone_image, "clone");
}

#[test]
fn an_owner_whose_host_fell_silent_is_replaced_and_does_not_come_between_when_it_is_back() {
    let site = Site::start_with_server(&["--agent-timeout-s", "12"]);
    let lost = Host::start(&site, "lost");
    let (lost_image, heir_image) = (image(&site, "lost", 1), image(&site, "heir", 2));
    let mut owner = Qemu::storage_daemon_as(&site, lost.agent_socket(), "owner", UUID, &lost_image);
    let disk = site.disk("owner", "");
    site.protect(&disk);
    let mut heir = Qemu::storage_daemon_as(&site, &site.agent_socket(), "heir", UUID, &heir_image);
    wait_for_conflict(&site, &disk, "host lost");
    owner.io(&["write -P 5 1M 64k", "flush"]);
    assert_history_is(&site, &disk, &lost_image, "before");

    lost.network().set(Weather::Stalled);
    owner.io(&["write -P 6 2M 64k", "flush"]);
    wait_for_owner(&site, &disk, "heir");
    heir.io(&["write -P 7 1M 32k", "flush"]);
    assert_history_is(&site, &disk, &heir_image, "heir");

    lost.network().set(Weather::Clear);
    let conflict = wait_for_conflict(&site, &disk, "has this disk");
    assert_eq!((conflict.host.as_str(), conflict.vm.as_str()), ("lost", "owner"));
    owner.io(&["write -P 8 3M 64k", "flush"]);
    heir.io(&["write -P 9 2M 32k", "flush"]);
    assert_history_is(&site, &disk, &heir_image, "both are back");
    heir.process.terminate();
    wait_for_owner(&site, &disk, "owner");
    assert_history_is(&site, &disk, &lost_image, "the owner has it again");
}

#[test]
fn an_agent_that_is_restarted_does_not_lose_its_disk_to_a_clone() {
    let mut site = Site::start_with_server(&["--agent-timeout-s", "600"]);
    let second = Host::start(&site, "hostb");
    let (first_image, clone_image) = (image(&site, "first", 1), image(&site, "clone", 2));
    let mut first = Qemu::storage_daemon_as(&site, &site.agent_socket(), "first", UUID, &first_image);
    let disk = site.disk("first", "");
    site.protect(&disk);
    let _clone = Qemu::storage_daemon_as(&site, second.agent_socket(), "clone", UUID, &clone_image);
    wait_for_conflict(&site, &disk, "has this disk");
    let gaps = site.points(&disk).gaps;
    site.agent.kill();
    first.io(&["write -P 5 1M 64k", "flush"]);
    wait_for("the clone to ask while nobody has the disk", || {
        let summary = site.client().disk(&disk).expect("disk").summary;
        summary.protection.reason.contains("not connected").then_some(())
    });
    site.restart_agent();
    wait_for_owner(&site, &disk, "first");
    assert_history_is(&site, &disk, &first_image, "after");
    assert_eq!(site.points(&disk).gaps, gaps, "it went on where it was");
    wait_for_conflict(&site, &disk, "has this disk");
}

#[test]
fn a_second_process_of_one_vm_on_the_same_host_is_shown_with_the_reason_and_takes_over() {
    let site = Site::start();
    let (first_image, second_image) = (image(&site, "first", 1), image(&site, "second", 2));
    let mut first = Qemu::storage_daemon_as(&site, &site.agent_socket(), "first", UUID, &first_image);
    let disk = site.disk("first", "");
    site.protect(&disk);
    let mut second = Qemu::storage_daemon_as(&site, &site.agent_socket(), "second", UUID, &second_image);
    let conflict = wait_for_conflict(&site, &disk, &format!("process {}", first.process.pid()));
    assert_eq!((conflict.vm.as_str(), conflict.vm_pid), ("second", second.process.pid()));
    assert_eq!(site.client().disk("first/disk").expect("still its name").summary.id, disk);
    first.io(&["write -P 5 1M 64k", "flush"]);
    second.io(&["write -P 6 1M 128k", "flush"]);
    assert_history_is(&site, &disk, &first_image, "first");
    assert_eq!(said(&site.agent.log(), "a second process claims this disk"), 1);
    first.process.terminate();
    wait_for_owner(&site, &disk, "second");
    assert_eq!(conflicts(&site, &disk), []);
    assert_history_is(&site, &disk, &second_image, "second");
}

/// As libvirt does it: the destination runs and claims the disk while the source is still the VM; then the source ends.
#[test]
fn a_live_migration_takes_the_disk_along() {
    let site = Site::start();
    let second = Host::start(&site, "hostb");
    let (image, here) = (image(&site, "shared", 1), site.agent_socket());
    let nodes = [raw_file(&image)];
    let mut source = Qemu::system_with(&site, &here, "source", &nodes, "disk", &["-uuid", UUID]);
    let disk = site.disk("source", "disk0");
    site.protect(&disk);
    source.io(&["write -P 5 1M 64k", "flush"]);
    let socket = site.directory().join("migration");
    let uri = format!("unix:{}", socket.display());
    let incoming = ["-uuid", UUID, "-incoming", &uri];
    let mut destination =
        Qemu::system_with(&site, second.agent_socket(), "destination", &nodes, "disk", &incoming);
    wait_for_conflict(&site, &disk, "has this disk");
    source.io(&["write -P 6 2M 64k", "flush"]);
    let gaps = site.points(&disk).gaps;
    source.qmp.run("migrate", json!({ "uri": uri }));
    wait_for("the migration", || {
        let status = source.qmp.run("query-migrate", json!({}))["status"].clone();
        assert!(status != "failed", "the migration failed");
        (status == "completed").then_some(())
    });
    wait_for("the destination to have the VM", || {
        (destination.qmp.run("query-status", json!({}))["status"] != "inmigrate").then_some(())
    });
    // Its image can be written from here on.
    destination.qmp.run("cont", json!({}));
    assert_eq!(site.client().disk(&disk).expect("disk").summary.vm, "source", "until it has ended");
    destination.io(&["write -P 7 3M 64k", "flush"]);
    source.process.terminate();
    wait_for_owner(&site, &disk, "destination");
    destination.io(&["write -P 8 1M 32k", "flush"]);
    assert_eq!(site.points(&disk).gaps.len(), gaps.len() + 1, "one gap more");
    assert_history_is(&site, &disk, &image, "migrated");
}
