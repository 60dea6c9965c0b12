//! The program as whoever starts it sees it.

#![allow(missing_docs, reason = "tests document themselves by their names")]

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// An agent with everything in `dir`, but for what `more` says.
fn agent(dir: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cdp-agent"));
    command.args(more).env("RUST_BACKTRACE", "1");
    for (flag, name) in [("--socket", "agent.sock"), ("--spool-dir", "spool")] {
        if !more.contains(&flag) {
            command.arg(flag).arg(dir.join(name));
        }
    }
    command
}

/// The same without root's right to write everywhere.
fn agent_of_a_user(dir: &Path, more: &[&str]) -> Command {
    let inner = agent(dir, more);
    if !nix::unistd::geteuid().is_root() {
        return inner;
    }
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set", "-dac_override"]).arg(inner.get_program()).args(inner.get_args());
    command
}

/// Runs it to its end, which is this code, and says what and what to do.
fn assert_ends(mut command: Command, code: i32, what: &str, hint: &str) {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("runs");
    let end = Instant::now() + Duration::from_secs(30);
    while child.try_wait().expect("a child").is_none() {
        if Instant::now() > end {
            child.kill().expect("it runs");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let output = child.wait_with_output().expect("ended");
    let said = String::from_utf8(output.stderr).expect("text");
    assert_eq!(output.status.code(), Some(code), "{command:?}: {said}");
    assert!(output.stdout.is_empty(), "it was never ready");
    for part in [what, hint] {
        assert!(said.contains(part), "{command:?}: no '{part}' in: {said}");
    }
}

struct Running(Child);

impl Running {
    /// Starts it and waits until it is ready.
    fn new(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().expect("runs");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("a line");
        assert!(line.starts_with("ready "), "{command:?}: {line}");
        Self(child)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn unwritable(dir: &Path) -> String {
    let folder = dir.join("theirs");
    fs::create_dir(&folder).expect("a folder");
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o555)).expect("mode");
    folder.display().to_string()
}

#[test]
fn wrong_usage_is_said_in_one_line_and_ends_with_2() {
    let dir = tempfile::tempdir().expect("a folder");
    for arguments in [&["--config", "/nowhere.toml"][..], &["--server", "nowhere"]] {
        let ended = agent(dir.path(), arguments).output().expect("runs");
        let said = String::from_utf8(ended.stderr).expect("text");
        assert_eq!(ended.status.code(), Some(2), "{arguments:?}: {said}");
        assert!(said.starts_with("cdp-agent: ") && said.lines().count() == 1, "{said}");
    }
}

/// A host that was told who it is, and cannot read it, must not become another one in silence.
#[test]
fn a_machine_id_that_was_named_and_is_none_is_refused() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = |name: &str| dir.path().join(name).display().to_string();
    fs::write(path("empty"), "").expect("a file");
    fs::write(path("garbage"), "nonsense").expect("a file");
    for (file, what) in [
        (path("missing"), "No such file"),
        (path(""), "Is a directory"),
        (path("empty"), "no machine id"),
        (path("garbage"), "32 hexadecimal"),
    ] {
        assert_ends(agent(dir.path(), &["--machine-id", &file]), 2, what, "systemd-machine-id-setup");
    }
}

#[test]
fn a_spool_that_no_agent_could_use_is_refused() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("file");
    fs::write(&file, "").expect("a file");
    let (file, below) = (file.display().to_string(), file.join("below").display().to_string());
    for folder in [&file, &below] {
        assert_ends(agent(dir.path(), &["--spool-dir", folder]), 2, folder, "--spool-mib 0");
    }
    let theirs = unwritable(dir.path());
    for folder in [format!("{theirs}/spool"), theirs] {
        let command = agent_of_a_user(dir.path(), &["--spool-dir", &folder]);
        assert_ends(command, 2, "Permission denied", "--spool-mib 0");
        // Without a spool nobody needs the folder.
        drop(Running::new(agent_of_a_user(dir.path(), &["--spool-dir", &folder, "--spool-mib", "0"])));
    }
}

/// Two agents in one folder would ship, and remove, each other's frames.
#[test]
fn a_spool_of_another_agent_is_refused() {
    let dir = tempfile::tempdir().expect("a folder");
    let other = dir.path().join("other.sock").display().to_string();
    let first = Running::new(agent(dir.path(), &[]));
    let number = first.0.id().to_string();
    assert_ends(agent(dir.path(), &["--socket", &other]), 2, &number, "another --spool-dir");
    drop(first);
    drop(Running::new(agent(dir.path(), &["--socket", &other])));
}

/// A disk that is full or fails is no reason to leave guests unprotected.
#[test]
fn a_spool_that_fails_is_warned_of_and_the_agent_starts() {
    let dir = tempfile::tempdir().expect("a folder");
    let script = r#"mount -t tmpfs -o ro tmpfs "$0" && exec "$@""#;
    let spool = dir.path().join("spool");
    fs::create_dir(&spool).expect("a folder");
    let inner = agent(dir.path(), &[]);
    let mut command = Command::new("unshare");
    let root = nix::unistd::geteuid().is_root();
    command.arg(if root { "-m" } else { "-rm" }).args(["sh", "-c", script]).arg(&spool);
    command.arg(inner.get_program()).args(inner.get_args()).stderr(Stdio::piped());
    let mut running = Running::new(command);
    let mut line = String::new();
    let mut log = BufReader::new(running.0.stderr.take().expect("piped"));
    while !line.contains("the spool cannot be written to") {
        line.clear();
        assert!(log.read_line(&mut line).expect("a line") > 0, "it says nothing");
    }
    assert!(line.contains("WARN") && line.contains("read-only"), "{line}");
}

#[test]
fn a_socket_that_cannot_be_says_what_to_do() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = |name: &str| dir.path().join(name).display().to_string();
    fs::write(path("file"), "").expect("a file");
    for (socket, what, hint) in [
        (path(&"s".repeat(108)), "at most 107 bytes", "a shorter --socket"),
        (path("file/agent.sock"), "cannot make its folder", "name a folder"),
        (path("file"), "no socket", "name another path"),
    ] {
        assert_ends(agent(dir.path(), &["--socket", &socket]), 1, what, hint);
    }
    let theirs = format!("{}/agent.sock", unwritable(dir.path()));
    assert_ends(agent_of_a_user(dir.path(), &["--socket", &theirs]), 1, "Permission denied", "chown");
    assert_ends(agent(dir.path(), &["--socket-group", "nonsense"]), 1, "no group nonsense", "getent group");
    assert!(!Path::new(&path(&format!("{}.lock", "s".repeat(108)))).exists(), "it has left a lock");
}

/// What tracing says about a log that it cannot write goes through `eprintln!`, which panics: the thread that logged
/// was gone.
#[test]
fn a_log_on_a_full_disk_ends_nothing() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut command = agent(dir.path(), &["--server", "127.0.0.1:1"]);
    command.env("RUST_LOG", "trace");
    command.stderr(File::options().write(true).open("/dev/full").expect("/dev/full"));
    let mut running = Running::new(command);
    let killed = Command::new("kill").args(["-TERM", &running.0.id().to_string()]).status().expect("runs");
    assert!(killed.success());
    assert_eq!(running.0.wait().expect("ends").code(), Some(0));
}
