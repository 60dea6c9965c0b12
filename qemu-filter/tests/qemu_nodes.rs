//! Management that puts other nodes below a running device: what leaves the disk's contents passes without a gap, and
//! what may change them is a gap from before the guest's next request on, until all has been compared.

mod support;

use std::time::Duration;

use journal_format::{GapReason, Op};

use support::agent::{Agent, Taken, wait_for};
use support::programs::Site;
use support::qmp::Qmp;
use support::vm::{Load, VIRTIO, Vm, create_disks, start};

/// What a case does to the nodes of the machine's disk0: it gives the image that the disk is in afterwards, and what its
/// backing file then is, where the image does not say so.
type Case = fn(&Site, &mut Qmp) -> (&'static str, Option<&'static str>);

fn blockdev(site: &Site, qmp: &mut Qmp, name: &str, backing: &str) {
    let file = format!("{{'driver': 'file', 'filename': '{}'}}", site.inside(name));
    qmp.must(&format!(
        "{{'execute': 'blockdev-add', 'arguments': {{'driver': 'qcow2', 'node-name': '{name}', 'backing': {backing}, 'file': {file}}}}}"
    ));
}

/// An image full of sevens, as a node of its own.
fn other(site: &Site, qmp: &mut Qmp) {
    site.create("qcow2", "other", "8M");
    site.run("qemu-io", &["-f", "qcow2", "-c", "write -P 7 0 8M", &site.inside("other")]);
    blockdev(site, qmp, "other", "null");
}

/// An empty overlay on top of the disk's node.
fn snapshot(site: &Site, qmp: &mut Qmp, name: &str, below: &str) {
    qmp.must(&format!(
        "{{'execute': 'blockdev-snapshot-sync', 'arguments': {{'node-name': '{below}', 'snapshot-node-name': '{name}', 'snapshot-file': '{}'}}}}",
        site.inside(name)
    ));
}

fn run(qmp: &mut Qmp, job: &str, arguments: &str) {
    qmp.must(&format!("{{'execute': '{job}', 'arguments': {{'job-id': 'job', {arguments}}}}}"));
}

fn pivot(qmp: &mut Qmp) {
    qmp.wait_ready();
    qmp.must("{'execute': 'block-job-complete', 'arguments': {'device': 'job'}}");
    qmp.wait_jobs();
}

const LEAVES_IT: [(&str, Case); 3] = [
    ("an empty overlay", |site, qmp| {
        snapshot(site, qmp, "overlay", "node-disk0");
        ("overlay", None)
    }),
    ("two overlays at once, then an active commit", |site, qmp| {
        snapshot(site, qmp, "first", "node-disk0");
        snapshot(site, qmp, "second", "first");
        qmp.io(VIRTIO, "write -P 5 1M 64k");
        run(qmp, "block-commit", "'device': 'second', 'base-node': 'node-disk0'");
        pivot(qmp);
        ("disk0", None)
    }),
    ("a mirror of all of it", |site, qmp| {
        site.create("qcow2", "copy", "8M");
        blockdev(site, qmp, "copy", "null");
        run(qmp, "blockdev-mirror", "'device': 'node-disk0', 'target': 'copy', 'sync': 'full'");
        pivot(qmp);
        ("copy", None)
    }),
];

