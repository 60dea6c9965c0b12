//! Hashes of what a disk's journal holds, for agents that compare instead of copying.
//!
//! On threads of their own, beside the way of the frames: an acknowledgement never waits for a hash. What cannot be
//! done now (too many requests wait, the LSN is not durable yet, the data is damaged) is answered with "not known", and the
//! agent ships what it has.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;

use journal_format::chunk_hash::{CHUNK_BYTES, CHUNK_HASH_BYTES};
use journal_format::wire::{self, HashRequest, Hashes, MAX_HASH_CHUNKS};
use journal_format::{ByteRange, ChunkHash, Lsn};
use journal_store::{Extent, ExtentKind, Store, StoreError, View};

use crate::core::Core;
use crate::data::peer::Peer;
use crate::error::ServerError;
use crate::limits::{HASH_QUEUE, HASH_READ_BYTES, HASH_THREADS, MAX_HASH_REQUESTS};

const CHUNK: u64 = CHUNK_BYTES as u64;

/// A request that waits.
#[derive(Debug)]
struct Job {
    peer: Arc<Peer>,
    request: HashRequest,
    _place: Place,
}

/// One of a connection's [`MAX_HASH_REQUESTS`].
#[derive(Debug)]
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        // ORDERING: a limit; nothing is published through it.
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The threads that hash. They end when the last sender is gone.
#[derive(Clone, Debug)]
pub(crate) struct Hashers {
    jobs: SyncSender<Job>,
}

impl Hashers {
    /// Starts them.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub(crate) fn start(core: &Arc<Core>) -> Result<Self, ServerError> {
        let (jobs, waiting) = sync_channel(HASH_QUEUE);
        let waiting = Arc::new(Mutex::new(waiting));
        for _ in 0..HASH_THREADS {
            // Weak: a server that has stopped gives its store up at once.
            let (core, waiting) = (Arc::downgrade(core), Arc::clone(&waiting));
            thread::Builder::new()
                .name("cdp-hash".to_owned())
                .spawn(move || work(&core, &waiting))
                .map_err(|e| ServerError::io("start thread", "cdp-hash", e))?;
        }
        Ok(Self { jobs })
    }

    /// Queues a request of a connection that has `open` ones under way; answers it at once when that cannot be.
    ///
    /// # Errors
    /// `Protocol` for a request that no agent makes.
    pub(crate) fn ask(
        &self,
        peer: &Arc<Peer>,
        open: &Arc<AtomicUsize>,
        request: HashRequest,
    ) -> Result<(), ServerError> {
        wire::disk_id(&request.disk)?;
        if !(1..=MAX_HASH_CHUNKS).contains(&request.chunks) {
            return Err(ServerError::Protocol(format!("hashes of {} chunks at once", request.chunks)));
        }
        // ORDERING: as in `Place`; only this connection's reader adds.
        let before = open.fetch_add(1, Ordering::Relaxed);
        let place = Place(Arc::clone(open));
        if before >= MAX_HASH_REQUESTS {
            peer.send(&answer(&request, Vec::new()));
            return Ok(());
        }
        let job = Job { peer: Arc::clone(peer), request, _place: place };
        if let Err(full) = self.jobs.try_send(job) {
            let (TrySendError::Full(job) | TrySendError::Disconnected(job)) = full;
            job.peer.send(&answer(&job.request, Vec::new()));
        }
        Ok(())
    }
}

fn work(core: &Weak<Core>, waiting: &Mutex<Receiver<Job>>) {
    loop {
        // Held while waiting: the others wait for the lock instead, which is the same.
        let next = waiting.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Some((job, core)) = next.ok().zip(core.upgrade()) else { return };
        if !job.peer.is_closed() {
            job.peer.send(&known(&core.store, &job.request));
        }
    }
}

fn answer(request: &HashRequest, hashes: Vec<u8>) -> Hashes {
    Hashes {
        disk: request.disk.clone(),
        epoch: request.epoch,
        lsn: request.lsn,
        first_chunk: request.first_chunk,
        chunks: request.chunks,
        hashes,
    }
}

