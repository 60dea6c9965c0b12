//! What the plane promises.

use std::path::Path;
use std::sync::Arc;

use journal_format::frame::{FrameMeta, encode_head};
use journal_format::{Codec, GapReason, ImageTag, Lsn, Op, Record, Stamp};
use journal_store::StoreConfig;
use journal_store::io::MemStorage;

use super::*;

const DISK: DiskId = DiskId([7; 16]);
const FIRST: SessionId = SessionId(1);
const SECOND: SessionId = SessionId(2);

fn frame_at(epoch: u64, lsn: u64) -> CheckedFrame {
    frame_of(epoch, lsn, begin())
}

fn frame_of(epoch: u64, lsn: u64, op: Op) -> CheckedFrame {
    let meta = FrameMeta {
        disk: DISK,
        epoch: Epoch(epoch),
        first_lsn: Lsn(lsn),
        disk_bytes: 1 << 20,
        codec: Codec::Raw,
        raw_bytes: 0,
    };
    let record = Record { lsn: Lsn(lsn), stamp: Stamp(lsn), op };
    CheckedFrame::parse(encode_head(&meta, &[record], &[]).expect("a frame")).expect("a frame")
}

fn begin() -> Op {
    Op::GapBegin { reason: GapReason::Attach, generation: 1 }
}

const HEARD_JUST_NOW: Request = Request::Gone(Duration::ZERO);
const KEEP: Duration = Duration::from_secs(45);

/// The disk, opened for host 1.
fn open(resume_epoch: u64) -> Request {
    open_for(1, resume_epoch)
}

fn open_for(host: u8, resume_epoch: u64) -> Request {
    let host = Host { id: HostId([host; 16]), name: format!("host{host}") };
    Request::Open(host, OpenDisk { disk: DISK.0.to_vec(), disk_bytes: 1 << 20, resume_epoch })
}

/// An open that fails: there is no disk that large.
fn open_too_large() -> Request {
    match open(1) {
        Request::Open(host, open) => Request::Open(host, OpenDisk { disk_bytes: u64::MAX, ..open }),
        other => other,
    }
}

fn close() -> Request {
    Request::Close(CloseDisk { disk: DISK.0.to_vec(), ended: 0 })
}

struct World {
    store: Store,
    catalog: Catalog,
    plane: Plane,
    now: Duration,
}

impl World {
    fn new() -> Self {
        let storage = Arc::new(MemStorage::new());
        let store = Store::open_with("/store", storage, StoreConfig::default()).expect("a store");
        let catalog = Catalog::open(Path::new(":memory:")).expect("a catalog");
        Self { store, catalog, plane: Plane::new(KEEP), now: KEEP }
    }

    fn ask(&mut self, session: SessionId, request: Request) -> Vec<Effect> {
        let on = Backing { store: &self.store, catalog: &self.catalog };
        self.plane.handle(on, self.now, session, &request);
        self.plane.take_effects()
    }

    /// Opens the disk and gives its epoch; `Err` has the refusal, and the epoch of who holds the disk.
    fn try_open(&mut self, session: SessionId, request: Request) -> Result<u64, (u64, String)> {
        let effects = self.ask(session, request);
        let answer = effects.into_iter().find_map(|effect| match effect {
            Effect::Send(to, Reply::Opened(opened)) if to == session => Some(opened),
            _ => None,
        });
        let opened = answer.expect("an answer");
        if opened.refused.is_empty() { Ok(opened.epoch) } else { Err((opened.epoch, opened.refused)) }
    }

    /// The server's process dies and another one starts, on the same store and catalog.
    fn restart(&mut self) {
        (self.plane, self.now) = (Plane::new(KEEP), Duration::ZERO);
    }

    fn durable(&self) -> u64 {
        self.store.disk(DISK).expect("opened").durable_lsn().0
    }

