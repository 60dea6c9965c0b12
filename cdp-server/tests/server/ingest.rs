//! Frames in, acknowledgements out, history back.

use cdp_api::{ExtentKind, Kind, PointKind, PointSpec};
use journal_format::{Epoch, GapReason, Lsn, wire};

use crate::agent::{Agent, Capture, DISK, DISK_BYTES};
use crate::{Fixture, eventually, now_ns, problem};

const NAME: &str = "vm/disk0";

fn read(fixture: &Fixture, lsn: u64) -> Vec<u8> {
    fixture.client.data(NAME, lsn, 0, DISK_BYTES).expect("reads")
}

#[test]
fn what_is_acknowledged_can_be_read_back_at_every_point() {
    let fixture = Fixture::start();
    let mut agent = Agent::with_disk(fixture.data());
    let opened = agent.open(None);
    assert_eq!((opened.epoch, opened.durable_lsn), (1, 0));
    let mut capture = Capture::new(&opened, now_ns() - 1_000_000_000);
    let frame = capture.begin().write(4096, &[1; 4096]).frame();
    agent.ship(&frame, Lsn(3));
    let first = capture.image.clone();
    let frame = capture.write(6000, &[2; 100]).flush().frame();
    agent.ship(&frame, Lsn(5));

    let points = fixture.client.points(NAME).expect("points");
    assert_eq!(points.disk, DISK.to_string());
    assert_eq!(points.recoverable.iter().map(|r| (r.from_lsn, r.to_lsn)).collect::<Vec<_>>(), [(2, 5)]);
    assert_eq!(points.newest.map(|p| (p.lsn, p.kind)), Some((5, PointKind::Flush)));
    assert_eq!(read(&fixture, 3), first);
    assert_eq!(read(&fixture, 5), capture.image);

    let extents = fixture.client.extents(NAME, 5, 0, DISK_BYTES).expect("extents");
    assert_eq!((extents.disk_bytes, extents.next_offset), (DISK_BYTES, None));
    let none = fixture.client.extents(NAME, 5, 0, 0).expect("extents");
    assert_eq!((none.disk_bytes, none.extents.len(), none.next_offset), (DISK_BYTES, 0, None));
    let past = fixture.client.extents(NAME, 5, 4096, u64::MAX).expect("extents");
    assert_eq!(past.extents.last().map(|e| e.offset + e.length), Some(DISK_BYTES));
    let covered: u64 = extents.extents.iter().map(|e| e.length).sum();
    let data: u64 = extents.extents.iter().filter(|e| e.kind == ExtentKind::Data).map(|e| e.length).sum();
    assert_eq!((covered, data), (DISK_BYTES, 4096));
}

#[test]
fn a_time_resolves_to_the_newest_record_not_later() {
    let fixture = Fixture::start();
    let mut agent = Agent::with_disk(fixture.data());
    let mut capture = Capture::new(&agent.open(None), now_ns() - 10_000_000_000);
    let frame = capture.begin().write(0, &[1; 512]).write(0, &[2; 512]).frame();
    let stamp_of_4 = capture.stamp;
    agent.ship(&frame, Lsn(4));
    let resolve = |stamp_ns| fixture.client.resolve(NAME, &PointSpec::Time { stamp_ns }).expect("resolves");
    assert_eq!(resolve(stamp_of_4).lsn, 4);
    let before = resolve(stamp_of_4 - 1);
    assert_eq!((before.lsn, before.stamp_ns, before.exact), (3, stamp_of_4 - 1_000_000, true));
}

#[test]
fn everything_is_there_again_after_a_restart() {
    let mut fixture = Fixture::start();
    let mut agent = Agent::with_disk(fixture.data());
    let mut capture = Capture::new(&agent.open(None), now_ns() - 1_000_000_000);
    let frame = capture.begin().write(0, &[7; 4096]).bookmark("before").write(0, &[8; 4096]).frame();
    agent.ship(&frame, Lsn(5));
    let points = fixture.client.points(NAME).expect("points");
    fixture.restart();
    assert_eq!(fixture.client.points(NAME).expect("points"), points);
    assert_eq!(read(&fixture, 5), capture.image);
    let bookmark = PointSpec::Bookmark("before".to_owned());
    assert_eq!(fixture.client.resolve(NAME, &bookmark).expect("resolves").lsn, 4);
}

