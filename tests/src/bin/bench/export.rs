//! What a guest sees through an export: `fio` on an NBD export of `qemu-storage-daemon`.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::UNIX_EPOCH;

use cdp_tests::process::Process;
use cdp_tests::qmp::Qmp;
use cdp_tests::wait_for;
use serde_json::Value;
use tempfile::TempDir;

use crate::Effort;
use crate::machine::{self, GUEST_CORE, SINK_CORE};
use crate::ours::Ours;
use crate::report::{Report, Row};
use crate::variants::{DISK_BYTES, Medium, PATTERNS, Pattern, Variant, fill};

/// A storage daemon with one variant's nodes, and the server that drops what it gets, where the variant needs one.
pub(crate) struct Export {
    pub(crate) daemon: Process,
    pub(crate) sink: Option<Process>,
    socket: PathBuf,
}

impl Export {
    /// Starts them, the other end on that core, protects the disk or starts the job, and waits until writes are captured.
    pub(crate) fn start(ours: &Ours, variant: Variant, directory: &Path, vm: &str, sink_core: &str) -> Self {
        let path = |name: &str| directory.join(name);
        let (socket, monitor, sink_socket) = (path("nbd"), path("qmp"), path("sink"));
        for old in [&socket, &monitor, &sink_socket] {
            let _absent = std::fs::remove_file(old);
        }
        let sink = variant.start_sink(sink_core, directory, &sink_socket, DISK_BYTES);
        ours.pin(sink_core);
        let mut command = machine::pinned(GUEST_CORE, "qemu-storage-daemon");
        command.args(Qmp::arguments(&monitor));
        if variant == Variant::Throttle {
            command.args(["--object", "throttle-group,id=none"]);
        }
        // On tmpfs too, they are files.
        let local = |name: &str| {
            provide(directory, name);
            Medium::Disk.node(directory, name, DISK_BYTES)
        };
        for node in variant.nodes(local, &sink_socket) {
            command.args(["--blockdev", &node.to_string()]);
        }
        command.args([
            "--nbd-server",
            &format!("addr.type=unix,addr.path={},max-connections=0", socket.display()),
        ]);
        let export = serde_json::json!({"type": "nbd", "id": "export0", "name": "disk", "node-name": variant.top(), "writable": true});
        command.args(["--export", &export.to_string()]);
        if variant.is_ours() {
            ours.load(&mut command, if variant == Variant::OursOn { vm } else { "bench-off" });
        }
        let daemon = Process::start(directory, "daemon", &mut command);
        wait_for("the export's socket", || socket.exists().then_some(()));
        if let Some((job, arguments)) = variant.job() {
            Qmp::connect(&monitor).run(job, arguments);
        }
        if variant == Variant::OursOn {
            let disk = ours.site.disk(vm, "");
            ours.site.protect(&disk);
        }
        Self { daemon, sink, socket }
    }

    /// Starts a load on it, for some seconds; at most so many writes a second, where that is given.
    pub(crate) fn load(&self, pattern: Pattern, seconds: f64, rate: Option<f64>) -> Child {
        let mut command = machine::pinned(GUEST_CORE, "fio");
        command.args(["--name=load", "--ioengine=nbd", "--rw=randwrite", "--norandommap", "--time_based=1"]);
        command.args(["--output-format=json", "--randrepeat=0", "--refill_buffers=1", "--group_reporting=1"]);
        command.arg(format!("--uri=nbd+unix:///disk?socket={}", self.socket.display()));
        command.arg(format!("--bs={}", pattern.bytes)).arg(format!("--iodepth={}", pattern.depth));
        command.arg(format!("--runtime={}ms", (seconds * 1000.0) as u64)).arg(format!("--size={DISK_BYTES}"));
        if let Some(rate) = rate {
            command.arg(format!("--rate_iops={}", rate.max(1.0) as u64));
        }
        command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("fio runs")
    }
}

/// Makes a file of an export unless it is there. All its blocks are there then, also those of a log for what one load writes:
/// it is written from its beginning each time.
fn provide(directory: &Path, name: &str) {
    let path = directory.join(format!("{name}.raw"));
    if path.exists() {
        return;
    }
    fill(&path, DISK_BYTES);
    if name == "log" {
        let file = File::options().write(true).open(&path).expect("the log");
        file.set_len(16 * DISK_BYTES).expect("its size");
    }
}

/// Where the files of an export lie: those of all variants in one place, so that they have the same blocks. Only ours, when it
/// is on, has its own: what others write to its disk between two rounds would have to be compared before the next.
pub(crate) struct Directories([TempDir; 2]);

impl Directories {
    pub(crate) fn new(medium: Medium) -> Self {
        Self([medium.directory(), medium.directory()])
    }

    pub(crate) fn of(&self, variant: Variant) -> &Path {
        self.0[usize::from(variant == Variant::OursOn)].path()
    }
}