    fn commit(&mut self) -> Vec<Effect> {
        self.plane.commit(Backing { store: &self.store, catalog: &self.catalog });
        self.plane.take_effects()
    }
}

/// Why the epoch of the answer begins with a gap.
fn begins(effects: &[Effect]) -> Option<GapReason> {
    let opened = effects.iter().find_map(|effect| match effect {
        Effect::Send(_, Reply::Opened(opened)) => Some(opened),
        _ => None,
    });
    wire::gap_reason(opened.expect("an answer").begins)
}

fn acks(effects: &[Effect]) -> Vec<(SessionId, u64)> {
    let ack = |effect: &Effect| match effect {
        Effect::Send(session, Reply::Ack(ack)) => Some((*session, ack.durable_lsn)),
        _ => None,
    };
    effects.iter().filter_map(ack).collect()
}

#[test]
fn a_frame_is_acknowledged_by_the_commit_and_not_before() {
    let mut world = World::new();
    world.ask(FIRST, open(0));
    let effects = world.ask(FIRST, Request::Frame(frame_at(1, 1)));
    assert!(matches!(effects[..], [Effect::Appended(_)]), "{effects:?}");
    assert_eq!(acks(&world.commit()), [(FIRST, 1)]);
    assert_eq!(acks(&world.commit()), [], "nothing new");
}

#[test]
fn an_agent_hears_why_its_epoch_begins_with_a_gap() {
    let mut world = World::new();
    assert_eq!(begins(&world.ask(FIRST, open(0))), Some(GapReason::Attach), "the journal is empty");
    world.ask(FIRST, Request::Frame(frame_at(1, 1)));
    assert_eq!(begins(&world.ask(FIRST, open(1))), None, "it goes on");
    assert_eq!(begins(&world.ask(FIRST, open(0))), Some(GapReason::UncleanEnd));
    world.ask(FIRST, Request::Frame(frame_at(2, 2)));
    let ended = GapReason::FilterFault as u32;
    world.ask(FIRST, Request::Close(CloseDisk { disk: DISK.0.to_vec(), ended }));
    assert_eq!(begins(&world.ask(SECOND, open_for(2, 0))), Some(GapReason::FilterFault), "any host hears it");
    world.ask(SECOND, Request::Frame(frame_at(3, 3)));
    world.ask(SECOND, Request::Frame(frame_of(3, 4, Op::Close { image: ImageTag([1; 16]) })));
    assert_eq!(begins(&world.ask(SECOND, open_for(2, 0))), Some(GapReason::Attach), "it was closed in order");
}

#[test]
fn an_older_session_of_the_host_is_closed_and_nothing_of_it_is_taken_any_more() {
    let mut world = World::new();
    world.ask(FIRST, open(0));
    world.ask(FIRST, Request::Frame(frame_at(1, 1)));
    let effects = world.ask(SECOND, open(0));
    assert_eq!(acks(&effects), [(FIRST, 1)], "what came before is committed before the answer");
    assert!(effects.iter().any(|effect| matches!(effect, Effect::Close(FIRST, _))));
    let opened = |effect: &Effect| matches!(effect, Effect::Send(SECOND, Reply::Opened(opened)) if opened.durable_lsn == 1);
    assert!(effects.iter().any(opened));
    assert!(world.ask(FIRST, Request::Frame(frame_at(1, 2))).is_empty());
    assert!(world.ask(FIRST, open(1)).is_empty(), "it does not get the disk back");
    world.commit();
    assert_eq!(world.store.disk(DISK).map(|disk| disk.durable_lsn()), Some(Lsn(1)));
    world.ask(FIRST, HEARD_JUST_NOW);
    assert!(world.plane.closing.is_empty());
}

