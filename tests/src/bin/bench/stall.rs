//! What a guest feels when the other end of its protection stands still: agent or server for ours, the sink for the peers.

use std::thread;
use std::time::{Duration, Instant};

use crate::Effort;
use crate::export::{Export, finish};
use crate::ours::Ours;
use crate::report::{Report, Row};
use crate::variants::{Medium, Pattern, Variant};

const PATTERN: Pattern = Pattern { name: "4 KiB, depth 8", bytes: 4 << 10, depth: 8 };
/// The load runs before and after the stall for that long, in seconds.
const AROUND: f64 = 1.0;

/// Who stands still.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stalled {
    Nobody,
    Sink,
    Agent,
    Server,
}

const CASES: [(Variant, Stalled, &str); 8] = [
    (Variant::Plain, Stalled::Nobody, "plain"),
    (Variant::OursOn, Stalled::Server, "qemu-cdp, server frozen"),
    (Variant::OursOn, Stalled::Agent, "qemu-cdp, agent frozen"),
    (Variant::BlkLogWritesNbd, Stalled::Sink, "blklogwrites, NBD server frozen"),
    (Variant::QuorumNbd, Stalled::Sink, "quorum, NBD server frozen"),
    (Variant::MirrorBlocking, Stalled::Sink, "mirror write-blocking, NBD server frozen"),
    (Variant::MirrorBackground, Stalled::Sink, "mirror background, NBD server frozen"),
    (Variant::Backup, Stalled::Sink, "backup, NBD server frozen"),
];

pub(crate) fn run(effort: Effort, report: &mut Report) {
    let ours = Ours::start();
    let directories = CASES.map(|_| Medium::Tmpfs.directory());
    // A minute once, and with one peer: it says the same, thirty times as long.
    let stalls: &[(f64, usize, usize)] = if effort.patient {
        &[(2.0, effort.rounds, CASES.len()), (60.0, 1, 4)]
    } else {
        &[(0.5, 1, CASES.len())]
    };
    for &(seconds, rounds, cases) in stalls {
        let name = format!("{seconds} s");
        for round in 0..rounds {
            report.begin_round(effort);
            for ((variant, stalled, label), directory) in CASES.into_iter().zip(&directories).take(cases) {
                let vm = format!("bench-stall-{}", u8::from(stalled == Stalled::Agent));
                let mut export = Export::start(&ours, variant, directory.path(), &vm);
                let load = export.load(PATTERN, seconds + 2.0 * AROUND, None);
                thread::sleep(Duration::from_secs_f64(AROUND));
                let process = match stalled {
                    Stalled::Nobody => None,
                    Stalled::Sink => export.sink.as_ref(),
                    Stalled::Agent => Some(&ours.site.agent),
                    Stalled::Server => Some(&ours.site.server),
                };
                let began = Instant::now();
                process.inspect(|process| process.freeze());
                thread::sleep(Duration::from_secs_f64(seconds).saturating_sub(began.elapsed()));
                process.inspect(|process| process.thaw());
                let seen = finish(load);
                let mut row = Row::new("stall", &name, PATTERN.name, label, round);
                row.set("max_ms", seen.max_us / 1000.0);
                row.set("writes", seen.writes);
                row.set("p99_us", seen.p99_us);
                report.add(row);
                if variant == Variant::OursOn {
                    ours.records(&vm);
                }
                export.daemon.terminate();
            }
        }
    }
}
