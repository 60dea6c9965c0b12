//! Points in time against a disk's journal: what the API lists, and what a point asked for resolves to.

use std::sync::Arc;
use std::time::Instant;

use cdp_api::{Kind, PointSpec, PointSpecError, Points, Problem, ResolvedPoint, time};
use jiff::{Timestamp, Zoned, tz::TimeZone};
use journal_format::{Lsn, Stamp};
use journal_store::{DiskStore, StoreError, View};

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
    let point = disk.resolve(&spec.into(), Stamp(latest_allowed), covered);
    let point = point.map_err(|error| match spec {
        PointSpec::Time { stamp_ns } if *stamp_ns > latest_allowed => future(*stamp_ns, error),
        _ => refused(spec, error),
    })?;
    // An inexact point amid the history stays so; only of its end can more become known.
    let may_change = !point.exact && covered.is_some() && point.lsn >= disk.durable_lsn();
    let point = ResolvedPoint::from(point);
    Ok(if may_change { Answer::NotYet(point) } else { Answer::Is(point) })
}

/// What of the disk can be restored.
pub(crate) fn points(row: &DiskRow, disk: Option<&DiskStore>) -> Points {
    let history = disk.map(DiskStore::history).unwrap_or_default();
    let newest = disk.and_then(newest);
    Points::of(row.id.to_string(), &history, newest)
}

/// The newest point that can be restored: the end of the last stretch without a gap.
pub(crate) fn newest(disk: &DiskStore) -> Option<ResolvedPoint> {
    disk.newest().map(ResolvedPoint::from)
}

/// The disk right after a record; refused where that cannot be restored.
pub(crate) fn view(disk: &Arc<DiskStore>, lsn: Lsn) -> Result<View, ApiError> {
    disk.view(lsn).map_err(|error| refused(&PointSpec::Lsn(lsn.0), error))
}

/// The problem for a point that the store does not give.
fn refused(spec: &PointSpec, error: StoreError) -> ApiError {
    match error {
        StoreError::Point(reason) => spec.refused(reason).into(),
        other => store_failed(&other).into(),
    }
}

/// The problem for a time that has not come.
fn future(stamp_ns: u64, error: StoreError) -> ApiError {
    let mut refused = refused(&PointSpec::Time { stamp_ns }, error);
    refused.0.detail = format!("{} lies in the future", time::rfc3339(stamp_ns));
    refused.0.hint = "give a time that has passed, or 'latest'".to_owned();
    refused
}
