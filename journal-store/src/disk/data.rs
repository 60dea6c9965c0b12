//! Reading frames: their data for views, their records for points.

use std::path::Path;
use std::sync::Arc;

use journal_format::codec;
use journal_format::frame::FRAME_HEADER_BYTES;
use journal_format::index::IndexFrame;
use journal_format::record::RECORD_BYTES;
use journal_format::segment::{DATA_ENTRY_BYTES, DataEntry, META_ENTRY_BYTES, MetaEntry, Place, SegmentKind};
use journal_format::{Frame, Lsn, Record, SegmentNumber};

use super::DiskStore;
use crate::cache::Cache;
use crate::error::StoreError;
use crate::files::{self, Header};
use crate::io::{Access, File};
use crate::segment::Segment;

/// A frame's data: which opening of which disk, segment of the data volume, position there.
pub(crate) type FrameKey = (u64, SegmentNumber, u64);
/// Decompressed data of recently used frames.
pub(crate) type FrameCache = Cache<FrameKey, Arc<Vec<u8>>>;

impl DiskStore {
    /// The decompressed data of a frame.
    pub(crate) fn frame_data(&self, frame: &IndexFrame) -> Result<Arc<Vec<u8>>, StoreError> {
        let Some(at) = frame.data else { return Ok(Arc::default()) };
        let key = (self.opening, at.segment, at.position);
        if let Some(data) = self.env.frames.get(key) {
            return Ok(data);
        }
        let data = Arc::new(self.read_frame_data(frame)?);
        self.env.frames.put(key, Arc::clone(&data), data.len());
        Ok(data)
    }

    /// Reads, checks and decompresses a frame's data, past the cache.
    pub(super) fn read_frame_data(&self, frame: &IndexFrame) -> Result<Vec<u8>, StoreError> {
        let Some(at) = frame.data else { return Ok(Vec::new()) };
        let path = self.path(SegmentKind::Data, at.segment);
        let damaged =
            |detail: String| StoreError::damaged(self.id, &path, (frame.first_lsn, frame.last_lsn()), detail);
        let file = self.data_file(at.segment).map_err(|error| match error {
            // The file's header is bad, which is found only when the first frame in it is wanted.
            StoreError::Damaged { detail, .. } => damaged(detail),
            other => other,
        })?;
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
