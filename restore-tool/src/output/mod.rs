//! Where a restore goes: a raw file, a qcow2 file, a block device.

mod device;
mod direct;
mod qcow2;
mod raw;

use std::io;

pub(crate) use self::device::Device;
pub(crate) use self::qcow2::Qcow2File;
pub(crate) use self::raw::RawFile;

/// An image that is being written. Offsets and lengths are bytes of the disk.
pub(crate) trait Output {
    /// Writes `data` at `offset`.
    ///
    /// # Errors
    /// What the system says; the target is then in an unknown state and must not be used.
    fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Makes a range read as zeroes, taking no space where the target can do that.
    ///
    /// # Errors
    /// As [`Output::write`].
    fn zero(&mut self, offset: u64, length: u64) -> io::Result<()>;

    /// Makes everything written durable, and forgets what is cached of it, so that reading it back asks the disk.
    ///
    /// # Errors
    /// As [`Output::write`].
    fn sync(&mut self) -> io::Result<()>;

    /// The first byte at or after `from` that has to be read to know whether it is zero; everything between is known to
    /// read as zeroes without reading it. `end` (the disk's size) when there is none.
    ///
    /// # Errors
    /// What the system says.
    fn next_stored(&mut self, from: u64, end: u64) -> io::Result<u64>;

    /// Reads back `into.len()` bytes from `offset` on.
    ///
    /// # Errors
    /// What the system says.
    fn read(&mut self, offset: u64, into: &mut [u8]) -> io::Result<()>;
}
