//! `cdp-restore` as its users see it, on stores that these tests write.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Output;

use assert_cmd::Command;
use journal_format::{
    ByteRange, Codec, DataSpan, DiskId, Epoch, Frame, FrameMeta, GapReason, Lsn, Op, Record, Stamp, frame,
};
use journal_store::Store;
use proptest::prelude::*;
use serde_json::Value;
use tempfile::TempDir;

const DISK: DiskId = DiskId([7; 16]);
const DISK_BYTES: u64 = 6 << 20;
/// 2026-11-20T10:00:00Z; record n is n seconds later.
const EPOCH_NS: u64 = 1_795_168_800_000_000_000;

fn stamp(lsn: u64) -> u64 {
    EPOCH_NS + lsn * 1_000_000_000
}

/// A store with one disk, and what the disk held after each record.
struct Journal {
    directory: TempDir,
    store: Store,
    versions: Vec<Vec<u8>>,
}

impl Journal {
    /// The first two records are the beginning and the end of the first gap, so that LSN 2 is the first good point.
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("directory");
        let store = Store::open(directory.path().join("store")).expect("store");
        store.open_or_create(DISK, DISK_BYTES).expect("disk");
        let mut journal = Self { directory, store, versions: vec![vec![0; DISK_BYTES as usize]] };
        journal.push(Op::GapBegin { reason: GapReason::Attach, generation: 1 }, &[]);
        journal.push(Op::GapEnd { generation: 1 }, &[]);
        journal
    }

    /// Appends one record in a frame of its own, durably; returns its LSN.
    fn push(&mut self, op: Op, data: &[u8]) -> u64 {
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

    fn write(&mut self, offset: u64, data: &[u8]) -> u64 {
        let span = DataSpan { pos: 0, len: data.len() as u32 };
        self.push(
            Op::Write { range: range(offset, data.len() as u64), data: span, fill: false, fua: false },
            data,
        )
    }

    fn bookmark(&mut self, name: &str) -> u64 {
        self.push(Op::Bookmark { name: DataSpan { pos: 0, len: name.len() as u32 } }, name.as_bytes())
    }

    fn commit(&self) {
        let failed = self.store.commit();
        assert!(failed.is_empty(), "{failed:?}");
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        self.commit();
        let mut command = Command::cargo_bin("cdp-restore").expect("built");
        command.args(arguments).arg("--store").arg(self.path("store")).env("TZ", "Europe/Berlin");
        command.env_remove("CDP_SERVER");
        command
    }

    /// Restores `at` to `target`, with more arguments.
    fn restore(&self, at: &str, target: &Path, more: &[&str]) -> Output {
        let target = target.to_str().expect("UTF-8");
        let disk = DISK.to_string();
        let arguments = [&["--at", at, "--disk", &disk, "--output", target], more].concat();
        self.command(&arguments).output().expect("runs")
    }

    /// Restores `at` to a new raw file and compares it with the disk as it was at `lsn`.
    fn assert_restores(&self, at: &str, lsn: u64) {
        let target = self.path("restored");
        let output = self.restore(at, &target, &[]);
        assert!(output.status.success(), "{at}: {}", stderr(&output));
        assert!(stdout(&output).contains(&format!("lsn {lsn}, ")), "{at}: {}", stdout(&output));
        assert!(fs::read(&target).expect("image") == self.versions[lsn as usize], "{at} differs");
        fs::remove_file(&target).expect("remove");
    }
}

fn range(offset: u64, length: u64) -> ByteRange {
    ByteRange::new(offset, length).expect("a range")
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", stdout(output)))
}

/// LSN 3 to 6: a write, a bookmark, another write over it, a flush.
fn example() -> Journal {
    let mut journal = Journal::new();
    journal.write(4096, &[1; 100_000]);
    journal.bookmark("before upgrade");
    journal.write(50_000, &[2; 100_000]);
    journal.push(Op::Flush, &[]);
    journal
}

