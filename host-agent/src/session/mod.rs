//! The session: everything the agent decides, as a state machine without I/O.
//!
//! [`Session::handle`] takes the time and an [`Event`] and returns [`Action`]s; the hub's thread is its driver. What
//! may be sent is asked with [`Session::next_to_ship`], because sending depends on the socket's pace.
//!
//! A disk under protection is a `Capture`, in one of these phases:
//!
//! ```text
//!  SetProtection(on)                                  filter: ok
//!  ────────► Opening ──DiskOpened──► Attaching ───────────────► Capturing
//!               │ refused, lost          │ filter: error            │ SetProtection(off), fault, device gone,
//!               ▼                        │                          │ server lost its place or has another owner
//!            (gone)                      │                          ▼
//!               ▲                        │        filter: ok     Detaching
//!               │ drained and acked      ▼ ◄────────────────────────┘
//!               └─────────────────── Draining ◄──process dead── Orphaned ◄── filter lost (from any but Opening)
//!                                        ▲                          └─ same process back ──► Capturing
//!  a filter holds a former agent's ring ─┼─► Adopting ──it holds the new outbox──► Capturing (or Draining)
//!  frames of a former agent in the spool ┴── Recovering
//! ```
//!
//! For every capture `packed ≥ shipped ≥ acked`: records in the outbox, handed to the socket, durable at the server
//! (the ring's own `captured ≥ packed`). `Session::check` asserts it after every event.

mod adoption;
mod capture;
mod claims;
mod commands;
mod filters;
mod inventory;
mod server;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use capture_ring::Policy;
use journal_format::{DiskId, Epoch, GapReason, ImageTag, Lsn, Stamp, wire};

pub use self::adoption::{Adopt, Holding};
pub use self::inventory::{DiskInfo, VmInfo};
pub use self::server::ServerMessage;

use self::capture::{Capture, Phase};
use self::claims::Said;
use self::inventory::Inventory;
use self::server::Server;
use crate::compare::{Answer, Wanted};
use crate::identity::HostId;

/// A filter's connection, numbered in the order of connecting and never used again.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FilterId(pub u64);

/// Who the agent is.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Names the host for ever.
    pub host_id: HostId,
    /// Name for people.
    pub host_name: String,
    /// Token for the server, or empty.
    pub token: String,
}

/// How a ring should come to its end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ending {
    /// Nothing is published any more: take what is there, until the ring is empty.
    Detached,
    /// The process died: also close the slots it had reserved, and say what it had issued.
    Dead,
    /// The agent stops: pack what was taken, leave the rest in the ring.
    AgentStops,
}

/// How a disk is to be protected, as the server says.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Settings {
    /// What happens when the ring is full, and at a guest's flush.
    pub policy: Policy,
    /// Size of the next ring in MiB; 0 for the agent's own default.
    pub ring_mib: u32,
}

/// What a drain thread saw of its ring and outbox, and the outbox's fill.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// `capturing`, `tracking` or `off`.
    pub mode: &'static str,
    /// Last LSN reserved in the ring.
    pub captured_lsn: Lsn,
    /// Stamp of the newest record taken out.
    pub captured_stamp: Stamp,
    /// Whether the ring would take requests again.
    pub ring_has_room: bool,
    /// Bytes of arena in use.
    pub ring_used_bytes: u64,
    /// Bytes of arena.
    pub ring_bytes: u64,
    /// Bytes of disk still to be synced.
    pub dirty_bytes: u64,
    /// Bytes that the running or last sync has read back, holes left out.
    pub sync_read_bytes: u64,
    /// Those that were compared with hashes of the server's.
    pub sync_compared_bytes: u64,
    /// Those that were left out because the server has them.
    pub sync_equal_bytes: u64,
    /// Those that are shipped.
    pub sync_shipped_bytes: u64,
    /// Bytes used in the outbox.
    pub outbox_used_bytes: u64,
    /// Bytes of outbox.
    pub outbox_bytes: u64,
    /// Bytes of files in the spool.
    pub spool_used_bytes: u64,
    /// Most bytes of files that the spool may have.
    pub spool_bytes: u64,
    /// Why the spool cannot be written to; empty when it can.
    pub spool_trouble: String,
    /// Raw bytes in the outbox.
    pub unacked_bytes: u64,
    /// Guest requests and flushes that wait.
    pub waiting: u64,
    /// For how long some have waited without a break.
    pub waited: Duration,
    /// Sync mode: `off`, `in-force`, `suspended` or `lost`.
    pub sync: &'static str,
    /// The host's clock.
    pub host_stamp: Stamp,
}

