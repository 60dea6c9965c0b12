//! The committer: one thread that appends frames of all disks, makes them durable together, and acknowledges.
//!
//! It alone decides who may write a disk, in the order of the queue: when a connection opens a disk, everything queued
//! before is committed first, an older owner is closed, and frames that still come from it are dropped. So the answer
//! to an open says where the journal really ends, and no frame of an older owner can come after it.
//!
//! An acknowledgement leaves only after the commit that covers it (invariant I5). While one commit runs the next batch
//! gathers in the queue; so the batch size follows the load, without a timer.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use journal_format::limits::MAX_DISK_BYTES;
use journal_format::wire::{self, DiskOpened, OpenDisk};
use journal_format::{DiskId, Epoch, Frame};
use journal_store::StoreError;

use crate::core::Core;
use crate::data::peer::{Peer, SessionId};
use crate::data::queue::{Queue, Weighty};
use crate::error::ServerError;
use crate::limits::{BATCH_BYTES, RETRY_AFTER};

/// What readers hand to the committer.
#[derive(Debug)]
pub(crate) enum Work {
    /// A peer wants to write a disk.
    Open { peer: Arc<Peer>, request: OpenDisk },
    /// A frame that parses.
    Frame { peer: Arc<Peer>, bytes: Vec<u8> },
    /// A connection has ended.
    Gone { session: SessionId },
}

impl Weighty for Work {
    fn weight(&self) -> usize {
        let held = match self {
            Self::Open { .. } | Self::Gone { .. } => 0,
            Self::Frame { bytes, .. } => bytes.len(),
        };
        held.saturating_add(size_of::<Self>())
    }
}

/// Who may write a disk.
#[derive(Debug)]
struct Owner {
    peer: Arc<Peer>,
    epoch: Epoch,
    /// It was told that its frames are refused; it opens the disk again before it sends more.
    refused: bool,
}

/// The committer's state.
#[derive(Debug)]
pub(crate) struct Committer {
    core: Arc<Core>,
    owners: HashMap<DiskId, Owner>,
    /// Disks with frames since the last commit, also those whose frames were all known: they are acknowledged too.
    touched: BTreeSet<DiskId>,
}

/// The committer's thread: until the queue is closed and empty.
pub(crate) fn run(core: Arc<Core>, queue: &Queue<Work>) {
    let mut committer = Committer { core, owners: HashMap::new(), touched: BTreeSet::new() };
    while let Some(batch) = queue.take(BATCH_BYTES) {
        for work in batch {
            committer.handle(work);
        }
        committer.commit();
    }
}

impl Committer {
    fn handle(&mut self, work: Work) {
        match work {
            Work::Open { peer, request } => self.open(&peer, &request),
            Work::Frame { peer, bytes } => self.frame(&peer, &bytes),
            Work::Gone { session } => self.owners.retain(|_, owner| owner.peer.id != session),
        }
    }

    fn open(&mut self, peer: &Arc<Peer>, request: &OpenDisk) {
        self.commit();
        let Ok(id) = wire::disk_id(&request.disk) else {
            return peer.close("it opens a disk whose id is not 16 bytes long");
        };
        if let Some(old) = self.owners.remove(&id)
            && old.peer.id != peer.id
        {
            old.peer.close(&format!("{} has opened its disk {id}", peer.label));
        }
        let answer = match self.open_journal(id, request) {
            Ok(answer) => {
                tracing::info!(disk = %id, agent = peer.label, epoch = answer.epoch, lsn = answer.durable_lsn, "disk opened");
                let owner = Owner { peer: Arc::clone(peer), epoch: Epoch(answer.epoch), refused: false };
                self.owners.insert(id, owner);
                answer
            }
            Err(error) => {
                tracing::warn!(disk = %id, agent = peer.label, %error, "cannot open the disk's journal");
                if let ServerError::Store(error) = &error {
                    self.core.note(id, error);
                }
                DiskOpened { disk: id.0.to_vec(), refused: error.to_string(), ..DiskOpened::default() }
            }
        };
        peer.send(&answer);
    }

    fn open_journal(&self, id: DiskId, request: &OpenDisk) -> Result<DiskOpened, ServerError> {
        if request.disk_bytes > MAX_DISK_BYTES {
            return Err(ServerError::Protocol(format!("the disk is larger than {MAX_DISK_BYTES} bytes")));
        }
        let disk = self.core.store.open_or_create(id, request.disk_bytes)?;
        if disk.known_damage().is_empty() {
            self.core.faults.whole(id);
        }
        self.core.catalog.adopt_from_store(id, request.disk_bytes)?;
        let resume = (request.resume_epoch != 0).then_some(Epoch(request.resume_epoch));
        let epoch = self.core.catalog.grant_epoch(id, disk.last_epoch(), resume)?;
        self.core.write_name(id);
        Ok(DiskOpened {
            disk: id.0.to_vec(),
            durable_lsn: disk.durable_lsn().0,
            durable_stamp: disk.durable_stamp().0,
            epoch: epoch.0,
            refused: String::new(),
        })
    }

    fn frame(&mut self, peer: &Arc<Peer>, bytes: &[u8]) {
        let frame = match Frame::parse(bytes) {
            Ok(frame) => frame,
            Err(error) => return peer.close(&format!("a frame does not parse: {error}")),
        };
        let header = frame.header();
        let id = header.disk();
        let Some(owner) = self.owners.get(&id).filter(|owner| owner.peer.id == peer.id) else {
            if !peer.is_closed() {
                refuse(peer, id, "the disk was not opened on this connection; open it first");
            }
            return;
        };
        if owner.refused {
            return;
        }
        if owner.epoch != header.epoch() {
            let message = format!("epoch {} is not the one opened, {}", header.epoch().0, owner.epoch.0);
            return self.refuse(id, &message);
        }
        match self.core.store.append(&frame) {
            Ok(()) => {
                self.touched.insert(id);
                self.core.counters.frame(header);
            }
            Err(error) => self.failed(id, &error),
        }
    }

    /// Makes what was appended durable, and acknowledges it.
    fn commit(&mut self) {
        if self.touched.is_empty() {
            return;
        }
        let mut touched = std::mem::take(&mut self.touched);
        for (id, error) in self.core.store.commit() {
            touched.remove(&id);
            self.failed(id, &error);
        }
        for id in touched {
            self.core.faults.over(id);
            let Some(owner) = self.owners.get(&id) else { continue };
            if let Some(disk) = self.core.store.disk(id) {
                owner.peer.send(&wire::Ack { disk: id.0.to_vec(), durable_lsn: disk.durable_lsn().0 });
            }
        }
    }

    fn failed(&mut self, id: DiskId, error: &StoreError) {
        self.core.note(id, error);
        self.refuse(id, &error.to_string());
    }

    fn refuse(&mut self, id: DiskId, message: &str) {
        if let Some(owner) = self.owners.get_mut(&id).filter(|owner| !owner.refused) {
            owner.refused = true;
            refuse(&owner.peer, id, message);
        }
    }
}

fn refuse(peer: &Peer, id: DiskId, message: &str) {
    tracing::warn!(disk = %id, agent = peer.label, message, "refusing frames; the agent keeps them and tries again");
    let retry_ms = u32::try_from(RETRY_AFTER.as_millis()).unwrap_or(u32::MAX);
    peer.send(&wire::Refused { disk: id.0.to_vec(), message: message.to_owned(), retry_ms });
}
