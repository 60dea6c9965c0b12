//! The server: the real data plane and store over storage in memory that can lose what was not made durable, and the
//! real catalog, whose commits are durable before they are answered (so it survives every crash as it is).

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cdp_server::catalog::Catalog;
use cdp_server::hashes;
use cdp_server::limits::Patience;
use cdp_server::plane::{Backing, Effect, Host, Plane, Reply, Request, SessionId};
use journal_format::wire::{self, Hashes, MESSAGE_HEADER_BYTES, MessageHeader, MessageType};
use journal_format::{DiskId, Lsn};
use journal_store::io::{Answer, Call, CallKind, Hook, HookStorage, MemStorage, Tearing};
use journal_store::{Store, StoreConfig};

use super::net::Conn;
use cdp_tests::random::Random;

/// How often the operator's wish is repeated to an agent.
const WISH_EVERY: Duration = Duration::from_secs(2);

/// Lets changes of the volumes fail.
#[derive(Debug)]
struct Failing {
    volumes: MemStorage,
    /// Changes until one fails, and whether all later ones do.
    left: Mutex<Option<(u64, bool)>>,
}

impl Failing {
    fn set(&self, left: Option<(u64, bool)>) {
        *self.left.lock().unwrap_or_else(PoisonError::into_inner) = left;
    }
}

impl Hook for Failing {
    fn before(&self, call: &Call<'_>) -> Answer {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        let (Some((changes, for_good)), true) = (*left, call.kind.changes()) else { return Answer::Go };
        if changes > 1 {
            *left = Some((changes - 1, for_good));
            return Answer::Go;
        }
        *left = for_good.then_some((0, true));
        if call.kind == CallKind::Sync {
            // As Linux does: what could not be made durable is gone, and the next sync succeeds.
            self.volumes.forget(call.path);
        }
        Answer::Fail(std::io::Error::other("injected failure"))
    }
}

/// A server process.
struct Running {
    failing: Arc<Failing>,
    store: Store,
    plane: Plane,
    /// Bytes that came and are no whole message yet, by connection.
    inboxes: BTreeMap<u64, Vec<u8>>,
    welcomed: BTreeMap<u64, Duration>,
}

/// The server's machine: volumes, catalog, and the process when it runs.
pub(crate) struct Server {
    volumes: MemStorage,
    catalog: Catalog,
    config: StoreConfig,
    running: Option<Running>,
    /// The greatest LSN of each disk that was ever acknowledged (invariant I5).
    pub(crate) acked: BTreeMap<DiskId, Lsn>,
    /// What the operator wants.
    pub(crate) wanted: BTreeMap<DiskId, bool>,
    /// How the disks are to be protected.
    pub(crate) options: BTreeMap<DiskId, wire::ProtectionOptions>,
    /// Bookmarks that were ordered, by request.
    ordered: BTreeMap<u64, (DiskId, String)>,
    /// Bookmarks that the operator was told of.
    pub(crate) bookmarks: Vec<(DiskId, String, Lsn)>,
    next_request: u64,
    /// How often it was started.
    pub(crate) starts: u64,
}

/// What a step of the server did, for checks and the trace.
#[derive(Default)]
pub(crate) struct Outcome {
    pub(crate) committed: bool,
    pub(crate) notes: Vec<String>,
}

impl Server {
    pub(crate) fn new(config: StoreConfig) -> Self {
        let catalog = Catalog::open(Path::new(":memory:")).expect("a catalog in memory");
        Self {
            volumes: MemStorage::new(),
            catalog,
            config,
            running: None,
            acked: BTreeMap::new(),
            wanted: BTreeMap::new(),
            options: BTreeMap::new(),
            ordered: BTreeMap::new(),
            bookmarks: Vec::new(),
            next_request: 1,
            starts: 0,
        }
    }

    pub(crate) fn is_running(&self) -> bool {
        self.running.is_some()
    }

    pub(crate) fn store(&self) -> Option<&Store> {
        self.running.as_ref().map(|running| &running.store)
    }

    pub(crate) fn volumes(&self) -> &MemStorage {
        &self.volumes
    }

    pub(crate) fn start(&mut self) {
        self.starts += 1;
        let failing = Arc::new(Failing { volumes: self.volumes.clone(), left: Mutex::default() });
        let hook: Arc<dyn Hook> = Arc::<Failing>::clone(&failing);
        let storage = Arc::new(HookStorage::new(Arc::new(self.volumes.clone()), hook));
        let store = Store::open_with("/store", storage, self.config.clone()).expect("volumes recover");
        let damaged = store.damaged();
        assert!(damaged.is_empty(), "a crash has damaged {damaged:?}");
        self.running = Some(Running {
            failing,
            store,
            plane: Plane::new(Patience::DEFAULT.idle),
            inboxes: BTreeMap::new(),
            welcomed: BTreeMap::new(),
        });
    }

