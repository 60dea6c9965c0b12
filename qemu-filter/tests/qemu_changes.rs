//! What changes a disk without being a guest's write: snapshots, reverts, commits, copies inside the storage, migration.
//! Each is either captured or a gap with a resync, so that the captured image ends as the image that is there.

mod support;

use std::process::Stdio;

use journal_format::{GapReason, Op};

use support::agent::{Agent, Filter, Taken, guest_writes, replay_each, wait_for};
use support::programs::{Ends, Site};
use support::qmp::Qmp;
use support::vm::{VIRTIO, Vm, create_disks, start};

/// How many gaps with that reason began.
fn gaps(records: &[Taken], wanted: GapReason) -> usize {
    let is_one = |taken: &&Taken| matches!(taken.record.op, Op::GapBegin { reason, .. } if reason == wanted);
    records.iter().filter(is_one).count()
}

fn daemon<'a>(site: &Site, agent: &'a Agent) -> (Ends, Qmp, Filter<'a>) {
    let daemon = site.storage_daemon(agent);
    let qmp = Qmp::connect(&site.path().join("qmp"));
    (daemon, qmp, agent.accept())
}

fn write(site: &Site, command: &str) {
    site.run("qemu-io", &["-f", "raw", "-c", command, "-c", "flush", &site.nbd_url()]);
}

/// Puts an empty overlay of that size on top of the exported node.
fn snapshot(site: &Site, qmp: &mut Qmp, size: &str) {
    let base = site.inside("disk");
    site.run(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-b", &base, "-F", "raw", &site.inside("overlay"), size],
    );
    let file = format!("{{'driver': 'file', 'filename': '{}'}}", site.inside("overlay"));
    qmp.must(&format!(
        "{{'execute': 'blockdev-add', 'arguments': {{'driver': 'qcow2', 'node-name': 'overlay', 'backing': null, 'file': {file}}}}}"
    ));
    qmp.must("{'execute': 'blockdev-snapshot', 'arguments': {'node': 'disk', 'overlay': 'overlay'}}");
}

#[test]
fn an_export_stays_the_same_disk_when_a_snapshot_puts_another_node_below_it() {
    let site = Site::new();
    let agent = Agent::listen(site.path());
    let (daemon, mut qmp, mut filter) = daemon(&site, &agent);
    let tap = filter.attach("disk");
    tap.wait_synced();
    write(&site, "write -P 1 0 1M");
    snapshot(&site, &mut qmp, "8M");
    write(&site, "write -P 2 512k 64k");
    wait_for("the list to name the new node", || (filter.list()[0].node == "overlay").then_some(()));
    assert_eq!(filter.disks.len(), 1);
    assert_eq!(filter.disk("disk").driver, "qcow2");
    // Switched off and on again it is still the same one.
    let image = tap.image();
    filter.detach("disk");
    let records = tap.finish();
    assert_eq!((guest_writes(&records), gaps(&records, GapReason::ContentsChanged)), (2, 0));
    let again = filter.attach("disk");
    again.wait_synced();
    let synced = again.image();
    filter.detach("disk");
    drop(daemon);
    let contents = site.contents("qcow2", "overlay");
    assert!(image == contents, "the captured image differs");
    assert!(synced == contents, "the image captured anew differs");
}

#[test]
fn an_export_that_is_made_anew_on_another_node_is_another_disk() {
    let site = Site::new();
    let agent = Agent::listen(site.path());
    let (_daemon, mut qmp, mut filter) = daemon(&site, &agent);
    filter.disk("disk");
    qmp.must("{'execute': 'block-export-del', 'arguments': {'id': 'e'}}");
    wait_for("the disk's end", || filter.list().is_empty().then_some(()));
    qmp.must("{'execute': 'blockdev-add', 'arguments': {'driver': 'null-co', 'node-name': 'other', 'size': 1048576}}");
    qmp.must("{'execute': 'block-export-add', 'arguments': {'type': 'nbd', 'id': 'e', 'node-name': 'other', 'writable': true}}");
    wait_for("the new disk", || (!filter.list().is_empty()).then_some(()));
    assert_eq!(filter.disks[0].device, "other");
}

