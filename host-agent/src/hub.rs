//! The hub: the thread that drives the session. It alone talks to the server, and it performs what the session decides.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Instant;

use capture_ring::HostClock;
use capture_ring::control::CaptureFds;
use journal_format::{DiskId, Epoch, FormatError, GapReason, Lsn, wire};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::eventfd::EventFd;

use crate::config::Config;
use crate::drill::Drill;
use crate::error::AgentError;
use crate::events::{Input, Sender};
use crate::filters::FilterLink;
use crate::inbox::Inbox;
use crate::limits::{
    CONNECT_TIMEOUT, EVENT_QUEUE, MAX_UNSENT_BYTES, SEND_BATCH_BYTES, SEND_BATCH_FRAMES, STATUS_EVERY,
    STOP_FLUSH, TICK,
};
use crate::link::Link;
use crate::live::{Live, Loaded};
use crate::seam::batch::SendBatch;
use crate::seam::plain::poll_timeout;
use crate::session::{
    Action, Adopt, Attach, Ending, Event, FilterId, Holding, Identity, Session, ToServer, VmInfo,
};
use crate::socket::Connected;
use crate::spool;

/// The driver of the session.
pub struct Hub {
    config: Config,
    session: Session,
    started: Instant,
    clock: HostClock,
    clock_fd: OwnedFd,
    inputs: Receiver<Input>,
    sender: Sender,
    wake: Arc<EventFd>,
    link: Option<Link>,
    /// Number of the newest attempt to connect; the outcome of an older one is ignored.
    attempt: u64,
    /// Since the last connection.
    failed_attempts: u64,
    inbox: Inbox,
    /// Encoded messages that go out before the next frame.
    unsent: Vec<u8>,
    filters: HashMap<FilterId, Arc<FilterLink>>,
    /// Lost filters whose processes still hold rings.
    watched: Vec<(FilterId, Arc<FilterLink>)>,
    rings: HashMap<DiskId, Live>,
    /// What filters hold, by filter and device, until the session decides about it.
    held: HashMap<(FilterId, String), CaptureFds>,
    /// The clocks of filters that a former agent's clock came back with: all disks of one process share one.
    clocks: HashMap<FilterId, (HostClock, OwnedFd)>,
    queue: VecDeque<Event>,
    next_tick: Instant,
    next_status: Instant,
    stop_at: Option<Instant>,
}

impl Hub {
    /// A hub that has not begun.
    ///
    /// # Errors
    /// When the host's clock page cannot be made.
    pub fn new(
        config: Config,
        identity: Identity,
        sender: Sender,
        inputs: Receiver<Input>,
        wake: Arc<EventFd>,
    ) -> Result<Self, AgentError> {
        let (clock, clock_fd) = HostClock::create().map_err(|error| AgentError::Ring(error.to_string()))?;
        let now = Instant::now();
        Ok(Self {
            config,
            session: Session::new(identity),
            started: now,
            clock,
            clock_fd,
            inputs,
            sender,
            wake,
            link: None,
            attempt: 0,
            failed_attempts: 0,
            inbox: Inbox::default(),
            unsent: Vec::new(),
            filters: HashMap::new(),
            watched: Vec::new(),
            rings: HashMap::new(),
            held: HashMap::new(),
            clocks: HashMap::new(),
            queue: VecDeque::new(),
            next_tick: now,
            next_status: now,
            stop_at: None,
        })
    }

    /// Runs until the agent was stopped and its outboxes are empty, or the time for that is over.
    pub fn run(mut self) {
        for (disk, epoch, disk_bytes) in spool::left_behind(&self.config.spool) {
            tracing::info!(%disk, epoch = epoch.0, "a former agent left frames in the spool");
            self.handle(Event::SpoolLeft(disk, epoch, disk_bytes));
        }
        loop {
            self.take_inputs();
            self.tick_if_due();
            self.read_messages();
            self.send();
            if self.is_over() {
                self.filters.values().for_each(|link| link.close());
                return;
            }
            self.wait();
        }
    }

    fn is_over(&self) -> bool {
        self.stop_at.is_some_and(|at| self.session.is_flushed() || Instant::now() >= at)
    }

