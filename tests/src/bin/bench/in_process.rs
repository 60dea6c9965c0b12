//! What a write costs inside QEMU, with nothing between the load and the block layer: `qemu-img bench`.
//!
//! That program begins at once, and capture has to be there before. So it is held (`gate.c`). And the filter leaves
//! programs named `qemu-img` alone, so a copy under another name is run.

use std::fs::{self, File};
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::thread::{self, JoinHandle};

use cdp_tests::process::Process;
use cdp_tests::programs::program;
use cdp_tests::wait_for;
use tempfile::TempDir;

use crate::Effort;
use crate::machine::{self, GUEST_CORE, SINK_CORE};
use crate::ours::Ours;
use crate::report::{Report, Row};
use crate::variants::{CONTENTS, Medium, PATTERNS, Pattern, Variant, fill};

/// Bytes of the disk, and of a second copy.
const DISK_BYTES: u64 = 256 << 20;
/// From one write to the next, in writes: scattered, and every place once in a turn (it is odd).
const STRIDE: u64 = 1021;
/// Writes, or bytes if these are fewer, by which it is found out how many a run has.
const PROBE_WRITES: u64 = 1000;
const PROBE_BYTES: u64 = 64 << 20;
/// What one variant runs in one round, of what the table's effort says: there are many tables here.
const SHARE: f64 = 0.45;
/// The table's parts.
const UNPAUSED: &str = "in process";
const IN_BURSTS: &str = "in process, in bursts";
/// Fewest writes of a run.
const FEWEST: u64 = 32;
/// In bursts: how long one is, in µs; what is written in all, pauses and all, in bytes a µs (or MB/s); what a copy takes in
/// one.
const BURST_US: f64 = 1000.0;
const BURST_BYTES_PER_US: f64 = 100.0;
const COPY_BYTES_PER_US: f64 = 10_000.0;
/// In bursts a run has some 40 ms of writing, and what is looked for is less than a microsecond of each: so many times the rounds.
const ROUNDS_IN_BURSTS: usize = 3;
/// What the thread that only copies goes round, and copies at a time.
const COPIED_BYTES: usize = 32 << 20;
const COPY_BYTES: usize = 64 << 10;

/// What one run cost, for each write in µs.
#[derive(Clone, Copy, Debug)]
struct Cost {
    wall_us: f64,
    cpu_us: f64,
    /// Agent and server; or the NBD server, and nobody.
    sinks_us: [f64; 2],
    /// The share of the run in which history has no gap; of ours only.
    captured: Option<f64>,
}

/// What all runs use: the copied program, its gate, our side.
struct Bench {
    ours: Ours,
    /// Where our side has its files: in memory, as those of a server elsewhere would be as far as this machine is concerned.
    _store: TempDir,
    program: PathBuf,
    gate: PathBuf,
    /// VMs so far: each run is another one, so that nothing is left over from the last.
    vms: u64,
    _directory: TempDir,
}

/// Where one medium's files are.
struct Place {
    medium: Medium,
    directory: TempDir,
    /// Most bytes that a run writes.
    most: u64,
}

/// What one variant has to do in one run.
#[derive(Clone, Copy, Debug)]
struct Load {
    variant: Variant,
    pattern: Pattern,
    writes: u64,
    /// Pause after each [`BURST_US`], in µs; 0 for none.
    pause_us: u64,
}