#[test]
fn a_snapshot_of_another_size_resizes_the_captured_disk() {
    for (size, bytes) in [("4M", 4 << 20), ("12M", 12 << 20)] {
        let site = Site::new();
        let agent = Agent::listen(site.path());
        let (daemon, mut qmp, mut filter) = daemon(&site, &agent);
        let tap = filter.attach("disk");
        write(&site, "write -P 1 0 8M");
        tap.wait_synced();
        let mut load = site.command("qemu-img");
        load.args(["bench", "-w", "-c", "10000000", "-d", "8", "-s", "8k", "-f", "raw"]);
        let load =
            Ends(load.arg(site.nbd_url()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
        snapshot(&site, &mut qmp, size);
        // The daemon still answers, and so does its filter.
        qmp.must("{'execute': 'query-block-exports'}");
        wait_for("the new size", || (filter.list()[0].disk_bytes == bytes).then_some(()));
        drop(load);
        write(&site, "write -P 2 1M 64k");
        let resized =
            |taken: &Taken| matches!(taken.record.op, Op::Resize { disk_bytes } if disk_bytes == bytes);
        wait_for("the record of the new size", || tap.records().iter().any(resized).then_some(()));
        tap.wait_synced();
        let image = tap.image();
        filter.detach("disk");
        drop(daemon);
        assert!(image == site.contents("qcow2", "overlay"), "the captured image differs");
    }
}

#[test]
fn what_a_job_copies_inside_the_storage_is_captured() {
    let site = Site::new();
    let agent = Agent::listen(site.path());
    let (daemon, mut qmp, mut filter) = daemon(&site, &agent);
    site.create("raw", "source", "8M");
    site.run("qemu-io", &["-f", "raw", "-c", "write -P 6 1M 3M", &site.inside("source")]);
    let tap = filter.attach("disk");
    tap.wait_synced();
    qmp.must(&format!(
        "{{'execute': 'blockdev-add', 'arguments': {{'driver': 'file', 'node-name': 'source', 'filename': '{}'}}}}",
        site.inside("source")
    ));
    let job = "'job-id': 'copy', 'device': 'source', 'target': 'disk', 'sync': 'full', 'x-perf': {'use-copy-range': true}";
    qmp.must(&format!("{{'execute': 'blockdev-backup', 'arguments': {{{job}}}}}"));
    qmp.wait_jobs();
    tap.wait_synced();
    let image = tap.image();
    filter.detach("disk");
    drop(daemon);
    assert!(image[2 << 20] == 6, "the job has copied nothing");
    assert!(image == site.contents("raw", "disk"), "the captured image differs");
}

#[test]
fn a_revert_to_an_internal_snapshot_is_a_gap_until_it_was_read_back() {
    let site = Site::new();
    let agent = Agent::listen(site.path());
    let (mut vm, mut filter) = start(&site, &agent);
    vm.qmp.io(VIRTIO, "write -P 1 0 1M");
    assert_eq!(vm.qmp.human("savevm before"), "");
    let tap = filter.attach("disk0");
    vm.qmp.io(VIRTIO, "write -P 2 0 64k");
    vm.qmp.io(VIRTIO, "write -P 3 2M 64k");
    tap.wait_synced();
    assert_eq!(vm.qmp.human("loadvm before"), "");
    tap.wait_synced();
    let image = tap.image();
    vm.qmp.io(VIRTIO, "write -P 4 3M 64k");
    let later = tap.image();
    filter.detach("disk0");
    vm.quit();
    let contents = site.contents("qcow2", "disk0");
    assert!(later == contents, "the captured image differs");
    assert_eq!((image[0], image[2 << 20]), (1, 0), "what was reverted is not read back");
    assert!(gaps(&tap.finish(), GapReason::ContentsChanged) > 0, "the revert passed in silence");
}

/// The driver's tables are half changed during a revert, and say that nothing is there; what is read then must be
/// offered at no point.
#[test]
fn no_point_has_what_is_read_in_the_midst_of_a_revert() {
    const BLOCK: usize = 64 << 10;
    let site = Site::new();
    let agent = Agent::listen(site.path());
    let (mut vm, mut filter) = start(&site, &agent);
    vm.qmp.io(VIRTIO, "write -P 1 0 8M");
    let tap = filter.attach("disk0");
    tap.wait_synced();
    for _ in 0..5 {
        vm.qmp.io(VIRTIO, "write -P 1 0 8M");
        assert_eq!(vm.qmp.human("savevm before"), "");
        vm.qmp.io(VIRTIO, "write -P 2 0 8M");
        assert_eq!(vm.qmp.human("loadvm before"), "");
        tap.wait_synced();
        assert_eq!(vm.qmp.human("delvm before"), "");
    }
    filter.detach("disk0");
    vm.quit();
    let (mut image, mut open, mut looked) = (Vec::new(), 0, 0);
    replay_each(&tap.finish(), 8 << 20, |taken, now| {
        match taken.record.op {
            Op::GapBegin { generation, .. } => open = open.max(generation),
            Op::GapEnd { generation } if generation >= open => open = 0,
            _ => {}
        }
        if open == 0 {
            image = now.iter().step_by(BLOCK).copied().collect();
            assert!(image.iter().all(|byte| [1, 2].contains(byte)), "LSN {}: {image:?}", taken.record.lsn);
            looked += 1;
        }
    });
    assert!(looked > 5 && image.iter().all(|byte| *byte == 1), "{looked} points, the last {image:?}");
}

#[test]
fn a_commit_that_empties_the_captured_image_is_a_gap_until_it_was_read_back() {
    let site = Site::new();
    let agent = Agent::listen(site.path());
    create_disks(&site);
    let base = site.inside("base");
    site.create("qcow2", "base", "8M");
    site.run("qemu-io", &["-f", "qcow2", "-c", "write -P 1 0 1M", &base]);
    site.run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &site.inside("disk0")]);
    let mut vm = Vm::start(&site, site.preloaded("qemu-system-x86_64", &agent), "qmp");
    let mut filter = agent.accept();
    let tap = filter.attach("disk0");
    vm.qmp.io(VIRTIO, "write -P 2 512k 1M");
    tap.wait_synced();
    assert_eq!(vm.qmp.human("commit all"), "");
    vm.qmp.io(VIRTIO, "write -P 3 3M 64k");
    tap.wait_synced();
    let image = tap.image();
    filter.detach("disk0");
    vm.quit();
    assert!(image == site.contents("qcow2", "disk0"), "the captured image differs");
    assert!(gaps(&tap.finish(), GapReason::ContentsChanged) > 0, "the commit passed in silence");
}

