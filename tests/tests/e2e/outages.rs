//! A server that is away for long, under steady writes: the spool takes what outbox and ring cannot, and what not even the
//! spool can take becomes a gap with its reason, and is read back.
//!
//! `CDP_OUTAGE_S=600` makes the outage of the first test ten minutes long.

use std::fs::{self, File};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use cdp_api::{Kind, PointSpec, Points, ProtectionPhase};
use cdp_tests::ledger::{Writer, now_ns};
use cdp_tests::qemu::{Qemu, raw_file};
use cdp_tests::random::Random;
use cdp_tests::site::{Site, Via};
use cdp_tests::wait_for;

const DISK_BYTES: u64 = 2 << 20;
const MIB: u64 = 1 << 20;
/// What the agent keeps in memory, in MiB: the ring and the outbox.
const KEPT_MIB: u64 = 32;

struct World {
    site: Site,
    qemu: Qemu,
    disk: String,
    image: PathBuf,
    guest: Writer,
}

impl World {
    /// A guest that writes steadily to a protected disk.
    fn start(name: &str, spool_mib: &str, rest: Duration) -> Self {
        let arguments = ["--ring-mib", "16", "--outbox-mib", "16", "--spool-mib", spool_mib];
        let site = Site::start_with_agent(&arguments);
        let image = site.directory().join("disk.raw");
        File::create(&image).expect("image").set_len(DISK_BYTES).expect("size");
        let qemu = Qemu::storage_daemon(&site, name, &[raw_file(&image)], "disk");
        let disk = site.disk(qemu.vm(), "");
        site.protect(&disk);
        let mut guest = Writer::new(31, 0..DISK_BYTES, site.directory()).resting(rest);
        guest.start(&qemu.nbd_url());
        Self { site, qemu, disk, image, guest }
    }

    fn let_through(&self, requests: usize) {
        let goal = self.guest.answered() + requests;
        wait_for("the guest's requests", || {
            assert!(self.guest.is_writing(), "a guest's request failed");
            (self.guest.answered() >= goal).then_some(())
        });
    }

    fn raw_bytes(&self) -> u64 {
        self.site.client().disk(&self.disk).expect("disk").journal.expect("a journal").raw_bytes
    }

    /// Waits until the server has everything and history is whole.
    fn wait_until_whole(&self) {
        wait_for("protection to be whole", || {
            let disk = self.site.client().disk(&self.disk).ok()?;
            let caught_up = disk.journal.as_ref().is_some_and(|journal| journal.lag_s < 5.0);
            (disk.summary.protection.phase == ProtectionPhase::Protected && caught_up).then_some(())
        });
    }

    /// Compares instants picked at random between two with what the guest knows; how many of them were refused, all in gaps.
    fn check(&self, points: &Points, (from, to): (u64, u64), count: u64) -> u64 {
        let mut random = Random::of(3);
        let mut refused = 0;
        for _ in 0..count {
            let at_ns = random.within(from..to);
            match self.site.client().resolve(&self.disk, &PointSpec::Time { stamp_ns: at_ns }) {
                Ok(point) => {
                    let image = self.site.client().data(&self.disk, point.lsn, 0, DISK_BYTES).expect("data");
                    self.guest.check(&image, at_ns).unwrap_or_else(|why| panic!("LSN {}: {why}", point.lsn));
                }
                Err(error) => {
                    assert_eq!(error.problem().map(|p| p.kind), Some(Kind::PointInGap), "{error}");
                    let within =
                        |begin, end: Option<u64>| at_ns >= begin && end.is_none_or(|end| at_ns <= end);
                    let gap = points.gaps.iter().any(|gap| within(gap.from_stamp_ns, gap.to_stamp_ns));
                    assert!(gap, "{at_ns} is refused, and lies in no gap: {error}");
                    refused += 1;
                }
            }
        }
        refused
    }

    /// The guest ends well, and the newest point is the disk.
    fn end(&mut self) {
        self.guest.stop().expect("no request failed");
        let lsn = self.site.bookmark(&self.disk, "the end");
        let restored = self.site.restore(&self.disk, &PointSpec::Lsn(lsn), Via::Server);
        assert!(restored == fs::read(&self.image).expect("image"), "the newest point is not the disk");
        self.qemu.process.assert_alive();
    }
}

