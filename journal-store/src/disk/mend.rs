//! Looking things up in a segment's index; and making an index again where a page of its file has rotted.
//!
//! An index holds nothing that the segment's records do not say too. So a lookup that comes to a bad page has the index made
//! again from the metadata file, and goes on in the new one. A writer also replaces the file, so that it is mended for good.

use std::sync::PoisonError;

use journal_format::index::{BadPage, Extent, IndexBuilder};
use journal_format::recovery::DataState;
use journal_format::segment::{SegmentKind, next_entry};
use journal_format::{Epoch, Lsn};

use super::DiskStore;
use super::scan::Source;
use super::seal::put_index;
use crate::damage::{Damage, DamageKind};
use crate::error::StoreError;
use crate::files;
use crate::io::Access;
use crate::segment::{Segment, SegmentIndex};

impl DiskStore {
    /// The first chunk in `[from, to)` of which the segment has extents.
    ///
    /// # Errors
    /// `Damaged`, `Io` when the index is damaged and cannot be made again.
    pub(crate) fn next_chunk(
        &self,
        segment: &Segment,
        from: u32,
        to: u32,
    ) -> Result<Option<u32>, StoreError> {
        self.mending(segment, || segment.index().next_chunk(from, to))
    }

    /// Gives `each` the segment's extents of a chunk with LSNs in `(after, upto]`, newest first, until it returns `false`.
    ///
    /// # Errors
    /// As [`DiskStore::next_chunk`].
    pub(crate) fn newest_first(
        &self,
        segment: &Segment,
        chunk: u32,
        after: Lsn,
        upto: Lsn,
        mut each: impl FnMut(Extent) -> bool,
    ) -> Result<(), StoreError> {
        // A chunk has one extent of an LSN: behind a bad page it goes on where it was.
        let mut upto = upto;
        self.mending(segment, || {
            segment.index().newest_first(chunk, after, upto, |extent| {
                upto = extent.lsn.prev();
                each(extent)
            })
        })
    }

