//! What is known of a disk's history besides its data: epochs, gaps, sizes. Folded from records in LSN order.
//!
//! The gap rule: gap-begin opens a gap or raises the generation of the open one; gap-end closes it only if its
//! generation is not older than the open one's. Generations count within an epoch, so they are compared together with
//! the epoch: a gap that an epoch left open is closed by the gap-end of a later epoch.

use std::sync::Arc;

use journal_format::{Epoch, ImageTag, Lsn, Op, Record, Stamp};

use journal_format::{EpochStart, Gap, GapReason};

/// A size that a disk got.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct SizeChange {
    /// With this record.
    pub(crate) lsn: Lsn,
    /// The new size in bytes.
    pub(crate) disk_bytes: u64,
    /// From here on, in bytes, whatever the disk held before reads as zeroes: the smaller of the sizes before and after.
    pub(crate) zero_from: u64,
}

/// Epochs, gaps and sizes, up to some record.
#[derive(Clone, Default, Debug)]
pub(crate) struct Timeline {
    pub(crate) epochs: Vec<EpochStart>,
    pub(crate) gaps: Vec<Gap>,
    /// Shared with views, which see those up to their LSN.
    pub(crate) sizes: Arc<Vec<SizeChange>>,
    /// The newest close record.
    pub(crate) closed: Option<(Lsn, ImageTag)>,
    /// Epoch and generation of the open gap, which is the last of `gaps`.
    open: Option<(Epoch, u64)>,
}

impl Timeline {
    /// A new epoch begins with this record; the disk has that size. A disk that was resized while nobody looked gets its
    /// new size here.
    pub(crate) fn begin_epoch(&mut self, epoch: Epoch, lsn: Lsn, stamp: Stamp, disk_bytes: u64) {
        self.epochs.push(EpochStart { epoch, lsn, stamp });
        if self.last_size() != Some(disk_bytes) {
            self.resize(lsn, disk_bytes);
        }
    }

    /// Takes in a record of the current epoch.
    pub(crate) fn apply(&mut self, record: &Record) {
        let epoch = self.epochs.last().map_or(Epoch(0), |start| start.epoch);
        match record.op {
            Op::Resize { disk_bytes } => self.resize(record.lsn, disk_bytes),
            Op::GapBegin { reason, generation } => {
                match self.gaps.last_mut().filter(|_| self.open.is_some()) {
                    // Nothing is missing because of a large request; what comes on top of it is why the gap lasts.
                    Some(gap) if gap.reason == GapReason::LargeRequest => gap.reason = reason,
                    Some(_) => {}
                    None => self.gaps.push(Gap {
                        begin_lsn: record.lsn,
                        begin_stamp: record.stamp,
                        end: None,
                        reason,
                    }),
                }
                self.open = self.open.max(Some((epoch, generation)));
            }
            Op::GapEnd { generation } if self.open.is_some_and(|open| open <= (epoch, generation)) => {
                if let Some(gap) = self.gaps.last_mut() {
                    gap.end = Some((record.lsn, record.stamp));
                }
                self.open = None;
            }
            Op::Close { image } => self.closed = Some((record.lsn, image)),
            _ => {}
        }
    }

    fn resize(&mut self, lsn: Lsn, disk_bytes: u64) {
        let zero_from = self.last_size().map_or(disk_bytes, |old| old.min(disk_bytes));
        Arc::make_mut(&mut self.sizes).push(SizeChange { lsn, disk_bytes, zero_from });
    }

    fn last_size(&self) -> Option<u64> {
        self.sizes.last().map(|size| size.disk_bytes)
    }

    /// Size of the disk in bytes after `lsn`; `None` before the first record.
    pub(crate) fn size_at(&self, lsn: Lsn) -> Option<u64> {
        let after = self.sizes.partition_point(|size| size.lsn <= lsn);
        Some(self.sizes.get(after.checked_sub(1)?)?.disk_bytes)
    }

