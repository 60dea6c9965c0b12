//! Tests of the session: stories here and in `adoption`, random orders of events in `orders`.

mod adoption;
mod claims;
mod orders;
mod reasons;

use std::time::Duration;

use journal_format::{DiskId, Epoch, GapReason, Lsn, Stamp, wire};

use super::*;
use crate::identity::disk_id;
use crate::limits::{FAULT_HOLD, FILTER_ANSWER, SERVER_SILENT, SPOOL_GRACE};

const HOST: [u8; 16] = [9; 16];
const VM: [u8; 16] = [7; 16];
const F1: FilterId = FilterId(1);
const F2: FilterId = FilterId(2);

fn disk() -> DiskId {
    disk_id(&HOST, &VM, "vm", "virtio0")
}

fn vm(pid: u32) -> VmInfo {
    VmInfo { pid, program: "qemu".into(), name: "vm".into(), uuid: VM, ..VmInfo::default() }
}

fn disks() -> Vec<DiskInfo> {
    vec![DiskInfo { device: "virtio0".into(), disk_bytes: 1 << 30, ..DiskInfo::default() }]
}

/// A session with the time and the answers it gave.
struct World {
    session: Session,
    now: Duration,
}

impl World {
    fn new() -> Self {
        let identity = Identity { host_id: HOST, host_name: "h".into(), token: String::new() };
        Self { session: Session::new(identity), now: Duration::ZERO }
    }

    fn on(&mut self, event: Event) -> Vec<Action> {
        self.session.handle(self.now, event)
    }

    fn server(&mut self, message: ServerMessage) -> Vec<Action> {
        self.on(Event::Server(message))
    }

    fn connect(&mut self) -> Vec<Action> {
        self.now += Duration::from_secs(6);
        assert!(self.on(Event::Tick).contains(&Action::Connect));
        self.on(Event::ServerConnected);
        self.server(ServerMessage::Welcome(wire::Welcome {
            protocol: wire::PROTOCOL_VERSION,
            ..Default::default()
        }))
    }

    fn opened(&mut self, durable: u64, epoch: u64) -> Vec<Action> {
        self.opened_after(durable, epoch, GapReason::UncleanEnd)
    }

    fn opened_after(&mut self, durable: u64, epoch: u64, begins: GapReason) -> Vec<Action> {
        self.server(ServerMessage::DiskOpened {
            disk: disk(),
            durable_lsn: Lsn(durable),
            durable_stamp: Stamp(5),
            epoch: Epoch(epoch),
            closed_image: None,
            begins,
            refused: String::new(),
        })
    }

    /// A VM, a connection, and a disk captured in epoch 3 from LSN 101 on.
    fn capturing() -> Self {
        let mut world = Self::new();
        world.on(Event::FilterUp(F1, vm(10)));
        world.on(Event::FilterDisks(F1, disks()));
        world.connect();
        world.server(ServerMessage::SetProtection(1, disk(), Some(Settings::default())));
        let request = attach(&world.opened(100, 3)).request;
        let answers = world.on(Event::FilterResult(F1, request, String::new()));
        assert_eq!(results(&answers), [(1, String::new())]);
        world
    }

    fn ship(&mut self, to: u64) {
        self.on(Event::Packed(disk(), Epoch(3), Lsn(to)));
        while let Some(next) = self.session.next_to_ship() {
            self.session.shipped(next.disk, next.epoch, Lsn(to));
        }
    }

    fn phase(&self) -> Option<String> {
        self.session.phases().get(&disk()).cloned()
    }
}

fn attach(actions: &[Action]) -> Attach {
    let found = actions.iter().find_map(|action| match action {
        Action::Attach(order) => Some(order.clone()),
        _ => None,
    });
    found.expect("an attach")
}

fn detach(actions: &[Action]) -> Option<u64> {
    actions.iter().find_map(|action| match action {
        Action::Detach(_, request, _) => Some(*request),
        _ => None,
    })
}

fn results(actions: &[Action]) -> Vec<(u64, String)> {
    let of = |action: &Action| match action {
        Action::Send(ToServer::CommandResult(result)) => Some((result.request, result.error.clone())),
        _ => None,
    };
    actions.iter().filter_map(of).collect()
}

