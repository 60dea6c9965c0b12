//! Faults at random, for as long as one likes, under guests that write all the time: the programs are killed, stopped
//! and frozen, the network stalls and is cut, the server's disk fails and its bytes rot, strangers talk nonsense, QEMU dies,
//! protection is switched off and on, settings are changed, snapshots made and committed ([`fault::Fault`]). In between and at the end instants are
//! picked at random, and what is restored there is compared with what the guests themselves know.
//!
//! `CDP_FAULTS` says how many faults (a few, if it is not set), `CDP_TEST_SEED` which, `CDP_FAULTS_ONLY` which kinds, as
//! `QemuKilled,ServerFrozen`. What holds:
//!
//! - no request of a guest fails, unless its own QEMU was killed;
//! - an instant that is listed as recoverable restores, for every guest, to a state that it had at that instant;
//! - an instant that is refused is not listed, unless its bytes are rotten just then, which the refusal says;
//! - a gap begins only where QEMU died or protection was switched off: no other fault costs a single point;
//! - in the end, the newest point is what the disk's file holds.

mod fault;
mod rot;
mod strangers;
mod sync;

use std::fs::{self, File};
use std::path::PathBuf;
use std::time::Duration;

use cdp_api::{ClientError, Kind, PointSpec, Points, Protection, ProtectionPhase};
use cdp_tests::ledger::{Writer, now_ns};
use cdp_tests::network::Weather;
use cdp_tests::qemu::{Qemu, create_qcow2, qcow2_file, raw_file};
use cdp_tests::random::Random;
use cdp_tests::site::{Site, Via};
use cdp_tests::wait_for;

use serde_json::{Value, json};

use fault::Fault;
use rot::Rot;
use strangers::Strangers;

const REGION_BYTES: u64 = 256 << 10;
const GUESTS: u64 = 3;
const DISK_BYTES: u64 = REGION_BYTES * GUESTS;

struct World {
    site: Site,
    qemu: Qemu,
    disk: String,
    image: PathBuf,
    guests: Vec<Writer>,
    random: Random,
    /// Faults to choose from.
    kinds: Vec<Fault>,
    rot: Option<Rot>,
    strangers: Option<Strangers>,
    /// Gaps that there must be.
    gaps: usize,
    checked: usize,
    refused: usize,
}

impl World {
    fn new(seed: u64) -> Self {
        let random = Random::seeded(seed);
        let site = Site::start_with_network();
        let image = site.directory().join("disk.raw");
        File::create(&image).expect("image").set_len(DISK_BYTES).expect("size");
        let qemu = Qemu::storage_daemon(&site, "faults", &[raw_file(&image)], "disk");
        let disk = site.disk(qemu.vm(), "");
        site.protect(&disk);
        let guests = (0..GUESTS).map(|i| {
            Writer::new(seed * 1000 + i, i * REGION_BYTES..(i + 1) * REGION_BYTES, site.directory())
        });
        let guests = guests.collect();
        let mut world = Self {
            site,
            qemu,
            disk,
            image,
            guests,
            random,
            kinds: fault::kinds(),
            rot: None,
            strangers: None,
            gaps: 1,
            checked: 0,
            refused: 0,
        };
        world.start_guests();
        world
    }

    fn start_guests(&mut self) {
        let url = self.qemu.nbd_url();
        self.guests.iter_mut().for_each(|guest| guest.start(&url));
    }

    fn let_through(&mut self, requests: u64) {
        let goals: Vec<_> = self.guests.iter().map(|guest| guest.answered() + requests as usize).collect();
        wait_for("the guests' requests", || {
            let failed = self.guests.iter_mut().find(|guest| !guest.is_writing()).map(Writer::stop);
            assert!(failed.is_none(), "a guest's request failed: {failed:?}");
            self.guests.iter().zip(&goals).all(|(guest, goal)| guest.answered() >= *goal).then_some(())
        });
    }

