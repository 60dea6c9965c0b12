//! The seam through which all I/O of the store goes, and its implementations.
//!
//! [`RealStorage`] is the operating system's files. [`MemStorage`] keeps everything in memory and can say what a power
//! cut would leave ([`MemStorage::crash`]). [`HookStorage`] wraps another one and asks a [`Hook`] before each call.
//!
//! The contract is that of POSIX, no more: what was written may be lost or torn until [`File::sync`]; a name that was
//! created, renamed or removed may be lost until [`Storage::sync_dir`]; a rename is atomic.

mod hook;
mod map;
mod mem;
mod real;
mod stream;

pub use hook::{Answer, Call, CallKind, Hook, HookStorage};
pub use map::Bytes;
pub use mem::{MemStorage, Tearing};
pub use real::RealStorage;
pub(crate) use stream::copy_around_caches;

use std::fmt::Debug;
use std::io;
use std::path::Path;
use std::sync::Arc;

use journal_format::segment::PAGE_BYTES;

/// An open file. All positions and lengths in bytes.
#[expect(clippy::len_without_is_empty, reason = "nobody asks; and `len` may fail")]
pub trait File: Send + Sync + Debug {
    /// Fills `buf` from `position` on; `UnexpectedEof` when the file ends before.
    ///
    /// # Errors
    /// What the operating system says.
    fn read_at(&self, buf: &mut [u8], position: u64) -> io::Result<()>;

    /// Writes all of `bytes` at `position`; the file grows as needed, skipped bytes are zero.
    ///
    /// # Errors
    /// What the operating system says; any part may have been written.
    fn write_at(&self, bytes: &[u8], position: u64) -> io::Result<()>;

    /// As [`File::write_at`], of whole pages ([`PAGE_BYTES`]) at the begin of one, from memory that begins with one: past the system's
    /// cache where that can be, without leaving a copy there. Which way it went.
    ///
    /// # Errors
    /// As [`File::write_at`].
    fn write_pages(&self, pages: &[u8], position: u64) -> io::Result<Way>;

    /// Makes contents and length durable.
    ///
    /// # Errors
    /// What the operating system says; then nothing that was written since the last success can be trusted.
    fn sync(&self) -> io::Result<()>;

    /// Length of the file.
    ///
    /// # Errors
    /// What the operating system says.
    fn len(&self) -> io::Result<u64>;

    /// Cuts the file, or extends it with zeroes.
    ///
    /// # Errors
    /// What the operating system says.
    fn set_len(&self, length: u64) -> io::Result<()>;
}

/// Which way pages were written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// Past the system's cache.
    Direct,
    /// Through the system's cache: the file system or the device takes it no other way.
    Cached,
}

/// Whether these are whole pages at the begin of one, in memory too.
fn are_pages(pages: &[u8], position: u64) -> bool {
    let page = PAGE_BYTES as usize;
    pages.len().is_multiple_of(page)
        && position.is_multiple_of(PAGE_BYTES)
        && pages.as_ptr().addr().is_multiple_of(page)
}

/// How a file is opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Only to read; never changes anything.
    Read,
    /// To read and write.
    ReadWrite,
}

/// Keeps a lock until it is dropped.
pub trait Lock: Send + Sync + Debug {}

/// Files by path.
pub trait Storage: Send + Sync + Debug {
    /// Makes a new, empty file to read and write; an old one of that name is replaced.
    ///
    /// # Errors
    /// What the operating system says.
    fn create(&self, path: &Path) -> io::Result<Arc<dyn File>>;

    /// Opens an existing file.
    ///
    /// # Errors
    /// `NotFound`, or what the operating system says.
    fn open(&self, path: &Path, access: Access) -> io::Result<Arc<dyn File>>;

    /// The whole contents of a file that is never written again, for reading in place.
    ///
    /// # Errors
    /// `NotFound`, or what the operating system says.
    fn load(&self, path: &Path) -> io::Result<Bytes>;

    /// Gives a file a new name in the same folder, replacing what had that name, atomically.
    ///
    /// # Errors
    /// What the operating system says.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file.
    ///
    /// # Errors
    /// What the operating system says.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Names of the files and folders in a folder, sorted.
    ///
    /// # Errors
    /// `NotFound`, or what the operating system says.
    fn list(&self, dir: &Path) -> io::Result<Vec<String>>;

    /// Makes a folder and those above it, unless they exist. When it returns the folder is durable, whoever made it.
    ///
    /// # Errors
    /// What the operating system says.
    fn create_dir(&self, dir: &Path) -> io::Result<()>;

    /// Makes the names in a folder durable.
    ///
    /// # Errors
    /// What the operating system says.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;

    /// Locks a file, making it if need be, against every other process and every other caller.
    ///
    /// # Errors
    /// `WouldBlock` when somebody else holds it.
    fn lock(&self, path: &Path) -> io::Result<Box<dyn Lock>>;
}
