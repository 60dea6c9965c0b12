//! An agent that is killed, and the one that comes after it.

mod common;

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use capture_ring::{HostClock, Mode};
use common::filter::{DISK_BYTES, FakeDisk, FakeFilter};
use common::server::{FakeServer, Journal};
use common::{noise, wait_for};
use journal_format::{GapReason, Op};

/// An agent in a process of its own; killed when dropped.
struct Agent(Child);

impl Agent {
    fn start(dir: &Path, server: &FakeServer) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_cdp-agent"))
            .args(["--server", &server.address(), "--ring-mib", "128", "--outbox-mib", "16"])
            .arg("--socket")
            .arg(dir.join("agent.sock"))
            .arg("--spool-dir")
            .arg(dir.join("spool"))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.starts_with("ready "), "{line}");
        Self(child)
    }

    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Bench {
    dir: tempfile::TempDir,
    server: FakeServer,
    agent: Agent,
    filter: FakeFilter,
    id: Vec<u8>,
}

impl Bench {
    /// A protected disk, synced.
    fn start(devices: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let server = FakeServer::start();
        let agent = Agent::start(dir.path(), &server);
        let filter = FakeFilter::connect(&dir.path().join("agent.sock"), "vm", devices);
        let id = server.wait_for_disk("vm", devices[0]).disk;
        assert_eq!(server.set_protection(&id, true).error, "");
        let bench = Self { dir, server, agent, filter, id };
        bench.disk().resync();
        bench
    }

    fn disk(&self) -> Arc<FakeDisk> {
        self.filter.disk("virtio0")
    }

    /// Kills the agent and starts the next, to which the filter connects again.
    fn restart(&mut self, devices: &[&str]) {
        self.agent.kill();
        self.come_back(devices);
    }

    fn come_back(&mut self, devices: &[&str]) {
        let before = self.server.connections();
        self.agent = Agent::start(self.dir.path(), &self.server);
        wait_for("its connection", || (self.server.connections() > before).then_some(()));
        self.filter = self.filter.again(&self.dir.path().join("agent.sock"), devices);
        self.server.wait_for_disk("vm", devices[0]);
    }

    fn caught_up(&self) -> Journal {
        let captured = self.disk().producer().ring().captured_lsn().0;
        self.server.wait_for_journal(&self.id, "everything captured", |journal| journal.durable >= captured)
    }

    fn assert_no_gap(&self, journal: &Journal) {
        self.server.check();
        assert_eq!(journal.epoch, 1, "the epoch went on");
        for (i, (record, _)) in journal.records.iter().enumerate() {
            assert_eq!(record.lsn.0, i as u64 + 1);
        }
        let gaps = journal.ops().filter(|op| matches!(op, Op::GapBegin { .. })).count();
        assert_eq!(gaps, 1, "only that of the attach");
        assert!(
            journal.image(DISK_BYTES) == *self.disk().image.lock().unwrap(),
            "the journal is not the disk"
        );
    }
}

/// `docs/operating/running.md` tells operators to count on this.
#[test]
fn a_protected_disk_costs_few_descriptors() {
    const DISKS: usize = 5;
    let devices = ["virtio0", "virtio1", "virtio2", "virtio3", "virtio4"];
    let bench = Bench::start(&devices);
    let count = || std::fs::read_dir(format!("/proc/{}/fd", bench.agent.0.id())).unwrap().count();
    let with_one = count();
    for device in &devices[1..] {
        let id = bench.server.wait_for_disk("vm", device).disk;
        assert_eq!(bench.server.set_protection(&id, true).error, "");
    }
    let more = count() - with_one;
    assert!(more > 0 && more <= 10 * (DISKS - 1), "{more} for {} more disks", DISKS - 1);
}

fn scribble(disk: &FakeDisk, seed: u64, count: u64) {
    for i in 0..count {
        let n = seed.wrapping_mul(1000).wrapping_add(i);
        let len = [512, 4096, 5000, 65536, 300_000][usize::try_from(n % 5).unwrap()];
        let offset = n.wrapping_mul(0x9e37_79b9) % (DISK_BYTES - len);
        disk.write(offset, &noise(n, usize::try_from(len).unwrap()));
    }
}

#[test]
fn agents_killed_under_load_lose_no_record() {
    let mut bench = Bench::start(&["virtio0"]);
    let disk = bench.disk();
    let (stop, writes) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let load = {
        let (disk, stop, writes) = (Arc::clone(&disk), Arc::clone(&stop), Arc::clone(&writes));
        std::thread::spawn(move || {
            let mut n = 0;
            // ORDERING: a flag and a counter that stand alone.
            while !stop.load(Ordering::Relaxed) {
                scribble(&disk, n, 5);
                n += 1;
                writes.store(n, Ordering::Relaxed);
                // A guest that the ring can hold for as long as no agent is there.
                std::thread::sleep(Duration::from_millis(12));
            }
        })
    };
    for round in 0..25 {
        let before = bench.server.journal(&bench.id).durable;
        bench.server.wait_for_journal(&bench.id, "progress", |journal| journal.durable > before + 5);
        std::thread::sleep(Duration::from_micros(round * 397 % 5000));
        bench.restart(&["virtio0"]);
    }
    // ORDERING: as above.
    stop.store(true, Ordering::Relaxed);
    load.join().unwrap();
    let journal = bench.caught_up();
    bench.assert_no_gap(&journal);
    assert!(writes.load(Ordering::Relaxed) > 100);
}

