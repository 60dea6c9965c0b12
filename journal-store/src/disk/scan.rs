//! Walking a metadata file entry by entry, as the recovery table says.

use journal_format::index::IndexBuilder;
use journal_format::recovery::{Action, DataState, MetaSeen, Standing, decide, durable_floor, see_next};
use journal_format::segment::{DATA_ENTRY_BYTES, MetaEntry, Place, SEGMENT_HEADER_PAGE_BYTES};
use journal_format::{DiskId, Epoch, Lsn, SegmentNumber};

use super::writer::{Event, Last, events_of};
use crate::error::StoreError;

/// What a scan found.
#[derive(Debug)]
pub(super) struct Scanned {
    pub(super) index: IndexBuilder,
    pub(super) events: Vec<Event>,
    /// The last record, if there is one.
    pub(super) last: Option<Last>,
    pub(super) raw_bytes: u64,
    /// Where the last good entry of the metadata file ends.
    pub(super) meta_end: u64,
    /// Where the data of the last good entry ends, in this segment's data file.
    pub(super) data_end: u64,
    /// Up to where the two files (metadata, data) are known to be durable; the rest may be in the page cache only.
    pub(super) sure: (u64, u64),
    /// What stands behind the last good entry and should not, if history from there on is unknown.
    pub(super) damage: Option<String>,
}

/// A metadata file to scan.
#[derive(Clone, Copy, Debug)]
pub(super) struct Source<'a> {
    pub(super) disk: DiskId,
    pub(super) segment: SegmentNumber,
    pub(super) first_lsn: Lsn,
    /// Of a sealed segment, its last LSN: everything up to it is known to have been durable.
    pub(super) sealed: Option<Lsn>,
    /// Epoch of the record before the first.
    pub(super) last_epoch: Epoch,
    /// The whole file.
    pub(super) meta: &'a [u8],
}

/// Looks at the data that an entry names; without an entry, at where data would go next (a position in this segment).
pub(super) type SeeData<'a> = dyn FnMut(Option<&MetaEntry<'_>>, u64) -> Result<DataState, StoreError> + 'a;

impl Source<'_> {
    /// Walks the file. `Err` only for failures to read; what is wrong in the file is in the result.
    pub(super) fn scan(&self, see_data: &mut SeeData<'_>) -> Result<Scanned, StoreError> {
        let start = SEGMENT_HEADER_PAGE_BYTES as u64;
        let mut found = Scanned {
            index: IndexBuilder::new(self.disk, self.segment),
            events: Vec::new(),
            last: None,
            raw_bytes: 0,
            meta_end: start,
            data_end: start,
            sure: (start, start),
            damage: None,
        };
        let place = |position| Place { disk: self.disk, segment: self.segment, position };
        let floor = self.sealed.unwrap_or_else(|| durable_floor(self.rest(start), &place(start)));
        loop {
            let expected = found.last.map_or(self.first_lsn, |last| last.lsn.next());
            if self.sealed.is_some_and(|last| expected > last) {
                return Ok(found);
            }
            let (place, seen) = see_next(self.rest(found.meta_end), &place(found.meta_end), expected);
            let entry = if let MetaSeen::Valid(entry) = &seen { Some(entry) } else { None };
            let standing = if floor >= expected { Standing::Durable } else { Standing::Tail };
            let data = match (entry, standing) {
                // It was durable, so it is kept whatever its data looks like now; so opening does not read all data.
                (Some(_), Standing::Durable) => DataState::Valid,
                _ => see_data(entry, found.data_end)?,
            };
            match (decide(seen.state(), data, standing), entry) {
                // Data that is damaged is found again, and reported, by whoever reads it.
                (Action::Keep | Action::RefuseData, Some(entry)) => {
                    if let Err(error) = found.keep(entry, &place, self.last_epoch) {
                        found.damage = Some(error.to_string());
                        return Ok(found);
                    }
                    if standing == Standing::Durable {
                        found.sure = (found.meta_end, found.data_end);
                    }
                }
                (Action::EndOfLog | Action::CutHere, _) => return Ok(found),
                _ => {
                    found.damage = Some(match seen {
                        MetaSeen::Torn(error) => error.to_string(),
                        _ => "records that were durable are missing".into(),
                    });
                    return Ok(found);
                }
            }
        }
    }

    fn rest(&self, position: u64) -> &[u8] {
        usize::try_from(position).ok().and_then(|position| self.meta.get(position..)).unwrap_or(&[])
    }
}

impl Scanned {
    fn keep(
        &mut self,
        entry: &MetaEntry<'_>,
        place: &Place,
        epoch_before: Epoch,
    ) -> Result<(), journal_format::FormatError> {
        let (header, data) = (entry.frame.header(), entry.header.data);
        self.index.push(&entry.frame, place.position, data)?;
        self.events.extend(events_of(&entry.frame, self.last.map_or(epoch_before, |last| last.epoch)));
        self.last = Some(Last { lsn: header.last_lsn(), stamp: header.last_stamp(), epoch: header.epoch() });
        self.raw_bytes = self.raw_bytes.saturating_add(u64::from(header.raw_bytes()));
        self.meta_end = place.position.saturating_add(entry.header.entry_bytes());
        if let Some(at) = data.filter(|at| at.segment == place.segment) {
            let length = (DATA_ENTRY_BYTES as u64).saturating_add(u64::from(entry.header.data_bytes));
            self.data_end = self.data_end.max(at.position.saturating_add(length));
        }
        Ok(())
    }
}
