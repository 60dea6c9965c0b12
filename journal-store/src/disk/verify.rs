//! Reading everything of a disk and checking every checksum.

use std::sync::Arc;

use journal_format::index::{IndexFrame, IndexShape};
use journal_format::manifest::Manifest;
use journal_format::recovery::DataState;
use journal_format::segment::SegmentKind;
use journal_format::{Epoch, Lsn};

use super::scan::Source;
use super::{Damage, DiskStore, State};
use crate::error::StoreError;
use crate::files;
use crate::io::Access;
use crate::segment::{Segment, SegmentIndex};

impl DiskStore {
    /// Reads all durable frames, records, indexes and small files of the disk and checks every checksum; indexes are
    /// also compared with the records that they were made from. `progress` is told the bytes of frame data that are done
    /// and that there are. Returns what is damaged, in LSN order; an empty list says that every point can be read.
    ///
    /// # Errors
    /// `Io` when a file cannot be read at all.
    pub fn verify(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<Vec<Damage>, StoreError> {
        let state = self.state().clone();
        let mut damages: Vec<Damage> = state.damage.iter().chain(&state.bookmarks_damage).cloned().collect();
        self.verify_small_files(&state, &mut damages)?;
        let frames = |segment: &Segment| segment.index().tables().frames().collect::<Vec<IndexFrame>>();
        let durable = |frame: &IndexFrame| frame.first_lsn <= state.durable_lsn;
        let stored = |segment: &Arc<Segment>| {
            frames(segment).iter().filter(|f| durable(f)).map(|f| u64::from(f.data_bytes)).sum::<u64>()
        };
        let (mut done, total) = (0, state.segments.iter().map(stored).sum());
        progress(done, total);
        for segment in state.segments.iter() {
            self.verify_index(segment, &mut damages)?;
            for frame in frames(segment).into_iter().filter(durable) {
                collect(&mut damages, self.read_frame_data(&frame))?;
                collect(&mut damages, self.frame_records(segment, &frame))?;
                done += u64::from(frame.data_bytes);
                progress(done, total);
            }
        }
        damages.sort_by_key(|damage| damage.first_lsn);
        Ok(damages)
    }

    fn verify_small_files(&self, state: &State, damages: &mut Vec<Damage>) -> Result<(), StoreError> {
        let path = self.dir.join(files::MANIFEST);
        let bytes = self.read_whole(&path)?;
        if let Err(error) = Manifest::parse(&bytes) {
            damages.push(self.damage_of(&path, (Lsn::FIRST, Lsn::MAX), error));
        }
        let path = self.dir.join(files::BOOKMARKS);
        if state.bookmarks.is_empty() || state.bookmarks_damage.is_some() {
            return Ok(());
        }
        if let Err(error) = journal_format::bookmarks::parse(&self.read_whole(&path)?) {
            damages.push(self.damage_of(&path, (Lsn::FIRST, Lsn::MAX), error));
        }
        Ok(())
    }

    /// Checks the header of the metadata file, and a sealed segment's index against the records.
    fn verify_index(&self, segment: &Segment, damages: &mut Vec<Damage>) -> Result<(), StoreError> {
        let meta_path = self.path(SegmentKind::Meta, segment.number);
        let meta = self.read_whole(&meta_path)?;
        let last =
            segment.index().tables().frames().next_back().map_or(segment.first_lsn, |frame| frame.last_lsn());
        let header = journal_format::segment::SegmentMeta::parse(&meta)
            .and_then(|header| header.expect(SegmentKind::Meta, self.id, segment.number));
        if let Err(error) = header {
            damages.push(self.damage_of(&meta_path, (segment.first_lsn, last), error));
        }
        if matches!(&*segment.index(), SegmentIndex::Live(_)) {
            return Ok(());
        }
        let path = self.path(SegmentKind::Index, segment.number);
        let bytes = self.read_whole(&path)?;
        let (disk, number, first_lsn) = (self.id, segment.number, segment.first_lsn);
        let source = Source {
            disk,
            segment: number,
            first_lsn,
            sealed: Some(last),
            last_epoch: Epoch(0),
            meta: &meta,
        };
        let found = source.scan(&mut |_, _| Ok(DataState::Valid))?;
        let verdict = match (IndexShape::check(&bytes), found.damage) {
            (Err(error), _) => Err(error.to_string()),
            // What is wrong with the records is reported frame by frame.
            (Ok(_), Some(_)) => Ok(()),
            (Ok(_), None) if found.index.finish().is_ok_and(|made| made == bytes) => Ok(()),
            (Ok(_), None) => Err("the index does not fit the records".to_owned()),
        };
        if let Err(detail) = verdict {
            damages.push(self.damage_of(&path, (segment.first_lsn, last), detail));
        }
        Ok(())
    }

    fn read_whole(&self, path: &std::path::Path) -> Result<Vec<u8>, StoreError> {
        let file = self.storage().open(path, Access::Read).map_err(StoreError::io("open", path))?;
        files::read_all(&*file, path)
    }

    fn damage_of(&self, path: &std::path::Path, lsns: (Lsn, Lsn), detail: impl ToString) -> Damage {
        let (first_lsn, last_lsn) = lsns;
        Damage { disk: self.id, path: path.to_owned(), first_lsn, last_lsn, detail: detail.to_string() }
    }
}

/// Notes damage, passes other errors on.
fn collect<T>(damages: &mut Vec<Damage>, result: Result<T, StoreError>) -> Result<(), StoreError> {
    match result {
        Ok(_) => Ok(()),
        Err(StoreError::Damaged { disk, path, first_lsn, last_lsn, detail }) => {
            damages.push(Damage { disk, path, first_lsn, last_lsn, detail });
            Ok(())
        }
        Err(error) => Err(error),
    }
}
