//! What the server says and does when its store fails.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cdp_api::{FaultKind, Kind, VerificationState};
use journal_format::wire::{self, MessageType};
use journal_format::{DiskId, Lsn};

use crate::agent::{Agent, Capture, DISK, inventory};
use crate::{Fixture, eventually, now_ns, problem};

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
    // What is damaged the store mends; what the system cannot read it cannot.
    std::fs::remove_file(&manifest).expect("removes");
    std::fs::create_dir(&manifest).expect("makes a folder");
    fixture.start_again();

    let disk = fixture.client.disk("vm/disk0").expect("known");
    let fault = disk.summary.fault.expect("a fault");
    assert_eq!(fault.kind, FaultKind::IoError);
    assert!(fault.message.contains("manifest") && !fault.hint.is_empty(), "{fault:?}");
    assert!(disk.journal.is_none());
    let listed = fixture.client.disks().expect("lists");
    assert_eq!(listed.iter().filter(|disk| disk.fault.is_some()).count(), 1);
    let refused = problem(fixture.client.points("vm/disk0"));
    assert_eq!(refused.kind, Kind::StoreFailed);
    let health = reqwest::blocking::get(fixture.url("/healthz")).expect("answers").text().expect("text");
    assert!(health.contains("degraded"), "{health}");

    // The file is put back: the next opening finds everything.
    std::fs::remove_dir(&manifest).expect("removes");
    std::fs::write(&manifest, good).expect("writes");
    let mut agent = Agent::with_disk(fixture.data());
    agent.send(&wire::OpenDisk { disk: DISK.0.to_vec(), disk_bytes: 1 << 20, resume_epoch: 0 });
    let opened: wire::DiskOpened = agent.expect();
    assert_eq!(opened.durable_lsn, 3);
    let mut capture = Capture::new(&opened, now_ns());
    let frame = capture.begin().frame();
    agent.ship(&frame, Lsn(5));
    assert_eq!(fixture.client.disk("vm/disk0").expect("known").summary.fault, None);
}

/// Ships frames as a real agent does: what is refused is kept, the disk opened again, and sent again.
fn ship_stubbornly(agent: &mut Agent, capture: &mut Capture, frames: usize) -> u32 {
    let (mut unacked, mut refusals) = (Vec::<(u64, Vec<u8>)>::new(), 0);
    for n in 0..frames {
        let frame = capture.write((n as u64 * 4096) % (1 << 20), &[n as u8; 4096]).frame();
        agent.send_frame(&frame);
        unacked.push((capture.last().0, frame));
        while !unacked.is_empty() {
            match agent.receive().expect("the connection stays") {
                (MessageType::Ack, body) => {
                    let durable = wire::decode::<wire::Ack>(&body).expect("decodes").durable_lsn;
                    unacked.retain(|(last, _)| *last > durable);
                }
                (MessageType::Refused, _) => {
                    refusals += 1;
                    let durable = eventually(|| agent.try_open(Some(capture.epoch))).durable_lsn;
                    unacked.retain(|(last, _)| *last > durable);
                    unacked.iter().for_each(|(_, frame)| agent.send_frame(frame));
                }
                _ => {}
            }
        }
    }
    refusals
}

#[test]
fn whatever_write_or_durability_step_fails_nothing_is_lost_and_the_disk_goes_on() {
    let drills =
        ["write-error-every=37", "fsync-error-after=20", "fsync-error-after=30", "write-error-every=11"];
    for drill in drills {
        let fixture = Fixture::start_with(|config| config.drill = Some(drill.parse().expect("a drill")));
        let mut agent = Agent::with_disk(fixture.data());
        let opened = eventually(|| agent.try_open(None));
        let mut capture = Capture::new(&opened, now_ns() - 1_000_000_000);
        capture.begin();
        let refusals = ship_stubbornly(&mut agent, &mut capture, 60);
        assert!(refusals > 0, "{drill}: something failed");
        let disk = fixture.client.disk("vm/disk0").expect("known");
        assert_eq!(disk.summary.fault, None, "{drill}: it is over once frames are acknowledged");
        let last = capture.last().0;
        assert_eq!(disk.journal.expect("one").durable_lsn, last, "{drill}");
        assert_eq!(
            fixture.client.data("vm/disk0", last, 0, 1 << 20).expect("reads"),
            capture.image,
            "{drill}"
        );
        let health = reqwest::blocking::get(fixture.url("/healthz")).expect("answers").text().expect("text");
        assert!(health.contains(drill), "a drill is no secret: {health}");
    }
}

