//! The data plane's decisions: who may write a disk, what is appended and committed, and what is answered. A state
//! machine without I/O of its own (invariant I8): it works on a [`Store`] and a [`Catalog`], which have their own
//! seams, takes requests in order, and says in [`Effect`]s what is to be sent, closed and counted. The committer's
//! thread drives it with sockets; a simulation drives it without.
//!
//! A disk has one owner (the module `owners` says who): a session of another host is refused that disk, and nothing
//! else. When a session opens a disk, everything before is committed first, an older session of its host is closed,
//! and frames of anybody but the owner are dropped, as are the owner's of another epoch than it was granted. So the
//! answer to an open says where the journal really ends, and no frame of an older owner can come after it.
//!
//! An acknowledgement is made only by the commit that covers it (invariant I5).

mod owners;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::time::Duration;

use journal_format::limits::MAX_DISK_BYTES;
use journal_format::wire::{self, Ack, CloseDisk, DiskOpened, MessageType, OpenDisk, Refused};
use journal_format::{CheckedFrame, DiskId, Epoch, FormatError, Frame, FrameHeader, GapReason, Lsn};
use journal_store::{Store, StoreError};

use crate::catalog::Catalog;
use crate::error::ServerError;
use crate::limits::RETRY_AFTER;
use crate::model::HostId;

use self::owners::{Owners, Right};

/// Number of a connection, from 1; never used again while the server runs, and greater than that of any connection whose
/// agent was welcomed before this one's greeted.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct SessionId(pub u64);

/// The host for which an agent speaks.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Host {
    /// Which it is.
    pub id: HostId,
    /// Its name, for people.
    pub name: String,
}

/// What a session asks of the data plane.
#[derive(Debug)]
pub enum Request {
    /// To write a disk, for that host.
    Open(Host, OpenDisk),
    /// To keep a frame.
    Frame(CheckedFrame),
    /// To give a disk up.
    Close(CloseDisk),
    /// Nothing more: it has ended, so long after the last message that came.
    Gone(Duration),
}

impl Request {
    /// A message of an agent for the data plane; `None` when it is for others.
    ///
    /// # Errors
    /// When it is not well formed; the connection must be closed.
    pub fn parse(from: &Host, kind: MessageType, body: Vec<u8>) -> Result<Option<Self>, ServerError> {
        match kind {
            MessageType::OpenDisk => Ok(Some(Self::Open(from.clone(), wire::decode(&body)?))),
            MessageType::CloseDisk => Ok(Some(Self::Close(wire::decode(&body)?))),
            MessageType::Frame => Ok(Some(Self::Frame(CheckedFrame::parse(body)?))),
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
    /// A disk was opened; the session and the host that own it from now on, and their epoch.
    Opened(SessionId, HostId, DiskId, Epoch),
    /// A session was refused a disk because another host has it; who, and what to do.
    Held(SessionId, DiskId, String),
    /// A session has given a disk up.
    Closed(SessionId, DiskId),
    /// A frame was appended. Not durable yet.
    Appended(FrameHeader),
    /// A disk's frames were committed.
    Committed(DiskId),
    /// A disk cannot be written or opened now.
    Failed(DiskId, ServerError),
}

/// What the data plane works on.
#[derive(Clone, Copy, Debug)]
pub struct Backing<'a> {
    /// The journals.
    pub store: &'a Store,
    /// Who hands out the epochs.
    pub catalog: &'a Catalog,
}

/// The state machine.
#[derive(Debug)]
pub struct Plane {
    owners: Owners,
    /// The time of the last request.
    now: Duration,
    /// Sessions that were told to go and have not gone yet: what still comes from them is dropped in silence.
    closing: BTreeSet<SessionId>,
    /// Disks with frames since the last commit, also those whose frames were all known: they are acknowledged too.
    touched: BTreeSet<DiskId>,
    effects: Vec<Effect>,
}

impl Plane {
    /// A plane of a server that has just started, at time 0. An owner that was not heard for `keep` loses its disks.
    #[must_use]
    pub fn new(keep: Duration) -> Self {
        Self {
            owners: Owners::new(keep),
            now: Duration::ZERO,
            closing: BTreeSet::new(),
            touched: BTreeSet::new(),
            effects: Vec::new(),
        }
    }

    /// Takes a request, at a time since the server's start; [`Plane::take_effects`] says what follows from it.
    pub fn handle(&mut self, on: Backing<'_>, now: Duration, session: SessionId, request: &Request) {
        self.now = now;
        if self.closing.contains(&session) && !matches!(request, Request::Gone(_)) {
            return;
        }
        match request {
            Request::Open(host, request) => self.open(on, session, host, request),
            Request::Frame(frame) => self.frame(on, session, &frame.frame()),
            Request::Close(request) => self.give_up(on, session, request),
            Request::Gone(silent) => {
                self.owners.leave(session, now.saturating_sub(*silent));
                self.closing.remove(&session);
            }
        }
    }

    /// Disks that the next commit is for.
    #[must_use]
    pub fn touched(&self) -> usize {
        self.touched.len()
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
            let Some(session) = self.owners.session(id) else { continue };
            if let Some(disk) = on.store.disk(id) {
                let ack = Ack { disk: id.0.to_vec(), durable_lsn: disk.durable_lsn().0 };
                self.effects.push(Effect::Send(session, Reply::Ack(ack)));
            }
        }
    }

