//! A disk whose history was interrupted is whole again after a sync, which ships what differs and not the disk.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use cdp_api::{Journal, PointSpec, ProtectionPhase};
use cdp_tests::load::{Busy, Load};
use cdp_tests::qemu::{Qemu, raw_file, witness_above_disk};
use cdp_tests::random::Random;
use cdp_tests::site::{Site, Via};
use cdp_tests::{wait_for, witness};
use serde_json::{Value, json};

use crate::witness::{compare, requests};

const DISK_BYTES: u64 = 32 << 20;
const CHUNK: u64 = 64 << 10;
/// The guest writes to the beginning of the disk only, so that it is known what can differ.
const BUSY_BYTES: u64 = 4 << 20;

/// So many requests may have been sent and still stand in the pipe to `qemu-io`.
const IN_PIPE: u64 = 2000;

/// A disk full of noise, and a site.
struct Bench {
    site: Site,
    image: PathBuf,
    runs: u32,
}

/// One start of its VM, under a witness.
struct Run {
    qemu: Qemu,
    disk: String,
    log: PathBuf,
}

impl Bench {
    fn new(agent: &[&str]) -> Self {
        let site = Site::start_with_agent(agent);
        let image = site.directory().join("disk.raw");
        fs::write(&image, Random::seeded(77).bytes(DISK_BYTES as usize)).expect("image");
        Self { site, image, runs: 0 }
    }

    fn nodes(&self) -> Vec<Value> {
        vec![raw_file(&self.image)]
    }

    fn start(&mut self) -> Run {
        let nodes = self.nodes();
        self.start_on(nodes)
    }

    /// Starts the VM on a node `disk` and a witness above it.
    fn start_on(&mut self, mut nodes: Vec<Value>) -> Run {
        self.runs += 1;
        let log = self.site.directory().join(format!("{}.writes", self.runs));
        File::create(&log).expect("log");
        nodes.push(witness_above_disk(&log));
        let qemu = Qemu::storage_daemon(&self.site, "vm", &nodes, "witness");
        // The server's list may still be that of a former process.
        let socket = self.site.directory().join("vm.nbd");
        wait_for("the export", || UnixStream::connect(&socket).ok());
        let disk = self.site.disk(qemu.vm(), "");
        Run { qemu, disk, log }
    }

    fn load(&self, run: &Run, seed: u64) -> Busy {
        Busy::start(Load::new(seed, BUSY_BYTES, 512, self.site.directory()), &run.qemu.nbd_url())
    }

    /// Waits for the agent's report of a sync that read no more than that (what it reports is a second old).
    fn reported(&self, run: &Run, most: u64) -> Journal {
        wait_for("the report of a small sync", || {
            let journal = self.site.client().disk(&run.disk).expect("disk").journal;
            journal.filter(|journal| (1..=most).contains(&journal.sync_read_bytes))
        })
    }

    /// Waits until that epoch is whole; what its sync of the whole disk did (what the agent reports of it is a second old).
    fn synced(&self, run: &Run, epoch: u64) -> Journal {
        wait_for(&format!("epoch {epoch} to be protected"), || {
            let disk = self.site.client().disk(&run.disk).expect("disk");
            let protected = disk.summary.protection.phase == ProtectionPhase::Protected;
            let done = |journal: &Journal| journal.sync_read_bytes >= DISK_BYTES - BUSY_BYTES;
            disk.journal.filter(|journal| protected && journal.epoch == epoch && done(journal))
        })
    }

    /// What the journal has is the disk, and from here on every point that is sampled is what the witness sees. Nothing is
    /// in flight.
    fn check(&self, run: &mut Run) {
        let settled = self.site.bookmark(&run.disk, &format!("settled-{}", self.runs));
        let disk = fs::read(&self.image).expect("image");
        let restored = self.site.restore(&run.disk, &PointSpec::Lsn(settled), Via::Server);
        let differs = restored.iter().zip(&disk).position(|(a, b)| a != b);
        assert_eq!((restored.len(), differs), (disk.len(), None), "size, first differing byte");
        // Before the first request there is not even a header.
        let seen =
            if fs::metadata(&run.log).expect("log").len() > 0 { witness::read(&run.log).len() } else { 0 };
        let mut load = Load::new(99, DISK_BYTES, 512, self.site.directory());
        run.qemu.io(&requests(&mut load, 40));
        let end = self.site.bookmark(&run.disk, &format!("end-{}", self.runs));
        let log = witness::read(&run.log).split_off(seen);
        compare(&self.site, &run.disk, (settled, end), disk, &log, (1, 6));
        run.qemu.process.assert_alive();
    }

