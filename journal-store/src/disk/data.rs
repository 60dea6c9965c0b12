//! Reading frames: their data for views, their records for points.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use journal_format::codec;
use journal_format::frame::FRAME_HEADER_BYTES;
use journal_format::index::IndexFrame;
use journal_format::limits::PART_RAW_BYTES;
use journal_format::parts::{self, Part};
use journal_format::record::RECORD_BYTES;
use journal_format::segment::{
    DATA_ENTRY_BYTES, DataEntry, DataPlace, META_ENTRY_BYTES, MetaEntry, Place, SegmentKind,
};
use journal_format::{Codec, Frame, Lsn, Record, SegmentNumber};

use super::DiskStore;
use crate::cache::Cache;
use crate::error::StoreError;
use crate::files::{self, Header};
use crate::io::{Access, File};
use crate::limits::CACHED_ENTRY_BYTES;
use crate::segment::Segment;

/// Data of frames: which opening of which disk, segment of the data volume, position there, and which part.
pub(crate) type DataKey = (u64, SegmentNumber, u64, u32);
/// Recently used data.
pub(crate) type DataCache = Cache<DataKey, CachedData>;

/// What is kept of frames' data.
#[derive(Clone, Debug)]
pub(crate) enum CachedData {
    /// Decompressed: of the whole frame, or of one of its parts.
    Raw(Arc<Vec<u8>>),
    /// Where its parts are.
    Table(Arc<Vec<Part>>),
}

impl CachedData {
    /// Bytes that keeping it takes: of a table most are the cache's own.
    fn weight(&self) -> usize {
        let bytes = match self {
            Self::Raw(raw) => raw.len(),
            Self::Table(parts) => size_of_val(parts.as_slice()),
        };
        bytes.saturating_add(CACHED_ENTRY_BYTES)
    }
}

/// What a read needs of memory, and has just read: the next piece often comes from the same part.
#[derive(Debug)]
pub(crate) struct Reading {
    /// Whether others will want it soon. What is read once, and much of it, would only push out what is.
    keeps: bool,
    last: Option<(DataPlace, u32)>,
    stored: Vec<u8>,
    /// The decompressed data of the last part.
    raw: Vec<u8>,
}

impl Reading {
    pub(crate) const fn new(keeps: bool) -> Self {
        Self { keeps, last: None, stored: Vec::new(), raw: Vec::new() }
    }
}

/// In place of a part's number: the table of the parts; more than a frame can have.
const TABLE: u32 = u32::MAX;
/// Of a frame that is not in parts.
const WHOLE: u32 = 0;

impl DiskStore {
    /// Copies the decompressed data of a frame from `pos` on.
    ///
    /// What is in parts is read and checked part by part: of 512 KiB of a frame 32 are enough for a block of 4.
    pub(crate) fn copy_data(
        &self,
        frame: &IndexFrame,
        pos: u32,
        into: &mut [u8],
        reading: &mut Reading,
    ) -> Result<(), StoreError> {
        if frame.codec != Codec::Parts {
            return copy_from(&self.whole_data(frame)?, pos, into).ok_or_else(|| self.passes(frame));
        }
        let parts = self.parts(frame)?;
        let (mut pos, mut rest) = (pos, into);
        while !rest.is_empty() {
            let number = pos / PART_RAW_BYTES;
            let part = parts.get(number as usize).ok_or_else(|| self.passes(frame))?;
            let start = pos % PART_RAW_BYTES;
            let here = rest.len().min(part.raw_bytes.saturating_sub(start) as usize);
            let (now, later) = rest.split_at_mut(here);
            let copied = self.copy_part(frame, number, part, start, now, reading)?;
            copied.filter(|()| here > 0).ok_or_else(|| self.passes(frame))?;
            (pos, rest) = (pos.saturating_add(here as u32), later);
        }
        Ok(())
    }

    /// An index that passed its checks does not name bytes that are not there.
    fn passes(&self, frame: &IndexFrame) -> StoreError {
        let detail = format!("the index names data that the frame of LSN {} does not have", frame.first_lsn);
        StoreError::invalid(self.id, format!("{detail}; verify the disk"))
    }

    fn cached(&self, at: DataPlace, part: u32) -> Option<CachedData> {
        self.env.data.get((self.opening, at.segment, at.position, part))
    }

    fn keep(&self, at: DataPlace, part: u32, data: CachedData) {
        let weight = data.weight();
        self.env.data.put((self.opening, at.segment, at.position, part), data, weight);
    }

