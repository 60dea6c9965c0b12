//! What recovery does with each combination of what it can find, as data. Prose: `docs/formats/segment.md`.
//!
//! Recovery walks the metadata volume from its start. At each place it looks at the metadata entry ([`see_next`]), at
//! the data entry that it names ([`see_data`]), and at how far the disk is known to have been durable
//! ([`durable_floor`]); then [`decide`] gives the one action. The rows of [`CASES`] cover every combination exactly
//! once; a test walks them all.
//!
//! Why the durable floor matters: entries of one commit reach the disk in any order, so after a power cut a torn entry
//! may well be followed by a whole one. That is a tail to cut, nothing of it was acknowledged. But the same torn entry
//! is corruption, never to be cut silently, if it had been durable: when it lies in a sealed segment, or when a later
//! entry says (`durable_lsn`) that it was.

use crate::error::FormatError;
use crate::layout::is_zero;
use crate::segment::{
    DATA_ENTRY_BYTES, DataEntry, ENTRY_ALIGN_BYTES, META_ENTRY_MAGIC, MetaEntry, MetaEntryHeader, PAGE_BYTES,
    Place, next_commit, next_entry,
};
use crate::units::Lsn;

/// What lies at a place of the metadata volume.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum MetaState {
    /// Zeroes, or the end of the file: nothing was written.
    Absent,
    /// Something else than zeroes and than the expected entry.
    Torn,
    /// A whole entry with the expected LSN.
    Valid,
}

/// What lies at the place of the data volume that the metadata entry names (or, without one, where data would go next).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum DataState {
    /// Zeroes, or the end of the file.
    Absent,
    /// Something else than zeroes and than the named data.
    Torn,
    /// The named data, or the frame has none.
    Valid,
}

/// Whether the expected LSN is known to have been durable.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Standing {
    /// Not known: a later entry than the last durable one that anything speaks of.
    Tail,
    /// Known: it lies in a sealed segment, or at or below the [`durable_floor`].
    Durable,
}

/// What recovery does.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Action {
    /// The frame is good; go on behind it.
    Keep,
    /// The log ends here; nothing is lost.
    EndOfLog,
    /// The log ends here; an unacknowledged tail is dropped. The agent sends it again.
    CutHere,
    /// Corrupt: refuse reads that need this frame's data and report it; the records say which ranges at which LSNs.
    RefuseData,
    /// Corrupt: refuse the history from this LSN on and report it; what it held is unknown. Nothing is appended behind it.
    RefuseRecords,
}

/// One row of the table; `None` matches anything.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// The metadata entry.
    pub meta: Option<MetaState>,
    /// The data entry.
    pub data: Option<DataState>,
    /// How far it was known to be durable.
    pub standing: Option<Standing>,
    /// What to do.
    pub action: Action,
    /// What happened.
    pub story: &'static str,
}

impl Case {
    const fn new(
        meta: Option<MetaState>,
        data: Option<DataState>,
        standing: Option<Standing>,
        action: Action,
        story: &'static str,
    ) -> Self {
        Self { meta, data, standing, action, story }
    }

    /// Whether the row is about this combination.
    #[must_use]
    pub fn matches(&self, meta: MetaState, data: DataState, standing: Standing) -> bool {
        self.meta.is_none_or(|m| m == meta)
            && self.data.is_none_or(|d| d == data)
            && self.standing.is_none_or(|s| s == standing)
    }
}

