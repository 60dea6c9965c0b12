//! The end of one of the active segment's files: where entries are appended.

use std::path::PathBuf;
use std::sync::Arc;

use journal_format::segment::{next_commit, next_entry};

use crate::error::StoreError;
use crate::io::File;

/// The end of one of the active segment's files.
///
/// Entries of one durability step lie one behind the other, so small ones wait in memory and are written together: a disk
/// among many has a few KiB for each step, and four writes for each of its frames would cost more than all the rest.
#[derive(Debug)]
pub(super) struct Tail {
    pub(super) file: Arc<dyn File>,
    pub(super) path: PathBuf,
    /// Where the last entry ends.
    end: u64,
    /// Whether the next entry is the first after a durability step: then it begins a page, so that no page with
    /// acknowledged bytes is written again.
    fresh: bool,
    /// What is not written yet: it ends at `end`.
    waiting: Vec<u8>,
}

impl Tail {
    /// The tail of a file whose last entry ends at `end`, all of it durable.
    pub(super) fn new(file: Arc<dyn File>, path: PathBuf, end: u64) -> Self {
        Self { file, path, end, fresh: true, waiting: Vec::new() }
    }

    /// Where the last entry ends.
    pub(super) const fn end(&self) -> u64 {
        self.end
    }

    /// Where the next entry goes.
    pub(super) fn next(&self) -> u64 {
        if self.fresh { next_commit(self.end) } else { next_entry(self.end) }
    }

    /// Appends an entry's two parts at [`Tail::next`]. They are in the file after the next [`Tail::write_out`], at the latest;
    /// at most `most` bytes wait, and a header.
    pub(super) fn append(&mut self, header: &[u8], rest: &[u8], most: usize) -> Result<(), StoreError> {
        let position = self.next();
        if !self.waiting.is_empty() {
            // Entries begin at multiples of 8; what is between them is zero.
            let padding = usize::try_from(position.saturating_sub(self.end)).unwrap_or_default();
            self.waiting.resize(self.waiting.len().saturating_add(padding), 0);
        }
        self.fresh = false;
        self.waiting.extend_from_slice(header);
        self.end = position.saturating_add(header.len() as u64);
        if self.waiting.len().saturating_add(rest.len()) <= most {
            self.waiting.extend_from_slice(rest);
        } else {
            self.write_out()?;
            self.file.write_at(rest, self.end).map_err(StoreError::io("write", &self.path))?;
        }
        self.end = self.end.saturating_add(rest.len() as u64);
        Ok(())
    }

    /// Writes what waits.
    pub(super) fn write_out(&mut self) -> Result<(), StoreError> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let position = self.end.saturating_sub(self.waiting.len() as u64);
        let written = self.file.write_at(&self.waiting, position);
        self.waiting.clear();
        written.map_err(StoreError::io("write", &self.path))
    }

    /// Everything up to the end is durable.
    pub(super) fn is_durable(&mut self) {
        debug_assert!(self.waiting.is_empty(), "what was not written cannot be durable");
        self.fresh = true;
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Mutex;

    use super::*;
    use crate::io::{Answer, Call, CallKind, Hook, HookStorage, MemStorage, Storage};

    const MOST: usize = 5000;

    /// Counts writes.
    #[derive(Default, Debug)]
    struct Writes(Mutex<usize>);

    impl Hook for Writes {
        fn before(&self, call: &Call<'_>) -> Answer {
            *self.0.lock().unwrap() += usize::from(call.kind == CallKind::Write);
            Answer::Go
        }
    }

    /// Appends steps of entries of these sizes; the file's contents, and how often it was written.
    fn appended(steps: &[&[usize]]) -> (Vec<u8>, usize) {
        let (memory, writes) = (MemStorage::new(), Arc::new(Writes::default()));
        let storage = HookStorage::new(Arc::new(memory.clone()), Arc::clone(&writes) as Arc<dyn Hook>);
        let path = PathBuf::from("/folder/tail");
        storage.create_dir(Path::new("/folder")).unwrap();
        let made = storage.create(&path).unwrap();
        let mut tail = Tail::new(made, path, 4096);
        let mut expected = Vec::new();
        tail.file.write_at(&[0; 4096], 0).unwrap();
        for (number, bytes) in steps.iter().flat_map(|step| step.iter().map(Some).chain([None])).enumerate() {
            let Some(&bytes) = bytes else {
                tail.write_out().unwrap();
                tail.is_durable();
                continue;
            };
            let entry = vec![number as u8 + 1; bytes];
            let (header, rest) = entry.split_at(bytes.min(100));
            expected.resize(tail.next() as usize, 0);
            expected.extend_from_slice(&entry);
            tail.append(header, rest, MOST).unwrap();
            assert_eq!(tail.end(), expected.len() as u64);
        }
        let written = memory.files().remove(Path::new("/folder/tail")).unwrap();
        assert_eq!(written, expected);
        let count = *writes.0.lock().unwrap() - 1;
        (written, count)
    }

    #[test]
    fn small_entries_of_a_step_are_written_at_once_and_each_step_begins_a_page() {
        let (bytes, writes) = appended(&[&[1000, 1001, 1002], &[17], &[], &[8]]);
        assert_eq!((bytes.len(), writes), (4096 * 3 + 8, 3));
    }

    #[test]
    fn entries_of_any_size_lie_where_they_belong() {
        let large = 3 * MOST;
        let (_, writes) = appended(&[&[large], &[5, large + 3, 6, 7], &[MOST - 1, 300, 300]]);
        // A large one's header goes out with what waits.
        assert_eq!(writes, 2 + 3 + 3);
    }
}
