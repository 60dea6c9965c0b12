//! A raw image in a new file: what is not written is a hole.

use std::fs::File;
use std::io;

use nix::errno::Errno;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::unistd::{Whence, lseek};

use super::Output;
use super::direct::DirectFile;

/// A raw image in a file that was empty before.
pub(crate) struct RawFile {
    file: DirectFile,
}

impl RawFile {
    /// Sets the new, empty `file` to the disk's size; it then reads as zeroes and takes no space.
    pub(crate) fn create(file: File, disk_bytes: u64) -> io::Result<Self> {
        assert_eq!(file.metadata()?.len(), 0, "an empty file, so that what is not written is a hole");
        file.set_len(disk_bytes)?;
        Ok(Self { file: DirectFile::new(file) })
    }
}

impl Output for RawFile {
    fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write(offset, data)
    }

    fn zero(&mut self, _offset: u64, _length: u64) -> io::Result<()> {
        // Each range is written at most once, so it still is a hole.
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        sync_and_forget(&self.file.file)
    }

    fn next_stored(&mut self, from: u64, end: u64) -> io::Result<u64> {
        match lseek(&self.file.file, from.cast_signed(), Whence::SeekData) {
            Ok(at) => Ok(at.cast_unsigned().min(end)),
            Err(Errno::ENXIO) => Ok(end),
            // A filesystem that knows no holes.
            Err(Errno::EINVAL | Errno::EOPNOTSUPP) => Ok(from),
            Err(errno) => Err(errno.into()),
        }
    }

    fn read(&mut self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read(offset, into)
    }
}

/// Makes a file durable and drops its pages from the cache. Clean pages only can be dropped, hence the order; where the
/// filesystem has no disk below it (tmpfs), reading back reads the same memory.
pub(super) fn sync_and_forget(file: &File) -> io::Result<()> {
    file.sync_all()?;
    posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    Ok(())
}