    /// Why each gap of the disk's history began.
    fn reasons(&self, run: &Run) -> Vec<String> {
        self.site.points(&run.disk).gaps.into_iter().map(|gap| gap.reason).collect()
    }

    /// The first sync, of the whole disk.
    fn protect(&self, run: &Run) {
        self.site.protect(&run.disk);
        let first = self.synced(run, 1);
        assert_eq!(self.reasons(run), ["attach"]);
        assert_eq!(first.sync_equal_bytes, 0, "the server knew nothing: {first:?}");
    }
}

fn let_through(busy: &Busy, requests: u64) {
    let goal = busy.sent() + requests;
    wait_for("requests under way", || (busy.sent() >= goal).then_some(()));
}

fn say(what: &str, journal: &Journal) {
    println!(
        "{what}: disk {DISK_BYTES}, read {}, compared {}, equal {}, shipped {}",
        journal.sync_read_bytes,
        journal.sync_compared_bytes,
        journal.sync_equal_bytes,
        journal.sync_shipped_bytes
    );
}

/// Nothing but what the guest writes to.
fn assert_little_was_shipped(synced: &Journal) {
    assert!(synced.sync_shipped_bytes <= BUSY_BYTES, "{synced:?}");
}

/// A guest that writes; a crash; the same guest again, which writes during the resync.
fn little_is_shipped_after(what: &str, seed: u64, crash: impl FnOnce(&mut Site, &mut Run)) {
    let mut bench = Bench::new(&[]);
    let mut run = bench.start();
    bench.protect(&run);
    let load = bench.load(&run, seed);
    let_through(&load, IN_PIPE + 200);
    crash(&mut bench.site, &mut run);
    drop(load);
    let mut run = bench.start();
    let load = bench.load(&run, seed + 1);
    let synced = bench.synced(&run, 2);
    let_through(&load, 60);
    load.finish();
    say(what, &synced);
    assert_eq!(bench.reasons(&run), ["attach", "unclean-end"]);
    assert_little_was_shipped(&synced);
    bench.check(&mut run);
}

#[test]
fn after_a_killed_qemu_only_what_differs_is_shipped() {
    little_is_shipped_after("killed", 1, |_, run| run.qemu.process.kill());
}

#[test]
fn after_a_crash_of_agent_and_qemu_only_what_differs_is_shipped() {
    little_is_shipped_after("both killed", 3, |site, run| {
        site.agent.kill();
        run.qemu.process.kill();
        site.restart_agent();
    });
}

#[test]
fn an_image_that_was_changed_while_the_vm_was_off_is_detected() {
    let mut bench = Bench::new(&[]);
    let mut run = bench.start();
    bench.protect(&run);
    run.qemu.io(&["write -q -P 1 1M 256k", "flush"]);
    run.qemu.process.terminate();
    let image = fs::OpenOptions::new().write(true).open(&bench.image).expect("image");
    image.write_all_at(&[0xab; 700], 5 * CHUNK + 1000).expect("changed");
    image.write_all_at(&vec![0xcd; 2 * CHUNK as usize], 100 * CHUNK - 1).expect("changed");
    drop(image);
    let mut run = bench.start();
    let synced = bench.synced(&run, 2);
    say("changed while off", &synced);
    assert_eq!(bench.reasons(&run), ["attach", "attach"]);
    assert!(synced.sync_shipped_bytes >= 4 * CHUNK && synced.sync_shipped_bytes <= 8 * CHUNK, "{synced:?}");
    bench.check(&mut run);
}

