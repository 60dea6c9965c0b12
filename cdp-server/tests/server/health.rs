//! What `/healthz` says, and with which status code.

use cdp_api::ProtectionPhase;
use journal_format::{Lsn, wire};
use reqwest::StatusCode;
use serde_json::Value;

use crate::agent::{Agent, DISK, inventory};
use crate::{Fixture, eventually, now_ns};

const NAME: &str = "vm/disk0";

fn health(fixture: &Fixture) -> (StatusCode, Value) {
    let answer = reqwest::blocking::get(fixture.url("/healthz")).expect("answers");
    (answer.status(), answer.json().expect("JSON"))
}

/// Waits for a status with so many disks offline and unprotected. Nothing that hosts and VMs do is a failure of the server.
fn wait_for(fixture: &Fixture, status: &str, offline: u64, unprotected: u64) {
    eventually(|| {
        let (code, health) = health(fixture);
        assert_eq!((code, &health["catalog"]), (StatusCode::OK, &Value::Null), "{health}");
        let counts = (health["offline"].as_u64()?, health["unprotected"].as_u64()?);
        (health["status"] == status && counts == (offline, unprotected)).then_some(())
    });
}

#[test]
fn what_should_be_protected_and_is_not_is_degraded_and_a_vm_that_does_not_run_is_not() {
    let fixture = Fixture::start();
    let mut agent = Agent::reported(fixture.data());
    wait_for(&fixture, "ok", 0, 0);
    let client = fixture.client.clone();
    let put = std::thread::spawn(move || client.set_protection(NAME, true));
    let command: wire::SetProtection = agent.expect();
    wait_for(&fixture, "degraded", 0, 1);
    let mut capture = agent.carry_out(&command, now_ns() - 1_000_000_000);
    put.join().expect("no panic").expect("done");
    agent.synced(&mut capture);
    wait_for(&fixture, "ok", 0, 0);
    agent.status("tracking", Lsn(2), now_ns());
    wait_for(&fixture, "degraded", 0, 1);
    // The VM goes on under another device, which is another disk.
    let mut other = DISK;
    other.0[0] ^= 1;
    agent.send(&inventory(other, "vm", "disk1"));
    eventually(|| {
        (fixture.client.disk(NAME).ok()?.summary.protection.phase == ProtectionPhase::Offline).then_some(())
    });
    wait_for(&fixture, "degraded", 0, 1);
    agent.send(&wire::Inventory::default());
    wait_for(&fixture, "ok", 0, 0);
    drop(agent);
    wait_for(&fixture, "degraded", 1, 0);
}

#[test]
fn a_catalog_that_cannot_be_used_is_a_failure_until_it_can_be() {
    let fixture = Fixture::start();
    assert_eq!(health(&fixture).0, StatusCode::OK);
    let catalog = rusqlite::Connection::open(fixture.dir.path().join("catalog.sqlite3")).expect("opens");
    catalog.execute_batch("ALTER TABLE disks RENAME TO gone").expect("renames");
    let (code, said) = health(&fixture);
    assert_eq!((code, &said["status"]), (StatusCode::SERVICE_UNAVAILABLE, &"failing".into()), "{said}");
    assert!(said["catalog"].as_str().is_some_and(|why| why.contains("disks")), "{said}");
    catalog.execute_batch("ALTER TABLE gone RENAME TO disks").expect("renames");
    let (code, said) = health(&fixture);
    assert_eq!((code, &said["status"]), (StatusCode::OK, &"ok".into()), "{said}");
}
