//! `cdpctl` as an operator runs it, against a live server with a fake agent behind it.

#![allow(missing_docs, reason = "tests document themselves by their names")]

#[allow(dead_code, reason = "the server's tests use more of it")]
#[path = "../../cdp-server/tests/server/agent.rs"]
mod agent;

use std::process::Output;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use agent::{Agent, Capture, DISK};
use cdp_server::{Config, Server};
use journal_format::{Lsn, wire};

struct Fixture {
    _dir: tempfile::TempDir,
    server: Option<Server>,
    url: String,
}

impl Fixture {
    fn start() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let server = Server::start(Config::on_free_ports(dir.path())).expect("starts");
        let url = format!("http://{}", server.http_address());
        Self { _dir: dir, server: Some(server), url }
    }

    /// A server that knows `vm/disk0` with three records, of which 2 and 3 can be restored.
    fn with_journal() -> (Self, Agent, Capture) {
        let fixture = Self::start();
        let mut agent = Agent::with_disk(fixture.server.as_ref().expect("runs").data_address());
        let mut capture = Capture::new(&agent.open(None), now_ns() - 60_000_000_000);
        let frame = capture.begin().write(0, &[1; 512]).frame();
        agent.ship(&frame, Lsn(3));
        (fixture, agent, capture)
    }

    fn run(&self, args: &[&str]) -> Output {
        run(&self.url, args)
    }

    /// Runs it, expects success, and gives standard output.
    fn text(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}: {}", stderr(&output));
        String::from_utf8(output.stdout).expect("UTF-8")
    }

    fn json(&self, args: &[&str]) -> serde_json::Value {
        let text = self.text(&[args, &["--output-format", "json"]].concat());
        serde_json::from_str(&text).expect("JSON")
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            server.stop();
        }
    }
}

fn run(server: &str, args: &[&str]) -> Output {
    let mut command = assert_cmd::Command::cargo_bin("cdpctl").expect("built");
    command.env("CDP_SERVER", server).env("TZ", "UTC").args(args).output().expect("runs")
}

/// Waits until `what` gives something.
fn eventually<T>(mut what: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(value) = what() {
            return value;
        }
        assert!(Instant::now() < end, "it never came true");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    u64::try_from(since.as_nanos()).expect("before 2554")
}

#[test]
fn disks_are_listed_and_shown_as_text_and_json() {
    let (fixture, _agent, _) = Fixture::with_journal();
    let list = fixture.json(&["disk", "list"]);
    assert_eq!(
        (list[0]["id"].as_str(), list[0]["vm"].as_str()),
        (Some(DISK.to_string().as_str()), Some("vm"))
    );
    let text = fixture.text(&["disk", "list"]);
    assert!(text.contains("vm/disk0") && text.contains("1.0 MiB"), "{text}");
    let show = fixture.json(&["disk", "show", "vm/disk0"]);
    assert_eq!((show["driver"].as_str(), show["journal"]["durable_lsn"].as_u64()), (Some("qcow2"), Some(3)));
    assert!(fixture.text(&["disk", "show", &DISK.to_string()]).contains("newest point: lsn 3"));
}

#[test]
fn points_echo_what_a_time_resolves_to() {
    let (fixture, _agent, capture) = Fixture::with_journal();
    let points = fixture.json(&["points", "vm/disk0", "--at", "lsn:2"]);
    assert_eq!((points["resolved"]["lsn"].as_u64(), points["newest"]["lsn"].as_u64()), (Some(2), Some(3)));
    let time = cdp_api::time::rfc3339(capture.stamp);
    let points = fixture.json(&["points", "vm/disk0", "--at", &time]);
    assert_eq!(points["resolved"]["stamp_ns"].as_u64(), Some(capture.stamp));
    let local = time.replace('T', " ").replace('Z', "");
    assert_eq!(fixture.json(&["points", "vm/disk0", "--at", &local])["resolved"], points["resolved"]);
    let text = fixture.text(&["points", "vm/disk0", "--at", "-5s"]);
    assert!(text.contains("resolved:     lsn 3") && text.contains("after a write"), "{text}");
}

#[test]
fn a_point_that_cannot_be_restored_is_exit_code_3_with_the_nearest_points() {
    let (fixture, _agent, _) = Fixture::with_journal();
    let output = fixture.run(&["points", "vm/disk0", "--at", "-1h"]);
    assert_eq!(output.status.code(), Some(3));
    assert!(output.stdout.is_empty());
    let text = stderr(&output);
    assert!(text.contains("nearest good point after: lsn 2") && text.contains("hint: "), "{text}");
}

