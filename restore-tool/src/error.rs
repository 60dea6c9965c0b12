//! The crate's one error type, and the exit codes of `cdp-restore`.

use std::io;
use std::path::PathBuf;

use cdp_api::{Kind, Problem};

/// Why a restore or a listing failed.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The disk or the point is not there, or the server says why not.
    #[error("{0}")]
    Problem(Box<Problem>),
    /// The journal could not be read.
    #[error("cannot read {what}: {detail}")]
    Source {
        /// What was being read.
        what: String,
        /// What is wrong.
        detail: String,
        /// What to do next.
        hint: String,
    },
    /// The target is not one to be written to; nothing was touched.
    #[error("refusing to write to {path}: {detail}", path = path.display())]
    Refused {
        /// The target.
        path: PathBuf,
        /// Why.
        detail: String,
        /// What to do next.
        hint: String,
    },
    /// Writing or reading back the target failed.
    #[error("{operation} {path} failed{at}: {source}", path = path.display(), at = place(*.offset))]
    Output {
        /// The target.
        path: PathBuf,
        /// What was tried.
        operation: &'static str,
        /// Where on the disk, in bytes, if at a place of it.
        offset: Option<u64>,
        /// What the system says.
        source: io::Error,
    },
    /// The target was written, and reads back differently.
    #[error("{path} reads back differently from what was written, in the {length} bytes at {offset}", path = path.display())]
    Verify {
        /// The target.
        path: PathBuf,
        /// Where on the disk the differing block begins, in bytes.
        offset: u64,
        /// The block's length in bytes.
        length: u64,
    },
    /// The user or the system asked to stop.
    #[error("stopped by a signal")]
    Interrupted,
}

impl RestoreError {
    /// The exit code of `cdp-restore` (see its `--help`).
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Problem(problem) => match problem.kind {
                Kind::PointInGap | Kind::PointOutOfRange | Kind::NoSuchBookmark => 3,
                Kind::BadPoint => 2,
                _ => 1,
            },
            Self::Source { .. } | Self::Output { .. } => 1,
            Self::Refused { .. } => 4,
            Self::Verify { .. } => 5,
            Self::Interrupted => 130,
        }
    }

    /// A stable name of what went wrong, for programs.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Problem(problem) => problem.kind.as_str(),
            Self::Source { .. } => "source-failed",
            Self::Refused { .. } => "target-refused",
            Self::Output { .. } => "output-failed",
            Self::Verify { .. } => "verify-failed",
            Self::Interrupted => "interrupted",
        }
    }

    /// What to do next.
    #[must_use]
    pub fn hint(&self) -> &str {
        match self {
            Self::Problem(problem) => &problem.hint,
            Self::Source { hint, .. } | Self::Refused { hint, .. } => hint,
            Self::Output { source, .. } => match source.kind() {
                io::ErrorKind::StorageFull => {
                    "free some space, or choose a target with more of it, and restore again"
                }
                io::ErrorKind::QuotaExceeded => {
                    "free some of this user's space there, or restore as another user or to another filesystem"
                }
                io::ErrorKind::FileTooLarge => {
                    "the image is larger than this shell's limit (ulimit -f) or the filesystem allows: raise the limit, or \
                     restore to another filesystem"
                }
                io::ErrorKind::ReadOnlyFilesystem => {
                    "the filesystem has become read-only: see dmesg for why, and restore to another one"
                }
                _ => "check the target's disk (dmesg), and restore again, perhaps to another one",
            },
            Self::Verify { .. } => "the target's disk or memory is not to be trusted: restore to another one",
            Self::Interrupted => "run the same command to restore again",
        }
    }

    pub(crate) fn problem(kind: Kind, detail: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Problem(Box::new(Problem::new(kind, detail, hint)))
    }
}

fn place(offset: Option<u64>) -> String {
    offset.map(|offset| format!(" at byte {offset}")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_that_cannot_be_restored_exit_with_3() {
        for kind in [Kind::PointInGap, Kind::PointOutOfRange, Kind::NoSuchBookmark] {
            assert_eq!(RestoreError::problem(kind, "", "").exit_code(), 3);
        }
        assert_eq!(RestoreError::problem(Kind::BadPoint, "", "").exit_code(), 2);
        assert_eq!(RestoreError::problem(Kind::NoSuchDisk, "", "").exit_code(), 1);
    }
}
