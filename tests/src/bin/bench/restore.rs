//! A whole disk back as a raw file, beside copying one: the same bytes, in files that lie on the same disk.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use cdp_tests::programs::program;
use cdp_tests::random::Random;
use nix::sys::resource::{UsageWho, getrusage};

use crate::Effort;
use crate::contents::{Contents, batches};
use crate::machine;
use crate::ours::Server;
use crate::report::{Report, Row};
use crate::stored::Stored;

/// Bytes of the disk, and records of its history behind the first state, of 4 KiB each.
const FULL: (u64, [u64; 2]) = (1 << 30, [100_000, 1_000_000]);
const QUICK: (u64, [u64; 2]) = (64 << 20, [1_000, 10_000]);

pub(crate) fn run(effort: Effort, report: &mut Report) {
    let (disk_bytes, histories) = if effort.patient { FULL } else { QUICK };
    let directory = machine::directory_on_disk();
    let here = directory.path();
    let frames = batches(&Contents::Random.bytes(), 4 << 10, usize::MAX);
    let stores = histories.map(|records| {
        Stored::write(here.join(format!("store-{records}")), disk_bytes, &frames, true, records)
    });
    let raw = here.join("image.raw");
    write_image(&raw, disk_bytes);
    for round in 0..effort.rounds {
        report.begin_round(effort);
        let mut add = |name: &str, command: &mut Command| {
            let cpu = children_seconds();
            let seconds = timed(command, &here.join("out.raw"));
            let mut row = Row::new("full restore", "disk", "to a new raw file, durable", name, round);
            row.set("mb_per_s", disk_bytes as f64 / 1e6 / seconds);
            row.set("cpu_s_per_gb", (children_seconds() - cpu) * 1e9 / disk_bytes as f64);
            report.add(row);
        };
        let mut dd = Command::new("dd");
        dd.arg(format!("if={}", raw.display())).arg(format!("of={}", here.join("out.raw").display()));
        add("dd, direct I/O", dd.args(["bs=1M", "iflag=direct", "oflag=direct", "conv=fsync"]));
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-f", "raw", "-O", "raw", "-t", "none", "-T", "none"]);
        add("qemu-img convert, direct I/O", convert.arg(&raw).arg(here.join("out.raw")));
        for (stored, records) in stores.iter().zip(histories) {
            let restore = || {
                let mut command = Command::new(program("cdp-restore"));
                command.args(["--disk", &stored.disk.to_string(), "--at", &format!("lsn:{}", stored.last.0)]);
                command.env_remove("CDP_SERVER").arg("--output").arg(here.join("out.raw"));
                command
            };
            let name = format!("qemu-cdp, from the files, {records} records later");
            add(&name, restore().arg("--store").arg(stored.path()));
            let mut server = Server::start(here, stored.path());
            let name = format!("qemu-cdp, through the server, {records} records later");
            add(&name, restore().args(["--server", &server.url]));
            server.process.terminate();
        }
    }
}

/// An image of random data, not in the page cache.
fn write_image(path: &Path, bytes: u64) {
    use std::io::Write;
    let contents = Random::of(4).bytes(64 << 20);
    let mut file = File::create(path).expect("an image");
    for _ in 0..bytes / contents.len() as u64 {
        file.write_all(&contents).expect("room for an image");
    }
    file.sync_all().expect("a durable image");
}

/// Processor time of all programs that were run and have ended, in seconds.
fn children_seconds() -> f64 {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).expect("usage");
    [usage.user_time(), usage.system_time()]
        .map(|time| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6)
        .iter()
        .sum()
}

/// Runs a program that makes `output` and removes that; how long it took, in seconds.
fn timed(command: &mut Command, output: &Path) -> f64 {
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    let began = Instant::now();
    let ended = command.output().expect("the program runs");
    let seconds = began.elapsed().as_secs_f64();
    assert!(ended.status.success(), "{command:?}: {}", String::from_utf8_lossy(&ended.stderr));
    fs::remove_file(output).expect("the output");
    seconds
}
