//! A file that is read and written past the page cache, where the system and the request allow that.
//!
//! An image is larger than what anybody will read of it soon: in the cache it would push out what others need, each of its
//! pages would have to be found and zeroed first, and reading back would tell what the cache holds, not what the disk does.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use nix::errno::Errno;
use nix::fcntl::OFlag;

use crate::buffer::ALIGN_BYTES;

/// A file, and itself once more for direct I/O. A request that cannot be direct goes through the page cache; the kernel
/// keeps the two apart.
pub(super) struct DirectFile {
    pub(super) file: File,
    /// `None` where the file system has no direct I/O.
    direct: Option<File>,
}

impl DirectFile {
    pub(super) fn new(file: File) -> Self {
        // Opened again: a flag that is set on `file` would be set for all who share its description.
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let direct = File::options().read(true).write(true).custom_flags(OFlag::O_DIRECT.bits()).open(path);
        Self { file, direct: direct.ok() }
    }

    /// As `write_all_at` of a file; direct if memory, offset and length are multiples of [`ALIGN_BYTES`].
    pub(super) fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        match self.direct_for(offset, data).map(|direct| direct.write_all_at(data, offset)) {
            Some(done) if !is_refused(&done) => done,
            _ => self.file.write_all_at(data, offset),
        }
    }

    /// As `read_exact_at` of a file; direct as [`DirectFile::write`] is.
    pub(super) fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        match self.direct_for(offset, into).map(|direct| direct.read_exact_at(into, offset)) {
            Some(done) if !is_refused(&done) => done,
            _ => self.file.read_exact_at(into, offset),
        }
    }

    fn direct_for(&self, offset: u64, data: &[u8]) -> Option<&File> {
        let aligned = data.as_ptr().align_offset(ALIGN_BYTES) == 0
            && data.len().is_multiple_of(ALIGN_BYTES)
            && offset.is_multiple_of(ALIGN_BYTES as u64);
        self.direct.as_ref().filter(|_| aligned)
    }
}

/// Whether it was refused because it was direct: some want a larger alignment, some find out only now that they cannot.
fn is_refused(done: &io::Result<()>) -> bool {
    done.as_ref().is_err_and(|error| error.raw_os_error() == Some(Errno::EINVAL as i32))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::Buffer;

    #[test]
    fn what_is_aligned_and_what_is_not_come_back_alike() {
        // Not in the folder for temporary files, which may be in memory.
        let file = DirectFile::new(tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).expect("a file"));
        let mut data = Buffer::default();
        data.grow(3 * ALIGN_BYTES);
        data.iter_mut().enumerate().for_each(|(at, byte)| *byte = (at % 251) as u8);
        for (offset, from, upto) in [
            (0, 0, 3 * ALIGN_BYTES),
            (5, 0, ALIGN_BYTES),
            (ALIGN_BYTES as u64, 1, ALIGN_BYTES + 1),
            (2 * ALIGN_BYTES as u64, 0, ALIGN_BYTES + 7),
            (7 * ALIGN_BYTES as u64, ALIGN_BYTES, 2 * ALIGN_BYTES),
        ] {
            file.write(offset, &data[from..upto]).expect("writes");
            let mut back = Buffer::default();
            back.grow(3 * ALIGN_BYTES);
            let back = &mut back[from..upto];
            file.read(offset, back).expect("reads");
            assert!(*back == data[from..upto], "{from}..{upto} at {offset}");
            let mut cached = vec![0; upto - from];
            file.file.read_exact_at(&mut cached, offset).expect("reads");
            assert!(cached == data[from..upto], "{from}..{upto} at {offset}, through the cache");
        }
    }
}