    fn take_inputs(&mut self) {
        // Before the queue is looked at: whoever sends later wakes us again.
        let _ = self.wake.read();
        for _ in 0..EVENT_QUEUE {
            let Ok(input) = self.inputs.try_recv() else { return };
            match input {
                Input::Event(event) => self.handle(event),
                Input::Filter(filter, link, info) => self.filter_joined(filter, link, info),
                Input::Held(filter, holding, fds) => self.filter_holds(filter, holding, fds),
                Input::Loaded(order, outcome) => self.loaded(&order, outcome),
                Input::Provided(order, fds) => self.provided(&order, &fds),
                Input::Connected(attempt, outcome) => self.connected(attempt, outcome),
            }
        }
        // There may be more: do not sleep on it.
        let _ = self.wake.write(1);
    }

    fn filter_joined(&mut self, filter: FilterId, link: Arc<FilterLink>, info: VmInfo) {
        // The threads of both connections tell us what they see, in any order: a process that has connected again must not
        // meet itself.
        let ended = self.filters.iter().filter(|(_, old)| old.has_ended_before(&link));
        for old in ended.map(|(old, _)| *old).collect::<Vec<_>>() {
            self.handle(Event::FilterLost(old));
        }
        self.filters.insert(filter, link);
        self.handle(Event::FilterUp(filter, info));
    }

    fn filter_holds(&mut self, filter: FilterId, holding: Holding, fds: CaptureFds) {
        let clock = HostClock::open(fds.clock.as_fd()).ok().zip(fds.clock.try_clone().ok());
        if let Some(clock) = clock {
            self.clock.raise_to(clock.0.last());
            self.clocks.entry(filter).or_insert(clock);
        }
        self.held.insert((filter, holding.device.clone()), fds);
        self.handle(Event::FilterHolds(filter, holding));
    }

    /// Reads what a filter holds, beside the hub: it may take a while.
    fn adopt(&mut self, order: Adopt) {
        let Some(fds) = self.held.remove(&(order.filter, order.device.clone())) else { return };
        let (config, sender) = (self.config.clone(), self.sender.clone());
        let (filter, request) = (order.filter, order.request);
        let spawned = std::thread::Builder::new().name("cdp-adopt".into()).spawn(move || {
            let outcome = Live::adopt(order.disk, order.epoch, fds, &config, &sender);
            let _ = sender.send(Input::Loaded(order, outcome.map(Box::new)));
        });
        if let Err(error) = spawned {
            let why = format!("cannot start a thread: {error}");
            self.queue.push_back(Event::FilterResult(filter, request, why));
        }
    }

    fn loaded(&mut self, order: &Adopt, outcome: Result<Box<Loaded>, AgentError>) {
        if !self.session.awaits(order) {
            return;
        }
        match outcome {
            Ok(loaded) => {
                let Loaded { live, outbox, acked, packed } = *loaded;
                self.rings.insert(order.disk, live);
                self.handle(Event::Loaded(order.disk, order.epoch, acked, packed));
                self.ask(order.filter, order.request, |link| {
                    link.hold(order.request, &order.device, &outbox)
                });
            }
            Err(error) => {
                self.handle(Event::FilterResult(order.filter, order.request, error.to_string()));
            }
        }
    }

    fn connected(&mut self, attempt: u64, outcome: std::io::Result<Connected>) {
        if attempt != self.attempt || self.link.is_some() {
            return;
        }
        let link =
            outcome.and_then(|socket| Link::new(socket, Arc::clone(&self.wake), self.config.no_io_uring));
        match link {
            Ok(link) => {
                tracing::info!(server = %self.config.server, driver = link.driver(), tls = link.is_encrypted(), "connected");
                self.link = Some(link);
                self.failed_attempts = 0;
                self.handle(Event::ServerConnected);
            }
            Err(error) => {
                self.failed_attempts += 1;
                // The 1st, 2nd, 4th, 8th, … time: a server that is down for a night does not fill the log.
                if self.failed_attempts.is_power_of_two() {
                    let (server, times) = (&self.config.server, self.failed_attempts);
                    tracing::warn!(%server, %error, times, "cannot connect; is cdp-server running there? trying on");
                }
                self.handle(Event::ServerLost);
            }
        }
    }

    fn tick_if_due(&mut self) {
        let now = Instant::now();
        if now < self.next_tick {
            return;
        }
        self.next_tick = now + TICK;
        if self.link.is_some()
            && let Some(error) = self.config.drill.as_ref().and_then(Drill::cut)
        {
            self.drop_link(&error.to_string(), true);
        }
        let dead = self.watched.extract_if(.., |(_, link)| link.is_dead()).map(|(filter, _)| filter);
        let dead: Vec<FilterId> = dead.collect();
        for filter in dead {
            self.handle(Event::ProcessDead(filter));
        }
        self.sample(now);
        self.handle(Event::Tick);
    }