/// An `OpenDisk` of an agent that was killed lay in its socket while its successor opened the disk. It took the disk over:
/// the successor's connection was closed, and what it had sent and got no acknowledgement for ended in a gap.
#[test]
fn an_open_of_an_older_session_that_comes_late_takes_nothing_over() {
    let mut world = World::new();
    world.ask(SECOND, open(0));
    let effects = world.ask(FIRST, open(0));
    assert!(matches!(effects[..], [Effect::Close(FIRST, _)]), "{effects:?}");
    world.ask(SECOND, Request::Frame(frame_at(1, 1)));
    assert_eq!(acks(&world.commit()), [(SECOND, 1)], "the newer one goes on with its epoch");

    // Nor when its successor is not connected just then, or its open failed.
    let mut world = World::new();
    assert_eq!(world.try_open(SECOND, open(0)), Ok(1));
    world.ask(SECOND, HEARD_JUST_NOW);
    let effects = world.ask(FIRST, open(0));
    assert!(matches!(effects[..], [Effect::Close(FIRST, _)]), "{effects:?}");
    assert_eq!(world.try_open(SessionId(3), open(1)), Ok(1), "the epoch is still its");
    world.ask(SessionId(4), open_too_large());
    let effects = world.ask(SECOND, open(0));
    assert!(matches!(effects[..], [Effect::Close(SECOND, _)]), "{effects:?}");
}

#[test]
fn another_hosts_session_may_be_older() {
    let mut world = World::new();
    assert_eq!(world.try_open(SECOND, open_for(2, 0)), Ok(1));
    world.ask(SECOND, close());
    assert_eq!(world.try_open(FIRST, open(0)), Ok(2));
}

#[test]
fn after_a_refusal_frames_are_dropped_until_the_disk_is_opened_again() {
    let mut world = World::new();
    world.ask(FIRST, open(0));
    let effects = world.ask(FIRST, Request::Frame(frame_at(1, 5)));
    let refused = |effect: &Effect| matches!(effect, Effect::Send(FIRST, Reply::Refused(_)));
    assert!(effects.iter().any(refused), "LSN 5 does not follow 0");
    assert!(world.ask(FIRST, Request::Frame(frame_at(1, 1))).is_empty());
    world.ask(FIRST, open(1));
    world.ask(FIRST, Request::Frame(frame_at(1, 1)));
    assert_eq!(acks(&world.commit()), [(FIRST, 1)]);
}

fn closes(effects: &[Effect]) -> bool {
    effects.iter().any(|effect| matches!(effect, Effect::Close(..)))
}

/// Two hosts once took turns in one history, each open closing the other's connection.
#[test]
fn another_host_is_refused_the_disk_and_nothing_else_happens() {
    let mut world = World::new();
    assert_eq!(world.try_open(FIRST, open_for(1, 0)), Ok(1));
    world.ask(FIRST, Request::Frame(frame_at(1, 1)));
    let effects = world.ask(SECOND, open_for(2, 0));
    assert!(!closes(&effects), "{effects:?}");
    assert!(effects.iter().any(|effect| matches!(effect, Effect::Held(SECOND, DISK, _))), "{effects:?}");
    let (epoch, why) = world.try_open(SECOND, open_for(2, 0)).expect_err("held");
    assert_eq!(epoch, 1, "the owner's");
    assert!(why.contains("host1") && why.contains("own UUID"), "{why}");
    world.ask(SECOND, Request::Frame(frame_at(1, 2)));
    world.ask(SECOND, close());
    world.ask(SECOND, HEARD_JUST_NOW);
    world.ask(FIRST, Request::Frame(frame_at(1, 2)));
    world.commit();
    assert_eq!(world.durable(), 2, "the owner's frames go on");
}

