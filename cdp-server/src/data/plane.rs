//! The data plane's decisions: who may write a disk, what is appended and committed, and what is answered. A state
//! machine without I/O of its own (invariant I8): it works on a [`Store`] and a [`Catalog`], which have their own
//! seams, takes requests in order, and says in [`Effect`]s what is to be sent, closed and counted. The committer's
//! thread drives it with sockets; a simulation drives it without.
//!
//! When a session opens a disk, everything before is committed first, an older owner is closed, and frames that still
//! come from it are dropped. So the answer to an open says where the journal really ends, and no frame of an older
//! owner can come after it.
//!
//! An acknowledgement is made only by the commit that covers it (invariant I5).

use std::collections::{BTreeMap, BTreeSet};

use journal_format::limits::MAX_DISK_BYTES;
use journal_format::wire::{self, Ack, DiskOpened, MessageType, OpenDisk, Refused};
use journal_format::{DiskId, Epoch, FormatError, Frame, FrameHeader};
use journal_store::{Store, StoreError};

use crate::catalog::Catalog;
use crate::error::ServerError;
use crate::limits::RETRY_AFTER;

/// Number of a connection; never used again while the server runs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SessionId(pub u64);

/// What a session asks of the data plane.
#[derive(Debug)]
pub enum Request {
    /// To write a disk.
    Open(OpenDisk),
    /// To keep a frame that parses.
    Frame(Vec<u8>),
    /// Nothing more: it has ended.
    Gone,
}

impl Request {
    /// A message for the data plane; `None` when it is for others.
    ///
    /// # Errors
    /// When it is not well formed; the connection must be closed.
    pub fn parse(kind: MessageType, body: Vec<u8>) -> Result<Option<Self>, ServerError> {
        match kind {
            MessageType::OpenDisk => Ok(Some(Self::Open(wire::decode(&body)?))),
            MessageType::Frame => {
                let frame = Frame::parse(&body)?;
                if frame.header().frame_len() != body.len() {
                    return Err(ServerError::Protocol("bytes behind a frame".to_owned()));
                }
                Ok(Some(Self::Frame(body)))
            }
            _ => Ok(None),
        }
    }
}

/// A message for an agent.
#[derive(Clone, PartialEq, Debug)]
pub enum Reply {
    /// Where the journal ends, or why the disk is refused.
    Opened(DiskOpened),
    /// Everything up to an LSN is durable.
    Ack(Ack),
    /// No frames of a disk for a while.
    Refused(Refused),
}

impl Reply {
    /// The message as it is sent.
    ///
    /// # Errors
    /// When it is longer than the protocol allows.
    pub fn encode(&self) -> Result<Vec<u8>, FormatError> {
        match self {
            Self::Opened(message) => wire::encode(message),
            Self::Ack(message) => wire::encode(message),
            Self::Refused(message) => wire::encode(message),
        }
    }
}

/// Something for the driver to do or to note.
#[derive(Debug)]
pub enum Effect {
    /// Send a message.
    Send(SessionId, Reply),
    /// Close a connection; why.
    Close(SessionId, String),
    /// A disk was opened; the session that owns it from now on.
    Opened(SessionId, DiskId),
    /// A frame was appended. Not durable yet.
    Appended(FrameHeader),
    /// A disk's frames were committed.
    Committed(DiskId),
    /// A disk cannot be written or opened now.
    Failed(DiskId, ServerError),
}

/// Who may write a disk.
#[derive(Debug)]
struct Owner {
    session: SessionId,
    epoch: Epoch,
    /// It was told that its frames are refused; it opens the disk again before it sends more.
    refused: bool,
}

/// What the data plane works on.
#[derive(Clone, Copy, Debug)]
pub struct Backing<'a> {
    /// The journals.
    pub store: &'a Store,
    /// Who hands out the epochs.
    pub catalog: &'a Catalog,
}

/// The state machine. A new one owns no disk.
#[derive(Debug, Default)]
pub struct Plane {
    owners: BTreeMap<DiskId, Owner>,
    /// Sessions that were told to go and have not gone yet: what still comes from them is dropped in silence.
    closing: BTreeSet<SessionId>,
    /// Disks with frames since the last commit, also those whose frames were all known: they are acknowledged too.
    touched: BTreeSet<DiskId>,
    effects: Vec<Effect>,
}

impl Plane {
    /// Takes a request; [`Plane::take_effects`] says what follows from it.
    pub fn handle(&mut self, on: Backing<'_>, session: SessionId, request: Request) {
        if self.closing.contains(&session) && !matches!(request, Request::Gone) {
            return;
        }
        match request {
            Request::Open(request) => self.open(on, session, &request),
            Request::Frame(bytes) => self.frame(on, session, &bytes),
            Request::Gone => {
                self.owners.retain(|_, owner| owner.session != session);
                self.closing.remove(&session);
            }
        }
    }

