//! One run: the VM, the agent, the network and the server, and what each of them does in a step.

mod faults;
mod guest;
mod host;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use capture_ring::Mode;
use host_agent::identity::disk_id;
use host_agent::session::FilterId;
use host_agent::spool::SpoolPlace;
use journal_format::wire::ProtectionOptions;
use journal_format::{DiskId, Epoch, ImageTag, Stamp};
use journal_store::StoreConfig;
use tempfile::TempDir;

use super::agent::{Agent, Sizes, ToAgent, ToFilter};
use super::check::Checks;
use super::guest::{DISKS, Vm, set_now};
use super::model::{Model, SECTOR};
use super::net::Conn;
use super::run::Trace;
use super::server::Server;
use cdp_tests::random::Random;

/// Stamps begin here, in the year 2096: later than any wall clock, so that time is what the run says.
pub(crate) const BASE_NS: u64 = 4_000_000_000_000_000_000;

const HOST: [u8; 16] = [0x51; 16];
const VM_UUID: [u8; 16] = [0x52; 16];
const DEVICES: [&str; DISKS] = ["vda", "vdb"];

/// Sectors at the beginning of each disk that hold the ledger.
const LEDGER: usize = 1;

/// How often the filter looks at its disks.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// How likely things are, drawn for each run: what is rare in one is common in another.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Weights {
    pub(crate) guest: u64,
    pub(crate) disk: u64,
    pub(crate) resync: u64,
    pub(crate) drain: u64,
    pub(crate) agent: u64,
    pub(crate) server: u64,
    pub(crate) fault: u64,
    pub(crate) step_us: u64,
    pub(crate) eio: u64,
    pub(crate) resizes: bool,
    pub(crate) faults: u64,
}

/// Everything of a run.
pub(crate) struct World {
    pub(crate) random: Random,
    pub(crate) now: Duration,
    pub(crate) trace: Trace,
    weights: Weights,
    sizes: Sizes,
    /// The spool's folder; it survives the agent.
    _spool: TempDir,
    /// What is on the VM's disks.
    pub(crate) images: [Vec<u8>; DISKS],
    /// Counts the changes of each image: its time of change, in a world where that is exact.
    pub(crate) changes: [u64; DISKS],
    pub(crate) models: [Model; DISKS],
    pub(crate) ids: [DiskId; DISKS],
    vm: Option<Vm>,
    /// Captures of dead QEMUs: their memory is gone, but nothing of theirs may run any more.
    graveyard: Vec<Vm>,
    next_pid: u32,
    pub(crate) agent: Option<Agent>,
    agent_gone: Duration,
    /// What the agent that is gone had thrown away.
    discarded: BTreeSet<(DiskId, Epoch)>,
    /// Agents that died.
    agents_gone: u64,
    /// QEMUs that ended, in whichever way.
    vms_gone: u64,
    /// The agent was asked to stop; when its time is over.
    agent_stops: Option<Duration>,
    /// The filter's connection to the agent.
    filter: Option<FilterId>,
    /// The agent's end of it is closed: what was sent before still arrives.
    filter_closing: bool,
    orders: VecDeque<(FilterId, ToFilter)>,
    next_filter: u64,
    /// Sizes as the filter listed them last.
    listed: [u64; DISKS],
    look_at: Duration,
    to_agent: VecDeque<ToAgent>,
    conns: BTreeMap<u64, Conn>,
    next_conn: u64,
    pub(crate) server: Server,
    server_gone: Duration,
    healthy: bool,
    /// Counts beginnings and ends of requests, on all disks.
    moments: u64,
    next_op: u64,
    /// The next number that the guest writes to one disk and then to the other.
    ledger: u64,
    pub(crate) checks: Checks,
    pub(crate) faults: u64,
}