    fn strike(&mut self, fault: Fault) {
        match fault {
            Fault::AgentKilled => self.site.agent.kill(),
            Fault::AgentStopped => self.site.agent.terminate(),
            Fault::AgentFrozen => self.site.agent.freeze(),
            Fault::ServerKilled => self.site.server.kill(),
            Fault::ServerStopped => self.site.server.terminate(),
            Fault::ServerFrozen => self.site.server.freeze(),
            Fault::BothKilled => self.kill_both(),
            Fault::NetworkDown => self.site.network().set(Weather::Down),
            Fault::NetworkStalled => self.site.network().set(Weather::Stalled),
            Fault::NetworkSlow => self.site.network().set(Weather::Slow),
            Fault::StoreFails => {
                let drill = fault::drill(&mut self.random);
                println!("  {drill}");
                self.site.server.kill();
                self.site.restart_server_with(&["--drill", &drill]);
            }
            Fault::ByteRots => {
                self.site.server.kill();
                let directory = self.site.store().join("disks").join(&self.disk);
                self.rot = Some(Rot::strike(&directory, &mut self.random));
                self.site.restart_server();
            }
            Fault::Strangers => self.strangers = Some(Strangers::come(&self.site, &mut self.random)),
            Fault::SettingsChanged => self.change_settings(),
            Fault::NodesChanged => self.put_overlay(),
            Fault::QemuKilled => self.kill_qemu(),
            Fault::EverythingKilled => {
                if self.random.chance(50) {
                    self.kill_both();
                    self.kill_qemu();
                } else {
                    self.kill_qemu();
                    self.kill_both();
                }
            }
            Fault::ProtectionOff => self.site.unprotect(&self.disk),
        }
    }

    fn heal(&mut self, fault: Fault) {
        match fault {
            Fault::AgentKilled | Fault::AgentStopped => self.site.restart_agent(),
            Fault::AgentFrozen => self.site.agent.thaw(),
            Fault::ServerKilled | Fault::ServerStopped => self.site.restart_server(),
            Fault::ServerFrozen => self.site.server.thaw(),
            Fault::BothKilled => self.restart_both(),
            Fault::NetworkDown | Fault::NetworkStalled | Fault::NetworkSlow => {
                self.site.network().set(Weather::Clear);
            }
            Fault::StoreFails => {
                self.site.server.kill();
                self.site.restart_server();
            }
            Fault::ByteRots => {
                self.check(5);
                self.site.server.kill();
                if let Some(rot) = self.rot.take() {
                    rot.heal();
                }
                self.site.restart_server();
            }
            Fault::Strangers => {
                if let Some(mut strangers) = self.strangers.take() {
                    strangers.listen();
                }
            }
            Fault::SettingsChanged => {}
            Fault::NodesChanged => self.commit_overlay(),
            Fault::QemuKilled => self.restart_qemu(),
            Fault::EverythingKilled => {
                self.restart_both();
                self.restart_qemu();
            }
            Fault::ProtectionOff => self.site.protect(&self.disk),
        }
        self.gaps += usize::from(fault.costs_history());
    }

    fn put_overlay(&mut self) {
        self.guests.iter().for_each(|guest| guest.zeroes_only(true));
        self.let_through(2);
        let path = self.site.directory().join("overlay.qcow2");
        create_qcow2(&path, DISK_BYTES);
        let mut node = qcow2_file(&path);
        node["node-name"] = json!("overlay");
        node["backing"] = Value::Null;
        self.qemu.qmp.run("blockdev-add", node);
        self.qemu.qmp.run("blockdev-snapshot", json!({"node": "disk", "overlay": "overlay"}));
    }

