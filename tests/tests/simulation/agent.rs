//! The agent: its real session and, for each disk, its real drain worker (consumer, packer, outbox, spool), performed
//! by a single-threaded stand-in for the hub.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use capture_ring::{Bell, Consumer, HostClock, Mode, Producer, Ring, RingConfig};
use host_agent::compare::Answer;
use host_agent::drain::worker::{Pace, Worker};
use host_agent::inbox::Inbox;
use host_agent::limits::{DRAIN_POLL, TICK};
use host_agent::outbox::{Outbox, Packed};
use host_agent::packer::Packer;
use host_agent::session::{Action, Attach, Ending, Event, FilterId, Identity, Sample, Session, ToServer};
use host_agent::spool::{self, Spool, SpoolPlace};
use journal_format::{DiskId, Epoch, Lsn, Stamp, wire};

use super::net::Conn;

/// What the agent asks of a filter.
pub(crate) enum ToFilter {
    Attach { request: u64, device: String, fds: Box<[OwnedFd; 3]> },
    Detach { request: u64, device: String },
    Resync { device: String },
}

/// One epoch of a disk.
struct Live {
    epoch: Epoch,
    ring: Arc<Ring>,
    producer: Producer,
    outbox: Arc<Outbox>,
    worker: Worker,
    /// When its thread would make the next step.
    next: Duration,
    ending: Option<Ending>,
    ended: bool,
}

/// Sizes that a run chooses.
#[derive(Clone, Debug)]
pub(crate) struct Sizes {
    pub(crate) arena_bytes: u64,
    pub(crate) slots: u32,
    pub(crate) outbox_bytes: u64,
    pub(crate) spool: SpoolPlace,
}

/// A running agent.
pub(crate) struct Agent {
    session: Session,
    pub(crate) clock: HostClock,
    clock_fd: OwnedFd,
    sizes: Sizes,
    rings: BTreeMap<DiskId, Live>,
    inbox: Inbox,
    unsent: Vec<u8>,
    /// The connection in use.
    pub(crate) conn: Option<u64>,
    /// When the connection that was ordered is there, or refused.
    pub(crate) connecting: Option<Duration>,
    queue: VecDeque<Event>,
    pub(crate) to_filters: VecDeque<(FilterId, ToFilter)>,
    /// Filters whose processes are watched.
    pub(crate) watched: Vec<FilterId>,
    next_tick: Duration,
    pub(crate) notes: Vec<String>,
    pub(crate) bookmarks: u64,
}

impl Agent {
    pub(crate) fn new(identity: Identity, sizes: Sizes, floor: Stamp) -> Self {
        let (clock, clock_fd) = HostClock::create().expect("a clock page");
        clock.raise_to(floor);
        Self {
            session: Session::new(identity),
            clock,
            clock_fd,
            sizes,
            rings: BTreeMap::new(),
            inbox: Inbox::default(),
            unsent: Vec::new(),
            conn: None,
            connecting: None,
            queue: VecDeque::new(),
            to_filters: VecDeque::new(),
            watched: Vec::new(),
            next_tick: Duration::ZERO,
            notes: Vec::new(),
            bookmarks: 0,
        }
    }

    pub(crate) fn phases(&self) -> String {
        format!("{:?}", self.session.phases())
    }

    /// Takes what the server sent, ticks when it is time, and sends.
    pub(crate) fn step(&mut self, now: Duration, conns: &mut BTreeMap<u64, Conn>, most: usize) {
        self.receive(now, conns, most);
        if now >= self.next_tick {
            self.next_tick = now + TICK;
            self.sample(now);
            self.handle(now, Event::Tick);
        }
        self.send(conns);
    }

    fn receive(&mut self, now: Duration, conns: &mut BTreeMap<u64, Conn>, most: usize) {
        let Some(id) = self.conn else { return };
        let Some(conn) = conns.get_mut(&id) else { return self.lost(now) };
        let came = conn.down.receive(now, most);
        self.inbox.buffer().extend_from_slice(&came);
        let over = conn.down.is_over();
        while self.conn == Some(id) {
            match self.inbox.next().expect("the server's stream is sound") {
                Some(message) => self.handle(now, message.into()),
                None => break,
            }
        }
        if over && self.conn == Some(id) {
            self.lost(now);
        }
    }

    /// The connection has ended.
    pub(crate) fn lost(&mut self, now: Duration) {
        self.drop_link();
        self.handle(now, Event::ServerLost);
    }

    fn drop_link(&mut self) {
        self.conn = None;
        self.inbox.clear();
        self.unsent.clear();
    }

    /// The outcome of the connection that was ordered.
    pub(crate) fn connected(&mut self, now: Duration, conn: Option<u64>) {
        self.connecting = None;
        self.conn = conn;
        self.handle(now, if conn.is_some() { Event::ServerConnected } else { Event::ServerLost });
    }

