//! The durable mark: written after each durability step, so that rot at the end of the log is not taken for a tear.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use journal_format::durable_mark::{DurableMark, MARK_BYTES, MARK_POSITIONS};
use journal_format::{DiskId, Lsn};

use crate::error::StoreError;
use crate::files;
use crate::io::{Access, File, Storage};

/// The mark's file, open for writing.
#[derive(Debug)]
pub(super) struct Mark {
    file: Arc<dyn File>,
    path: PathBuf,
    disk: DiskId,
    /// Which of the two places is written next.
    next: usize,
}

/// Makes the file, empty. Nothing waits for it to be durable.
pub(super) fn make(storage: &dyn Storage, dir: &Path) -> Result<Arc<dyn File>, StoreError> {
    let path = dir.join(files::DURABLE);
    storage.create(&path).map_err(StoreError::io("create", &path))
}

/// What the mark says; `Lsn::ZERO` if it says nothing.
pub(super) fn read(storage: &dyn Storage, dir: &Path, disk: DiskId) -> Result<Lsn, StoreError> {
    let marks = look(storage, dir, disk)?;
    Ok(marks.into_iter().filter_map(Result::ok).max().unwrap_or(Lsn::ZERO))
}

/// Both marks, or why one says nothing: `None` where nothing was written yet.
pub(super) fn look(
    storage: &dyn Storage,
    dir: &Path,
    disk: DiskId,
) -> Result<[Result<Lsn, Option<String>>; 2], StoreError> {
    let path = dir.join(files::DURABLE);
    let file = match storage.open(&path, Access::Read) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok([Err(None), Err(None)]),
        Err(error) => return Err(StoreError::io("open", &path)(error)),
    };
    let mut marks = [Err(None), Err(None)];
    for (mark, position) in marks.iter_mut().zip(MARK_POSITIONS) {
        let bytes = files::read_some(&*file, &path, position, MARK_BYTES)?;
        *mark = match DurableMark::parse(&bytes) {
            Ok(mark) if mark.disk == disk => Ok(mark.durable_lsn),
            Ok(_) => Err(Some("it is another disk's mark".to_owned())),
            Err(_) if bytes.iter().all(|byte| *byte == 0) => Err(None),
            Err(error) => Err(Some(error.to_string())),
        };
    }
    Ok(marks)
}

impl Mark {
    /// Opens the file to write it; makes it if it is missing.
    pub(super) fn open(storage: &dyn Storage, dir: &Path, disk: DiskId) -> Result<Self, StoreError> {
        let path = dir.join(files::DURABLE);
        let file = match storage.open(&path, Access::ReadWrite) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => make(storage, dir)?,
            opened => opened.map_err(StoreError::io("open", &path))?,
        };
        Ok(Self { file, path, disk, next: 0 })
    }

    /// Says that everything up to `durable_lsn` is durable, which must be so.
    pub(super) fn write(&mut self, durable_lsn: Lsn) -> Result<(), StoreError> {
        let bytes = DurableMark { disk: self.disk, durable_lsn }.encode();
        let position = MARK_POSITIONS.get(self.next).copied().unwrap_or_default();
        self.file.write_at(&bytes, position).map_err(StoreError::io("write", &self.path))?;
        self.next = (self.next + 1) % MARK_POSITIONS.len();
        Ok(())
    }
}
