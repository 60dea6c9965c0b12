//! What a long history costs: opening it, the first byte and random reads of a past point, differences, a restart, memory;
//! beside qcow2 chains, which are the other way to keep points.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use cdp_tests::random::Random;
use journal_format::Lsn;
use journal_store::View;

use crate::Effort;
use crate::contents::{Contents, batches};
use crate::feed::Feed;
use crate::machine;
use crate::ours::{Server, stored};
use crate::report::{Report, Row};
use crate::stored::Stored;

/// Bytes of the disk with history for each record: every block is written four times, so that a read finds something.
const BYTES_PER_RECORD: u64 = 1 << 10;
/// Bytes of the chains' images.
const CHAIN_BYTES: u64 = 1 << 30;
const CLUSTER_BYTES: u64 = 64 << 10;
/// Clusters that each image of a chain has of its own.
const CLUSTERS: u64 = 16;
const FULL_HISTORIES: &[u64] = &[100_000, 1_000_000, 10_000_000, 100_000_000];
const QUICK_HISTORIES: &[u64] = &[1_000, 100_000];
const FULL_CHAINS: &[usize] = &[1, 10, 50, 200];
const QUICK_CHAINS: &[usize] = &[1, 10];
/// Bytes of the disk that are read at both points to find out what changed without the history's help, and at once.
const SCAN_BYTES: u64 = 64 << 20;
const SCAN_STEP_BYTES: usize = 1 << 20;
const READERS: NonZeroUsize = NonZeroUsize::new(2).expect("not 0");
/// Bytes that a server takes in before it is killed.
const TAIL_BYTES: u64 = 64 << 20;

pub(crate) fn run(effort: Effort, report: &mut Report) {
    let (histories, chains, reads) = match effort.patient {
        true => (FULL_HISTORIES, FULL_CHAINS, 2000),
        false => (QUICK_HISTORIES, QUICK_CHAINS, 200),
    };
    let directory = machine::directory_on_disk();
    let frames = batches(&Contents::Sparse.bytes(), 4 << 10, usize::MAX);
    let chains: Vec<_> = chains.iter().map(|&length| (length, chain(directory.path(), length))).collect();
    for &records in histories {
        // The longest takes minutes and much of the disk to make: one at a time, and twice is enough.
        let disk_bytes = (records * BYTES_PER_RECORD).next_multiple_of(1 << 20);
        let stored = Stored::write(directory.path().join("store"), disk_bytes, &frames, false, records);
        let name = format!("qemu-cdp, {records} records");
        let rounds = if records > 10_000_000 { 2 } else { effort.rounds };
        for round in 0..rounds {
            report.begin_round(effort);
            if records == histories[0] {
                for (length, image) in &chains {
                    report.add(read_chain(&format!("qcow2 chain of {length}"), round, image, reads));
                }
            }
            report.add(read_files(&name, round, &stored, reads));
            report.add(read_server(&name, round, directory.path(), &stored, reads / 10));
            differences(&name, round, &stored, report);
        }
        for round in 0..rounds {
            report.add(restart(&name, round, directory.path(), &stored));
        }
        std::fs::remove_dir_all(stored.path()).expect("the store");
    }
}

fn row(pattern: &str, name: &str, round: usize) -> Row {
    Row::new("history", "disk", pattern, name, round)
}

/// Milliseconds since then.
fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

/// Median and 99th percentile of some times, in microseconds.
fn set_percentiles(row: &mut Row, mut times: Vec<f64>) {
    times.sort_by(f64::total_cmp);
    for (name, of_100) in [("read_p50_us", 50), ("read_p99_us", 99)] {
        row.set(name, times[times.len() * of_100 / 100]);
    }
}

/// Random 4 KiB reads of a point in the middle of the history, from the store's files.
fn read_files(name: &str, round: usize, stored: &Stored, reads: usize) -> Row {
    let began = Instant::now();
    let store = stored.open();
    let disk = store.disk(stored.disk).expect("the disk");
    let view = disk.view(Lsn(stored.last.0 / 2)).expect("a point");
    let mut block = vec![0; 4 << 10];
    view.read(0, &mut block).expect("a block");
    let mut row = row("4 KiB reads in the past, from the files", name, round);
    row.set("first_byte_ms", ms(began));
    let mut random = Random::of(round as u64);
    let times = (0..reads).map(|_| {
        let offset = random.within(0..stored.disk_bytes / 4096) * 4096;
        let began = Instant::now();
        view.read(offset, &mut block).expect("a block");
        ms(began) * 1000.0
    });
    set_percentiles(&mut row, times.collect());
    row
}

/// The same through a server that has just started, from its start on.
fn read_server(name: &str, round: usize, directory: &Path, stored: &Stored, reads: usize) -> Row {
    let began = Instant::now();
    let mut server = Server::start(directory, stored.path());
    let ready = ms(began);
    let (disk, lsn) = (stored.disk.to_string(), stored.last.0 / 2);
    let read = |offset| server.client.data(&disk, lsn, offset, 4096).expect("a block");
    let mut row = row("4 KiB reads in the past, through the server", name, round);
    let first = Instant::now();
    read(0);
    row.set("first_byte_ms", ms(first));
    row.set("start_ms", ready);
    let mut random = Random::of(round as u64);
    let times = (0..reads).map(|_| {
        let offset = random.within(0..stored.disk_bytes / 4096) * 4096;
        let began = Instant::now();
        read(offset);
        ms(began) * 1000.0
    });
    set_percentiles(&mut row, times.collect());
    for (name, key) in [("rss_mib", "VmRSS"), ("of_it_not_mapped_files_mib", "RssAnon")] {
        row.set(name, machine::status_mib(server.process.pid(), key));
    }
    server.process.terminate();
    row
}

