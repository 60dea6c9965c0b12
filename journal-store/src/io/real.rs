//! The operating system's files.

use std::fs;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use super::{Access, Bytes, File, Lock, Storage, Way, are_pages, map};

/// Files on the local file system.
#[derive(Clone, Copy, Default, Debug)]
pub struct RealStorage;

#[derive(Debug)]
struct RealFile {
    file: fs::File,
    path: PathBuf,
    /// The same file once more, to write it past the page cache; opened when it is first wanted.
    direct: OnceLock<fs::File>,
    /// Whether the file system does not offer that, or a write past the page cache was refused, for its alignment most likely: nothing
    /// is asked twice.
    refused: AtomicBool,
}

impl RealFile {
    fn shared(file: fs::File, path: &Path) -> Arc<dyn File> {
        let (direct, refused) = (OnceLock::new(), AtomicBool::new(false));
        Arc::new(Self { file, path: path.to_owned(), direct, refused })
    }

    /// The descriptor that goes past the page cache, as long as it may be used.
    fn direct(&self) -> Option<&fs::File> {
        // ORDERING: nothing is published by it; who sees it late asks once more and is refused again.
        if self.refused.load(Ordering::Relaxed) {
            return None;
        }
        if self.direct.get().is_none() {
            match self.open_direct() {
                Ok(direct) => drop(self.direct.set(direct)),
                // ORDERING: see the load.
                Err(error) if says_never(error.kind()) => self.refused.store(true, Ordering::Relaxed),
                // Too many open files, say, or another file of that name: that passes.
                Err(_) => {}
            }
        }
        self.direct.get()
    }

    fn open_direct(&self) -> io::Result<fs::File> {
        let again = fs::File::options().write(true).custom_flags(libc::O_DIRECT).open(&self.path)?;
        // Whoever moves files about while the server runs must not have another one written.
        let (one, other) = (self.file.metadata()?, again.metadata()?);
        if (one.dev(), one.ino()) == (other.dev(), other.ino()) {
            Ok(again)
        } else {
            Err(io::ErrorKind::NotFound.into())
        }
    }
}

/// Whether an error in opening a file says that its file system takes no direct I/O: `EINVAL`, on some `EOPNOTSUPP`.
fn says_never(kind: io::ErrorKind) -> bool {
    matches!(kind, io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported)
}

#[derive(Debug)]
struct RealLock(#[expect(dead_code, reason = "holds the lock as long as it is open")] fs::File);

impl Lock for RealLock {}

impl File for RealFile {
    fn read_at(&self, buf: &mut [u8], position: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, position)
    }

    fn write_at(&self, bytes: &[u8], position: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, position)
    }

    fn write_pages(&self, pages: &[u8], position: u64) -> io::Result<Way> {
        if are_pages(pages, position)
            && let Some(direct) = self.direct()
        {
            match direct.write_all_at(pages, position) {
                // The same bytes again, where some of them may be already.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                    // ORDERING: see the load.
                    self.refused.store(true, Ordering::Relaxed);
                }
                written => return written.map(|()| Way::Direct),
            }
        }
        self.write_at(pages, position).map(|()| Way::Cached)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.file.set_len(length)
    }
}

/// Whether a folder cannot be made durable because it is no place where we could have made anything.
fn is_not_ours(kind: io::ErrorKind) -> bool {
    use io::ErrorKind::{InvalidInput, PermissionDenied, ReadOnlyFilesystem};
    matches!(kind, PermissionDenied | ReadOnlyFilesystem | InvalidInput)
}

/// Makes the name of a folder durable.
fn sync_parent(dir: &Path) -> io::Result<()> {
    let parent = dir.parent().filter(|parent| *parent != Path::new(""));
    match (parent, dir.has_root()) {
        (Some(parent), _) => fs::File::open(parent)?.sync_all(),
        (None, false) => fs::File::open(".")?.sync_all(),
        // The root of the file system has no name.
        (None, true) => Ok(()),
    }
}

impl Storage for RealStorage {
    fn create(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        let file = fs::File::options().read(true).write(true).create(true).truncate(true).open(path)?;
        Ok(RealFile::shared(file, path))
    }

    fn open(&self, path: &Path, access: Access) -> io::Result<Arc<dyn File>> {
        let file = fs::File::options().read(true).write(access == Access::ReadWrite).open(path)?;
        Ok(RealFile::shared(file, path))
    }