    /// Makes what was appended durable, and acknowledges it.
    pub fn commit(&mut self, on: Backing<'_>) {
        let mut touched = std::mem::take(&mut self.touched);
        if touched.is_empty() {
            return;
        }
        for (id, error) in on.store.commit() {
            touched.remove(&id);
            self.failed(id, error);
        }
        for id in touched {
            self.effects.push(Effect::Committed(id));
            let Some(owner) = self.owners.get(&id) else { continue };
            if let Some(disk) = on.store.disk(id) {
                let ack = Ack { disk: id.0.to_vec(), durable_lsn: disk.durable_lsn().0 };
                self.effects.push(Effect::Send(owner.session, Reply::Ack(ack)));
            }
        }
    }

    /// What is to be done, in this order.
    pub fn take_effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }

    fn open(&mut self, on: Backing<'_>, session: SessionId, request: &OpenDisk) {
        self.commit(on);
        let Ok(id) = wire::disk_id(&request.disk) else {
            return self.close(session, "it opens a disk whose id is not 16 bytes long".to_owned());
        };
        if let Some(old) = self.owners.remove(&id)
            && old.session != session
        {
            self.close(old.session, format!("another agent has opened its disk {id}"));
        }
        let answer = match open_journal(on, id, request) {
            Ok(answer) => {
                self.owners.insert(id, Owner { session, epoch: Epoch(answer.epoch), refused: false });
                self.effects.push(Effect::Opened(session, id));
                answer
            }
            Err(error) => {
                let refused = error.to_string();
                self.effects.push(Effect::Failed(id, error));
                DiskOpened { disk: id.0.to_vec(), refused, ..DiskOpened::default() }
            }
        };
        self.effects.push(Effect::Send(session, Reply::Opened(answer)));
    }

    fn frame(&mut self, on: Backing<'_>, session: SessionId, bytes: &[u8]) {
        let frame = match Frame::parse(bytes) {
            Ok(frame) => frame,
            Err(error) => return self.close(session, format!("a frame does not parse: {error}")),
        };
        let header = frame.header();
        let id = header.disk();
        let Some(owner) = self.owners.get(&id).filter(|owner| owner.session == session) else {
            let message = "the disk was not opened on this connection; open it first";
            self.effects.push(Effect::Send(session, refusal(id, message)));
            return;
        };
        if owner.refused {
            return;
        }
        if owner.epoch != header.epoch() {
            let message = format!("epoch {} is not the one opened, {}", header.epoch().0, owner.epoch.0);
            return self.refuse(id, &message);
        }
        match on.store.append(&frame) {
            Ok(()) => {
                self.touched.insert(id);
                self.effects.push(Effect::Appended(*header));
            }
            Err(error) => self.failed(id, error),
        }
    }

    fn failed(&mut self, id: DiskId, error: StoreError) {
        self.refuse(id, &error.to_string());
        self.effects.push(Effect::Failed(id, error.into()));
    }

    fn refuse(&mut self, id: DiskId, message: &str) {
        if let Some(owner) = self.owners.get_mut(&id).filter(|owner| !owner.refused) {
            owner.refused = true;
            self.effects.push(Effect::Send(owner.session, refusal(id, message)));
        }
    }

    fn close(&mut self, session: SessionId, reason: String) {
        self.owners.retain(|_, owner| owner.session != session);
        self.closing.insert(session);
        self.effects.push(Effect::Close(session, reason));
    }
}

fn open_journal(on: Backing<'_>, id: DiskId, request: &OpenDisk) -> Result<DiskOpened, ServerError> {
    if request.disk_bytes > MAX_DISK_BYTES {
        return Err(ServerError::Protocol(format!("the disk is larger than {MAX_DISK_BYTES} bytes")));
    }
    let disk = on.store.open_or_create(id, request.disk_bytes)?;
    on.catalog.adopt_from_store(id, request.disk_bytes)?;
    let resume = (request.resume_epoch != 0).then_some(Epoch(request.resume_epoch));
    let epoch = on.catalog.grant_epoch(id, disk.last_epoch(), resume)?;
    Ok(DiskOpened {
        disk: id.0.to_vec(),
        durable_lsn: disk.durable_lsn().0,
        durable_stamp: disk.durable_stamp().0,
        epoch: epoch.0,
        refused: String::new(),
        closed_image: disk.closed_image().map(|image| image.0.to_vec()).unwrap_or_default(),
    })
}

