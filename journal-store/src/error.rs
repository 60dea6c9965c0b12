//! The crate's one error type.

use std::path::{Path, PathBuf};

use journal_format::{DiskId, FormatError, Lsn};

use journal_format::PointError;

/// What kind of failure it was, to act on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum StoreErrorKind {
    /// The operating system refused a file operation.
    Io,
    /// Stored bytes are not what was written.
    Damaged,
    /// Another process writes this store.
    Locked,
    /// An earlier write failed; the disk must be opened again.
    Poisoned,
    /// There is no such disk.
    NoSuchDisk,
    /// The caller asked for something that cannot be.
    Invalid,
    /// The point cannot be restored.
    Point,
    /// The store was opened for reading only.
    ReadOnly,
}

/// Why the store could not do something.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file operation failed.
    #[error("cannot {operation} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb.
        operation: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// Stored bytes are damaged; whatever does not need them stays readable.
    #[error(
        "disk {disk}: {} is damaged at LSN {first_lsn} to {last_lsn}: {detail}; choose a point that does not need it, or \
         put back a copy of the file",
        path.display()
    )]
    Damaged {
        /// Whose file.
        disk: DiskId,
        /// Which file.
        path: PathBuf,
        /// First LSN that is affected.
        first_lsn: Lsn,
        /// Last LSN that is affected; [`Lsn::MAX`] when everything from the first on is.
        last_lsn: Lsn,
        /// What is wrong.
        detail: String,
    },
    /// Another process writes this store.
    #[error("{} is held by another process: stop the cdp-server that uses this store, or open it read-only", path.display())]
    Locked {
        /// The lock file.
        path: PathBuf,
    },
    /// A write or durability step has failed before.
    #[error(
        "disk {disk} takes no frames after a failure ({cause}); free space or repair the volume, then open the disk again"
    )]
    Poisoned {
        /// Which disk.
        disk: DiskId,
        /// The first failure.
        cause: String,
    },
    /// There is no such disk.
    #[error("the store has no disk {disk}; list the disks to see what it has")]
    NoSuchDisk {
        /// Which disk was asked for.
        disk: DiskId,
    },
    /// The caller asked for something that cannot be.
    #[error("disk {disk}: {detail}")]
    Invalid {
        /// Which disk.
        disk: DiskId,
        /// What is wrong and what to do.
        detail: String,
    },
    /// The point cannot be restored.
    #[error(transparent)]
    Point(#[from] PointError),
    /// The store was opened for reading only.
    #[error("the store was opened for reading only; open it for writing to change it")]
    ReadOnly,
}

impl StoreError {
    /// The kind, to match on.
    #[must_use]
    pub const fn kind(&self) -> StoreErrorKind {
        match self {
            Self::Io { .. } => StoreErrorKind::Io,
            Self::Damaged { .. } => StoreErrorKind::Damaged,
            Self::Locked { .. } => StoreErrorKind::Locked,
            Self::Poisoned { .. } => StoreErrorKind::Poisoned,
            Self::NoSuchDisk { .. } => StoreErrorKind::NoSuchDisk,
            Self::Invalid { .. } => StoreErrorKind::Invalid,
            Self::Point(_) => StoreErrorKind::Point,
            Self::ReadOnly => StoreErrorKind::ReadOnly,
        }
    }

    pub(crate) fn io(operation: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { operation, path, source }
    }

    pub(crate) fn damaged(disk: DiskId, path: &Path, lsns: (Lsn, Lsn), detail: impl ToString) -> Self {
        let (first_lsn, last_lsn) = lsns;
        Self::Damaged { disk, path: path.to_owned(), first_lsn, last_lsn, detail: detail.to_string() }
    }

    pub(crate) fn invalid(disk: DiskId, detail: impl Into<String>) -> Self {
        Self::Invalid { disk, detail: detail.into() }
    }

    /// Bytes that this process is about to write would not be readable: a programmer's error that is caught in time.
    pub(crate) fn unwritable(disk: DiskId) -> impl Fn(FormatError) -> Self {
        move |error| Self::invalid(disk, format!("refusing to write what could not be read back: {error}"))
    }
}
