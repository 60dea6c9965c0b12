//! Recovering the active segment: what is kept, written again, cut.

use std::path::Path;

use journal_format::manifest::LiveSegment;
use journal_format::recovery::{DataState, see_data};
use journal_format::segment::{DATA_ENTRY_BYTES, MetaEntry, PAGE_BYTES, Place, SegmentKind, next_entry};

use super::open::Opener;
use super::scan::Unproven;
use super::segment_path;
use super::tail::Tail;
use crate::damage::DamageKind;
use crate::error::StoreError;
use crate::files::{self, Header};
use crate::io::{Access, File};
use crate::segment::SegmentIndex;

/// The active segment: its index, and the ends of its data and metadata files if it may be written.
pub(super) type Active = (SegmentIndex, Option<(Tail, Tail)>);

impl Opener<'_> {
    /// Recovers the active segment. `None` if nothing of it can be used.
    pub(super) fn open_active(&mut self, live: &LiveSegment) -> Result<Option<Active>, StoreError> {
        let access = if self.writable { Access::ReadWrite } else { Access::Read };
        let open = |kind| {
            let path = segment_path(&self.dir, kind, live.segment);
            let file = self.env.storage.open(&path, access).map_err(StoreError::io("open", &path))?;
            let header = files::check_header(&*file, &path, kind, self.disk, live.segment)?;
            Ok::<_, StoreError>((file, path, header))
        };
        let (data, data_path, data_header) = open(SegmentKind::Data)?;
        let (meta, meta_path, meta_header) = open(SegmentKind::Meta)?;
        for (path, header) in [(&data_path, data_header), (&meta_path, meta_header)] {
            // Headers were durable before the manifest named the files.
            let damage = |kind, detail| self.damage((path, 0), live.first_lsn, kind, detail);
            match header {
                Header::Good => {}
                Header::Rotten(detail) => self.state.noted.push(damage(DamageKind::Header, detail)),
                Header::Wrong(detail) => {
                    self.state.damage = Some(damage(DamageKind::Foreign, detail));
                    return Ok(None);
                }
            }
        }
        let bytes = files::read_all(&*meta, &meta_path)?;
        let mut see = |entry: Option<&MetaEntry<'_>>, data_end: u64| {
            self.see(&*data, &data_path, live, entry, data_end)
        };
        let found = self.source(live, None, &bytes).scan(&mut see)?;
        let unproven = found.unproven.clone();
        let tails = (
            self.env.data_tail(data, data_path, found.data_end),
            self.env.meta_tail(meta, meta_path.clone(), found.meta_end),
        );
        self.state.stats.stored_data_bytes += tails.0.file_bytes();
        self.state.stats.stored_meta_bytes += tails.1.file_bytes();
        if unproven.is_empty()
            && found.damage.is_none()
            && let Some((offset, detail)) = rot_behind(&tails.0)?
        {
            let place = (&*tails.0.path, offset);
            self.state.noted.push(self.damage(place, live.first_lsn, DamageKind::Unused, detail));
        }
        let Some(index) = self.take_scanned(live, &meta_path, found) else { return Ok(None) };
        let usable = self.writable && self.state.damage.is_none();
        if usable {
            self.write_again(live, &bytes, &unproven, &tails)?;
            settle(&tails.0, unproven.is_empty())?;
            settle(&tails.1, unproven.is_empty())?;
        }
        Ok(Some((SegmentIndex::Live(index), usable.then_some(tails))))
    }

    /// Writes the entries again of which it is not known that they were durable, with the same bytes. After a failed
    /// durability step the system may hold bytes that no disk has and that it takes for clean: another step alone would
    /// pass them over and succeed. The unused bytes before them, which a power cut may have left as anything, become zero.
    fn write_again(
        &self,
        live: &LiveSegment,
        meta: &[u8],
        unproven: &[Unproven],
        (data_tail, meta_tail): &(Tail, Tail),
    ) -> Result<(), StoreError> {
        let changed = |tail: &Tail| {
            let error = std::io::Error::other("two reads gave different bytes; open the disk again");
            StoreError::io("read", &tail.path)(error)
        };
        for Unproven { meta_from, meta_at, data_from } in unproven {
            let place = Place { disk: self.disk, segment: live.segment, position: *meta_at };
            let rest = usize::try_from(*meta_at).ok().and_then(|at| meta.get(at..)).unwrap_or(&[]);
            let entry = MetaEntry::parse(rest, &place).map_err(|_| changed(meta_tail))?;
            if let Some(at) = entry.header.data {
                let length = DATA_ENTRY_BYTES.saturating_add(entry.header.data_bytes as usize);
                let bytes = files::read_some(&*data_tail.file, &data_tail.path, at.position, length)?;
                let place = Place { position: at.position, ..place };
                if see_data(&bytes, &place, Some(&entry)) != DataState::Valid {
                    return Err(changed(data_tail));
                }
                write_behind_zeroes(data_tail, *data_from, at.position, &bytes)?;
            }
            let bytes = rest.get(..entry.header.entry_bytes() as usize).unwrap_or(rest);
            write_behind_zeroes(meta_tail, *meta_from, *meta_at, bytes)?;
        }
        Ok(())
    }

    /// Looks at the data of an entry of the active segment.
    fn see(
        &self,
        data: &dyn File,
        path: &Path,
        live: &LiveSegment,
        entry: Option<&MetaEntry<'_>>,
        data_end: u64,
    ) -> Result<DataState, StoreError> {
        let Some(entry) = entry else {
            let bytes = files::read_some(data, path, next_entry(data_end), DATA_ENTRY_BYTES)?;
            return Ok(if bytes.iter().all(|byte| *byte == 0) { DataState::Absent } else { DataState::Torn });
        };
        let Some(at) = entry.header.data else { return Ok(DataState::Valid) };
        if at.segment != live.segment {
            return Ok(DataState::Torn);
        }
        let length = DATA_ENTRY_BYTES.saturating_add(entry.header.data_bytes as usize);
        let bytes = files::read_some(data, path, at.position, length)?;
        let place = Place { disk: self.disk, segment: at.segment, position: at.position };
        Ok(see_data(&bytes, &place, Some(entry)))
    }
}

