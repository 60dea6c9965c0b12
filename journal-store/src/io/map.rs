//! The contents of a file that is never written again: mapped, or in memory.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Deref;

/// Bytes that do not change.
#[derive(Debug)]
pub enum Bytes {
    /// In memory.
    Heap(Vec<u8>),
    /// Mapped from a file, read-only.
    Mapped(memmap2::Mmap),
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Heap(bytes) => bytes,
            Self::Mapped(map) => map,
        }
    }
}

/// Maps a whole file read-only. An empty file cannot be mapped and gives no bytes.
pub(super) fn map(file: &File) -> io::Result<Bytes> {
    if file.metadata()?.len() == 0 {
        return Ok(Bytes::Heap(Vec::new()));
    }
    // SAFETY: `Mmap::map` needs that nobody changes or cuts the file while it is mapped. This crate maps index files
    // only; it writes one completely and makes it durable before the manifest names it, and never opens it for writing
    // again: a new version is another file under the same name (rename), which leaves the mapped one as it is. Somebody
    // who edits the store's files in place can break this, as with any mapped file; the store's folder belongs to the
    // server's user.
    let map = unsafe { memmap2::Mmap::map(file) }?;
    Ok(Bytes::Mapped(map))
}