/// The decision table. Rows do not overlap and leave nothing out.
pub const CASES: &[Case] = {
    use Action::{CutHere, EndOfLog, Keep, RefuseData, RefuseRecords};
    use Standing::{Durable, Tail};
    &[
        Case::new(Some(MetaState::Valid), Some(DataState::Valid), None, Keep, "both halves arrived"),
        Case::new(
            Some(MetaState::Absent),
            Some(DataState::Absent),
            Some(Tail),
            EndOfLog,
            "nothing was written here",
        ),
        Case::new(
            Some(MetaState::Absent),
            Some(DataState::Torn),
            Some(Tail),
            CutHere,
            "cut while data was written",
        ),
        Case::new(
            Some(MetaState::Absent),
            Some(DataState::Valid),
            Some(Tail),
            CutHere,
            "cut before the records came",
        ),
        Case::new(Some(MetaState::Torn), None, Some(Tail), CutHere, "cut while the records were written"),
        Case::new(
            Some(MetaState::Valid),
            Some(DataState::Absent),
            Some(Tail),
            CutHere,
            "cut before the data came",
        ),
        Case::new(
            Some(MetaState::Valid),
            Some(DataState::Torn),
            Some(Tail),
            CutHere,
            "cut while data was written",
        ),
        Case::new(
            Some(MetaState::Valid),
            Some(DataState::Absent),
            Some(Durable),
            RefuseData,
            "a lost data write",
        ),
        Case::new(
            Some(MetaState::Valid),
            Some(DataState::Torn),
            Some(Durable),
            RefuseData,
            "rot or a stray write in data",
        ),
        Case::new(Some(MetaState::Absent), None, Some(Durable), RefuseRecords, "a lost metadata write"),
        Case::new(
            Some(MetaState::Torn),
            None,
            Some(Durable),
            RefuseRecords,
            "rot or a stray write in metadata",
        ),
    ]
};

/// The action for a combination: that of the one row of [`CASES`] that matches.
#[must_use]
pub fn decide(meta: MetaState, data: DataState, standing: Standing) -> Action {
    // The test below proves that a row always matches; were it not so, refusing is the answer that harms nothing.
    CASES
        .iter()
        .find(|case| case.matches(meta, data, standing))
        .map_or(Action::RefuseRecords, |case| case.action)
}

/// What [`see_meta`] saw.
#[derive(Clone, Debug)]
pub enum MetaSeen<'a> {
    /// See [`MetaState::Absent`].
    Absent,
    /// See [`MetaState::Torn`]; with what is wrong, for the report.
    Torn(FormatError),
    /// See [`MetaState::Valid`].
    Valid(MetaEntry<'a>),
}

impl MetaSeen<'_> {
    /// The state, for [`decide`].
    #[must_use]
    pub const fn state(&self) -> MetaState {
        match self {
            Self::Absent => MetaState::Absent,
            Self::Torn(_) => MetaState::Torn,
            Self::Valid(_) => MetaState::Valid,
        }
    }
}

/// Looks at the metadata entry at the start of `bytes` (the rest of the file from `place` on; may be empty), where the
/// record `expected` should be.
///
/// Only the first [`ENTRY_ALIGN_BYTES`] decide whether an entry is absent: if a power cut lost just the page with the
/// entry's header, the log ends there, and the writer's truncation removes what follows. More must not be looked at: 64
/// bytes before a page, the rest of an entry's header would be the first entry of the next commit.
#[must_use]
pub fn see_meta<'a>(bytes: &'a [u8], place: &Place, expected: Lsn) -> MetaSeen<'a> {
    if is_zero(bytes.get(..ENTRY_ALIGN_BYTES as usize).unwrap_or(bytes)) {
        return MetaSeen::Absent;
    }
    match MetaEntry::parse(bytes, place) {
        Ok(entry) if entry.header.first_lsn == expected => MetaSeen::Valid(entry),
        Ok(_) => {
            MetaSeen::Torn(FormatError::invalid("metadata entry", "another LSN than the one that is next"))
        }
        Err(error) => MetaSeen::Torn(error),
    }
}

/// Finds the next metadata entry and looks at it. `after` is where the entry before it ended (or the end of the header
/// page), `bytes` is the rest of the file from there on. The entry is at the next aligned position, or, if it is not there, on
/// the next page. Returns the place that it says something about.
///
/// Bytes between the two that should be zero and are not do no harm: an LSN is written once between two recoveries, and
/// a recovery cuts off what it does not keep, so a whole entry with the expected LSN is the one that was meant.
#[must_use]
pub fn see_next<'a>(bytes: &'a [u8], after: &Place, expected: Lsn) -> (Place, MetaSeen<'a>) {
    let look = |position: u64| {
        let skip = usize::try_from(position.saturating_sub(after.position)).unwrap_or(usize::MAX);
        let place = Place { position, ..*after };
        (place, see_meta(bytes.get(skip..).unwrap_or(&[]), &place, expected))
    };
    let near = look(next_entry(after.position));
    if near.1.state() == MetaState::Valid {
        return near;
    }
    let far = look(next_commit(after.position));
    // Of two places that hold no entry, the one that holds something is the one to tell of.
    if far.1.state() == MetaState::Valid || near.1.state() == MetaState::Absent { far } else { near }
}

