//! Points in time against a disk's journal: what the API lists, and what a point asked for resolves to.

use std::sync::Arc;
use std::time::Instant;

use cdp_api::{
    Bookmark, Gap, Kind, PointKind, PointSpec, PointSpecError, Points, Problem, RecoverableRange,
    ResolvedPoint, time,
};
use jiff::{Timestamp, Zoned, tz::TimeZone};
use journal_format::{Lsn, Stamp};
use journal_store::{DiskStore, History, Point, PointError, StoreError, View};

use crate::catalog::DiskRow;
use crate::core::Core;
use crate::limits::CLOCK_SKEW_NS;
use crate::rest::problem::{ApiError, store_failed};

/// What a point asked for resolves to, so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// This one.
    Is(ResolvedPoint),
    /// This one as far as is known; the host may have captured more before the time asked for.
    NotYet(ResolvedPoint),
}

/// Reads a point as text, with the server's clock and time zone.
///
/// In a query `+` stands for a space, so the offset of an RFC 3339 time that was not percent-encoded arrives as
/// `10:00:03 01:00`. No form of a point looks like that; it is read as what was meant.
pub(crate) fn parse(text: &str, now_ns: u64) -> Result<PointSpec, ApiError> {
    let instant = Timestamp::from_nanosecond(i128::from(now_ns)).unwrap_or(Timestamp::MAX);
    let now = Zoned::new(instant, TimeZone::system());
    let repaired = || {
        let (before, offset) = text.rsplit_once(' ')?;
        PointSpec::parse(&format!("{before}+{offset}"), &now).ok()
    };
    PointSpec::parse(text, &now).or_else(|error| repaired().ok_or_else(|| bad_point(&error).into()))
}

fn bad_point(error: &PointSpecError) -> Problem {
    Problem::new(
        Kind::BadPoint,
        error.to_string(),
        "in a query, percent-encode a space as %20 and a + as %2B",
    )
}

/// Resolves a point once, without waiting.
pub(crate) fn resolve(core: &Core, disk: &DiskStore, spec: &PointSpec) -> Result<Answer, ApiError> {
    let latest_allowed = core.now_ns().saturating_add(CLOCK_SKEW_NS);
    // Read first: a record that becomes durable in between can only turn "not yet" into "yes".
    let covered = core.fleet.covered_until(disk.id(), disk.durable_lsn(), Instant::now());
    let point = disk.resolve(&store_spec(spec), Stamp(latest_allowed), covered);
    let point = point.map_err(|error| match spec {
        PointSpec::Time { stamp_ns } if *stamp_ns > latest_allowed => future(*stamp_ns, error),
        _ => refused(spec, error),
    })?;
    // An inexact point amid the history stays so; only of its end can more become known.
    let may_change = !point.exact && covered.is_some() && point.lsn >= disk.durable_lsn();
    let point = to_api(&point);
    Ok(if may_change { Answer::NotYet(point) } else { Answer::Is(point) })
}

/// What of the disk can be restored.
pub(crate) fn points(row: &DiskRow, disk: Option<&DiskStore>) -> Points {
    let mut points = Points {
        disk: row.id.to_string(),
        recoverable: Vec::new(),
        gaps: Vec::new(),
        bookmarks: Vec::new(),
        newest: None,
        resolved: None,
    };
    let Some(disk) = disk else { return points };
    let history = disk.history();
    points.gaps = history.gaps.iter().map(gap).collect();
    points.bookmarks = history.bookmarks.iter().map(|b| bookmark(&b.name, b.lsn, b.stamp)).collect();
    points.recoverable = history.recoverable.iter().map(range).collect();
    points.newest = newest(disk, &history);
    points
}

/// The newest point that can be restored: the end of the last stretch without a gap.
pub(crate) fn newest(disk: &DiskStore, history: &History) -> Option<ResolvedPoint> {
    let (lsn, stamp) = history.recoverable.last()?.last;
    disk.resolve(&journal_store::PointSpec::Lsn(lsn), stamp, None).ok().map(|point| to_api(&point))
}

