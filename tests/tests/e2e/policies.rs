//! What happens to a guest when the agent stands still, under each policy; and sync mode.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use cdp_api::{PointSpec, Protection, ProtectionPhase, SyncState};
use cdp_tests::process::Process;
use cdp_tests::procfs::holdings;
use cdp_tests::qemu::{Qemu, raw_file};
use cdp_tests::random::Random;
use cdp_tests::site::{Site, Via};
use cdp_tests::wait_for;

const DISK_BYTES: u64 = 64 << 20;
/// More than the ring holds.
const BURST: &str = "write -P 7 0 24M";

struct Protected {
    qemu: Qemu,
    disk: String,
    image: PathBuf,
}

/// A disk protected in that way, with a ring of 8 MiB, and all of it synced.
fn protected(site: &Site, name: &str, how: Protection) -> Protected {
    let image = site.directory().join("disk.raw");
    File::create(&image).expect("image").set_len(DISK_BYTES).expect("size");
    let qemu = Qemu::storage_daemon(site, name, &[raw_file(&image)], "disk");
    let disk = site.disk(qemu.vm(), "");
    let how = Protection { enabled: true, ring_mib: Some(8), ..how };
    site.client().put_protection(&disk, &how).expect("on");
    site.wait_for_phase(&disk, ProtectionPhase::Protected);
    Protected { qemu, disk, image }
}

fn policy(name: &str) -> Protection {
    Protection { policy: Some(name.to_owned()), ..Protection::default() }
}

/// Stops a process where it stands, and lets it go on when dropped.
struct Frozen(u32);

impl Frozen {
    fn new(process: &Process) -> Self {
        let pid = process.pid();
        let sent = Command::new("kill").args(["-STOP", &pid.to_string()]).status().expect("kill runs");
        assert!(sent.success());
        Self(pid)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        // It may have ended meanwhile.
        let _sent = Command::new("kill").args(["-CONT", &self.0.to_string()]).status();
    }
}

/// A guest that does one thing; ended with its test.
struct Guest(Child);

impl Guest {
    fn start(protected: &Protected, command: &str) -> Self {
        Self::start_all(protected, &[command.to_owned()])
    }

    /// One request after the other.
    fn start_all(protected: &Protected, commands: &[String]) -> Self {
        let mut program = Command::new("qemu-io");
        program.args(["-t", "writeback", "-f", "raw"]);
        for command in commands.iter().map(String::as_str).chain(["flush"]) {
            program.args(["-c", command]);
        }
        program.arg(protected.qemu.nbd_url());
        Self(program.stdout(Stdio::null()).spawn().expect("qemu-io runs"))
    }

    fn is_running(&mut self) -> bool {
        self.0.try_wait().expect("a child").is_none()
    }

    /// Waits for its end, which must be a good one.
    fn finish(&mut self) {
        let status = wait_for("the guest to go on", || self.0.try_wait().expect("a child"));
        assert!(status.success(), "a guest's request has failed");
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // It may have ended already.
        let _ended = self.0.kill();
        let _reaped = self.0.wait();
    }
}

fn overflows(site: &Site, protected: &Protected) -> usize {
    site.points(&protected.disk).gaps.iter().filter(|gap| gap.reason == "overflow").count()
}

/// Waits until the server knows that records are missing, why, and where that ends.
fn wait_for_the_gap(site: &Site, protected: &Protected, reason: &str) {
    wait_for("the end of a gap", || {
        let gaps = site.points(&protected.disk).gaps;
        gaps.iter().any(|gap| gap.reason == reason && gap.to_lsn.is_some()).then_some(())
    });
}

fn assert_restores_the_disk(site: &Site, protected: &Protected) {
    site.wait_for_phase(&protected.disk, ProtectionPhase::Protected);
    let lsn = site.bookmark(&protected.disk, "end");
    let restored = site.restore(&protected.disk, &PointSpec::Lsn(lsn), Via::Server);
    assert!(restored == fs::read(&protected.image).expect("image"), "the restored image differs");
}

#[test]
fn strict_waits_for_a_frozen_agent_and_loses_nothing() {
    let site = Site::start();
    let protected = protected(&site, "strict", policy("strict"));
    let frozen = Frozen::new(&site.agent);
    let mut guest = Guest::start(&protected, BURST);
    std::thread::sleep(Duration::from_secs(2));
    assert!(guest.is_running(), "it has not waited");
    drop(frozen);
    guest.finish();
    assert_restores_the_disk(&site, &protected);
    assert_eq!(overflows(&site, &protected), 0);
}

#[test]
fn strict_does_not_hold_up_qemus_end() {
    let site = Site::start();
    let mut protected = protected(&site, "quit", policy("strict"));
    let frozen = Frozen::new(&site.agent);
    let mut guest = Guest::start(&protected, BURST);
    std::thread::sleep(Duration::from_secs(1));
    assert!(guest.is_running(), "it has not waited");
    protected.qemu.process.terminate();
    drop(frozen);
}