#[test]
fn after_an_overflow_only_what_was_not_recorded_is_shipped() {
    let mut bench = Bench::new(&["--ring-mib", "16", "--outbox-mib", "16", "--spool-mib", "0"]);
    let mut run = bench.start();
    bench.protect(&run);
    let load = bench.load(&run, 5);
    let_through(&load, IN_PIPE + 50);
    bench.site.server.kill();
    // Far more than outbox and ring hold.
    let_through(&load, IN_PIPE + 1500);
    bench.site.restart_server();
    wait_for("a gap by overflow that has ended", || {
        let gaps = bench.site.points(&run.disk).gaps;
        gaps.iter().any(|gap| gap.reason == "overflow" && gap.to_lsn.is_some()).then_some(())
    });
    bench.site.wait_for_phase(&run.disk, ProtectionPhase::Protected);
    let_through(&load, 60);
    load.finish();
    let synced = bench.reported(&run, BUSY_BYTES);
    say("overflow", &synced);
    bench.check(&mut run);
}

/// Below the raw format, so that the format's node is the one that is captured.
fn failing_disk(bench: &Bench) -> Vec<Value> {
    let file = json!({"driver": "file", "filename": bench.image, "discard": "unmap"});
    let rule = json!({"event": "none", "iotype": "write", "errno": 5, "sector": 4096, "once": true});
    let faulty = json!({"driver": "blkdebug", "image": file, "inject-error": [rule], "discard": "unmap"});
    vec![json!({"driver": "raw", "node-name": "disk", "file": faulty, "discard": "unmap"})]
}

#[test]
fn a_failed_write_is_read_back() {
    let mut bench = Bench::new(&[]);
    let nodes = failing_disk(&bench);
    let mut run = bench.start_on(nodes);
    bench.protect(&run);
    let said = std::process::Command::new("qemu-io")
        .args(["-t", "writeback", "-f", "raw", "-c", "write -P 5 1900k 400k", "-c", "write -P 6 1M 8k"])
        .arg(run.qemu.nbd_url())
        .output()
        .expect("qemu-io runs");
    let said = String::from_utf8_lossy(&said.stdout).into_owned() + &String::from_utf8_lossy(&said.stderr);
    assert!(said.contains("Input/output error"), "the guest sees the disk's error: {said}");
    wait_for("the gap of the failed write to be closed", || {
        let gaps = bench.site.points(&run.disk).gaps;
        gaps.iter().any(|gap| gap.reason == "write-failed" && gap.to_lsn.is_some()).then_some(())
    });
    bench.site.wait_for_phase(&run.disk, ProtectionPhase::Protected);
    let synced = bench.reported(&run, 9 * CHUNK);
    say("failed write", &synced);
    bench.check(&mut run);
}

/// Waits until that epoch is whole and its numbers are known; what its sync did.
fn continued(bench: &Bench, run: &Run, epoch: u64) -> Journal {
    wait_for(&format!("epoch {epoch} to be protected"), || {
        let disk = bench.site.client().disk(&run.disk).expect("disk");
        let protected = disk.summary.protection.phase == ProtectionPhase::Protected;
        // The size of the ring is known when the agent has reported.
        disk.journal.filter(|journal| protected && journal.epoch == epoch && journal.ring_bytes > 0)
    })
}

#[test]
fn a_vm_that_was_stopped_in_good_order_goes_on_without_a_sync() {
    let mut bench = Bench::new(&[]);
    let mut run = bench.start();
    bench.protect(&run);
    for epoch in 2..5 {
        // Stopped in the middle of its work: what the guest did not see complete is recorded, or was not done.
        let load = bench.load(&run, 10 + epoch);
        let_through(&load, IN_PIPE + 100);
        run.qemu.process.terminate();
        drop(load);
        run = bench.start();
        let journal = continued(&bench, &run, epoch);
        bench.check(&mut run);
        say("stopped", &journal);
        assert!(bench.reasons(&run).iter().all(|reason| reason == "attach"), "{:?}", bench.reasons(&run));
        assert_eq!((journal.sync_read_bytes, journal.sync_shipped_bytes), (0, 0), "{journal:?}");
    }
}