#[test]
fn what_is_no_point_is_wrong_usage() {
    let (fixture, _agent, _) = Fixture::with_journal();
    let output = fixture.run(&["points", "vm/disk0", "--at", "yesterday"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("lsn:N"), "{}", stderr(&output));
    assert_eq!(fixture.run(&["points"]).status.code(), Some(2));
}

#[test]
fn an_unknown_disk_and_a_server_that_is_not_there_are_failures_with_a_hint() {
    let fixture = Fixture::start();
    let output = fixture.run(&["disk", "show", "vm/none"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("cdpctl disk list"), "{}", stderr(&output));
    let output = run("http://127.0.0.1:1", &["disk", "list"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("CDP_SERVER"), "{}", stderr(&output));
}

#[test]
fn bookmarks_name_a_point_once() {
    let (fixture, agent, _) = Fixture::with_journal();
    drop(agent);
    let bookmark = fixture.json(&["bookmark", "vm/disk0", "first", "--at", "lsn:2"]);
    assert_eq!((bookmark["name"].as_str(), bookmark["lsn"].as_u64()), (Some("first"), Some(2)));
    let again = fixture.run(&["bookmark", "vm/disk0", "first"]);
    assert_eq!(again.status.code(), Some(1));
    assert!(stderr(&again).contains("exists"), "{}", stderr(&again));
    assert_eq!(
        fixture.json(&["points", "vm/disk0", "--at", "bookmark:first"])["resolved"]["lsn"].as_u64(),
        Some(2)
    );
}

#[test]
fn protection_is_switched_through_the_agent() {
    let (fixture, mut agent, _) = Fixture::with_journal();
    let url = fixture.url.clone();
    let protect = std::thread::spawn(move || run(&url, &["protect", "vm/disk0"]));
    let command: wire::SetProtection = agent.expect();
    assert!(command.enabled);
    agent.done(command.request);
    let output = protect.join().expect("no panic");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(String::from_utf8_lossy(&output.stdout).contains("vm/disk0: protection on"));
    drop(agent);
    eventually(|| (fixture.json(&["disk", "show", "vm/disk0"])["online"] == false).then_some(()));
    let state = fixture.json(&["unprotect", "vm/disk0"]);
    assert_eq!((state["enabled"].as_bool(), state["phase"].as_str()), (Some(false), Some("off")));
}

#[test]
fn verify_checks_all_disks_and_ends_with_4_when_something_is_damaged() {
    let (fixture, mut agent, mut capture) = Fixture::with_journal();
    let frame = capture.write(8192, &[0xab; 4096]).frame();
    agent.ship(&frame, Lsn(4));
    let text = fixture.text(&["verify"]);
    assert!(text.contains("lsn 1 to 4: no damage"), "{text}");
    let path = fixture._dir.path().join("disks").join(DISK.to_string()).join("data-000001.seg");
    let mut bytes = std::fs::read(&path).expect("reads");
    let at = bytes.iter().rposition(|byte| *byte == 0xab).expect("the data of the last write");
    bytes[at] ^= 1;
    std::fs::write(&path, bytes).expect("writes");
    let output = fixture.run(&["verify", "vm/disk0"]);
    let text = String::from_utf8(output.stdout.clone()).expect("UTF-8");
    assert_eq!(output.status.code(), Some(4), "{text}{}", stderr(&output));
    assert!(text.contains("data-000001.seg at byte") && text.contains("lsn 4 to 4"), "{text}");
    let output = fixture.run(&["verify", "--output-format", "json"]);
    assert_eq!(output.status.code(), Some(4));
    let checks: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(checks[0]["damage"][0]["kind"], "data");
    let list = fixture.text(&["disk", "list"]);
    assert!(list.contains("damaged") && list.contains("hint: "), "{list}");
}

#[test]
fn with_json_every_end_is_one_document() {
    let (fixture, _agent, _) = Fixture::with_journal();
    let away = "http://127.0.0.1:1";
    for (server, arguments, code, kind) in [
        (fixture.url.as_str(), &["disk", "show", "vm/none"][..], 1, "no-such-disk"),
        (&fixture.url, &["points", "vm/disk0", "--at", "lsn:1"], 3, "point-in-gap"),
        (&fixture.url, &["points", "vm/disk0", "--at", "noon"], 2, "bad-point"),
        (&fixture.url, &["protect", "vm/disk0", "--policy", "maybe"], 2, "usage"),
        (&fixture.url, &["nonsense"], 2, "usage"),
        (away, &["disk", "list"], 1, "server-not-reached"),
    ] {
        let output = run(server, &[arguments, &["--output-format", "json"]].concat());
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", stderr(&output));
        let document: serde_json::Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|e| panic!("{arguments:?}: {e}: {}", String::from_utf8_lossy(&output.stdout)));
        let error = &document["error"];
        assert_eq!(error["kind"], kind, "{error}");
        assert!(error["detail"].as_str().is_some_and(|detail| !detail.is_empty()), "{error}");
        assert!(error["hint"].as_str().is_some_and(|hint| !hint.is_empty()), "{error}");
        assert_eq!(error["after"]["lsn"].as_u64(), (code == 3).then_some(2), "{error}");
    }
}

#[test]
fn a_result_that_cannot_be_written_is_a_failure_and_a_reader_that_is_gone_a_quiet_one() {
    let fixture = Fixture::start();
    let command = || {
        let mut command = std::process::Command::new(assert_cmd::cargo::cargo_bin("cdpctl"));
        command.env("CDP_SERVER", &fixture.url).args(["disk", "list"]);
        command
    };
    let full = || std::fs::File::options().write(true).open("/dev/full").expect("/dev/full");
    let output = command().stdout(full()).output().expect("runs");
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("cannot write to standard output"), "{}", stderr(&output));
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let output = command().stdout(writer).output().expect("runs");
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(141), ""));
    // What cannot be said changes no exit code.
    let output = command().arg("--nonsense").stderr(full()).output().expect("runs");
    assert_eq!(output.status.code(), Some(2));
    let output = command().env("CDP_SERVER", "http://127.0.0.1:1").stderr(full()).output().expect("runs");
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn the_spool_is_shown_and_that_it_fails() {
    let (fixture, mut agent, _) = Fixture::with_journal();
    let mut status = wire::DiskStatus {
        disk: DISK.0.to_vec(),
        epoch: agent.epoch,
        mode: "capturing".to_owned(),
        spool_used_bytes: 3 << 20,
        spool_bytes: 64 << 20,
        ..wire::DiskStatus::default()
    };
    agent.send(&status);
    let shows = |text: &str| fixture.text(&["disk", "show", "vm/disk0"]).contains(text).then_some(());
    eventually(|| shows("spool:        3.0 MiB of 64.0 MiB"));
    status.spool_trouble = "cannot write to /spool: no space".to_owned();
    agent.send(&status);
    eventually(|| shows("spool:        3.0 MiB used; it cannot be written to"));
    for command in [&["disk", "show", "vm/disk0"][..], &["disk", "list"]] {
        let text = fixture.text(command);
        assert!(text.contains("cannot write to /spool: no space") && text.contains("--spool-dir"), "{text}");
    }
}