    /// Looks at every ring when reports are due, at those that wait for room on every tick.
    fn sample(&mut self, now: Instant) {
        let all = now >= self.next_status;
        if all {
            self.next_status = now + STATUS_EVERY;
        }
        let live: Vec<(DiskId, Epoch)> = self.session.live().collect();
        for (disk, epoch) in live {
            if let Some(live) = self.ring(disk, epoch).filter(|live| all || live.is_tracking()) {
                let sample = live.sample();
                self.handle(Event::Sampled(disk, epoch, sample));
            }
        }
    }

    fn read_messages(&mut self) {
        while self.link.is_some() {
            match self.inbox.next() {
                Ok(Some(message)) => self.handle(message.into()),
                Ok(None) => return,
                Err(error) => self.drop_link(&error.to_string(), true),
            }
        }
    }

    /// Gives the socket more to do if it is idle: control messages first, then frames of all disks in turn.
    fn send(&mut self) {
        if self.config.drill.as_ref().is_some_and(Drill::stalls_sends) {
            return;
        }
        let Some(link) = self.link.as_mut().filter(|link| !link.is_sending()) else { return };
        let mut batch = SendBatch::default();
        if !self.unsent.is_empty() {
            batch.push_bytes(core::mem::take(&mut self.unsent));
        }
        let (mut bytes, mut frames) = (0, 0);
        while bytes < SEND_BATCH_BYTES && frames < SEND_BATCH_FRAMES {
            let Some(next) = self.session.next_to_ship() else { break };
            let Some(live) = self.rings.get(&next.disk).filter(|live| live.epoch == next.epoch) else {
                break;
            };
            let (bytes_left, frames_left) = (SEND_BATCH_BYTES - bytes, SEND_BATCH_FRAMES - frames);
            let entries = live.outbox.entries(next.from, next.to, bytes_left, frames_left);
            let (Some(first), Some(last)) = (entries.first(), entries.last()) else { break };
            debug_assert!(
                first.first_lsn <= next.from,
                "a frame between the acknowledged and the oldest is missing"
            );
            for entry in &entries {
                batch.push_memory(live.outbox.memory(), entry.at, entry.len);
                bytes += entry.len;
                frames += 1;
            }
            self.session.shipped(next.disk, next.epoch, last.last_lsn);
        }
        let started = if batch.is_done() { Ok(()) } else { link.start_send(batch) };
        if let Err(error) = started {
            self.drop_link(&error.to_string(), true);
        }
    }

    fn wait(&mut self) {
        let timeout = self.next_tick.saturating_duration_since(Instant::now());
        let Some(link) = &mut self.link else {
            let mut fds = [PollFd::new(self.wake.as_fd(), PollFlags::POLLIN)];
            // A failed or interrupted wait is an early return, which the loop expects anyway.
            let _ = poll(&mut fds, poll_timeout(timeout));
            return;
        };
        if let Err(error) = link.wait(timeout, self.inbox.buffer()) {
            // What came before the end may still be whole messages, but their answers could not be sent.
            self.drop_link(&error.to_string(), true);
        }
    }

    fn drop_link(&mut self, reason: &str, tell: bool) {
        if self.link.take().is_some() {
            tracing::warn!(
                server = %self.config.server,
                reason,
                "connection ended; frames are kept until it is back"
            );
        }
        self.inbox.clear();
        self.unsent.clear();
        if tell {
            self.handle(Event::ServerLost);
        }
    }

