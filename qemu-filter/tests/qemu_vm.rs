//! A system emulator with disks on iothreads: what management does to a disk goes on as before, and is followed.

mod support;

use capture_ring::{Overflow, Policy};

use support::agent::{Agent, Filter, Tap, guest_writes, wait_for};
use support::memory::{differing, driver_tables};
use support::programs::Site;
use support::vm::{Load, SCSI, UUID, VIRTIO, Vm, start};

#[test]
fn disks_are_listed_by_their_device_and_the_vm_by_name_and_uuid() {
    let site = Site::new();
    let agent = Agent::listen(site.path());
    let (vm, mut filter) = start(&site, &agent);
    assert_eq!(
        (filter.hello.program.as_str(), filter.hello.vm_name.as_str()),
        ("qemu-system-x86_64", "guest")
    );
    let uuid: String = filter.hello.vm_uuid.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(uuid, UUID.replace('-', ""));
    for device in ["disk0", "disk1"] {
        let disk = filter.disk(device);
        assert_eq!(
            (disk.node, disk.driver.as_str(), disk.disk_bytes),
            (format!("node-{device}"), "qcow2", 8 << 20)
        );
        assert_eq!((disk.read_only, disk.refused.as_str()), (false, ""));
    }
    assert_eq!(filter.list().len(), 2);
    vm.quit();
}

#[test]
fn snapshot_and_commit_go_on_under_capture_and_only_the_guest_is_captured() {
    let site = Site::new();
    let agent = Agent::listen(site.path());
    let (mut vm, mut filter) = start(&site, &agent);
    let qmp = &mut vm.qmp;
    qmp.io(VIRTIO, "write -P 1 0 1M");
    let graph = qmp.must("{'execute': 'query-named-block-nodes', 'arguments': {'flat': true}}");
    let tap = filter.attach("disk0");
    tap.wait_synced();
    let names = |text: &str| text.matches("\"node-name\"").count();
    let with = qmp.must("{'execute': 'query-named-block-nodes', 'arguments': {'flat': true}}");
    assert_eq!(names(&graph), names(&with));
    qmp.io(VIRTIO, "write -P 2 512k 64k");
    qmp.must(&format!(
        "{{'execute': 'blockdev-snapshot-sync', 'arguments': {{'node-name': 'node-disk0', 'snapshot-file': '{}',
          'snapshot-node-name': 'overlay'}}}}",
        site.inside("overlay")
    ).replace('\n', " "));
    qmp.io(VIRTIO, "write -P 3 600k 64k");
    qmp.must("{'execute': 'block-commit', 'arguments': {'device': 'overlay', 'job-id': 'commit'}}");
    qmp.wait_ready();
    qmp.io(VIRTIO, "write -P 4 700k 4k");
    qmp.must("{'execute': 'block-job-complete', 'arguments': {'device': 'commit'}}");
    qmp.wait_jobs();
    qmp.io(VIRTIO, "write -P 5 2M 64k");
    qmp.must("{'execute': 'block_resize', 'arguments': {'node-name': 'node-disk0', 'size': 10485760}}");
    qmp.io(VIRTIO, "write -P 6 9M 64k");
    qmp.io(VIRTIO, "write -z 2112k 64k");
    tap.wait_synced();
    let image = tap.image();
    assert_eq!(filter.disk("disk0").refused, "");
    filter.detach("disk0");
    vm.quit();
    assert!(image == site.contents("qcow2", "disk0"), "the captured image differs");
    assert_eq!(guest_writes(&tap.finish()), 5, "each guest write once, no job's");
}

#[test]
fn protection_toggles_under_load_on_an_iothread() {
    let site = Site::new();
    let agent = Agent::listen(site.path());
    let (mut vm, mut filter) = start(&site, &agent);
    let load = Load::on(&site, &mut vm.qmp, "node-disk0", "io0");
    let mut seen = 0;
    for _ in 0..50 {
        let tap = filter.attach("disk0");
        let other = filter.attach("disk1");
        vm.qmp.io(SCSI, "write -P 3 0 64k");
        tap.wait_records(5);
        filter.detach("disk0");
        seen += guest_writes(&tap.finish());
        filter.detach("disk1");
        assert_eq!(guest_writes(&other.finish()), 1);
    }
    load.end();
    assert!(seen > 50, "only {seen} writes of the load were captured");
    vm.quit();
}

