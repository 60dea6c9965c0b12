//! `cdp-restore` as its users see it, on stores that these tests write.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use assert_cmd::Command;
use journal_format::{GapReason, Op};
use proptest::prelude::*;

use common::{DISK, DISK_BYTES, Journal, example, json, range, stderr, stdout};

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
fn nothing_is_restored_into_a_journal() {
    let journal = example();
    let folder = fs::read_dir(journal.path("store").join("disks"))
        .expect("disks")
        .next()
        .expect("a disk")
        .expect("it")
        .path();
    let segment = fs::read_dir(&folder).expect("the journal").map(|entry| entry.expect("an entry").path());
    let segment =
        segment.into_iter().find(|path| path.extension().is_some_and(|e| e == "seg")).expect("a segment");
    // What was appended last may wait for the next durability step.
    journal.commit();
    let before = fs::read(&segment).expect("a segment");
    for target in [segment.clone(), folder.join("new.raw")] {
        let output = journal.restore("lsn:3", &target, &["--force"]);
        assert_eq!(output.status.code(), Some(4), "{}: {}", target.display(), stderr(&output));
        assert!(stderr(&output).contains("journal"), "{}", stderr(&output));
    }
    assert!(fs::read(&segment).expect("a segment") == before, "the journal has changed");
    assert!(!folder.join("new.raw").exists(), "something was made in the journal");
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
fn a_point_in_the_very_first_gap_is_refused_as_one() {
    let journal = example();
    let target = journal.path("restored");
    for at in ["lsn:1", "2026-11-20T10:00:01.5Z"] {
        let output = journal.restore(at, &target, &["--output-format", "json"]);
        assert_eq!(output.status.code(), Some(3), "{at}: {}", stderr(&output));
        let error = &json(&output)["error"];
        assert_eq!((&error["kind"], &error["after"]["lsn"]), (&"point-in-gap".into(), &2.into()), "{at}");
        assert!(error["before"].is_null(), "{at}: {error}");
    }
}

#[test]
fn arguments_that_mean_nothing_are_refused_with_what_to_write_instead() {
    let journal = example();
    let target = journal.path("restored");
    let target = target.to_str().expect("UTF-8");
    let disk = DISK.to_string();
    let with_store = |at: &str, disk: &str| {
        journal.command(&["--at", at, "--disk", disk, "--output", target]).output().expect("runs")
    };
    let with_server = |url: &str| {
        let mut command = Command::cargo_bin("cdp-restore").expect("built");
        command.args(["--at", "latest", "--disk", &disk, "--output", target, "--server", url]);
        command.output().expect("runs")
    };
    let cases = [
        (with_store("25:99:99", &disk), "such as"),
        (with_store("", &disk), "1 to"),
        (with_store("lsn:-1", &disk), "lsn:1042"),
        (with_store("0000-01-01", &disk), "1970 to 2554"),
        (with_store("2026-10-25 02:30:00", &disk), "2026-10-25 02:30:00+01:00"),
        (with_store("latest", ""), "UUID"),
        (with_store("latest", "web1"), "web1/virtio-disk0"),
        (with_server("ftp://x"), "http://127.0.0.1:7410"),
        (with_server("10.0.0.1:7410"), "give http://10.0.0.1:7410"),
    ];
    for (output, instead) in cases {
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(instead), "{instead} is missing in: {said}");
    }
}

#[test]
fn a_point_out_of_range_is_refused_with_the_nearest() {
    let journal = example();
    let target = journal.path("restored");
    for (at, near, lsn) in
        [("lsn:99", "before", 6), ("2020-01-01T00:00:00Z", "after", 2), ("lsn:0", "after", 2)]
    {
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

#[test]
fn names_of_any_kind_are_found_and_one_that_two_disks_have_is_refused_with_both() {
    let journal = example();
    let folder = |id: &str| journal.path("store").join("disks").join(id);
    let target = journal.path("restored");
    let target = target.to_str().expect("UTF-8");
    for (vm, device) in [("-5m", "disk0"), ("it's", "\"a\" b/\u{fc}"), ("..", ".")] {
        let name = serde_json::json!({"vm": vm, "device": device, "host": "h1", "vm_uuid": null});
        fs::write(folder(&DISK.to_string()).join("name.json"), name.to_string()).expect("name");
        let disk = format!("{vm}/{device}");
        journal
            .command(&["--at", "latest", "--disk", &disk, "--output", target, "--force"])
            .assert()
            .success();
        journal.command(&["list", "--disk", &disk]).assert().success();
    }
    let name = r#"{"vm": "web", "device": "disk0", "host": "h1", "vm_uuid": null}"#;
    let other = "07070707-0707-0707-0707-070707070708";
    fs::create_dir(folder(other)).expect("a journal");
    for entry in fs::read_dir(folder(&DISK.to_string())).expect("files") {
        let path = entry.expect("an entry").path();
        fs::copy(&path, folder(other).join(path.file_name().expect("a name"))).expect("copies");
    }
    for id in [DISK.to_string().as_str(), other] {
        fs::write(folder(id).join("name.json"), name).expect("name");
    }
    let output = journal
        .command(&["--at", "latest", "--disk", "web/disk0", "--output", target, "--force"])
        .args(["--output-format", "json"])
        .output()
        .expect("runs");
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let error = &json(&output)["error"];
    let detail = error["detail"].as_str().expect("text");
    assert_eq!(error["kind"], "ambiguous-disk");
    assert!(
        detail.contains(&DISK.to_string()) && detail.contains(other) && detail.contains("h1"),
        "{detail}"
    );
}