/// Something happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// A filter connected and said who it is.
    FilterUp(FilterId, VmInfo),
    /// A filter's complete list of disks.
    FilterDisks(FilterId, Vec<DiskInfo>),
    /// A filter holds the descriptors of an agent's capture, this one's or a former one's. Comes before its disks.
    FilterHolds(FilterId, Holding),
    /// What a filter holds has been read: of which disk and epoch, the LSN before the oldest frame in the outbox and
    /// the LSN of the newest.
    Loaded(DiskId, Epoch, Lsn, Lsn),
    /// A former agent has left frames of that disk and epoch in the spool; the disk's size then.
    SpoolLeft(DiskId, Epoch, u64),
    /// A filter's answer to a request; an empty message when it was done.
    FilterResult(FilterId, u64, String),
    /// A filter switched a device's capture off because of a fault in itself.
    FilterFault(FilterId, String, String),
    /// A filter's connection ended; its process may live on.
    FilterLost(FilterId),
    /// The process of a lost filter is dead.
    ProcessDead(FilterId),
    /// The TCP connection is there.
    ServerConnected,
    /// It is not, or not any more.
    ServerLost,
    /// A message from the server.
    Server(ServerMessage),
    /// Frames up to this LSN are in the outbox.
    Packed(DiskId, Epoch, Lsn),
    /// The drain thread has come to its end; the last LSN it packed.
    Drained(DiskId, Epoch, Lsn),
    /// What was captured cannot be used any more: whose loss that is, and what happened. The drain thread has ended.
    RingFault(DiskId, Epoch, GapReason, String),
    /// The bookmark that was asked for is in the ring, or why not.
    BookmarkPut(DiskId, u64, Result<(Lsn, Stamp), String>),
    /// What a capture looks like now.
    Sampled(DiskId, Epoch, Sample),
    /// The drain thread wants to know what the server has there.
    HashesWanted(DiskId, Epoch, Wanted),
    /// Time passed.
    Tick,
    /// The agent was asked to stop.
    Stop,
}

/// Something to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Connect to the server; answered by `ServerConnected` or `ServerLost`.
    Connect,
    /// Close the connection to the server; no event answers.
    Disconnect(String),
    /// Send a message, before any frame.
    Send(ToServer),
    /// Make ring, outbox and drain thread, then ask the filter to attach.
    Attach(Attach),
    /// Read what a filter holds; answered by `Loaded`, or by `FilterResult` with an error.
    Adopt(Adopt),
    /// The filter holds the outbox of `Adopt`: take the ring over and start the drain.
    Resume(DiskId, Epoch),
    /// Drop what was read of ring and outbox, and leave everything as it is.
    Abandon(DiskId, Epoch),
    /// Tell a filter that nothing of a device's ended capture is needed any more.
    Forget(FilterId, String),
    /// Ship what the spool has of that epoch after that LSN; answered by `Drained` in the end.
    Recover(DiskId, Epoch, Lsn),
    /// Throw away what the spool has of a disk.
    DropSpool(DiskId),
    /// Ask a filter to detach a device.
    Detach(FilterId, u64, String),
    /// Tell a filter that a device's ring has room again.
    Resync(FilterId, u64, String),
    /// Watch the process of a lost filter; answered by `ProcessDead`.
    Watch(FilterId),
    /// Tell the drain thread how to end.
    EndRing(DiskId, Epoch, Ending),
    /// Everything up to that LSN is durable: flushes that wait for it may complete.
    Durable(DiskId, Epoch, Lsn),
    /// Change the policies of a running capture.
    SetPolicy(DiskId, Epoch, Policy),
    /// Drop the frames up to that LSN.
    Release(DiskId, Epoch, Lsn),
    /// Put a bookmark into the ring; answered by `BookmarkPut`.
    PutBookmark(DiskId, u64, String),
    /// Sample every capture at the next opportunity: one has just begun.
    ReportSoon,
    /// Give the drain thread an answer to `HashesWanted`.
    GiveHashes(DiskId, Epoch, Answer),
    /// Throw away what of this epoch is not shipped, now and later: the server cannot continue it.
    Discard(DiskId, Epoch),
    /// Drop ring, outbox and spool.
    DropCapture(DiskId, Epoch),
}

/// The details of [`Action::Attach`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attach {
    /// Whom to ask.
    pub filter: FilterId,
    /// Number that its answer repeats.
    pub request: u64,
    /// The device.
    pub device: String,
    /// Its disk's id.
    pub disk: DiskId,
    /// The new epoch.
    pub epoch: Epoch,
    /// LSN of its first record.
    pub first_lsn: Lsn,
    /// Size of the disk.
    pub disk_bytes: u64,
    /// The host's clock must be past this.
    pub clock_floor: Stamp,
    /// How the last epoch left the image: if it still is so, nothing has to be read.
    pub closed_image: Option<ImageTag>,
    /// Why the epoch begins with a gap.
    pub begins: GapReason,
    /// How it is to be protected.
    pub settings: Settings,
}