impl World {
    pub(crate) fn new(seed: u64, trace: Trace) -> Self {
        let mut random = Random::of(seed);
        let pick = |random: &mut Random, from: &[u64]| from[random.within(0..from.len() as u64) as usize];
        let weights = Weights {
            guest: pick(&mut random, &[2, 6, 12]),
            disk: pick(&mut random, &[4, 12, 20]),
            resync: pick(&mut random, &[2, 8, 16]),
            drain: pick(&mut random, &[1, 6, 12]),
            agent: pick(&mut random, &[2, 6, 12]),
            server: pick(&mut random, &[1, 4, 8]),
            fault: pick(&mut random, &[1, 2, 4, 8]),
            step_us: pick(&mut random, &[200, 1000, 5000, 20_000]),
            eio: pick(&mut random, &[0, 0, 2, 10]),
            resizes: random.chance(40),
            faults: random.next_u64(),
        };
        let spool = tempfile::tempdir().expect("a folder");
        let sizes = Sizes {
            arena_bytes: pick(&mut random, &[512 << 10, 1 << 20, 2 << 20]),
            slots: pick(&mut random, &[64, 256, 1024]) as u32,
            outbox_bytes: pick(&mut random, &[1 << 20, 2 << 20, 8 << 20, 10 << 20, 20 << 20]),
            spool: SpoolPlace {
                folder: spool.path().to_owned(),
                limit_bytes: pick(&mut random, &[0, 0, 512 << 10, 16 << 20]),
                drill: None,
            },
        };
        let config = StoreConfig {
            segment_data_bytes: pick(&mut random, &[128 << 10, 1 << 20]),
            segment_records: pick(&mut random, &[20, 100, 1000]),
            sync_threads: 1,
            pieces_under_way: 0,
            ..StoreConfig::default()
        };
        let images = std::array::from_fn(|_| {
            let sectors = random.within(300..1400) as usize;
            let mut image = vec![0; sectors * SECTOR];
            for chunk in image.chunks_mut(32 << 10) {
                if random.chance(40) {
                    let byte = random.next_u64() as u8;
                    chunk.fill(byte);
                }
            }
            image[..LEDGER * SECTOR].fill(0);
            image
        });
        let models = [Model::new(&images[0]), Model::new(&images[1])];
        let ids = DEVICES.map(|device| disk_id(&HOST, &VM_UUID, "vm", device));
        let mut server = Server::new(config);
        server.start();
        server.wanted = ids.iter().map(|id| (*id, true)).collect();
        server.options = ids.iter().map(|id| (*id, options(&mut random))).collect();
        let mut world = Self {
            random,
            now: Duration::ZERO,
            trace,
            weights,
            sizes,
            _spool: spool,
            images,
            changes: [0; DISKS],
            models,
            ids,
            vm: None,
            graveyard: Vec::new(),
            next_pid: 100,
            agent: None,
            agent_gone: Duration::ZERO,
            discarded: BTreeSet::new(),
            agents_gone: 0,
            vms_gone: 0,
            agent_stops: None,
            filter: None,
            filter_closing: false,
            orders: VecDeque::new(),
            next_filter: 1,
            listed: [0; DISKS],
            look_at: Duration::ZERO,
            to_agent: VecDeque::new(),
            conns: BTreeMap::new(),
            next_conn: 1,
            server,
            server_gone: Duration::ZERO,
            healthy: false,
            moments: 0,
            next_op: 1,
            ledger: 0,
            checks: Checks::default(),
            faults: 0,
        };
        world.trace.note(|| format!("{:?} {:?}", world.weights, world.sizes));
        set_now(Duration::ZERO);
        world.start_vm();
        world.start_agent();
        world
    }

    fn floor(&self) -> Stamp {
        Stamp(BASE_NS + self.now.as_nanos() as u64)
    }

    fn advance(&mut self, by: Duration) {
        self.now += by;
        set_now(self.now);
        let floor = self.floor();
        if let Some(agent) = &self.agent {
            agent.clock.raise_to(floor);
        }
        for disk in self.vm.iter().flat_map(|vm| &vm.disks) {
            if let Some(attached) = &disk.attached {
                attached.clock.raise_to(floor);
            }
        }
    }

