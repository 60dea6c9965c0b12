//! Finding records, and resolving points.

use std::sync::{Arc, PoisonError};

use journal_format::{Lsn, Record, Stamp};

use super::{DiskStore, State};
use crate::error::StoreError;
use crate::segment::Segment;
use journal_format::{Point, PointError, PointKind, PointSpec};

impl DiskStore {
    /// What a point asked for is, as a record: echoed back before anything is restored.
    ///
    /// `now` is the host's time, beyond which nothing can be asked for. `covered_until`, where the caller knows it, is
    /// the host time up to which everything captured is durable here: an instant between the newest record and it is
    /// certainly the state after the newest record ([`Point::exact`]). An instant between the last record of an epoch and
    /// the first of the next lies in the gap that the next one begins with.
    ///
    /// # Errors
    /// `Point` with the nearest restorable points when this one is not; `Io` or `Damaged` when its record cannot be read.
    pub fn resolve(
        &self,
        spec: &PointSpec,
        now: Stamp,
        covered_until: Option<Stamp>,
    ) -> Result<Point, StoreError> {
        let state = self.state().clone();
        match spec {
            PointSpec::Lsn(lsn) => {
                self.check_restorable(&state, *lsn)?;
                self.point(&state, *lsn)
            }
            PointSpec::Latest => {
                self.check_restorable(&state, state.durable_lsn)?;
                self.point(&state, state.durable_lsn)
            }
            PointSpec::Bookmark(name) => {
                let Some(bookmark) = state.bookmarks.iter().find(|bookmark| bookmark.name == *name) else {
                    // Where the file is damaged nobody can say that there is no such bookmark.
                    return Err(match &state.bookmarks_damage {
                        Some(damage) => damage.error(),
                        None => PointError::NoSuchBookmark { name: name.clone() }.into(),
                    });
                };
                self.check_restorable(&state, bookmark.lsn)?;
                self.point(&state, bookmark.lsn)
            }
            PointSpec::Stamp(stamp) => self.resolve_stamp(&state, *stamp, now, covered_until),
        }
    }

    fn resolve_stamp(
        &self,
        state: &State,
        stamp: Stamp,
        now: Stamp,
        covered_until: Option<Stamp>,
    ) -> Result<Point, StoreError> {
        if stamp > now && stamp > state.durable_stamp {
            return Err(self.out_of_range(state, state.durable_lsn).into());
        }
        let lsn = self.newest_at(state, stamp)?;
        self.check_restorable(state, lsn)?;
        let point = self.point(state, lsn)?;
        if stamp > point.stamp && lsn < state.durable_lsn && state.timeline.is_epoch_start(lsn.next()) {
            // Between two epochs nobody watched the disk: the instant lies in the gap that the next one begins with.
            self.check_restorable(state, lsn.next())?;
        }
        let watched = lsn < state.durable_lsn || covered_until.is_some_and(|covered| stamp <= covered);
        Ok(Point { exact: watched || stamp <= point.stamp, ..point })
    }

    /// Refuses an LSN that is not durable, not recorded, unknown because of damage, or inside a gap.
    pub(super) fn check_restorable(&self, state: &State, lsn: Lsn) -> Result<(), StoreError> {
        self.check_recorded(state, lsn)?;
        let Some(gap) = state.timeline.gap_at(lsn) else { return Ok(()) };
        let before = self.restorable_before(state, gap.begin_lsn);
        let after = gap.end.and_then(|(end, _)| self.restorable_after(state, end));
        Err(PointError::InGap { reason: gap.reason, before, after }.into())
    }

    /// Refuses an LSN that is not durable, not recorded or unknown because of damage.
    pub(super) fn check_recorded(&self, state: &State, lsn: Lsn) -> Result<(), StoreError> {
        if let Some(damage) = state.damage.as_ref().filter(|damage| lsn >= damage.first_lsn) {
            return Err(damage.error());
        }
        let first = state.segments.first().map_or(Lsn::FIRST, |segment| segment.first_lsn);
        if lsn < first || lsn > state.durable_lsn {
            return Err(self.out_of_range(state, lsn).into());
        }
        Ok(())
    }

    fn out_of_range(&self, state: &State, lsn: Lsn) -> PointError {
        let first = state.segments.first().map_or(Lsn::FIRST, |segment| segment.first_lsn);
        match lsn < first {
            true => PointError::OutOfRange { before: None, after: self.restorable_after(state, first) },
            false => PointError::OutOfRange {
                before: self.restorable_before(state, state.durable_lsn.next()),
                after: None,
            },
        }
    }