/// How a disk is protected, in the API's words.
fn options(state: &serde_json::Value) -> serde_json::Value {
    let names = ["enabled", "policy", "throttle_ms", "ring_mib", "sync", "sync_timeout_ms"];
    names.iter().map(|name| ((*name).to_owned(), state[name].clone())).collect()
}

#[test]
fn protect_changes_what_it_is_told_and_leaves_the_rest() {
    let (mut fixture, agent, _) = Fixture::with_journal();
    // Without the agent a wish is only kept, so that nobody has to answer.
    drop(agent);
    eventually(|| (fixture.json(&["disk", "show", "vm/disk0"])["online"] == false).then_some(()));
    let protect = |fixture: &Fixture, flags: &[&str]| {
        options(&fixture.json(&[&["protect", "vm/disk0"][..], flags].concat()))
    };
    let expected = |policy: &str, throttle: u32, ring: Option<u32>, sync: bool, timeout: u32| {
        serde_json::json!({"enabled": true, "policy": policy, "throttle_ms": throttle, "ring_mib": ring, "sync": sync,
            "sync_timeout_ms": timeout})
    };
    let steps: [(&[&str], serde_json::Value); 8] = [
        (&[], expected("track", 1000, None, false, 10_000)),
        (&["--policy", "throttle", "--throttle-ms", "250"], expected("throttle", 250, None, false, 10_000)),
        (&["--ring-mib", "128"], expected("throttle", 250, Some(128), false, 10_000)),
        (
            &["--sync", "on", "--sync-timeout-ms", "3600000"],
            expected("throttle", 250, Some(128), true, 3_600_000),
        ),
        (&[], expected("throttle", 250, Some(128), true, 3_600_000)),
        (&["--sync", "off"], expected("throttle", 250, Some(128), false, 3_600_000)),
        (&["--policy", "strict", "--ring-mib", "8"], expected("strict", 250, Some(8), false, 3_600_000)),
        (&["--policy", "track"], expected("track", 250, Some(8), false, 3_600_000)),
    ];
    for (flags, wanted) in steps {
        // Once more changes nothing.
        for time in ["first", "second"] {
            assert_eq!(protect(&fixture, flags), wanted, "{flags:?}, the {time} time");
        }
        assert_eq!(options(&fixture.json(&["disk", "show", "vm/disk0"])["protection"]), wanted, "{flags:?}");
    }
    let last = protect(&fixture, &[]);
    let off = options(&fixture.json(&["unprotect", "vm/disk0"]));
    assert_eq!((&off["enabled"], &off["ring_mib"]), (&false.into(), &8.into()), "how stays known");
    assert_eq!(protect(&fixture, &[]), last);
    // And it is kept.
    let store = fixture._dir.path().to_owned();
    fixture.server.take().expect("runs").stop();
    let server = Server::start(Config::on_free_ports(&store)).expect("starts again");
    fixture.url = format!("http://{}", server.http_address());
    fixture.server = Some(server);
    assert_eq!(options(&fixture.json(&["disk", "show", "vm/disk0"])["protection"]), last);
    let text = fixture.text(&["protect", "vm/disk0", "--policy", "throttle", "--sync", "on"]);
    assert!(text.contains("vm/disk0: protection on, now offline"), "{text}");
    let text = fixture.text(&["disk", "show", "vm/disk0"]);
    assert!(text.contains("throttle for up to 250 ms") && text.contains("for up to 3600000 ms"), "{text}");
}

