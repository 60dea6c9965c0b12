//! Pieces of large steps are written by a thread of the store while the next are gathered: whoever appends would wait for the disk
//! half of its time otherwise.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::Builder;

use zerocopy::IntoBytes;

use super::pages::{Page, PageWriting};
use crate::io::{File, Way};

/// The thread that writes the pieces of all disks of a store, in the order in which they come. It begins with the first piece
/// and ends with the store.
#[derive(Debug)]
pub(super) struct Behind {
    /// Pieces that wait or are written at the same time, at most; with 0 there is no thread.
    most: usize,
    /// `None` where there is none.
    thread: OnceLock<Option<SyncSender<Piece>>>,
}

impl Behind {
    pub(super) const fn new(most: usize) -> Self {
        Self { most, thread: OnceLock::new() }
    }

    /// Has a piece written; what became of it is with its [`Ticket`]. Waits while as many as may be are under way.
    pub(super) fn write(&self, piece: Piece) {
        match self.thread.get_or_init(|| self.start()) {
            Some(thread) => {
                if let Err(unsent) = thread.send(piece) {
                    unsent.0.write();
                }
            }
            None => piece.write(),
        }
    }

    fn start(&self) -> Option<SyncSender<Piece>> {
        // One is being written, the others wait.
        let (sender, pieces) = sync_channel::<Piece>(self.most.checked_sub(1)?);
        // Without a thread everything takes longer, and works.
        Builder::new()
            .name("cdp-write".to_owned())
            .spawn(move || pieces.into_iter().for_each(Piece::write))
            .ok()?;
        Some(sender)
    }
}

/// Pages on their way to a file.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) file: Arc<dyn File>,
    pub(super) pages: Vec<Page>,
    /// How many bytes of the pages are written: whole pages.
    pub(super) bytes: usize,
    /// Where, in bytes.
    pub(super) position: u64,
    /// Where the memory goes afterwards.
    pub(super) shared: Arc<PageWriting>,
    pub(super) ticket: Ticket,
}

impl Piece {
    fn write(self) {
        let Self { file, pages, bytes, position, shared, ticket } = self;
        let written = match pages.as_slice().as_bytes().get(..bytes) {
            Some(bytes) => file.write_pages(bytes, position),
            None => Err(io::ErrorKind::InvalidInput.into()),
        };
        if let Ok(Way::Cached) = written {
            // ORDERING: nothing is published by it.
            shared.cached.store(true, Ordering::Relaxed);
        }
        shared.put(pages);
        // Whoever waits for it finds the file closed and the memory given back.
        drop((file, shared));
        ticket.lands(written.map(drop));
    }
}

/// The pieces of one file that are under way.
#[derive(Default, Debug)]
pub(super) struct UnderWay(Arc<Flights>);

#[derive(Default, Debug)]
struct Flights {
    state: Mutex<Flying>,
    landed: Condvar,
}

#[derive(Default, Debug)]
struct Flying {
    count: usize,
    /// The first failure that nobody was told of.
    failed: Option<io::Error>,
}

impl UnderWay {
    /// For one more piece.
    pub(super) fn ticket(&self) -> Ticket {
        self.0.lock().count += 1;
        Ticket { of: Arc::clone(&self.0), result: None }
    }

    /// What is known of the pieces so far, without waiting.
    ///
    /// # Errors
    /// The first failure since this was last asked.
    pub(super) fn so_far(&self) -> io::Result<()> {
        self.0.lock().failed.take().map_or(Ok(()), Err)
    }

    /// Waits until none is under way.
    ///
    /// # Errors
    /// The first failure since this was last asked.
    pub(super) fn all(&self) -> io::Result<()> {
        let flying = |flying: &mut Flying| flying.count > 0;
        let mut state =
            self.0.landed.wait_while(self.0.lock(), flying).unwrap_or_else(PoisonError::into_inner);
        state.failed.take().map_or(Ok(()), Err)
    }
}

impl Flights {
    fn lock(&self) -> MutexGuard<'_, Flying> {
        // It is changed in single steps, none of which panics.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Says what became of a piece, at the latest when it is dropped.
#[derive(Debug)]
pub(super) struct Ticket {
    of: Arc<Flights>,
    result: Option<io::Result<()>>,
}

impl Ticket {
    fn lands(mut self, written: io::Result<()>) {
        self.result = Some(written);
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let lost = || Err(io::Error::other("the thread that wrote it panicked"));
        let result = self.result.take().unwrap_or_else(lost);
        let mut state = self.of.lock();
        state.count = state.count.saturating_sub(1);
        if let Err(error) = result {
            state.failed.get_or_insert(error);
        }
        drop(state);
        self.of.landed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_failure_is_told_once_and_a_piece_that_nobody_finished_has_failed() {
        let under_way = UnderWay::default();
        let [good, bad, worse, lost] = std::array::from_fn(|_| under_way.ticket());
        good.lands(Ok(()));
        under_way.so_far().expect("nothing has failed");
        bad.lands(Err(io::ErrorKind::StorageFull.into()));
        worse.lands(Err(io::ErrorKind::TimedOut.into()));
        assert_eq!(under_way.so_far().expect_err("one has").kind(), io::ErrorKind::StorageFull);
        under_way.so_far().expect("it was told");
        drop(lost);
        under_way.all().expect_err("it was not written");
        under_way.all().expect("none is under way");
    }
}