/// The server's disk is full, then all that is between it and the guest; the operator chooses the guest.
#[test]
fn a_request_that_waits_under_strict_goes_on_when_the_policy_is_changed_to_track() {
    let mut site = Site::start_with_agent(&["--outbox-mib", "16", "--spool-mib", "64"]);
    let protected = protected(&site, "changed", policy("strict"));
    site.server.kill();
    site.restart_server_with(&["--drill", "disk-full-after=1MiB"]);
    site.wait_for_phase(&protected.disk, ProtectionPhase::Protected);
    let noise = site.directory().join("noise");
    fs::write(&noise, Random::seeded(6).bytes(1 << 20)).expect("a file");
    let write = |at: u64| format!("write -q -s {} {}M 1M", noise.display(), at % 60);
    // More than ring, outbox, spool and what the server still takes.
    let mut guest = Guest::start_all(&protected, &(0..140).map(write).collect::<Vec<_>>());
    let protection = || site.client().disk(&protected.disk).expect("disk").summary.protection;
    wait_for("a request that waits", || {
        assert!(guest.is_running(), "it has not waited");
        (protection().waiting > 0).then_some(())
    });
    assert_eq!(overflows(&site, &protected), 0);
    let track = Protection { enabled: true, ..policy("track") };
    site.client().put_protection(&protected.disk, &track).expect("the agent is there");
    guest.finish();
    wait_for("nobody to wait, and a gap to be under way", || {
        let now = protection();
        (now.waiting == 0 && now.phase == ProtectionPhase::Tracking).then_some(())
    });
    site.server.kill();
    site.restart_server();
    wait_for_the_gap(&site, &protected, "overflow");
    assert_restores_the_disk(&site, &protected);
}

#[test]
fn a_ring_that_fills_up_while_the_agent_is_dead_is_a_gap_that_says_so() {
    let mut site = Site::start();
    let protected = protected(&site, "agentless", policy("track"));
    let qemu = protected.qemu.process.pid();
    let connected = holdings(qemu).fds;
    site.agent.kill();
    // It closes its end of the agent's socket when it knows.
    wait_for("QEMU to notice", || (holdings(qemu).fds < connected).then_some(()));
    Guest::start(&protected, BURST).finish();
    site.restart_agent();
    wait_for_the_gap(&site, &protected, "agent-lost");
    assert_restores_the_disk(&site, &protected);
    assert_eq!(overflows(&site, &protected), 0);
}

#[test]
fn track_never_waits_for_a_frozen_agent() {
    let site = Site::start();
    let protected = protected(&site, "track", policy("track"));
    let frozen = Frozen::new(&site.agent);
    // All of it, and more, while the agent stands still.
    Guest::start(&protected, BURST).finish();
    Guest::start(&protected, "write -P 8 24M 24M").finish();
    drop(frozen);
    wait_for_the_gap(&site, &protected, "overflow");
    assert_restores_the_disk(&site, &protected);
    assert_eq!(overflows(&site, &protected), 1);
}

#[test]
fn throttle_waits_its_time_once_and_then_tracks() {
    let site = Site::start();
    let protected =
        protected(&site, "throttle", Protection { throttle_ms: Some(1500), ..policy("throttle") });
    let frozen = Frozen::new(&site.agent);
    let began = Instant::now();
    Guest::start(&protected, BURST).finish();
    assert!(began.elapsed() >= Duration::from_millis(1500), "it has not waited");
    drop(frozen);
    wait_for_the_gap(&site, &protected, "overflow");
    assert_restores_the_disk(&site, &protected);
    assert_eq!(overflows(&site, &protected), 1);
}

#[test]
fn with_sync_a_flush_that_completed_survives_the_end_of_everything() {
    let mut site = Site::start();
    let how = Protection { sync: Some(true), sync_timeout_ms: Some(60_000), ..Protection::default() };
    let mut protected = protected(&site, "sync", how);
    let state = || site.client().disk(&protected.disk).expect("disk").summary.protection.sync_state;
    wait_for("sync to be in force", || (state() == SyncState::InForce).then_some(()));
    for round in 1..=5_u8 {
        protected.qemu.io(&[format!("write -P {round} {round}M 64k"), "flush".to_owned()]);
    }
    protected.qemu.process.kill();
    site.agent.kill();
    site.server.kill();
    let restored = site.restore(&protected.disk, &PointSpec::Latest, Via::Store);
    for round in 1..=5_usize {
        assert_eq!(restored[round << 20], round as u8, "a flushed write is missing");
    }
}

#[test]
fn a_flush_waits_for_a_frozen_server_and_sync_that_was_lost_comes_back() {
    let site = Site::start();
    let how = Protection { sync: Some(true), sync_timeout_ms: Some(60_000), ..Protection::default() };
    let protected = protected(&site, "frozen", how);
    let frozen = Frozen::new(&site.server);
    let mut guest = Guest::start(&protected, "write -P 1 0 64k");
    std::thread::sleep(Duration::from_secs(1));
    assert!(guest.is_running(), "the flush has not waited");
    drop(frozen);
    guest.finish();
    let shorter = Protection { enabled: true, sync_timeout_ms: Some(300), ..Protection::default() };
    site.client().put_protection(&protected.disk, &shorter).expect("changed");
    let frozen = Frozen::new(&site.server);
    let mut guest = Guest::start(&protected, "write -P 2 0 64k");
    // The server stands still, and the guest goes on.
    guest.finish();
    drop(frozen);
    let state = || site.client().disk(&protected.disk).expect("disk").summary.protection.sync_state;
    wait_for("sync to be in force again", || (state() == SyncState::InForce).then_some(()));
    assert_restores_the_disk(&site, &protected);
}