#[test]
fn how_a_disk_is_protected_reaches_its_agent() {
    let (fixture, mut agent, _) = Fixture::with_journal();
    let url = fixture.url.clone();
    let flags = [
        "--policy",
        "strict",
        "--throttle-ms",
        "7",
        "--ring-mib",
        "32",
        "--sync",
        "on",
        "--sync-timeout-ms",
        "9",
    ];
    let protect = std::thread::spawn(move || run(&url, &[&["protect", "vm/disk0"][..], &flags].concat()));
    let command: wire::SetProtection = agent.expect();
    let wanted =
        wire::ProtectionOptions { overflow: 2, throttle_ms: 7, ring_mib: 32, sync: true, sync_timeout_ms: 9 };
    assert_eq!((command.enabled, command.options), (true, Some(wanted)));
    agent.done(command.request);
    let output = protect.join().expect("no panic");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
}

#[test]
fn help_and_refusals_say_the_range_of_every_value() {
    use cdp_api::limits::{RING_MIB, SYNC_TIMEOUT_MS, THROTTLE_MS};
    let (fixture, _agent, _) = Fixture::with_journal();
    let before = fixture.json(&["disk", "show", "vm/disk0"])["protection"].clone();
    let help = fixture.text(&["protect", "--help"]);
    let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
    for (flag, range) in
        [("--throttle-ms", THROTTLE_MS), ("--ring-mib", RING_MIB), ("--sync-timeout-ms", SYNC_TIMEOUT_MS)]
    {
        let (least, most) = (u64::from(*range.start()), u64::from(*range.end()));
        assert!(
            help.contains(&format!("{least} to {most} M")) || help.contains(&format!("{least} to {most} ms")),
            "{help}"
        );
        for wrong in
            [(least - 1).to_string(), (most + 1).to_string(), "18446744073709551616".into(), "x".into()]
        {
            let output = fixture.run(&["protect", "vm/disk0", flag, &wrong]);
            assert_eq!(output.status.code(), Some(2), "{flag} {wrong}");
            assert!(stderr(&output).contains(&format!("from {least} to {most}")), "{}", stderr(&output));
        }
    }
    for (flag, hint) in [("--policy", "strict"), ("--sync", "off")] {
        let output = fixture.run(&["protect", "vm/disk0", flag, "maybe"]);
        assert_eq!(output.status.code(), Some(2), "{flag}");
        assert!(stderr(&output).contains(hint), "{}", stderr(&output));
    }
    assert_eq!(fixture.json(&["disk", "show", "vm/disk0"])["protection"], before, "nothing has changed");
}

#[test]
fn a_name_that_begins_with_a_minus_goes_behind_two() {
    let (fixture, mut agent, _) = Fixture::with_journal();
    let mut report = agent::inventory(DISK, "-5m", "it's \"a\" disk");
    report.vms[0].uuid = vec![9; 16];
    agent.send(&report);
    eventually(|| fixture.text(&["disk", "list"]).contains("-5m/it's").then_some(()));
    let shown = fixture.text(&["disk", "show", "--", "-5m/it's \"a\" disk"]);
    assert!(shown.contains(&DISK.to_string()), "{shown}");
    let output = fixture.run(&["disk", "show", "-5m/it's \"a\" disk"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("-- "), "it says how: {}", stderr(&output));
}