/// How long a server needs that was killed with an open segment, and what its journals are then.
fn restart(name: &str, round: usize, directory: &Path, stored_: &Stored) -> Row {
    let mut server = Server::start(directory, stored_.path());
    let batches = batches(&Contents::Random.bytes(), 4 << 10, usize::MAX);
    let _acknowledged = Feed::connect(&server.data, 1).run(&batches, TAIL_BYTES, || ());
    server.process.kill();
    let began = Instant::now();
    let mut server = Server::start(directory, stored_.path());
    let mut row = row("restart after kill -9", name, round);
    row.set("ready_ms", ms(began));
    let (data, metadata) = stored(stored_.path());
    row.set("journal_data_mib", data as f64 / f64::from(1 << 20));
    row.set("journal_metadata_mib", metadata as f64 / f64::from(1 << 20));
    server.process.terminate();
    row
}

/// What changed since 0, 1280 (5 MiB) and a tenth of all records ago.
fn differences(name: &str, round: usize, stored: &Stored, report: &mut Report) {
    let store = stored.open();
    let disk = store.disk(stored.disk).expect("the disk");
    let newer = disk.view(stored.last).expect("a point");
    let mut row = row("what changed", name, round);
    let tenth = stored.last.0 / 10;
    for (what, records) in [("nothing_ms", 0), ("records_1280_ms", 1280.min(tenth)), ("a_tenth_ms", tenth)] {
        let began = Instant::now();
        let older = disk.view(Lsn(stored.last.0 - records)).expect("a point");
        let changed: u64 =
            newer.diff(&older).expect("the same disk").map(|range| range.expect("an index").length()).sum();
        row.set(what, ms(began));
        assert!(changed > 0 || records == 0, "{records} records changed nothing");
    }
    let older = disk.view(Lsn(stored.last.0 - tenth)).expect("a point");
    row.set("scan_ms", scan_ms(&newer, &older, stored.disk_bytes));
    report.add(row);
}

/// How long reading and comparing both points would take: measured on a part of the disk, and that many times it.
fn scan_ms(newer: &View, older: &View, disk_bytes: u64) -> f64 {
    let part = SCAN_BYTES.min(disk_bytes);
    let [mut new, mut old] = [(); 2].map(|()| vec![0; SCAN_STEP_BYTES]);
    let (began, mut differs) = (Instant::now(), false);
    for offset in (0..part).step_by(SCAN_STEP_BYTES) {
        newer.read_with(READERS, offset, &mut new).expect("a stretch");
        older.read_with(READERS, offset, &mut old).expect("a stretch");
        differs |= new != old;
    }
    assert!(differs, "a tenth of the records changed nothing");
    ms(began) * (disk_bytes as f64 / part as f64)
}

/// A chain of images, each with a few clusters of its own; its newest.
fn chain(directory: &Path, length: usize) -> PathBuf {
    let run = |command: &mut Command| {
        let output = command.output().expect("QEMU's tools run");
        assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    let (mut random, mut backing) = (Random::of(6), None::<PathBuf>);
    for number in 0..length {
        let image = directory.join(format!("chain-{length}-{number}.qcow2"));
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2"]);
        if let Some(backing) = &backing {
            create.args(["-F", "qcow2", "-b"]).arg(backing);
        }
        run(create.arg(&image).arg(CHAIN_BYTES.to_string()));
        let mut write = Command::new("qemu-io");
        write.args(["-f", "qcow2"]);
        for _ in 0..CLUSTERS {
            let at = random.within(0..CHAIN_BYTES / CLUSTER_BYTES) * CLUSTER_BYTES;
            write.args(["-c", &format!("write -q -P 7 {at} {CLUSTER_BYTES}")]);
        }
        run(write.arg(&image));
        backing = Some(image);
    }
    backing.expect("a chain has an image")
}

/// The first byte (from the start of a process on) and strided reads of the newest image of a chain: of its oldest point, that is.
fn read_chain(name: &str, round: usize, image: &Path, reads: usize) -> Row {
    let mut row = row("4 KiB reads in the past, from the files", name, round);
    let began = Instant::now();
    let first =
        Command::new("qemu-io").args(["-f", "qcow2", "-r", "-c", "read -q 0 4096"]).arg(image).status();
    assert!(first.expect("qemu-io runs").success(), "the chain cannot be read");
    row.set("first_byte_ms", ms(began));
    // It tells its time in milliseconds: more reads, for more digits.
    let reads = 50 * reads;
    let mut bench = Command::new("qemu-img");
    bench.args(["bench", "-f", "qcow2", "-d", "1", "-s", "4096", "-S", "1052672"]);
    let output = bench.args(["-c", &reads.to_string()]).arg(image).output().expect("qemu-img runs");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let seconds = said
        .split_once("Run completed in ")
        .and_then(|(_, rest)| rest.split(' ').next()?.parse::<f64>().ok());
    row.set(
        "read_p50_us",
        seconds.unwrap_or_else(|| panic!("qemu-img bench said {said}")) * 1e6 / reads as f64,
    );
    row
}
