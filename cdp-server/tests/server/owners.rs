//! One owner for each disk: what two hosts that claim the same one experience.

use std::time::Duration;

use cdp_api::Conflict;
use cdp_server::limits::Patience;
use journal_format::wire::{self, MESSAGE_HEADER_BYTES, MessageHeader, MessageType};
use journal_format::{DiskId, Epoch, Lsn};

use crate::agent::{Agent, Capture, DISK, DISK_BYTES, hello, inventory};
use crate::{Fixture, eventually, now_ns};

/// An agent of another host than [`Agent::connect`]'s.
fn second_host(fixture: &Fixture) -> Agent {
    let mut agent = Agent::raw(fixture.data());
    let hello = wire::Hello { host_id: vec![2; 16], host_name: "host2".to_owned(), ..hello() };
    assert_eq!(agent.hello(&hello).refused, "");
    agent
}

/// The answer to an open of [`DISK`].
fn ask(agent: &mut Agent, resume: u64) -> wire::DiskOpened {
    agent.send(&wire::OpenDisk { disk: DISK.0.to_vec(), disk_bytes: DISK_BYTES, resume_epoch: resume });
    agent.expect()
}

/// Opens [`DISK`] as often as it takes.
fn open_in_the_end(agent: &mut Agent) -> wire::DiskOpened {
    eventually(|| {
        agent.send(&wire::Ping::default());
        assert_eq!(agent.receive().expect("open").0, MessageType::Pong);
        let opened = ask(agent, 0);
        opened.refused.is_empty().then_some(opened)
    })
}

fn conflicts(fixture: &Fixture) -> Vec<Conflict> {
    fixture.client.disk(&DISK.to_string()).expect("known").summary.conflicts
}

fn close() -> wire::CloseDisk {
    wire::CloseDisk { disk: DISK.0.to_vec(), ended: 0 }
}

#[test]
fn a_clone_is_refused_the_disk_and_shown_and_gets_it_when_it_is_given_up() {
    let fixture = Fixture::start();
    let mut owner = Agent::with_disk(fixture.data());
    let mut capture = Capture::new(&owner.open(None), now_ns() - 1_000_000_000);
    let frame = capture.begin().frame();
    owner.ship(&frame, Lsn(2));
    assert_eq!(conflicts(&fixture), []);

    let mut clone = second_host(&fixture);
    clone.send(&inventory(DISK, "clone", "disk0"));
    let refused = ask(&mut clone, 0);
    assert!(refused.refused.contains("host1") && refused.refused.contains("own UUID"), "{refused:?}");
    assert_eq!(refused.epoch, 1, "the owner's");
    let shown = eventually(|| conflicts(&fixture).pop().filter(|other| other.reason.contains("host1 (")));
    assert_eq!((shown.host.as_str(), shown.vm.as_str(), shown.vm_pid), ("host2", "clone", 77));
    assert_eq!(fixture.client.disk("vm/disk0").expect("its name is the owner's").summary.host, "host1");

    let frame = capture.write(0, &[1; 512]).frame();
    owner.ship(&frame, Lsn(3));
    let other = DiskId([0xd2; 16]);
    clone.send(&wire::OpenDisk { disk: other.0.to_vec(), disk_bytes: DISK_BYTES, resume_epoch: 0 });
    assert_eq!(clone.expect::<wire::DiskOpened>().refused, "", "its other disks go on");

    owner.send(&close());
    let opened = eventually(|| Some(ask(&mut clone, 0)).filter(|opened| opened.refused.is_empty()));
    assert_eq!((opened.epoch, opened.durable_lsn), (2, 3));
    let frame = capture.write(0, &[2; 512]).frame();
    owner.send_frame(&frame);
    let told: wire::Refused = owner.expect();
    assert!(told.message.contains("not opened"), "{told:?}");
    let mut second = Capture::new(&opened, capture.stamp);
    let frame = second.begin().write(0, &[3; 512]).frame();
    clone.ship(&frame, Lsn(6));
    eventually(|| (conflicts(&fixture).first()?.host == "host1").then_some(()));
    owner.send(&wire::Inventory::default());
    eventually(|| conflicts(&fixture).is_empty().then_some(()));
    eventually(|| fixture.client.disk("clone/disk0").ok().filter(|disk| disk.summary.host == "host2"));
}

