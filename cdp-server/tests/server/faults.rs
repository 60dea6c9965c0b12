//! What the server says and does when its store fails.

use cdp_api::{FaultKind, Kind};
use journal_format::Lsn;

use crate::agent::{Agent, Capture, DISK};
use crate::{Fixture, now_ns, problem};

/// A disk with three records.
fn with_journal(fixture: &Fixture) -> (Agent, Capture) {
    let mut agent = Agent::with_disk(fixture.data());
    let mut capture = Capture::new(&agent.open(None), now_ns() - 1_000_000_000);
    let frame = capture.begin().write(0, &[5; 4096]).frame();
    agent.ship(&frame, Lsn(3));
    (agent, capture)
}

#[test]
fn a_disk_whose_journal_cannot_be_opened_is_listed_with_the_reason() {
    let mut fixture = Fixture::start();
    drop(with_journal(&fixture));
    let manifest = fixture.dir.path().join("disks").join(DISK.to_string()).join("manifest");
    fixture.server.take().expect("runs").stop();
    let good = std::fs::read(&manifest).expect("reads");
    let mut bad = good.clone();
    bad[20] ^= 1;
    std::fs::write(&manifest, bad).expect("writes");
    fixture.start_again();

    let disk = fixture.client.disk("vm/disk0").expect("known");
    let fault = disk.summary.fault.expect("a fault");
    assert_eq!(fault.kind, FaultKind::Damaged);
    assert!(fault.message.contains("manifest") && !fault.hint.is_empty(), "{fault:?}");
    assert!(disk.journal.is_none());
    let listed = fixture.client.disks().expect("lists");
    assert_eq!(listed.iter().filter(|disk| disk.fault.is_some()).count(), 1);
    let refused = problem(fixture.client.points("vm/disk0"));
    assert_eq!(refused.kind, Kind::Damaged);
    let health = reqwest::blocking::get(fixture.url("/healthz")).expect("answers").text().expect("text");
    assert!(health.contains("degraded"), "{health}");

    // The file is put back: the next opening finds everything.
    std::fs::write(&manifest, good).expect("writes");
    let mut agent = Agent::with_disk(fixture.data());
    agent.send(&journal_format::wire::OpenDisk {
        disk: DISK.0.to_vec(),
        disk_bytes: 1 << 20,
        resume_epoch: 0,
    });
    assert_eq!(agent.expect::<journal_format::wire::DiskOpened>().durable_lsn, 3);
    assert_eq!(fixture.client.disk("vm/disk0").expect("known").summary.fault, None);
}
