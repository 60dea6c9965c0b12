//! The end of one of the active segment's files: where entries are appended.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use journal_format::segment::{ENTRY_ALIGN_BYTES, next_commit, next_entry};

use super::Env;
use super::pages::{Gathered, PageWriting};
use crate::error::StoreError;
use crate::io::File;

/// The end of one of the active segment's files.
///
/// Entries of one durability step lie one behind the other, so they wait in memory and are written together. Data is gathered in
/// whole pages, which go past the page cache if there is enough of it: putting it there costs more than everything else that the
/// store does with it. Of heads only small ones wait: a disk among many has a few KiB for each step, and four writes for each of its
/// frames would cost more than all the rest.
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
    waiting: Waiting,
}

#[derive(Debug)]
enum Waiting {
    /// At most `most` bytes, and a header; what is larger is written at once.
    Bytes { bytes: Vec<u8>, most: usize },
    /// Whole pages. A step begins with one and pads its last with zeroes, so none is written twice.
    Pages(Gathered),
}

impl Tail {
    /// The tail of a metadata file whose last entry ends at `end`, all of it durable.
    fn of_meta(file: Arc<dyn File>, path: PathBuf, end: u64, most: usize) -> Self {
        let waiting = Waiting::Bytes { bytes: Vec::new(), most };
        Self { file, path, end, fresh: true, waiting }
    }

    /// The tail of a data file whose last entry ends at `end`, all of it durable.
    fn of_data(file: Arc<dyn File>, path: PathBuf, end: u64, shared: Arc<PageWriting>) -> Self {
        Self { file, path, end, fresh: true, waiting: Waiting::Pages(Gathered::new(shared)) }
    }

    /// Where the last entry ends.
    pub(super) const fn end(&self) -> u64 {
        self.end
    }

    /// How long the file is when everything is written.
    pub(super) const fn file_bytes(&self) -> u64 {
        match self.waiting {
            Waiting::Bytes { .. } => self.end,
            Waiting::Pages(_) => next_commit(self.end),
        }
    }

    /// Where the next entry goes.
    pub(super) fn next(&self) -> u64 {
        if self.fresh { next_commit(self.end) } else { next_entry(self.end) }
    }

    /// Appends an entry's two parts at [`Tail::next`]. They are in the file after the next [`Tail::write_out`], at the latest.
    pub(super) fn append(&mut self, header: &[u8], rest: &[u8]) -> Result<(), StoreError> {
        let position = self.next();
        // Less than an entry's alignment inside a step; between two steps nothing waits.
        let gap = if self.fresh { 0 } else { position.saturating_sub(self.end) };
        self.fresh = false;
        self.end = position.saturating_add((header.len() as u64).saturating_add(rest.len() as u64));
        let from = position.saturating_sub(gap);
        let written = match &mut self.waiting {
            Waiting::Bytes { bytes, most } => {
                // With nothing waiting the file has a hole there, which reads as zeroes too.
                if !bytes.is_empty() {
                    bytes.resize(bytes.len().saturating_add(gap as usize), 0);
                }
                bytes.extend_from_slice(header);
                if bytes.len().saturating_add(rest.len()) <= *most {
                    bytes.extend_from_slice(rest);
                    return Ok(());
                }
                let begin = self.end.saturating_sub((bytes.len() as u64).saturating_add(rest.len() as u64));
                let written = self.file.write_at(bytes, begin);
                bytes.clear();
                written.and_then(|()| self.file.write_at(rest, self.end.saturating_sub(rest.len() as u64)))
            }
            Waiting::Pages(gathered) => {
                let zeroes = [0; ENTRY_ALIGN_BYTES as usize];
                let zeroes = zeroes.get(..gap as usize).unwrap_or(&zeroes);
                gather(gathered, &self.file, from, [zeroes, header, rest])
            }
        };
        written.map_err(StoreError::io("write", &self.path))
    }

    /// Writes what waits, and waits for what is on its way.
    pub(super) fn write_out(&mut self) -> Result<(), StoreError> {
        let written = match &mut self.waiting {
            Waiting::Bytes { bytes, .. } if !bytes.is_empty() => {
                let written = self.file.write_at(bytes, self.end.saturating_sub(bytes.len() as u64));
                bytes.clear();
                written
            }
            Waiting::Bytes { .. } => Ok(()),
            Waiting::Pages(gathered) => {
                let begin = self.end.saturating_sub(gathered.len() as u64);
                let written = if gathered.len() > 0 { gathered.write(&self.file, begin) } else { Ok(()) };
                // Also after a failure, and when the step has ended with a piece: nothing waits, and there is memory.
                let finished = gathered.finish();
                written.and(finished)
            }
        };
        written.map_err(StoreError::io("write", &self.path))
    }

    /// Drops what waits, and waits for what is on its way: then nothing of this tail changes the file any more.
    pub(super) fn abandon(&mut self) {
        match &mut self.waiting {
            Waiting::Bytes { bytes, .. } => bytes.clear(),
            Waiting::Pages(gathered) => drop(gathered.finish()),
        }
    }