fn range(range: &journal_store::RecoverableRange) -> RecoverableRange {
    let ((from_lsn, from), (to_lsn, to)) = (range.first, range.last);
    RecoverableRange {
        from_lsn: from_lsn.0,
        from_time: time::rfc3339(from.0),
        from_stamp_ns: from.0,
        to_lsn: to_lsn.0,
        to_time: time::rfc3339(to.0),
        to_stamp_ns: to.0,
    }
}

fn gap(gap: &journal_store::Gap) -> Gap {
    Gap {
        from_lsn: gap.begin_lsn.0,
        from_time: time::rfc3339(gap.begin_stamp.0),
        from_stamp_ns: gap.begin_stamp.0,
        to_lsn: gap.end.map(|(lsn, _)| lsn.0),
        to_time: gap.end.map(|(_, stamp)| time::rfc3339(stamp.0)),
        to_stamp_ns: gap.end.map(|(_, stamp)| stamp.0),
        reason: gap.reason.as_str().to_owned(),
    }
}

pub(crate) fn bookmark(name: &str, lsn: Lsn, stamp: Stamp) -> Bookmark {
    Bookmark { name: name.to_owned(), lsn: lsn.0, time: time::rfc3339(stamp.0), stamp_ns: stamp.0 }
}

fn store_spec(spec: &PointSpec) -> journal_store::PointSpec {
    match spec {
        PointSpec::Lsn(lsn) => journal_store::PointSpec::Lsn(Lsn(*lsn)),
        PointSpec::Time { stamp_ns } => journal_store::PointSpec::Stamp(Stamp(*stamp_ns)),
        PointSpec::Bookmark(name) => journal_store::PointSpec::Bookmark(name.clone()),
        PointSpec::Latest => journal_store::PointSpec::Latest,
    }
}

/// A point of the store as the API says it.
fn to_api(point: &Point) -> ResolvedPoint {
    let kind = match point.kind {
        journal_store::PointKind::Write => PointKind::Write,
        journal_store::PointKind::Zero => PointKind::Zero,
        journal_store::PointKind::Discard => PointKind::Discard,
        journal_store::PointKind::Flush => PointKind::Flush,
        journal_store::PointKind::Resize => PointKind::Resize,
        journal_store::PointKind::Bookmark => PointKind::Bookmark,
        journal_store::PointKind::GapEnd => PointKind::GapEnd,
        journal_store::PointKind::GapBegin | journal_store::PointKind::Void => PointKind::Other,
    };
    ResolvedPoint::new(point.lsn.0, point.stamp.0, kind, point.exact)
}

/// The disk right after a record; refused where that cannot be restored.
pub(crate) fn view(disk: &Arc<DiskStore>, lsn: Lsn) -> Result<View, ApiError> {
    disk.view(lsn).map_err(|error| refused(&PointSpec::Lsn(lsn.0), error))
}

/// The problem for a point that the store does not give.
fn refused(spec: &PointSpec, error: StoreError) -> ApiError {
    let api = |point: Option<Point>| point.map(|point| to_api(&point));
    let StoreError::Point(reason) = error else { return store_failed(&error).into() };
    match reason {
        PointError::InGap { reason, before, after } => Problem::new(
            Kind::PointInGap,
            format!("{spec} lies in a gap ({}): writes of that time may be missing", reason.as_str()),
            "restore the nearest good point before or after; the disk's points show the gaps and their reasons",
        )
        .with_points(api(before), api(after)),
        PointError::OutOfRange { before, after } => Problem::new(
            Kind::PointOutOfRange,
            format!("{spec} is out of range"),
            "the disk's points show what can be restored",
        )
        .with_points(api(before), api(after)),
        PointError::NoSuchBookmark { .. } => {
            Problem::new(Kind::NoSuchBookmark, format!("there is no {spec}"), "the disk's points show its bookmarks")
        }
    }
    .into()
}

/// The problem for a time that has not come.
fn future(stamp_ns: u64, error: StoreError) -> ApiError {
    let mut refused = refused(&PointSpec::Time { stamp_ns }, error);
    refused.0.detail = format!("{} lies in the future", time::rfc3339(stamp_ns));
    refused.0.hint = "give a time that has passed, or 'latest'".to_owned();
    refused
}