    /// The process dies; what it wrote is with the operating system.
    pub(crate) fn kill(&mut self, conns: &mut BTreeMap<u64, Conn>, random: &mut Random) {
        self.running = None;
        conns.values_mut().for_each(|conn| conn.orphan(random));
    }

    /// The power fails: what was not made durable is lost, or torn, or there.
    pub(crate) fn power_cut(&mut self, conns: &mut BTreeMap<u64, Conn>, random: &mut Random) {
        self.kill(conns, random);
        self.volumes = self.volumes.crash(Tearing::Torn, |bound| random.within(0..bound as u64) as usize);
    }

    /// The `n`-th change of the volumes from now on fails; all later ones too, or not.
    pub(crate) fn fail_at(&mut self, n: u64, for_good: bool) {
        if let Some(running) = &self.running {
            running.failing.set(Some((n, for_good)));
        }
    }

    /// The volumes work again.
    pub(crate) fn heal(&mut self) {
        if let Some(running) = &self.running {
            running.failing.set(None);
        }
    }

    /// Takes what has arrived, commits perhaps, and sends what follows.
    pub(crate) fn step(
        &mut self,
        now: Duration,
        conns: &mut BTreeMap<u64, Conn>,
        random: &mut Random,
        most: usize,
    ) -> Outcome {
        let mut outcome = Outcome::default();
        let Some(running) = &mut self.running else { return outcome };
        let on = Backing { store: &running.store, catalog: &self.catalog };
        for (id, conn) in conns.iter_mut() {
            let came = conn.up.receive(now, most);
            let inbox = running.inboxes.entry(*id).or_default();
            inbox.extend_from_slice(&came);
            while let Some((kind, body)) = next_message(inbox) {
                match take(kind, body) {
                    Taken::Hello => {
                        let welcome = wire::Welcome {
                            protocol: wire::PROTOCOL_VERSION,
                            refused: String::new(),
                            server_version: String::new(),
                        };
                        conn.down.send(&wire::encode(&welcome).expect("it encodes"));
                        running.welcomed.insert(*id, Duration::ZERO);
                    }
                    Taken::Ping(ping) => {
                        let pong = wire::encode_as(MessageType::Pong, &ping).expect("it encodes");
                        conn.down.send(&pong);
                    }
                    Taken::Request(request) => running.plane.handle(on, now, SessionId(*id), &request),
                    Taken::Hashes(request) => {
                        // The hashing threads may have too much to do.
                        let known = if random.chance(10) {
                            Hashes { hashes: Vec::new(), ..hashes::known(&running.store, &request) }
                        } else {
                            hashes::known(&running.store, &request)
                        };
                        conn.down.send(&wire::encode(&known).expect("it encodes"));
                    }
                    Taken::Result(result) => {
                        if let Some((disk, name)) = self.ordered.remove(&result.request)
                            && result.error.is_empty()
                        {
                            outcome.notes.push(format!("bookmark {name} is at LSN {}", result.lsn));
                            self.bookmarks.push((disk, name, Lsn(result.lsn)));
                        }
                    }
                    Taken::Inventory => drop(running.welcomed.insert(*id, Duration::ZERO)),
                    Taken::Other => {}
                }
                if random.chance(5) {
                    running.plane.commit(on);
                }
            }
            if conn.up.is_over() && running.inboxes.remove(id).is_some() {
                running.welcomed.remove(id);
                running.plane.handle(on, now, SessionId(*id), &Request::Gone(Duration::ZERO));
            }
        }
        running.plane.commit(on);
        for effect in running.plane.take_effects() {
            match effect {
                Effect::Send(SessionId(id), reply) => {
                    // Both say that everything up to there is durable.
                    let told = match &reply {
                        Reply::Ack(ack) => Some((&ack.disk, ack.durable_lsn)),
                        Reply::Opened(opened) => Some((&opened.disk, opened.durable_lsn)),
                        Reply::Refused(_) => None,
                    };
                    if let Some((disk, lsn)) = told.filter(|(_, lsn)| *lsn > 0) {
                        let disk = wire::disk_id(disk).expect("the server's own message");
                        let acked = self.acked.entry(disk).or_default();
                        *acked = (*acked).max(Lsn(lsn));
                    }
                    outcome.notes.push(format!("server to {id}: {reply:?}"));
                    if let Some(conn) = conns.get_mut(&id) {
                        conn.down.send(&reply.encode().expect("it encodes"));
                    }
                }
                Effect::Close(SessionId(id), reason) => {
                    outcome.notes.push(format!("server closes {id}: {reason}"));
                    if let Some(conn) = conns.get_mut(&id) {
                        conn.cut(random);
                    }
                }
                Effect::Failed(disk, error) => outcome.notes.push(format!("server: {disk} fails: {error}")),
                Effect::Committed(_) => outcome.committed = true,
                Effect::Opened(..) | Effect::Closed(..) | Effect::Appended(_) => {}
                Effect::Held(SessionId(id), disk, why) => {
                    unreachable!("one host alone, and {id} is refused {disk}: {why}")
                }
            }
        }
        self.wish(now, conns);
        outcome
    }