/// A message to the server.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "the names are those of the wire messages")]
pub enum ToServer {
    Hello(wire::Hello),
    Inventory(wire::Inventory),
    OpenDisk(wire::OpenDisk),
    CloseDisk(wire::CloseDisk),
    CommandResult(wire::CommandResult),
    DiskStatus(wire::DiskStatus),
    HashRequest(wire::HashRequest),
    Ping(wire::Ping),
    Pong(wire::Ping),
}

/// The next frames to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shipment {
    /// Whose.
    pub disk: DiskId,
    /// Of which epoch.
    pub epoch: Epoch,
    /// The first LSN that the server does not have.
    pub from: Lsn,
    /// The last LSN that may be sent: the outbox may already hold more than the session was told.
    pub to: Lsn,
}

/// The state machine.
#[derive(Debug)]
pub struct Session {
    identity: Identity,
    server: Server,
    inventory: Inventory,
    captures: BTreeMap<DiskId, Capture>,
    /// What the server said last, for every disk that it wanted protected.
    settings: BTreeMap<DiskId, Settings>,
    /// `OpenDisk` messages of this connection that the server has not answered.
    asked: BTreeMap<DiskId, u32>,
    /// Disks that were opened on this connection and not given up since.
    opened: BTreeSet<DiskId>,
    said: Said,
    /// Lost filters whose processes still hold rings.
    orphans: BTreeMap<FilterId, u32>,
    /// What filters hold, until they have listed their disks.
    holdings: BTreeMap<FilterId, Vec<Holding>>,
    /// Epochs of which a former agent left frames in the spool, and their disk's size.
    spooled: BTreeMap<DiskId, (Epoch, u64)>,
    /// Disks whose capture broke, until when they are left alone, and why.
    holds: BTreeMap<DiskId, (Duration, String)>,
    /// How a disk's last epoch ended, where this agent saw it and the server has not been told: why the next one begins
    /// with a gap.
    ended: BTreeMap<DiskId, GapReason>,
    next_request: u64,
    /// The disk that shipped last, so that the others come first.
    turn: Option<DiskId>,
    stopping: bool,
    out: Vec<Action>,
}

impl Session {
    /// A session that knows no VM and has no connection.
    #[must_use]
    pub fn new(identity: Identity) -> Self {
        Self {
            inventory: Inventory::new(identity.host_id),
            identity,
            server: Server::new(),
            captures: BTreeMap::new(),
            settings: BTreeMap::new(),
            asked: BTreeMap::new(),
            opened: BTreeSet::new(),
            said: Said::default(),
            orphans: BTreeMap::new(),
            holdings: BTreeMap::new(),
            spooled: BTreeMap::new(),
            holds: BTreeMap::new(),
            ended: BTreeMap::new(),
            next_request: 1,
            turn: None,
            stopping: false,
            out: Vec::new(),
        }
    }

    /// Takes an event; returns what to do, in this order.
    pub fn handle(&mut self, now: Duration, event: Event) -> Vec<Action> {
        match event {
            Event::FilterUp(filter, info) => self.filter_up(filter, info),
            Event::FilterDisks(filter, disks) => self.filter_disks(now, filter, disks),
            Event::FilterHolds(filter, holding) => self.filter_holds(filter, holding),
            Event::Loaded(disk, epoch, acked, packed) => self.loaded(disk, epoch, acked, packed),
            Event::SpoolLeft(disk, epoch, disk_bytes) => {
                self.spooled.insert(disk, (epoch, disk_bytes));
            }
            Event::FilterResult(filter, request, error) => self.filter_result(now, filter, request, &error),
            Event::FilterFault(filter, device, message) => self.filter_fault(now, filter, &device, &message),
            Event::FilterLost(filter) => self.filter_lost(now, filter),
            Event::ProcessDead(filter) => self.process_dead(filter),
            Event::ServerConnected => self.server_connected(now),
            Event::ServerLost => self.server_lost(now),
            Event::Server(message) => self.server_message(now, message),
            Event::Packed(disk, epoch, lsn) => self.packed(disk, epoch, lsn),
            Event::Drained(disk, epoch, lsn) => self.drained(disk, epoch, lsn),
            Event::RingFault(disk, epoch, why, message) => self.ring_fault(now, (disk, epoch), why, &message),
            Event::BookmarkPut(disk, request, result) => self.bookmark_put(disk, request, result),
            Event::Sampled(disk, epoch, sample) => self.sampled(now, disk, epoch, &sample),
            Event::HashesWanted(disk, epoch, wanted) => self.hashes_wanted(disk, epoch, wanted),
            Event::Tick => self.tick(now),
            Event::Stop => self.stop(),
        }
        self.close_unused();
        self.check();
        core::mem::take(&mut self.out)
    }

