//! The agent: its real session and, for each disk, its real drain worker (consumer, packer, outbox, spool), performed
//! by a single-threaded stand-in for the hub.

mod live;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use capture_ring::HostClock;
use capture_ring::control::CaptureFds;
use host_agent::drain::worker::Pace;
use host_agent::inbox::Inbox;
use host_agent::limits::{DRAIN_POLL, TICK};
use host_agent::session::{
    Action, Adopt, Attach, Ending, Event, FilterId, Holding, Identity, Session, ToServer,
};
use host_agent::spool::{self, SpoolPlace};
use journal_format::{DiskId, Epoch, ImageTag, Lsn, Stamp, wire};

pub(crate) use self::live::same_fds;
use self::live::{Live, Loaded, same};
use super::net::Conn;

/// What the agent asks of a filter.
pub(crate) enum ToFilter {
    Attach { request: u64, device: String, image: Option<ImageTag>, fds: Box<CaptureFds> },
    Detach { request: u64, device: String },
    Resync { device: String },
    Hold { request: u64, device: String, outbox: OwnedFd },
    Forget { device: String },
}

/// What a filter tells the agent.
pub(crate) enum ToAgent {
    Event(Event),
    Held(FilterId, Holding, CaptureFds),
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
    /// The world's time when it started.
    started: Duration,
    pub(crate) clock: HostClock,
    clock_fd: OwnedFd,
    /// The clocks of filters that came back with a former agent's.
    clocks: BTreeMap<FilterId, (HostClock, OwnedFd)>,
    held: BTreeMap<(FilterId, String), CaptureFds>,
    /// What is being read, beside the rest.
    loading: VecDeque<(Adopt, CaptureFds)>,
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
    /// Bookmarks that were put into rings: disk, LSN, stamp, name.
    pub(crate) bookmarks: Vec<(DiskId, Lsn, Stamp, String)>,
    /// Bytes that the running or last comparison has left out.
    pub(crate) equal_bytes: u64,
    /// So many more actions, then it dies.
    pub(crate) fuse: Option<u64>,
    /// Epochs whose frames this agent, or one before it, has thrown away: what is left of one may not fit together.
    pub(crate) discarded: BTreeSet<(DiskId, Epoch)>,
}

impl Agent {
    pub(crate) fn new(now: Duration, identity: Identity, sizes: Sizes, floor: Stamp) -> Self {
        let (clock, clock_fd) = HostClock::create().expect("a clock page");
        clock.raise_to(floor);
        let mut left = spool::left_behind(&sizes.spool);
        left.sort_unstable();
        let mut agent = Self {
            session: Session::new(identity),
            started: now,
            clock,
            clock_fd,
            clocks: BTreeMap::new(),
            held: BTreeMap::new(),
            loading: VecDeque::new(),
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
            bookmarks: Vec::new(),
            equal_bytes: 0,
            fuse: None,
            discarded: BTreeSet::new(),
        };
        for (disk, epoch, disk_bytes) in left {
            agent.notes.push(format!("agent finds a spool of {disk}, epoch {}", epoch.0));
            agent.handle(now, Event::SpoolLeft(disk, epoch, disk_bytes));
        }
        agent
    }

    /// It died amid what it did.
    pub(crate) fn is_dead(&self) -> bool {
        self.fuse == Some(0)
    }

    /// It was asked to stop, and may.
    pub(crate) fn is_flushed(&self) -> bool {
        self.session.is_flushed()
    }

    /// Takes what a filter says.
    pub(crate) fn hear(&mut self, now: Duration, said: ToAgent) {
        match said {
            ToAgent::Event(event) => {
                if let Event::FilterLost(filter) = &event {
                    self.clocks.remove(filter);
                    self.held.retain(|(holder, _), _| holder != filter);
                }
                self.handle(now, event);
            }
            ToAgent::Held(filter, holding, fds) => {
                let clock = HostClock::open(fds.clock.as_fd()).expect("an agent made it");
                self.clock.raise_to(clock.last());
                self.clocks.entry(filter).or_insert_with(|| (clock, same(&fds.clock)));
                self.held.insert((filter, holding.device.clone()), fds);
                self.handle(now, Event::FilterHolds(filter, holding));
            }
        }
    }