const CHANGES_IT: [(&str, Case); 8] = [
    ("an overlay with data of its own", |site, qmp| {
        other(site, qmp);
        qmp.must("{'execute': 'blockdev-snapshot', 'arguments': {'node': 'node-disk0', 'overlay': 'other'}}");
        ("other", None)
    }),
    ("another drive", |site, qmp| {
        other(site, qmp);
        qmp.must("{'execute': 'qom-set', 'arguments': {'path': '/machine/peripheral/disk0', 'property': 'drive', 'value': 'other'}}");
        ("other", None)
    }),
    ("a mirror of new writes only", |site, qmp| {
        other(site, qmp);
        run(qmp, "blockdev-mirror", "'device': 'node-disk0', 'target': 'other', 'sync': 'none'");
        pivot(qmp);
        ("other", None)
    }),
    ("another backing file", |site, qmp| {
        other(site, qmp);
        snapshot(site, qmp, "overlay", "node-disk0");
        qmp.io(VIRTIO, "write -P 5 1M 64k");
        let file = format!("{{'driver': 'file', 'filename': '{}'}}", site.inside("overlay"));
        let options =
            format!("'driver': 'qcow2', 'node-name': 'overlay', 'file': {file}, 'backing': 'other'");
        qmp.must(&format!("{{'execute': 'blockdev-reopen', 'arguments': {{'options': [{{{options}}}]}}}}"));
        ("overlay", Some("other"))
    }),
    ("its base instead of its overlay", |site, qmp| {
        snapshot(site, qmp, "overlay", "node-disk0");
        qmp.io(VIRTIO, "write -P 5 0 1M");
        let overlay = format!("'file': {{'driver': 'file', 'filename': '{}'}}", site.inside("overlay"));
        let base =
            format!("'driver': 'file', 'node-name': 'file-disk0', 'filename': '{}'", site.inside("disk0"));
        for options in [
            format!("'driver': 'qcow2', 'node-name': 'overlay', {overlay}, 'backing': null"),
            format!("{base}, 'read-only': false"),
            "'driver': 'qcow2', 'node-name': 'node-disk0', 'file': 'file-disk0', 'read-only': false"
                .to_owned(),
        ] {
            qmp.must(&format!(
                "{{'execute': 'blockdev-reopen', 'arguments': {{'options': [{{{options}}}]}}}}"
            ));
        }
        qmp.must("{'execute': 'qom-set', 'arguments': {'path': '/machine/peripheral/disk0', 'property': 'drive', 'value': 'node-disk0'}}");
        ("disk0", None)
    }),
    ("an overlay that is shorter, and then one that is not", |site, qmp| {
        for (name, below, size) in [("short", "disk0", "4M"), ("long", "short", "8M")] {
            let (below, image) = (site.inside(below), site.inside(name));
            site.run(
                "qemu-img",
                &["create", "-q", "-f", "qcow2", "-u", "-b", &below, "-F", "qcow2", &image, size],
            );
            blockdev(site, qmp, name, "null");
        }
        qmp.must("{'execute': 'blockdev-snapshot', 'arguments': {'node': 'node-disk0', 'overlay': 'short'}}");
        qmp.must("{'execute': 'blockdev-snapshot', 'arguments': {'node': 'short', 'overlay': 'long'}}");
        ("long", None)
    }),
    ("a stream into its overlay", |site, qmp| {
        snapshot(site, qmp, "overlay", "node-disk0");
        qmp.io(VIRTIO, "write -P 5 1M 64k");
        run(qmp, "block-stream", "'device': 'overlay'");
        qmp.wait_jobs();
        ("overlay", None)
    }),
    ("a commit of what is below its overlay", |site, qmp| {
        snapshot(site, qmp, "first", "node-disk0");
        qmp.io(VIRTIO, "write -P 5 1M 64k");
        snapshot(site, qmp, "second", "first");
        run(qmp, "block-commit", "'device': 'second', 'top-node': 'first', 'base-node': 'node-disk0'");
        qmp.wait_jobs();
        ("second", None)
    }),
];

/// How many gaps for changed contents begin before the guest's last write to `offset`.
fn gaps_before(records: &[Taken], offset: u64) -> usize {
    let is_write =
        |taken: &Taken| matches!(taken.record.op, Op::Write { range, .. } if range.offset() == offset);
    let last = records.iter().rposition(is_write).expect("the write's record");
    records[..last].iter().filter(|taken| is_gap(taken)).count()
}

fn is_gap(taken: &Taken) -> bool {
    matches!(taken.record.op, Op::GapBegin { reason: GapReason::ContentsChanged, .. })
}

/// Runs a case; the number of gaps for changed contents.
fn gaps_of(case: Case) -> usize {
    let site = Site::new();
    let agent = Agent::listen(site.path());
    let (mut vm, mut filter) = start(&site, &agent);
    vm.qmp.io(VIRTIO, "write -P 1 0 3M");
    let tap = filter.attach("disk0");
    tap.wait_synced();
    let (image, backing) = case(&site, &mut vm.qmp);
    vm.qmp.io(VIRTIO, "write -P 9 2M 64k");
    tap.wait_synced();
    let captured = tap.image();
    filter.detach("disk0");
    vm.quit();
    if let Some(backing) = backing {
        let (backing, image) = (site.inside(backing), site.inside(image));
        site.run("qemu-img", &["rebase", "-u", "-b", &backing, "-F", "qcow2", &image]);
    }
    assert!(captured == site.contents("qcow2", image), "the captured image differs");
    gaps_before(&tap.finish(), 2 << 20)
}

#[test]
fn what_leaves_the_contents_is_no_gap() {
    for (what, case) in LEAVES_IT {
        println!("{what}");
        assert_eq!(gaps_of(case), 0, "{what}");
    }
}

#[test]
fn what_changes_the_contents_is_a_gap_from_before_the_next_write() {
    for (what, case) in CHANGES_IT {
        println!("{what}");
        assert!(gaps_of(case) > 0, "{what} passed in silence");
    }
}

/// A guest that writes nothing afterwards reads the new contents too.
#[test]
fn a_change_that_no_write_follows_is_noticed() {
    for (what, case) in CHANGES_IT {
        println!("{what}");
        let site = Site::new();
        let agent = Agent::listen(site.path());
        let (mut vm, mut filter) = start(&site, &agent);
        vm.qmp.io(VIRTIO, "write -P 1 0 3M");
        let tap = filter.attach("disk0");
        tap.wait_synced();
        case(&site, &mut vm.qmp);
        // The second in which the disks are looked at is the agent's; nobody asks for them here.
        wait_for("the gap", || tap.records().iter().any(is_gap).then_some(()));
        filter.detach("disk0");
        vm.quit();
    }
}