    fn commit_overlay(&mut self) {
        let qmp = &mut self.qemu.qmp;
        qmp.run("block-commit", json!({"job-id": "commit", "device": "overlay", "base-node": "disk"}));
        let _ready = qmp.event("BLOCK_JOB_READY");
        qmp.run("block-job-complete", json!({"device": "commit"}));
        let completed = qmp.event("BLOCK_JOB_COMPLETED");
        assert!(completed["data"].get("error").is_none(), "{completed}");
        wait_for("the overlay to be free", || {
            let jobs = qmp.run("query-jobs", json!({}));
            jobs.as_array().is_some_and(Vec::is_empty).then_some(())
        });
        qmp.run("blockdev-del", json!({"node-name": "overlay"}));
        self.guests.iter().for_each(|guest| guest.zeroes_only(false));
    }

    fn kill_qemu(&mut self) {
        self.qemu.process.kill();
        let ended: Vec<_> = self.guests.iter_mut().map(Writer::stop).collect();
        assert!(ended.iter().any(Result::is_err), "nobody noticed that QEMU is dead");
        let disk = fs::read(&self.image).expect("image");
        self.guests.iter_mut().for_each(|guest| guest.settle(&disk));
    }

    fn restart_qemu(&mut self) {
        self.qemu = Qemu::storage_daemon(&self.site, "faults", &[raw_file(&self.image)], "disk");
        self.start_guests();
    }

    fn kill_both(&mut self) {
        self.site.server.kill();
        self.site.agent.kill();
    }

    fn restart_both(&mut self) {
        if self.random.chance(50) {
            self.site.restart_server();
            self.site.restart_agent();
        } else {
            self.site.restart_agent();
            self.site.restart_server();
        }
    }

    fn change_settings(&mut self) {
        let policies = ["track", "throttle", "strict"];
        let settings = Protection {
            enabled: true,
            policy: Some(policies[self.random.within(0..3) as usize].to_owned()),
            throttle_ms: Some(self.random.within(1..3000)),
            ring_mib: Some(self.random.within(32..100)),
            sync: Some(self.random.chance(50)),
            sync_timeout_ms: Some(self.random.within(1..500)),
        };
        println!("  {settings:?}");
        let changed = wait_for("an agent that takes the settings", || {
            match self.site.client().put_protection(&self.disk, &settings) {
                Err(error) if error.problem().is_some_and(|p| p.kind == Kind::AgentOffline) => None,
                answer => Some(answer),
            }
        });
        changed.unwrap_or_else(|e| panic!("new settings: {e:?}"));
    }

    /// Everything works, and the last fault is over for the disk too.
    fn wait_until_whole(&self) {
        wait_for("protection to be whole", || {
            let disk = self.site.client().disk(&self.disk).ok()?;
            let caught_up = disk.journal.as_ref().is_some_and(|journal| journal.lag_s < 5.0);
            (disk.summary.protection.phase == ProtectionPhase::Protected && caught_up).then_some(())
        });
    }

    fn one_fault(&mut self) {
        let fault = self.kinds[self.random.within(0..self.kinds.len() as u64) as usize];
        println!("{fault:?}");
        let (before, during) = (self.random.within(1..40), self.random.within(0..60));
        self.let_through(before);
        self.strike(fault);
        if fault.kills_qemu() {
            std::thread::sleep(Duration::from_millis(during));
        } else {
            self.let_through(during);
        }
        self.heal(fault);
        let after = self.random.within(1..20);
        self.let_through(after);
        // Often the next fault comes before this one is over.
        if self.random.chance(60) {
            self.wait_until_whole();
            self.check(15);
        }
    }

    /// Restores at instants picked at random, and compares with what the guests know.
    fn check(&mut self, count: usize) {
        let points = match self.site.client().points(&self.disk) {
            Err(error) if self.is_rotten(&error) => return,
            answer => answer.unwrap_or_else(|e| panic!("points: {e:?}")),
        };
        let (first, last) = (points.recoverable.first(), points.recoverable.last());
        let Some((first, last)) = first.zip(last) else {
            assert!(self.rot.is_some(), "nothing is recoverable");
            return;
        };
        for _ in 0..count {
            let at_ns = self.random.within(first.from_stamp_ns..last.to_stamp_ns + 1);
            self.check_instant(&points, at_ns);
        }
        for _ in 0..count / 4 {
            let lsn = self.random.within(first.from_lsn..last.to_lsn + 1);
            self.check_lsn(&points, lsn);
        }
    }

