//! Who takes part: the plain disk, ours, and everything that QEMU itself can capture writes with. Each peer has its best
//! settings: direct I/O, native or io_uring submission as the disk has, log sectors of 4 KiB.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use cdp_tests::process::Process;
use cdp_tests::wait_for;
use serde_json::{Value, json};

use crate::machine;

/// Bytes of the disk, and of each peer's second copy.
pub(crate) const DISK_BYTES: u64 = 1 << 30;

/// What files hold before: not zeroes, and allocated.
pub(crate) const CONTENTS: u8 = 0xa5;

/// Makes a file of that size with all its blocks: nobody's first write of a block is dearer than the next.
pub(crate) fn fill(path: &Path, bytes: u64) {
    let block = vec![CONTENTS; 1 << 20];
    let mut file = File::create(path).expect("a file");
    for _ in 0..bytes / block.len() as u64 {
        file.write_all(&block).expect("room for the file");
    }
    file.sync_all().expect("durable");
}

/// What the disk is on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Medium {
    /// Nothing: QEMU's `null-co`, which says that all is done. In process only.
    Null,
    /// A file in memory.
    Tmpfs,
    /// A file on the disk that the build is on.
    Disk,
}

impl Medium {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Null => "null-co",
            Self::Tmpfs => "tmpfs",
            Self::Disk => "disk",
        }
    }

    /// Where its files lie.
    pub(crate) fn directory(self) -> tempfile::TempDir {
        match self {
            Self::Null | Self::Tmpfs => {
                tempfile::Builder::new().prefix("cdp-bench-").tempdir_in("/dev/shm").expect("a directory")
            }
            Self::Disk => machine::directory_on_disk(),
        }
    }

    /// A node on it, which is `NAME.raw` in `directory` where there are files, and has that size where there are none.
    pub(crate) fn node(self, directory: &Path, name: &str, bytes: u64) -> Value {
        match self {
            Self::Null => json!({"driver": "null-co", "node-name": name, "size": bytes}),
            Self::Tmpfs | Self::Disk => {
                let path = directory.join(format!("{name}.raw"));
                json!({"driver": "file", "node-name": name, "filename": path, "aio": "native", "cache": {"direct": true}})
            }
        }
    }
}

/// A variant of the disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Variant {
    /// The disk alone.
    Plain,
    /// The disk alone, and a thread that only copies memory on the other core: what the machine itself does to a guest then.
    PlainBesideCopies,
    /// Below a filter that does nothing: what one more layer costs.
    Throttle,
    /// Our library is loaded, and the disk is not protected.
    OursOff,
    /// Protected: agent and server are alive.
    OursOn,
    /// Every write also to a local log.
    BlkLogWrites,
    /// Every write to two disks.
    Quorum,
    /// Every write also to a log on an NBD server that drops it.
    BlkLogWritesNbd,
    /// Every write also to an NBD server that drops it.
    QuorumNbd,
    /// A mirror to that server that guests wait for.
    MirrorBlocking,
    /// A mirror to that server that follows behind: no history.
    MirrorBackground,
    /// A backup to that server, of what is overwritten, once per cluster.
    Backup,
    /// The filter with which a backup does that, without its job.
    CopyBeforeWrite,
}

impl Variant {
    /// Who takes part through an export.
    pub(crate) const EXPORTED: [Self; 11] = [
        Self::Plain,
        Self::Throttle,
        Self::OursOff,
        Self::OursOn,
        Self::BlkLogWrites,
        Self::Quorum,
        Self::BlkLogWritesNbd,
        Self::QuorumNbd,
        Self::MirrorBlocking,
        Self::MirrorBackground,
        Self::Backup,
    ];

    /// Those of them that have another end, and the plain disk.
    pub(crate) const REMOTE: [Self; 7] = [
        Self::Plain,
        Self::OursOn,
        Self::BlkLogWritesNbd,
        Self::QuorumNbd,
        Self::MirrorBlocking,
        Self::MirrorBackground,
        Self::Backup,
    ];