    /// Drops the pages that wait, for their memory: nothing is appended any more.
    pub(super) fn give_up(&mut self) {
        if let Waiting::Pages(gathered) = &mut self.waiting {
            gathered.give_up();
        }
    }

    /// Everything up to the end is durable.
    pub(super) fn is_durable(&mut self) {
        self.fresh = true;
    }
}

/// Gathers parts that follow what waits; they begin at `position`. A piece that is full is written.
fn gather(gathered: &mut Gathered, file: &Arc<dyn File>, position: u64, parts: [&[u8]; 3]) -> io::Result<()> {
    let mut begin = position.saturating_sub(gathered.len() as u64);
    for mut part in parts {
        while !part.is_empty() {
            part = gathered.fill(part);
            if gathered.is_full() {
                gathered.write(file, begin)?;
                begin = begin.saturating_add(gathered.len() as u64);
                gathered.clear();
            }
        }
    }
    Ok(())
}

impl Env {
    /// The tail of a data file whose last entry ends at `end`.
    pub(super) fn data_tail(&self, file: Arc<dyn File>, path: PathBuf, end: u64) -> Tail {
        Tail::of_data(file, path, end, Arc::clone(&self.pages))
    }

    /// The tail of a metadata file whose last entry ends at `end`.
    pub(super) fn meta_tail(&self, file: Arc<dyn File>, path: PathBuf, end: u64) -> Tail {
        Tail::of_meta(file, path, end, self.config.waiting_bytes)
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

    /// Appends steps of entries of these sizes to a tail that `make` makes; the file's contents, and how often it was written.
    fn appended(steps: &[&[usize]], make: impl FnOnce(Arc<dyn File>, PathBuf) -> Tail) -> (Vec<u8>, usize) {
        let (memory, writes) = (MemStorage::new(), Arc::new(Writes::default()));
        let storage = HookStorage::new(Arc::new(memory.clone()), Arc::clone(&writes) as Arc<dyn Hook>);
        let path = PathBuf::from("/folder/tail");
        storage.create_dir(Path::new("/folder")).unwrap();
        let made = storage.create(&path).unwrap();
        let mut tail = make(made, path);
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
            tail.append(header, rest).unwrap();
            assert_eq!(tail.end(), expected.len() as u64);
        }
        let written = memory.files().remove(Path::new("/folder/tail")).unwrap();
        expected.resize(tail.file_bytes() as usize, 0);
        assert!(written == expected);
        let count = *writes.0.lock().unwrap() - 1;
        (written, count)
    }

    fn meta(file: Arc<dyn File>, path: PathBuf) -> Tail {
        Tail::of_meta(file, path, 4096, MOST)
    }

    /// With pieces of two pages, and of one until there were two where there is no room for whole ones; so many of them under way at once.
    fn behind(whole: usize, under_way: usize) -> impl Fn(Arc<dyn File>, PathBuf) -> Tail {
        move |file, path| Tail::of_data(file, path, 4096, Arc::new(PageWriting::new(8192, whole, under_way)))
    }

    fn data(file: Arc<dyn File>, path: PathBuf) -> Tail {
        behind(0, 0)(file, path)
    }

    #[test]
    fn small_entries_of_a_step_are_written_at_once_and_each_step_begins_a_page() {
        let steps: &[&[usize]] = &[&[1000, 1001, 1002], &[17], &[], &[8]];
        let (bytes, writes) = appended(steps, meta);
        assert_eq!((bytes.len(), writes), (4096 * 3 + 8, 3));
        let (bytes, writes) = appended(steps, data);
        assert_eq!((bytes.len(), writes), (4096 * 4, 3));
    }

    #[test]
    fn entries_of_any_size_lie_where_they_belong() {
        let large = 3 * MOST;
        let steps: &[&[usize]] = &[&[large], &[5, large + 3, 6, 7], &[MOST - 1, 300, 300]];
        let (_, writes) = appended(steps, meta);
        // A large one's header goes out with what waits.
        assert_eq!(writes, 2 + 3 + 3);
        // Two pages by themselves, then the piece that is left of the step, or whole pieces from the beginning: no page twice.
        for under_way in 0..4 {
            let (_, writes) = appended(steps, behind(0, under_way));
            assert_eq!(writes, 3 + 3 + 2);
            let (_, writes) = appended(steps, behind(1, under_way));
            assert_eq!(writes, 2 + 2 + 1);
        }
    }

    #[test]
    fn a_step_that_ends_with_a_piece_writes_nothing_more() {
        let (bytes, writes) = appended(&[&[8192], &[8192 - 64, 64], &[8192, 1]], data);
        assert_eq!((bytes.len(), writes), (4096 + 3 * 8192 + 4096, 2 + 2 + 3));
        let (whole, writes) = appended(&[&[8192], &[8192 - 64, 64], &[8192, 1]], behind(1, 0));
        assert_eq!((whole == bytes, writes), (true, 1 + 1 + 2));
    }
}