pub(crate) fn run(effort: Effort, report: &mut Report) {
    for medium in [Medium::Null, Medium::Tmpfs, Medium::Disk] {
        let wanted = |pattern: &Pattern| {
            let mut sections = vec![UNPAUSED];
            sections.extend((medium != Medium::Disk).then_some(IN_BURSTS));
            sections.retain(|section| report.wants(section, medium.name(), pattern.name));
            (!sections.is_empty()).then_some((*pattern, sections))
        };
        let wanted: Vec<_> = PATTERNS.iter().filter_map(wanted).collect();
        if wanted.is_empty() {
            continue;
        }
        let mut bench = Bench::new();
        let place = Place::new(medium, if effort.patient { 1 << 30 } else { 128 << 20 });
        for (pattern, sections) in wanted {
            let loads = bench.loads(&place, pattern, effort.seconds * SHARE);
            for section in sections {
                let bursts = section == IN_BURSTS;
                let loads = if bursts { in_bursts(&loads, effort.seconds * SHARE) } else { loads.clone() };
                let times = if bursts && effort.patient { ROUNDS_IN_BURSTS } else { 1 };
                for round in 0..effort.rounds * times {
                    report.begin_round(effort);
                    let costs: Vec<_> =
                        loads.iter().map(|(load, _)| (load.variant, bench.measure(&place, *load))).collect();
                    for row in rows(&costs, [section, medium.name(), pattern.name], round) {
                        report.add(row);
                    }
                }
            }
        }
    }
}

/// The same for those who write no NBD, with pauses in which ours ships what it has: so many bytes a second on average.
fn in_bursts(loads: &[(Load, f64)], seconds: f64) -> Vec<(Load, f64)> {
    let plain_us = loads.first().map_or(1.0, |(_, us)| *us);
    let bursting = |(load, us): &(Load, f64)| {
        let bytes = load.pattern.bytes as f64;
        let burst_bytes = BURST_US / (plain_us + bytes / COPY_BYTES_PER_US) * bytes;
        let pause_us = (burst_bytes / BURST_BYTES_PER_US - BURST_US).max(0.0) as u64;
        let writes = (seconds * 1e6 * BURST_BYTES_PER_US / bytes) as u64;
        (Load { writes: writes.max(FEWEST), pause_us, ..*load }, *us)
    };
    let beside =
        loads.first().map(|(plain, us)| (Load { variant: Variant::PlainBesideCopies, ..*plain }, *us));
    let mut local: Vec<_> = loads.iter().filter(|(load, _)| load.variant.is_local()).copied().collect();
    // Next to the plain disk, which is first.
    local.splice(1..1, beside);
    local.iter().map(bursting).collect()
}

/// Copies memory on the other core until it is dropped.
struct Copies {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Copies {
    /// It copies when this returns, and has all its memory.
    fn start() -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let (copies, begun) = channel();
        let thread = thread::spawn(move || {
            machine::pin_thread(SINK_CORE);
            let (from, mut to) = (vec![1_u8; COPIED_BYTES], vec![2_u8; COPIED_BYTES]);
            copies.send(()).expect("somebody waits");
            loop {
                for (to, from) in to.chunks_mut(COPY_BYTES).zip(from.chunks(COPY_BYTES)) {
                    // ORDERING: Relaxed: the flag stands alone.
                    if stopped.load(Ordering::Relaxed) {
                        return;
                    }
                    to.copy_from_slice(black_box(from));
                    black_box(to);
                }
            }
        });
        begun.recv().expect("it begins");
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        // ORDERING: as above.
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("it only copies");
        }
    }
}

/// A round's rows: what was added is added to the plain disk of that very round.
fn rows(costs: &[(Variant, Cost)], [section, medium, pattern]: [&str; 3], round: usize) -> Vec<Row> {
    let of = |wanted: Variant| costs.iter().find(|(variant, _)| *variant == wanted).map(|(_, cost)| *cost);
    let plain = of(Variant::Plain);
    let logged = of(Variant::BlkLogWrites).zip(plain).map(|(log, plain)| log.cpu_us - plain.cpu_us);
    let row = |(variant, cost): &(Variant, Cost)| {
        let mut row = Row::new(section, medium, pattern, variant.name(), round);
        row.set("us_per_write", cost.wall_us);
        row.set("cpu_qemu_us", cost.cpu_us);
        if let Some(plain) = plain.filter(|_| *variant != Variant::Plain) {
            let added_cpu = cost.cpu_us - plain.cpu_us;
            row.set("added_us", cost.wall_us - plain.wall_us);
            row.set("added_cpu_us", added_cpu);
            if let Some(logged) = logged.filter(|logged| *logged > 0.0) {
                row.set("added_cpu_to_blklogwrites", added_cpu / logged);
            }
        }
        row.set("cpu_sink_us", cost.sinks_us.iter().sum());
        if *variant == Variant::OursOn {
            row.set("cpu_agent_us", cost.sinks_us[0]);
            row.set("cpu_server_us", cost.sinks_us[1]);
        }
        if let Some(captured) = cost.captured {
            row.set("captured", captured);
        }
        row
    };
    costs.iter().map(row).collect()
}

