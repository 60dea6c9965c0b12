//! A qcow2 image in a new file, written by the `imago` library (its synchronous form).

use std::fs;
use std::io;

use imago::file::File;
use imago::format::PreallocateMode;
use imago::qcow2::Qcow2;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, Mapping};

use super::Output;
use super::raw::sync_and_forget;
use crate::limits::QCOW2_SECTOR_BYTES;

/// A qcow2 image in a file that was empty before.
pub(crate) struct Qcow2File {
    image: FormatAccess<File>,
    file: fs::File,
}

impl Qcow2File {
    /// Formats the new, empty `file`. A size that is no multiple of 512 is rounded up to one.
    pub(crate) fn create(file: fs::File, disk_bytes: u64) -> io::Result<Self> {
        let storage = File::try_from(file.try_clone()?)?;
        let image = Qcow2::<File>::create_builder(storage)
            .size(disk_bytes.next_multiple_of(QCOW2_SECTOR_BYTES))
            .preallocate(PreallocateMode::None)
            .create_open(DenyImplicitOpenGate::default(), |image| Ok(Qcow2::builder(image).backing(None)))?;
        Ok(Self { image: FormatAccess::new(image), file })
    }
}

impl Output for Qcow2File {
    fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.image.write(data, offset)
    }

    fn zero(&mut self, _offset: u64, _length: u64) -> io::Result<()> {
        // Each range is written at most once, and what was never written reads as zeroes.
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        self.image.flush()?;
        self.image.sync()?;
        sync_and_forget(&self.file)
    }

    fn next_stored(&mut self, from: u64, end: u64) -> io::Result<u64> {
        let mut at = from;
        while at < end {
            match self.image.get_mapping(at, end - at)? {
                (Mapping::Zero { .. }, length) if length > 0 => at += length,
                _ => break,
            }
        }
        Ok(at.min(end))
    }

    fn read(&mut self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.image.read(into, offset)
    }
}