/// Looks at the data of `entry`, or without an entry at what lies where the next data entry would be. `bytes` is the data
/// file from `place` on (may be empty). A frame without data is always `Valid`; for it `place` does not matter.
#[must_use]
pub fn see_data(bytes: &[u8], place: &Place, entry: Option<&MetaEntry<'_>>) -> DataState {
    if entry.is_some_and(|entry| entry.header.data.is_none()) {
        return DataState::Valid;
    }
    match DataEntry::parse(bytes, place) {
        Ok(data) if entry.is_none_or(|entry| belongs(&data, entry)) => DataState::Valid,
        Err(_) if is_zero(bytes.get(..DATA_ENTRY_BYTES).unwrap_or(bytes)) => DataState::Absent,
        _ => DataState::Torn,
    }
}

fn belongs(data: &DataEntry<'_>, entry: &MetaEntry<'_>) -> bool {
    let header = entry.frame.header();
    data.first_lsn == header.first_lsn()
        && data.data.len() == header.data_bytes() as usize
        && data.data_crc == header.data_crc()
}

/// The highest LSN that any later entry says was durable. `bytes` is the rest of the metadata file from `place` on;
/// entries that begin a commit are looked for, those carry the newest number. `Lsn::ZERO` if there is none.
///
/// Call it when something else than a valid entry was found; the expected LSN has [`Standing::Durable`] when it is at or
/// below the result.
#[must_use]
pub fn durable_floor(bytes: &[u8], place: &Place) -> Lsn {
    let mut floor = Lsn::ZERO;
    let mut position = next_commit(place.position);
    while let Some(rest) =
        position.checked_sub(place.position).and_then(|skip| bytes.get(usize::try_from(skip).ok()?..))
    {
        if rest.starts_with(&META_ENTRY_MAGIC)
            && let Ok(entry) = MetaEntryHeader::parse(rest, &Place { position, ..*place })
        {
            floor = floor.max(entry.durable_lsn);
        }
        position = position.saturating_add(PAGE_BYTES);
    }
    floor
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{DiskId, SegmentNumber};

    #[test]
    fn exactly_one_row_matches_every_combination() {
        for meta in [MetaState::Absent, MetaState::Torn, MetaState::Valid] {
            for data in [DataState::Absent, DataState::Torn, DataState::Valid] {
                for standing in [Standing::Tail, Standing::Durable] {
                    let rows = CASES.iter().filter(|case| case.matches(meta, data, standing)).count();
                    assert_eq!(rows, 1, "{meta:?} {data:?} {standing:?}");
                }
            }
        }
    }

    #[test]
    fn an_entry_on_the_next_page_is_seen_when_the_last_one_ended_64_bytes_before_it() {
        // 96 zeroes were asked for where only 64 are free; an uncommitted tail was then dropped by every reopening.
        let mut bytes = vec![0; PAGE_BYTES as usize];
        bytes[64..72].copy_from_slice(&META_ENTRY_MAGIC);
        let position = 2 * PAGE_BYTES - 64;
        let after = Place { disk: DiskId([1; 16]), segment: SegmentNumber(1), position };
        assert_eq!(see_next(&bytes, &after, Lsn(1)).0.position, 2 * PAGE_BYTES);
    }

    #[test]
    fn nothing_that_was_durable_is_ever_cut() {
        for case in CASES.iter().filter(|case| case.standing != Some(Standing::Tail)) {
            assert!(!matches!(case.action, Action::CutHere | Action::EndOfLog), "{case:?}");
        }
    }

    #[test]
    fn nothing_is_kept_unless_both_halves_are_whole() {
        for case in CASES.iter().filter(|case| case.action == Action::Keep) {
            assert_eq!((case.meta, case.data), (Some(MetaState::Valid), Some(DataState::Valid)));
        }
    }
}
