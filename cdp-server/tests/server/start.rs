//! Starts that cannot be, and surroundings that must not end a server that runs.

use std::fs::{self, File};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use cdp_api::{FaultKind, PointSpec};
use journal_format::wire::{self, MessageType};
use journal_format::{DiskId, Lsn};

use crate::agent::{Agent, Capture, inventory};
use crate::program::{Program, arguments, command, is_root, start, start_as};
use crate::{eventually, now_ns};

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Runs it to its end, which is this code, and says what and what to do.
pub(crate) fn assert_ends(mut command: Command, code: i32, what: &str, hint: &str) {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("runs");
    let end = Instant::now() + Duration::from_secs(30);
    while child.try_wait().expect("a child").is_none() {
        if Instant::now() > end {
            child.kill().expect("it runs");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let output = child.wait_with_output().expect("ended");
    let said = said(&output);
    assert_eq!(output.status.code(), Some(code), "{command:?}: {said}");
    assert!(output.stdout.is_empty(), "it was never ready");
    for part in [what, hint] {
        assert!(said.contains(part), "{command:?}: no '{part}' in: {said}");
    }
    assert!(!said.contains("panicked"), "{said}");
}

pub(crate) fn with(store: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cdp-server"));
    command.arg("--store").arg(store).args(more);
    for default in ["--listen", "--http"] {
        if !more.contains(&default) {
            command.args([default, "127.0.0.1:0"]);
        }
    }
    command
}

#[test]
fn an_address_that_cannot_be_had_says_which_flag_gives_another() {
    let dir = tempfile::tempdir().expect("a directory");
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let taken = taken.local_addr().expect("bound").to_string();
    for flag in ["--listen", "--http"] {
        assert_ends(with(dir.path(), &[flag, &taken]), 1, &format!("listen on {taken}"), "another --listen");
        // An address for documentation, which no host has (RFC 5737).
        assert_ends(with(dir.path(), &[flag, "192.0.2.1:0"]), 1, "192.0.2.1:0", "ip addr");
        assert_ends(with(dir.path(), &[flag, "localhost:7411"]), 2, "localhost:7411", "give IP:PORT");
    }
    let both = ["--listen", "127.0.0.1:17411", "--http", "127.0.0.1:17411"];
    assert_ends(with(dir.path(), &both), 2, "127.0.0.1:17411", "a port each");
}

#[test]
fn a_store_that_cannot_be_used_says_why_and_what_to_do() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("file");
    fs::write(&file, "").expect("a file");
    assert_ends(with(&file, &[]), 1, "create the store", "name a folder");
    assert_ends(with(&file.join("store"), &[]), 1, "create the store", "name a folder");
    let (_program, _, _) = start(&dir.path().join("used"));
    assert_ends(with(&dir.path().join("used"), &[]), 1, "held by another process", "stop the cdp-server");

    let theirs = dir.path().join("theirs");
    fs::create_dir(&theirs).expect("a folder");
    fs::set_permissions(&theirs, fs::Permissions::from_mode(0o555)).expect("mode");
    for store in [theirs.clone(), theirs.join("below")] {
        let inner = with(&store, &[]);
        // Root writes everywhere, unless it gives that up.
        let command = if is_root() {
            let mut command = Command::new("setpriv");
            command.args(["--bounding-set", "-dac_override"]).arg(inner.get_program()).args(inner.get_args());
            command
        } else {
            inner
        };
        assert_ends(command, 1, "Permission denied", "chown");
    }
}

#[test]
fn a_catalog_that_cannot_be_used_says_why_and_what_to_do() {
    let dir = tempfile::tempdir().expect("a directory");
    let (store, path) = (dir.path().join("store"), |name: &str| dir.path().join(name).display().to_string());
    fs::write(path("garbage"), [0x5a; 8192]).expect("a file");
    assert_ends(with(&store, &["--catalog", &path("garbage")]), 1, "not a database", "move it away");
    let missing = path("missing/catalog");
    assert_ends(with(&store, &["--catalog", &missing]), 1, &missing, "with --catalog");
    assert_ends(with(&store, &["--catalog", &path("")]), 1, "catalog", "--catalog");
    // Two servers with one catalog would hand out the same epochs.
    let shared = path("shared");
    let mut first = Command::new(env!("CARGO_BIN_EXE_cdp-server"));
    first.args(["--catalog", &shared]);
    let (_program, _, _) = start_as(first, &dir.path().join("first"));
    assert_ends(with(&store, &["--catalog", &shared]), 1, "another cdp-server", "another --catalog");
}

/// All entries of a folder, itself too, with their modes.
fn modes(folder: &Path) -> Vec<(u32, PathBuf)> {
    let mut found = vec![folder.to_owned()];
    let mut at = 0;
    while let Some(path) = found.get(at) {
        if path.is_dir() {
            let below: Vec<_> =
                fs::read_dir(path).expect("a folder").map(|e| e.expect("an entry").path()).collect();
            found.extend(below);
        }
        at += 1;
    }
    // What is renamed meanwhile is left out.
    let mode = |path: PathBuf| Some((fs::symlink_metadata(&path).ok()?.permissions().mode() & 0o777, path));
    found.into_iter().filter_map(mode).collect()
}

/// Whoever had an account on the host could read every protected disk.
#[test]
fn what_the_server_writes_is_for_its_own_user_alone() {
    let dir = tempfile::tempdir().expect("a directory");
    let (above, store) = (dir.path().join("above"), dir.path().join("above/store"));
    let mut open_handed = Command::new("sh");
    open_handed.args(["-c", "umask 0; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_cdp-server")]);
    let (_program, http, data) = start_as(open_handed, &store);
    let mut agent = Agent::with_disk(data);
    let mut capture = Capture::new(&agent.open(None), now_ns() - 1_000_000_000);
    let frame = capture.begin().write(0, &[3; 512]).frame();
    agent.ship(&frame, Lsn(3));
    let client = cdp_api::Client::new(&http).expect("a client");
    client.create_bookmark("vm/disk0", "kept", Some(&PointSpec::Lsn(3))).expect("a bookmark");
    let found = modes(&above);
    assert!(found.len() > 10, "{found:?}");
    let open: Vec<_> = found.iter().filter(|(mode, _)| mode & 0o077 != 0).collect();
    assert!(open.is_empty(), "others may use {open:?}");
}

