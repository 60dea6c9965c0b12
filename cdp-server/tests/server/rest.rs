//! What every REST request can count on.

use cdp_api::{Kind, Problem};
use journal_format::{DiskId, Lsn};
use reqwest::blocking::{Client, Response};

use crate::agent::{Agent, Capture, DISK, inventory};
use crate::{Fixture, eventually, now_ns, problem};

fn get(fixture: &Fixture, path: &str) -> Response {
    Client::new().get(fixture.url(path)).send().expect("answers")
}

/// Checks that it is a problem in every respect, and gives it.
fn checked(response: Response) -> Problem {
    let status = response.status().as_u16();
    let kind = response.headers()["content-type"].to_str().expect("text").to_owned();
    let problem: Problem = serde_json::from_slice(&response.bytes().expect("a body")).expect("a problem");
    assert_eq!((kind.as_str(), problem.status), ("application/problem+json", status));
    assert_eq!(problem.type_uri, format!("urn:qemu-cdp:problem:{}", problem.kind.as_str()));
    assert!(!problem.title.is_empty() && !problem.detail.is_empty() && !problem.hint.is_empty());
    problem
}

/// A disk with a journal of three records.
fn with_journal(fixture: &Fixture) -> Agent {
    let mut agent = Agent::with_disk(fixture.data());
    let mut capture = Capture::new(&agent.open(None), now_ns() - 1_000_000_000);
    let frame = capture.begin().write(0, &[5; 4096]).frame();
    agent.ship(&frame, Lsn(3));
    eventually(|| fixture.client.disk("vm/disk0").ok());
    agent
}

#[test]
fn every_error_is_a_problem_with_a_hint() {
    let fixture = Fixture::start();
    let _agent = with_journal(&fixture);
    let none = DiskId([0; 16]);
    let cases = [
        ("/nowhere", Kind::NotFound),
        ("/v1/disks/vm/disk0/points/deeper/still", Kind::NotFound),
        ("/v1/disks/vm/disk9", Kind::NoSuchDisk),
        (&format!("/v1/disks/{none}"), Kind::NoSuchDisk),
        ("/v1/disks/%ff", Kind::BadRequest),
        ("/v1/disks/vm/disk0/bookmarks", Kind::MethodNotAllowed),
        ("/v1/disks/vm%2Fdisk0/bookmarks", Kind::MethodNotAllowed),
        ("/v1/disks/vm/disk0/points?at=yesterday", Kind::BadPoint),
        ("/v1/disks/vm/disk0/points?when=latest", Kind::BadRequest),
        ("/v1/disks/vm/disk0/points?at=lsn:99", Kind::PointOutOfRange),
        ("/v1/disks/vm/disk0/points?at=lsn:1", Kind::PointInGap),
        ("/v1/disks/vm/disk0/data", Kind::BadRequest),
        ("/v1/disks/vm/disk0/data?lsn=3&offset=0&length=1048577", Kind::BadRequest),
        ("/v1/disks/vm/disk0/data?lsn=3&offset=18446744073709551615&length=1", Kind::BadRequest),
        ("/v1/disks/vm/disk0/extents?lsn=x", Kind::BadRequest),
        ("/v1/disks/vm/disk0/extents?lsn=99", Kind::PointOutOfRange),
    ];
    for (path, kind) in cases {
        assert_eq!(checked(get(&fixture, path)).kind, kind, "{path}");
    }
}

