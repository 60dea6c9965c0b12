//! Disks that somebody else claims too, and giving up what is not needed any more.

use super::*;

fn refused(world: &mut World, epoch: u64) -> Vec<Action> {
    world.server(ServerMessage::DiskOpened {
        disk: disk(),
        durable_lsn: Lsn(0),
        durable_stamp: Stamp(0),
        epoch: Epoch(epoch),
        closed_image: None,
        begins: GapReason::Attach,
        refused: "host2 has it".into(),
    })
}

/// Where the disk is given up among the messages to the server, and where the last inventory is.
fn given_up(actions: &[Action]) -> (Option<usize>, Option<usize>) {
    let close = Action::Send(ToServer::CloseDisk(wire::CloseDisk { disk: disk().0.to_vec(), ended: 0 }));
    let inventory = |action: &Action| matches!(action, Action::Send(ToServer::Inventory(_)));
    (actions.iter().position(|action| *action == close), actions.iter().rposition(inventory))
}

#[test]
fn an_ended_capture_is_given_up_when_it_is_durable_and_before_the_server_hears_that_the_disk_is_free() {
    let mut world = World::capturing();
    world.ship(150);
    world.on(Event::FilterLost(F1));
    world.on(Event::ProcessDead(F1));
    let drained = world.on(Event::Drained(disk(), Epoch(3), Lsn(150)));
    assert_eq!(given_up(&drained).0, None, "not all of it is durable");
    let done = world.server(ServerMessage::Ack(disk(), Lsn(150)));
    let (close, inventory) = given_up(&done);
    assert!(close.expect("given up") < inventory.expect("an inventory"));
    assert_eq!(given_up(&world.on(Event::Tick)).0, None, "once");
}

#[test]
fn a_disk_that_is_gone_before_it_could_be_captured_is_given_up() {
    let mut world = World::new();
    world.on(Event::FilterUp(F1, vm(10)));
    world.on(Event::FilterDisks(F1, disks()));
    world.connect();
    assert_eq!(opens(&world.server(ServerMessage::SetProtection(1, disk(), Some(Settings::default())))), [0]);
    assert!(given_up(&world.on(Event::FilterLost(F1))).0.is_some());
    assert_eq!(world.opened(0, 4), [], "the answer is too late");
}

#[test]
fn a_stopping_agent_gives_nothing_up() {
    let mut world = World::capturing();
    world.ship(150);
    let mut actions = world.on(Event::Stop);
    actions.extend(world.on(Event::Drained(disk(), Epoch(3), Lsn(150))));
    actions.extend(world.server(ServerMessage::Ack(disk(), Lsn(150))));
    assert_eq!(given_up(&actions).0, None);
}

#[test]
fn a_disk_that_another_host_has_is_not_captured_and_the_server_hears_why() {
    let mut world = World::new();
    world.on(Event::FilterUp(F1, vm(10)));
    world.on(Event::FilterDisks(F1, disks()));
    world.connect();
    world.server(ServerMessage::SetProtection(1, disk(), Some(Settings::default())));
    let actions = refused(&mut world, 9);
    let [(1, why)] = &results(&actions)[..] else { panic!("{actions:?}") };
    assert!(why.contains("host2 has it"), "{why}");
    assert_eq!((world.phase(), given_up(&actions).0), (None, None));
    let again = world.server(ServerMessage::SetProtection(2, disk(), Some(Settings::default())));
    assert_eq!(opens(&again), [0], "it asks whenever it is told to");
}

/// A guest under `strict` would wait for ever for room in the ring of an epoch whose frames nobody will ever take.
#[test]
fn an_epoch_that_another_host_has_overtaken_ends_at_once() {
    let mut world = World::capturing();
    world.ship(150);
    world.on(Event::ServerLost);
    assert_eq!(opens(&world.connect()), [3]);
    let actions = refused(&mut world, 4);
    assert!(actions.contains(&Action::Discard(disk(), Epoch(3))), "{actions:?}");
    let request = detach(&actions).expect("QEMU is asked to detach");
    assert!(world.session.next_to_ship().is_none());
    world.on(Event::FilterResult(F1, request, String::new()));
    let done = world.on(Event::Drained(disk(), Epoch(3), Lsn(160)));
    assert!(done.contains(&Action::DropCapture(disk(), Epoch(3))), "{done:?}");
    assert_eq!(opens(&done), [0], "a new epoch, should the disk be free");
    refused(&mut world, 4);
    assert_eq!(world.phase(), None);
}

#[test]
fn an_epoch_that_the_server_cannot_take_for_now_is_kept() {
    let mut world = World::capturing();
    world.ship(150);
    world.on(Event::ServerLost);
    world.connect();
    assert_eq!(refused(&mut world, 0), []);
    world.now += Duration::from_secs(6);
    assert_eq!(opens(&world.on(Event::Tick)), [3]);
    assert_eq!(world.phase().expect("kept"), "Capturing");
}

#[test]
fn a_spool_waits_for_a_server_that_cannot_take_it_for_now() {
    let mut world = World::new();
    world.on(Event::SpoolLeft(disk(), Epoch(3), 1 << 30));
    world.now = SPOOL_GRACE;
    world.connect();
    assert_eq!(opens(&world.on(Event::Tick)), [3]);
    assert_eq!(refused(&mut world, 0), []);
    world.now += Duration::from_secs(6);
    assert_eq!(opens(&world.on(Event::Tick)), [3]);
    assert_eq!(world.opened(120, 3), [Action::Recover(disk(), Epoch(3), Lsn(120))]);
}