/// `raw` shows a part of a file, and can be told to show another.
#[test]
fn another_part_of_a_file_is_a_gap() {
    let site = Site::new();
    let agent = Agent::listen(site.path());
    site.create("raw", "parts", "16M");
    let (mut vm, mut filter) = start(&site, &agent);
    let file = format!("'driver': 'file', 'node-name': 'parts', 'filename': '{}'", site.inside("parts"));
    let part = |offset: u32| {
        format!("'driver': 'raw', 'node-name': 'part', 'file': 'parts', 'offset': {offset}, 'size': 8388608")
    };
    vm.qmp.must(&format!("{{'execute': 'blockdev-add', 'arguments': {{{file}}}}}"));
    vm.qmp.must(&format!("{{'execute': 'blockdev-add', 'arguments': {{{}}}}}", part(0)));
    vm.qmp.must("{'execute': 'qom-set', 'arguments': {'path': '/machine/peripheral/disk0', 'property': 'drive', 'value': 'part'}}");
    let tap = filter.attach("disk0");
    tap.wait_synced();
    vm.qmp.must(&format!(
        "{{'execute': 'blockdev-reopen', 'arguments': {{'options': [{{{}}}]}}}}",
        part(8 << 20)
    ));
    wait_for("the gap", || tap.records().iter().any(is_gap).then_some(()));
    filter.detach("disk0");
    vm.quit();
}

/// Nobody tells when a `quorum` node gets other children.
#[test]
fn a_disk_on_a_quorum_is_refused_and_one_that_moves_there_is_given_up() {
    let site = Site::new();
    let agent = Agent::listen(site.path());
    let (mut vm, mut filter) = start(&site, &agent);
    other(&site, &mut vm.qmp);
    let quorum = "'driver': 'quorum', 'node-name': 'quorum', 'vote-threshold': 1, 'children': ['other']";
    vm.qmp.must(&format!("{{'execute': 'blockdev-add', 'arguments': {{{quorum}}}}}"));
    let tap = filter.attach("disk0");
    tap.wait_synced();
    vm.qmp.must("{'execute': 'qom-set', 'arguments': {'path': '/machine/peripheral/disk0', 'property': 'drive', 'value': 'quorum'}}");
    assert!(filter.fault().contains("quorum"));
    assert!(filter.disk("disk0").refused.contains("quorum"));
    vm.quit();
}

/// Asking whether an overlay is empty runs the main loop, in which protection may be switched off.
#[test]
fn protection_is_switched_off_while_an_overlay_is_asked() {
    // At one of these moments it is being asked.
    for pause_ms in [1, 3, 6, 10, 20, 40] {
        switch_off_after(Duration::from_millis(pause_ms));
    }
}

fn switch_off_after(pause: Duration) {
    let site = Site::new();
    let agent = Agent::listen(site.path());
    create_disks(&site);
    site.create("qcow2", "disk0", "1G");
    let mut vm = Vm::start(&site, site.preloaded("qemu-system-x86_64", &agent), "qmp");
    let mut filter = agent.accept();
    // With tables as small as these, and data at its end only, asking takes many milliseconds.
    let overlay = site.inside("overlay");
    site.run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", &overlay, "1G"]);
    site.run("qemu-io", &["-f", "qcow2", "-c", "write -P 7 1023M 1M", &overlay]);
    blockdev(&site, &mut vm.qmp, "overlay", "null");
    let tap = filter.attach("disk0");
    tap.wait_synced();
    vm.qmp
        .must("{'execute': 'blockdev-snapshot', 'arguments': {'node': 'node-disk0', 'overlay': 'overlay'}}");
    std::thread::sleep(pause);
    filter.detach("disk0");
    vm.qmp.io(VIRTIO, "write -P 4 2M 1M");
    vm.quit();
}

#[test]
fn snapshots_and_pivots_of_a_busy_disk_are_no_gaps() {
    let site = Site::new();
    let agent = Agent::listen(site.path());
    let (mut vm, mut filter) = start(&site, &agent);
    let tap = filter.attach("disk0");
    tap.wait_synced();
    let load = Load::gentle_on(&site, &mut vm.qmp, "node-disk0", "io0");
    for round in 0..10 {
        tap.wait_records(50);
        snapshot(&site, &mut vm.qmp, "overlay", "node-disk0");
        tap.wait_records(50);
        run(&mut vm.qmp, "block-commit", "'device': 'overlay', 'base-node': 'node-disk0'");
        pivot(&mut vm.qmp);
        let seen = tap.records().iter().filter(|taken| is_gap(taken)).count();
        assert_eq!(seen, 0, "round {round}");
    }
    load.end();
    vm.qmp.must("{'execute': 'nbd-server-stop'}");
    vm.qmp.io(VIRTIO, "write -P 9 1M 8k");
    assert!(!tap.ring().gap_is_open());
    let image = tap.image();
    filter.detach("disk0");
    vm.quit();
    assert!(image == site.contents("qcow2", "disk0"), "the captured image differs");
}
