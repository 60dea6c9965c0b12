//! What a journal keeps for each byte that a guest writes: real programs in a real guest, on ext4 on a protected virtio disk.
//!
//! The same requests pass a `blklogwrites` node, the other way to keep every write, whose log is measured too. How fast the
//! emulated guest is does not matter: nothing in this table is a time, and one round says it all.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use cdp_tests::guest::Guest;
use cdp_tests::random::Random;
use cdp_tests::site::Site;
use cdp_tests::wait_for;

use crate::Effort;
use crate::machine;
use crate::ours::stored;
use crate::report::{Report, Row};

const DISK_BYTES: u64 = 1 << 30;
/// Bytes of what stands for a film: compressed already.
const FILM_BYTES: usize = 16 << 20;
/// Transactions of one run of SQLite.
const TRANSACTIONS: usize = 200;
/// How often each program runs.
const FULL_RUNS: u32 = 8;
const QUICK_RUNS: u32 = 1;
/// The agent says how far it is once a second.
const REPORT: Duration = Duration::from_millis(1200);

/// Programs, as lines for the guest's shell; `$I` is the number of the run.
const PROGRAMS: [(&str, &str); 5] = [
    ("SQLite, write-ahead log", "chroot /tools /usr/bin/sqlite3 /mnt/wal.db </tools/wal.sql"),
    ("SQLite, rollback journal", "chroot /tools /usr/bin/sqlite3 /mnt/delete.db </tools/delete.sql"),
    ("untar C headers", "mkdir /mnt/$I; tar -xf /tools/tree.tar -C /mnt/$I"),
    (
        "log, an fsync a line",
        "for n in $(seq 50); do append \"$n INFO $(cat /proc/uptime) request $I-$n served\"; done",
    ),
    ("copy a film", "cp /tools/film /mnt/film$I"),
];

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
    run_program(Command::new("mkfs.ext4").arg("-q").arg(&disk));
    let logged = format!(
        "driver=blklogwrites,log-sector-size=4096,file.driver=file,file.filename={},log.driver=file,log.filename={}",
        disk.display(),
        log.display()
    );
    let tools = format!("driver=file,read-only=on,filename={}", tools(directory.path()).display());
    report.begin_round(effort);
    let site = Site::start();
    let mut guest = Guest::boot_nodes(&site, "bench-space", &[logged, tools]);
    let id = site.disk("bench-space", "vda");
    site.protect(&id);
    for line in [
        "mkdir /tools && mount -t ext4 -o ro /dev/vdb /tools && mount -t ext4 /dev/vda /mnt",
        "mount -o bind /mnt /tools/mnt && sync && echo MOUNTED",
    ] {
        guest.say(line);
    }
    guest.hear("MOUNTED");
    let mut before = kept(&site, &id, &log);
    for (program, (name, line)) in PROGRAMS.into_iter().enumerate() {
        for run in 0..if effort.patient { FULL_RUNS } else { QUICK_RUNS } {
            guest.say(&format!("I={run}; {line}; sync; echo DONE $((100 * {program} + {run}))"));
            guest.hear(&format!("DONE {}", 100 * program as u32 + run));
        }
        let after = kept(&site, &id, &log);
        let raw = (after.raw - before.raw) as f64;
        let mut add = |variant: &str, data: u64, metadata: u64| {
            let mut row = Row::new("space", "ext4 in a guest", name, variant, 0);
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

/// An image with SQLite and its libraries, what it is to do, a tree and a film.
fn tools(directory: &Path) -> PathBuf {
    let (root, image) = (directory.join("tools"), directory.join("tools.raw"));
    for folder in ["mnt", "usr/bin"] {
        fs::create_dir_all(root.join(folder)).expect("a folder");
    }
    let program = Path::new("/usr/bin/sqlite3");
    let libraries = Command::new("ldd").arg(program).output().expect("ldd runs");
    let libraries = String::from_utf8_lossy(&libraries.stdout).into_owned();
    let paths = libraries.split_whitespace().filter(|word| word.starts_with('/')).map(Path::new);
    for path in paths.chain([program]) {
        let copy = root.join(path.strip_prefix("/").expect("an absolute path"));
        fs::create_dir_all(copy.parent().expect("a folder")).expect("a folder");
        fs::copy(path, copy).unwrap_or_else(|e| panic!("cannot copy {}: {e}", path.display()));
    }
    for mode in ["wal", "delete"] {
        fs::write(root.join(format!("{mode}.sql")), transactions(mode)).expect("a script");
    }
    fs::write(root.join("film"), Random::of(9).bytes(FILM_BYTES)).expect("a film");
    run_program(
        Command::new("tar").args(["-chf"]).arg(root.join("tree.tar")).args(["-C", "/usr", "include"]),
    );
    run_program(Command::new("mkfs.ext4").arg("-q").arg("-d").arg(&root).arg(&image).arg("512M"));
    image
}

/// Orders that come, are paid, and go, each change a transaction of its own.
fn transactions(mode: &str) -> String {
    let mut sql = format!(
        "PRAGMA journal_mode={mode}; PRAGMA synchronous=FULL;\n\
         CREATE TABLE IF NOT EXISTS orders(id INTEGER PRIMARY KEY, customer TEXT, state TEXT, note TEXT);\n\
         CREATE INDEX IF NOT EXISTS by_customer ON orders(customer);\n"
    );
    for _ in 0..TRANSACTIONS / 4 {
        sql += "INSERT INTO orders(customer, state, note) VALUES('customer ' || abs(random()) % 1000, 'new', hex(randomblob(100)));\n\
                INSERT INTO orders(customer, state, note) VALUES('customer ' || abs(random()) % 1000, 'new', 'deliver to the back door');\n\
                UPDATE orders SET state = 'paid' WHERE id = (SELECT abs(random()) % max(id) + 1 FROM orders);\n\
                DELETE FROM orders WHERE id = (SELECT abs(random()) % max(id) + 1 FROM orders);\n";
    }
    let _ = writeln!(sql, "SELECT count(*) FROM orders;");
    sql
}

fn run_program(command: &mut Command) {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
