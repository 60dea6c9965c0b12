//! Agents on a Unix socket: the same conversation, and a file that is nobody else's.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Stdio};

use journal_format::Lsn;

use crate::agent::{Agent, Capture, DISK, hello, inventory};
use crate::start::{assert_ends, with};
use crate::{Fixture, now_ns};

/// Ships a first write over the socket at `path`.
fn ship_over(path: &Path, token: &str) -> Capture {
    let mut agent = Agent::raw_unix(path);
    let mut me = hello();
    me.token = token.to_owned();
    assert_eq!(agent.hello(&me).refused, "");
    agent.send(&inventory(DISK, "vm", "disk0"));
    let mut capture = Capture::new(&agent.open(None), now_ns() - 1_000_000_000);
    let frame = capture.begin().write(0, &[7; 4096]).frame();
    agent.ship(&frame, Lsn(3));
    capture
}

#[test]
fn what_comes_over_a_unix_socket_is_journaled_beside_what_comes_over_tcp() {
    let sockets = tempfile::tempdir().expect("a directory");
    let path = sockets.path().join("server.sock");
    let mut fixture = Fixture::start_with(|config| config.listen_unix = Some(path.clone()));
    let capture = ship_over(&path, "");
    assert_eq!(fixture.client.data("vm/disk0", 3, 0, 4096).expect("reads"), vec![7; 4096]);
    // TCP is served as before, and the disk goes on there.
    let mut agent = Agent::with_disk(fixture.data());
    assert_eq!(agent.open(Some(capture.epoch)).durable_lsn, 3);
    // A clean stop ends the connections, and takes the file along.
    let silent = Agent::raw_unix(&path);
    fixture.server.take().expect("runs").stop();
    silent.expect_closed();
    assert!(!path.exists(), "a clean stop removes the socket");
}

#[test]
fn the_token_is_asked_for_on_a_unix_socket_too() {
    let sockets = tempfile::tempdir().expect("a directory");
    let path = sockets.path().join("server.sock");
    let _fixture = Fixture::start_with(|config| {
        config.listen_unix = Some(path.clone());
        config.token = Some("s3cret".to_owned());
    });
    let mut stranger = Agent::raw_unix(&path);
    assert!(stranger.hello(&hello()).refused.contains("token"));
    stranger.expect_closed();
    ship_over(&path, "s3cret");
}

/// Silent connections are strangers there as well, and cost an agent nothing.
#[test]
fn silent_connections_to_a_unix_socket_keep_no_agent_out() {
    let sockets = tempfile::tempdir().expect("a directory");
    let path = sockets.path().join("server.sock");
    let _fixture = Fixture::start_with(|config| config.listen_unix = Some(path.clone()));
    let mut silent: Vec<_> = (0..300).map(|_| Agent::raw_unix(&path)).collect();
    ship_over(&path, "");
    silent.remove(0).expect_closed();
}

struct Running(Child);

impl Running {
    /// Starts it, and waits until it says that it listens at `path`.
    fn new(store: &Path, path: &str) -> Self {
        let mut command = with(store, &["--listen-unix", path]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("runs");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("a line");
        assert!(line.trim_end().ends_with(&format!(" unix={path}")), "{line}");
        Self(child)
    }

    fn kill(&mut self) {
        self.0.kill().expect("it runs");
        self.0.wait().expect("ended");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_killed_servers_socket_is_replaced_and_a_living_ones_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("server.sock");
    let shown = path.display().to_string();
    let (first, second) = (dir.path().join("first"), dir.path().join("second"));
    let mut running = Running::new(&first, &shown);
    assert_ends(
        with(&second, &["--listen-unix", &shown]),
        1,
        &shown,
        "another cdp-server listens there: stop it",
    );
    running.kill();
    assert!(path.exists(), "a kill leaves the file");
    let _running = Running::new(&second, &shown);
    ship_over(&path, "");
}

#[test]
fn a_path_that_no_socket_can_have_says_why_and_what_to_do() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = dir.path().join("store");
    let at = |name: &str| dir.path().join(name).display().to_string();
    fs::write(at("file"), "precious").expect("a file");
    assert_ends(with(&store, &["--listen-unix", "server.sock"]), 2, "server.sock", "absolute path");
    assert_ends(with(&store, &["--listen-unix", &at(&"x".repeat(120))]), 2, "107 bytes", "shorter");
    assert_ends(with(&store, &["--listen-unix", &at("file")]), 1, "no socket", "move it away");
    assert_ends(with(&store, &["--listen-unix", &at("missing/sock")]), 1, "cannot lock", "make its folder");
    assert_eq!(fs::read(at("file")).expect("there"), b"precious");
}