#[test]
fn every_form_of_a_point_is_restored() {
    let journal = example();
    journal.assert_restores("lsn:3", 3);
    journal.assert_restores("latest", 6);
    journal.assert_restores("bookmark:before upgrade", 4);
    journal.assert_restores("2026-11-20T10:00:03Z", 3);
    journal.assert_restores("2026-11-20T10:00:03.999999999Z", 3);
    journal.assert_restores("2026-11-20T12:00:05+02:00", 5);
    journal.assert_restores("2026-11-20 11:00:03", 3);
}

fn any_op() -> impl Strategy<Value = (u8, u64, u64, u8)> {
    (0..8_u8, 0..DISK_BYTES / 512, 1..600_u64, 1..=255_u8)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4))]

    #[test]
    fn every_point_of_a_random_history_is_restored(ops in prop::collection::vec(any_op(), 1..30)) {
        let mut journal = Journal::new();
        for (kind, sector, sectors, byte) in ops {
            let size = journal.versions.last().expect("a version").len() as u64;
            let offset = sector * 512 % size;
            let length = (sectors * 512).min(size - offset);
            let range = range(offset, length);
            match kind {
                0..4 => journal.write(offset, &vec![byte; length as usize]),
                4 => journal.push(Op::Zero { range, fill: false, fua: false, may_unmap: true }, &[]),
                5 => journal.push(Op::Discard { range }, &[]),
                6 => journal.push(Op::Resize { disk_bytes: DISK_BYTES / 2 + sector * 512 }, &[]),
                _ => journal.push(Op::Flush, &[]),
            };
        }
        for lsn in 2..journal.versions.len() as u64 {
            journal.assert_restores(&format!("lsn:{lsn}"), lsn);
        }
    }
}

#[test]
fn the_point_is_said_first_in_utc_and_local_time() {
    let journal = example();
    let output = journal.restore("lsn:6", &journal.path("restored"), &[]);
    let first = stdout(&output).lines().next().expect("a line").to_owned();
    assert!(first.contains("lsn 6, 2026-11-20T10:00:06.000000000Z"), "{first}");
    assert!(first.contains("2026-11-20 11:00:06.000000000 +01:00 local"), "{first}");
    assert!(first.contains("after a flush"), "{first}");
    assert_eq!(stderr(&output), "", "no progress in a pipe");
}

#[test]
fn zeroes_take_no_space() {
    let mut journal = Journal::new();
    journal.write(1 << 20, &[1; 8192]);
    let target = journal.path("restored");
    assert!(journal.restore("latest", &target, &[]).status.success());
    let meta = fs::metadata(&target).expect("image");
    assert_eq!(meta.len(), DISK_BYTES);
    assert!(meta.blocks() * 512 <= 64 << 10, "{} bytes allocated", meta.blocks() * 512);
}

#[test]
fn a_qcow2_image_is_one_that_qemu_takes() {
    let journal = example();
    let (raw, qcow2) = (journal.path("restored.raw"), journal.path("restored.qcow2"));
    assert!(journal.restore("lsn:5", &raw, &[]).status.success());
    let output = journal.restore("lsn:5", &qcow2, &["--format", "qcow2"]);
    assert!(output.status.success(), "{}", stderr(&output));
    Command::new("qemu-img").args(["check", "-q", "-f", "qcow2"]).arg(&qcow2).assert().success();
    let compare = ["compare", "-q", "-f", "raw", "-F", "qcow2"];
    Command::new("qemu-img").args(compare).arg(&raw).arg(&qcow2).assert().success();
}