fn opens(actions: &[Action]) -> Vec<u64> {
    let of = |action: &Action| match action {
        Action::Send(ToServer::OpenDisk(open)) => Some(open.resume_epoch),
        _ => None,
    };
    actions.iter().filter_map(of).collect()
}

fn inventory(actions: &[Action]) -> wire::Inventory {
    let of = |action: &Action| match action {
        Action::Send(ToServer::Inventory(inventory)) => Some(inventory.clone()),
        _ => None,
    };
    actions.iter().rev().find_map(of).expect("an inventory")
}

#[test]
fn policies_reach_the_next_ring_and_the_running_one() {
    let mut world = World::capturing();
    let policy = Policy { overflow: capture_ring::Overflow::Strict, sync: true, ..Policy::default() };
    let settings = Settings { policy, ring_mib: 8 };
    let actions = world.server(ServerMessage::SetProtection(2, disk(), Some(settings)));
    assert!(actions.contains(&Action::SetPolicy(disk(), Epoch(3), policy)));
    assert_eq!(results(&actions), [(2, String::new())]);
    // A ring that is made later has them from the start.
    let mut world = World::new();
    world.on(Event::FilterUp(F1, vm(10)));
    world.on(Event::FilterDisks(F1, disks()));
    world.connect();
    world.server(ServerMessage::SetProtection(1, disk(), Some(settings)));
    assert_eq!(attach(&world.opened(100, 3)).settings, settings);
}

#[test]
fn only_what_the_server_has_acknowledged_is_told_to_be_durable() {
    let mut world = World::capturing();
    world.ship(110);
    let durable = |actions: &[Action]| {
        let of = |action: &Action| match action {
            Action::Durable(_, _, lsn) => Some(*lsn),
            _ => None,
        };
        actions.iter().filter_map(of).collect::<Vec<_>>()
    };
    assert_eq!(durable(&world.server(ServerMessage::Ack(disk(), Lsn(105)))), [Lsn(105)]);
    // The server has lost its place: the frames are thrown away, which makes nothing durable.
    world.on(Event::ServerLost);
    world.connect();
    assert_eq!(durable(&world.opened(0, 9)), []);
    assert_eq!(durable(&world.on(Event::Packed(disk(), Epoch(3), Lsn(120)))), []);
}

#[test]
fn protecting_asks_the_server_where_its_journal_ends_and_continues_there() {
    let mut world = World::new();
    world.on(Event::FilterUp(F1, vm(10)));
    world.on(Event::FilterDisks(F1, disks()));
    assert_eq!(inventory(&world.connect()).vms[0].disks[0].disk, disk().0);
    assert_eq!(opens(&world.server(ServerMessage::SetProtection(1, disk(), Some(Settings::default())))), [0]);
    let order = attach(&world.opened(100, 3));
    assert_eq!((order.first_lsn, order.epoch, order.clock_floor), (Lsn(101), Epoch(3), Stamp(5)));
    assert_eq!((order.filter, order.device.as_str(), order.disk_bytes), (F1, "virtio0", 1 << 30));
}

#[test]
fn protecting_twice_is_answered_twice_and_done_once() {
    let mut world = World::capturing();
    let again = world.server(ServerMessage::SetProtection(2, disk(), Some(Settings::default())));
    assert_eq!(
        again,
        [Action::Send(ToServer::CommandResult(wire::CommandResult { request: 2, ..Default::default() }))]
    );
}

#[test]
fn unprotecting_ends_only_when_everything_is_durable() {
    let mut world = World::capturing();
    world.ship(150);
    let request = detach(&world.server(ServerMessage::SetProtection(2, disk(), None))).unwrap();
    let ended = world.on(Event::FilterResult(F1, request, String::new()));
    assert_eq!(ended, [Action::EndRing(disk(), Epoch(3), Ending::Detached)]);
    world.ship(160);
    assert!(results(&world.on(Event::Drained(disk(), Epoch(3), Lsn(160)))).is_empty());
    assert!(results(&world.server(ServerMessage::Ack(disk(), Lsn(159)))).is_empty());
    let done = world.server(ServerMessage::Ack(disk(), Lsn(160)));
    assert!(done.contains(&Action::DropCapture(disk(), Epoch(3))));
    assert_eq!(results(&done), [(2, String::new())]);
    assert_eq!(results(&world.server(ServerMessage::SetProtection(3, disk(), None))), [(3, String::new())]);
}

