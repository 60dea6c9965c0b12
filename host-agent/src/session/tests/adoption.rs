//! What a new agent does with the rings, outboxes and spools of the one before.

use super::*;

/// A new agent, a filter that holds epoch 3, and what was read of it: frames 101 to 150.
fn adopting(ended: bool) -> (World, u64) {
    let mut world = World::new();
    world.on(Event::FilterUp(F1, vm(10)));
    let of = Some((disk(), Epoch(3)));
    world.on(Event::FilterHolds(F1, Holding { device: "virtio0".into(), ended, of }));
    let actions = world.on(Event::FilterDisks(F1, disks()));
    let adopt = actions.iter().find_map(|action| match action {
        Action::Adopt(order) => Some(order.clone()),
        _ => None,
    });
    let adopt = adopt.expect("an adoption");
    assert!(world.session.awaits(&adopt));
    world.on(Event::Loaded(disk(), Epoch(3), Lsn(100), Lsn(150)));
    (world, adopt.request)
}

#[test]
fn what_a_filter_holds_is_resumed_when_it_holds_the_new_outbox() {
    let (mut world, request) = adopting(false);
    assert_eq!(opens(&world.connect()), [3], "the same epoch");
    let actions = world.opened(120, 3);
    assert_eq!(
        actions,
        [Action::Durable(disk(), Epoch(3), Lsn(120)), Action::Release(disk(), Epoch(3), Lsn(120))]
    );
    assert_eq!(world.session.next_to_ship().unwrap().from, Lsn(121), "also before the ring is taken over");
    let actions = world.on(Event::FilterResult(F1, request, String::new()));
    assert_eq!(actions, [Action::Resume(disk(), Epoch(3)), Action::ReportSoon]);
    assert_eq!(world.phase().unwrap(), "Capturing");
    assert_eq!(
        results(&world.server(ServerMessage::SetProtection(1, disk(), Some(Settings::default())))),
        [(1, String::new())]
    );
}

#[test]
fn an_ended_capture_that_is_held_is_shipped_and_forgotten() {
    let (mut world, request) = adopting(true);
    world.connect();
    world.opened(120, 3);
    let actions = world.on(Event::FilterResult(F1, request, String::new()));
    assert_eq!(
        actions,
        [Action::Resume(disk(), Epoch(3)), Action::EndRing(disk(), Epoch(3), Ending::Detached)]
    );
    world.ship(150);
    world.on(Event::Drained(disk(), Epoch(3), Lsn(150)));
    let done = world.server(ServerMessage::Ack(disk(), Lsn(150)));
    assert!(done.contains(&Action::DropCapture(disk(), Epoch(3))));
    assert!(done.contains(&Action::Forget(F1, "virtio0".into())));
}

#[test]
fn what_cannot_be_read_ends_and_protection_begins_anew() {
    let mut world = World::new();
    world.connect();
    world.on(Event::FilterUp(F1, vm(10)));
    let of = Some((disk(), Epoch(3)));
    world.on(Event::FilterHolds(F1, Holding { device: "virtio0".into(), ended: false, of }));
    let actions = world.on(Event::FilterDisks(F1, disks()));
    let Some(Action::Adopt(order)) = actions.first() else { panic!("no adoption") };
    world.server(ServerMessage::SetProtection(1, disk(), Some(Settings::default())));
    let actions = world.on(Event::FilterResult(F1, order.request, "a frame is corrupt".into()));
    assert!(actions.contains(&Action::DropSpool(disk())) && detach(&actions).is_some());
    assert_eq!(opens(&actions), [0], "a new epoch");
    assert_eq!(attach(&world.opened(100, 4)).begins, GapReason::AgentLost, "what was taken out is lost");
}

#[test]
fn a_ring_of_another_disk_is_not_taken() {
    let mut world = World::new();
    world.on(Event::FilterUp(F1, vm(10)));
    let other = Some((DiskId([1; 16]), Epoch(3)));
    world.on(Event::FilterHolds(F1, Holding { device: "virtio0".into(), ended: false, of: other }));
    world.on(Event::FilterHolds(F1, Holding { device: "virtio0".into(), ended: false, of: None }));
    let actions = world.on(Event::FilterDisks(F1, disks()));
    assert!(!actions.iter().any(|action| matches!(action, Action::Adopt(_))));
    assert_eq!(actions.iter().filter(|action| matches!(action, Action::Forget(..))).count(), 2);
}

#[test]
fn a_spool_without_a_ring_is_shipped_where_the_server_goes_on() {
    for (epoch, refused) in [(3, ""), (4, ""), (4, "no")] {
        let mut world = World::new();
        world.on(Event::SpoolLeft(disk(), Epoch(3), 1 << 30));
        world.connect();
        assert_eq!(opens(&world.on(Event::Tick)), Vec::<u64>::new(), "its filter may still come");
        world.now = SPOOL_GRACE;
        assert_eq!(opens(&world.on(Event::Tick)), [3]);
        let actions = world.server(ServerMessage::DiskOpened {
            disk: disk(),
            durable_lsn: Lsn(120),
            durable_stamp: Stamp(5),
            epoch: Epoch(epoch),
            closed_image: None,
            begins: GapReason::Attach,
            refused: refused.into(),
        });
        if (epoch, refused) == (3, "") {
            assert_eq!(actions, [Action::Recover(disk(), Epoch(3), Lsn(120))]);
            world.ship(150);
            world.on(Event::Drained(disk(), Epoch(3), Lsn(150)));
            let done = world.server(ServerMessage::Ack(disk(), Lsn(150)));
            assert!(done.contains(&Action::DropCapture(disk(), Epoch(3))));
        } else {
            assert_eq!(actions[0], Action::DropSpool(disk()));
        }
    }
}

#[test]
fn protecting_a_disk_ships_its_spool_first() {
    let mut world = World::new();
    world.on(Event::SpoolLeft(disk(), Epoch(3), 1 << 30));
    world.on(Event::FilterUp(F1, vm(10)));
    world.on(Event::FilterDisks(F1, disks()));
    world.connect();
    assert_eq!(opens(&world.server(ServerMessage::SetProtection(1, disk(), Some(Settings::default())))), [3]);
    world.opened(120, 3);
    world.ship(130);
    world.on(Event::Drained(disk(), Epoch(3), Lsn(130)));
    assert_eq!(opens(&world.server(ServerMessage::Ack(disk(), Lsn(130)))), [0], "then the new epoch");
    assert_eq!(attach(&world.opened(130, 4)).first_lsn, Lsn(131));
}
