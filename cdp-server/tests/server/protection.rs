//! Wanted and real protection.

use std::time::Duration;

use cdp_api::{Kind, OverflowPolicy, Protection, ProtectionOptions, ProtectionPhase};
use journal_format::{DiskId, Lsn, wire};

use crate::agent::{Agent, Capture, DISK, inventory};
use crate::{Fixture, eventually, now_ns, problem};

const NAME: &str = "vm/disk0";

/// A reported disk, as soon as the server knows it.
fn reported(fixture: &Fixture) -> Agent {
    let agent = Agent::reported(fixture.data());
    assert!(fixture.client.disk(NAME).expect("reported").online);
    agent
}

fn phase(fixture: &Fixture) -> ProtectionPhase {
    fixture.client.disk(NAME).expect("known").summary.protection.phase
}

#[test]
fn a_put_reaches_the_agent_and_waits_for_its_result() {
    let fixture = Fixture::start();
    let mut agent = reported(&fixture);
    assert_eq!(phase(&fixture), ProtectionPhase::Off);
    let client = fixture.client.clone();
    let put = std::thread::spawn(move || client.set_protection(NAME, true));
    let command: wire::SetProtection = agent.expect();
    assert_eq!((command.disk.as_slice(), command.enabled), (&DISK.0[..], true));
    let mut capture = Capture::new(&agent.open(None), now_ns() - 1_000_000_000);
    assert!(!put.is_finished(), "the agent has not said that it is done");
    agent.done(command.request);
    let state = put.join().expect("no panic").expect("done");
    assert_eq!((state.enabled, state.phase), (true, ProtectionPhase::Syncing), "nothing is synced yet");

    let frame = capture.begin().frame();
    agent.ship(&frame, Lsn(2));
    agent.status("capturing", Lsn(2), now_ns());
    eventually(|| (phase(&fixture) == ProtectionPhase::Protected).then_some(()));
    agent.status("tracking", Lsn(2), now_ns());
    eventually(|| (phase(&fixture) == ProtectionPhase::Tracking).then_some(()));
}

/// A server that has just granted a new session still has the old one's history, whose last gap is closed. It once
/// called such a disk protected until the new session's gap-begin arrived.
#[test]
fn a_new_session_is_a_gap_before_its_first_record_arrives() {
    let fixture = Fixture::start();
    let mut agent = reported(&fixture);
    let client = fixture.client.clone();
    let put = std::thread::spawn(move || client.set_protection(NAME, true));
    let command: wire::SetProtection = agent.expect();
    let mut capture = agent.carry_out(&command, now_ns() - 1_000_000_000);
    put.join().expect("no panic").expect("done");
    agent.synced(&mut capture);
    eventually(|| (phase(&fixture) == ProtectionPhase::Protected).then_some(()));

    let opened = agent.open(None);
    assert_eq!(opened.epoch, 2);
    assert_eq!(phase(&fixture), ProtectionPhase::Syncing);
    let refused = problem(fixture.client.create_bookmark(NAME, "now", None));
    assert_eq!(refused.kind, Kind::PointInGap, "a bookmark set now could not be restored");
    let mut capture = Capture::new(&opened, capture.stamp);
    let frame = capture.begin().frame();
    agent.ship(&frame, Lsn(4));
    eventually(|| (phase(&fixture) == ProtectionPhase::Protected).then_some(()));
}

#[test]
fn a_refusal_is_passed_on_and_the_wish_taken_back() {
    let fixture = Fixture::start();
    let mut agent = reported(&fixture);
    let client = fixture.client.clone();
    let put = std::thread::spawn(move || client.set_protection(NAME, true));
    let command: wire::SetProtection = agent.expect();
    let error = "this QEMU is not known".to_owned();
    agent.send(&wire::CommandResult { request: command.request, error, ..wire::CommandResult::default() });
    let refused = problem(put.join().expect("no panic"));
    assert_eq!((refused.kind, refused.status), (Kind::AgentRefused, 409));
    assert!(refused.detail.contains("this QEMU is not known"), "{}", refused.detail);
    assert!(!fixture.client.disk(NAME).expect("known").summary.protection.enabled);
}

