//! Bookmarks: now, at a point, and while the agent is away. Times newer than the newest record.

use cdp_api::{Kind, PointSpec};
use journal_format::{Lsn, wire};

use crate::agent::{Agent, Capture};
use crate::{Fixture, eventually, now_ns, problem};

const NAME: &str = "vm/disk0";

/// A disk that is protected and in sync up to record 3.
fn protected(fixture: &Fixture) -> (Agent, Capture) {
    let mut agent = Agent::reported(fixture.data());
    let client = fixture.client.clone();
    let put = std::thread::spawn(move || client.set_protection(NAME, true));
    let command: wire::SetProtection = agent.expect();
    let mut capture = agent.carry_out(&command, now_ns() - 3_600_000_000_000);
    put.join().expect("no panic").expect("done");
    let frame = capture.begin().write(0, &[1; 512]).frame();
    agent.ship(&frame, Lsn(3));
    (agent, capture)
}

#[test]
fn a_bookmark_set_now_is_a_record_of_the_host_and_durable_when_answered() {
    let fixture = Fixture::start();
    let (mut agent, mut capture) = protected(&fixture);
    let client = fixture.client.clone();
    let post = std::thread::spawn(move || client.create_bookmark(NAME, "before upgrade", None));
    let command: wire::InsertBookmark = agent.expect();
    assert_eq!(command.name, "before upgrade");
    let frame = capture.bookmark("before upgrade").frame();
    let (request, lsn, stamp) = (command.request, capture.last().0, capture.stamp);
    agent.send(&wire::CommandResult { request, error: String::new(), lsn, stamp });
    assert!(!post.is_finished(), "the record has not arrived");
    agent.ship(&frame, capture.last());
    let bookmark = post.join().expect("no panic").expect("set");
    assert_eq!((bookmark.lsn, bookmark.stamp_ns), (4, capture.stamp));
    assert_eq!(fixture.client.points(NAME).expect("points").bookmarks, [bookmark]);
    let again = problem(fixture.client.create_bookmark(NAME, "before upgrade", None));
    assert_eq!((again.kind, again.status), (Kind::BookmarkExists, 409));
}

#[test]
fn an_existing_point_can_be_named() {
    let mut fixture = Fixture::start();
    let (_agent, capture) = protected(&fixture);
    let bookmark = fixture.client.create_bookmark(NAME, "old", Some(&PointSpec::Lsn(2))).expect("set");
    assert_eq!((bookmark.lsn, bookmark.stamp_ns), (2, capture.stamp - 1_000_000));
    fixture.restart();
    let spec = PointSpec::Bookmark("old".to_owned());
    assert_eq!(fixture.client.resolve(NAME, &spec).expect("resolves").lsn, 2);
}

#[test]
fn without_the_agent_nobody_can_say_what_now_is_and_the_newest_point_has_a_name() {
    let fixture = Fixture::start();
    let (agent, _) = protected(&fixture);
    drop(agent);
    eventually(|| (!fixture.client.disk(NAME).ok()?.online).then_some(()));
    let refused = problem(fixture.client.create_bookmark(NAME, "end", None));
    assert_eq!(refused.kind, Kind::AgentOffline);
    assert!(refused.hint.contains("'latest'"), "{}", refused.hint);
    let latest = fixture.client.create_bookmark(NAME, "end", Some(&PointSpec::Latest)).expect("set");
    assert_eq!(latest.lsn, 3);
}

#[test]
fn a_name_that_cannot_be_is_refused() {
    let fixture = Fixture::start();
    let (_agent, _) = protected(&fixture);
    for name in [String::new(), "x".repeat(256), "line\nbreak".to_owned()] {
        assert_eq!(
            problem(fixture.client.create_bookmark(NAME, &name, None)).kind,
            Kind::BadRequest,
            "{name:?}"
        );
    }
    let missing = problem(fixture.client.resolve(NAME, &PointSpec::Bookmark("nowhere".to_owned())));
    assert_eq!((missing.kind, missing.status), (Kind::NoSuchBookmark, 404));
}

#[test]
fn a_time_after_the_newest_record_is_exact_once_the_host_says_that_nothing_is_on_its_way() {
    let fixture = Fixture::start();
    let (mut agent, mut capture) = protected(&fixture);
    let asked = now_ns();
    agent.status("capturing", Lsn(3), asked - 1);
    let client = fixture.client.clone();
    let resolve = std::thread::spawn(move || client.resolve(NAME, &PointSpec::Time { stamp_ns: asked }));
    // The host's clock passes the time asked for; until then it has captured one more record, which is under way.
    agent.status("capturing", Lsn(4), asked);
    let frame = capture.write(0, &[2; 512]).frame();
    agent.ship(&frame, Lsn(4));
    let point = resolve.join().expect("no panic").expect("resolves");
    assert_eq!((point.lsn, point.exact), (4, true));
}

#[test]
fn a_time_that_is_not_covered_gives_the_newest_point_and_says_that_it_may_not_be_all() {
    let fixture = Fixture::start();
    let (mut agent, _) = protected(&fixture);
    let asked = now_ns();
    agent.status("capturing", Lsn(9), asked);
    let point = fixture.client.resolve(NAME, &PointSpec::Time { stamp_ns: asked }).expect("resolves");
    assert_eq!((point.lsn, point.exact), (3, false));
    let journal = fixture.client.disk(NAME).expect("known").journal.expect("has one");
    assert_eq!((journal.captured_lsn, journal.durable_lsn, journal.lag_lsns), (9, 3, 6));
    assert!(journal.lag_s > 0.0);
}

#[test]
fn the_future_is_refused() {
    let fixture = Fixture::start();
    let (_agent, _) = protected(&fixture);
    let stamp_ns = now_ns() + 3_600_000_000_000;
    let refused = problem(fixture.client.resolve(NAME, &PointSpec::Time { stamp_ns }));
    assert_eq!((refused.kind, refused.before.map(|p| p.lsn)), (Kind::PointOutOfRange, Some(3)));
    let early = problem(fixture.client.resolve(NAME, &PointSpec::Time { stamp_ns: 1 }));
    assert_eq!((early.kind, early.after.map(|p| p.lsn)), (Kind::PointOutOfRange, Some(2)));
}
