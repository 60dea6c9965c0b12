//! The program: ready line, clean stop, what it does with a store that is in use.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use journal_format::Lsn;

use crate::agent::{Agent, Capture};
use crate::now_ns;

struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn command(store: &std::path::Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cdp-server"));
    command.arg("--store").arg(store).args(["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]);
    command.stdout(Stdio::piped()).stderr(Stdio::null());
    command
}

fn start(store: &std::path::Path) -> (Program, String, std::net::SocketAddr) {
    let mut child = command(store).spawn().expect("starts");
    let mut line = String::new();
    BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("a line");
    let words: Vec<_> = line.split_whitespace().collect();
    let [ready, http, data] = words[..] else { panic!("ready line: {line}") };
    assert_eq!(ready, "ready");
    let http = format!("http://{}", http.strip_prefix("http=").expect("http="));
    let data = data.strip_prefix("data=").expect("data=").parse().expect("an address");
    (Program(child), http, data)
}

#[test]
fn sigterm_stops_it_cleanly_and_what_was_acknowledged_is_there() {
    let dir = tempfile::tempdir().expect("a directory");
    let (mut program, _, data) = start(dir.path());
    let mut agent = Agent::with_disk(data);
    let mut capture = Capture::new(&agent.open(None), now_ns() - 1_000_000_000);
    let frame = capture.begin().write(0, &[3; 512]).frame();
    agent.ship(&frame, Lsn(3));
    let killed = Command::new("kill").args(["-TERM", &program.0.id().to_string()]).status().expect("runs");
    assert!(killed.success());
    assert!(program.0.wait().expect("ends").success(), "a clean stop is no failure");
    let (_program, http, _) = start(dir.path());
    let client = cdp_api::Client::new(&http).expect("a client");
    assert_eq!(client.points("vm/disk0").expect("points").newest.map(|p| p.lsn), Some(3));
}

#[test]
fn what_was_acknowledged_survives_kill_9() {
    let dir = tempfile::tempdir().expect("a directory");
    let (program, _, data) = start(dir.path());
    let mut agent = Agent::with_disk(data);
    let mut capture = Capture::new(&agent.open(None), now_ns() - 1_000_000_000);
    let frame = capture.begin().write(0, &[3; 512]).frame();
    agent.ship(&frame, Lsn(3));
    drop(program);
    let (_program, http, data) = start(dir.path());
    let client = cdp_api::Client::new(&http).expect("a client");
    assert_eq!(client.data("vm/disk0", 3, 0, 512).expect("reads"), vec![3; 512]);
    let mut agent = Agent::with_disk(data);
    assert_eq!(agent.open(Some(capture.epoch)).durable_lsn, 3);
}

#[test]
fn a_second_server_on_the_same_store_refuses_to_start() {
    let dir = tempfile::tempdir().expect("a directory");
    let (_program, _, _) = start(dir.path());
    let second = command(dir.path()).output().expect("runs");
    assert_eq!(second.status.code(), Some(1));
}