/// What a load saw of its writes.
pub(crate) struct Seen {
    pub(crate) writes: f64,
    /// How long it ran, with its last flush.
    pub(crate) seconds: f64,
    pub(crate) iops: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) p999_us: f64,
    pub(crate) max_us: f64,
}

/// Waits for a load's end.
pub(crate) fn finish(load: Child) -> Seen {
    let output = load.wait_with_output().expect("fio ends");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    // It may say something before its document.
    let document = text.get(text.find('{').unwrap_or(0)..).unwrap_or_default();
    let parsed: Value = serde_json::from_str(document).unwrap_or_else(|e| panic!("fio said {text:?}: {e}"));
    let write = &parsed["jobs"][0]["write"];
    assert_eq!(parsed["jobs"][0]["error"].as_i64(), Some(0), "a request failed: {text}");
    let number = |value: &Value| value.as_f64().unwrap_or_default();
    let percentile = |name: &str| number(&write["clat_ns"]["percentile"][name]) / 1000.0;
    Seen {
        writes: number(&write["total_ios"]),
        seconds: number(&parsed["jobs"][0]["job_runtime"]) / 1000.0,
        iops: number(&write["iops"]),
        p50_us: percentile("50.000000"),
        p99_us: percentile("99.000000"),
        p999_us: percentile("99.900000"),
        max_us: number(&write["clat_ns"]["max"]) / 1000.0,
    }
}

/// A variant, where its agent and server or its NBD server run, and what it is called.
type Placed = (Variant, &'static str, String);

pub(crate) fn run(effort: Effort, report: &mut Report) {
    let apart = Variant::EXPORTED.map(|variant| (variant, SINK_CORE, variant.name().to_owned()));
    for medium in [Medium::Tmpfs, Medium::Disk] {
        part(effort, report, "through an export", medium, &PATTERNS, &apart);
    }
    // Who waits for an answer has it sooner from the own core than by waking another one. Ours is at its best on the other
    // core, and is shown on the same one as well.
    let on = |variant: Variant| match variant {
        Variant::Plain | Variant::OursOn => (variant, SINK_CORE, variant.name().to_owned()),
        _ => (variant, GUEST_CORE, variant.name().to_owned()),
    };
    let mut best: Vec<Placed> = Variant::REMOTE.map(on).into();
    best.push((Variant::OursOn, GUEST_CORE, format!("{}, all on one core", Variant::OursOn.name())));
    let section = "through an export, peers' NBD server on the guest's core";
    part(effort, report, section, Medium::Tmpfs, PATTERNS.split_at(2).0, &best);
}

fn part(
    effort: Effort,
    report: &mut Report,
    section: &str,
    medium: Medium,
    patterns: &[Pattern],
    variants: &[Placed],
) {
    let directories = Directories::new(medium);
    for &pattern in patterns {
        if !report.wants(section, medium.name(), pattern.name) {
            continue;
        }
        // A new one for each: what it keeps of the last one is gone.
        let store = Medium::Tmpfs.directory();
        let ours = Ours::start_below(store.path());
        for round in 0..effort.rounds {
            report.begin_round(effort);
            for (variant, core, name) in variants {
                let row = Row::new(section, medium.name(), pattern.name, name, round);
                let directory = directories.of(*variant);
                report.add(measure(&ours, (*variant, core), row, directory, pattern, effort.seconds));
            }
        }
    }
}

fn measure(
    ours: &Ours,
    (variant, core): (Variant, &str),
    mut row: Row,
    directory: &Path,
    pattern: Pattern,
    seconds: f64,
) -> Row {
    const VM: &str = "bench-export";
    let mut export = Export::start(ours, variant, directory, VM, core);
    let sinks = || match (&export.sink, variant) {
        (Some(sink), _) => [machine::cpu_seconds(sink.pid()), 0.0],
        (None, Variant::OursOn) => ours.cpu_seconds(),
        _ => [0.0; 2],
    };
    let now = || UNIX_EPOCH.elapsed().expect("after 1970").as_secs_f64();
    let (daemon_before, sinks_before, began) = (machine::cpu_seconds(export.daemon.pid()), sinks(), now());
    let seen = finish(export.load(pattern, seconds, None));
    let ended = now();
    let each = |seconds: f64| seconds * 1e6 / seen.writes.max(1.0);
    row.set("iops", seen.iops);
    row.set("p50_us", seen.p50_us);
    row.set("p99_us", seen.p99_us);
    row.set("p999_us", seen.p999_us);
    row.set("cpu_qemu_us", each(machine::cpu_seconds(export.daemon.pid()) - daemon_before));
    if variant == Variant::OursOn {
        ours.catch_up(VM);
    }
    let sinks_after = sinks();
    let [first, second] = [0, 1].map(|end| each(sinks_after[end] - sinks_before[end]));
    row.set("cpu_sink_us", first + second);
    if variant == Variant::OursOn {
        row.set("cpu_agent_us", first);
        row.set("cpu_server_us", second);
        row.set("captured", ours.captured(&ours.site.disk(VM, ""), began, ended));
    }
    export.daemon.terminate();
    row
}