#[test]
fn agents_killed_while_the_server_is_away_lose_no_record() {
    let mut bench = Bench::start(&["virtio0"]);
    bench.caught_up();
    bench.server.withhold_acks(true);
    for round in 0..5 {
        scribble(&bench.disk(), round, 20);
        // It is taken out of the ring, and waits.
        wait_for("an empty ring", || (bench.disk().producer().ring().backlog() == 0).then_some(()));
        bench.restart(&["virtio0"]);
    }
    wait_for("an agent that opens the disk", || {
        (bench.server.journal(&bench.id).opens.len() > 5).then_some(())
    });
    bench.server.withhold_acks(false);
    scribble(&bench.disk(), 9, 5);
    let journal = bench.caught_up();
    bench.assert_no_gap(&journal);
    assert!(journal.opens[1..].iter().all(|epoch| *epoch == 1), "{:?}", journal.opens);
}

#[test]
fn a_disk_unplugged_while_no_agent_was_there_is_shipped_to_its_end() {
    let mut bench = Bench::start(&["virtio0", "virtio1"]);
    let disk = bench.disk();
    bench.agent.kill();
    scribble(&disk, 3, 20);
    let captured = disk.producer().ring().captured_lsn().0;
    disk.detach();
    bench.come_back(&["virtio1"]);
    bench.server.wait_for_journal(&bench.id, "all its writes", |journal| journal.durable == captured);
    wait_for("the end of what is held", || (!disk.is_held()).then_some(()));
}

#[test]
fn protection_switched_off_while_no_agent_was_there_ends_the_capture() {
    let mut bench = Bench::start(&["virtio0"]);
    let disk = bench.disk();
    bench.agent.kill();
    scribble(&disk, 3, 20);
    let captured = disk.producer().ring().captured_lsn().0;
    bench.come_back(&["virtio0"]);
    bench.server.wait_for_disk("vm", "virtio0");
    assert_eq!(bench.server.set_protection(&bench.id, false).error, "");
    assert!(!disk.is_attached());
    assert!(bench.server.journal(&bench.id).durable >= captured);
    wait_for("the end of what is held", || (!disk.is_held()).then_some(()));
}

#[test]
fn an_adopted_process_keeps_one_clock_for_all_its_disks() {
    use std::os::fd::AsFd;
    let mut bench = Bench::start(&["virtio0", "virtio1"]);
    bench.restart(&["virtio0", "virtio1"]);
    let other = bench.server.wait_for_disk("vm", "virtio1").disk;
    assert_eq!(bench.server.set_protection(&other, true).error, "");
    let mut clocks = Vec::new();
    for device in ["virtio0", "virtio1"] {
        bench.filter.disk(device).tamper(|fds| clocks.push(HostClock::open(fds.clock.as_fd()).unwrap()));
    }
    let now = clocks[0].now();
    assert_eq!(clocks[1].last(), now, "two handles to one page");
    assert!(clocks[1].now() > now);
}

/// What a hostile filter may hand over instead of what it was given.
#[test]
fn what_was_tampered_with_is_refused_and_a_new_epoch_begins() {
    use std::os::fd::AsFd;
    let dup = |fd: &std::os::fd::OwnedFd| fd.as_fd().try_clone_to_owned().unwrap();
    let null = || std::os::fd::OwnedFd::from(File::open("/dev/null").unwrap());
    for case in 0..6 {
        let mut bench = Bench::start(&["virtio0"]);
        bench.caught_up();
        bench.agent.kill();
        scribble(&bench.disk(), 1, 5);
        bench.disk().tamper(|fds| match case {
            0 => fds.outbox = null(),
            1 => fds.outbox = dup(&fds.ring),
            2 => fds.bell = null(),
            3 => fds.clock = dup(&fds.outbox),
            4 => fds.ring = dup(&fds.clock),
            // The ring says that records were taken which are in no outbox.
            _ => File::from(dup(&fds.ring)).write_all_at(&1_000_u64.to_le_bytes(), 4096 + 512).unwrap(),
        });
        bench.come_back(&["virtio0"]);
        bench.server.wait_for_disk("vm", "virtio0");
        // The server asks for protection as long as there is none.
        wait_for("a new epoch", || {
            let result = bench.server.set_protection(&bench.id, true);
            (result.error.is_empty() && bench.server.journal(&bench.id).epoch > 1).then_some(())
        });
        let journal = bench.caught_up();
        assert!(
            matches!(journal.ops().last(), Some(Op::GapBegin { reason: GapReason::AgentLost, .. })),
            "{case}"
        );
        assert_eq!(bench.disk().mode(), Mode::Capturing);
    }
}

#[test]
fn a_second_agent_on_one_socket_is_refused_by_name_of_the_first() {
    let bench = Bench::start(&["virtio0"]);
    // Even when the socket's file is gone.
    std::fs::remove_file(bench.dir.path().join("agent.sock")).unwrap();
    let second = Command::new(env!("CARGO_BIN_EXE_cdp-agent"))
        .arg("--socket")
        .arg(bench.dir.path().join("agent.sock"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(!second.status.success());
    assert!(said.contains(&format!("process {}", bench.agent.0.id())), "{said}");
}
