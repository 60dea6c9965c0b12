//! The independent witness: QEMU's `blklogwrites` filter above the protected node logs every request in the format of
//! the Linux kernel's dm-log-writes target (`Documentation/admin-guide/device-mapper/log-writes.rst`). Here that log is
//! parsed and replayed; nothing of this project is involved.
//!
//! ```text
//! sector 0   │ magic, version, number of entries: u64 each; sector size: u32
//! sector 1…  │ entry: sector, sectors, flags, data length: u64 each │ its data, if it is a write
//! ```

use std::fs;
use std::path::Path;

const MAGIC: u64 = 0x006a_7366_7773_6872;
const VERSION: u64 = 1;
const FLAG_FLUSH: u64 = 1;
const FLAG_DISCARD: u64 = 4;

/// One logged request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Logged {
    /// These bytes were written (a write of zeroes has zeroes here).
    Write {
        /// First byte.
        offset: u64,
        /// The bytes.
        data: Vec<u8>,
    },
    /// The range was discarded.
    Discard {
        /// First byte.
        offset: u64,
        /// Length in bytes.
        length: u64,
    },
    /// A flush.
    Flush,
}

/// Reads a log that QEMU has finished (or that is told to update its header with every request).
///
/// # Panics
/// When the file is no such log.
#[must_use]
pub fn read(path: &Path) -> Vec<Logged> {
    let bytes = fs::read(path).expect("the witness's log");
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
    assert_eq!((word(0), word(8)), (MAGIC, VERSION), "{} is no dm-log-writes log", path.display());
    let entries = word(16);
    let sector = u32::from_le_bytes(bytes[24..28].try_into().expect("4 bytes")) as usize;
    let mut at = sector;
    let mut log = Vec::new();
    for _ in 0..entries {
        let (offset, length, flags) = (word(at) * sector as u64, word(at + 8) * sector as u64, word(at + 16));
        at += sector;
        if flags & FLAG_DISCARD != 0 {
            log.push(Logged::Discard { offset, length });
        } else if length > 0 {
            let data = bytes[at..at + length as usize].to_vec();
            at += data.len();
            log.push(Logged::Write { offset, data });
        }
        if flags & FLAG_FLUSH != 0 {
            log.push(Logged::Flush);
        }
    }
    log
}

/// Applies one request to an image. A discarded range reads as zeroes, as the journal defines it.
///
/// # Panics
/// When it lies outside the image.
pub fn apply(image: &mut [u8], request: &Logged) {
    match request {
        Logged::Write { offset, data } => {
            image[*offset as usize..*offset as usize + data.len()].copy_from_slice(data);
        }
        Logged::Discard { offset, length } => image[*offset as usize..(offset + length) as usize].fill(0),
        Logged::Flush => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A log as the kernel's documentation describes it, written by hand.
    #[test]
    fn a_log_is_read_and_replayed() {
        let mut log = vec![0; 512];
        let words = |words: &[u64]| words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<_>>();
        log[..24].copy_from_slice(&words(&[MAGIC, VERSION, 3]));
        log[24..28].copy_from_slice(&512_u32.to_le_bytes());
        for (entry, data) in [([2, 1, 0, 0], vec![7; 512]), ([0, 0, 1, 0], vec![]), ([2, 1, 4, 0], vec![])] {
            let mut sector = words(&entry);
            sector.resize(512, 0);
            log.extend(sector);
            log.extend(data);
        }
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("log");
        fs::write(&path, &log).expect("write");
        let read = read(&path);
        let write = Logged::Write { offset: 1024, data: vec![7; 512] };
        assert_eq!(read, [write, Logged::Flush, Logged::Discard { offset: 1024, length: 512 }]);
        let mut image = vec![0; 2048];
        apply(&mut image, &read[0]);
        assert_eq!((image[1023], image[1024], image[1535], image[1536]), (0, 7, 7, 0));
        apply(&mut image, &read[2]);
        assert_eq!(image, vec![0; 2048]);
    }
}