#[test]
fn a_reconnect_resends_from_after_the_durable_lsn() {
    let mut world = World::capturing();
    world.ship(150);
    world.server(ServerMessage::Ack(disk(), Lsn(120)));
    world.on(Event::ServerLost);
    assert_eq!(world.session.next_to_ship(), None);
    assert_eq!(opens(&world.connect()), [3]);
    assert_eq!(world.session.next_to_ship(), None, "not before the answer");
    let actions = world.opened(130, 3);
    let known = [Action::Durable(disk(), Epoch(3), Lsn(130)), Action::Release(disk(), Epoch(3), Lsn(130))];
    assert_eq!(actions, known);
    assert_eq!(world.session.next_to_ship().unwrap().from, Lsn(131));
}

#[test]
fn a_server_that_lost_its_place_gets_a_new_epoch() {
    for (durable, epoch) in [(119, 3), (151, 3), (130, 4)] {
        let mut world = World::capturing();
        world.ship(150);
        world.server(ServerMessage::Ack(disk(), Lsn(120)));
        world.on(Event::ServerLost);
        world.connect();
        let request = detach(&world.opened(durable, epoch)).expect("the old epoch ends");
        world.on(Event::FilterResult(F1, request, String::new()));
        let closed = world.on(Event::Drained(disk(), Epoch(3), Lsn(170)));
        assert!(closed.contains(&Action::DropCapture(disk(), Epoch(3))), "{durable} {epoch}");
        assert_eq!(opens(&closed), [0], "and a new one begins");
    }
}

#[test]
fn an_acknowledgement_of_what_was_not_sent_ends_the_connection() {
    let mut world = World::capturing();
    world.ship(150);
    world.on(Event::Packed(disk(), Epoch(3), Lsn(160)));
    let actions = world.server(ServerMessage::Ack(disk(), Lsn(151)));
    assert!(matches!(actions[..], [Action::Disconnect(_)]));
}

#[test]
fn a_refusal_keeps_frames_and_asks_again() {
    let mut world = World::capturing();
    world.ship(110);
    world.server(ServerMessage::Refused(disk(), "disk full".into(), 1000));
    world.on(Event::Packed(disk(), Epoch(3), Lsn(120)));
    assert_eq!(world.session.next_to_ship(), None);
    world.now += Duration::from_secs(1);
    assert_eq!(opens(&world.on(Event::Tick)), [3]);
    world.opened(105, 3);
    assert_eq!(world.session.next_to_ship().unwrap().from, Lsn(106));
}

#[test]
fn a_bookmark_is_answered_when_it_is_durable() {
    let mut world = World::capturing();
    let put = world.server(ServerMessage::InsertBookmark(5, disk(), "before upgrade".into()));
    assert_eq!(put, [Action::PutBookmark(disk(), 5, "before upgrade".into())]);
    assert!(world.server(ServerMessage::InsertBookmark(5, disk(), "before upgrade".into())).is_empty());
    world.on(Event::BookmarkPut(disk(), 5, Ok((Lsn(120), Stamp(77)))));
    world.ship(130);
    assert!(results(&world.server(ServerMessage::Ack(disk(), Lsn(119)))).is_empty());
    let done = world.server(ServerMessage::Ack(disk(), Lsn(125)));
    let answer = wire::CommandResult { request: 5, error: String::new(), lsn: 120, stamp: 77 };
    assert!(done.contains(&Action::Send(ToServer::CommandResult(answer))));
}