    /// What is to be done, in this order.
    pub fn take_effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }

    fn open(&mut self, on: Backing<'_>, session: SessionId, host: &Host, request: &OpenDisk) {
        self.commit(on);
        let Ok(id) = wire::disk_id(&request.disk) else {
            return self.close(session, "it opens a disk whose id is not 16 bytes long".to_owned());
        };
        let right = self.owners.right(on.catalog, self.now, id, host, session);
        let opened = match right {
            Ok(Right::HeldBy(epoch, who)) => {
                self.effects.push(Effect::Held(session, id, who.clone()));
                let held =
                    DiskOpened { disk: id.0.to_vec(), epoch: epoch.0, refused: who, ..DiskOpened::default() };
                return self.effects.push(Effect::Send(session, Reply::Opened(held)));
            }
            Ok(Right::Overtaken) => {
                let why = format!("a newer connection of its host has opened disk {id}; connect anew");
                return self.close(session, why);
            }
            Ok(Right::InPlaceOf(old)) => {
                self.close(old, format!("the agent of its host has connected anew and opened disk {id}"));
                open_journal(on, id, host, request)
            }
            Ok(Right::Its) => open_journal(on, id, host, request),
            Err(error) => Err(error),
        };
        let answer = match opened {
            Ok(answer) => {
                let epoch = Epoch(answer.epoch);
                self.owners.insert(id, host.clone(), session, epoch);
                self.effects.push(Effect::Opened(session, host.id, id, epoch));
                answer
            }
            Err(error) => {
                self.owners.failed(id, host, session, self.now);
                let refused = error.to_string();
                self.effects.push(Effect::Failed(id, error));
                DiskOpened { disk: id.0.to_vec(), refused, ..DiskOpened::default() }
            }
        };
        self.effects.push(Effect::Send(session, Reply::Opened(answer)));
    }

    fn give_up(&mut self, on: Backing<'_>, session: SessionId, request: &CloseDisk) {
        let Ok(id) = wire::disk_id(&request.disk) else {
            return self.close(session, "it closes a disk whose id is not 16 bytes long".to_owned());
        };
        if self.owners.session(id) != Some(session) {
            return;
        }
        self.commit(on);
        self.owners.remove(id);
        if let Err(error) = on.catalog.give_up(id, wire::gap_reason(request.ended)) {
            // It costs another host a wait, and only if the server is started anew before the disk is opened again.
            self.effects.push(Effect::Failed(id, error));
        }
        self.effects.push(Effect::Closed(session, id));
    }

    fn frame(&mut self, on: Backing<'_>, session: SessionId, frame: &Frame<'_>) {
        let header = frame.header();
        let id = header.disk();
        let Some((epoch, refused)) = self.owners.granted(id, session) else {
            let message = "the disk was not opened on this connection; open it first";
            self.effects.push(Effect::Send(session, refusal(id, message)));
            return;
        };
        if refused {
            return;
        }
        if epoch != header.epoch() {
            let message = format!("epoch {} is not the one opened, {}", header.epoch().0, epoch.0);
            return self.refuse(id, &message);
        }
        match on.store.append(frame) {
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
        if let Some(session) = self.owners.refuse(id) {
            self.effects.push(Effect::Send(session, refusal(id, message)));
        }
    }

    fn close(&mut self, session: SessionId, reason: String) {
        self.owners.leave(session, self.now);
        self.closing.insert(session);
        self.effects.push(Effect::Close(session, reason));
    }
}

fn open_journal(
    on: Backing<'_>,
    id: DiskId,
    host: &Host,
    request: &OpenDisk,
) -> Result<DiskOpened, ServerError> {
    if request.disk_bytes > MAX_DISK_BYTES {
        return Err(ServerError::Protocol(format!("the disk is larger than {MAX_DISK_BYTES} bytes")));
    }
    let disk = on.store.open_or_create(id, request.disk_bytes)?;
    on.catalog.adopt_from_store(id, request.disk_bytes)?;
    let resume = (request.resume_epoch != 0).then_some(Epoch(request.resume_epoch));
    let (stored, closed_image) = (disk.last_epoch(), disk.closed_image());
    let in_order = disk.durable_lsn() == Lsn::ZERO || closed_image.is_some();
    let begins = if in_order { GapReason::Attach } else { on.catalog.begins(id, stored)? };
    let epoch = on.catalog.grant_epoch(id, stored, resume, host.id)?;
    Ok(DiskOpened {
        disk: id.0.to_vec(),
        durable_lsn: disk.durable_lsn().0,
        durable_stamp: disk.durable_stamp().0,
        epoch: epoch.0,
        refused: String::new(),
        closed_image: closed_image.map(|image| image.0.to_vec()).unwrap_or_default(),
        begins: if resume == Some(epoch) { 0 } else { begins as u32 },
    })
}

fn refusal(id: DiskId, message: &str) -> Reply {
    let retry_ms = u32::try_from(RETRY_AFTER.as_millis()).unwrap_or(u32::MAX);
    Reply::Refused(Refused { disk: id.0.to_vec(), message: message.to_owned(), retry_ms })
}