    /// What is being read has been read.
    pub(crate) fn load(&mut self, now: Duration) {
        let Some((order, fds)) = self.loading.pop_front() else { return };
        let outcome = Live::adopt(order.disk, order.epoch, fds, &self.sizes);
        if !self.session.awaits(&order) {
            return;
        }
        match outcome {
            Ok(Loaded { live, outbox, acked, packed }) => {
                self.rings.insert(order.disk, live);
                self.handle(now, Event::Loaded(order.disk, order.epoch, acked, packed));
                let hold = ToFilter::Hold { request: order.request, device: order.device, outbox };
                self.to_filters.push_back((order.filter, hold));
            }
            Err(error) => {
                let is_known = self.discarded.contains(&(order.disk, order.epoch));
                assert!(is_known, "what an agent left cannot be adopted: {error}");
                self.notes.push(format!("agent cannot adopt {}: {error}", order.device));
                self.handle(now, Event::FilterResult(order.filter, order.request, error.to_string()));
            }
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
            let spool_bytes = self.sizes.spool.limit_bytes;
            let sample = self.ring(disk, epoch).map(|live| live.sample(spool_bytes));
            if let Some(sample) = sample {
                self.handle(now, Event::Sampled(disk, epoch, sample));
            }
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
            for action in self.session.handle(now.saturating_sub(self.started), event) {
                match &mut self.fuse {
                    Some(0) => return,
                    Some(left) => *left -= 1,
                    None => {}
                }
                self.perform(now, action);
            }
        }
    }

    fn perform(&mut self, now: Duration, action: Action) {
        match action {
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
            Action::ReportSoon => self.next_tick = now,
            Action::Adopt(order) => {
                if let Some(fds) = self.held.remove(&(order.filter, order.device.clone())) {
                    self.notes.push(format!("agent adopts {} of epoch {}", order.device, order.epoch.0));
                    self.loading.push_back((order, fds));
                }
            }
            Action::Resume(disk, epoch) => self.resume(disk, epoch),
            Action::Abandon(disk, epoch) => {
                if self.ring(disk, epoch).is_some() {
                    self.rings.remove(&disk);
                }
            }
            Action::Forget(filter, device) => {
                self.held.remove(&(filter, device.clone()));
                self.to_filters.push_back((filter, ToFilter::Forget { device }));
            }
            Action::Recover(disk, epoch, durable) => self.recover(disk, epoch, durable),
            Action::DropSpool(disk) => spool::discard(&self.sizes.spool, disk),
            Action::EndRing(disk, epoch, ending) => {
                if ending != Ending::AgentStops {
                    self.resume(disk, epoch);
                }
                match self.ring(disk, epoch).filter(|live| matches!(live.work, live::Work::Running(_))) {
                    // The largest wins, as in the product.
                    Some(live) if live.ending != Some(Ending::AgentStops) => live.ending = Some(ending),
                    Some(_) => {}
                    None => self.queue.push_back(Event::Drained(disk, epoch, Lsn::ZERO)),
                }
            }
            _ => self.perform_on_ring(action),
        }
    }

    fn perform_on_ring(&mut self, action: Action) {
        match action {
            Action::Durable(disk, epoch, lsn) => {
                if let Some((ring, _)) = self.ring(disk, epoch).and_then(|live| live.ring.as_ref()) {
                    ring.set_durable_lsn(lsn);
                }
            }
            Action::SetPolicy(disk, epoch, policy) => {
                if let Some((ring, _)) = self.ring(disk, epoch).and_then(|live| live.ring.as_ref()) {
                    ring.set_policy(policy);
                }
            }
            Action::Release(disk, epoch, lsn) => {
                if let Some(live) = self.ring(disk, epoch) {
                    live.outbox.release(lsn);
                }
            }
            Action::PutBookmark(disk, request, name) => {
                let producer = self.rings.get(&disk).and_then(|live| live.producer.as_ref());
                let put = match producer {
                    Some(producer) => producer.bookmark(&name).map_err(|full| full.to_string()),
                    None => Err("the disk is not being captured now".to_owned()),
                };
                if let Ok((lsn, stamp)) = put {
                    self.bookmarks.push((disk, lsn, stamp, name));
                }
                self.queue.push_back(Event::BookmarkPut(disk, request, put));
            }
            Action::Discard(disk, epoch) => {
                self.discarded.insert((disk, epoch));
                if let Some(live) = self.ring(disk, epoch) {
                    live.discarded = true;
                    if let Some(worker) = live.worker() {
                        worker.discard();
                    }
                }
            }
            Action::GiveHashes(disk, epoch, answer) => {
                if let Some(worker) = self.ring(disk, epoch).and_then(Live::worker) {
                    worker.hashes().put(answer);
                }
            }
            Action::DropCapture(disk, epoch) => {
                if self.ring(disk, epoch).is_some() {
                    self.rings.remove(&disk);
                    spool::discard(&self.sizes.spool, disk);
                    self.notes.push(format!("agent has closed epoch {} of {disk}", epoch.0));
                }
            }
            other => unreachable!("performed elsewhere: {other:?}"),
        }
    }