    /// The gap that `lsn` lies in: from its begin to just before its end.
    pub(crate) fn gap_at(&self, lsn: Lsn) -> Option<&Gap> {
        let after = self.gaps.partition_point(|gap| gap.begin_lsn <= lsn);
        let gap = self.gaps.get(after.checked_sub(1)?)?;
        gap.end.is_none_or(|(end, _)| lsn < end).then_some(gap)
    }

    /// Whether an epoch begins with this record.
    pub(crate) fn is_epoch_start(&self, lsn: Lsn) -> bool {
        self.epochs.binary_search_by_key(&lsn, |start| start.lsn).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begin(lsn: u64, generation: u64) -> Record {
        begin_for(GapReason::Overflow, lsn, generation)
    }

    fn begin_for(reason: GapReason, lsn: u64, generation: u64) -> Record {
        Record { lsn: Lsn(lsn), stamp: Stamp(lsn), op: Op::GapBegin { reason, generation } }
    }

    fn end(lsn: u64, generation: u64) -> Record {
        Record { lsn: Lsn(lsn), stamp: Stamp(lsn), op: Op::GapEnd { generation } }
    }

    fn fold(records: &[Record]) -> Timeline {
        let mut timeline = Timeline::default();
        timeline.begin_epoch(Epoch(1), Lsn(1), Stamp(1), 4096);
        records.iter().for_each(|record| timeline.apply(record));
        timeline
    }

    #[test]
    fn an_end_of_an_older_generation_closes_nothing() {
        let timeline = fold(&[begin(1, 1), begin(5, 2), end(7, 1), end(9, 2)]);
        assert_eq!(timeline.gaps.len(), 1);
        assert_eq!(timeline.gaps[0].end, Some((Lsn(9), Stamp(9))));
        assert!(timeline.gap_at(Lsn(8)).is_some() && timeline.gap_at(Lsn(9)).is_none());
    }

    #[test]
    fn a_gap_is_for_its_first_reason_but_a_large_request_gives_way_to_any_other() {
        let reasons = |reasons: &[GapReason]| {
            let begins = reasons.iter().zip(1..).map(|(reason, n)| begin_for(*reason, n, n));
            let timeline = fold(&begins.collect::<Vec<_>>());
            timeline.gaps.iter().map(|gap| (gap.begin_lsn.0, gap.reason)).collect::<Vec<_>>()
        };
        let (large, full, failed) = (GapReason::LargeRequest, GapReason::Overflow, GapReason::WriteFailed);
        assert_eq!(reasons(&[large, large]), [(1, large)]);
        assert_eq!(reasons(&[large, full, failed]), [(1, full)]);
        assert_eq!(reasons(&[full, large]), [(1, full)]);
        let ended = fold(&[begin_for(large, 1, 1), end(3, 1), begin(5, 2)]);
        assert_eq!(ended.gaps[0].reason, large, "it had ended");
    }

    #[test]
    fn a_gap_left_open_is_closed_by_the_first_generation_of_the_next_epoch() {
        let mut timeline = fold(&[begin(1, 1), end(3, 1), begin(5, 9)]);
        timeline.begin_epoch(Epoch(2), Lsn(7), Stamp(7), 4096);
        timeline.apply(&begin(7, 1));
        timeline.apply(&end(8, 1));
        let spans: Vec<_> =
            timeline.gaps.iter().map(|gap| (gap.begin_lsn.0, gap.end.map(|end| end.0.0))).collect();
        assert_eq!(spans, [(1, Some(3)), (5, Some(8))]);
    }

    #[test]
    fn sizes_remember_from_where_old_contents_are_gone() {
        let mut timeline = fold(&[]);
        let resize =
            |lsn, disk_bytes| Record { lsn: Lsn(lsn), stamp: Stamp(lsn), op: Op::Resize { disk_bytes } };
        timeline.apply(&resize(2, 1024));
        timeline.apply(&resize(3, 8192));
        assert_eq!(timeline.sizes.iter().map(|size| size.zero_from).collect::<Vec<_>>(), [4096, 1024, 1024]);
        assert_eq!(timeline.size_at(Lsn(2)), Some(1024));
        assert_eq!(timeline.size_at(Lsn(0)), None);
    }
}