    /// Who takes part in process, where there are no jobs.
    pub(crate) const IN_PROCESS: [Self; 9] = [
        Self::Plain,
        Self::Throttle,
        Self::OursOff,
        Self::OursOn,
        Self::BlkLogWrites,
        Self::Quorum,
        Self::BlkLogWritesNbd,
        Self::QuorumNbd,
        Self::CopyBeforeWrite,
    ];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::PlainBesideCopies => "plain, the other core copies",
            Self::Throttle => "throttle, no limit",
            Self::OursOff => "qemu-cdp, off",
            Self::OursOn => "qemu-cdp, on",
            Self::BlkLogWrites => "blklogwrites, local",
            Self::Quorum => "quorum of 2, local",
            Self::BlkLogWritesNbd => "blklogwrites, NBD",
            Self::QuorumNbd => "quorum of 2, NBD",
            Self::MirrorBlocking => "mirror, write-blocking",
            Self::MirrorBackground => "mirror, background",
            Self::Backup => "backup, sync=none",
            Self::CopyBeforeWrite => "copy-before-write, NBD",
        }
    }

    pub(crate) const fn is_ours(self) -> bool {
        matches!(self, Self::OursOff | Self::OursOn)
    }

    /// Whether nothing of it goes over NBD.
    pub(crate) const fn is_local(self) -> bool {
        matches!(
            self,
            Self::Plain
                | Self::PlainBesideCopies
                | Self::Throttle
                | Self::OursOff
                | Self::OursOn
                | Self::BlkLogWrites
                | Self::Quorum
        )
    }

    /// Starts the server that drops what it gets on that core, where the variant needs one.
    pub(crate) fn start_sink(
        self,
        core: &str,
        directory: &Path,
        socket: &Path,
        disk_bytes: u64,
    ) -> Option<Process> {
        // A log grows; a second copy is as large as the first.
        let bytes = match self {
            Self::BlkLogWritesNbd => 16 * disk_bytes,
            Self::QuorumNbd
            | Self::MirrorBlocking
            | Self::MirrorBackground
            | Self::Backup
            | Self::CopyBeforeWrite => disk_bytes,
            _ => return None,
        };
        let mut command = machine::pinned(core, "nbdkit");
        command.args(["-f", "-U"]).arg(socket).args(["null", &bytes.to_string()]);
        let sink = Process::start(directory, "sink", &mut command);
        wait_for("the sink's socket", || socket.exists().then_some(()));
        Some(sink)
    }

    /// Its nodes; the first one, `disk` or `top`, is written to. `local` makes those named `disk`, `log` and `second`.
    pub(crate) fn nodes(self, local: impl Fn(&str) -> Value, sink: &Path) -> Vec<Value> {
        let disk = || local("disk");
        let remote = || {
            let server = json!({"type": "unix", "path": sink});
            json!({"driver": "nbd", "node-name": "sink", "server": server})
        };
        let logged = |log: Value| json!({"driver": "blklogwrites", "node-name": "top", "file": disk(), "log": log, "log-sector-size": 4096});
        let quorum = |second: Value| json!({"driver": "quorum", "node-name": "top", "vote-threshold": 2, "children": [disk(), second]});
        match self {
            Self::Plain | Self::PlainBesideCopies | Self::OursOff | Self::OursOn => vec![disk()],
            Self::Throttle => {
                vec![
                    json!({"driver": "throttle", "node-name": "top", "throttle-group": "none", "file": disk()}),
                ]
            }
            Self::BlkLogWrites => vec![logged(local("log"))],
            Self::Quorum => vec![quorum(local("second"))],
            Self::BlkLogWritesNbd => vec![logged(remote())],
            Self::QuorumNbd => vec![quorum(remote())],
            Self::MirrorBlocking | Self::MirrorBackground | Self::Backup => vec![disk(), remote()],
            Self::CopyBeforeWrite => {
                vec![
                    json!({"driver": "copy-before-write", "node-name": "top", "file": disk(), "target": remote()}),
                ]
            }
        }
    }

    /// The node that is written to.
    pub(crate) fn top(self) -> &'static str {
        match self {
            Self::Throttle | Self::BlkLogWrites | Self::Quorum | Self::BlkLogWritesNbd | Self::QuorumNbd => {
                "top"
            }
            _ => "disk",
        }
    }

    /// The job that captures, as a QMP command and its arguments.
    pub(crate) fn job(self) -> Option<(&'static str, Value)> {
        let mirror = |mode: &str| {
            let job = json!({"job-id": "job0", "device": "disk", "target": "sink", "sync": "none", "copy-mode": mode});
            Some(("blockdev-mirror", job))
        };
        match self {
            Self::MirrorBlocking => mirror("write-blocking"),
            Self::MirrorBackground => mirror("background"),
            Self::Backup => {
                let job = json!({"job-id": "job0", "device": "disk", "target": "sink", "sync": "none"});
                Some(("blockdev-backup", job))
            }
            _ => None,
        }
    }
}

/// A pattern of writes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pattern {
    pub(crate) name: &'static str,
    /// Bytes of a write.
    pub(crate) bytes: u64,
    /// Writes in flight.
    pub(crate) depth: u32,
}

/// 4 KiB one at a time and many at once, 64 KiB, 1 MiB.
pub(crate) const PATTERNS: [Pattern; 4] = [
    Pattern { name: "4 KiB, depth 1", bytes: 4 << 10, depth: 1 },
    Pattern { name: "4 KiB, depth 32", bytes: 4 << 10, depth: 32 },
    Pattern { name: "64 KiB, depth 8", bytes: 64 << 10, depth: 8 },
    Pattern { name: "1 MiB, depth 4", bytes: 1 << 20, depth: 4 },
];