impl Place {
    /// Makes its files, all of them allocated, also the log: a peer does not pay for that.
    fn new(medium: Medium, most: u64) -> Self {
        let place = Self { medium, directory: medium.directory(), most };
        if medium != Medium::Null {
            for name in ["disk", "second", "log"] {
                let path = place.directory.path().join(format!("{name}.raw"));
                fill(&path, place.bytes(name));
            }
        }
        place
    }

    /// The log has a sector of 4 KiB for each write, which may be no longer than that.
    fn bytes(&self, name: &str) -> u64 {
        if name == "log" { 2 * self.most + (16 << 20) } else { DISK_BYTES }
    }
}

impl Bench {
    fn new() -> Self {
        let store = Medium::Tmpfs.directory();
        let directory = machine::directory_on_disk();
        let path = |name: &str| directory.path().join(name);
        let (program, gate, source) = (path("bench-img"), path("gate.so"), path("gate.c"));
        let original = std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
            .map(|folder| folder.join("qemu-img"))
            .find(|program| program.exists());
        fs::copy(original.expect("qemu-img on the PATH"), &program).expect("a copy of qemu-img");
        fs::write(&source, include_str!("gate.c")).expect("the gate's source");
        let mut compiler = Command::new("cc");
        compiler.args(["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", "-shared", "-fPIC"]);
        let status = compiler.arg(&source).arg("-o").arg(&gate).status().expect("a C compiler");
        assert!(status.success(), "the gate does not compile");
        let ours = Ours::start_below(store.path());
        Self { ours, _store: store, program, gate, vms: 0, _directory: directory }
    }

    /// Who takes part, with how many writes (those of about so many seconds), and about how many µs each takes.
    fn loads(&mut self, place: &Place, pattern: Pattern, seconds: f64) -> Vec<(Load, f64)> {
        let probe = PROBE_WRITES.min(PROBE_BYTES / pattern.bytes);
        let mut loads: Vec<(Load, f64)> = Vec::new();
        for variant in Variant::IN_PROCESS {
            let load = Load { variant, pattern, writes: probe, pause_us: 0 };
            // As many as with ours off, which has just been asked.
            let before = loads.last().filter(|_| variant == Variant::OursOn).map(|(_, us)| *us);
            let us = before.unwrap_or_else(|| self.measure(place, load).wall_us).max(0.1);
            let writes = ((seconds * 1e6 / us) as u64).min(place.most / pattern.bytes).max(FEWEST);
            loads.push((Load { writes, ..load }, us));
        }
        loads
    }