#[test]
fn a_dead_process_is_drained_and_comes_back_with_a_new_epoch() {
    let mut world = World::capturing();
    world.ship(150);
    assert!(world.on(Event::FilterLost(F1)).contains(&Action::Watch(F1)));
    assert_eq!(world.phase().unwrap(), "Orphaned");
    // The next process is there before the old one's death is seen.
    world.on(Event::FilterUp(F2, vm(11)));
    assert_eq!(detach(&world.on(Event::FilterDisks(F2, disks()))), None, "another process holds no old ring");
    world.server(ServerMessage::SetProtection(8, disk(), Some(Settings::default())));
    assert_eq!(world.on(Event::ProcessDead(F1)), [Action::EndRing(disk(), Epoch(3), Ending::Dead)]);
    world.on(Event::Drained(disk(), Epoch(3), Lsn(150)));
    assert_eq!(opens(&world.server(ServerMessage::Ack(disk(), Lsn(150)))), [0]);
    assert_eq!(attach(&world.opened(150, 4)).filter, F2);
}

#[test]
fn a_process_that_only_lost_its_connection_is_detached_and_captured_anew() {
    let mut world = World::capturing();
    world.on(Event::FilterLost(F1));
    world.on(Event::FilterUp(F2, vm(10)));
    let request = detach(&world.on(Event::FilterDisks(F2, disks()))).expect("the old ring ends first");
    world.on(Event::FilterResult(F2, request, String::new()));
    assert_eq!(opens(&world.on(Event::Drained(disk(), Epoch(3), Lsn(100)))), [0]);
}

#[test]
fn the_second_claim_of_a_disk_is_listed_and_refused() {
    let mut world = World::capturing();
    world.on(Event::FilterUp(F2, vm(11)));
    let listed = inventory(&world.on(Event::FilterDisks(F2, disks())));
    assert_eq!(listed.vms[0].disks[0].refused, "");
    assert!(listed.vms[1].disks[0].refused.contains("process 10"));
    let after = inventory(&world.on(Event::FilterLost(F2)));
    assert_eq!(after.vms.len(), 1);
}

#[test]
fn a_fault_holds_the_disk_for_a_while_then_reports_it_again() {
    let mut world = World::capturing();
    let actions = world.on(Event::FilterFault(F1, "virtio0".into(), "bad layout".into()));
    let request = detach(&actions).unwrap();
    world.on(Event::FilterResult(F1, request, String::new()));
    world.on(Event::Drained(disk(), Epoch(3), Lsn(100)));
    assert_eq!(world.phase(), None);
    let refused = results(&world.server(ServerMessage::SetProtection(4, disk(), Some(Settings::default()))));
    assert!(refused[0].1.contains("bad layout"));
    world.now += FAULT_HOLD / 2;
    world.server(ServerMessage::Ping(1));
    world.now += FAULT_HOLD / 2;
    world.server(ServerMessage::Ping(2));
    inventory(&world.on(Event::Tick));
    assert_eq!(opens(&world.server(ServerMessage::SetProtection(5, disk(), Some(Settings::default())))), [0]);
}

#[test]
fn what_a_hostile_ring_gave_before_its_fault_is_still_shipped() {
    let mut world = World::capturing();
    world.ship(110);
    let request =
        detach(&world.on(Event::RingFault(disk(), Epoch(3), GapReason::FilterFault, "corrupt".into())))
            .unwrap();
    world.on(Event::FilterResult(F1, request, String::new()));
    assert_eq!(world.phase().unwrap(), "Draining");
    world.server(ServerMessage::Ack(disk(), Lsn(110)));
    assert_eq!(world.phase(), None);
}

#[test]
fn a_stuck_qemu_is_reported_and_its_late_answer_still_counts() {
    let mut world = World::new();
    world.on(Event::FilterUp(F1, vm(10)));
    world.on(Event::FilterDisks(F1, disks()));
    world.connect();
    world.server(ServerMessage::SetProtection(1, disk(), Some(Settings::default())));
    let request = attach(&world.opened(0, 1)).request;
    for _ in 0..4 {
        world.now += FILTER_ANSWER / 4;
        world.server(ServerMessage::Ping(1));
    }
    let late = results(&world.on(Event::Tick));
    assert!(late[0].1.contains("does not answer"));
    world.on(Event::FilterResult(F1, request, String::new()));
    assert_eq!(world.phase().unwrap(), "Capturing");
}

