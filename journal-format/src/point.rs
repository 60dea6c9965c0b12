//! Points in time: how they are asked for, what they resolve to, and why one is refused. Values without bytes, which the
//! store computes and the API shows.

use std::fmt;

use crate::{GapReason, Lsn, Op, Stamp};

/// A point as it is asked for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PointSpec {
    /// After this record.
    Lsn(Lsn),
    /// At this instant: after the newest record whose stamp is not later.
    Stamp(Stamp),
    /// At the bookmark of this name.
    Bookmark(String),
    /// After the newest record.
    Latest,
}

/// What the record of a point was.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum PointKind {
    /// A write.
    Write,
    /// Zeroes.
    Zero,
    /// A discard.
    Discard,
    /// A guest flush: what the guest saw complete before it is in the point.
    Flush,
    /// A new size.
    Resize,
    /// A bookmark.
    Bookmark,
    /// The begin of a gap.
    GapBegin,
    /// The end of a gap.
    GapEnd,
    /// Nothing: an unused number.
    Void,
    /// The VM let go of the disk in good order.
    Close,
}

impl PointKind {
    /// The name in JSON and on the command line.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Write => "write",
            Self::Zero => "zero",
            Self::Discard => "discard",
            Self::Flush => "flush",
            Self::Resize => "resize",
            Self::Bookmark => "bookmark",
            Self::GapBegin => "gap-begin",
            Self::GapEnd => "gap-end",
            Self::Void => "void",
            Self::Close => "close",
        }
    }
}

impl From<&Op> for PointKind {
    fn from(op: &Op) -> Self {
        match op {
            Op::Write { .. } => Self::Write,
            Op::Zero { .. } => Self::Zero,
            Op::Discard { .. } => Self::Discard,
            Op::Flush => Self::Flush,
            Op::Resize { .. } => Self::Resize,
            Op::Bookmark { .. } => Self::Bookmark,
            Op::GapBegin { .. } => Self::GapBegin,
            Op::GapEnd { .. } => Self::GapEnd,
            Op::Void => Self::Void,
            Op::Close { .. } => Self::Close,
        }
    }
}

/// A point as it was found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Point {
    /// The state after this record.
    pub lsn: Lsn,
    /// The record's stamp.
    pub stamp: Stamp,
    /// What the record was.
    pub kind: PointKind,
    /// Whether this is certainly the state that was asked for. `false` when an instant was asked for that lies after the
    /// newest record and nobody vouches that nothing was written in between.
    pub exact: bool,
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LSN {} at {} ns", self.lsn, self.stamp.0)
    }
}

/// Why a point cannot be restored, with the nearest ones that can.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PointError {
    /// Before the first record, after the newest one, or in the future.
    OutOfRange {
        /// The nearest good point before.
        before: Option<Point>,
        /// The nearest good point after.
        after: Option<Point>,
    },
    /// Inside a gap.
    InGap {
        /// Why there is a gap.
        reason: GapReason,
        /// The nearest good point before.
        before: Option<Point>,
        /// The nearest good point after; `None` while the gap is open.
        after: Option<Point>,
    },
    /// No bookmark has that name.
    NoSuchBookmark {
        /// The name.
        name: String,
    },
}

fn nearest(f: &mut fmt::Formatter<'_>, before: Option<&Point>, after: Option<&Point>) -> fmt::Result {
    match (before, after) {
        (None, None) => write!(f, "there is no restorable point yet"),
        (Some(point), None) => write!(f, "the nearest point before is {point}, there is none after"),
        (None, Some(point)) => write!(f, "the nearest point after is {point}, there is none before"),
        (Some(before), Some(after)) => write!(f, "the nearest points are {before} and {after}"),
    }
}

impl fmt::Display for PointError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OutOfRange { before, after } => {
                write!(f, "the point is outside of what is recorded; ")?;
                nearest(f, before.as_ref(), after.as_ref())
            }
            Self::InGap { reason, before, after } => {
                write!(f, "the point lies in a gap ({}); ", reason.as_str())?;
                nearest(f, before.as_ref(), after.as_ref())
            }
            Self::NoSuchBookmark { name } => {
                write!(f, "there is no bookmark \"{name}\"; list the disk's points to see those there are")
            }
        }
    }
}

impl std::error::Error for PointError {}
