//! A store that a test writes record by record, and `cdp-restore` on it.

// Each test program uses its own part of this.
#![allow(dead_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use assert_cmd::Command;
use journal_format::{
    ByteRange, Codec, DataSpan, DiskId, Epoch, Frame, FrameMeta, GapReason, Lsn, Op, Record, Stamp, frame,
};
use journal_store::Store;
use serde_json::Value;
use tempfile::TempDir;

pub(crate) const DISK: DiskId = DiskId([7; 16]);
pub(crate) const DISK_BYTES: u64 = 6 << 20;
/// 2026-11-20T10:00:00Z; record n is n seconds later.
const EPOCH_NS: u64 = 1_795_168_800_000_000_000;

pub(crate) fn stamp(lsn: u64) -> u64 {
    EPOCH_NS + lsn * 1_000_000_000
}

/// A store with one disk, and what the disk held after each record.
pub(crate) struct Journal {
    pub(crate) directory: TempDir,
    store: Store,
    pub(crate) versions: Vec<Vec<u8>>,
}

impl Journal {
    /// The first two records are the beginning and the end of the first gap, so that LSN 2 is the first good point.
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().expect("directory");
        let store = Store::open(directory.path().join("store")).expect("store");
        store.open_or_create(DISK, DISK_BYTES).expect("disk");
        let mut journal = Self { directory, store, versions: vec![vec![0; DISK_BYTES as usize]] };
        journal.push(Op::GapBegin { reason: GapReason::Attach, generation: 1 }, &[]);
        journal.push(Op::GapEnd { generation: 1 }, &[]);
        journal
    }

    /// Appends one record in a frame of its own, durably; returns its LSN.
    pub(crate) fn push(&mut self, op: Op, data: &[u8]) -> u64 {
        let lsn = self.versions.len() as u64;
        let mut image = self.versions.last().expect("a version").clone();
        let range = |range: ByteRange| range.offset() as usize..range.end() as usize;
        match op {
            Op::Write { range: r, .. } => image[range(r)].copy_from_slice(data),
            Op::Zero { range: r, .. } | Op::Discard { range: r } => image[range(r)].fill(0),
            Op::Resize { disk_bytes } => image.resize(disk_bytes as usize, 0),
            _ => {}
        }
        let meta = FrameMeta {
            disk: DISK,
            epoch: Epoch(1),
            first_lsn: Lsn(lsn),
            disk_bytes: image.len() as u64,
            codec: Codec::Raw,
            raw_bytes: data.len() as u32,
        };
        let record = Record { lsn: Lsn(lsn), stamp: Stamp(stamp(lsn)), op };
        let bytes = frame::encode(&meta, &[record], data).expect("frame");
        self.store.append(&Frame::parse(&bytes).expect("frame")).expect("append");
        self.versions.push(image);
        lsn
    }

    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> u64 {
        let span = DataSpan { pos: 0, len: data.len() as u32 };
        self.push(
            Op::Write { range: range(offset, data.len() as u64), data: span, fill: false, fua: false },
            data,
        )
    }

    pub(crate) fn bookmark(&mut self, name: &str) -> u64 {
        self.push(Op::Bookmark { name: DataSpan { pos: 0, len: name.len() as u32 } }, name.as_bytes())
    }

    pub(crate) fn commit(&self) {
        let failed = self.store.commit();
        assert!(failed.is_empty(), "{failed:?}");
    }

    /// Closes the store, so that a server can have it.
    pub(crate) fn close(self) -> (TempDir, Vec<Vec<u8>>) {
        self.commit();
        (self.directory, self.versions)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        self.commit();
        let mut command = Command::cargo_bin("cdp-restore").expect("built");
        command.args(arguments).arg("--store").arg(self.path("store")).env("TZ", "Europe/Berlin");
        command.env_remove("CDP_SERVER");
        command
    }

    /// Restores `at` to `target`, with more arguments.
    pub(crate) fn restore(&self, at: &str, target: &Path, more: &[&str]) -> Output {
        let target = target.to_str().expect("UTF-8");
        let disk = DISK.to_string();
        let arguments = [&["--at", at, "--disk", &disk, "--output", target], more].concat();
        self.command(&arguments).output().expect("runs")
    }

    /// Restores `at` to a new raw file and compares it with the disk as it was at `lsn`.
    pub(crate) fn assert_restores(&self, at: &str, lsn: u64) {
        let target = self.path("restored");
        let output = self.restore(at, &target, &[]);
        assert!(output.status.success(), "{at}: {}", stderr(&output));
        assert!(stdout(&output).contains(&format!("lsn {lsn}, ")), "{at}: {}", stdout(&output));
        assert!(fs::read(&target).expect("image") == self.versions[lsn as usize], "{at} differs");
        fs::remove_file(&target).expect("remove");
    }
}

pub(crate) fn range(offset: u64, length: u64) -> ByteRange {
    ByteRange::new(offset, length).expect("a range")
}

pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub(crate) fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", stdout(output)))
}

/// LSN 3 to 6: a write, a bookmark, another write over it, a flush.
pub(crate) fn example() -> Journal {
    let mut journal = Journal::new();
    journal.write(4096, &[1; 100_000]);
    journal.bookmark("before upgrade");
    journal.write(50_000, &[2; 100_000]);
    journal.push(Op::Flush, &[]);
    journal
}
