//! What a journal keeps for each byte that a guest writes: real programs in a real guest, on ext4 on a protected virtio disk.
//!
//! The same requests pass a `blklogwrites` node, the other way to keep every write, whose log is measured too. All programs run
//! once in each round, with what the rounds before have left on the file system. Nothing in this table is a time, so no round
//! waits for a quiet moment.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use cdp_tests::guest::Guest;
use cdp_tests::site::Site;
use cdp_tests::wait_for;

use crate::Effort;
use crate::machine;
use crate::ours::stored;
use crate::report::{Report, Row};
use crate::tools::{self, PROGRAMS};

const DISK_BYTES: u64 = 1 << 30;
/// The agent says how far it is once a second.
const REPORT: Duration = Duration::from_millis(1200);

/// What is kept so far.
struct Kept {
    raw: u64,
    data: u64,
    metadata: u64,
    records: u64,
    log: u64,
}

pub(crate) fn run(effort: Effort, report: &mut Report) {
    let directory = machine::directory_on_disk();
    let path = |name: &str| directory.path().join(name);
    let (disk, log) = (path("disk.raw"), path("log.raw"));
    File::create(&log).expect("a log").set_len(16 * DISK_BYTES).expect("its size");
    File::create(&disk).expect("a disk").set_len(DISK_BYTES).expect("its size");
    tools::run(Command::new("mkfs.ext4").arg("-q").arg(&disk));
    let logged = format!(
        "driver=blklogwrites,log-sector-size=4096,file.driver=file,file.filename={},log.driver=file,log.filename={}",
        disk.display(),
        log.display()
    );
    let tools = format!("driver=file,read-only=on,filename={}", tools::image(directory.path()).display());
    report.begin_round(effort);
    let site = Site::start();
    let mut guest = Guest::boot_nodes(&site, "bench-space", &[logged, tools]);
    let id = site.disk("bench-space", "vda");
    site.protect(&id);
    for (step, line) in tools::PREPARE.into_iter().enumerate() {
        carry_out(&mut guest, line, &format!("READY {step}"));
    }
    let mut before = kept(&site, &id, &log);
    let runs = (0..effort.rounds)
        .flat_map(|round| PROGRAMS.into_iter().enumerate().map(move |program| (round, program)));
    for (round, (program, (name, line))) in runs {
        carry_out(&mut guest, &format!("I={round} && {line}"), &format!("DONE {round}.{program}"));
        let after = kept(&site, &id, &log);
        let raw = (after.raw - before.raw) as f64;
        let mut add = |variant: &str, data: u64, metadata: u64| {
            let mut row = Row::new("space", "ext4 in a guest", name, variant, round);
            row.set("kept_per_byte_written", (data + metadata) as f64 / raw);
            row.set("data", data as f64 / raw);
            row.set("metadata", metadata as f64 / raw);
            row.set("metadata_bytes_per_record", metadata as f64 / (after.records - before.records) as f64);
            row.set("written_mib", raw / f64::from(1 << 20));
            report.add(row);
        };
        add("blklogwrites", after.log - before.log, 0);
        add("qemu-cdp", after.data - before.data, after.metadata - before.metadata);
        before = after;
    }
}

/// Has the guest's shell run a line, which must succeed, and make all of it durable; then it prints `done`.
fn carry_out(guest: &mut Guest, line: &str, done: &str) {
    guest.say(&format!(
        "if {{ {line}; }} >/tmp/out 2>&1; then sync; echo {done}; else cat /tmp/out; echo FAILED; fi"
    ));
    guest.hear(done);
}

/// What is kept, when everything that the guest wrote is durable.
fn kept(site: &Site, disk: &str, log: &Path) -> Kept {
    thread::sleep(REPORT);
    let journal = wait_for("the server to catch up", || {
        let journal = site.client().disk(disk).expect("the disk").journal?;
        (journal.lag_lsns == 0).then_some(journal)
    });
    let (data, metadata) = stored(&site.store());
    let log = fs::metadata(log).expect("the log").blocks() * 512;
    Kept { raw: journal.raw_bytes, data, metadata, records: journal.durable_lsn, log }
}