#[test]
fn only_the_answer_to_the_last_open_counts() {
    let mut world = World::new();
    world.on(Event::FilterUp(F1, vm(10)));
    world.on(Event::FilterDisks(F1, disks()));
    world.connect();
    world.server(ServerMessage::SetProtection(1, disk(), Some(Settings::default())));
    assert_eq!(results(&world.server(ServerMessage::SetProtection(2, disk(), None))).len(), 2);
    world.server(ServerMessage::SetProtection(3, disk(), Some(Settings::default())));
    let stale = world.opened(0, 1);
    assert!(!stale.iter().any(|action| matches!(action, Action::Attach(_))), "that was the first one's");
    assert_eq!(attach(&world.opened(0, 2)).epoch, Epoch(2));
}

#[test]
fn tracking_is_ended_by_a_resync_once_there_is_room() {
    let mut world = World::capturing();
    let sample = |room, outbox| Sample {
        mode: "tracking",
        ring_has_room: room,
        outbox_used_bytes: outbox,
        outbox_bytes: 100,
        ..Sample::default()
    };
    let resyncs = |actions: Vec<Action>| actions.iter().filter(|a| matches!(a, Action::Resync(..))).count();
    assert_eq!(resyncs(world.on(Event::Sampled(disk(), Epoch(3), sample(false, 10)))), 0);
    assert_eq!(resyncs(world.on(Event::Sampled(disk(), Epoch(3), sample(true, 80)))), 0);
    assert_eq!(resyncs(world.on(Event::Sampled(disk(), Epoch(3), sample(true, 10)))), 1);
    assert_eq!(resyncs(world.on(Event::Sampled(disk(), Epoch(3), sample(true, 10)))), 0, "not at once again");
}

#[test]
fn a_silent_server_is_pinged_then_left() {
    let mut world = World::capturing();
    world.now += Duration::from_secs(6);
    let pings = world.on(Event::Tick);
    assert!(pings.iter().any(|action| matches!(action, Action::Send(ToServer::Ping(_)))));
    world.now += SERVER_SILENT;
    assert!(world.on(Event::Tick).iter().any(|action| matches!(action, Action::Disconnect(_))));
}

#[test]
fn a_server_that_refuses_the_agent_is_asked_again_later_and_later() {
    let mut world = World::new();
    let mut pauses = Vec::new();
    for _ in 0..10 {
        while !world.on(Event::Tick).contains(&Action::Connect) {
            world.now += Duration::from_millis(50);
        }
        pauses.push(world.now);
        world.on(Event::ServerConnected);
        let refusal = wire::Welcome { protocol: 1, refused: "wrong token".into(), ..Default::default() };
        let actions = world.server(ServerMessage::Welcome(refusal));
        assert!(matches!(&actions[..], [Action::Disconnect(why)] if why.contains("wrong token")));
    }
    assert!(pauses[2] - pauses[1] < pauses[5] - pauses[4]);
    assert!(pauses[9] - pauses[8] <= Duration::from_secs(5) + Duration::from_millis(50));
}

#[test]
fn a_stopping_agent_waits_for_acknowledgements_and_leaves_disks_attached() {
    let mut world = World::capturing();
    world.ship(110);
    let actions = world.on(Event::Stop);
    assert_eq!(actions, [Action::EndRing(disk(), Epoch(3), Ending::AgentStops)]);
    assert!(!world.session.is_flushed());
    world.on(Event::Drained(disk(), Epoch(3), Lsn(110)));
    assert!(!world.session.is_flushed());
    world.server(ServerMessage::Ack(disk(), Lsn(110)));
    assert!(world.session.is_flushed());
}

#[test]
fn a_stopping_agent_does_not_begin_what_was_only_asked_for() {
    let mut world = World::new();
    world.on(Event::FilterUp(F1, vm(10)));
    world.on(Event::FilterDisks(F1, disks()));
    world.connect();
    world.server(ServerMessage::SetProtection(1, disk(), Some(Settings::default())));
    let answers = results(&world.on(Event::Stop));
    assert!(matches!(&answers[..], [(1, why)] if why.contains("stopping")), "{answers:?}");
    assert!(world.session.is_flushed(), "it would wait for frames that nobody packs");
    assert_eq!(world.opened(100, 3), []);
}