    fn check_instant(&mut self, points: &Points, at_ns: u64) {
        let listed = points.recoverable.iter().any(|r| (r.from_stamp_ns..=r.to_stamp_ns).contains(&at_ns));
        match self.site.client().resolve(&self.disk, &PointSpec::Time { stamp_ns: at_ns }) {
            Ok(point) => self.compare(point.lsn, at_ns),
            Err(error) => {
                let in_gap = error.problem().is_some_and(|problem| problem.kind == Kind::PointInGap);
                let excused = self.is_rotten(&error) || (in_gap && !listed);
                assert!(excused, "{at_ns} is refused (listed: {listed}): {error}");
                self.refused += 1;
            }
        }
    }

    fn check_lsn(&mut self, points: &Points, lsn: u64) {
        let listed = points.recoverable.iter().any(|range| (range.from_lsn..=range.to_lsn).contains(&lsn));
        match self.site.client().resolve(&self.disk, &PointSpec::Lsn(lsn)) {
            Ok(point) => self.compare(lsn, point.stamp_ns),
            Err(error) => {
                assert!(self.is_rotten(&error) || !listed, "LSN {lsn} is refused and listed: {error}");
                self.refused += 1;
            }
        }
    }

    /// Whether a refusal says that stored bytes are not what was written, while one is not.
    fn is_rotten(&self, error: &ClientError) -> bool {
        self.rot.is_some() && error.problem().is_some_and(|problem| problem.kind == Kind::Damaged)
    }

    fn compare(&mut self, lsn: u64, at_ns: u64) {
        let image = if self.rot.is_none() && self.random.chance(5) {
            let via = if self.random.chance(50) { Via::Server } else { Via::Store };
            self.site.restore(&self.disk, &PointSpec::Lsn(lsn), via)
        } else {
            match self.site.client().data(&self.disk, lsn, 0, DISK_BYTES) {
                Err(error) if self.is_rotten(&error) => {
                    self.refused += 1;
                    return;
                }
                answer => answer.unwrap_or_else(|e| panic!("the data at LSN {lsn}: {e:?}")),
            }
        };
        for guest in &self.guests {
            guest.check(&image, at_ns).unwrap_or_else(|why| panic!("LSN {lsn}, at {at_ns}: {why}"));
        }
        self.checked += 1;
    }

    fn end(&mut self) {
        self.wait_until_whole();
        let failed: Vec<_> = self.guests.iter_mut().filter_map(|guest| guest.stop().err()).collect();
        assert!(failed.is_empty(), "guest requests failed: {failed:?}");
        let lsn = self.site.bookmark(&self.disk, "the end");
        self.compare(lsn, now_ns());
        let restored = self.site.restore(&self.disk, &PointSpec::Lsn(lsn), Via::Server);
        assert!(restored == fs::read(&self.image).expect("image"), "the newest point is not the disk");
        self.check(200);
        let gaps = self.site.points(&self.disk).gaps;
        // (Fewer, where one such fault followed another so soon that one gap covers both.)
        assert!(gaps.len() <= self.gaps, "{} faults cost history, but there are {gaps:?}", self.gaps - 1);
    }
}

#[test]
fn no_fault_costs_a_point_or_makes_one_wrong() {
    let faults = std::env::var("CDP_FAULTS").map_or(30, |text| text.parse().expect("CDP_FAULTS is a number"));
    let mut world = World::new(50);
    for _ in 0..faults {
        world.one_fault();
    }
    world.end();
    println!(
        "{faults} faults survived; {} points compared, {} refused in {} gaps",
        world.checked, world.refused, world.gaps
    );
}
