//! A block device: it holds something else before, so zeroes are written too.

use std::fs::File;
use std::io;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use super::Output;
use super::direct::DirectFile;
use super::raw::sync_and_forget;
use crate::buffer::Buffer;
use crate::limits::BLOCK_BYTES;

/// A block device, opened for reading and writing.
pub(crate) struct Device {
    file: DirectFile,
}

impl Device {
    pub(crate) fn new(file: File) -> Self {
        Self { file: DirectFile::new(file) }
    }

    fn write_zeroes(&self, mut offset: u64, mut length: u64) -> io::Result<()> {
        let mut zeroes = Buffer::default();
        zeroes.grow(length.min(BLOCK_BYTES) as usize);
        while length > 0 {
            let part = length.min(zeroes.len() as u64);
            self.file.write(offset, &zeroes[..part as usize])?;
            offset += part;
            length -= part;
        }
        Ok(())
    }
}

impl Output for Device {
    fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write(offset, data)
    }

    /// Of these the kernel promises that the range reads as zeroes afterwards: unmapping where the device supports it
    /// so, else its write-zeroes command, else zeroes over the wire (which is also for ranges that are not aligned).
    fn zero(&mut self, offset: u64, length: u64) -> io::Result<()> {
        let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
        for how in [FallocateFlags::FALLOC_FL_PUNCH_HOLE, FallocateFlags::FALLOC_FL_ZERO_RANGE] {
            match fallocate(&self.file.file, how | keep, offset.cast_signed(), length.cast_signed()) {
                Ok(()) => return Ok(()),
                Err(Errno::EOPNOTSUPP | Errno::EINVAL | Errno::ENODEV | Errno::ENOSYS) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        self.write_zeroes(offset, length)
    }

    fn sync(&mut self) -> io::Result<()> {
        sync_and_forget(&self.file.file)
    }

    fn next_stored(&mut self, from: u64, _end: u64) -> io::Result<u64> {
        Ok(from)
    }

    fn read(&mut self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read(offset, into)
    }
}
