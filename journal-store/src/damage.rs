//! What is found damaged: where, which LSNs, what it means, what to do.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use journal_format::{DiskId, Lsn};

use crate::error::StoreError;

/// What kind of bytes are damaged, and so what depends on them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum DamageKind {
    /// The data of a frame.
    Data,
    /// The records of a frame.
    Records,
    /// The index of a sealed segment.
    Index,
    /// The manifest.
    Manifest,
    /// The bookmarks.
    Bookmarks,
    /// A durable mark.
    Mark,
    /// The header page of a segment's file.
    Header,
    /// A whole file of another disk, segment or release, under the name of this one.
    Foreign,
    /// Bytes that nothing uses and that should be zero.
    Unused,
    /// A file or a part of it that the system cannot read.
    Unreadable,
    /// LSNs that no segment holds, though those before and behind them are there.
    Missing,
}

impl DamageKind {
    /// The name in JSON and on the command line.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Data => "data",
            Self::Records => "records",
            Self::Index => "index",
            Self::Manifest => "manifest",
            Self::Bookmarks => "bookmarks",
            Self::Mark => "mark",
            Self::Header => "header",
            Self::Foreign => "foreign",
            Self::Unused => "unused",
            Self::Unreadable => "unreadable",
            Self::Missing => "missing",
        }
    }

    /// Whether points cannot be restored because of it. `false` means that what is damaged can be made again, or that
    /// nothing depends on it; it is still a sign that the volume forgets.
    #[must_use]
    pub const fn loses_points(self) -> bool {
        matches!(self, Self::Data | Self::Records | Self::Foreign | Self::Unreadable | Self::Missing)
    }

    /// What to do about it.
    #[must_use]
    pub const fn advice(self) -> &'static str {
        match self {
            Self::Data => {
                "points whose image needs these writes are refused; choose another point, or put back a copy of the file"
            }
            Self::Records => {
                "what these records said is unknown; choose a point before them, or put back a copy of the file"
            }
            Self::Index => {
                "nothing is lost by this: a server that finds it makes the index again from the records; verify once more, and \
                 check the volume's medium if it goes on"
            }
            Self::Manifest => {
                "restart the server, which writes it again if it can; or put back a copy of the file"
            }
            Self::Bookmarks => {
                "restart the server, which names again what came as records; others must be set again, or put back a copy of \
                 the file"
            }
            Self::Mark | Self::Header | Self::Unused => {
                "nothing is lost by this; check the volume's medium, and move the store if it goes on"
            }
            Self::Foreign => {
                "the file is not used, and points that need what belongs there are refused; stop the server and put back the \
                 file of that name (two may have been exchanged, or the store is of a newer release)"
            }
            Self::Unreadable => "check the volume's medium; put back a copy of the file",
            Self::Missing => "points from here on are refused; put back a copy of the missing segment",
        }
    }
}

/// A part of a disk's journal that is not what was written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Damage {
    /// Whose journal.
    pub disk: DiskId,
    /// Which file.
    pub path: PathBuf,
    /// Where in the file the damaged part begins, in bytes; 0 when it is the whole file.
    pub offset: u64,
    /// First LSN that the part speaks of.
    pub first_lsn: Lsn,
    /// Last LSN that the part speaks of; [`Lsn::MAX`] when everything from the first on is.
    pub last_lsn: Lsn,
    /// What kind of bytes they are.
    pub kind: DamageKind,
    /// What is wrong.
    pub detail: String,
}

impl Damage {
    pub(crate) fn new(
        disk: DiskId,
        (path, offset): (&Path, u64),
        (first_lsn, last_lsn): (Lsn, Lsn),
        kind: DamageKind,
        detail: impl ToString,
    ) -> Self {
        Self { disk, path: path.to_owned(), offset, first_lsn, last_lsn, kind, detail: detail.to_string() }
    }

    /// Whether it speaks of an LSN in `first..=last`.
    #[must_use]
    pub fn touches(&self, first: Lsn, last: Lsn) -> bool {
        self.first_lsn <= last && first <= self.last_lsn
    }

    pub(crate) fn error(&self) -> StoreError {
        StoreError::damaged(self.disk, &self.path, (self.first_lsn, self.last_lsn), &self.detail)
    }
}

/// Makes one of neighbours: parts of one kind, in one file, whose LSNs follow each other or overlap. `damage` is in order of
/// LSN, and stays so. A file that is lost in whole is then one part, and not one for each of its frames.
pub(crate) fn merged(damage: Vec<Damage>) -> Vec<Damage> {
    let mut merged: Vec<(Damage, usize)> = Vec::new();
    let mut last: HashMap<(DamageKind, PathBuf), usize> = HashMap::new();
    for part in damage {
        let key = (part.kind, part.path.clone());
        if let Some((before, count)) = last.get(&key).and_then(|at| merged.get_mut(*at))
            && part.first_lsn <= before.last_lsn.next()
        {
            before.offset = before.offset.min(part.offset);
            before.last_lsn = before.last_lsn.max(part.last_lsn);
            *count = count.saturating_add(1);
            continue;
        }
        last.insert(key, merged.len());
        merged.push((part, 1));
    }
    let told = |(mut part, count): (Damage, usize)| {
        if count > 1 {
            part.detail.push_str(&format!(" (the first of {count} such places)"));
        }
        part
    };
    merged.into_iter().map(told).collect()
}
