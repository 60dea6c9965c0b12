//! One agent's connection, from its first byte to its last, on its own thread.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::thread;
use std::time::Instant;

use journal_format::wire::{self, Hello, MessageType, PROTOCOL_VERSION, Welcome};

use crate::core::Core;
use crate::data::committer::Work;
use crate::data::door::Visit;
use crate::data::hashes::Hashers;
use crate::data::message::MessageReader;
use crate::data::peer::{self, Peer};
use crate::data::plane::{Host, Request};
use crate::data::queue::Queue;
use crate::data::socket::Socket;
use crate::data::spares::Spares;
use crate::error::ServerError;
use crate::limits::{MAX_AGENTS, MAX_INVENTORY_ITEMS, MAX_NAME_BYTES, MAX_REASON_BYTES, PING_EVERY, PINGS};
use crate::model::{HostId, HostReport, cut};
use crate::protection;

/// Serves a connection until it ends.
pub(crate) fn run(
    core: &Arc<Core>,
    queue: &Arc<Queue<Work>>,
    spares: &Arc<Spares>,
    hashers: &Hashers,
    mut visit: Visit,
    stream: Arc<Socket>,
) {
    let address = stream.peer();
    match Session::begin(core, queue, spares, hashers, &mut visit, stream, &address) {
        Ok(mut session) => {
            let reason = match session.serve() {
                Ok(()) => "the agent closed it".to_owned(),
                Err(error) => error.to_string(),
            };
            session.end(&reason);
        }
        Err(error) => tracing::warn!(address, %error, "turned a connection away"),
    }
}

struct Session<'a> {
    core: &'a Arc<Core>,
    queue: &'a Arc<Queue<Work>>,
    hashers: &'a Hashers,
    /// Requests for hashes of this connection that are under way.
    hashing: Arc<AtomicUsize>,
    reader: MessageReader,
    peer: Arc<Peer>,
    host: Host,
    hello: Hello,
}