#[test]
fn a_read_that_fails_is_an_error_and_never_wrong_bytes() {
    let drill = "read-error-every=11";
    let fixture = Fixture::start_with(|config| config.drill = Some(drill.parse().expect("a drill")));
    let mut agent = Agent::with_disk(fixture.data());
    let mut capture = Capture::new(&eventually(|| agent.try_open(None)), now_ns() - 1_000_000_000);
    capture.begin();
    ship_stubbornly(&mut agent, &mut capture, 40);
    let (mut read, mut failed) = (0, 0);
    // More than the frame cache would ever ask the disk for twice, at many points.
    for lsn in 3..capture.last().0 {
        match fixture.client.data("vm/disk0", lsn, 0, 1 << 20) {
            Ok(bytes) => {
                let written = usize::try_from(lsn - 2).expect("small") * 4096;
                assert_eq!(bytes[..written], capture.image[..written], "lsn {lsn}");
                assert!(bytes[written..].iter().all(|byte| *byte == 0), "lsn {lsn}");
                read += 1;
            }
            Err(error) => {
                assert_eq!(error.problem().map(|problem| problem.kind), Some(Kind::StoreFailed), "{error}");
                failed += 1;
            }
        }
    }
    assert!(read > 0 && failed > 0, "{read} read, {failed} failed");
}

#[test]
fn a_check_finds_a_flipped_byte_and_the_disk_has_a_fault_until_it_is_whole() {
    let fixture = Fixture::start();
    let (mut agent, mut capture) = with_journal(&fixture);
    let frame = capture.write(8192, &[0xab; 4096]).frame();
    agent.ship(&frame, Lsn(4));
    assert_eq!(problem(fixture.client.verification("vm/disk0")).kind, Kind::NotFound);
    let checked = |fixture: &Fixture| {
        fixture.client.start_verification("vm/disk0").expect("begins");
        eventually(|| {
            let check = fixture.client.verification("vm/disk0").ok()?;
            (check.state == VerificationState::Done).then_some(check)
        })
    };
    let clean = checked(&fixture);
    assert_eq!((clean.damage.len(), clean.first_lsn, clean.last_lsn), (0, 1, 4));
    assert!(clean.done_bytes > 0 && clean.done_bytes == clean.total_bytes);

    let path = fixture.dir.path().join("disks").join(DISK.to_string()).join("data-000001.seg");
    let good = std::fs::read(&path).expect("reads");
    let at = good.iter().rposition(|byte| *byte == 0xab).expect("the data of the last write");
    let mut bad = good.clone();
    bad[at] ^= 1;
    std::fs::write(&path, bad).expect("writes");
    let check = checked(&fixture);
    let [part] = &check.damage[..] else { panic!("one part: {check:?}") };
    assert_eq!((part.kind.as_str(), part.first_lsn, part.last_lsn, part.loses_points), ("data", 4, 4, true));
    assert!(part.file.ends_with("data-000001.seg") && part.offset <= at as u64 && !part.hint.is_empty());
    let fault = fixture.client.disk("vm/disk0").expect("known").summary.fault.expect("a fault");
    assert_eq!(fault.kind, FaultKind::Damaged);
    let refused = problem(fixture.client.data("vm/disk0", 4, 8192, 4096));
    assert_eq!(refused.kind, Kind::Damaged);
    assert!(
        refused.detail.contains("data-000001.seg") && refused.detail.contains("LSN 4"),
        "{}",
        refused.detail
    );
    assert_eq!(
        fixture.client.data("vm/disk0", 3, 0, 4096).expect("reads"),
        vec![5; 4096],
        "the rest is readable"
    );
    // Taking frames does not make it whole; putting the file back does.
    let frame = capture.write(0, &[1; 512]).frame();
    agent.ship(&frame, Lsn(5));
    assert!(fixture.client.disk("vm/disk0").expect("known").summary.fault.is_some());
    let mut mended = std::fs::read(&path).expect("reads");
    mended[at] ^= 1;
    std::fs::write(&path, mended).expect("writes");
    assert_eq!(checked(&fixture).damage, []);
    assert_eq!(fixture.client.disk("vm/disk0").expect("known").summary.fault, None);
}

