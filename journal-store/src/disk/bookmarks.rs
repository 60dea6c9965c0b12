//! Bookmarks: their file, and finding the names of those that it does not have.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use journal_format::bookmarks::Bookmark;
use journal_format::index::IndexFrame;
use journal_format::{DiskId, Lsn, Op};

use super::writer::bookmarks_of;
use super::{DiskStore, Env, State};
use crate::damage::{Damage, DamageKind};
use crate::error::StoreError;
use crate::files;
use crate::segment::Segment;

impl State {
    fn apply_bookmarks(&mut self, bookmarks: Vec<Bookmark>) {
        bookmarks.into_iter().for_each(|bookmark| self.add_bookmark(bookmark));
    }

    /// Adds a bookmark that came as a record. Its frame cannot be refused, so a name that is taken gets its LSN behind it.
    pub(super) fn add_bookmark(&mut self, mut bookmark: Bookmark) {
        const LONGEST: usize = journal_format::limits::MAX_BOOKMARK_BYTES as usize;
        if self
            .bookmarks
            .iter()
            .any(|known| known.lsn == bookmark.lsn && known.name.starts_with(&bookmark.name))
        {
            return;
        }
        bookmark.name.truncate(bookmark.name.floor_char_boundary(LONGEST));
        if self.bookmarks.iter().any(|known| known.name == bookmark.name) {
            let suffix = format!("@{}", bookmark.lsn);
            bookmark.name.truncate(bookmark.name.floor_char_boundary(LONGEST - suffix.len()));
            bookmark.name.push_str(&suffix);
        }
        self.bookmarks.push(bookmark);
    }
}

/// Reads the bookmarks of that disk; the error says what is wrong.
pub(super) fn parse_bookmarks(bytes: &[u8], disk: DiskId) -> Result<Vec<Bookmark>, String> {
    match journal_format::bookmarks::parse(bytes) {
        Ok((owner, bookmarks)) if owner == disk => Ok(bookmarks),
        Ok(_) => Err("it holds another disk's bookmarks".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// Reads the bookmarks. Returns whether the file must be written again, because it or its copy cannot be used.
pub(super) fn read_bookmarks(
    env: &Env,
    disk: DiskId,
    dir: &Path,
    state: &mut State,
) -> Result<bool, StoreError> {
    let lsns = (Lsn::FIRST, Lsn::MAX);
    let damage = |path: &Path, detail| Damage::new(disk, (path, 0), lsns, DamageKind::Bookmarks, detail);
    let parse = |bytes: &[u8]| parse_bookmarks(bytes, disk);
    match files::read_pair(&*env.storage, dir, files::BOOKMARKS, parse)? {
        None => Ok(false),
        Some(Ok(pair)) => {
            state.bookmarks = pair.value;
            state.noted.extend(pair.damage.map(|(path, detail)| damage(&path, detail)));
            Ok(pair.differ)
        }
        Some(Err(detail)) => {
            state.bookmarks_damage = Some(damage(&dir.join(files::BOOKMARKS), detail));
            Ok(false)
        }
    }
}

fn unknown_bookmarks(segment: &Segment, known: &BTreeSet<Lsn>) -> Vec<(journal_format::Record, IndexFrame)> {
    let index = segment.index();
    let tables = index.tables();
    let marks =
        tables.marks().filter(|mark| matches!(mark.op, Op::Bookmark { .. }) && !known.contains(&mark.lsn));
    marks.filter_map(|mark| Some((mark, tables.frame_of(mark.lsn)?))).collect()
}

impl DiskStore {
    /// Adds the bookmarks whose records are durable but which the file does not have, because of a crash in between.
    /// Returns whether there were any.
    pub(super) fn name_bookmarks(&self) -> Result<bool, StoreError> {
        let mut state = self.state().clone();
        let known: BTreeSet<Lsn> = state.bookmarks.iter().map(|bookmark| bookmark.lsn).collect();
        let count = state.bookmarks.len();
        for segment in Arc::clone(&state.segments).iter() {
            for (mark, frame) in unknown_bookmarks(segment, &known) {
                let raw = match self.read_frame_data(&frame) {
                    Ok(raw) => raw,
                    // The name is lost with the frame's data; reading it or verifying says so.
                    Err(StoreError::Damaged { .. }) => continue,
                    Err(error) => return Err(error),
                };
                let named = bookmarks_of(std::iter::once(mark), &raw);
                state.apply_bookmarks(named);
            }
        }
        let found = state.bookmarks.len() > count;
        *self.state_mut() = state;
        Ok(found)
    }
}