    fn sample(&mut self, now: Duration) {
        let live: Vec<(DiskId, Epoch)> = self.session.live().collect();
        for (disk, epoch) in live {
            let Some(live) = self.rings.get(&disk).filter(|live| live.epoch == epoch) else { continue };
            let host_stamp = self.clock.now();
            let sample = Sample {
                mode: match live.ring.mode().mode {
                    Mode::Off => "off",
                    Mode::Tracking => "tracking",
                    Mode::Capturing => "capturing",
                },
                captured_lsn: live.ring.captured_lsn(),
                captured_stamp: live.worker.captured(),
                ring_has_room: live.ring.has_room(),
                ring_used_bytes: live.ring.arena_used_bytes(),
                ring_bytes: live.ring.config().arena_bytes,
                dirty_bytes: live.ring.dirty().bytes(),
                outbox_used_bytes: live.outbox.used_bytes(),
                outbox_bytes: live.outbox.capacity_bytes(),
                spool_used_bytes: live.worker.spool().used_bytes(),
                spool_bytes: self.sizes.spool.limit_bytes,
                spool_trouble: live.worker.spool().trouble().unwrap_or_default().to_owned(),
                unacked_bytes: live.outbox.raw_bytes(),
                host_stamp,
                waiting: 0,
                waited: Duration::ZERO,
                sync: "off",
                ..Sample::default()
            };
            self.handle(now, Event::Sampled(disk, epoch, sample));
        }
    }

    fn send(&mut self, conns: &mut BTreeMap<u64, Conn>) {
        let Some(conn) = self.conn.and_then(|id| conns.get_mut(&id)) else { return };
        if conn.up.room() > 0 {
            conn.up.send(&std::mem::take(&mut self.unsent));
        }
        while self.unsent.is_empty() && conn.up.room() > 0 {
            let Some(next) = self.session.next_to_ship() else { break };
            let live = self.rings.get(&next.disk).filter(|live| live.epoch == next.epoch);
            let live = live.expect("what is shipped has an outbox");
            let entries = live.outbox.entries(next.from, next.to, conn.up.room(), 4);
            let (Some(first), Some(last)) = (entries.first(), entries.last()) else { break };
            assert!(
                first.first_lsn <= next.from,
                "a frame between the acknowledged and the oldest is missing"
            );
            for entry in &entries {
                let mut bytes = vec![0; entry.len];
                live.outbox.memory().file().read_exact_at(&mut bytes, entry.at as u64).expect("a memfd");
                conn.up.send(&bytes);
            }
            self.session.shipped(next.disk, next.epoch, last.last_lsn);
        }
    }

    /// Gives an event to the session and does what it says.
    pub(crate) fn handle(&mut self, now: Duration, event: Event) {
        self.queue.push_back(event);
        while let Some(event) = self.queue.pop_front() {
            for action in self.session.handle(now, event) {
                self.perform(now, action);
            }
        }
    }

    fn perform(&mut self, now: Duration, action: Action) {
        match action {
            // The simulated filter never waits.
            Action::Durable(..) | Action::SetPolicy(..) => {}
            Action::Connect => self.connecting = Some(now),
            Action::Disconnect(reason) => {
                self.notes.push(format!("agent disconnects: {reason}"));
                self.drop_link();
            }
            Action::Send(message) => {
                if self.conn.is_some() {
                    self.unsent.extend_from_slice(&encode(&message));
                }
            }
            Action::Attach(order) => self.attach(&order),
            Action::Detach(filter, request, device) => {
                self.to_filters.push_back((filter, ToFilter::Detach { request, device }));
            }
            Action::Resync(filter, _, device) => {
                self.to_filters.push_back((filter, ToFilter::Resync { device }));
            }
            Action::Watch(filter) => self.watched.push(filter),
            Action::EndRing(disk, epoch, ending) => match self.ring(disk, epoch) {
                Some(live) => live.ending = Some(ending),
                None => self.queue.push_back(Event::Drained(disk, epoch, Lsn::ZERO)),
            },
            Action::Release(disk, epoch, lsn) => {
                if let Some(live) = self.ring(disk, epoch) {
                    live.outbox.release(lsn);
                }
            }
            Action::PutBookmark(disk, request, name) => {
                let live = self.rings.get(&disk).expect("a bookmark is for a capture");
                let put = live.producer.bookmark(&name).map_err(|full| full.to_string());
                self.bookmarks += u64::from(put.is_ok());
                self.queue.push_back(Event::BookmarkPut(disk, request, put));
            }
            Action::Discard(disk, epoch) => {
                if let Some(live) = self.ring(disk, epoch) {
                    live.worker.discard();
                }
            }
            Action::DropSpool(disk) => spool::discard(&self.sizes.spool, disk),
            Action::Forget(..) => {}
            Action::Adopt(_) | Action::Resume(..) | Action::Abandon(..) | Action::Recover(..) => {
                panic!("the filter held nothing for a new agent, and nothing was left behind")
            }
            Action::GiveHashes(disk, epoch, answer) => {
                if let Some(live) = self.ring(disk, epoch) {
                    live.worker.hashes().put(answer);
                }
            }
            Action::ReportSoon => self.next_tick = now,
            Action::DropCapture(disk, epoch) => {
                if self.ring(disk, epoch).is_some() {
                    self.rings.remove(&disk);
                }
            }
        }
    }

