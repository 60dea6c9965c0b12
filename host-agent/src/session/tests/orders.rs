//! Random orders of events: the driver performs what the session decides, and checks what must never happen.

use proptest::prelude::*;

use super::*;

/// What the random driver may do; numbers are taken modulo what makes sense at that moment.
#[derive(Clone, Debug)]
enum Step {
    FilterUp(u8),
    FilterDisks(u8, bool),
    FilterLost(u8),
    Holds(u8, u64, bool),
    Loaded(u64, u64),
    SpoolLeft(u64),
    ProcessDead(u8),
    Fault(u8),
    AnswerFilter(bool),
    Connected,
    Lost,
    Welcome,
    Opened(u64, u64, bool),
    Ack(u64),
    Refused,
    Protect(bool),
    Bookmark,
    Pack(u64),
    Drained,
    RingFault,
    Ship,
    Sleep(u16),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        2 => (0_u8..3).prop_map(Step::FilterUp),
        4 => (0_u8..3, prop::bool::weighted(0.9)).prop_map(|(f, has)| Step::FilterDisks(f, has)),
        1 => (0_u8..3).prop_map(Step::FilterLost),
        2 => (0_u8..3, 1_u64..4, prop::bool::weighted(0.2)).prop_map(|(f, e, ended)| Step::Holds(f, e, ended)),
        4 => (0_u64..20, 0_u64..20).prop_map(|(acked, more)| Step::Loaded(acked, more)),
        1 => (1_u64..4).prop_map(Step::SpoolLeft),
        1 => (0_u8..3).prop_map(Step::ProcessDead),
        1 => (0_u8..3).prop_map(Step::Fault),
        6 => prop::bool::weighted(0.9).prop_map(Step::AnswerFilter),
        4 => Just(Step::Connected),
        1 => Just(Step::Lost),
        4 => Just(Step::Welcome),
        6 => (0_u64..40, 0_u64..4, prop::bool::weighted(0.1)).prop_map(|(d, e, r)| Step::Opened(d, e, r)),
        6 => (0_u64..60).prop_map(Step::Ack),
        1 => Just(Step::Refused),
        6 => prop::bool::weighted(0.8).prop_map(Step::Protect),
        2 => Just(Step::Bookmark),
        8 => (1_u64..20).prop_map(Step::Pack),
        3 => Just(Step::Drained),
        1 => Just(Step::RingFault),
        8 => Just(Step::Ship),
        4 => (0_u16..8000).prop_map(Step::Sleep),
    ];
    prop::collection::vec(step, 1..250)
}

/// The driver's side of one epoch.
#[derive(Debug)]
struct FakeRing {
    epoch: Epoch,
    packed: Lsn,
    released: Lsn,
    ending: bool,
    ended: bool,
}

/// Performs actions as the hub would and checks what must never happen.
#[derive(Default)]
struct Fake {
    ring: Option<FakeRing>,
    asked: Vec<(FilterId, u64)>,
    answered: Vec<u64>,
    /// What is being read.
    adopting: Option<Adopt>,
    /// Highest LSN this connection carried.
    carried: Lsn,
    follow: Vec<Event>,
}

impl Fake {
    fn perform(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Attach(order) => {
                    assert!(self.ring.is_none(), "an epoch begins before the last is dropped");
                    let packed = order.first_lsn.prev();
                    self.ring = Some(FakeRing {
                        epoch: order.epoch,
                        packed,
                        released: packed,
                        ending: false,
                        ended: false,
                    });
                    self.asked.push((order.filter, order.request));
                }
                Action::Detach(filter, request, _) => self.asked.push((filter, request)),
                Action::Adopt(order) => {
                    assert!(self.ring.is_none(), "an epoch is adopted before the last is dropped");
                    self.asked.push((order.filter, order.request));
                    self.adopting = Some(order);
                }
                Action::Resume(_, epoch) => {
                    assert_eq!(self.ring.as_ref().map(|ring| ring.epoch), Some(epoch), "nothing to resume");
                }
                Action::Abandon(_, epoch) => {
                    self.ring.take_if(|ring| ring.epoch == epoch);
                }
                Action::Recover(_, epoch, durable) => {
                    assert!(self.ring.is_none(), "a spool is shipped beside a ring");
                    let ring =
                        FakeRing { epoch, packed: durable, released: durable, ending: true, ended: false };
                    self.ring = Some(ring);
                }
                Action::EndRing(_, epoch, _) => match self.ring.as_mut().filter(|ring| ring.epoch == epoch) {
                    Some(ring) => ring.ending = true,
                    None => panic!("the end of a ring that does not exist"),
                },
                Action::Release(_, epoch, lsn) => {
                    let ring = self
                        .ring
                        .as_mut()
                        .filter(|ring| ring.epoch == epoch)
                        .expect("a ring to release from");
                    assert!(lsn <= ring.packed, "what was never packed is released");
                    ring.released = ring.released.max(lsn);
                }
                Action::DropCapture(_, epoch) => {
                    let ring = self.ring.take().expect("a ring to drop");
                    assert_eq!(ring.epoch, epoch);
                    assert!(ring.ended, "dropped while its drain runs");
                    assert_eq!(ring.released.max(ring.packed), ring.packed);
                }
                Action::PutBookmark(disk, request, _) => {
                    let lsn = self.ring.as_ref().expect("a ring for the bookmark").packed.next();
                    self.follow.push(Event::BookmarkPut(disk, request, Ok((lsn, Stamp(1)))));
                }
                Action::Send(ToServer::CommandResult(result)) => {
                    assert!(
                        !self.answered.contains(&result.request),
                        "request {} answered twice",
                        result.request
                    );
                    self.answered.push(result.request);
                }
                Action::Connect
                | Action::Discard(..)
                | Action::Forget(..)
                | Action::DropSpool(_)
                | Action::Durable(..)
                | Action::SetPolicy(..)
                | Action::GiveHashes(..)
                | Action::ReportSoon
                | Action::Disconnect(_)
                | Action::Send(_)
                | Action::Resync(..)
                | Action::Watch(_) => {}
            }
        }
    }
}

