//! Names of a disk's files, and replacing one as a whole.

use std::path::{Path, PathBuf};

use journal_format::segment::{SEGMENT_HEADER_PAGE_BYTES, SegmentKind, SegmentMeta};
use journal_format::{DiskId, FormatErrorKind, SegmentNumber};

use crate::error::StoreError;
use crate::io::{Access, File, Storage};

/// The manifest's name.
pub(crate) const MANIFEST: &str = "manifest";
/// The bookmarks' name.
pub(crate) const BOOKMARKS: &str = "bookmarks";
/// The durable mark's name.
pub(crate) const DURABLE: &str = "durable";
/// Behind the name of a file that has a copy.
const COPY: &str = ".copy";
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
    if name.strip_suffix(TEMPORARY).is_some_and(|base| is_small_file(base) || parse_segment(base).is_some()) {
        return Some(OwnFile::Temporary);
    }
    parse_segment(name).map(|(kind, segment)| OwnFile::Segment(kind, segment))
}

fn is_small_file(name: &str) -> bool {
    let base = name.strip_suffix(COPY).unwrap_or(name);
    matches!(base, MANIFEST | BOOKMARKS)
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

/// The name of a small file's copy.
pub(crate) fn copy_of(name: &str) -> String {
    format!("{name}{COPY}")
}

fn write_temporary(storage: &dyn Storage, dir: &Path, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
    let temporary = dir.join(format!("{name}{TEMPORARY}"));
    let file = storage.create(&temporary).map_err(StoreError::io("create", &temporary))?;
    file.write_at(bytes, 0).map_err(StoreError::io("write", &temporary))?;
    file.sync().map_err(StoreError::io("sync", &temporary))
}

fn rename_temporary(storage: &dyn Storage, dir: &Path, name: &str) -> Result<(), StoreError> {
    let (path, temporary) = (dir.join(name), dir.join(format!("{name}{TEMPORARY}")));
    storage.rename(&temporary, &path).map_err(StoreError::io("replace", &path))
}

/// Replaces (or makes) a file: after a crash it holds either the old bytes or the new ones. Which of them is certain only
/// after the folder has been made durable.
pub(crate) fn put(storage: &dyn Storage, dir: &Path, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
    write_temporary(storage, dir, name, bytes)?;
    rename_temporary(storage, dir, name)
}

/// Replaces (or makes) a small file and its copy. Certain only after the folder has been made durable, as with [`put`].
pub(crate) fn replace(storage: &dyn Storage, dir: &Path, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
    let copy = copy_of(name);
    write_temporary(storage, dir, &copy, bytes)?;
    write_temporary(storage, dir, name, bytes)?;
    rename_temporary(storage, dir, &copy)?;
    rename_temporary(storage, dir, name)
}

/// Makes the names in a folder durable.
pub(crate) fn sync_dir(storage: &dyn Storage, dir: &Path) -> Result<(), StoreError> {
    storage.sync_dir(dir).map_err(StoreError::io("sync", dir))
}

/// A small file that has a copy, as it was found.
#[derive(Debug)]
pub(crate) struct Pair<T> {
    /// What it says; of two that say different things, the file's own.
    pub(crate) value: T,
    /// Whether that is from the copy, because the file itself cannot be used.
    pub(crate) from_copy: bool,
    /// Which of the two has rotted, if so, and what is wrong with it.
    pub(crate) damage: Option<(PathBuf, String)>,
    /// Whether the two are not the same, because one has rotted or because a crash came between.
    pub(crate) differ: bool,
}

/// Reads a small file, or its copy if it cannot be used. `None` if there is neither; `Err` inside if neither can be used.
pub(crate) fn read_pair<T>(
    storage: &dyn Storage,
    dir: &Path,
    name: &str,
    parse: impl Fn(&[u8]) -> Result<T, String>,
) -> Result<Option<Result<Pair<T>, String>>, StoreError> {
    let paths = [dir.join(name), dir.join(copy_of(name))];
    let [main, copy] = [read_if_there(storage, &paths[0])?, read_if_there(storage, &paths[1])?];
    let differ = main != copy;
    let [path, copy_path] = paths;
    let parsed = |bytes: Option<Vec<u8>>| bytes.map(|bytes| parse(&bytes));
    Ok(match (parsed(main), parsed(copy)) {
        (None, None) => None,
        // A power cut may take one of the first two; one that is there and makes no sense has rotted.
        (Some(Ok(value)), copy) => {
            let damage = copy.and_then(Result::err).map(|detail| (copy_path, detail));
            Some(Ok(Pair { value, from_copy: false, damage, differ }))
        }
        (main, Some(Ok(value))) => {
            let damage = main.and_then(Result::err).map(|detail| (path, detail));
            Some(Ok(Pair { value, from_copy: true, damage, differ }))
        }
        (Some(Err(detail)), _) | (None, Some(Err(detail))) => Some(Err(detail)),
    })
}

fn read_if_there(storage: &dyn Storage, path: &Path) -> Result<Option<Vec<u8>>, StoreError> {
    match storage.open(path, Access::Read) {
        Ok(file) => read_all(&*file, path).map(Some),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(StoreError::io("open", path)(error)),
    }
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

/// What the header page of a segment's file is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Header {
    /// The one that belongs there.
    Good,
    /// Not what was written. Nothing in the file depends on it: entries say themselves where they belong.
    Rotten(String),
    /// A whole header of another file or another version: the file must not be used.
    Wrong(String),
}

/// Checks that a segment's file is the one that its name says.
pub(crate) fn check_header(
    file: &dyn File,
    path: &Path,
    kind: SegmentKind,
    disk: DiskId,
    segment: SegmentNumber,
) -> Result<Header, StoreError> {
    let page = read_some(file, path, 0, SEGMENT_HEADER_PAGE_BYTES)?;
    Ok(match SegmentMeta::parse(&page) {
        Ok(meta) => match meta.expect(kind, disk, segment) {
            Ok(()) => Header::Good,
            Err(error) => Header::Wrong(error.to_string()),
        },
        Err(error) if error.kind() == FormatErrorKind::Version && SegmentMeta::is_whole(&page) => {
            Header::Wrong(error.to_string())
        }
        Err(error) => Header::Rotten(error.to_string()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_own_names_are_recognised() {
        let own = |kind, n| Some(OwnFile::Segment(kind, SegmentNumber(n)));
        assert_eq!(parse_name("data-000001.seg"), own(SegmentKind::Data, 1));
        assert_eq!(parse_name("index-1234567.idx"), own(SegmentKind::Index, 1_234_567));
        for temporary in ["manifest.tmp", "bookmarks.copy.tmp", "index-000001.idx.tmp"] {
            assert_eq!(parse_name(temporary), Some(OwnFile::Temporary), "{temporary}");
        }
        for other in [
            "manifest",
            "manifest.copy",
            "durable",
            "durable.copy.tmp",
            "name.json",
            "name.json.tmp",
            "data-1.seg",
            "meta-000001.idx",
            "data-+00001.seg",
        ] {
            assert_eq!(parse_name(other), None, "{other}");
        }
    }
}