#[test]
fn a_disk_that_cannot_be_protected_is_refused_with_the_reason() {
    let fixture = Fixture::start();
    let mut agent = Agent::connect(fixture.data());
    let mut report = inventory(DISK, "vm", "disk0");
    report.vms[0].disks[0].refused = "driver 'foo' is not wrapped".to_owned();
    agent.send(&report);
    eventually(|| fixture.client.disk(NAME).ok().filter(|disk| disk.online));
    let refused = problem(fixture.client.set_protection(NAME, true));
    assert_eq!(refused.kind, Kind::AgentRefused);
    assert!(refused.detail.contains("driver 'foo'"), "{}", refused.detail);
}

#[test]
fn what_is_wanted_while_the_agent_is_away_happens_when_it_is_back() {
    let mut fixture = Fixture::start();
    drop(reported(&fixture));
    eventually(|| (!fixture.client.disk(NAME).ok()?.online).then_some(()));
    let state = fixture.client.set_protection(NAME, true).expect("kept");
    assert_eq!((state.enabled, state.phase), (true, ProtectionPhase::Offline));
    assert!(!state.reason.is_empty());
    fixture.restart();
    let mut agent = Agent::with_disk(fixture.data());
    let command: wire::SetProtection = agent.expect();
    assert!(command.enabled);
}

#[test]
fn a_disk_that_its_running_vm_no_longer_has_is_not_said_to_be_without_agent() {
    let fixture = Fixture::start();
    let mut agent = reported(&fixture);
    agent.send(&inventory(DiskId([0xd2; 16]), "vm", "disk1"));
    eventually(|| (!fixture.client.disk(NAME).ok()?.online).then_some(()));
    let state = fixture.client.set_protection(NAME, true).expect("kept");
    assert_eq!((state.enabled, state.phase), (true, ProtectionPhase::Offline));
    assert!(state.reason.contains("the VM runs but has no such disk"), "{}", state.reason);
}

#[test]
fn a_vm_that_restarts_is_protected_again() {
    let fixture = Fixture::start();
    let mut agent = reported(&fixture);
    let client = fixture.client.clone();
    let put = std::thread::spawn(move || client.set_protection(NAME, true));
    let command: wire::SetProtection = agent.expect();
    agent.done(command.request);
    put.join().expect("no panic").expect("done");
    agent.send(&wire::Inventory::default());
    eventually(|| (phase(&fixture) == ProtectionPhase::Offline).then_some(()));
    let mut report = inventory(DISK, "vm", "disk0");
    report.vms[0].pid = 78;
    agent.send(&report);
    assert!(agent.expect::<wire::SetProtection>().enabled);
}

#[test]
fn a_capture_that_nobody_wants_is_switched_off() {
    let fixture = Fixture::start();
    let mut agent = reported(&fixture);
    agent.status("capturing", Lsn(1), now_ns());
    let command: wire::SetProtection = agent.expect();
    assert!(!command.enabled);
    assert_eq!(phase(&fixture), ProtectionPhase::Stopping);
    agent.done(command.request);
    eventually(|| (phase(&fixture) == ProtectionPhase::Off).then_some(()));
}

#[test]
fn both_forms_of_a_name_and_repeated_puts_do_the_same() {
    let fixture = Fixture::start();
    drop(reported(&fixture));
    eventually(|| (!fixture.client.disk(NAME).ok()?.online).then_some(()));
    let http =
        reqwest::blocking::Client::builder().timeout(Duration::from_secs(30)).build().expect("a client");
    let forms =
        [format!("{DISK}"), "vm/disk0".to_owned(), "vm%2Fdisk0".to_owned(), "%76m/disk%30".to_owned()];
    for form in &forms {
        let url = fixture.url(&format!("/v1/disks/{form}/protection"));
        let put = http.put(&url).json(&serde_json::json!({"enabled": true})).send().expect("answers");
        assert_eq!(put.status().as_u16(), 202, "{form}");
        let state: serde_json::Value = serde_json::from_str(&put.text().expect("text")).expect("JSON");
        assert_eq!(
            (state["enabled"].as_bool(), state["phase"].as_str()),
            (Some(true), Some("offline")),
            "{form}"
        );
        let show = http.get(fixture.url(&format!("/v1/disks/{form}"))).send().expect("answers");
        assert_eq!(show.status().as_u16(), 200, "{form}");
    }
    assert!(!fixture.client.set_protection(NAME, false).expect("done").enabled);
}