    fn load(&self, path: &Path) -> io::Result<Bytes> {
        map::map(&fs::File::open(path)?)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(dir)? {
            // A name that is not UTF-8 is none of the store's.
            names.extend(entry?.file_name().into_string());
        }
        names.sort_unstable();
        Ok(names)
    }

    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        let missing: Vec<&Path> =
            dir.ancestors().take_while(|dir| !dir.is_dir() && *dir != Path::new("")).collect();
        if missing.is_empty() {
            // Whoever made it may have died before its name was durable. The folder above may be none of ours.
            return match sync_parent(dir) {
                Err(error) if is_not_ours(error.kind()) => Ok(()),
                done => done,
            };
        }
        for dir in missing.into_iter().rev() {
            match fs::create_dir(dir) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => sync_parent(dir)?,
            }
        }
        Ok(())
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        fs::File::open(dir)?.sync_all()
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn Lock>> {
        let file = fs::File::options().read(true).write(true).create(true).truncate(false).open(path)?;
        match file.try_lock() {
            Ok(()) => Ok(Box::new(RealLock(file))),
            Err(fs::TryLockError::WouldBlock) => Err(io::ErrorKind::WouldBlock.into()),
            Err(fs::TryLockError::Error(error)) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Eight pages of memory among which one begins where a page does, and where that is.
    fn pages() -> (Vec<u8>, usize) {
        // No digits, wherever the page begins: a file below reads numbers.
        let bytes: Vec<u8> = (0..8 * 4096_u32).map(|at| (at / 7) as u8 | 0x80).collect();
        let begin = bytes.as_ptr().align_offset(4096);
        (bytes, begin)
    }

    fn written(file: &dyn File) -> Vec<u8> {
        let mut bytes = vec![0; file.len().unwrap() as usize];
        file.read_at(&mut bytes, 0).unwrap();
        bytes
    }

    /// A file with a header page and two pages behind it; which way these went.
    fn write(file: &dyn File) -> Way {
        let (memory, begin) = pages();
        file.write_at(&[9; 4096], 0).unwrap();
        file.sync().unwrap();
        let ways = [4096, 8192].map(|position| {
            let way = file.write_pages(&memory[begin..begin + 4096], position).unwrap();
            file.sync().unwrap();
            way
        });
        let page = &memory[begin..begin + 4096];
        assert!(written(file) == [&[9; 4096], page, page].concat());
        assert_eq!(ways[0], ways[1], "it is decided once");
        ways[0]
    }

    #[test]
    fn pages_are_read_as_they_were_written_past_the_cache_or_through_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let file = RealStorage.create(&path).unwrap();
        let offered = fs::File::options().write(true).custom_flags(libc::O_DIRECT).open(&path).is_ok();
        let way = write(&*file);
        // A device whose sectors are larger than a page refuses the write itself.
        assert!(way == Way::Cached || offered);
        let (memory, begin) = pages();
        // What is no page goes through the cache.
        assert_eq!(file.write_pages(&memory[begin + 1..begin + 4097], 12288).unwrap(), Way::Cached);
        assert_eq!(file.write_pages(&memory[begin..begin + 100], 16384).unwrap(), Way::Cached);
        assert!(
            written(&*file)[12288..]
                == [&memory[begin + 1..begin + 4097], &memory[begin..begin + 100]].concat()
        );
    }

    fn file_with(direct: Option<fs::File>, path: &Path) -> RealFile {
        let file = fs::File::options().read(true).write(true).create_new(true).open(path).unwrap();
        let refused = AtomicBool::new(direct.is_none());
        let direct = direct.map_or_else(OnceLock::new, OnceLock::from);
        RealFile { file, path: path.to_owned(), direct, refused }
    }

    #[test]
    fn a_file_system_that_does_not_offer_it_or_refuses_it_is_written_through_the_cache() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(write(&file_with(None, &folder.path().join("not offered"))), Way::Cached);
        // A file that takes no such write, as a device with larger sectors takes none: EINVAL, and nothing changes.
        let refuses = fs::File::options().write(true).open("/proc/self/oom_score_adj").unwrap();
        let file = file_with(Some(refuses), &folder.path().join("refused"));
        assert_eq!(write(&file), Way::Cached);
        assert!(file.direct().is_none(), "nothing is asked twice");
    }

    #[test]
    fn a_file_that_took_the_place_of_another_is_not_written() {
        let folder = tempfile::tempdir().unwrap();
        let (path, other) = (folder.path().join("file"), folder.path().join("other"));
        let file = RealStorage.create(&path).unwrap();
        fs::rename(&path, &other).unwrap();
        fs::write(&path, "somebody else's").unwrap();
        assert_eq!(write(&*file), Way::Cached);
        assert_eq!(fs::read(&path).unwrap(), b"somebody else's");
        // What passes is not remembered: with its name back it is written as any other file.
        fs::rename(&other, &path).unwrap();
        let fresh = RealStorage.create(&folder.path().join("fresh")).unwrap();
        assert_eq!(write(&*file), write(&*fresh));
    }
}
