//! How much one core of the server takes in, durably: frames from memory, over TCP, TLS and a Unix socket, beside servers that
//! keep no history (on Unix sockets).
//!
//! The load's frames are packed before the clock starts. A row ends with the acknowledgement of its last frame, or with the
//! peer's flush; peers flush every 16 MiB, as often as the server commits under load.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use cdp_tests::certificates::Authority;
use cdp_tests::process::Process;
use cdp_tests::wait_for;

use crate::contents::{Batch, Contents, batches};
use crate::export::finish;
use crate::feed::Feed;
use crate::machine::{self, GUEST_CORE, SINK_CORE};
use crate::ours::{Server, stored};
use crate::report::{Report, Row};
use crate::variants::Medium;
use crate::{Effort, parts};

/// Bytes of guests' data in a row.
const FULL_BYTES: u64 = 256 << 20;
const QUICK_BYTES: u64 = 32 << 20;
/// Between two flushes of a peer.
const FLUSH_BYTES: u64 = 16 << 20;
/// What one disk writes while a frame may wait to be filled (1.5 ms), at 1 GB/s for all disks together.
const AGE_BYTES: usize = 1536 << 10;
/// Disks at once; a quick run has all but the last.
const DISKS: [usize; 4] = [1, 8, 64, 256];

const SECTION: &str = "one core of the server";
const MEDIUM: &str = "disk";
const MANY_DISKS: &str = "many disks, random data, 4 KiB";

/// A kind of load.
pub(crate) struct Load {
    pub(crate) name: &'static str,
    pub(crate) contents: Contents,
    pub(crate) record_bytes: usize,
    /// Requests in flight, for peers.
    depth: usize,
}

pub(crate) const LOADS: [Load; 4] = [
    Load { name: "random data, 4 KiB", contents: Contents::Random, record_bytes: 4 << 10, depth: 64 },
    Load { name: "random data, 64 KiB", contents: Contents::Random, record_bytes: 64 << 10, depth: 16 },
    Load { name: "files, 64 KiB", contents: Contents::Files, record_bytes: 64 << 10, depth: 16 },
    Load { name: "database pages, 8 KiB", contents: Contents::Database, record_bytes: 8 << 10, depth: 64 },
];

/// What is between the load and the server.
#[derive(Clone, Copy)]
enum Way {
    Tcp,
    Tls,
    Unix,
}

impl Way {
    /// Those that are measured with a load: the kind of socket shows with data that costs little else.
    fn of(load: &Load) -> &'static [(Self, &'static str)] {
        match load.contents {
            Contents::Random => &[
                (Self::Tcp, "qemu-cdp"),
                (Self::Tls, "qemu-cdp, TLS"),
                (Self::Unix, "qemu-cdp, Unix socket"),
            ],
            _ => &[(Self::Tcp, "qemu-cdp")],
        }
    }
}

#[derive(Clone, Copy)]
enum Peer {
    NbdkitFile,
    QemuNbd,
}

pub(crate) fn run(effort: Effort, report: &mut Report) {
    machine::pin(std::process::id(), GUEST_CORE);
    let bytes = if effort.patient { FULL_BYTES } else { QUICK_BYTES };
    let (directory, memory) = (machine::directory_on_disk(), Medium::Tmpfs.directory());
    for load in &LOADS {
        if !report.wants(SECTION, MEDIUM, load.name) {
            continue;
        }
        let contents = load.contents.bytes();
        let frames = batches(&contents, load.record_bytes, AGE_BYTES);
        for round in 0..effort.rounds {
            report.begin_round(effort);
            for (peer, name) in [(Peer::NbdkitFile, "nbdkit file"), (Peer::QemuNbd, "qemu-nbd raw")] {
                let row = Row::new(SECTION, MEDIUM, load.name, name, round);
                report.add(of_peer(row, peer, directory.path(), load, bytes));
            }
            for &(way, name) in Way::of(load) {
                let row = Row::new(SECTION, MEDIUM, load.name, name, round);
                report.add(ours(row, directory.path(), way, &frames, 1, bytes));
            }
            // What the core alone would do: the disk does not hold it up.
            let name = "qemu-cdp, Unix socket, store in memory";
            let row = Row::new(SECTION, MEDIUM, load.name, name, round);
            report.add(ours(row, memory.path(), Way::Unix, &frames, 1, bytes));
        }
        parts::run(effort, report, load, &frames, directory.path());
    }
    if !report.wants(SECTION, MEDIUM, MANY_DISKS) {
        return;
    }
    let contents = Contents::Random.bytes();
    let disks = if effort.patient { &DISKS[..] } else { &DISKS[..3] };
    let packed: Vec<_> = disks.iter().map(|disks| batches(&contents, 4 << 10, AGE_BYTES / disks)).collect();
    for round in 0..effort.rounds {
        report.begin_round(effort);
        for (&disks, frames) in disks.iter().zip(&packed) {
            let name = format!("qemu-cdp, {disks} disks at once");
            let row = Row::new(SECTION, MEDIUM, MANY_DISKS, &name, round);
            report.add(ours(row, directory.path(), Way::Tcp, frames, disks, bytes));
        }
    }
}