#[test]
fn how_a_disk_is_protected_reaches_the_agent_and_is_kept() {
    let mut fixture = Fixture::start();
    let mut agent = reported(&fixture);
    let client = fixture.client.clone();
    let wanted = Protection {
        enabled: true,
        policy: Some("strict".to_owned()),
        ring_mib: Some(8),
        sync: Some(true),
        sync_timeout_ms: Some(500),
        throttle_ms: None,
    };
    let put = std::thread::spawn(move || client.put_protection(NAME, &wanted));
    let command: wire::SetProtection = agent.expect();
    let expected = wire::ProtectionOptions {
        overflow: 2,
        throttle_ms: 1000,
        ring_mib: 8,
        sync: true,
        sync_timeout_ms: 500,
    };
    assert_eq!((command.enabled, command.options), (true, Some(expected)));
    agent.done(command.request);
    let state = put.join().expect("no panic").expect("done");
    let expected = ProtectionOptions {
        policy: OverflowPolicy::Strict,
        throttle_ms: 1000,
        ring_mib: Some(8),
        sync: true,
        sync_timeout_ms: 500,
    };
    assert_eq!(state.options, expected);
    // What is absent stays as it is, also over a restart; and an agent that comes back is told.
    drop(agent);
    fixture.restart();
    let mut agent = Agent::with_disk(fixture.data());
    let command: wire::SetProtection = agent.expect();
    assert_eq!(command.options.expect("told").overflow, 2);
    agent.done(command.request);
    let client = fixture.client.clone();
    let off = std::thread::spawn(move || client.set_protection(NAME, false));
    let command: wire::SetProtection = agent.expect();
    assert_eq!((command.enabled, command.options), (false, None));
    agent.done(command.request);
    assert_eq!(off.join().expect("no panic").expect("done").options, expected);
}

#[test]
fn an_agent_that_captures_already_is_told_how_and_only_once() {
    let mut fixture = Fixture::start();
    drop(reported(&fixture));
    eventually(|| (!fixture.client.disk(NAME).ok()?.online).then_some(()));
    let wanted = Protection { enabled: true, sync: Some(true), ..Protection::default() };
    fixture.client.put_protection(NAME, &wanted).expect("kept");
    fixture.restart();
    let mut agent = Agent::with_disk(fixture.data());
    agent.status("capturing", Lsn(2), now_ns());
    let command: wire::SetProtection = agent.expect();
    assert!(command.options.expect("told").sync);
    agent.done(command.request);
    // The next thing that it is asked is ours.
    let client = fixture.client.clone();
    let put = std::thread::spawn(move || client.set_protection(NAME, false));
    agent.status("capturing", Lsn(2), now_ns());
    assert!(!agent.expect::<wire::SetProtection>().enabled);
    drop(agent);
    let _cut_off = put.join().expect("no panic");
}

#[test]
fn values_out_of_range_are_refused_with_a_hint_and_change_nothing() {
    let fixture = Fixture::start();
    let _agent = reported(&fixture);
    let before = fixture.client.disk(NAME).expect("known").summary.protection;
    let on = || Protection { enabled: true, ..Protection::default() };
    for (wanted, hint) in [
        (Protection { policy: Some("maybe".to_owned()), ..on() }, "strict"),
        (Protection { throttle_ms: Some(0), ..on() }, "600000"),
        (Protection { ring_mib: Some(7), ..on() }, "from 8 to 16384"),
        (Protection { ring_mib: Some(u64::MAX), ..on() }, "16384"),
        (Protection { sync_timeout_ms: Some(4_000_000), ..on() }, "3600000"),
    ] {
        let refused = problem(fixture.client.put_protection(NAME, &wanted));
        assert_eq!((refused.kind, refused.status), (Kind::BadValue, 422));
        assert!(refused.hint.contains(hint), "{}", refused.hint);
    }
    assert_eq!(fixture.client.disk(NAME).expect("known").summary.protection, before);
}