#[test]
fn a_point_in_a_gap_is_refused_with_its_neighbours() {
    let mut journal = example();
    journal.push(Op::GapBegin { reason: GapReason::Overflow, generation: 2 }, &[]);
    journal.write(0, &[9; 512]);
    let end = journal.push(Op::GapEnd { generation: 2 }, &[]);
    let target = journal.path("restored");
    for at in ["lsn:8", "2026-11-20T10:00:08.5Z"] {
        let output = journal.restore(at, &target, &["--output-format", "json"]);
        assert_eq!(output.status.code(), Some(3), "{at}: {}", stderr(&output));
        let error = &json(&output)["error"];
        assert_eq!(error["kind"], "point-in-gap", "{at}");
        assert_eq!((&error["before"]["lsn"], &error["after"]["lsn"]), (&6.into(), &end.into()), "{at}");
        assert!(stderr(&output).contains("nearest point before: lsn 6"), "{at}: {}", stderr(&output));
        assert!(!target.exists(), "{at}: something was left");
    }
    journal.assert_restores(&format!("lsn:{end}"), end);
}

#[test]
fn a_point_out_of_range_is_refused_with_the_nearest() {
    let journal = example();
    let target = journal.path("restored");
    for (at, near, lsn) in [("lsn:99", "before", 6), ("2020-01-01T00:00:00Z", "after", 2)] {
        let output = journal.restore(at, &target, &["--output-format", "json"]);
        assert_eq!(output.status.code(), Some(3), "{at}: {}", stderr(&output));
        assert_eq!(json(&output)["error"][near]["lsn"], lsn, "{at}");
    }
    let output = journal.restore("bookmark:none", &target, &[]);
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    let output = journal.restore("yesterday-ish", &target, &[]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(!target.exists());
}

#[test]
fn a_target_that_is_not_empty_needs_force() {
    let journal = example();
    let target = journal.path("restored");
    fs::write(&target, b"precious").expect("write");
    fs::set_permissions(&target, fs::Permissions::from_mode(0o640)).expect("mode");
    let output = journal.restore("latest", &target, &[]);
    assert_eq!(output.status.code(), Some(4), "{}", stderr(&output));
    assert!(stderr(&output).contains("--force"), "{}", stderr(&output));
    assert_eq!(fs::read(&target).expect("file"), b"precious");

    let output = journal.restore("latest", &target, &["--force"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(fs::read(&target).expect("file") == journal.versions[6]);
    assert_eq!(fs::metadata(&target).expect("file").mode() & 0o777, 0o640, "it keeps its mode");
    fs::remove_file(&target).expect("remove");

    File::create(&target).expect("empty file");
    assert!(journal.restore("latest", &target, &[]).status.success(), "an empty file needs no force");
}

#[test]
fn a_directory_is_no_target() {
    let journal = example();
    let output = journal.restore("latest", journal.directory.path(), &["--force"]);
    assert_eq!(output.status.code(), Some(4), "{}", stderr(&output));
}

#[test]
fn a_link_stays_and_the_file_behind_it_is_replaced() {
    let journal = example();
    let (file, link) = (journal.path("file"), journal.path("link"));
    fs::write(&file, b"old").expect("write");
    std::os::unix::fs::symlink(&file, &link).expect("link");
    assert!(journal.restore("latest", &link, &["--force"]).status.success());
    assert!(fs::symlink_metadata(&link).expect("link").is_symlink());
    assert!(fs::read(&file).expect("file") == journal.versions[6]);
}

#[test]
fn json_is_one_document() {
    let journal = example();
    let target = journal.path("restored");
    let report = json(&journal.restore("lsn:4", &target, &["--output-format", "json"]));
    assert_eq!(report["point"]["lsn"], 4);
    assert_eq!(report["point"]["time"], "2026-11-20T10:00:04.000000000Z");
    assert_eq!(report["point"]["kind"], "bookmark");
    assert_eq!(report["disk"]["id"], DISK.to_string());
    assert_eq!(report["disk_bytes"], DISK_BYTES);
    assert_eq!(report["output"], target.to_str().expect("UTF-8"));
    assert_eq!(report["verified"], true);
}

#[test]
fn disks_are_found_by_name_and_listed() {
    let journal = example();
    let name = journal.path("store").join("disks").join(DISK.to_string()).join("name.json");
    fs::write(name, r#"{"vm": "web", "device": "disk0", "host": "h1", "vm_uuid": null}"#).expect("name");
    let target = journal.path("restored");
    let target = target.to_str().expect("UTF-8");
    journal.command(&["--at", "latest", "--disk", "web/disk0", "--output", target]).assert().success();
    journal
        .command(&["--at", "latest", "--disk", "web/other", "--output", target, "--force"])
        .assert()
        .code(1);

    let output = journal.command(&["list", "--output-format", "json"]).output().expect("runs");
    let disk = &json(&output)["disks"][0];
    assert_eq!((&disk["vm"], &disk["device"]), (&"web".into(), &"disk0".into()));
    let ranges = &disk["points"]["recoverable"];
    assert_eq!((&ranges[0]["from_lsn"], &ranges[0]["to_lsn"]), (&2.into(), &6.into()), "{ranges}");
    assert_eq!(disk["points"]["bookmarks"][0]["name"], "before upgrade");

    let output = journal.command(&["list", "--disk", "web/disk0"]).output().expect("runs");
    let text = stdout(&output);
    for part in ["web/disk0", "recoverable  lsn 2 to 6", "(attach)", "before upgrade", "11:00:06"] {
        assert!(text.contains(part), "{part} is missing in:\n{text}");
    }
}

#[test]
fn a_store_that_is_not_there_is_said_so() {
    let directory = tempfile::tempdir().expect("directory");
    let mut command = Command::cargo_bin("cdp-restore").expect("built");
    let store = directory.path().join("nowhere");
    let output = command.arg("list").arg("--store").arg(&store).output().expect("runs");
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("hint: "), "{}", stderr(&output));
    assert!(!store.exists(), "looking makes nothing");
}

#[test]
fn a_damaged_journal_leaves_no_image() {
    let mut journal = Journal::new();
    journal.write(0, &[5; 100_000]);
    journal.commit();
    // A later record knows that the write was durable, so what is broken cannot be taken for a torn tail.
    journal.push(Op::Flush, &[]);
    journal.commit();
    let segments = fs::read_dir(journal.path("store").join("disks").join(DISK.to_string())).expect("files");
    let data = segments.map(|entry| entry.expect("entry").path());
    let data = data.into_iter().find(|path| path.to_string_lossy().contains("data-")).expect("a data file");
    let mut bytes = fs::read(&data).expect("data");
    let at = bytes.iter().position(|byte| *byte == 5).expect("the data") + 50_000;
    bytes[at] ^= 1;
    fs::write(&data, bytes).expect("damage");
    let target = journal.path("restored");
    let output = journal.restore("lsn:3", &target, &[]);
    assert_eq!(output.status.code(), Some(1), "{}{}", stdout(&output), stderr(&output));
    assert!(!target.exists(), "a damaged image was left");
}

/// A filesystem of 1 MiB in a mount namespace of its own, which anybody may make.
#[test]
fn a_full_filesystem_leaves_what_is_documented() {
    let mut journal = Journal::new();
    journal.write(0, &(0..3 << 20).map(|i: u32| (i % 251) as u8).collect::<Vec<_>>());
    journal.commit();
    let script = r#"
        mkdir "$1/small" && mount -t tmpfs -o size=1M tmpfs "$1/small" || exit 99
        printf old > "$1/small/image"
        "$2" --store "$1/store" --disk "$3" --at latest --output "$1/small/image" --force
        echo "code $?"
        ls -A "$1/small"
        cat "$1/small/image"
    "#;
    let output = std::process::Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"])
        .arg(journal.directory.path())
        .arg(assert_cmd::cargo::cargo_bin("cdp-restore"))
        .arg(DISK.to_string())
        .output()
        .expect("unshare runs");
    let text = stdout(&output);
    assert!(text.ends_with("code 1\nimage\nold"), "{text}\n{}", stderr(&output));
    let said = stderr(&output);
    assert!(said.contains("is as it was before") && said.contains("free some space"), "{said}");
}