    /// The nearest restorable point with a smaller LSN.
    fn restorable_before(&self, state: &State, lsn: Lsn) -> Option<Point> {
        let first = state.segments.first()?.first_lsn;
        let mut at = lsn.prev();
        while let Some(gap) = state.timeline.gap_at(at) {
            at = gap.begin_lsn.prev();
        }
        // An error says that the point cannot be read; then it is no good point to offer.
        (at >= first).then(|| self.point(state, at).ok()).flatten()
    }

    /// The nearest restorable point with this LSN or a greater one.
    fn restorable_after(&self, state: &State, lsn: Lsn) -> Option<Point> {
        let mut at = lsn;
        while let Some(gap) = state.timeline.gap_at(at) {
            at = gap.end?.0;
        }
        (at <= state.durable_lsn).then(|| self.point(state, at).ok()).flatten()
    }

    /// The newest point that can be restored: the end of the last stretch without a gap. Costs the same however long the
    /// history is, and nothing while the point stays the same.
    #[must_use]
    pub fn newest(&self) -> Option<Point> {
        let (lsn, segments) = {
            let state = self.state();
            (newest_lsn(&state)?, Arc::clone(&state.segments))
        };
        let mut newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        if newest.is_none_or(|point| point.lsn != lsn) {
            *newest = self.point_in(&segments, lsn).ok();
        }
        *newest
    }

    /// Whether the newest durable record lies in a gap; also when there is none.
    #[must_use]
    pub fn gap_is_open(&self) -> bool {
        let state = self.state();
        state.durable_lsn == Lsn::ZERO || state.timeline.gaps.last().is_some_and(|gap| gap.end.is_none())
    }

    fn point(&self, state: &State, lsn: Lsn) -> Result<Point, StoreError> {
        self.point_in(&state.segments, lsn)
    }

    fn point_in(&self, segments: &[Arc<Segment>], lsn: Lsn) -> Result<Point, StoreError> {
        let record = self.record_at(segments, lsn)?;
        Ok(Point { lsn, stamp: record.stamp, kind: PointKind::from(&record.op), exact: true })
    }

    pub(super) fn stamp_of(&self, state: &State, lsn: Lsn) -> Option<Stamp> {
        // Most often asked of a segment's first or last record; those need no I/O.
        if lsn == state.durable_lsn {
            return Some(state.durable_stamp);
        }
        self.record_at(&state.segments, lsn).ok().map(|record| record.stamp)
    }

    fn segment_of(segments: &[Arc<Segment>], lsn: Lsn) -> Option<&Arc<Segment>> {
        let after = segments.partition_point(|segment| segment.first_lsn <= lsn);
        segments.get(after.checked_sub(1)?)
    }

    fn record_at(&self, segments: &[Arc<Segment>], lsn: Lsn) -> Result<Record, StoreError> {
        let missing = || StoreError::invalid(self.id, format!("no record has LSN {lsn}"));
        let segment = Self::segment_of(segments, lsn).ok_or_else(missing)?;
        let frame = segment.index().tables().frame_of(lsn).ok_or_else(missing)?;
        let records = self.frame_records(segment, &frame)?;
        records.into_iter().find(|record| record.lsn == lsn).ok_or_else(missing)
    }

    /// The newest durable record with a stamp not later than `stamp`; refused if there is none.
    fn newest_at(&self, state: &State, stamp: Stamp) -> Result<Lsn, StoreError> {
        if stamp >= state.durable_stamp && state.durable_lsn > Lsn::ZERO {
            return Ok(state.durable_lsn);
        }
        let starts_before = |segment: &Arc<Segment>| {
            segment.index().tables().frames().next().is_some_and(|frame| frame.first_stamp <= stamp)
        };
        let after = state.segments.partition_point(starts_before);
        let segment = after.checked_sub(1).and_then(|at| state.segments.get(at));
        let frame = segment.and_then(|segment| segment.index().tables().frame_at(stamp));
        let (Some(segment), Some(frame)) = (segment, frame) else {
            return Err(self.out_of_range(state, Lsn::ZERO).into());
        };
        let records = self.frame_records(segment, &frame)?;
        let newest = records.iter().rev().find(|record| record.stamp <= stamp).map(|record| record.lsn);
        Ok(newest.unwrap_or(frame.first_lsn).min(state.durable_lsn))
    }
}

/// The last LSN outside all gaps and before any damage; `None` if there is none.
fn newest_lsn(state: &State) -> Option<Lsn> {
    let first = state.segments.first()?.first_lsn;
    let mut at = state.durable_lsn;
    if let Some(damage) = &state.damage {
        at = at.min(damage.first_lsn.prev());
    }
    while let Some(gap) = state.timeline.gap_at(at) {
        at = gap.begin_lsn.prev();
    }
    (at >= first).then_some(at)
}