#[test]
fn a_store_that_everybody_can_read_is_said() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = dir.path().join("store");
    drop(start(&store));
    for (folder_of_store, folder_of_disks, is_said) in
        [(0o755, 0o755, true), (0o755, 0o700, false), (0o700, 0o755, false)]
    {
        fs::set_permissions(&store, fs::Permissions::from_mode(folder_of_store)).expect("mode");
        fs::set_permissions(store.join("disks"), fs::Permissions::from_mode(folder_of_disks)).expect("mode");
        let log = dir.path().join("log");
        let mut command = command(&store);
        let mut child = command.stderr(File::create(&log).expect("a log")).spawn().expect("starts");
        let mut line = String::new();
        let mut out = std::io::BufReader::new(child.stdout.take().expect("piped"));
        std::io::BufRead::read_line(&mut out, &mut line).expect("a line");
        child.kill().expect("it runs");
        child.wait().expect("ends");
        let said = fs::read_to_string(&log).expect("a log");
        assert_eq!(said.contains("chmod -R go="), is_said, "{folder_of_store:o} {folder_of_disks:o}: {said}");
    }
}

/// It once panicked in the async runtime.
#[test]
fn too_few_open_files_are_said_at_the_start() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut limited = Command::new("sh");
    limited.args(["-c", "ulimit -n 20; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_cdp-server")]);
    assert_ends(arguments(limited, dir.path()), 1, "only 20 open files", "LimitNOFILE");
}

/// What tracing says about a log that it cannot write goes through `eprintln!`, which panics: the thread that logged
/// was gone.
#[test]
fn a_log_on_a_full_disk_ends_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut command = command(dir.path());
    command.env("RUST_LOG", "trace");
    let full = File::options().write(true).open("/dev/full").expect("/dev/full");
    let mut child = command.stderr(full).spawn().expect("starts");
    let mut line = String::new();
    let mut out = std::io::BufReader::new(child.stdout.take().expect("piped"));
    std::io::BufRead::read_line(&mut out, &mut line).expect("a line");
    assert!(line.starts_with("ready "), "{line}");
    let killed = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().expect("runs");
    assert!(killed.success());
    assert_eq!(child.wait().expect("ends").code(), Some(0));
}

/// The kernel's SIGXFSZ ended the process.
#[test]
fn a_limit_of_file_sizes_is_a_fault_of_the_disk_and_not_the_end_of_the_server() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut limited = Command::new("sh");
    limited.args(["-c", "ulimit -f 4096; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_cdp-server")]);
    let (_program, http, data) = start_as(limited, dir.path());
    let mut agent = Agent::with_disk(data);
    let mut capture = Capture::new(&agent.open(None), now_ns() - 1_000_000_000);
    agent.send_frame(&capture.begin().frame());
    let refused = loop {
        match agent.receive().expect("the connection stays") {
            (MessageType::Ack, _) => agent.send_frame(&capture.write(0, &random(1 << 19)).frame()),
            (MessageType::Refused, body) => break wire::decode::<wire::Refused>(&body).expect("decodes"),
            (kind, _) => panic!("{kind:?}"),
        }
    };
    assert!(refused.message.contains("File too large"), "{}", refused.message);
    let client = cdp_api::Client::new(&http).expect("a client");
    // Which of the two is said first is nobody's business.
    let fault = eventually(|| client.disk("vm/disk0").expect("the server lives").summary.fault);
    assert_eq!(fault.kind, FaultKind::DiskFull, "{fault:?}");
}

/// `docs/operating/running.md` tells operators to count on this.
#[test]
fn an_idle_disk_costs_three_descriptors() {
    const DISKS: u8 = 10;
    let dir = tempfile::tempdir().expect("a directory");
    let (program, _, data) = start(dir.path());
    let empty = descriptors(&program);
    let mut agent = Agent::connect(data);
    for number in 1..=DISKS {
        let disk = DiskId([number; 16]);
        agent.send(&inventory(disk, "vm", "disk"));
        agent.send(&wire::OpenDisk { disk: disk.0.to_vec(), disk_bytes: 1 << 30, resume_epoch: 0 });
        assert_eq!(agent.expect::<wire::DiskOpened>().refused, "");
    }
    drop((agent, program));
    let (program, http, _) = start(dir.path());
    let client = cdp_api::Client::new(&http).expect("a client");
    assert_eq!(client.disks().expect("lists").len(), usize::from(DISKS));
    // One for the client's connection.
    let of_disks = descriptors(&program).saturating_sub(empty + 1);
    assert!(of_disks > 0 && of_disks <= 3 * usize::from(DISKS), "{of_disks} for {DISKS} disks");
}

fn descriptors(program: &Program) -> usize {
    fs::read_dir(format!("/proc/{}/fd", program.0.id())).expect("its descriptors").count()
}

/// Bytes that do not compress.
fn random(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..length).map(|_| next()).collect()
}