#[test]
fn a_wish_reaches_the_clone_again_and_again_until_it_gets_the_disk() {
    let fixture = Fixture::start();
    let mut owner = Agent::with_disk(fixture.data());
    owner.open(None);
    let mut clone = second_host(&fixture);
    clone.send(&inventory(DISK, "clone", "disk0"));
    // Who captures a disk of which nothing is known wants it protected; this one is known, so it must be said.
    let client = fixture.client.clone();
    let put = std::thread::spawn(move || client.set_protection(&DISK.to_string(), true));
    let command: wire::SetProtection = owner.expect();
    owner.done(command.request);
    put.join().expect("no panic").expect("done");
    for _ in 0..2 {
        let command: wire::SetProtection = clone.expect();
        let refused = ask(&mut clone, 0).refused;
        assert!(!refused.is_empty());
        clone.send(&wire::CommandResult {
            request: command.request,
            error: refused,
            ..wire::CommandResult::default()
        });
    }
    owner.send(&close());
    let _again: wire::SetProtection = clone.expect();
    assert_eq!(clone.open(None).epoch, 2);
}

#[test]
fn an_agent_that_comes_back_finds_its_disk_its_own() {
    let fixture = Fixture::start();
    let mut owner = Agent::with_disk(fixture.data());
    let mut capture = Capture::new(&owner.open(None), now_ns() - 1_000_000_000);
    let frame = capture.begin().frame();
    owner.ship(&frame, Lsn(2));
    drop(owner);
    let mut clone = second_host(&fixture);
    clone.send(&inventory(DISK, "clone", "disk0"));
    let refused = eventually(|| {
        // The end of the owner's connection may not have been noticed yet.
        Some(ask(&mut clone, 0).refused).filter(|refused| refused.contains("not connected"))
    });
    assert!(refused.contains("45 s"), "{refused}");
    let mut back = Agent::with_disk(fixture.data());
    assert_eq!(back.open(Some(Epoch(1))).epoch, 1);
    let frame = capture.write(0, &[1; 512]).frame();
    back.ship(&frame, Lsn(3));
}

#[test]
fn a_server_that_is_started_anew_knows_whose_the_disk_is() {
    let mut fixture = Fixture::start();
    let mut owner = Agent::with_disk(fixture.data());
    owner.open(None);
    fixture.restart();
    let mut clone = second_host(&fixture);
    clone.send(&inventory(DISK, "clone", "disk0"));
    assert!(ask(&mut clone, 0).refused.contains("host1"));
    let mut owner = Agent::with_disk(fixture.data());
    assert_eq!(owner.open(Some(Epoch(1))).epoch, 1);
}

/// A host that burns down leaves a connection on which nothing comes any more, often in the middle of a frame.
#[test]
fn an_owner_that_fell_silent_loses_the_disk_also_within_a_message() {
    for within in [false, true] {
        let patience = Patience { idle: Duration::from_secs(3), ..Patience::DEFAULT };
        let fixture = Fixture::start_with(|config| config.patience = patience);
        let mut owner = Agent::with_disk(fixture.data());
        let mut capture = Capture::new(&owner.open(None), now_ns() - 1_000_000_000);
        let mut clone = second_host(&fixture);
        assert!(!ask(&mut clone, 0).refused.is_empty());
        if within {
            let frame = capture.begin().write(0, &[1; 512]).frame();
            let header = MessageHeader::new(MessageType::Frame, frame.len()).expect("fits");
            let message = [zerocopy::IntoBytes::as_bytes(&header), &frame].concat();
            owner.send_bytes(&message[..MESSAGE_HEADER_BYTES + frame.len() / 2]);
        }
        assert_eq!(open_in_the_end(&mut clone).epoch, 2);
        owner.expect_closed();
    }
}