#[test]
fn an_index_that_rots_under_a_running_server_is_mended_and_said_to_have_rotted() {
    let mut fixture = Fixture::start();
    let (mut agent, mut capture) = with_journal(&fixture);
    // So many records that the segment is sealed, few of which are in its index.
    while capture.last().0 < 262_144 {
        capture.write(8192, &[capture.last().0 as u8; 512]);
        for _ in 0..16_000 {
            capture.flush();
        }
        let frame = capture.frame();
        agent.ship(&frame, capture.last());
    }
    let index = fixture.dir.path().join("disks").join(DISK.to_string()).join("index-000001.idx");
    let good = std::fs::read(&index).expect("it is sealed");
    let mut bad = good.clone();
    *bad.last_mut().expect("extents") ^= 1;
    fixture.restart_after(|_| std::fs::write(&index, &bad).expect("writes"));
    assert_eq!(fixture.client.disk("vm/disk0").expect("known").summary.fault, None, "nobody has looked");
    let read = fixture.client.data("vm/disk0", capture.last().0, 8192, 512).expect("reads");
    assert_eq!(read, capture.image[8192..8704]);
    assert_eq!(std::fs::read(&index).expect("reads"), good, "it is mended");
    let fault = eventually(|| fixture.client.disk("vm/disk0").ok()?.summary.fault);
    assert_eq!(fault.kind, FaultKind::Damaged);
    assert!(fault.message.contains("index-000001.idx"), "{}", fault.message);
    // Until a check has found everything whole.
    fixture.client.start_verification("vm/disk0").expect("begins");
    eventually(|| (fixture.client.disk("vm/disk0").ok()?.summary.fault.is_none()).then_some(()));
}

#[test]
fn a_server_that_starts_on_a_full_disk_serves_what_there_is() {
    let mut fixture = Fixture::start();
    drop(with_journal(&fixture));
    fixture.server.take().expect("runs").stop();
    fixture.start_again_with(|config| config.drill = Some("disk-full-after=0MiB".parse().expect("a drill")));
    let disk = fixture.client.disk("vm/disk0").expect("known");
    assert_eq!(disk.summary.fault.expect("a fault").kind, FaultKind::DiskFull);
    assert_eq!(disk.journal.expect("one").durable_lsn, 3);
    assert_eq!(fixture.client.data("vm/disk0", 3, 0, 4096).expect("reads"), vec![5; 4096]);
    assert_eq!(fixture.client.points("vm/disk0").expect("points").recoverable.len(), 1);
    let mut agent = Agent::with_disk(fixture.data());
    assert!(agent.try_open(None).is_none(), "nothing can be written");
    assert!(fixture.client.disk("vm/disk0").expect("known").summary.fault.is_some());
    // With room again it goes on.
    drop(agent);
    fixture.restart();
    let mut agent = Agent::with_disk(fixture.data());
    let mut capture = Capture::new(&agent.open(None), now_ns());
    let frame = capture.begin().frame();
    agent.ship(&frame, Lsn(5));
    assert_eq!(fixture.client.disk("vm/disk0").expect("known").summary.fault, None);
}

#[test]
fn while_one_disk_fails_the_others_go_on() {
    const OTHER: DiskId = DiskId([0xd2; 16]);
    let mut fixture = Fixture::start();
    drop(with_journal(&fixture));
    let manifest = fixture.dir.path().join("disks").join(DISK.to_string()).join("manifest");
    fixture.server.take().expect("runs").stop();
    std::fs::remove_file(&manifest).expect("removes");
    std::fs::create_dir(&manifest).expect("makes a folder");
    fixture.start_again();

    // One agent with both, so on one connection.
    let mut agent = Agent::connect(fixture.data());
    let mut both = inventory(DISK, "vm", "disk0");
    both.vms.extend(inventory(OTHER, "other", "disk0").vms);
    agent.send(&both);
    let mut open = |disk: DiskId| {
        agent.send(&wire::OpenDisk { disk: disk.0.to_vec(), disk_bytes: 1 << 20, resume_epoch: 0 });
        agent.expect::<wire::DiskOpened>()
    };
    assert!(open(DISK).refused.contains("manifest"));
    let opened = open(OTHER);
    assert_eq!(opened.refused, "");
    let mut capture = Capture::new(&opened, now_ns() - 1_000_000_000);
    let frame = capture.begin().write(0, &[7; 4096]).frame();
    agent.ship(&frame, Lsn(3));
    // Not even a frame of the one that fails disturbs them.
    let mut stray =
        Capture::new(&wire::DiskOpened { disk: DISK.0.to_vec(), epoch: 2, ..opened.clone() }, now_ns());
    agent.send_frame(&stray.begin().frame());
    assert_eq!(agent.expect::<wire::Refused>().disk, DISK.0);
    let frame = capture.write(4096, &[8; 4096]).frame();
    agent.ship(&frame, Lsn(4));
    assert_eq!(fixture.client.data("other/disk0", 4, 4096, 4096).expect("reads"), vec![8; 4096]);
    let faults = fixture.client.disks().expect("lists").into_iter().filter(|disk| disk.fault.is_some());
    assert_eq!(faults.map(|disk| disk.vm).collect::<Vec<_>>(), ["vm"]);
}