fn at(sorted: &[u64], percent: usize) -> u64 {
    sorted.get(sorted.len() * percent / 100).copied().unwrap_or_default()
}

#[test]
fn a_server_that_is_away_costs_lag_and_no_history() {
    let seconds =
        std::env::var("CDP_OUTAGE_S").map_or(12, |text| text.parse().expect("CDP_OUTAGE_S is a number"));
    // A long one at a pace that leaves room on the disk.
    let rest = Duration::from_millis(if seconds > 60 { 20 } else { 1 });
    let mut world = World::start("away", "16384", rest);
    let gaps = world.site.points(&world.disk).gaps;
    let begin = now_ns();
    world.let_through(500);
    world.wait_until_whole();
    let before = world.raw_bytes();
    let cut = now_ns();
    world.site.server.kill();
    thread::sleep(Duration::from_secs(seconds));
    // However slow this machine is: more than memory holds.
    world.let_through(2500);
    let back = now_ns();
    world.site.restart_server();
    // The agent is back, and the server knows that it captures: a bookmark before that would be one of what is durable.
    world.site.wait_for_phase(&world.disk, ProtectionPhase::Protected);
    // Everything before it is durable.
    world.site.bookmark(&world.disk, "back");
    let points = world.site.points(&world.disk);
    assert_eq!(points.gaps, gaps, "no new gap");
    let spooled = world.raw_bytes() - before;
    assert!(spooled > 3 * KEPT_MIB / 2 * MIB, "only {spooled} bytes: memory would have held them");
    let refused = world.check(&points, (cut, back), 60);
    assert_eq!(refused, 0, "a lost point");
    let (plain, away) = (world.guest.latencies(begin..cut), world.guest.latencies(cut..back));
    println!(
        "away for {} s: {} requests, {} MiB; latency p50 {} → {} us, p99 {} → {} us",
        (back - cut) / 1_000_000_000,
        away.len(),
        spooled / MIB,
        at(&plain, 50) / 1000,
        at(&away, 50) / 1000,
        at(&plain, 99) / 1000,
        at(&away, 99) / 1000
    );
    // Other tests run beside this one; a guest that waits for a server waits far longer.
    assert!(at(&away, 50) < 10 * at(&plain, 50), "the guest was slowed down");
    world.end();
}

#[test]
fn a_spool_that_is_full_is_a_gap_and_history_is_good_after_it() {
    let mut world = World::start("full", "64", Duration::ZERO);
    let begin = now_ns();
    world.let_through(200);
    world.site.server.kill();
    // Compressed or not, more than memory and spool hold.
    world.let_through(4000);
    world.site.restart_server();
    world.wait_until_whole();
    world.let_through(300);
    world.wait_until_whole();
    let points = world.site.points(&world.disk);
    let overflows: Vec<_> = points.gaps.iter().filter(|gap| gap.reason == "overflow").collect();
    assert!(!overflows.is_empty() && overflows.iter().all(|gap| gap.to_lsn.is_some()), "{:?}", points.gaps);
    let end = points.recoverable.last().expect("a range").to_stamp_ns;
    let refused = world.check(&points, (begin, end), 100);
    println!("{refused} of 100 instants lie in the gap");
    assert!(refused < 100, "nothing can be restored");
    world.end();
}

#[test]
fn an_agent_and_a_server_that_lost_everything_begin_anew() {
    let mut world = World::start("anew", "64", Duration::ZERO);
    world.let_through(300);
    // The server is replaced by an empty one while the agent is dead: what QEMU still holds continues nothing.
    world.site.agent.kill();
    world.site.server.kill();
    fs::remove_dir_all(world.site.store()).expect("the store is gone");
    world.let_through(300);
    world.site.restart_server();
    world.site.restart_agent();
    world.site.client().disks().expect("the server answers");
    let disk = world.site.disk(world.qemu.vm(), "");
    assert_eq!(disk, world.disk, "the same disk");
    world.site.protect(&disk);
    let begin = now_ns();
    world.let_through(300);
    world.wait_until_whole();
    let points = world.site.points(&world.disk);
    let end = points.recoverable.last().expect("a range").to_stamp_ns;
    world.check(&points, (begin, end), 30);
    world.end();
}