#[test]
fn a_stopped_vm_whose_image_was_only_touched_is_compared() {
    let mut bench = Bench::new(&[]);
    let mut run = bench.start();
    bench.protect(&run);
    run.qemu.io(&["write -q -P 1 1M 256k", "flush"]);
    run.qemu.process.terminate();
    let image = fs::OpenOptions::new().write(true).open(&bench.image).expect("image");
    let times =
        fs::FileTimes::new().set_modified(image.metadata().expect("image").modified().expect("a time"));
    image.set_times(times).expect("the time it had");
    drop(image);
    let mut run = bench.start();
    let synced = bench.synced(&run, 2);
    say("touched", &synced);
    assert_eq!(synced.sync_shipped_bytes, 0, "{synced:?}");
    bench.check(&mut run);
}

#[test]
fn what_a_restarted_vm_wrote_before_it_was_captured_is_not_missed() {
    let mut bench = Bench::new(&[]);
    let mut run = bench.start();
    bench.protect(&run);
    run.qemu.io(&["write -q -P 1 1M 256k", "flush"]);
    run.qemu.process.terminate();
    bench.site.agent.terminate();
    let mut run = bench.start();
    run.qemu.io(&["write -q -P 2 9M 256k", "flush"]);
    bench.site.restart_agent();
    let synced = bench.synced(&run, 2);
    say("written before", &synced);
    assert_eq!(synced.sync_shipped_bytes, 256 << 10, "{synced:?}");
    bench.check(&mut run);
}

#[test]
fn a_stopped_vm_on_qcow2_goes_on_without_a_sync() {
    let site = Site::start();
    let (base, image) = (site.directory().join("base.qcow2"), site.directory().join("disk.qcow2"));
    let made = |arguments: &[&str]| {
        let status = std::process::Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2"])
            .args(arguments)
            .status();
        assert!(status.expect("qemu-img runs").success());
    };
    let (base, image) = (base.to_str().expect("a path"), image.to_str().expect("a path"));
    made(&[base, "32M"]);
    made(&["-b", base, "-F", "qcow2", image]);
    let nodes = [
        json!({"driver": "qcow2", "node-name": "disk", "discard": "unmap", "file": {"driver": "file", "filename": image}}),
    ];
    let mut qemu = Qemu::storage_daemon(&site, "vm", &nodes, "disk");
    let disk = site.disk("vm", "");
    site.protect(&disk);
    qemu.io(&["write -q -P 1 1M 3M", "write -q -z 2M 1M", "flush"]);
    qemu.process.terminate();
    let mut qemu = Qemu::storage_daemon(&site, "vm", &nodes, "disk");
    let journal = wait_for("epoch 2 to be protected", || {
        let disk = site.client().disk(&disk).expect("disk");
        let protected = disk.summary.protection.phase == ProtectionPhase::Protected;
        disk.journal.filter(|journal| protected && journal.epoch == 2 && journal.ring_bytes > 0)
    });
    assert_eq!(journal.sync_read_bytes, 0, "{journal:?}");
    qemu.io(&["write -q -P 3 20M 128k", "flush"]);
    let end = site.bookmark(&disk, "end");
    let restored = site.restore(&disk, &PointSpec::Lsn(end), Via::Server);
    qemu.process.terminate();
    let raw = site.directory().join("disk.raw");
    let status =
        std::process::Command::new("qemu-img").args(["convert", "-O", "raw", image]).arg(&raw).status();
    assert!(status.expect("qemu-img runs").success());
    assert!(restored == fs::read(&raw).expect("converted"));
    // The base of the chain belongs to the image.
    let touched = fs::OpenOptions::new().write(true).open(base).expect("the base");
    touched.set_modified(std::time::SystemTime::now()).expect("set");
    let qemu = Qemu::storage_daemon(&site, "vm", &nodes, "disk");
    let journal = wait_for("epoch 3 to be synced", || {
        let journal = site.client().disk(&disk).expect("disk").journal?;
        (journal.epoch == 3 && journal.sync_read_bytes > 0).then_some(journal)
    });
    assert!(journal.sync_read_bytes > 0);
    drop(qemu);
}