    fn resume(&mut self, disk: DiskId, epoch: Epoch) {
        if let Some(Err(error)) = self.ring(disk, epoch).map(Live::resume) {
            panic!("an adopted ring does not go on where its outbox ends: {error}");
        }
    }

    fn recover(&mut self, disk: DiskId, epoch: Epoch, durable: Lsn) {
        match Live::recover(disk, epoch, durable, &self.sizes) {
            Some(live) => {
                self.notes.push(format!("agent ships the spool of {disk} after LSN {durable}"));
                self.rings.insert(disk, live);
            }
            None => {
                self.notes.push(format!("the spool of {disk} does not go on at LSN {durable}"));
                spool::discard(&self.sizes.spool, disk);
                self.queue.push_back(Event::Drained(disk, epoch, durable));
            }
        }
    }

    fn ring(&mut self, disk: DiskId, epoch: Epoch) -> Option<&mut Live> {
        self.rings.get_mut(&disk).filter(|live| live.epoch == epoch)
    }

    fn attach(&mut self, order: &Attach) {
        let own = (&self.clock, &self.clock_fd);
        let (clock, fd) = self.clocks.get(&order.filter).map_or(own, |(clock, fd)| (clock, fd));
        let (live, fds) = Live::start(order, (clock, same(fd)), &self.sizes);
        self.notes.push(format!(
            "agent attaches {} at LSN {}, image {:?}",
            order.device, order.first_lsn, order.closed_image
        ));
        self.rings.insert(order.disk, live);
        let (request, device) = (order.request, order.device.clone());
        let attach = ToFilter::Attach { request, device, image: order.closed_image, fds: Box::new(fds) };
        self.to_filters.push_back((order.filter, attach));
    }

    /// One step of a disk's drain, if it is time for one.
    pub(crate) fn drain(&mut self, now: Duration, disk: DiskId) {
        let due = |live: &&mut Live| !live.ended && now >= live.next;
        let Some(live) = self.rings.get_mut(&disk).filter(due) else { return };
        let (epoch, ending) = (live.epoch, live.ending);
        let Some(worker) = live.worker() else { return };
        let step = worker.step(now, ending).unwrap_or_else(|stop| panic!("a sound ring: {stop}"));
        let (packed, mut asked) = (worker.packed(), Vec::new());
        let [.., equal_bytes, _] = worker.sync_bytes().get();
        while let Some(wanted) = worker.ask(now) {
            asked.push(wanted);
        }
        self.equal_bytes = equal_bytes;
        live.ended = step.pace == Pace::Ended;
        live.next = match step.pace {
            Pace::Poll => now + DRAIN_POLL,
            // A bell or room wakes it, which may be at once.
            Pace::Busy | Pace::Idle | Pace::Blocked | Pace::Ended => now,
        };
        let ended = live.ended;
        for wanted in asked {
            self.handle(now, Event::HashesWanted(disk, epoch, wanted));
        }
        if let Some(lsn) = step.packed {
            self.handle(now, Event::Packed(disk, epoch, lsn));
        }
        if ended {
            self.handle(now, Event::Drained(disk, epoch, packed));
        }
    }

    /// Of a disk's epoch: what the agent holds durable in ring and outbox, what it has packed, and what was captured.
    pub(crate) fn numbers(&mut self, disk: DiskId) -> Option<Numbers> {
        let live = self.rings.get_mut(&disk)?;
        let packed = live.worker().map(|worker| worker.packed());
        let (ring, _) = live.ring.as_ref()?;
        Some(Numbers {
            first: ring.config().first_lsn,
            told: ring.durable_lsn(),
            released: if live.discarded { Lsn::ZERO } else { live.outbox.durable() },
            packed,
            captured: ring.captured_lsn(),
        })
    }
}

/// See [`Agent::numbers`].
pub(crate) struct Numbers {
    pub(crate) first: Lsn,
    pub(crate) told: Lsn,
    pub(crate) released: Lsn,
    pub(crate) packed: Option<Lsn>,
    pub(crate) captured: Lsn,
}

fn encode(message: &ToServer) -> Vec<u8> {
    let encoded = match message {
        ToServer::Hello(message) => wire::encode(message),
        ToServer::Inventory(message) => wire::encode(message),
        ToServer::OpenDisk(message) => wire::encode(message),
        ToServer::CommandResult(message) => wire::encode(message),
        ToServer::CloseDisk(message) => wire::encode(message),
        ToServer::DiskStatus(message) => wire::encode(message),
        ToServer::HashRequest(message) => wire::encode(message),
        ToServer::Ping(message) => wire::encode(message),
        ToServer::Pong(message) => wire::encode_as(wire::MessageType::Pong, message),
    };
    encoded.expect("it encodes")
}
