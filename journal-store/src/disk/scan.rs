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
    /// The entries of which it is not known that they were durable.
    pub(super) unproven: Vec<Unproven>,
    /// What stands behind the last good entry and should not, if history from there on is unknown.
    pub(super) damage: Option<String>,
}

/// A good entry that may be only in the page cache.
#[derive(Clone, Copy, Debug)]
pub(super) struct Unproven {
    /// Where the metadata entry before it ends.
    pub(super) meta_from: u64,
    /// Where it begins.
    pub(super) meta_at: u64,
    /// Where the data entry before its own ends.
    pub(super) data_from: u64,
}

/// A metadata file to scan.
#[derive(Clone, Copy, Debug)]
pub(super) struct Source<'a> {
    pub(super) disk: DiskId,
    pub(super) segment: SegmentNumber,
    pub(super) first_lsn: Lsn,
    /// Of a sealed segment, its last LSN, where the walk ends.
    pub(super) sealed: Option<Lsn>,
    /// Everything up to this LSN is known to have been durable, whatever the file says.
    pub(super) durable: Lsn,
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
            unproven: Vec::new(),
            damage: None,
        };
        let place = |position| Place { disk: self.disk, segment: self.segment, position };
        let durable = self.durable.max(durable_floor(self.rest(start), &place(start)));
        loop {
            let expected = found.last.map_or(self.first_lsn, |last| last.lsn.next());
            if self.sealed.is_some_and(|last| expected > last) {
                return Ok(found);
            }
            let (place, seen) = see_next(self.rest(found.meta_end), &place(found.meta_end), expected);
            let entry = if let MetaSeen::Valid(entry) = &seen { Some(entry) } else { None };
            let proven = entry.is_some_and(|entry| entry.frame.header().last_lsn() <= durable);
            // Data that was durable is not read again: where it has rotted, whoever reads it is told.
            let data = if proven { DataState::Valid } else { see_data(entry, found.data_end)? };
            let standing = if expected <= durable { Standing::Durable } else { Standing::Tail };
            match (decide(seen.state(), data, standing), entry) {
                (Action::Keep | Action::RefuseData, Some(entry)) => {
                    let (meta_from, data_from) = (found.meta_end, found.data_end);
                    if let Err(error) = found.keep(entry, &place, self.last_epoch) {
                        found.damage = Some(error.to_string());
                        return Ok(found);
                    }
                    if !proven {
                        found.unproven.push(Unproven { meta_from, meta_at: place.position, data_from });
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