#[test]
fn a_disk_that_was_given_up_is_another_hosts_with_a_new_epoch_and_takes_no_old_frame() {
    let mut world = World::new();
    world.ask(FIRST, open_for(1, 0));
    world.ask(FIRST, Request::Frame(frame_at(1, 1)));
    let effects = world.ask(FIRST, close());
    assert_eq!(acks(&effects), [(FIRST, 1)]);
    assert!(effects.iter().any(|effect| matches!(effect, Effect::Closed(FIRST, DISK))), "{effects:?}");
    assert_eq!(world.try_open(SECOND, open_for(2, 0)), Ok(2));
    for late in [frame_at(1, 2), frame_at(2, 2)] {
        assert!(
            world
                .ask(FIRST, Request::Frame(late))
                .iter()
                .all(|effect| !matches!(effect, Effect::Appended(_)))
        );
    }
    assert!(world.try_open(FIRST, open_for(1, 1)).is_err(), "it does not get it back");
    world.commit();
    assert_eq!(world.durable(), 1);
}

/// An agent that is restarted must not find its disk a clone's.
#[test]
fn a_disk_is_kept_for_a_host_whose_connection_ended_until_it_was_silent_for_long() {
    let mut world = World::new();
    world.ask(FIRST, open_for(1, 0));
    world.now += KEEP;
    world.ask(FIRST, Request::Gone(Duration::from_secs(5)));
    let (_, why) = world.try_open(SECOND, open_for(2, 0)).expect_err("kept");
    assert!(why.contains("host1") && why.contains("45 s"), "{why}");
    world.now += KEEP - Duration::from_secs(6);
    assert!(world.try_open(SECOND, open_for(2, 0)).is_err());
    assert_eq!(world.try_open(SessionId(3), open_for(1, 1)), Ok(1), "the host itself goes on at once");
    world.ask(SessionId(3), Request::Gone(KEEP));
    assert_eq!(world.try_open(SECOND, open_for(2, 0)), Ok(2), "that session had been silent already");
    assert_eq!(world.try_open(SessionId(4), open_for(1, 1)).expect_err("held").0, 2);
}

#[test]
fn a_session_closed_for_its_hosts_new_one_leaves_its_other_disks_to_that_host() {
    let mut world = World::new();
    let other = |host: u8| match open_for(host, 0) {
        Request::Open(host, request) => Request::Open(host, OpenDisk { disk: vec![8; 16], ..request }),
        request => request,
    };
    world.ask(FIRST, open_for(1, 0));
    world.ask(FIRST, other(1));
    assert!(closes(&world.ask(SECOND, open_for(1, 1))));
    assert!(world.try_open(SessionId(3), other(2)).is_err());
    assert!(world.try_open(SECOND, other(1)).is_ok());
}

#[test]
fn a_server_that_starts_keeps_each_disk_for_the_host_that_had_it() {
    let mut world = World::new();
    world.ask(FIRST, open_for(1, 0));
    world.restart();
    assert_eq!(world.try_open(SECOND, open_for(2, 0)).expect_err("kept").0, 1);
    world.now = KEEP;
    assert_eq!(world.try_open(SECOND, open_for(2, 0)), Ok(2));
    world.ask(SECOND, close());
    world.restart();
    assert_eq!(world.try_open(FIRST, open_for(1, 0)), Ok(3), "it was given up: nobody is waited for");
}

#[test]
fn a_disk_that_cannot_be_opened_stays_its_owners() {
    let mut world = World::new();
    world.ask(FIRST, open_for(1, 0));
    let too_large = match open_for(1, 1) {
        Request::Open(host, request) => {
            Request::Open(host, OpenDisk { disk_bytes: MAX_DISK_BYTES + 1, ..request })
        }
        request => request,
    };
    assert_eq!(world.try_open(FIRST, too_large).expect_err("fails").0, 0, "the reason may pass");
    assert!(world.try_open(SECOND, open_for(2, 0)).is_err());
    let effects = world.ask(FIRST, Request::Frame(frame_at(1, 1)));
    assert!(
        matches!(effects[..], [Effect::Send(FIRST, Reply::Refused(_))]),
        "not before it is opened: {effects:?}"
    );
    assert_eq!(world.try_open(FIRST, open_for(1, 1)), Ok(1));
}
