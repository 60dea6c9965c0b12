//! Sealing: the active segment gets its index file and is never written again; a new one takes over.

use std::path::Path;
use std::sync::Arc;

use journal_format::index::{IndexBuilder, IndexShape};
use journal_format::manifest::{LiveSegment, Manifest, Sealed};
use journal_format::segment::{SEGMENT_HEADER_PAGE_BYTES, SegmentKind, SegmentMeta};
use journal_format::{DiskId, FormatError, Lsn, SegmentNumber};

use super::tail::Tail;
use super::writer::Writer;
use super::{DiskStore, Env, segment_path};
use crate::error::StoreError;
use crate::files;
use crate::io::{Bytes, Storage};
use crate::segment::{Segment, SegmentIndex};

/// Makes the two files of a new active segment, durable except for their names.
pub(super) fn make_segment(
    env: &Env,
    dir: &Path,
    disk: DiskId,
    segment: SegmentNumber,
    first_lsn: Lsn,
) -> Result<(Tail, Tail), StoreError> {
    let make = |kind| {
        let path = segment_path(dir, kind, segment);
        let file = env.storage.create(&path).map_err(StoreError::io("create", &path))?;
        let page = SegmentMeta { kind, disk, segment, first_lsn }.encode();
        file.write_at(&page, 0).map_err(StoreError::io("write", &path))?;
        file.sync().map_err(StoreError::io("sync", &path))?;
        Ok::<_, StoreError>((file, path))
    };
    let end = SEGMENT_HEADER_PAGE_BYTES as u64;
    let ((data, data_path), (meta, meta_path)) = (make(SegmentKind::Data)?, make(SegmentKind::Meta)?);
    Ok((env.data_tail(data, data_path, end), env.meta_tail(meta, meta_path, end)))
}

/// Writes a manifest; it is certain after the folder has been made durable.
pub(super) fn put_manifest(storage: &dyn Storage, dir: &Path, manifest: &Manifest) -> Result<(), StoreError> {
    let bytes = manifest.encode().map_err(StoreError::unwritable(manifest.disk))?;
    files::replace(storage, dir, files::MANIFEST, &bytes)
}

/// Loads an index file and has `check` look at it: [`IndexShape::parse`] or [`IndexShape::check`].
pub(super) fn load_index(
    storage: &dyn Storage,
    path: &Path,
    (disk, segment): (DiskId, SegmentNumber),
    check: impl FnOnce(&[u8]) -> Result<IndexShape, FormatError>,
) -> Result<Result<(IndexShape, Bytes), String>, StoreError> {
    let bytes = match storage.load(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Ok(Err("the file is missing".into()));
        }
        Err(error) => return Err(StoreError::io("read", path)(error)),
    };
    Ok(match check(&bytes) {
        Ok(shape) if (shape.disk(), shape.segment()) == (disk, segment) => Ok((shape, bytes)),
        Ok(_) => Err("it is the index of another disk or segment".into()),
        Err(error) => Err(error.to_string()),
    })
}

/// Replaces the index file of a sealed segment, durably, and loads it.
pub(super) fn put_index(
    storage: &dyn Storage,
    dir: &Path,
    (disk, segment): (DiskId, SegmentNumber),
    lsns: (Lsn, Lsn),
    index: &IndexBuilder,
) -> Result<SegmentIndex, StoreError> {
    let name = files::segment_file(SegmentKind::Index, segment);
    let bytes = index.finish().map_err(StoreError::unwritable(disk))?;
    files::put(storage, dir, &name, &bytes)?;
    files::sync_dir(storage, dir)?;
    let path = dir.join(name);
    match load_index(storage, &path, (disk, segment), IndexShape::check)? {
        Ok((shape, bytes)) => Ok(SegmentIndex::Sealed(shape, bytes)),
        Err(detail) => Err(StoreError::damaged(disk, &path, lsns, detail)),
    }
}

impl DiskStore {
    /// Seals the active segment, all of which is durable, and goes on in a new one.
    pub(super) fn seal(&self, writer: &mut Writer) -> Result<(), StoreError> {
        let (storage, number, next) = (self.storage(), writer.segment.number, writer.manifest.next_segment);
        let index = self.encode_index(&writer.segment)?;
        let name = files::segment_file(SegmentKind::Index, number);
        files::put(storage, &self.dir, &name, &index)?;
        let first_lsn = writer.last.lsn.next();
        let (data, meta) = make_segment(&self.env, &self.dir, self.id, next, first_lsn)?;
        // The new names must be durable before the manifest can be seen that names them.
        files::sync_dir(storage, &self.dir)?;

        let path = self.dir.join(name);
        let damaged =
            |detail| StoreError::damaged(self.id, &path, (writer.segment.first_lsn, writer.last.lsn), detail);
        // All of it, while it is in memory: it was written a moment ago, and what is bad is not named by the manifest.
        let loaded = load_index(storage, &path, (self.id, number), IndexShape::check)?;
        let (shape, bytes) = loaded.map_err(damaged)?;
        let manifest = self.next_manifest(writer, &shape, index.len() as u64, first_lsn);
        put_manifest(storage, &self.dir, &manifest)?;
        files::sync_dir(storage, &self.dir)?;

        *writer.segment.index_mut() = SegmentIndex::Sealed(shape, bytes);
        let fresh = SegmentIndex::Live(IndexBuilder::new(self.id, next));
        let segment = Arc::new(Segment::new(next, first_lsn, fresh));
        (writer.manifest, writer.data, writer.meta, writer.records) = (manifest, data, meta, 0);
        writer.segment = Arc::clone(&segment);
        self.show_sealed(segment, (index.len() + 2 * SEGMENT_HEADER_PAGE_BYTES) as u64);
        Ok(())
    }

    fn encode_index(&self, segment: &Segment) -> Result<Vec<u8>, StoreError> {
        match &*segment.index() {
            SegmentIndex::Live(builder) => builder.finish().map_err(StoreError::unwritable(self.id)),
            SegmentIndex::Sealed(..) => {
                Err(StoreError::invalid(self.id, "the active segment is sealed already"))
            }
        }
    }

    fn next_manifest(
        &self,
        writer: &Writer,
        shape: &IndexShape,
        index_bytes: u64,
        first_lsn: Lsn,
    ) -> Manifest {
        let mut manifest = writer.manifest.clone();
        let sealed = Sealed {
            last_lsn: shape.last_lsn(),
            first_stamp: shape.first_stamp(),
            last_stamp: shape.last_stamp(),
            data_bytes: writer.data.file_bytes(),
            meta_bytes: writer.meta.file_bytes(),
            index_bytes,
        };
        if let Some(active) = manifest.segments.last_mut() {
            active.sealed = Some(sealed);
        }
        manifest.segments.push(LiveSegment { segment: manifest.next_segment, first_lsn, sealed: None });
        manifest.next_segment = manifest.next_segment.next();
        manifest.revision = manifest.revision.saturating_add(1);
        manifest.disk_bytes = self.disk_bytes();
        manifest.last_epoch = writer.last.epoch;
        manifest
    }

    /// Shows readers the new active segment.
    fn show_sealed(&self, segment: Arc<Segment>, more_bytes: u64) {
        let mut state = self.state_mut();
        let mut segments = Vec::clone(&state.segments);
        segments.push(segment);
        state.stats.segments = segments.len() as u64;
        state.stats.stored_meta_bytes = state.stats.stored_meta_bytes.saturating_add(more_bytes);
        state.segments = Arc::new(segments);
    }
}
