//! What can be restored of a disk: values without bytes, which the store computes and the API shows.

use crate::{Epoch, GapReason, Lsn, Stamp};

/// A named point.
pub use crate::bookmarks::Bookmark;

/// Writes may be missing from `begin_lsn` on, until `end`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Gap {
    /// First LSN that is not restorable.
    pub begin_lsn: Lsn,
    /// Its stamp.
    pub begin_stamp: Stamp,
    /// First LSN that is restorable again, and its stamp; `None` while the gap is open.
    pub end: Option<(Lsn, Stamp)>,
    /// Why there is a gap: the reason that opened it.
    pub reason: GapReason,
}

/// Where a capture session begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EpochStart {
    /// Its number.
    pub epoch: Epoch,
    /// LSN of its first record.
    pub lsn: Lsn,
    /// Stamp of that record.
    pub stamp: Stamp,
}

/// LSNs of which each is restorable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RecoverableRange {
    /// First restorable LSN and its stamp.
    pub first: (Lsn, Stamp),
    /// Last restorable LSN and its stamp.
    pub last: (Lsn, Stamp),
}

/// What can be restored of a disk, as far as it is durable.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct History {
    /// First record and its stamp; `None` for a disk of which nothing is recorded.
    pub first: Option<(Lsn, Stamp)>,
    /// Last durable record and its stamp.
    pub last: Option<(Lsn, Stamp)>,
    /// Stretches without gaps, in order: any LSN or instant in them can be restored.
    pub recoverable: Vec<RecoverableRange>,
    /// Stretches that cannot be restored, in order.
    pub gaps: Vec<Gap>,
    /// Named points, by LSN.
    pub bookmarks: Vec<Bookmark>,
    /// Capture sessions, in order.
    pub epochs: Vec<EpochStart>,
}
