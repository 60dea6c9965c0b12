//! The committer: one thread that drives the [`Plane`] for all agents: it appends frames of all disks, makes them durable
//! together, and acknowledges.
//!
//! While one commit runs the next batch gathers in the queue; so the batch size follows the load. A batch that is worth a
//! commit already is a sign of more to come, and waits a moment for it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use journal_format::{DiskId, Epoch};

use crate::core::Core;
use crate::data::peer::Peer;
use crate::data::plane::{Backing, Effect, Plane, Reply, Request, SessionId};
use crate::data::queue::{Queue, Weighty};
use crate::data::spares::Spares;
use crate::error::ServerError;
use crate::limits::{BATCH_BYTES, DISK_BATCH_BYTES, LINGER, LINGER_MOST, MAX_BATCH_BYTES};

/// What a connection asks of the data plane.
#[derive(Debug)]
pub(crate) struct Work {
    pub(crate) peer: Arc<Peer>,
    pub(crate) request: Request,
}

impl Weighty for Work {
    fn weight(&self) -> usize {
        let held = match &self.request {
            Request::Open(..) | Request::Close(_) | Request::Gone(_) => 0,
            Request::Frame(frame) => frame.bytes_held(),
        };
        held.saturating_add(size_of::<Self>())
    }
}

/// The plane's driver.
struct Committer<'a> {
    core: &'a Core,
    spares: &'a Spares,
    plane: Plane,
    peers: HashMap<SessionId, Arc<Peer>>,
    started: Instant,
    /// Whether it was said that data goes through the page cache.
    told: bool,
}

/// The committer's thread: until the queue is closed and empty.
pub(crate) fn run(core: &Core, queue: &Queue<Work>, spares: &Spares) {
    let (plane, started) = (Plane::new(core.patience.idle), Instant::now());
    let mut committer = Committer { core, spares, plane, peers: HashMap::new(), started, told: false };
    let on = Backing { store: &core.store, catalog: &core.catalog };
    while let Some(batch) = queue.take(BATCH_BYTES) {
        let begun = Instant::now();
        let mut bytes = committer.handle_all(on, batch);
        // What waits already would wait for this commit and for the next.
        while let Some(patience) = patience(bytes, committer.worth_bytes(), begun.elapsed())
            && let Some(more) = queue.take_more(BATCH_BYTES, patience)
        {
            bytes = bytes.saturating_add(committer.handle_all(on, more));
        }
        committer.plane.commit(on);
        committer.perform();
        committer.tell_of_the_cache();
    }
}

impl Committer<'_> {
    /// Handles requests in order; the bytes that they held.
    fn handle_all(&mut self, on: Backing<'_>, batch: Vec<Work>) -> usize {
        let mut bytes = 0_usize;
        for work in batch {
            bytes = bytes.saturating_add(work.weight());
            self.handle(on, work);
        }
        bytes
    }

    /// Says once that the file system makes writing dearer than it need be.
    fn tell_of_the_cache(&mut self) {
        if !self.told && self.core.store.writes_through_cache() {
            self.told = true;
            tracing::info!(
                "data went through the page cache, which takes more of the processor's time: the store's file system or device takes no direct I/O, or a data file could not be opened for it just then"
            );
        }
    }

    /// Bytes that a commit should have, if so many wait.
    fn worth_bytes(&self) -> usize {
        self.plane.touched().saturating_mul(DISK_BATCH_BYTES).min(MAX_BATCH_BYTES)
    }

    fn handle(&mut self, on: Backing<'_>, Work { peer, request }: Work) {
        let session = peer.id;
        match request {
            Request::Gone(_) => drop(self.peers.remove(&session)),
            _ => drop(self.peers.insert(session, peer)),
        }
        self.plane.handle(on, self.started.elapsed(), session, &request);
        if let Request::Frame(frame) = request {
            self.spares.give_back(frame.into_bytes());
        }
        self.perform();
    }

    fn perform(&mut self) {
        for effect in self.plane.take_effects() {
            match effect {
                Effect::Send(session, reply) => self.send(session, &reply),
                Effect::Close(session, reason) => {
                    if let Some(peer) = self.peers.get(&session) {
                        peer.close(&reason);
                    }
                }
                Effect::Opened(session, host, disk, epoch) => {
                    self.core.fleet.opened(session, host, disk, epoch);
                    self.opened(session, disk, epoch);
                }
                Effect::Held(session, disk, why) => {
                    tracing::debug!(%disk, agent = self.label(session), why, "refused a disk that another host has");
                    self.core.fleet.held(session, disk, why);
                }
                Effect::Closed(session, disk) => {
                    tracing::info!(%disk, agent = self.label(session), "disk given up");
                    self.core.fleet.closed(disk);
                }
                Effect::Appended(header) => self.core.counters.frame(&header),
                Effect::Failed(disk, error) => {
                    tracing::warn!(%disk, %error, "cannot write the disk's journal now; its agent keeps the frames");
                    if let ServerError::Store(error) = &error {
                        self.core.note(disk, error);
                    }
                }
                Effect::Committed(disk) => {
                    if let Some(store) = self.core.store.disk(disk) {
                        self.core.faults.over(disk, store.durable_lsn());
                    }
                }
            }
        }
    }

    fn opened(&self, session: SessionId, disk: DiskId, epoch: Epoch) {
        tracing::info!(%disk, agent = self.label(session), epoch = epoch.0, "disk opened");
        if self.core.store.disk(disk).is_some_and(|store| store.known_damage().is_empty()) {
            self.core.faults.whole(disk);
        }
        self.core.write_name(disk);
    }

    fn send(&self, session: SessionId, reply: &Reply) {
        if let Reply::Refused(refused) = reply {
            let message = &refused.message;
            tracing::warn!(
                agent = self.label(session),
                message,
                "refusing frames; the agent keeps them and tries again"
            );
        }
        if let Some(peer) = self.peers.get(&session) {
            peer.send_bytes(reply.encode());
        }
    }

    fn label(&self, session: SessionId) -> &str {
        self.peers.get(&session).map_or("", |peer| &peer.label)
    }
}

/// How long a batch of so many bytes, which should have `worth` if so many wait, waits for more when it was begun so long ago; `None`
/// if it is to be made durable.
fn patience(bytes: usize, worth: usize, age: Duration) -> Option<Duration> {
    if bytes < worth {
        return Some(Duration::ZERO);
    }
    (bytes < BATCH_BYTES && age < LINGER_MOST).then_some(LINGER)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_batch_that_is_worth_it_waits_for_more_and_not_for_long() {
        let (now, old) = (Duration::ZERO, LINGER_MOST);
        // One disk: a frame or two are made durable at once, unless more is there.
        assert_eq!(patience(500_000, DISK_BATCH_BYTES, old), Some(Duration::ZERO));
        assert_eq!(patience(DISK_BATCH_BYTES, DISK_BATCH_BYTES, now), Some(LINGER));
        assert_eq!(patience(DISK_BATCH_BYTES, DISK_BATCH_BYTES, old), None);
        assert_eq!(patience(BATCH_BYTES, DISK_BATCH_BYTES, now), None);
        // Many disks: as much as is there, however old, and nobody waits for more.
        let worth = 40 * DISK_BATCH_BYTES;
        assert_eq!(patience(BATCH_BYTES, worth, old), Some(Duration::ZERO));
        assert_eq!(patience(worth, worth, now), None);
    }
}