fn ours(mut row: Row, directory: &Path, way: Way, frames: &[Batch], disks: usize, bytes: u64) -> Row {
    let store = directory.join("store");
    // A target directory may lie deeper than a socket's path is long.
    let sockets = tempfile::tempdir().expect("a directory");
    let socket = sockets.path().join("server.sock").display().to_string();
    let authority = Authority::new();
    let [cert, key] = authority.issue("127.0.0.1");
    let arguments: &[&str] = match way {
        Way::Tcp => &[],
        Way::Tls => &["--tls-cert", &cert, "--tls-key", &key],
        Way::Unix => &["--listen-unix", &socket],
    };
    let mut server = Server::start_with(directory, &store, arguments);
    let pid = server.process.pid();
    let mut feed = match way {
        Way::Tcp => Feed::connect(&server.data, disks),
        Way::Tls => Feed::connect_tls(&server.data, &authority.ca(), disks),
        Way::Unix => Feed::connect(&format!("unix:{socket}"), disks),
    };
    let used = || {
        let of_thread = |name| machine::thread_seconds(pid, name);
        [machine::cpu_seconds(pid), of_thread("cdp-agent"), of_thread("cdp-commit")]
    };
    let mut before = [0.0; 3];
    let fed = feed.run(frames, bytes, || before = used());
    let after = used();
    let gigabytes = fed.raw_bytes as f64 / 1e9;
    row.set("mb_per_s", fed.raw_bytes as f64 / 1e6 / fed.seconds);
    row.set("krecords_per_s", fed.records as f64 / 1e3 / fed.seconds);
    for (at, name) in
        ["server_cpu_s_per_gb", "receiver_s_per_gb", "committer_s_per_gb"].into_iter().enumerate()
    {
        row.set(name, (after[at] - before[at]) / gigabytes);
    }
    row.set("durable_p50_ms", fed.wait_ms(500));
    row.set("durable_p99_ms", fed.wait_ms(990));
    let (data, meta) = stored(&store);
    row.set("data_bytes_per_byte", data as f64 / fed.raw_bytes as f64);
    row.set("metadata_bytes_per_record", meta as f64 / fed.records as f64);
    row.set("rss_mib", machine::status_mib(pid, "VmRSS"));
    server.process.terminate();
    fs::remove_dir_all(&store).expect("the store");
    row
}

fn of_peer(mut row: Row, peer: Peer, directory: &Path, load: &Load, bytes: u64) -> Row {
    let (image, socket) = (directory.join("image.raw"), directory.join("nbd"));
    let status = Command::new("fallocate").args(["-l", &bytes.to_string()]).arg(&image).status();
    assert!(status.expect("fallocate runs").success(), "no room for an image");
    let mut command = match peer {
        Peer::NbdkitFile => {
            let mut command = machine::pinned(SINK_CORE, "nbdkit");
            command.args(["-f", "-t", "4", "-U"]).arg(&socket).arg("file").arg(&image);
            command
        }
        Peer::QemuNbd => {
            let mut command = machine::pinned(SINK_CORE, "qemu-nbd");
            command.args(["--persistent", "--format=raw", "--cache=writeback", "--aio=io_uring", "--socket"]);
            command.arg(&socket).arg(&image);
            command
        }
    };
    let mut process = Process::start(directory, "peer", &mut command);
    wait_for("the peer's socket", || socket.exists().then_some(()));
    let mut fio = machine::pinned(GUEST_CORE, "fio");
    fio.args(["--name=load", "--ioengine=nbd", "--rw=randwrite", "--norandommap", "--output-format=json"]);
    fio.args(["--randrepeat=0", "--group_reporting=1", "--end_fsync=1"]);
    fio.arg(format!("--uri=nbd+unix:///?socket={}", socket.display()));
    fio.arg(format!("--bs={}", load.record_bytes)).arg(format!("--iodepth={}", load.depth));
    fio.arg(format!("--fsync={}", FLUSH_BYTES / load.record_bytes as u64));
    fio.arg(format!("--size={bytes}")).arg(format!("--io_size={bytes}"));
    let cpu = machine::cpu_seconds(process.pid());
    let seen = finish(fio.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("fio runs"));
    let records = seen.writes;
    row.set("mb_per_s", records * load.record_bytes as f64 / 1e6 / seen.seconds);
    row.set("krecords_per_s", records / 1e3 / seen.seconds);
    let gigabytes = bytes as f64 / 1e9;
    row.set("server_cpu_s_per_gb", (machine::cpu_seconds(process.pid()) - cpu) / gigabytes);
    process.terminate();
    for path in [&image, &socket] {
        let _gone = fs::remove_file(path);
    }
    row
}