    /// One step of one of the parts.
    pub(crate) fn step(&mut self) {
        let weights = self.weights;
        let micros = self.random.within(0..weights.step_us * 2);
        self.advance(Duration::from_micros(micros));
        let parts = [
            weights.guest,
            weights.disk,
            weights.resync,
            weights.drain,
            weights.agent,
            weights.server,
            weights.fault,
        ];
        let total: u64 = parts.iter().sum();
        let mut drawn = self.random.within(0..total);
        let part = parts.iter().position(|weight| {
            let hit = drawn < *weight;
            drawn = drawn.wrapping_sub(*weight);
            hit
        });
        match part.unwrap_or(0) {
            0 => self.guest(),
            1 => self.disk(),
            2 => self.resync(),
            3 => self.drain(),
            4 => self.agent_step(),
            5 => self.server_step(),
            _ => self.fault(),
        }
        Checks::step(self);
    }

    /// Every part once, without faults.
    pub(crate) fn quiet_step(&mut self, guest: bool) {
        self.advance(Duration::from_millis(2));
        self.healthy = true;
        if self.vm.is_none() {
            self.start_vm();
        }
        if self.agent.is_none() {
            self.start_agent();
        }
        if !self.server.is_running() {
            self.start_server();
        }
        self.server.heal();
        if guest {
            self.guest();
        }
        for _ in 0..4 {
            self.disk();
            self.resync();
            self.drain();
        }
        self.agent_step();
        self.server_step();
        Checks::step(self);
    }

    pub(crate) fn stop_faults(&mut self) {
        self.weights.eio = 0;
        if let Some(agent) = self.agent.as_mut().filter(|agent| agent.fuse.is_some()) {
            agent.fuse = None;
        }
        for i in 0..DISKS {
            self.want(i, true);
        }
        self.server.wish_now();
    }

    /// Whether everything is recorded and durable: no gap, no lag.
    pub(crate) fn is_whole(&self) -> bool {
        let Some((vm, store)) = self.vm.as_ref().zip(self.server.store()) else { return false };
        (0..DISKS).all(|i| {
            let Some(attached) = &vm.disks[i].attached else { return false };
            let status = attached.capture.status();
            let durable = store.disk(self.ids[i]).map(|disk| disk.durable_lsn());
            status.mode == Mode::Capturing
                && !status.gap_is_open
                && vm.disks[i].ops.is_empty()
                && durable == Some(status.captured_lsn)
        })
    }

    /// What tells that an image is what it was.
    fn tag(&self, i: usize) -> ImageTag {
        ImageTag::from_halves([self.changes[i], self.images[i].len() as u64])
    }

    pub(crate) fn state(&self) -> String {
        let disk = |i: usize| {
            let store = self.server.store().and_then(|store| store.disk(self.ids[i]));
            let disk = self.vm.as_ref().map(|vm| &vm.disks[i]);
            let status =
                disk.and_then(|disk| disk.attached.as_ref()).map(|attached| attached.capture.status());
            format!(
                "{status:?} ops {:?} durable {:?}",
                disk.map(|d| d.ops.len()),
                store.map(|s| s.durable_lsn())
            )
        };
        let phases = self.agent.as_ref().map(Agent::phases);
        format!("{} | {} | {phases:?} | conns {:?}", disk(0), disk(1), self.conns.keys())
    }
}

/// How a disk may be protected.
pub(crate) fn options(random: &mut Random) -> ProtectionOptions {
    ProtectionOptions {
        overflow: random.within(0..3) as u32,
        throttle_ms: random.within(1..400) as u32,
        ring_mib: 0,
        sync: random.chance(40),
        sync_timeout_ms: random.within(1..3000) as u32,
    }
}