#[test]
fn while_the_stores_disk_hangs_the_server_answers_and_nothing_is_acknowledged() {
    let drill = "freeze-for=5s@1s";
    let fixture = Fixture::start_with(|config| config.drill = Some(drill.parse().expect("a drill")));
    let began = Instant::now();
    let (health, over) = (fixture.url("/healthz"), Arc::new(AtomicBool::new(false)));
    let stop = Arc::clone(&over);
    let answers = std::thread::spawn(move || {
        let mut answers = Vec::new();
        // ORDERING: Relaxed; the flag stands alone.
        while !stop.load(Ordering::Relaxed) {
            let text = reqwest::blocking::get(&health).expect("answers").text().expect("text");
            assert!(text.contains(drill), "a drill is no secret: {text}");
            answers.push(Instant::now());
            std::thread::sleep(Duration::from_millis(20));
        }
        answers
    });
    let mut agent = Agent::with_disk(fixture.data());
    let mut sent = Instant::now();
    let mut capture = Capture::new(&agent.open(None), now_ns() - 1_000_000_000);
    capture.begin();
    // Whatever hangs first: opening the journal, or a frame.
    let hung = loop {
        let frame = capture.write(0, &[capture.last().0 as u8; 512]).frame();
        agent.ship(&frame, capture.last());
        if sent.elapsed() >= Duration::from_secs(1) {
            break sent..Instant::now();
        }
        assert!(began.elapsed() < Duration::from_secs(60), "nothing ever hung");
        sent = Instant::now();
    };
    // ORDERING: as above.
    over.store(true, Ordering::Relaxed);
    let answers = answers.join().expect("every request is answered");
    let meanwhile = answers.iter().filter(|answer| hung.contains(answer)).count();
    assert!(meanwhile > 0, "no answer while the disk hung");
    let disk = fixture.client.disk("vm/disk0").expect("known");
    assert_eq!((disk.summary.fault, disk.journal.expect("one").durable_lsn), (None, capture.last().0));
}

#[test]
fn a_spool_of_the_host_that_fails_is_a_fault_of_the_disk_until_it_works() {
    let fixture = Fixture::start();
    let (mut agent, _) = with_journal(&fixture);
    let epoch = agent.epoch;
    let status = |trouble: &str| wire::DiskStatus {
        disk: DISK.0.to_vec(),
        epoch,
        mode: "capturing".to_owned(),
        captured_lsn: 3,
        host_stamp: now_ns(),
        spool_used_bytes: 123_456,
        spool_bytes: 64 << 20,
        spool_trouble: trouble.to_owned(),
        ..wire::DiskStatus::default()
    };
    agent.send(&status("cannot write to /spool: no space"));
    let disk =
        eventually(|| fixture.client.disk("vm/disk0").ok().filter(|disk| disk.summary.fault.is_some()));
    let fault = disk.summary.fault.expect("it has one");
    assert_eq!(fault.kind, FaultKind::SpoolFailing);
    assert!(fault.message.contains("/spool: no space") && fault.hint.contains("--spool-dir"), "{fault:?}");
    let journal = disk.journal.expect("its journal works");
    assert_eq!(
        (journal.spool_used_bytes, journal.spool_bytes, journal.spool_failing),
        (123_456, 64 << 20, true)
    );
    assert!(fixture.client.points("vm/disk0").is_ok(), "its history is whole");
    let metrics = || reqwest::blocking::get(fixture.url("/metrics")).expect("answers").text().expect("text");
    let has = |text: &str, name: &str, value: &str| {
        text.lines()
            .any(|line| line.starts_with(&format!("{name}{{")) && line.ends_with(&format!(" {value}")))
    };
    let text = metrics();
    for (name, value) in [
        ("cdp_spool_used_bytes", "123456.0"),
        ("cdp_spool_bytes", "67108864.0"),
        ("cdp_spool_failing", "1.0"),
        ("cdp_fault", "1.0"),
    ] {
        assert!(has(&text, name, value), "{name} {value}: {text}");
    }
    // It has failed since it began to.
    agent.send(&status("cannot write to /spool: still"));
    eventually(|| {
        let fault = fixture.client.disk("vm/disk0").ok()?.summary.fault?;
        fault.message.contains("still").then_some(fault.since)
    });
    let since = fixture.client.disk("vm/disk0").expect("known").summary.fault.expect("still").since;
    assert_eq!(since, fault.since);
    agent.send(&status(""));
    eventually(|| fixture.client.disk("vm/disk0").ok()?.summary.fault.is_none().then_some(()));
    assert!(has(&metrics(), "cdp_spool_failing", "0.0"));
}