#[test]
fn an_agent_that_comes_back_goes_on_where_the_journal_ends() {
    let mut fixture = Fixture::start();
    let mut agent = Agent::with_disk(fixture.data());
    let mut capture = Capture::new(&agent.open(None), now_ns() - 1_000_000_000);
    let first = capture.begin().write(0, &[1; 512]).frame();
    agent.ship(&first, Lsn(3));
    fixture.restart();
    let mut agent = Agent::with_disk(fixture.data());
    let opened = agent.open(Some(capture.epoch));
    assert_eq!((opened.epoch, opened.durable_lsn), (1, 3));
    // The acknowledgement may have been lost: it sends the old frame again, and is told again that it is durable.
    agent.ship(&first, Lsn(3));
    let next = capture.write(512, &[2; 512]).frame();
    agent.ship(&next, Lsn(4));
    assert_eq!(read(&fixture, 4), capture.image);
}

#[test]
fn a_new_epoch_begins_with_a_gap_and_a_number_of_its_own() {
    let fixture = Fixture::start();
    let mut agent = Agent::with_disk(fixture.data());
    let mut capture = Capture::new(&agent.open(None), now_ns() - 5_000_000_000);
    let frame = capture.begin().write(0, &[1; 512]).frame();
    agent.ship(&frame, Lsn(3));
    let opened = agent.open(None);
    assert_eq!((opened.epoch, opened.durable_lsn, opened.durable_stamp), (2, 3, capture.stamp));
    let mut capture = Capture::new(&opened, capture.stamp);
    let frame = capture.gap_begin(GapReason::Attach, 1).write(0, &[2; 512]).gap_end(1).frame();
    agent.ship(&frame, Lsn(6));
    let points = fixture.client.points(NAME).expect("points");
    assert_eq!(
        points.recoverable.iter().map(|r| (r.from_lsn, r.to_lsn)).collect::<Vec<_>>(),
        [(2, 3), (6, 6)]
    );

    let refused = problem(fixture.client.resolve(NAME, &PointSpec::Lsn(5)));
    assert_eq!((refused.kind, refused.status), (Kind::PointInGap, 409));
    assert_eq!((refused.before.map(|p| p.lsn), refused.after.map(|p| p.lsn)), (Some(3), Some(6)));
    assert_eq!(problem(fixture.client.data(NAME, 5, 0, 512)).kind, Kind::PointInGap);
}

#[test]
fn an_epoch_that_was_overtaken_is_not_resumed() {
    let fixture = Fixture::start();
    let mut agent = Agent::with_disk(fixture.data());
    let first = agent.open(None);
    let second = agent.open(None);
    assert_ne!(first.epoch, second.epoch, "frames of the first may still be under way");
    let resumed = agent.open(Some(Epoch(first.epoch)));
    assert!(resumed.epoch > second.epoch, "the agent is told to begin a new one");
}

#[test]
fn a_frame_that_leaves_a_hole_is_refused_and_the_disk_can_be_opened_again() {
    let fixture = Fixture::start();
    let mut agent = Agent::with_disk(fixture.data());
    let mut capture = Capture::new(&agent.open(None), now_ns() - 1_000_000_000);
    let frame = capture.begin().frame();
    agent.ship(&frame, Lsn(2));
    let lost = capture.write(0, &[1; 512]).frame();
    let early = capture.write(512, &[2; 512]).frame();
    agent.send_frame(&early);
    let refused: wire::Refused = agent.expect();
    assert!(refused.retry_ms > 0 && !refused.message.is_empty());
    assert_eq!(agent.open(Some(capture.epoch)).durable_lsn, 2);
    agent.ship(&lost, Lsn(3));
    agent.ship(&early, Lsn(4));
    assert_eq!(read(&fixture, 4), capture.image);
}

#[test]
fn a_frame_of_a_disk_that_is_not_open_is_refused() {
    let fixture = Fixture::start();
    let mut opener = Agent::with_disk(fixture.data());
    let mut capture = Capture::new(&opener.open(None), now_ns() - 1_000_000_000);
    let frame = capture.begin().frame();
    let mut stranger = Agent::connect(fixture.data());
    stranger.send_frame(&frame);
    assert!(stranger.expect::<wire::Refused>().message.contains("open"));
    opener.ship(&frame, Lsn(2));
}

