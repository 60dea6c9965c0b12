//! A disk's history, as `journal-format` tells it, in the words of the API: the one conversion, for a server that
//! answers and for a program that reads a store's files itself.

use journal_format::{self as journal, History, PointError};

use crate::point_spec::PointSpec;
use crate::problem::{Kind, Problem};
use crate::time;
use crate::types::{Bookmark, Gap, PointKind, Points, RecoverableRange, ResolvedPoint};

impl Points {
    /// What can be restored of the disk with this UUID. `newest` is the point at the end of the last recoverable range,
    /// which the history itself does not tell the kind of.
    #[must_use]
    pub fn of(disk: String, history: &History, newest: Option<ResolvedPoint>) -> Self {
        Self {
            disk,
            recoverable: history.recoverable.iter().map(RecoverableRange::from).collect(),
            gaps: history.gaps.iter().map(Gap::from).collect(),
            bookmarks: history.bookmarks.iter().map(Bookmark::from).collect(),
            newest,
            resolved: None,
        }
    }
}

impl From<&journal::RecoverableRange> for RecoverableRange {
    fn from(range: &journal::RecoverableRange) -> Self {
        let ((from_lsn, from), (to_lsn, to)) = (range.first, range.last);
        Self {
            from_lsn: from_lsn.0,
            from_time: time::rfc3339(from.0),
            from_stamp_ns: from.0,
            to_lsn: to_lsn.0,
            to_time: time::rfc3339(to.0),
            to_stamp_ns: to.0,
        }
    }
}

impl From<&journal::Gap> for Gap {
    fn from(gap: &journal::Gap) -> Self {
        Self {
            from_lsn: gap.begin_lsn.0,
            from_time: time::rfc3339(gap.begin_stamp.0),
            from_stamp_ns: gap.begin_stamp.0,
            to_lsn: gap.end.map(|(lsn, _)| lsn.0),
            to_time: gap.end.map(|(_, stamp)| time::rfc3339(stamp.0)),
            to_stamp_ns: gap.end.map(|(_, stamp)| stamp.0),
            reason: gap.reason.as_str().to_owned(),
        }
    }
}

impl From<&journal::bookmarks::Bookmark> for Bookmark {
    fn from(mark: &journal::bookmarks::Bookmark) -> Self {
        Self {
            name: mark.name.clone(),
            lsn: mark.lsn.0,
            time: time::rfc3339(mark.stamp.0),
            stamp_ns: mark.stamp.0,
        }
    }
}

impl From<journal::Point> for ResolvedPoint {
    fn from(point: journal::Point) -> Self {
        Self::new(point.lsn.0, point.stamp.0, point.kind.into(), point.exact)
    }
}

impl From<journal::PointKind> for PointKind {
    fn from(kind: journal::PointKind) -> Self {
        use journal::PointKind as Recorded;
        match kind {
            Recorded::Write => Self::Write,
            Recorded::Zero => Self::Zero,
            Recorded::Discard => Self::Discard,
            Recorded::Flush => Self::Flush,
            Recorded::Resize => Self::Resize,
            Recorded::Bookmark => Self::Bookmark,
            Recorded::GapEnd => Self::GapEnd,
            Recorded::Close => Self::Close,
            Recorded::GapBegin | Recorded::Void => Self::Other,
        }
    }
}

impl From<&PointSpec> for journal::PointSpec {
    fn from(spec: &PointSpec) -> Self {
        match spec {
            PointSpec::Lsn(lsn) => Self::Lsn(journal::Lsn(*lsn)),
            PointSpec::Time { stamp_ns } => Self::Stamp(journal::Stamp(*stamp_ns)),
            PointSpec::Bookmark(name) => Self::Bookmark(name.clone()),
            PointSpec::Latest => Self::Latest,
        }
    }
}

impl PointSpec {
    /// The problem to answer with when the history refuses this point.
    #[must_use]
    pub fn refused(&self, error: PointError) -> Problem {
        let (kind, detail, before, after) = match error {
            PointError::InGap { reason, before, after } => {
                let reason = reason.as_str();
                let detail = format!("{self} lies in a gap ({reason}): writes of that time may be missing");
                (Kind::PointInGap, detail, before, after)
            }
            PointError::OutOfRange { before, after } => {
                (Kind::PointOutOfRange, format!("{self} is out of range"), before, after)
            }
            PointError::NoSuchBookmark { .. } => {
                let hint = "the disk's points show its bookmarks: cdpctl points DISK, or cdp-restore list";
                return Problem::new(Kind::NoSuchBookmark, format!("there is no {self}"), hint);
            }
        };
        let hint = if before.is_none() && after.is_none() {
            "no point of this disk can be restored yet; wait until its phase is 'protected'"
        } else {
            "restore one of the nearest good points; cdpctl points DISK, or cdp-restore list, shows what can be restored"
        };
        Problem::new(kind, detail, hint).with_points(before.map(Into::into), after.map(Into::into))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use journal_format::{GapReason, Lsn, Stamp};

    #[test]
    fn a_point_in_a_gap_is_refused_with_its_neighbours() {
        let point = |lsn| {
            let kind = journal::PointKind::Flush;
            Some(journal::Point { lsn: Lsn(lsn), stamp: Stamp(lsn * 10), kind, exact: true })
        };
        let error = PointError::InGap { reason: GapReason::Overflow, before: point(3), after: point(9) };
        let problem = PointSpec::Lsn(5).refused(error);
        assert_eq!(problem.kind, Kind::PointInGap);
        assert!(problem.detail.contains("lsn:5") && problem.detail.contains("overflow"), "{problem}");
        assert_eq!(problem.before, Some(ResolvedPoint::new(3, 30, PointKind::Flush, true)));
        assert_eq!(problem.after.map(|point| point.lsn), Some(9));
    }

    #[test]
    fn a_gap_that_is_open_has_no_end() {
        let gap = journal::Gap {
            begin_lsn: Lsn(4),
            begin_stamp: Stamp(1_000_000_000),
            end: None,
            reason: GapReason::Attach,
        };
        let gap = Gap::from(&gap);
        assert_eq!((gap.from_lsn, gap.from_time.as_str()), (4, "1970-01-01T00:00:01.000000000Z"));
        assert_eq!((gap.to_lsn, gap.to_time, gap.reason.as_str()), (None, None, "attach"));
    }
}
