//! A store with a synthetic history, written through the store's own functions.

use std::path::{Path, PathBuf};

use journal_format::{DiskId, Epoch, Frame, Lsn};
use journal_store::Store;

use crate::contents::{Batch, Journal};

/// Frames between two commits.
const COMMIT_FRAMES: usize = 256;

/// A store with one disk, of which nobody has it open.
pub(crate) struct Stored {
    pub(crate) root: PathBuf,
    pub(crate) disk: DiskId,
    pub(crate) disk_bytes: u64,
    pub(crate) last: Lsn,
}

impl Stored {
    /// Writes one: the whole disk from its start to its end if `filled`, then so many records of the batches at random places.
    /// It is left as a killed server leaves it, with its last segment open.
    pub(crate) fn write(
        root: PathBuf,
        disk_bytes: u64,
        batches: &[Batch],
        filled: bool,
        records: u64,
    ) -> Self {
        let disk = DiskId([5; 16]);
        let store = Store::open(&root).expect("a new store");
        store.open_or_create(disk, disk_bytes).expect("a new disk");
        let mut journal = Journal::new(disk, disk_bytes, Epoch(1));
        for head in journal.begin() {
            append(&store, &head, &[]);
        }
        let mut batches = batches.iter().cycle();
        let mut filled_bytes = if filled { 0 } else { disk_bytes };
        let (mut frames, mut left) = (0, records);
        while filled_bytes < disk_bytes || left > 0 {
            let batch = batches.next().expect("batches");
            let before = journal.last();
            let head = journal.frame(batch, (filled_bytes < disk_bytes).then_some(filled_bytes));
            append(&store, &head, &batch.data);
            match filled_bytes < disk_bytes {
                true => filled_bytes += batch.raw.len() as u64,
                false => left = left.saturating_sub(journal.last().since(before)),
            }
            frames += 1;
            if frames % COMMIT_FRAMES == 0 {
                commit(&store);
            }
        }
        commit(&store);
        Self { root, disk, disk_bytes, last: journal.last() }
    }

    /// Opens it as a restore without a server does.
    pub(crate) fn open(&self) -> Store {
        Store::open_read_only(&self.root).expect("the store")
    }

    pub(crate) fn path(&self) -> &Path {
        &self.root
    }
}

fn append(store: &Store, head: &[u8], data: &[u8]) {
    store.append(&Frame::from_parts(head, data).expect("a frame")).expect("it is taken");
}

fn commit(store: &Store) {
    let failed = store.commit();
    assert!(failed.is_empty(), "a commit failed: {failed:?}");
}