    /// Looks something up; if that comes to a bad page, again when the index is made again.
    fn mending<T>(
        &self,
        segment: &Segment,
        mut look_up: impl FnMut() -> Result<T, BadPage>,
    ) -> Result<T, StoreError> {
        if let Ok(found) = look_up() {
            return Ok(found);
        }
        // It guards no data, only an order: who comes second finds the new index.
        let _turn = self.mending.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match look_up() {
                Ok(found) => return Ok(found),
                // Of a new index all is checked, so the next look is the last.
                Err(bad) => self.make_again(segment, &bad)?,
            }
        }
    }

    /// Makes the index of a sealed segment again, from its records, because of a bad page in its file; notes the damage.
    fn make_again(&self, segment: &Segment, bad: &BadPage) -> Result<(), StoreError> {
        let last_lsn = match &*segment.index() {
            SegmentIndex::Sealed(shape, _) => shape.last_lsn(),
            // It has no pages.
            SegmentIndex::Live(_) => return Ok(()),
        };
        let lsns = (segment.first_lsn, last_lsn);
        let path = self.path(SegmentKind::Index, segment.number);
        self.note(Damage::new(self.id, (&path, bad.offset), lsns, DamageKind::Index, bad));
        let index = self.index_of_records(segment, last_lsn, bad)?;
        self.replace_index(segment, index, lsns);
        Ok(())
    }

    fn index_of_records(
        &self,
        segment: &Segment,
        last_lsn: Lsn,
        bad: &BadPage,
    ) -> Result<IndexBuilder, StoreError> {
        let path = self.path(SegmentKind::Meta, segment.number);
        let file = self.storage().open(&path, Access::Read).map_err(StoreError::io("open", &path))?;
        let meta = files::read_all(&*file, &path)?;
        let source = Source {
            disk: self.id,
            segment: segment.number,
            first_lsn: segment.first_lsn,
            sealed: Some(last_lsn),
            durable: last_lsn,
            // Epochs are history, which is known.
            last_epoch: Epoch(0),
            meta: &meta,
        };
        let found = source.scan(&mut |_, _| Ok(DataState::Valid))?;
        let next = found.last.map_or(segment.first_lsn, |last| last.lsn.next());
        if found.damage.is_none() && next == last_lsn.next() {
            return Ok(found.index);
        }
        let detail = found.damage.unwrap_or_else(|| "the records do not end where the segment does".into());
        let offset = next_entry(found.meta_end);
        let detail = format!(
            "{detail} at byte {offset}; and the index, which would be made again from it, has rotted too, at byte {}",
            bad.offset
        );
        Err(StoreError::damaged(self.id, &path, (next, last_lsn), detail))
    }

    /// Puts a new index of a sealed segment in the place of the one that there is. Where its file cannot be written, or must
    /// not, it is kept in memory, and the next opening finds the old one.
    pub(super) fn replace_index(&self, segment: &Segment, index: IndexBuilder, lsns: (Lsn, Lsn)) {
        // Not beside a seal or another opening of the disk, which write into the same folder: those hold it, or poisoned it.
        let written = self.lock_writer().and_then(|_writer| {
            put_index(self.storage(), &self.dir, (self.id, segment.number), lsns, &index)
        });
        *segment.index_mut() = written.unwrap_or(SegmentIndex::Live(index));
    }

    /// Notes damage that was found after opening, one of each file.
    fn note(&self, damage: Damage) {
        let mut found = self.found();
        if found.damage.iter().all(|known| known.path != damage.path) {
            found.damage.push(damage);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use journal_format::{
        ByteRange, Codec, DataSpan, DiskId, Frame, FrameMeta, GapReason, Op, Record, Stamp, frame,
    };

    use super::*;
    use crate::io::MemStorage;
    use crate::{Store, StoreConfig};

    const DISK: DiskId = DiskId([7; 16]);
    const CHUNK: u64 = 256 << 10;
    const RECORDS: u64 = 10_000;
    const HOT: u64 = 3;

    /// A write for each LSN from `first` on, half of them to one chunk and half to 1000, in a gap that begins with the first
    /// of all.
    fn frame_of(first: u64, records: u64) -> Vec<u8> {
        let write = |lsn: u64| {
            let chunk = if lsn.is_multiple_of(2) { HOT } else { lsn * 7 % 2000 };
            let range = ByteRange::new(chunk * CHUNK, 8).unwrap();
            let op = match lsn {
                1 => Op::GapBegin { reason: GapReason::Attach, generation: 1 },
                _ => Op::Write { range, data: DataSpan { pos: 0, len: 8 }, fill: false, fua: false },
            };
            Record { lsn: Lsn(lsn), stamp: Stamp(lsn), op }
        };
        let records: Vec<_> = (first..first + records).map(write).collect();
        let meta = FrameMeta {
            disk: DISK,
            epoch: Epoch(1),
            first_lsn: Lsn(first),
            disk_bytes: 2000 * CHUNK,
            codec: Codec::Raw,
            raw_bytes: 8,
        };
        frame::encode(&meta, &records, &[1; 8]).unwrap()
    }

    /// Pages that were checked, of each sealed segment.
    fn checked(disk: &DiskStore) -> Vec<u32> {
        let count = |segment: &Arc<Segment>| match &*segment.index() {
            SegmentIndex::Sealed(shape, _) => Some(shape.checked_pages()),
            SegmentIndex::Live(_) => None,
        };
        disk.state().segments.iter().filter_map(count).collect()
    }

    fn open(storage: &MemStorage) -> Store {
        let config = StoreConfig { segment_records: RECORDS, ..StoreConfig::default() };
        Store::open_with("/store", Arc::new(storage.clone()), config).unwrap()
    }

    /// A disk of three sealed segments.
    fn three_segments(storage: &MemStorage) -> Arc<DiskStore> {
        let (store, mut lsn) = (open(storage), 1);
        let disk = store.open_or_create(DISK, 2000 * CHUNK).unwrap();
        while disk.stats().segments < 4 {
            store.append(&Frame::parse(&frame_of(lsn, 1000)).unwrap()).unwrap();
            assert!(store.commit().is_empty());
            lsn += 1000;
        }
        disk
    }

    #[test]
    fn opening_checks_no_page_and_a_read_only_those_that_it_needs() {
        let storage = MemStorage::new();
        let disk = three_segments(&storage);
        let (all, last) = (1000_u32.div_ceil(341) + (RECORDS as u32).div_ceil(170), disk.durable_lsn());
        assert_eq!(checked(&disk), [all; 3], "what was just written is checked in full");
        drop(disk);

        let store = open(&storage);
        let disk = store.disk(DISK).unwrap();
        assert_eq!(disk.durable_lsn(), last);
        assert!(disk.history().last.is_some() && disk.newest().is_none());
        assert_eq!(checked(&disk), [0; 3], "opening, and asking for points");
        let view = disk.view_in_gap(last).unwrap();
        view.read(77 * CHUNK, &mut [0; 8]).unwrap();
        let [first, second, third] = checked(&disk)[..] else { panic!("three segments") };
        assert_eq!((first, second), (0, 0), "segments that a read does not come to");
        assert!((2..=3).contains(&third), "{third} of {all}: one of chunks, and those of the extents");
        view.read(77 * CHUNK, &mut [0; 8]).unwrap();
        assert_eq!(checked(&disk), [0, 0, third], "once is enough");
    }

    /// All versions of the chunk that has many, in the first segment.
    fn versions(disk: &DiskStore) -> Vec<Lsn> {
        let segment = Arc::clone(disk.state().segments.first().unwrap());
        let mut lsns = Vec::new();
        let all = disk.newest_first(&segment, HOT as u32, Lsn::ZERO, Lsn::MAX, |extent| {
            lsns.push(extent.lsn);
            true
        });
        all.unwrap();
        lsns
    }

    #[test]
    fn a_lookup_goes_on_where_it_was_when_it_came_to_the_bad_page() {
        let storage = MemStorage::new();
        let good = versions(&three_segments(&storage));
        assert!(good.len() > 4000 && good.is_sorted_by(|newer, older| newer > older));
        let files = storage.files();
        let path = files.keys().find(|path| path.ends_with("index-000001.idx")).unwrap();
        let extents_at = files[path].len() - (RECORDS as usize - 1) * 24;
        for page in 0..20 {
            let mut files = files.clone();
            files.get_mut(path).unwrap()[extents_at + page * 170 * 24] ^= 1;
            let storage = MemStorage::with_files(&files);
            let disk = open(&storage).disk(DISK).unwrap();
            assert!(versions(&disk) == good, "page {page}");
            assert_eq!(disk.known_damage().len(), 1, "page {page}");
            assert_eq!((disk.newly_found(), disk.newly_found()), (disk.known_damage(), vec![]), "each once");
        }
    }
}