/// What a store's journals have where a request asks; without hashes when nothing can be said.
#[must_use]
pub fn known(store: &Store, request: &HashRequest) -> Hashes {
    answer(request, hashes_at(store, request))
}

fn hashes_at(store: &Store, request: &HashRequest) -> Vec<u8> {
    let disk = wire::disk_id(&request.disk).ok().and_then(|id| store.disk(id));
    let Some(disk) = disk.filter(|_| request.lsn > 0) else { return Vec::new() };
    // Also inside a gap: replay would begin with exactly these bytes, whatever the disk held.
    let Ok(view) = disk.view_in_gap(Lsn(request.lsn)) else { return Vec::new() };
    match hash_chunks(&view, request.first_chunk, request.chunks) {
        Ok(hashes) => hashes.iter().flat_map(|hash| hash.0).collect(),
        Err(error) => {
            tracing::warn!(disk = %disk.id(), lsn = request.lsn, %error, "cannot hash; the agent copies instead");
            Vec::new()
        }
    }
}

/// Hashes of some chunks at a view's point. Chunks of zeroes are not read; those behind the disk's end are zeroes; those
/// that cannot be read are [`ChunkHash::UNKNOWN`].
///
/// # Errors
/// When the view cannot even say which chunks hold data.
fn hash_chunks(view: &View, first: u64, count: u32) -> Result<Vec<ChunkHash>, StoreError> {
    let mut hashes = vec![ChunkHash::of(&[]); count as usize];
    let from = first.saturating_mul(CHUNK).min(view.disk_bytes());
    let end = first.saturating_add(u64::from(count)).saturating_mul(CHUNK).min(view.disk_bytes());
    let Some(range) = ByteRange::new(from, end.saturating_sub(from)).filter(|range| !range.is_empty()) else {
        return Ok(hashes);
    };
    for run in data_runs(view.extents(range)?, end)? {
        hash_run(view, run, first, &mut hashes);
    }
    Ok(hashes)
}

/// The stretches with data, widened to whole chunks (or the end), disjoint, in order, cut to [`HASH_READ_BYTES`].
fn data_runs(
    extents: impl Iterator<Item = Result<Extent, StoreError>>,
    end: u64,
) -> Result<Vec<(u64, u64)>, StoreError> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for extent in extents {
        let extent = extent?;
        if extent.kind != ExtentKind::Data {
            continue;
        }
        let mut start = extent.range.offset() / CHUNK * CHUNK;
        let stop = extent.range.end().next_multiple_of(CHUNK).min(end);
        if let Some((_, last)) = runs.last() {
            start = start.max(*last);
        }
        while start < stop {
            let cut = stop.min(start.saturating_add(HASH_READ_BYTES));
            match runs.last_mut() {
                Some((begin, last)) if *last == start && cut - *begin <= HASH_READ_BYTES => *last = cut,
                _ => runs.push((start, cut)),
            }
            start = cut;
        }
    }
    Ok(runs)
}

/// Reads a run at once; where that fails, each of its chunks alone.
fn hash_run(view: &View, (start, end): (u64, u64), first: u64, hashes: &mut [ChunkHash]) {
    let mut buffer = vec![0; usize::try_from(end - start).unwrap_or(0)];
    let whole = view.read(start, &mut buffer).is_ok();
    for (index, data) in buffer.chunks_mut(CHUNK_BYTES).enumerate() {
        let chunk = start / CHUNK + index as u64;
        let known = whole || view.read(chunk * CHUNK, data).is_ok();
        let place = usize::try_from(chunk.saturating_sub(first)).ok().and_then(|at| hashes.get_mut(at));
        if let Some(place) = place {
            *place = if known { ChunkHash::of(data) } else { ChunkHash::UNKNOWN };
        }
    }
}

const _: () = assert!(HASH_READ_BYTES.is_multiple_of(CHUNK));
const _: () = assert!(MAX_HASH_CHUNKS as usize * CHUNK_HASH_BYTES + 256 < wire::MAX_CONTROL_BYTES);