#[test]
fn what_is_captured_under_load_is_the_image() {
    let site = Site::new();
    let agent = Agent::listen(site.path());
    let (mut vm, mut filter) = start(&site, &agent);
    let load = Load::on(&site, &mut vm.qmp, "node-disk0", "io0");
    let tap = filter.attach("disk0");
    tap.wait_synced();
    tap.wait_records(300);
    load.end();
    vm.qmp.must("{'execute': 'nbd-server-stop'}");
    vm.qmp.io(VIRTIO, "write -P 9 1M 8k");
    let image = tap.image();
    filter.detach("disk0");
    vm.quit();
    assert!(image == site.contents("qcow2", "disk0"), "the captured image differs");
    assert!(guest_writes(&tap.finish()) > 100);
}

/// A guest that stands still because its ring is full and its policy strict.
fn waiting_guest(site: &Site, vm: &mut Vm, filter: &mut Filter<'_>) -> (Load, Tap) {
    let tap = filter.attach_over("disk0", 1 << 20);
    tap.wait_synced();
    tap.ring().set_policy(Policy { overflow: Overflow::Strict, ..Policy::default() });
    let load = Load::on(site, &mut vm.qmp, "node-disk0", "io0");
    tap.freeze(true);
    wait_for("the guest to wait", || (tap.ring().waiting() > 0).then_some(()));
    std::thread::sleep(std::time::Duration::from_millis(700));
    assert!(tap.ring().waiting() > 0 && !tap.ring().gap_is_open(), "it has not waited");
    (load, tap)
}

#[test]
fn a_guest_that_waits_goes_on_without_a_gap_when_there_is_room() {
    let site = Site::new();
    let agent = Agent::listen(site.path());
    let (mut vm, mut filter) = start(&site, &agent);
    let (load, tap) = waiting_guest(&site, &mut vm, &mut filter);
    let before = tap.ring().captured_lsn();
    tap.freeze(false);
    wait_for("the guest to go on", || (tap.ring().captured_lsn().0 > before.0 + 1000).then_some(()));
    assert!(!tap.ring().gap_is_open() && tap.ring().mode().generation == 1, "a gap began");
    load.end();
    filter.detach("disk0");
    vm.quit();
}

#[test]
fn what_drains_a_disk_is_not_held_up_by_a_guest_that_waits() {
    let site = Site::new();
    let agent = Agent::listen(site.path());
    let (mut vm, mut filter) = start(&site, &agent);
    let (load, tap) = waiting_guest(&site, &mut vm, &mut filter);
    vm.qmp.must(&format!(
        "{{'execute': 'blockdev-snapshot-sync', 'arguments': {{'node-name': 'node-disk0', 'snapshot-file': '{}', 'snapshot-node-name': 'overlay'}}}}",
        site.inside("overlay")
    ));
    assert!(tap.ring().mode().generation > 1, "it goes on without a record, and history says so");
    load.end();
    vm.quit();
    drop(tap);
}

#[test]
fn detaching_and_quitting_are_not_held_up_by_a_guest_that_waits() {
    let site = Site::new();
    let agent = Agent::listen(site.path());
    let (mut vm, mut filter) = start(&site, &agent);
    let (load, tap) = waiting_guest(&site, &mut vm, &mut filter);
    filter.detach("disk0");
    load.end();
    drop(tap);
    vm.qmp.must("{'execute': 'nbd-server-stop'}");
    let (_load, tap) = waiting_guest(&site, &mut vm, &mut filter);
    vm.quit();
    drop(tap);
}

#[test]
fn an_unplugged_disk_ends_its_capture() {
    let site = Site::new();
    let agent = Agent::listen(site.path());
    let (mut vm, mut filter) = start(&site, &agent);
    let executable = site.executable("qemu-system-x86_64");
    let before = driver_tables(vm.child.id(), &executable);
    let tap = filter.attach("disk1");
    vm.qmp.io(SCSI, "write -P 3 0 64k");
    vm.qmp.must("{'execute': 'device_del', 'arguments': {'id': 'disk1'}}");
    wait_for("the disk's end", || (!filter.list().iter().any(|disk| disk.device == "disk1")).then_some(()));
    wait_for("unhooking", || {
        (differing(&before, &driver_tables(vm.child.id(), &executable)) == 0).then_some(())
    });
    vm.qmp.must("{'execute': 'blockdev-del', 'arguments': {'node-name': 'node-disk1'}}");
    drop(tap);
    vm.quit();
}

#[test]
fn quitting_under_capture_ends_well() {
    let site = Site::new();
    let agent = Agent::listen(site.path());
    let (mut vm, mut filter) = start(&site, &agent);
    let tap = filter.attach("disk0");
    vm.qmp.io(VIRTIO, "write -P 3 0 64k");
    vm.quit();
    drop(tap);
}
