//! Names of a disk's files, and replacing one as a whole.

use std::path::{Path, PathBuf};

use journal_format::segment::{SEGMENT_HEADER_PAGE_BYTES, SegmentKind, SegmentMeta};
use journal_format::{DiskId, SegmentNumber};

use crate::error::StoreError;
use crate::io::{File, Storage};

/// The manifest's name.
pub(crate) const MANIFEST: &str = "manifest";
/// The bookmarks' name.
pub(crate) const BOOKMARKS: &str = "bookmarks";
/// Behind the name of a file that is being written and will be renamed.
const TEMPORARY: &str = ".tmp";

/// The folder that holds the disks' folders.
pub(crate) fn disks_dir(root: &Path) -> PathBuf {
    root.join("disks")
}

/// The folder of a disk.
pub(crate) fn disk_dir(root: &Path, disk: DiskId) -> PathBuf {
    disks_dir(root).join(disk.to_string())
}

/// The name of a segment's file.
pub(crate) fn segment_file(kind: SegmentKind, segment: SegmentNumber) -> String {
    match kind {
        SegmentKind::Data => format!("data-{segment:06}.seg", segment = segment.0),
        SegmentKind::Meta => format!("meta-{segment:06}.seg", segment = segment.0),
        SegmentKind::Index => format!("index-{segment:06}.idx", segment = segment.0),
    }
}

/// What a file of the store's own naming is; `None` for other files, which the store leaves alone.
pub(crate) fn parse_name(name: &str) -> Option<OwnFile> {
    if name
        .strip_suffix(TEMPORARY)
        .is_some_and(|base| matches!(base, MANIFEST | BOOKMARKS) || parse_segment(base).is_some())
    {
        return Some(OwnFile::Temporary);
    }
    parse_segment(name).map(|(kind, segment)| OwnFile::Segment(kind, segment))
}

fn parse_segment(name: &str) -> Option<(SegmentKind, SegmentNumber)> {
    let (stem, extension) = name.split_once('.')?;
    let (kind, number) = stem.split_once('-')?;
    let kind = match (kind, extension) {
        ("data", "seg") => SegmentKind::Data,
        ("meta", "seg") => SegmentKind::Meta,
        ("index", "idx") => SegmentKind::Index,
        _ => return None,
    };
    let segment = SegmentNumber(number.parse().ok()?);
    (segment_file(kind, segment) == name).then_some((kind, segment))
}

/// A file of the store's own naming.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum OwnFile {
    /// One that was being written when the process ended.
    Temporary,
    /// A segment's.
    Segment(SegmentKind, SegmentNumber),
}

/// Replaces (or makes) a file: after a crash it holds either the old bytes or the new ones.
pub(crate) fn replace(storage: &dyn Storage, dir: &Path, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
    let (path, temporary) = (dir.join(name), dir.join(format!("{name}{TEMPORARY}")));
    let file = storage.create(&temporary).map_err(StoreError::io("create", &temporary))?;
    file.write_at(bytes, 0).map_err(StoreError::io("write", &temporary))?;
    file.sync().map_err(StoreError::io("sync", &temporary))?;
    storage.rename(&temporary, &path).map_err(StoreError::io("replace", &path))?;
    storage.sync_dir(dir).map_err(StoreError::io("sync", dir))
}

/// Reads a whole small file.
pub(crate) fn read_all(file: &dyn File, path: &Path) -> Result<Vec<u8>, StoreError> {
    let length = file.len().map_err(StoreError::io("read the length of", path))?;
    let length = usize::try_from(length).map_err(|_| std::io::ErrorKind::FileTooLarge.into());
    let mut bytes = vec![0; length.map_err(StoreError::io("read", path))?];
    file.read_at(&mut bytes, 0).map_err(StoreError::io("read", path))?;
    Ok(bytes)
}

/// Reads `length` bytes from `position` on, fewer at the end of the file.
pub(crate) fn read_some(
    file: &dyn File,
    path: &Path,
    position: u64,
    length: usize,
) -> Result<Vec<u8>, StoreError> {
    let file_bytes = file.len().map_err(StoreError::io("read the length of", path))?;
    let there = usize::try_from(file_bytes.saturating_sub(position)).unwrap_or(usize::MAX);
    let mut bytes = vec![0; length.min(there)];
    if bytes.is_empty() {
        return Ok(bytes);
    }
    file.read_at(&mut bytes, position).map_err(StoreError::io("read", path))?;
    Ok(bytes)
}

/// Checks that a segment's file is the one that its name says; the error says what is wrong.
pub(crate) fn check_header(
    file: &dyn File,
    path: &Path,
    kind: SegmentKind,
    disk: DiskId,
    segment: SegmentNumber,
) -> Result<Result<SegmentMeta, journal_format::FormatError>, StoreError> {
    let page = read_some(file, path, 0, SEGMENT_HEADER_PAGE_BYTES)?;
    Ok(SegmentMeta::parse(&page).and_then(|meta| meta.expect(kind, disk, segment).map(|()| meta)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_own_names_are_recognised() {
        let own = |kind, n| Some(OwnFile::Segment(kind, SegmentNumber(n)));
        assert_eq!(parse_name("data-000001.seg"), own(SegmentKind::Data, 1));
        assert_eq!(parse_name("index-1234567.idx"), own(SegmentKind::Index, 1_234_567));
        assert_eq!(parse_name("manifest.tmp"), Some(OwnFile::Temporary));
        for other in
            ["manifest", "name.json", "name.json.tmp", "data-1.seg", "meta-000001.idx", "data-+00001.seg"]
        {
            assert_eq!(parse_name(other), None, "{other}");
        }
    }
}