    /// The decompressed data of a frame that is not in parts.
    fn whole_data(&self, frame: &IndexFrame) -> Result<Arc<Vec<u8>>, StoreError> {
        let Some(at) = frame.data else { return Ok(Arc::default()) };
        if let Some(CachedData::Raw(data)) = self.cached(at, WHOLE) {
            return Ok(data);
        }
        let data = Arc::new(self.read_frame_data(frame)?);
        self.keep(at, WHOLE, CachedData::Raw(Arc::clone(&data)));
        Ok(data)
    }

    /// Where the parts of a frame are.
    fn parts(&self, frame: &IndexFrame) -> Result<Arc<Vec<Part>>, StoreError> {
        let Some(at) = frame.data else { return Ok(Arc::default()) };
        if let Some(CachedData::Table(parts)) = self.cached(at, TABLE) {
            return Ok(parts);
        }
        let place = parts::table_place(frame.raw_bytes, frame.data_bytes).unwrap_or_default();
        let mut table = Vec::new();
        self.read_data(frame, place.start as usize..place.end as usize, &mut table)?;
        let parts = parts::read_table(&table, frame.raw_bytes, frame.data_bytes, frame.data_crc)
            .map_err(|error| self.damaged_data(frame, error.to_string()))?;
        let parts = Arc::new(parts);
        self.keep(at, TABLE, CachedData::Table(Arc::clone(&parts)));
        Ok(parts)
    }

    /// Copies the decompressed data of a part from `start` on; `None` where it has less.
    fn copy_part(
        &self,
        frame: &IndexFrame,
        number: u32,
        part: &Part,
        start: u32,
        into: &mut [u8],
        reading: &mut Reading,
    ) -> Result<Option<()>, StoreError> {
        let Some(at) = frame.data else { return Ok(None) };
        if reading.last != Some((at, number)) {
            if let Some(CachedData::Raw(data)) = self.cached(at, number) {
                return Ok(copy_from(&data, start, into));
            }
            reading.last = None;
            self.read_data(frame, part.stored(), &mut reading.stored)?;
            let (stored, raw) = (&mut reading.stored, &mut reading.raw);
            raw.clear();
            let checked = if part.is_raw() {
                part.check(stored).map(|()| std::mem::swap(stored, raw))
            } else {
                codec::decompress_part(part, stored, raw)
            };
            checked.map_err(|error| self.damaged_data(frame, error.to_string()))?;
            reading.last = Some((at, number));
            if reading.keeps {
                self.keep(at, number, CachedData::Raw(Arc::new(reading.raw.clone())));
            }
        }
        Ok(copy_from(&reading.raw, start, into))
    }