#[test]
fn a_body_that_does_not_fit_is_a_problem_too() {
    let fixture = Fixture::start();
    let _agent = with_journal(&fixture);
    let url = fixture.url("/v1/disks/vm/disk0/protection");
    let put = |kind: &str, body: String| {
        let request = Client::new().put(&url).header("content-type", kind.to_owned()).body(body);
        checked(request.send().expect("answers")).kind
    };
    let json = "application/json";
    assert_eq!(put(json, "{".to_owned()), Kind::BadRequest);
    assert_eq!(put(json, r#"{"enabled":"yes"}"#.to_owned()), Kind::BadRequest);
    assert_eq!(put(json, r#"{"enabled":true,"more":1}"#.to_owned()), Kind::BadRequest);
    assert_eq!(put("text/plain", r#"{"enabled":true}"#.to_owned()), Kind::UnsupportedMediaType);
    assert_eq!(put("text/plain", " ".repeat(5 << 20)), Kind::TooLarge);
    // Also one that is still being sent when the server has seen enough: a broken pipe would tell nothing.
    for bytes in [1 << 20, 5 << 20] {
        assert_eq!(put(json, " ".repeat(bytes)), Kind::TooLarge);
    }
    let delete = Client::new().delete(&url).send().expect("answers");
    assert_eq!(checked(delete).kind, Kind::MethodNotAllowed);
}

#[test]
fn an_offset_whose_plus_was_not_encoded_is_read_as_what_was_meant() {
    let fixture = Fixture::start();
    let _agent = with_journal(&fixture);
    let newest = fixture.client.points("vm/disk0").expect("points").newest.expect("one");
    let shifted =
        jiff::Timestamp::from_nanosecond(i128::from(newest.stamp_ns + 3_600_000_000_000)).expect("in range");
    let text = shifted.to_string().replace('Z', "+01:00");
    for at in [text.clone(), text.replace('+', "%2B")] {
        let response = get(&fixture, &format!("/v1/disks/vm/disk0/points?at={at}"));
        let points: cdp_api::Points =
            serde_json::from_slice(&response.bytes().expect("a body")).expect("points");
        assert_eq!(points.resolved.map(|p| p.lsn), Some(newest.lsn), "{at}");
    }
}

#[test]
fn two_hosts_with_the_same_vm_name_are_told_apart_by_uuid() {
    let fixture = Fixture::start();
    let mut one = Agent::with_disk(fixture.data());
    let mut other = Agent::raw(fixture.data());
    let hello = journal_format::wire::Hello {
        host_id: vec![2; 16],
        host_name: "host2".to_owned(),
        ..crate::agent::hello()
    };
    assert_eq!(other.hello(&hello).refused, "");
    other.send(&inventory(DiskId([0xd2; 16]), "vm", "disk0"));
    eventually(|| (fixture.client.disks().ok()?.len() == 2).then_some(()));
    let refused = problem(fixture.client.disk("vm/disk0"));
    assert_eq!((refused.kind, refused.status), (Kind::AmbiguousDisk, 409));
    assert!(refused.detail.contains("host1") && refused.detail.contains("host2"), "{}", refused.detail);
    for part in [&DISK.to_string(), &DiskId([0xd2; 16]).to_string(), "runs now"] {
        assert!(refused.detail.contains(part), "{part} is missing in: {}", refused.detail);
    }
    assert!(refused.hint.contains("UUID"), "{}", refused.hint);
    assert_eq!(fixture.client.disk(&DISK.to_string()).expect("by id").summary.host, "host1");
    one.send(&journal_format::wire::Ping { number: 1 });
}

#[test]
fn a_device_with_slashes_and_a_resource_s_name_is_reached_encoded() {
    let fixture = Fixture::start();
    let mut agent = Agent::connect(fixture.data());
    agent.send(&inventory(DISK, "my vm", "points/virtio 0"));
    eventually(|| fixture.client.disk(&DISK.to_string()).ok());
    assert_eq!(fixture.client.disk("my vm/points/virtio 0").expect("found").summary.id, DISK.to_string());
}

#[test]
fn a_disk_that_was_never_protected_has_no_points() {
    let fixture = Fixture::start();
    let mut agent = Agent::with_disk(fixture.data());
    agent.send(&journal_format::wire::Ping { number: 1 });
    eventually(|| fixture.client.disk("vm/disk0").ok());
    let points = fixture.client.points("vm/disk0").expect("points");
    assert!(points.recoverable.is_empty() && points.newest.is_none());
    assert_eq!(problem(fixture.client.data("vm/disk0", 1, 0, 512)).kind, Kind::NoJournal);
}

#[test]
fn health_and_metrics_tell_what_monitoring_needs() {
    let fixture = Fixture::start();
    let mut agent = with_journal(&fixture);
    agent.status("capturing", Lsn(5), now_ns());
    eventually(|| (fixture.client.disk("vm/disk0").ok()?.journal?.lag_lsns == 2).then_some(()));
    let health: serde_json::Value =
        serde_json::from_slice(&get(&fixture, "/healthz").bytes().expect("a body")).expect("JSON");
    assert_eq!((health["status"].as_str(), health["agents"].as_u64()), (Some("ok"), Some(1)));
    let text = get(&fixture, "/metrics").text().expect("text");
    let labels = format!("{{disk=\"{DISK}\",vm=\"vm\",device=\"disk0\"}}");
    let value = |name: &str| -> f64 {
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("{name}{labels} ")));
        line.unwrap_or_else(|| panic!("{name} in\n{text}")).parse().expect("a number")
    };
    assert_eq!(value("cdp_lag_lsns").to_string(), "2");
    assert!(value("cdp_lag_seconds") > 0.0);
    value("cdp_lag_bytes");
    assert_eq!(value("cdp_ring_used_bytes").to_string(), "4096");
    assert_eq!(value("cdp_ingest_records_total").to_string(), "3");
    assert_eq!(value("cdp_ingest_raw_bytes_total").to_string(), "4096");
    assert!(value("cdp_journal_stored_meta_bytes") > 0.0);
    assert_eq!(value("cdp_journal_raw_bytes").to_string(), "4096");
}

/// Whatever a VM and its device are called, the name that the list shows is the name that finds the disk.
#[test]
fn any_name_that_is_listed_is_found() {
    let fixture = Fixture::start();
    let mut agent = Agent::connect(fixture.data());
    let names = [
        ("-5m", "disk0"),
        ("..", "."),
        ("a b", "c d"),
        ("\u{e9}t\u{e9} \u{1f600}", "\u{fc}"),
        ("it's \"quoted\"", "`$(x)`;&|*?"),
        ("100%25", "%2F%00"),
        ("a?b#c", "d=e&f+g"),
        ("new\nline\u{1b}[2J", "disk"),
        ("/leading", "/machine/peripheral-anon/device[0]"),
        ("00000000-0000-0000-0000-000000000000", "disk0"),
    ];
    let mut report = journal_format::wire::Inventory::default();
    for (number, (vm, device)) in (1_u8..).zip(names) {
        report.vms.extend(inventory(DiskId([number; 16]), vm, device).vms);
    }
    agent.send(&report);
    let disks = eventually(|| fixture.client.disks().ok().filter(|disks| disks.len() == names.len()));
    for disk in &disks {
        let name = format!("{}/{}", disk.vm, disk.device);
        assert!(!name.chars().any(char::is_control), "{name:?}");
        assert_eq!(
            fixture.client.disk(&name).map(|found| found.summary.id).ok(),
            Some(disk.id.clone()),
            "{name:?}"
        );
    }
    // The same text from two splits of it.
    let mut report = journal_format::wire::Inventory::default();
    report.vms.extend(inventory(DiskId([0x71; 16]), "a/b", "c").vms);
    report.vms.extend(inventory(DiskId([0x72; 16]), "a", "b/c").vms);
    agent.send(&report);
    eventually(|| fixture.client.disks().ok().filter(|disks| disks.len() == names.len() + 2));
    let refused = problem(fixture.client.disk("a/b/c"));
    assert_eq!(refused.kind, Kind::AmbiguousDisk);
    assert!(refused.detail.contains(&DiskId([0x72; 16]).to_string()), "{}", refused.detail);
}
