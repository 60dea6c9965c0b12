//! The program: ready line, clean stop, what it does with a store that is in use.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use journal_format::Lsn;
use journal_format::wire::{self, MessageType};

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
    arguments(Command::new(env!("CARGO_BIN_EXE_cdp-server")), store)
}

fn arguments(mut command: Command, store: &std::path::Path) -> Command {
    command.arg("--store").arg(store).args(["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]);
    command.stdout(Stdio::piped()).stderr(Stdio::null());
    command
}

fn start(store: &std::path::Path) -> (Program, String, std::net::SocketAddr) {
    start_as(Command::new(env!("CARGO_BIN_EXE_cdp-server")), store)
}

fn start_as(program: Command, store: &std::path::Path) -> (Program, String, std::net::SocketAddr) {
    let mut child = arguments(program, store).spawn().expect("starts");
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
fn wrong_usage_is_said_without_colours_and_ends_with_2() {
    for arguments in [&[][..], &["--config", "/nowhere.toml"], &["--nonsense"]] {
        let mut program = Command::new(env!("CARGO_BIN_EXE_cdp-server"));
        program.env("RUST_BACKTRACE", "1").env_remove("CDP_STORE").env_remove("CDP_CONFIG");
        let ended = program.args(arguments).output().expect("runs");
        let said = String::from_utf8(ended.stderr).expect("text");
        assert_eq!(ended.status.code(), Some(2), "{arguments:?}: {said}");
        assert!(!said.is_empty() && !said.contains('\u{1b}') && !said.contains("backtrace"), "{said}");
    }
}

#[test]
fn logs_have_no_colours_where_there_is_no_terminal() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut program = command(dir.path());
    let mut child = program.stderr(Stdio::piped()).spawn().expect("starts");
    let mut line = String::new();
    BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("a line");
    let killed = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().expect("runs");
    assert!(killed.success());
    let said = String::from_utf8(child.wait_with_output().expect("ends").stderr).expect("text");
    assert!(said.contains("stopping") && !said.contains('\u{1b}'), "{said}");
}

#[test]
fn a_second_server_on_the_same_store_refuses_to_start() {
    let dir = tempfile::tempdir().expect("a directory");
    let (_program, _, _) = start(dir.path());
    let second = command(dir.path()).output().expect("runs");
    assert_eq!(second.status.code(), Some(1));
}

#[test]
fn a_full_disk_stops_acknowledgements_of_the_disk_and_nothing_else() {
    let dir = tempfile::tempdir().expect("a directory");
    // A limit on the size of files stands for a full disk: writes over it fail, as the signal is ignored.
    let limited = "trap '' XFSZ; ulimit -f 2048; exec \"$@\"";
    let mut shell = Command::new("sh");
    shell.args(["-c", limited, "sh"]).arg(env!("CARGO_BIN_EXE_cdp-server"));
    let (_program, http, data) = start_as(shell, dir.path());
    let mut agent = Agent::with_disk(data);
    let mut capture = Capture::new(&agent.open(None), now_ns() - 1_000_000_000);
    let frame = capture.begin().write(0, &[3; 512]).frame();
    agent.ship(&frame, Lsn(3));
    let refused = loop {
        let frame = capture.write(0, &[4; 1 << 20]).frame();
        agent.send_frame(&frame);
        match agent.receive().expect("the connection stays") {
            (MessageType::Ack, _) => assert!(capture.last().0 < 20, "the limit is 2 MiB or less"),
            (kind, body) => {
                assert_eq!(kind, MessageType::Refused);
                break wire::decode::<wire::Refused>(&body).expect("decodes");
            }
        }
    };
    assert!(!refused.message.is_empty() && refused.retry_ms > 0);
    let client = cdp_api::Client::new(&http).expect("a client");
    assert_eq!(
        client.data("vm/disk0", 3, 0, 512).expect("reads"),
        vec![3; 512],
        "what is there stays readable"
    );
    // It may be tried again, and is refused again, for as long as there is no room.
    let durable = agent.open(Some(capture.epoch)).durable_lsn;
    assert!((3..capture.last().0).contains(&durable), "only what is durable counts: {durable}");
}