#[test]
fn migration_ends_capture_where_it_leaves_and_reads_all_where_it_arrives() {
    let site = Site::new();
    let agent = Agent::listen(site.path());
    let (mut source, mut from) = start(&site, &agent);
    let left = from.attach("disk0");
    source.qmp.io(VIRTIO, "write -P 1 0 1M");
    left.wait_synced();
    let mut command = site.preloaded("qemu-system-x86_64", &agent);
    command.args(["-incoming", "defer"]);
    let mut target = Vm::start(&site, command, "qmp2");
    let mut to = agent.accept();
    let arrived = to.attach("disk0");
    source.qmp.io(VIRTIO, "write -P 2 2M 64k");
    let at = format!("'uri': 'unix:{}'", site.inside("migration"));
    target.qmp.must(&format!("{{'execute': 'migrate-incoming', 'arguments': {{{at}}}}}"));
    source.qmp.must(&format!("{{'execute': 'migrate', 'arguments': {{{at}}}}}"));
    wait_for("the migration", || {
        source.qmp.must("{'execute': 'query-migrate'}").contains("\"completed\"").then_some(())
    });
    assert!(from.fault().contains("migration"));
    source.quit();
    // The processor starts, and with it the disk is this one's.
    target.qmp.must("{'execute': 'cont'}");
    target.qmp.io(VIRTIO, "write -P 3 3M 64k");
    arrived.wait_synced();
    let image = arrived.image();
    to.detach("disk0");
    target.quit();
    assert!(image == site.contents("qcow2", "disk0"), "the captured image differs");
    assert!(gaps(&left.finish(), GapReason::FilterFault) == 1, "the end of capture is no gap");
    assert!(gaps(&arrived.finish(), GapReason::ContentsChanged) > 0, "the take-over passed in silence");
}