    /// Gives an event to the session and performs its actions, and the events that those bring about.
    fn handle(&mut self, event: Event) {
        if matches!(event, Event::Stop) && self.stop_at.is_none() {
            tracing::info!("stopping: shipping what the outboxes hold");
            self.stop_at = Some(Instant::now() + STOP_FLUSH);
        }
        if let Event::FilterLost(filter) = &event {
            self.clocks.remove(filter);
            self.held.retain(|(holder, _), _| holder != filter);
        }
        if let Event::FilterLost(filter) = &event {
            // Its thread tells what is known already when the process has connected again.
            let Some(link) = self.filters.remove(filter) else { return };
            link.close();
            self.watched.push((*filter, link));
        }
        self.queue.push_back(event);
        while let Some(event) = self.queue.pop_front() {
            let lost = match &event {
                Event::FilterLost(filter) => Some(*filter),
                _ => None,
            };
            let actions = self.session.handle(self.started.elapsed(), event);
            if let Some(filter) = lost
                && !actions.contains(&Action::Watch(filter))
            {
                self.watched.retain(|(id, _)| *id != filter);
            }
            for action in actions {
                self.perform(action);
            }
        }
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::Connect => self.connect(),
            Action::Disconnect(reason) => self.drop_link(&reason, false),
            Action::Send(message) => self.enqueue(&message),
            Action::Attach(order) => self.attach(order),
            Action::Detach(filter, request, device) => {
                self.ask(filter, request, |link| link.detach(request, &device));
            }
            Action::Resync(filter, request, device) => {
                self.ask(filter, request, |link| link.resync(request, &device));
            }
            Action::Watch(_) => self.next_tick = Instant::now(),
            Action::ReportSoon => (self.next_tick, self.next_status) = (Instant::now(), Instant::now()),
            Action::Adopt(order) => self.adopt(order),
            Action::Resume(disk, epoch) => self.resume(disk, epoch),
            Action::Abandon(disk, epoch) => {
                if self.ring(disk, epoch).is_some() {
                    self.rings.remove(&disk);
                }
            }
            Action::Forget(filter, device) => {
                self.held.remove(&(filter, device.clone()));
                self.ask(filter, 0, |link| link.forget(&device));
            }
            Action::Recover(disk, epoch, durable) => self.recover(disk, epoch, durable),
            Action::DropSpool(disk) => spool::discard(&self.config.spool, disk),
            Action::EndRing(disk, epoch, ending) => {
                if ending != Ending::AgentStops {
                    self.resume(disk, epoch);
                }
                // Where there is no drain to answer, nothing was taken, or nothing can be.
                if !self.ring(disk, epoch).is_some_and(|live| live.end(ending)) {
                    self.queue.push_back(Event::Drained(disk, epoch, Lsn::ZERO));
                }
            }
            Action::Durable(disk, epoch, lsn) => {
                if let Some(live) = self.ring(disk, epoch) {
                    live.set_durable(lsn);
                }
            }
            Action::SetPolicy(disk, epoch, policy) => {
                if let Some(live) = self.ring(disk, epoch) {
                    live.set_policy(policy);
                }
            }
            Action::Release(disk, epoch, lsn) => {
                if let Some(live) = self.ring(disk, epoch) {
                    live.outbox.release(lsn);
                }
            }
            Action::PutBookmark(disk, request, name) => {
                let gone = || Err("the disk is not being captured now".to_owned());
                let result = self.rings.get(&disk).map_or_else(gone, |live| live.bookmark(&name));
                self.queue.push_back(Event::BookmarkPut(disk, request, result));
            }
            Action::Discard(disk, epoch) => {
                if let Some(live) = self.ring(disk, epoch) {
                    live.discard();
                }
            }
            Action::GiveHashes(disk, epoch, answer) => {
                if let Some(live) = self.ring(disk, epoch) {
                    live.give_hashes(answer);
                }
            }
            Action::DropCapture(disk, epoch) => {
                if self.ring(disk, epoch).is_some() {
                    self.rings.remove(&disk);
                    spool::discard(&self.config.spool, disk);
                    tracing::info!(%disk, epoch = epoch.0, "capture closed");
                }
            }
        }
    }

    fn resume(&mut self, disk: DiskId, epoch: Epoch) {
        let live = self.rings.get_mut(&disk).filter(|live| live.epoch == epoch);
        if let Some(Err(error)) = live.map(Live::resume) {
            self.queue.push_back(Event::RingFault(disk, epoch, GapReason::AgentLost, error.to_string()));
        }
    }

    fn recover(&mut self, disk: DiskId, epoch: Epoch, durable: Lsn) {
        match Live::recover(disk, epoch, durable, &self.config, &self.sender) {
            Ok(live) => {
                tracing::info!(%disk, epoch = epoch.0, %durable, "shipping what is in the spool");
                self.rings.insert(disk, live);
            }
            Err(error) => {
                tracing::warn!(%disk, %error, %durable,
                    "the spool does not go on where the server's journal ends; it is thrown away");
                spool::discard(&self.config.spool, disk);
                self.queue.push_back(Event::Drained(disk, epoch, durable));
            }
        }
    }

    fn ring(&self, disk: DiskId, epoch: Epoch) -> Option<&Live> {
        self.rings.get(&disk).filter(|live| live.epoch == epoch)
    }

    fn enqueue(&mut self, message: &ToServer) {
        if self.link.is_none() {
            return;
        }
        match encode(message) {
            Ok(bytes) => self.unsent.extend_from_slice(&bytes),
            Err(error) => tracing::error!(%error, "a message to the server is too large; it is left out"),
        }
        if self.unsent.len() > MAX_UNSENT_BYTES {
            self.drop_link("the server does not take messages", true);
        }
    }

    /// Asks a filter; one that cannot be asked is closed, and its end is an event like any other's.
    fn ask(
        &mut self,
        filter: FilterId,
        request: u64,
        ask: impl FnOnce(&FilterLink) -> Result<(), AgentError>,
    ) {
        let Some(link) = self.filters.get(&filter) else { return };
        if let Err(error) = ask(link) {
            tracing::warn!(?filter, request, %error, "cannot ask a filter; closing its connection");
            link.close();
        }
    }

    fn attach(&mut self, order: Attach) {
        let (clock, clock_fd) =
            self.clocks.get(&order.filter).map_or((&self.clock, &self.clock_fd), |(clock, fd)| (clock, fd));
        let made = clock_fd
            .try_clone()
            .map_err(AgentError::os("cannot duplicate the clock"))
            .and_then(|fd| Live::start(&order, (clock, fd), &self.config, &self.sender));
        match made {
            Ok((live, fds)) => {
                tracing::info!(disk = %order.disk, device = order.device, epoch = order.epoch.0,
                    first_lsn = order.first_lsn.0, "capture starts");
                let provider = live.provider();
                self.rings.insert(order.disk, live);
                self.provide(order, fds, provider);
            }
            Err(error) => {
                tracing::error!(disk = %order.disk, %error, "cannot make a ring and an outbox");
                let refused = format!("the agent cannot make a ring and an outbox: {error}");
                self.queue.push_back(Event::FilterResult(order.filter, order.request, refused));
            }
        }
    }

    /// Has a new ring's memory provided, beside the hub, before the filter is asked to attach. The session waits for that answer
    /// whatever else happens to the disk, so there is one in any case.
    fn provide(&mut self, order: Attach, fds: CaptureFds, provider: impl FnOnce() + Send + 'static) {
        let sender = self.sender.clone();
        let (filter, request) = (order.filter, order.request);
        let spawned = std::thread::Builder::new().name("cdp-provide".into()).spawn(move || {
            provider();
            let _ = sender.send(Input::Provided(order, fds));
        });
        if let Err(error) = spawned {
            let why = format!("cannot start a thread: {error}");
            self.queue.push_back(Event::FilterResult(filter, request, why));
        }
    }

    fn provided(&mut self, order: &Attach, fds: &CaptureFds) {
        if self.stop_at.is_some() {
            // Nobody would drain the ring.
            let why = "the agent is stopping; try again when it runs".to_owned();
            return self.handle(Event::FilterResult(order.filter, order.request, why));
        }
        self.ask(order.filter, order.request, |link| {
            link.attach(order.request, &order.device, order.closed_image, fds)
        });
    }

    fn connect(&mut self) {
        self.attempt += 1;
        let (attempt, address, sender) = (self.attempt, self.config.server.clone(), self.sender.clone());
        // Names and connects may take seconds; the hub must not.
        let tls = self.config.tls.clone();
        let cut = self.config.drill.as_ref().and_then(Drill::cut);
        let spawned = std::thread::Builder::new().name("cdp-connect".into()).spawn(move || {
            let outcome = cut.map_or_else(|| address.connect(CONNECT_TIMEOUT, tls.as_ref()), Err);
            let _ = sender.send(Input::Connected(attempt, outcome));
        });
        if let Err(error) = spawned {
            tracing::warn!(%error, "cannot start a thread to connect");
            self.queue.push_back(Event::ServerLost);
        }
    }
}

fn encode(message: &ToServer) -> Result<Vec<u8>, FormatError> {
    match message {
        ToServer::Hello(message) => wire::encode(message),
        ToServer::Inventory(message) => wire::encode(message),
        ToServer::OpenDisk(message) => wire::encode(message),
        ToServer::CommandResult(message) => wire::encode(message),
        ToServer::CloseDisk(message) => wire::encode(message),
        ToServer::DiskStatus(message) => wire::encode(message),
        ToServer::HashRequest(message) => wire::encode(message),
        ToServer::Ping(message) => wire::encode(message),
        ToServer::Pong(message) => wire::encode_as(wire::MessageType::Pong, message),
    }
}
