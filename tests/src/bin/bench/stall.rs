//! What a guest feels when the other end of its protection stands still: agent, server or network for ours, the sink for the
//! peers.

use std::path::Path;
use std::process::Child;
use std::thread;
use std::time::{Duration, Instant};

use cdp_tests::network::Weather;
use cdp_tests::process::Process;

use crate::Effort;
use crate::export::{Directories, Export, finish};
use crate::machine::{self, SINK_CORE};
use crate::ours::Ours;
use crate::report::{Report, Row};
use crate::variants::{Medium, Pattern, Variant};

const PATTERN: Pattern = Pattern { name: "4 KiB, depth 8", bytes: 4 << 10, depth: 8 };
/// The load runs before and after the stall for that long, in seconds.
const AROUND: f64 = 1.0;
/// How long the load runs in a stall that outlasts it, in seconds, and how long it is waited for then.
const FOR_GOOD_S: f64 = 2.0;
const GRACE: Duration = Duration::from_secs(2);

/// Who stands still.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stalled {
    Nobody,
    /// Nobody, and a program that only computes fills the other core: what the machine itself does to a guest then.
    NobodyBesideWork,
    Sink,
    Agent,
    Server,
    Network,
}

const CASES: [(Variant, Stalled, &str); 10] = [
    (Variant::Plain, Stalled::Nobody, "plain"),
    (Variant::Plain, Stalled::NobodyBesideWork, "plain, the other core busy"),
    (Variant::OursOn, Stalled::Server, "qemu-cdp, server frozen"),
    (Variant::OursOn, Stalled::Agent, "qemu-cdp, agent frozen"),
    (Variant::OursOn, Stalled::Network, "qemu-cdp, network frozen"),
    (Variant::BlkLogWritesNbd, Stalled::Sink, "blklogwrites, NBD server frozen"),
    (Variant::QuorumNbd, Stalled::Sink, "quorum, NBD server frozen"),
    (Variant::MirrorBlocking, Stalled::Sink, "mirror write-blocking, NBD server frozen"),
    (Variant::MirrorBackground, Stalled::Sink, "mirror background, NBD server frozen"),
    (Variant::Backup, Stalled::Sink, "backup, NBD server frozen"),
];

/// A stall, and how often and with how many of the cases it is tried.
struct Stall {
    name: &'static str,
    /// `None` when it ends only after the load.
    seconds: Option<f64>,
    rounds: usize,
    cases: usize,
}

pub(crate) fn run(effort: Effort, report: &mut Report) {
    let all = CASES.len();
    let stalls = if effort.patient {
        vec![
            Stall { name: "2 s", seconds: Some(2.0), rounds: effort.rounds, cases: all },
            Stall { name: "for good", seconds: None, rounds: effort.rounds, cases: all },
            // Once, and with one peer: it says the same, thirty times as long.
            Stall { name: "60 s", seconds: Some(60.0), rounds: 1, cases: 6 },
        ]
    } else {
        vec![
            Stall { name: "0.5 s", seconds: Some(0.5), rounds: 1, cases: all },
            Stall { name: "for good", seconds: None, rounds: 1, cases: 6 },
        ]
    };
    // The network is a thread of this process.
    machine::pin(std::process::id(), SINK_CORE);
    // On the disk: a minute's writes do not fit in memory many times over.
    let store = machine::directory_on_disk();
    let ours = Ours::start_with_network_below(store.path());
    let directories = Directories::new(Medium::Tmpfs);
    for stall in stalls {
        for round in 0..stall.rounds {
            report.begin_round(effort);
            for case in CASES.into_iter().take(stall.cases) {
                report.add(measure(&ours, &directories, case, &stall, round));
            }
        }
    }
}

fn measure(
    ours: &Ours,
    directories: &Directories,
    (variant, stalled, label): (Variant, Stalled, &str),
    stall: &Stall,
    round: usize,
) -> Row {
    const VM: &str = "bench-stall";
    let directory = directories.of(variant);
    let mut export = Export::start(ours, variant, directory, VM, SINK_CORE);
    let _busy = (stalled == Stalled::NobodyBesideWork).then(|| work(directory));
    let freeze = |frozen: bool| {
        let process = match stalled {
            Stalled::Nobody | Stalled::NobodyBesideWork => return,
            Stalled::Network => {
                return ours.site.network().set(if frozen { Weather::Stalled } else { Weather::Clear });
            }
            Stalled::Sink => export.sink.as_ref().expect("a sink"),
            Stalled::Agent => &ours.site.agent,
            Stalled::Server => &ours.site.server,
        };
        if frozen { process.freeze() } else { process.thaw() }
    };
    let during = stall.seconds.map_or(FOR_GOOD_S, |seconds| seconds + AROUND);
    let mut load = export.load(PATTERN, AROUND + during, None);
    thread::sleep(Duration::from_secs_f64(AROUND));
    let began = Instant::now();
    freeze(true);
    let mut hangs = 0.0;
    match stall.seconds {
        Some(seconds) => thread::sleep(Duration::from_secs_f64(seconds).saturating_sub(began.elapsed())),
        None => hangs = f64::from(hangs_after(&mut load, Duration::from_secs_f64(during) + GRACE)),
    }
    freeze(false);
    let seen = finish(load);
    let mut row = Row::new("stall", stall.name, PATTERN.name, label, round);
    row.set("max_ms", seen.max_us / 1000.0);
    row.set("writes", seen.writes);
    row.set("p99_us", seen.p99_us);
    if stall.seconds.is_none() {
        row.set("hangs", hangs);
    }
    if variant == Variant::OursOn {
        ours.catch_up(VM);
    }
    export.daemon.terminate();
    row
}

/// A program that keeps the other core busy until it is dropped.
fn work(directory: &Path) -> Process {
    let mut command = machine::pinned(SINK_CORE, "sh");
    command.args(["-c", "while :; do :; done"]);
    Process::start(directory, "work", &mut command)
}

/// Whether a load has not ended after that time.
fn hangs_after(load: &mut Child, most: Duration) -> bool {
    let began = Instant::now();
    while began.elapsed() < most {
        if load.try_wait().expect("fio's state").is_some() {
            return false;
        }
        thread::sleep(Duration::from_millis(20));
    }
    true
}