fn run(steps: Vec<Step>) {
    let mut world = World::new();
    let mut fake = Fake::default();
    let mut requests = 0;
    let mut filters = 0_u64;
    let mut current = [FilterId(0); 3];
    for step in steps {
        let filter = |n: u8| current[usize::from(n)];
        let event = match step {
            Step::FilterUp(n) => {
                let old = current[usize::from(n)];
                let actions = world.on(Event::FilterLost(old));
                fake.perform(actions);
                filters += 1;
                current[usize::from(n)] = FilterId(filters);
                Event::FilterUp(FilterId(filters), vm(u32::from(n) + 10))
            }
            Step::FilterDisks(n, has) => {
                Event::FilterDisks(filter(n), if has { disks() } else { Vec::new() })
            }
            Step::FilterLost(n) => Event::FilterLost(filter(n)),
            Step::Holds(n, epoch, ended) => {
                let of = Some((disk(), Epoch(epoch)));
                Event::FilterHolds(filter(n), Holding { device: "virtio0".into(), ended, of })
            }
            Step::Loaded(acked, more) => {
                match fake.adopting.take().filter(|order| world.session.awaits(order)) {
                    Some(order) => {
                        let (acked, packed) = (Lsn(acked), Lsn(acked + more));
                        let (epoch, ended) = (order.epoch, false);
                        fake.ring = Some(FakeRing { epoch, packed, released: acked, ending: false, ended });
                        Event::Loaded(order.disk, epoch, acked, packed)
                    }
                    None => Event::Tick,
                }
            }
            Step::SpoolLeft(epoch) => Event::SpoolLeft(disk(), Epoch(epoch), 1 << 30),
            Step::ProcessDead(n) => Event::ProcessDead(filter(n)),
            Step::Fault(n) => Event::FilterFault(filter(n), "virtio0".into(), "fault".into()),
            Step::AnswerFilter(ok) => match fake.asked.pop() {
                Some((id, request)) => {
                    Event::FilterResult(id, request, if ok { String::new() } else { "no".into() })
                }
                None => Event::Tick,
            },
            Step::Connected => Event::ServerConnected,
            Step::Lost => Event::ServerLost,
            Step::Welcome => {
                let welcome = wire::Welcome { protocol: wire::PROTOCOL_VERSION, ..Default::default() };
                Event::Server(ServerMessage::Welcome(welcome))
            }
            Step::Opened(durable, epoch, refused) => Event::Server(ServerMessage::DiskOpened {
                disk: disk(),
                durable_lsn: Lsn(durable),
                durable_stamp: Stamp(1),
                epoch: Epoch(epoch),
                closed_image: None,
                begins: GapReason::Attach,
                refused: if refused { "no".into() } else { String::new() },
            }),
            Step::Ack(lsn) => Event::Server(ServerMessage::Ack(disk(), Lsn(lsn))),
            Step::Refused => Event::Server(ServerMessage::Refused(disk(), "full".into(), 10)),
            Step::Protect(on) => {
                requests += 1;
                Event::Server(ServerMessage::SetProtection(requests, disk(), on.then(Settings::default)))
            }
            Step::Bookmark => {
                requests += 1;
                Event::Server(ServerMessage::InsertBookmark(requests, disk(), "b".into()))
            }
            Step::Pack(count) => match fake.ring.as_mut().filter(|ring| !ring.ended) {
                Some(ring) => {
                    ring.packed = ring.packed.plus(count);
                    Event::Packed(disk(), ring.epoch, ring.packed)
                }
                None => Event::Tick,
            },
            Step::Drained => match fake.ring.as_mut().filter(|ring| ring.ending && !ring.ended) {
                Some(ring) => {
                    ring.ended = true;
                    Event::Drained(disk(), ring.epoch, ring.packed)
                }
                None => Event::Tick,
            },
            Step::RingFault => match fake.ring.as_mut().filter(|ring| !ring.ended) {
                Some(ring) => {
                    ring.ended = true;
                    Event::RingFault(disk(), ring.epoch, GapReason::FilterFault, "corrupt".into())
                }
                None => Event::Tick,
            },
            Step::Ship => {
                if let Some(next) = world.session.next_to_ship() {
                    let ring = fake.ring.as_ref().expect("frames of a ring that exists");
                    assert_eq!(ring.epoch, next.epoch);
                    assert!(next.from > ring.released, "what was released is sent again");
                    assert!(next.from <= ring.packed);
                    world.session.shipped(next.disk, next.epoch, ring.packed);
                    fake.carried = fake.carried.max(ring.packed);
                }
                Event::Tick
            }
            Step::Sleep(ms) => {
                world.now += Duration::from_millis(ms.into());
                Event::Tick
            }
        };
        let actions = world.on(event);
        fake.perform(actions);
        while let Some(event) = fake.follow.pop() {
            let actions = world.on(event);
            fake.perform(actions);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    #[test]
    fn no_order_of_events_breaks_packed_shipped_acked(steps in steps()) {
        run(steps);
    }
}
