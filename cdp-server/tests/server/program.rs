//! The program: ready line, clean stop, what it does with a store that is in use.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use journal_format::Lsn;
use journal_format::wire::{self, MessageType};

use crate::agent::{Agent, Capture, DISK_BYTES};
use crate::{eventually, now_ns};

pub(crate) struct Program(pub(crate) Child);

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) fn command(store: &std::path::Path) -> Command {
    arguments(Command::new(env!("CARGO_BIN_EXE_cdp-server")), store)
}

pub(crate) fn arguments(mut command: Command, store: &std::path::Path) -> Command {
    command.arg("--store").arg(store).args(["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]);
    command.stdout(Stdio::piped()).stderr(Stdio::null());
    command
}

pub(crate) fn start(store: &std::path::Path) -> (Program, String, std::net::SocketAddr) {
    start_as(Command::new(env!("CARGO_BIN_EXE_cdp-server")), store)
}

pub(crate) fn start_as(program: Command, store: &std::path::Path) -> (Program, String, std::net::SocketAddr) {
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

pub(crate) fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|me| std::os::unix::fs::MetadataExt::uid(&me) == 0)
}

/// A store in a small file system of its own, in a mount namespace that ends with the program.
fn start_in_a_small_file_system(store: &std::path::Path) -> (Program, String, std::net::SocketAddr) {
    let script =
        "mount -t tmpfs -o size=24m cdp-test \"$0\" && head -c 8M /dev/zero >\"$0/ballast\" && exec \"$@\"";
    let mut unshare = Command::new("unshare");
    unshare.arg(if is_root() { "-m" } else { "-rm" }).args(["sh", "-c", script]).arg(store);
    unshare.arg(env!("CARGO_BIN_EXE_cdp-server"));
    start_as(unshare, store)
}

#[test]
fn a_full_file_system_is_said_and_all_goes_on_by_itself_when_there_is_room() {
    let dir = tempfile::tempdir().expect("a directory");
    let (program, http, data) = start_in_a_small_file_system(dir.path());
    let mut agent = Agent::with_disk(data);
    let mut capture = Capture::new(&agent.open(None), now_ns() - 1_000_000_000);
    let frame = capture.begin().write(0, &[3; 512]).frame();
    agent.ship(&frame, Lsn(3));
    let mut frames = Vec::new();
    let refused = loop {
        let frame = capture.write(0, &[capture.last().0 as u8; 1 << 20]).frame();
        agent.send_frame(&frame);
        frames.push((capture.last(), frame));
        match agent.receive().expect("the connection stays") {
            (MessageType::Ack, _) => assert!(frames.len() < 24, "the file system has 24 MiB"),
            (MessageType::Refused, body) => break wire::decode::<wire::Refused>(&body).expect("decodes"),
            (kind, _) => panic!("{kind:?}"),
        }
    };
    assert!(!refused.message.is_empty() && refused.retry_ms > 0);
    let client = cdp_api::Client::new(&http).expect("a client");
    let fault = eventually(|| client.disk("vm/disk0").expect("known").summary.fault);
    assert_eq!(fault.kind, cdp_api::FaultKind::DiskFull, "{fault:?}");
    assert!(!fault.hint.is_empty());
    assert!(metrics(&http).lines().any(|line| line.starts_with("cdp_fault{") && line.ends_with(" 1.0")));
    assert_eq!(
        client.data("vm/disk0", 3, 0, 512).expect("reads"),
        vec![3; 512],
        "what is there stays readable"
    );

    // It may be tried again, and is refused again, for as long as there is no room.
    let durable = eventually(|| agent.try_open(Some(capture.epoch))).durable_lsn;
    assert!((3..capture.last().0).contains(&durable), "only what is durable counts: {durable}");
    frames.retain(|(last, _)| last.0 > durable);
    agent.send_frame(&frames[0].1);
    assert_eq!(agent.receive().map(|(kind, _)| kind), Some(MessageType::Refused));

    // The namespace is the program's; this is the way into it.
    let ballast = format!("/proc/{}/root{}/ballast", program.0.id(), dir.path().display());
    std::fs::remove_file(ballast).expect("the ballast is there");
    assert_eq!(eventually(|| agent.try_open(Some(capture.epoch))).durable_lsn, durable);
    for (last, frame) in &frames {
        agent.ship(frame, *last);
    }
    eventually(|| client.disk("vm/disk0").ok()?.summary.fault.is_none().then_some(()));
    assert_eq!(client.data("vm/disk0", capture.last().0, 0, DISK_BYTES).expect("reads"), capture.image);
}

fn metrics(http: &str) -> String {
    reqwest::blocking::get(format!("{http}/metrics")).expect("answers").text().expect("text")
}

/// A killed server has lost nothing that it acknowledged, however often and whenever it is killed. `CDP_KILLS` says how
/// often; the last line says how long opening took.
#[test]
fn whenever_it_is_killed_under_load_nothing_acknowledged_is_missing() {
    let kills = std::env::var("CDP_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(12_u64);
    let dir = tempfile::tempdir().expect("a directory");
    let mut load = Load::default();
    let (mut slowest, mut chance) = (Duration::ZERO, 88_172_645_463_325_252_u64);
    for round in 0..kills {
        let begun = Instant::now();
        let (program, _, data) = start(dir.path());
        slowest = slowest.max(begun.elapsed());
        chance = chance.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(round);
        let wait = Duration::from_millis(20 + (chance >> 33) % 300);
        let killer = std::thread::spawn(move || {
            std::thread::sleep(wait);
            drop(program);
        });
        load.run(data);
        killer.join().expect("no panic");
    }
    let (_program, http, data) = start(dir.path());
    let mut agent = Agent::with_disk(data);
    let durable = agent.open(Some(load.epoch())).durable_lsn;
    assert!(durable >= load.acked, "{} was acknowledged, {durable} is there", load.acked);
    let client = cdp_api::Client::new(&http).expect("a client");
    assert_eq!(client.data("vm/disk0", durable, 0, DISK_BYTES).expect("reads"), load.image(durable));
    assert!(client.points("vm/disk0").expect("points").gaps.iter().all(|gap| gap.to_lsn.is_some()));
    assert!(load.acked > kills, "there was a load: {} records", load.acked);
    println!("{kills} kills, {} records acknowledged, none missing; slowest start {slowest:?}", load.acked);
}

/// An agent that writes as fast as it gets answers, and remembers what it was told.
#[derive(Default)]
struct Load {
    capture: Option<Capture>,
    /// Frames by their last LSN, from the first on: what the agent's outbox and spool would hold.
    frames: Vec<(u64, Vec<u8>)>,
    writes: Vec<(u64, u64, Vec<u8>)>,
    acked: u64,
}

impl Load {
    fn epoch(&self) -> journal_format::Epoch {
        self.capture.as_ref().expect("it has begun").epoch
    }

    /// Writes until the server is gone.
    fn run(&mut self, data: std::net::SocketAddr) {
        let Some(mut agent) = Agent::try_with_disk(data) else { return };
        let Some(opened) = agent.try_open(self.capture.as_ref().map(|capture| capture.epoch)) else { return };
        assert!(
            opened.durable_lsn >= self.acked,
            "{} was acknowledged, {} is there",
            self.acked,
            opened.durable_lsn
        );
        let mut capture = self.capture.take().unwrap_or_else(|| {
            let mut capture = Capture::new(&opened, now_ns() - 3_600_000_000_000);
            capture.begin();
            capture
        });
        assert_eq!(capture.epoch.0, opened.epoch, "nobody else opened the disk");
        let again: Vec<_> =
            self.frames.iter().filter(|(last, _)| *last > opened.durable_lsn).cloned().collect();
        let mut alive = again.iter().all(|(_, frame)| agent.try_send_frame(frame).is_ok());
        while alive {
            for _ in 0..4 {
                let (lsn, mix) = (capture.next.0, capture.next.0.wrapping_mul(0x9e37_79b9_7f4a_7c15));
                let bytes = vec![lsn as u8; 512 << (mix % 7)];
                let offset = (mix >> 20) % (DISK_BYTES - bytes.len() as u64);
                capture.write(offset, &bytes);
                self.writes.push((capture.last().0, offset, bytes));
                let frame = capture.frame();
                self.frames.push((capture.last().0, frame.clone()));
                alive &= agent.try_send_frame(&frame).is_ok();
            }
            alive &= self.take_acks(&mut agent, capture.last().0);
        }
        self.capture = Some(capture);
    }

    /// Until everything is acknowledged; `false` when the server is gone.
    fn take_acks(&mut self, agent: &mut Agent, last: u64) -> bool {
        while self.acked < last {
            match agent.receive() {
                Some((MessageType::Ack, body)) => {
                    self.acked = wire::decode::<wire::Ack>(&body).expect("decodes").durable_lsn;
                }
                Some(_) => {}
                None => return false,
            }
        }
        true
    }

    fn image(&self, lsn: u64) -> Vec<u8> {
        let mut image = vec![0; usize::try_from(DISK_BYTES).expect("small")];
        for (_, offset, bytes) in self.writes.iter().take_while(|(at, ..)| *at <= lsn) {
            let start = usize::try_from(*offset).expect("small");
            image[start..start + bytes.len()].copy_from_slice(bytes);
        }
        image
    }
}