/// Writes `bytes` at `position`, and zeroes from `from` up to there.
fn write_behind_zeroes(tail: &Tail, from: u64, position: u64, bytes: &[u8]) -> Result<(), StoreError> {
    // Less than a page: that is how far entries are apart.
    let gap = position.checked_sub(from).filter(|gap| *gap < PAGE_BYTES).unwrap_or(0);
    let all = [&vec![0; gap as usize], bytes].concat();
    tail.file.write_at(&all, position - gap).map_err(StoreError::io("write", &tail.path))
}

/// The bytes between the end of the last entry and the end of the file as it should be: zeroes, as far as the file has them.
fn padding(tail: &Tail) -> Result<Vec<u8>, StoreError> {
    let length = tail.file_bytes().saturating_sub(tail.end());
    files::read_some(&*tail.file, &tail.path, tail.end(), usize::try_from(length).unwrap_or_default())
}

/// Whether there is something in the padding behind entries all of which are known to have been durable, and so the padding too, which
/// was written with the last of them; where, and what to say.
fn rot_behind(tail: &Tail) -> Result<Option<(u64, &'static str)>, StoreError> {
    let at = padding(tail)?.iter().position(|byte| *byte != 0);
    Ok(at.map(|at| (tail.end().saturating_add(at as u64), "bytes behind the last entry are not zero")))
}

/// Gives a file the length that it should have, with zeroes behind the last entry, and makes it durable as it is, unless it is so and
/// `proven` to be durable. The cut is never in the middle of a padded page: a power cut could leave anything in the rest.
fn settle(tail: &Tail, proven: bool) -> Result<(), StoreError> {
    let length = tail.file.len().map_err(StoreError::io("read the length of", &tail.path))?;
    let padding = padding(tail)?;
    let (fits, blank) = (length == tail.file_bytes(), padding.iter().all(|byte| *byte == 0));
    if fits && blank && proven {
        return Ok(());
    }
    if !fits {
        tail.file.set_len(tail.file_bytes()).map_err(StoreError::io("cut", &tail.path))?;
    }
    if !blank {
        let zeroes = vec![0; padding.len()];
        tail.file.write_at(&zeroes, tail.end()).map_err(StoreError::io("write", &tail.path))?;
    }
    tail.file.sync().map_err(StoreError::io("sync", &tail.path))
}