    /// What to send next, each disk in its turn; `None` when nothing waits or nothing may be sent.
    #[must_use]
    pub fn next_to_ship(&self) -> Option<Shipment> {
        if !self.server.is_up() {
            return None;
        }
        let after = self.turn.unwrap_or_default();
        let ready = |(_, capture): &(&DiskId, &Capture)| capture.may_ship();
        let next = self.captures.range(after..).find(|entry| *entry.0 != after && ready(entry));
        let (disk, capture) = next.or_else(|| self.captures.iter().find(ready))?;
        Some(Shipment { disk: *disk, epoch: capture.epoch, from: capture.shipped.next(), to: capture.packed })
    }

    /// Frames up to `last` were handed to the socket.
    ///
    /// # Panics
    /// When they were not packed: the outbox gave them out.
    pub fn shipped(&mut self, disk: DiskId, epoch: Epoch, last: Lsn) {
        self.turn = Some(disk);
        if let Some(capture) = self.captures.get_mut(&disk).filter(|capture| capture.epoch == epoch) {
            assert!(last <= capture.packed, "a frame was sent that was never packed");
            capture.shipped = capture.shipped.max(last);
            capture.ever_shipped = capture.ever_shipped.max(last);
        }
    }

    /// Whether a stopping agent may go: everything that was packed is durable and nothing is being packed, or there
    /// is no server to wait for.
    #[must_use]
    pub fn is_flushed(&self) -> bool {
        !self.server.is_up()
            || self.captures.values().all(|capture| capture.drained && capture.acked >= capture.packed)
    }

    /// Captures with a ring, whose state is worth sampling.
    pub fn live(&self) -> impl Iterator<Item = (DiskId, Epoch)> + '_ {
        let live = self.captures.iter().filter(|(_, capture)| capture.has_ring());
        live.map(|(disk, capture)| (*disk, capture.epoch))
    }

    /// The order of the families of numbers, in the one place where it is asserted.
    fn check(&self) {
        for (disk, capture) in &self.captures {
            assert!(
                capture.packed >= capture.ever_shipped
                    && capture.ever_shipped >= capture.shipped
                    && capture.shipped >= capture.acked,
                "disk {disk}: packed ≥ shipped ≥ acked does not hold"
            );
        }
    }

    fn request(&mut self) -> u64 {
        let request = self.next_request;
        self.next_request += 1;
        request
    }

    fn send(&mut self, message: ToServer) {
        if self.server.is_up() {
            self.out.push(Action::Send(message));
        }
    }

    /// What is given up comes first: who hears that a disk is gone here may open it there.
    fn send_inventory(&mut self) {
        self.close_unused();
        self.note_rivals();
        self.send(ToServer::Inventory(self.inventory.to_wire()));
    }

    fn answer(&mut self, request: u64, error: &str, lsn: Lsn, stamp: Stamp) {
        let error = error.to_owned();
        self.send(ToServer::CommandResult(wire::CommandResult {
            request,
            error,
            lsn: lsn.0,
            stamp: stamp.0,
        }));
    }

    /// Without a connection the answer is that nobody can say.
    fn hashes_wanted(&mut self, disk: DiskId, epoch: Epoch, wanted: Wanted) {
        if self.server.is_up() {
            let (lsn, first_chunk, chunks) = (wanted.lsn.0, wanted.first_chunk, wanted.chunks);
            let (disk, epoch) = (disk.0.to_vec(), epoch.0);
            self.send(ToServer::HashRequest(wire::HashRequest { disk, epoch, lsn, first_chunk, chunks }));
        } else {
            self.out.push(Action::GiveHashes(disk, epoch, Answer { wanted, hashes: None }));
        }
    }

    fn stop(&mut self) {
        self.stopping = true;
        // What was not begun is left for the next agent.
        let opening =
            |(disk, capture): (&DiskId, &Capture)| (capture.phase == Phase::Opening).then_some(*disk);
        let opening: Vec<DiskId> = self.captures.iter().filter_map(opening).collect();
        for disk in opening {
            self.abandon_opening(disk, "the agent is stopping; try again when it runs");
        }
        self.captures.retain(|_, capture| capture.has_ring());
        for (disk, capture) in &mut self.captures {
            if capture.has_ring() && !capture.drained {
                self.out.push(Action::EndRing(*disk, capture.epoch, Ending::AgentStops));
            }
        }
    }

    fn tick(&mut self, now: Duration) {
        self.server_tick(now);
        self.capture_tick(now);
        self.recover_spools(now);
        let before = self.holds.len();
        self.holds.retain(|_, (until, _)| now < *until);
        if self.holds.len() != before {
            // The server switches protection on again for disks that should have it.
            self.send_inventory();
        }
    }
}