    fn measure(&mut self, place: &Place, load: Load) -> Cost {
        let path = |name: &str| place.directory.path().join(name);
        let (socket, begin, end) = (path("sink.sock"), path("begin"), path("end"));
        for old in [&socket, &begin, &end] {
            let _absent = fs::remove_file(old);
        }
        let sink = load.variant.start_sink(SINK_CORE, place.directory.path(), &socket, DISK_BYTES);
        self.vms += 1;
        let vm = format!("bench-in-process-{}", self.vms);
        let mut command = self.command(place, load, &socket, &vm);
        command.env("GATE_BEGIN", &begin).env("GATE_END", &end);
        let mut process = Process::start(place.directory.path(), "bench-img", &mut command);
        let _held = process.ready("gate");
        let disk = (load.variant == Variant::OursOn).then(|| {
            let disk = self.ours.site.disk(&vm, "");
            self.ours.site.protect(&disk);
            disk
        });
        let _copies = (load.variant == Variant::PlainBesideCopies).then(Copies::start);
        let sinks = || match (&sink, &disk) {
            (Some(sink), _) => [machine::cpu_seconds(sink.pid()), 0.0],
            (None, Some(_)) => self.ours.cpu_seconds(),
            (None, None) => [0.0; 2],
        };
        let sinks_before = sinks();
        File::create(&begin).expect("the gate's file");
        let done = wait_for("the last write", || {
            process.assert_alive();
            Done::parse(&process.stdout())
        });
        let captured = disk.as_ref().map(|disk| self.captured(&vm, disk, load.writes, &done));
        let each = |seconds: f64| seconds * 1e6 / load.writes as f64;
        let sinks_after = sinks();
        let cost = Cost {
            wall_us: each(done.wall - done.paused),
            cpu_us: each(done.cpu),
            sinks_us: [0, 1].map(|end| each(sinks_after[end] - sinks_before[end])),
            captured,
        };
        File::create(&end).expect("the gate's file");
        process.ended();
        cost
    }

    /// Waits until the server has all of a run; the share of it in which history has no gap.
    fn captured(&self, vm: &str, disk: &str, writes: u64, done: &Done) -> f64 {
        let points = wait_for("the run to be durable", || {
            let points = self.ours.site.points(disk);
            let began = points.gaps.first()?.to_lsn?;
            // With another gap it has fewer records.
            (points.gaps.len() > 1 || points.newest.as_ref()?.lsn >= began + writes).then_some(points)
        });
        if points.gaps.len() > 1 {
            self.ours.catch_up(vm);
        }
        self.ours.captured(disk, done.began, done.began + done.wall)
    }

    fn command(&self, place: &Place, load: Load, sink: &Path, vm: &str) -> Command {
        let Load { variant, pattern, writes, pause_us } = load;
        let mut command = machine::pinned(GUEST_CORE, &self.program);
        let mut preload = self.gate.clone().into_os_string();
        if variant.is_ours() {
            self.ours.load(&mut command, vm);
            preload.push(":");
            preload.push(program("libcdp_filter.so"));
        }
        command.env("LD_PRELOAD", preload);
        if pause_us > 0 {
            command.env("GATE_RUN_US", BURST_US.to_string()).env("GATE_PAUSE_US", pause_us.to_string());
        }
        command.args(["bench", "-w", "-t", "none", "--pattern", &CONTENTS.to_string()]);
        command.args(["-c", &writes.to_string(), "-d", &pattern.depth.to_string()]);
        command.args(["-s", &pattern.bytes.to_string(), "-S", &(STRIDE * pattern.bytes).to_string()]);
        let local = |name: &str| place.medium.node(place.directory.path(), name, place.bytes(name));
        let nodes = variant.nodes(local, sink);
        command.arg(format!("json:{}", nodes.first().expect("a node")));
        command
    }
}

/// What the gate says at the end, in seconds.
struct Done {
    /// When it began, since 1970.
    began: f64,
    /// How long it ran.
    wall: f64,
    /// Of it, in pauses.
    paused: f64,
    /// Processor time.
    cpu: f64,
}

impl Done {
    fn parse(output: &str) -> Option<Self> {
        let line = output.lines().find_map(|line| line.strip_prefix("done "))?;
        let numbers: Vec<f64> = line.split(' ').filter_map(|word| word.parse().ok()).collect();
        let [began, wall, paused, cpu] = numbers[..] else { return None };
        Some(Self { began: began / 1e9, wall: wall / 1e9, paused: paused / 1e9, cpu: cpu / 1e9 })
    }
}