    /// Reads some of a frame's data as it is stored into `bytes`, in place of what they are; nothing of it is checked.
    fn read_data(
        &self,
        frame: &IndexFrame,
        stored: Range<usize>,
        bytes: &mut Vec<u8>,
    ) -> Result<(), StoreError> {
        let Some(at) = frame.data else { return Ok(()) };
        let file = self.file_of(frame, at.segment)?;
        let position =
            at.position.saturating_add(DATA_ENTRY_BYTES as u64).saturating_add(stored.start as u64);
        // No longer than it was: nothing is zeroed that is read over.
        bytes.resize(stored.len(), 0);
        match file.read_at(bytes, position) {
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                Err(self.damaged_data(frame, "the file ends before it".into()))
            }
            read => read.map_err(StoreError::io("read", &self.path(SegmentKind::Data, at.segment))),
        }
    }

    fn damaged_data(&self, frame: &IndexFrame, detail: String) -> StoreError {
        let segment = frame.data.map_or(SegmentNumber(0), |at| at.segment);
        let path = self.path(SegmentKind::Data, segment);
        StoreError::damaged(self.id, &path, (frame.first_lsn, frame.last_lsn()), detail)
    }

    /// The data file that a frame is in.
    fn file_of(&self, frame: &IndexFrame, segment: SegmentNumber) -> Result<Arc<dyn File>, StoreError> {
        self.data_file(segment).map_err(|error| match error {
            // The file's header is bad, which is found only when the first frame in it is wanted.
            StoreError::Damaged { detail, .. } => self.damaged_data(frame, detail),
            other => other,
        })
    }

    /// Reads, checks and decompresses all of a frame's data, past the cache.
    pub(super) fn read_frame_data(&self, frame: &IndexFrame) -> Result<Vec<u8>, StoreError> {
        let Some(at) = frame.data else { return Ok(Vec::new()) };
        let path = self.path(SegmentKind::Data, at.segment);
        let damaged = |detail: String| self.damaged_data(frame, detail);
        let file = self.file_of(frame, at.segment)?;
        let length = DATA_ENTRY_BYTES.saturating_add(frame.data_bytes as usize);
        let bytes = files::read_some(&*file, &path, at.position, length)?;
        let place = Place { disk: self.id, segment: at.segment, position: at.position };
        let entry = DataEntry::parse(&bytes, &place).map_err(|error| damaged(error.to_string()))?;
        if (entry.first_lsn, entry.data_crc, entry.data.len())
            != (frame.first_lsn, frame.data_crc, frame.data_bytes as usize)
        {
            return Err(damaged("the data is another frame's".into()));
        }
        codec::decompress(frame.codec, entry.data, frame.raw_bytes)
            .map_err(|error| damaged(error.to_string()))
    }

    /// The data file of a segment, opened and checked once.
    fn data_file(&self, segment: SegmentNumber) -> Result<Arc<dyn File>, StoreError> {
        if let Some(file) = self.files.get(segment) {
            return Ok(file);
        }
        let path = self.path(SegmentKind::Data, segment);
        let damaged = |detail| StoreError::damaged(self.id, &path, (Lsn::ZERO, Lsn::MAX), detail);
        let file = self.storage().open(&path, Access::Read).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => damaged("the file is missing".to_owned()),
            _ => StoreError::io("open", &path)(error),
        })?;
        if let Header::Wrong(detail) =
            files::check_header(&*file, &path, SegmentKind::Data, self.id, segment)?
        {
            return Err(damaged(detail));
        }
        self.files.put(segment, Arc::clone(&file), 1);
        Ok(file)
    }

    /// The records of a frame, from the metadata volume.
    pub(super) fn frame_records(
        &self,
        segment: &Segment,
        frame: &IndexFrame,
    ) -> Result<Vec<Record>, StoreError> {
        self.with_head(segment, frame, |frame| frame.records().collect())
    }

    /// Reads a frame's head and gives it to `use_it`.
    pub(super) fn with_head<T>(
        &self,
        segment: &Segment,
        frame: &IndexFrame,
        use_it: impl FnOnce(&Frame<'_>) -> T,
    ) -> Result<T, StoreError> {
        let path = self.path(SegmentKind::Meta, segment.number);
        let file = self.storage().open(&path, Access::Read).map_err(StoreError::io("open", &path))?;
        with_head(&*file, &path, Place { disk: self.id, segment: segment.number, position: 0 }, frame, use_it)
    }
}

/// Copies from `pos` on; `None` where there is less.
fn copy_from(data: &[u8], pos: u32, into: &mut [u8]) -> Option<()> {
    let start = pos as usize;
    into.copy_from_slice(data.get(start..start.checked_add(into.len())?)?);
    Some(())
}

/// Reads a frame's head from an open metadata file and gives it to `use_it`; of `place` only disk and segment count.
pub(super) fn with_head<T>(
    file: &dyn File,
    path: &Path,
    place: Place,
    frame: &IndexFrame,
    use_it: impl FnOnce(&Frame<'_>) -> T,
) -> Result<T, StoreError> {
    let damaged =
        |detail: String| StoreError::damaged(place.disk, path, (frame.first_lsn, frame.last_lsn()), detail);
    let records = (frame.record_count as usize).saturating_mul(RECORD_BYTES);
    let length = META_ENTRY_BYTES.saturating_add(FRAME_HEADER_BYTES).saturating_add(records);
    let bytes = files::read_some(file, path, frame.meta_position, length)?;
    let place = Place { position: frame.meta_position, ..place };
    let entry = MetaEntry::parse(&bytes, &place).map_err(|error| damaged(error.to_string()))?;
    if entry.header.first_lsn != frame.first_lsn || entry.frame.header().record_count() != frame.record_count
    {
        return Err(damaged("the records are another frame's".into()));
    }
    Ok(use_it(&entry.frame))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_of_small_frames_stay_within_the_budget_with_what_the_cache_needs_for_each() {
        let (budget, many) = (1 << 20, 40_000);
        let cache = DataCache::new(budget);
        let mut stored = vec![1; PART_RAW_BYTES as usize + 1];
        parts::push_table(&mut stored, &[PART_RAW_BYTES, 1]);
        let table = CachedData::Table(Arc::new(parts::parts_of(&stored, PART_RAW_BYTES + 1).unwrap()));
        let key = |position| (1, SegmentNumber(1), position, TABLE);
        (0..many).for_each(|position| cache.put(key(position), table.clone(), table.weight()));
        let kept = (0..many).filter(|&position| cache.get(key(position)).is_some()).count();
        // A key and a value in two maps, and two allocations: no less than this.
        let least = 2 * size_of::<DataKey>() + size_of::<CachedData>() + 2 * size_of::<Part>() + 64;
        assert!((1000..budget / least).contains(&kept), "{kept} tables in {budget} bytes");
    }
}