#[test]
fn the_newer_connection_gets_the_disk_and_the_older_is_closed() {
    let fixture = Fixture::start();
    let mut older = Agent::with_disk(fixture.data());
    let mut capture = Capture::new(&older.open(None), now_ns() - 1_000_000_000);
    let frame = capture.begin().write(0, &[1; 512]).frame();
    older.send_frame(&frame);
    let mut newer = Agent::with_disk(fixture.data());
    eventually(|| (fixture.client.points(NAME).ok()?.newest?.lsn == 3).then_some(()));
    let opened = newer.open(Some(capture.epoch));
    assert_eq!(opened.durable_lsn, 3, "what the older one had sent counts");
    older.expect_closed();
    let frame = capture.write(0, &[2; 512]).frame();
    newer.ship(&frame, Lsn(4));
}

#[test]
fn a_lost_catalog_gives_the_disks_back_by_their_ids() {
    let mut fixture = Fixture::start();
    let mut agent = Agent::with_disk(fixture.data());
    let mut capture = Capture::new(&agent.open(None), now_ns() - 1_000_000_000);
    let frame = capture.begin().write(0, &[9; 512]).frame();
    agent.ship(&frame, Lsn(3));
    fixture.server.take().expect("runs").stop();
    for file in ["catalog.sqlite3", "catalog.sqlite3-wal", "catalog.sqlite3-shm"] {
        let _ = std::fs::remove_file(fixture.dir.path().join(file));
    }
    let server =
        cdp_server::Server::start(cdp_server::Config::on_free_ports(fixture.dir.path())).expect("starts");
    fixture.client = crate::client(&server);
    fixture.server = Some(server);
    let disks = fixture.client.disks().expect("lists");
    assert_eq!(
        disks.iter().map(|d| (d.id.clone(), d.disk_bytes)).collect::<Vec<_>>(),
        [(DISK.to_string(), DISK_BYTES)]
    );
    assert_eq!(fixture.client.data(&DISK.to_string(), 3, 0, DISK_BYTES).expect("reads"), capture.image);
    // The agent still captures: so somebody wanted it, and protection must not be switched off.
    let mut agent = Agent::with_disk(fixture.data());
    agent.open(Some(capture.epoch));
    assert!(fixture.client.disk(NAME).expect("known").summary.protection.enabled);
}

#[test]
fn whose_disk_it_is_stands_in_the_store_for_offline_restores() {
    let fixture = Fixture::start();
    let mut agent = Agent::with_disk(fixture.data());
    agent.open(None);
    let path = fixture.dir.path().join("disks").join(DISK.to_string()).join("name.json");
    let text = eventually(|| std::fs::read_to_string(&path).ok());
    let name: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(
        (name["vm"].as_str(), name["device"].as_str(), name["host"].as_str()),
        (Some("vm"), Some("disk0"), Some("host1"))
    );
}

#[test]
fn extents_come_in_pages_that_fit_together() {
    let fixture = Fixture::start();
    let mut agent = Agent::with_disk(fixture.data());
    let mut capture = Capture::new(&agent.open(None), now_ns() - 60_000_000_000);
    capture.begin();
    for block in 0..12_000 {
        capture.write(block * 64, &[1]);
    }
    let (frame, last) = (capture.frame(), capture.last());
    agent.ship(&frame, last);
    let (mut offset, mut pages, mut data) = (0, 0, 0);
    loop {
        let page = fixture.client.extents(NAME, last.0, offset, DISK_BYTES - offset).expect("extents");
        for extent in &page.extents {
            assert_eq!(extent.offset, offset, "no hole, no overlap");
            offset += extent.length;
            data += u64::from(extent.kind == ExtentKind::Data) * extent.length;
        }
        pages += 1;
        match page.next_offset {
            Some(next) => assert_eq!(next, offset),
            None => break,
        }
    }
    assert!(pages > 1);
    assert_eq!((offset, data), (DISK_BYTES, 12_000));
}
