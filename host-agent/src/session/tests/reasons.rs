//! Why an epoch begins with a gap, where only the agent knows.

use super::*;

/// How the disks that are given up ended.
fn ends(actions: &[Action]) -> Vec<u32> {
    let of = |action: &Action| match action {
        Action::Send(ToServer::CloseDisk(close)) => Some(close.ended),
        _ => None,
    };
    actions.iter().filter_map(of).collect()
}

/// What the agent saw of an epoch's end, the server hears when it can; else the next epoch says it.
#[test]
fn a_fault_is_the_reason_of_the_next_epochs_gap() {
    let break_off = |world: &mut World| {
        let request = detach(&world.on(Event::FilterFault(F1, "virtio0".into(), "bad layout".into())));
        world.on(Event::FilterResult(F1, request.expect("a detach"), String::new()));
        world.on(Event::Drained(disk(), Epoch(3), Lsn(100)))
    };
    let mut world = World::capturing();
    assert_eq!(ends(&break_off(&mut world)), [GapReason::FilterFault as u32]);
    for (said, begins) in
        [(GapReason::UncleanEnd, GapReason::FilterFault), (GapReason::Attach, GapReason::Attach)]
    {
        let mut world = World::capturing();
        world.on(Event::ServerLost);
        assert_eq!(ends(&break_off(&mut world)), Vec::<u32>::new());
        world.now += FAULT_HOLD;
        world.connect();
        world.server(ServerMessage::SetProtection(5, disk(), Some(Settings::default())));
        let order = attach(&world.opened_after(100, 4, said));
        assert_eq!(order.begins, begins, "the server said {said:?}");
        // It is told once.
        world.on(Event::FilterResult(F1, order.request, String::new()));
        world.on(Event::FilterLost(F1));
        world.on(Event::ProcessDead(F1));
        assert_eq!(ends(&world.on(Event::Drained(disk(), Epoch(4), Lsn(100)))), [0]);
    }
}

#[test]
fn frames_that_were_thrown_away_are_the_reason_of_the_next_epochs_gap() {
    let mut world = World::capturing();
    world.ship(110);
    world.on(Event::ServerLost);
    world.connect();
    let request = detach(&world.opened(0, 9)).expect("the server has lost its place");
    world.on(Event::FilterResult(F1, request, String::new()));
    assert_eq!(opens(&world.on(Event::Drained(disk(), Epoch(3), Lsn(110)))), [0]);
    assert_eq!(attach(&world.opened(0, 10)).begins, GapReason::AgentLost);
}