impl<'a> Session<'a> {
    /// The handshake. A stranger gets [`Welcome`] with the reason, and nothing of it is kept.
    fn begin(
        core: &'a Arc<Core>,
        queue: &'a Arc<Queue<Work>>,
        spares: &Arc<Spares>,
        hashers: &'a Hashers,
        visit: &mut Visit,
        stream: Arc<Socket>,
        address: &str,
    ) -> Result<Self, ServerError> {
        let io = |e| ServerError::io("set up", address, e);
        let patience = core.patience;
        stream.set_up(patience.write).map_err(io)?;
        let mut reader = MessageReader::new(Arc::clone(&stream), Arc::clone(spares));
        let first = |kind: MessageType| (kind == MessageType::Hello).then(|| kind.max_body_bytes());
        let Some((_, body)) = reader.next(patience.hello, patience.hello, first)? else {
            return Err(ServerError::Protocol("closed before it said anything".to_owned()));
        };
        let hello: Hello = wire::decode(&body)?;
        let checked = check_hello(&hello, core.token.as_deref()).and_then(|host| match visit.is_agent() {
            true => Ok(host),
            false => {
                Err(format!("the server has its limit of {MAX_AGENTS} agents connected; stop one first"))
            }
        });
        let welcome = Welcome {
            protocol: PROTOCOL_VERSION,
            refused: checked.as_ref().err().cloned().unwrap_or_default(),
            server_version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        // Before the welcome: the agent opens disks after it, and one that takes over from it greets later still.
        let number = core.fleet.next_session();
        (&*stream).write_all(&wire::encode(&welcome)?).map_err(io)?;
        let id = checked.map_err(ServerError::Protocol)?;
        let host = Host { id, name: cut(hello.host_name.clone(), MAX_NAME_BYTES) };
        let label = format!("{} ({address})", host.name);
        let (peer, outgoing) = Peer::new(number, label, Arc::clone(&stream));
        let weak = Arc::downgrade(&peer);
        let ping_every = PING_EVERY.min(patience.idle / PINGS);
        thread::Builder::new()
            .name("cdp-send".to_owned())
            .spawn(move || peer::write_loop(&weak, &outgoing, &stream, ping_every))
            .map_err(|e| ServerError::io("start a thread for", address, e))?;
        tracing::info!(agent = peer.label, version = hello.agent_version, "agent connected");
        core.fleet.connected(&peer);
        Ok(Self { core, queue, hashers, hashing: Arc::default(), reader, peer, host, hello })
    }

    fn serve(&mut self) -> Result<(), ServerError> {
        loop {
            let message = self.reader.next(self.core.patience.idle, self.core.patience.message, accepted)?;
            let Some((kind, body)) = message else { return Ok(()) };
            self.handle(kind, body)?;
        }
    }

    fn handle(&mut self, kind: MessageType, body: Vec<u8>) -> Result<(), ServerError> {
        let session = self.peer.id;
        match kind {
            MessageType::Inventory => {
                self.inventory(wire::decode_inventory(&body, MAX_INVENTORY_ITEMS)?);
            }
            MessageType::OpenDisk | MessageType::CloseDisk | MessageType::Frame => {
                if let Some(request) = Request::parse(&self.host, kind, body)? {
                    self.enqueue(request)?;
                }
            }
            MessageType::CommandResult => {
                self.core.fleet.completed(session, wire::decode(&body)?, Instant::now())
            }
            MessageType::DiskStatus => {
                let mut status: wire::DiskStatus = wire::decode(&body)?;
                status.spool_trouble = cut(status.spool_trouble, MAX_REASON_BYTES);
                self.core.fleet.status(session, wire::disk_id(&status.disk)?, status, Instant::now());
            }
            MessageType::HashRequest => self.hashers.ask(&self.peer, &self.hashing, wire::decode(&body)?)?,
            MessageType::Ping => {
                self.peer.pong(&wire::decode(&body)?);
            }
            // That something arrived is all a pong says; `accepted` lets nothing else through.
            _ => {}
        }
        Ok(())
    }

    /// A catalog that cannot be written (its disk is full) costs what is new in the report; disks that are known go on.
    fn inventory(&self, inventory: wire::Inventory) {
        let (report, dropped) = HostReport::from_wire(self.host.id, &self.hello, inventory);
        if dropped > 0 {
            tracing::warn!(
                agent = self.peer.label,
                dropped,
                "left out disks that are malformed or over the limit"
            );
        }
        self.core.fleet.reported(self.peer.id, &report);
        // Written down before anything follows from it.
        let recorded = protection::record(self.core);
        if let Err(error) = recorded.and_then(|()| protection::reconcile(self.core, Instant::now())) {
            tracing::error!(agent = self.peer.label, %error, "cannot write down what the agent reports; free its disk");
        }
    }

    fn enqueue(&self, request: Request) -> Result<(), ServerError> {
        let work = Work { peer: Arc::clone(&self.peer), request };
        self.queue.push(work).map_err(|_| ServerError::Stopping)
    }

    fn end(&self, reason: &str) {
        self.peer.close(reason);
        self.core.fleet.disconnected(self.peer.id);
        // A queue that is closed has no owners to forget any more.
        let _ = self.enqueue(Request::Gone(self.reader.heard().elapsed()));
    }
}

/// What an agent may say once it is known, and how long it may be.
fn accepted(kind: MessageType) -> Option<usize> {
    matches!(
        kind,
        MessageType::Inventory
            | MessageType::OpenDisk
            | MessageType::CloseDisk
            | MessageType::Frame
            | MessageType::CommandResult
            | MessageType::DiskStatus
            | MessageType::HashRequest
            | MessageType::Ping
            | MessageType::Pong
    )
    .then(|| kind.max_body_bytes())
}

/// Who it is; or why it is refused, in words for the agent's log.
fn check_hello(hello: &Hello, token: Option<&str>) -> Result<HostId, String> {
    if hello.protocol != PROTOCOL_VERSION {
        let theirs = hello.protocol;
        return Err(format!(
            "the agent speaks protocol {theirs}, the server {PROTOCOL_VERSION}; upgrade the older of the two"
        ));
    }
    // Equality of blake3 hashes takes the same time wherever they differ.
    if let Some(token) = token
        && blake3::hash(token.as_bytes()) != blake3::hash(hello.token.as_bytes())
    {
        return Err(
            "the token is not the server's; compare the agent's token file with the server's".to_owned()
        );
    }
    let id = <[u8; 16]>::try_from(hello.host_id.as_slice());
    id.map(HostId).map_err(|_| "the host id is not 16 bytes long".to_owned())
}