    /// Tells every agent what the operator wants, whenever it says what there is and now and then; that may be repeated.
    fn wish(&mut self, now: Duration, conns: &mut BTreeMap<u64, Conn>) {
        let Some(running) = &mut self.running else { return };
        for (id, next) in &mut running.welcomed {
            let Some(conn) = conns.get_mut(id).filter(|_| now >= *next) else { continue };
            *next = now + WISH_EVERY;
            for (disk, enabled) in &self.wanted {
                let set = wire::SetProtection {
                    request: self.next_request,
                    disk: disk.0.to_vec(),
                    enabled: *enabled,
                    options: self.options.get(disk).copied(),
                };
                self.next_request += 1;
                conn.down.send(&wire::encode(&set).expect("it encodes"));
            }
        }
    }

    /// Writes down whether a disk is to be protected.
    pub(crate) fn want(&mut self, disk: DiskId, wanted: bool) {
        self.wanted.insert(disk, wanted);
        // Nobody can wish anything of a disk that was never reported.
        self.catalog.adopt_from_store(disk, 0).expect("a catalog in memory");
        self.catalog.set_protect(disk, Some(wanted)).expect("a catalog in memory");
    }

    /// Orders a bookmark from every agent that is connected.
    pub(crate) fn bookmark(&mut self, disk: DiskId, conns: &mut BTreeMap<u64, Conn>) {
        let Some(running) = &mut self.running else { return };
        for id in running.welcomed.keys() {
            let Some(conn) = conns.get_mut(id) else { continue };
            let (request, name) = (self.next_request, format!("bookmark {}", self.next_request));
            self.next_request += 1;
            self.ordered.insert(request, (disk, name.clone()));
            let order = wire::InsertBookmark { request, disk: disk.0.to_vec(), name };
            conn.down.send(&wire::encode(&order).expect("it encodes"));
        }
    }

    /// Repeats the operator's wishes at once.
    pub(crate) fn wish_now(&mut self) {
        if let Some(running) = &mut self.running {
            running.welcomed.values_mut().for_each(|next| *next = Duration::ZERO);
        }
    }
}

enum Taken {
    Hello,
    Ping(wire::Ping),
    Request(Request),
    Hashes(wire::HashRequest),
    Result(wire::CommandResult),
    Inventory,
    Other,
}

fn take(kind: MessageType, body: Vec<u8>) -> Taken {
    match kind {
        MessageType::Hello => Taken::Hello,
        MessageType::Ping => Taken::Ping(wire::decode(&body).expect("the agent's message is sound")),
        MessageType::Inventory => Taken::Inventory,
        MessageType::HashRequest => Taken::Hashes(wire::decode(&body).expect("the agent's message is sound")),
        MessageType::CommandResult => {
            Taken::Result(wire::decode(&body).expect("the agent's message is sound"))
        }
        _ => match Request::parse(&Host::default(), kind, body).expect("the agent's message is sound") {
            Some(request) => Taken::Request(request),
            None => Taken::Other,
        },
    }
}

/// The next whole message of a stream.
fn next_message(inbox: &mut Vec<u8>) -> Option<(MessageType, Vec<u8>)> {
    let header = inbox.get(..MESSAGE_HEADER_BYTES)?;
    let (kind, len) = MessageHeader::parse(header).expect("the agent's stream is sound");
    let end = MESSAGE_HEADER_BYTES + len;
    let body = inbox.get(MESSAGE_HEADER_BYTES..end)?.to_vec();
    inbox.drain(..end);
    Some((kind, body))
}