    fn ring(&mut self, disk: DiskId, epoch: Epoch) -> Option<&mut Live> {
        self.rings.get_mut(&disk).filter(|live| live.epoch == epoch)
    }

    fn attach(&mut self, order: &Attach) {
        self.clock.raise_to(order.clock_floor);
        let config = RingConfig {
            arena_bytes: self.sizes.arena_bytes,
            slots: self.sizes.slots,
            ..RingConfig::new(order.disk, order.epoch, order.first_lsn, order.disk_bytes)
        };
        let (ring, ring_fd) = Ring::create(&config).expect("a ring");
        let bell = Bell::create().expect("an eventfd");
        let bell_fd = bell.as_fd().try_clone_to_owned().expect("a descriptor");
        let producer = Producer::new(Arc::clone(&ring), self.clock.clone(), bell);
        let packed = Packed { lsn: order.first_lsn.prev(), stamp: Stamp::ZERO, disk_bytes: order.disk_bytes };
        let (outbox, writer) =
            Outbox::create(order.disk, order.epoch, self.sizes.outbox_bytes, packed, packed.lsn)
                .expect("an outbox");
        let consumer = Consumer::new(Arc::clone(&ring), self.clock.clone());
        let packer = Packer::new(order.disk, order.epoch, order.disk_bytes);
        let spool = Spool::open(&self.sizes.spool, order.disk, order.epoch);
        let of = (order.disk, order.epoch);
        let worker = Worker::new(of, Some(consumer), writer, packer, spool, packed.lsn);
        self.notes.push(format!("agent attaches {} at LSN {}", order.device, order.first_lsn));
        let live = Live {
            epoch: order.epoch,
            ring,
            producer,
            outbox,
            worker,
            next: Duration::ZERO,
            ending: None,
            ended: false,
        };
        self.rings.insert(order.disk, live);
        let clock_fd = self.clock_fd.try_clone().expect("a descriptor");
        let (request, device) = (order.request, order.device.clone());
        let fds = Box::new([ring_fd, clock_fd, bell_fd]);
        self.to_filters.push_back((order.filter, ToFilter::Attach { request, device, fds }));
    }

    /// One step of a disk's drain, if it is time for one.
    pub(crate) fn drain(&mut self, now: Duration, disk: DiskId) {
        let Some(live) = self.rings.get_mut(&disk).filter(|live| !live.ended && now >= live.next) else {
            return;
        };
        let step = live.worker.step(now, live.ending).unwrap_or_else(|stop| panic!("a sound ring: {stop}"));
        let (epoch, packed) = (live.epoch, live.worker.packed());
        // The server of this world has no hashes: every sync copies.
        while let Some(wanted) = live.worker.ask(now) {
            live.worker.hashes().put(Answer { wanted, hashes: None });
        }
        live.ended = step.pace == Pace::Ended;
        live.next = match step.pace {
            Pace::Poll => now + DRAIN_POLL,
            // A bell or room wakes it, which may be at once.
            Pace::Busy | Pace::Idle | Pace::Blocked | Pace::Ended => now,
        };
        let ended = live.ended;
        if let Some(lsn) = step.packed {
            self.handle(now, Event::Packed(disk, epoch, lsn));
        }
        if ended {
            self.handle(now, Event::Drained(disk, epoch, packed));
        }
    }
}

fn encode(message: &ToServer) -> Vec<u8> {
    let encoded = match message {
        ToServer::Hello(message) => wire::encode(message),
        ToServer::Inventory(message) => wire::encode(message),
        ToServer::OpenDisk(message) => wire::encode(message),
        ToServer::CommandResult(message) => wire::encode(message),
        ToServer::DiskStatus(message) => wire::encode(message),
        ToServer::HashRequest(message) => wire::encode(message),
        ToServer::Ping(message) => wire::encode(message),
        ToServer::Pong(message) => wire::encode_as(wire::MessageType::Pong, message),
    };
    encoded.expect("it encodes")
}