fn refusal(id: DiskId, message: &str) -> Reply {
    let retry_ms = u32::try_from(RETRY_AFTER.as_millis()).unwrap_or(u32::MAX);
    Reply::Refused(Refused { disk: id.0.to_vec(), message: message.to_owned(), retry_ms })
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use journal_format::frame::{FrameMeta, encode_head};
    use journal_format::{Codec, GapReason, Lsn, Op, Record, Stamp};
    use journal_store::StoreConfig;
    use journal_store::io::MemStorage;

    use super::*;

    const DISK: DiskId = DiskId([7; 16]);
    const FIRST: SessionId = SessionId(1);
    const SECOND: SessionId = SessionId(2);

    fn frame_at(epoch: u64, lsn: u64) -> Vec<u8> {
        let meta = FrameMeta {
            disk: DISK,
            epoch: Epoch(epoch),
            first_lsn: Lsn(lsn),
            disk_bytes: 1 << 20,
            codec: Codec::Raw,
            raw_bytes: 0,
        };
        encode_head(&meta, &[Record { lsn: Lsn(lsn), stamp: Stamp(lsn), op: begin() }], &[]).expect("a frame")
    }

    fn begin() -> Op {
        Op::GapBegin { reason: GapReason::Attach, generation: 1 }
    }

    fn open(resume_epoch: u64) -> Request {
        Request::Open(OpenDisk { disk: DISK.0.to_vec(), disk_bytes: 1 << 20, resume_epoch })
    }

    struct World {
        store: Store,
        catalog: Catalog,
        plane: Plane,
    }

    impl World {
        fn new() -> Self {
            let storage = Arc::new(MemStorage::new());
            let store = Store::open_with("/store", storage, StoreConfig::default()).expect("a store");
            let catalog = Catalog::open(Path::new(":memory:")).expect("a catalog");
            Self { store, catalog, plane: Plane::default() }
        }

        fn ask(&mut self, session: SessionId, request: Request) -> Vec<Effect> {
            let on = Backing { store: &self.store, catalog: &self.catalog };
            self.plane.handle(on, session, request);
            self.plane.take_effects()
        }

        fn commit(&mut self) -> Vec<Effect> {
            self.plane.commit(Backing { store: &self.store, catalog: &self.catalog });
            self.plane.take_effects()
        }
    }

    fn acks(effects: &[Effect]) -> Vec<(SessionId, u64)> {
        let ack = |effect: &Effect| match effect {
            Effect::Send(session, Reply::Ack(ack)) => Some((*session, ack.durable_lsn)),
            _ => None,
        };
        effects.iter().filter_map(ack).collect()
    }

    #[test]
    fn a_frame_is_acknowledged_by_the_commit_and_not_before() {
        let mut world = World::new();
        world.ask(FIRST, open(0));
        let effects = world.ask(FIRST, Request::Frame(frame_at(1, 1)));
        assert!(matches!(effects[..], [Effect::Appended(_)]), "{effects:?}");
        assert_eq!(acks(&world.commit()), [(FIRST, 1)]);
        assert_eq!(acks(&world.commit()), [], "nothing new");
    }

    #[test]
    fn an_older_owner_is_closed_and_nothing_of_it_is_taken_any_more() {
        let mut world = World::new();
        world.ask(FIRST, open(0));
        world.ask(FIRST, Request::Frame(frame_at(1, 1)));
        let effects = world.ask(SECOND, open(0));
        assert_eq!(acks(&effects), [(FIRST, 1)], "what came before is committed before the answer");
        assert!(effects.iter().any(|effect| matches!(effect, Effect::Close(FIRST, _))));
        let opened = |effect: &Effect| matches!(effect, Effect::Send(SECOND, Reply::Opened(opened)) if opened.durable_lsn == 1);
        assert!(effects.iter().any(opened));
        assert!(world.ask(FIRST, Request::Frame(frame_at(1, 2))).is_empty());
        assert!(world.ask(FIRST, open(1)).is_empty(), "it does not get the disk back");
        world.commit();
        assert_eq!(world.store.disk(DISK).map(|disk| disk.durable_lsn()), Some(Lsn(1)));
        world.ask(FIRST, Request::Gone);
        assert!(world.plane.closing.is_empty());
    }

    #[test]
    fn after_a_refusal_frames_are_dropped_until_the_disk_is_opened_again() {
        let mut world = World::new();
        world.ask(FIRST, open(0));
        let effects = world.ask(FIRST, Request::Frame(frame_at(1, 5)));
        let refused = |effect: &Effect| matches!(effect, Effect::Send(FIRST, Reply::Refused(_)));
        assert!(effects.iter().any(refused), "LSN 5 does not follow 0");
        assert!(world.ask(FIRST, Request::Frame(frame_at(1, 1))).is_empty());
        world.ask(FIRST, open(1));
        world.ask(FIRST, Request::Frame(frame_at(1, 1)));
        assert_eq!(acks(&world.commit()), [(FIRST, 1)]);
    }
}
