//! A sealed memfd, mapped: one writer copies bytes in, the kernel sends from it, nobody makes a Rust reference to it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// The mapping, shared by the writer and by sends in flight; unmapped with the last of them.
#[derive(Debug)]
pub struct Memory {
    map: MmapRaw,
    file: File,
}

impl Memory {
    /// Makes a memfd of `bytes` zeroes whose size can never change, and its writer. Where the kernel can do it (5.1),
    /// nobody else can ever write to it, so it may be given to another process to keep.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn create(name: &std::ffi::CStr, bytes: usize) -> io::Result<(Arc<Self>, MemoryWriter)> {
        let fd: OwnedFd = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        let file = File::from(fd);
        file.set_len(bytes as u64)?;
        let map = MmapOptions::new().len(bytes).map_raw(&file)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        let all = seals | SealFlag::F_SEAL_FUTURE_WRITE;
        if fcntl(file.as_fd(), FcntlArg::F_ADD_SEALS(all)).is_err() {
            fcntl(file.as_fd(), FcntlArg::F_ADD_SEALS(seals))?;
        }
        let memory = Arc::new(Self { map, file });
        let writer = MemoryWriter {
            memory: Arc::clone(&memory),
            #[cfg(test)]
            budget: u64::MAX,
        };
        Ok((memory, writer))
    }

    /// Bytes of it.
    #[must_use]
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Never: a mapping of no bytes cannot be made.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.map.len() == 0
    }

    /// The memfd, to read bytes back by system call or to hand on.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// An `iovec` over `[pos, pos + len)`; `None` outside the mapping. It is only a number pair: whoever gives it to
    /// the kernel keeps the `Arc` alive for as long as the kernel may read.
    pub(super) fn iovec(&self, pos: usize, len: usize) -> Option<libc::iovec> {
        let end = pos.checked_add(len)?;
        if end > self.map.len() {
            return None;
        }
        Some(libc::iovec { iov_base: self.map.as_mut_ptr().wrapping_add(pos).cast(), iov_len: len })
    }
}

/// The right to write: there is one per mapping, so two copies never race.
#[derive(Debug)]
pub struct MemoryWriter {
    memory: Arc<Memory>,
    /// Tests: so many more copies and stores, then the process "dies".
    #[cfg(test)]
    budget: u64,
}

/// What a test's [`MemoryWriter`] panics with when its budget is used up.
#[cfg(test)]
pub const DIED: &str = "died here for a test";

impl MemoryWriter {
    /// Dies before its copy or store of that number.
    #[cfg(test)]
    pub fn die_after(&mut self, count: u64) {
        self.budget = count;
    }

    fn spend(&mut self) {
        #[cfg(test)]
        match self.budget.checked_sub(1) {
            Some(left) => self.budget = left,
            None => std::panic::panic_any(DIED),
        }
    }

    /// Copies `bytes` to `pos`.
    ///
    /// # Panics
    /// When they do not fit: positions come from the outbox, never from outside.
    pub fn copy_in(&mut self, pos: usize, bytes: &[u8]) {
        self.spend();
        let end = pos.checked_add(bytes.len());
        assert!(end.is_some_and(|end| end <= self.memory.len()), "a copy ends outside the mapping");
        let to = self.memory.map.as_mut_ptr().wrapping_add(pos);
        // SAFETY: the assertion keeps `[to, to + len)` inside the live mapping; `bytes` is a Rust slice, which never
        // lies in it because nobody makes references into it; `&mut self` is the mapping's only writer. The kernel
        // may read these bytes meanwhile for a send, which is no access of this program's memory model.
        unsafe { core::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }

    /// Stores a word at `pos`, after everything that was copied in before: in this order it survives the process.
    ///
    /// # Panics
    /// When the place is not aligned or does not fit: places are constants of the outbox.
    pub fn store(&mut self, pos: usize, value: u64) {
        self.spend();
        let end = pos.checked_add(size_of::<u64>());
        let fits =
            end.is_some_and(|end| end <= self.memory.len()) && pos.is_multiple_of(align_of::<AtomicU64>());
        assert!(fits, "a word lies outside the mapping or across its alignment");
        let word = self.memory.map.as_mut_ptr().wrapping_add(pos).cast::<AtomicU64>();
        // SAFETY: the assertion keeps the word inside the live mapping, which begins on a page, and aligned; any bits
        // are an `AtomicU64`, and only this writer touches them.
        let word = unsafe { &*word };
        // ORDERING: Release: whoever adopts this memory after our death finds what was written before.
        word.store(value.to_le(), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn memory_holds_what_was_copied_in_and_cannot_be_resized() {
        let (memory, mut writer) = Memory::create(c"test", 8192).unwrap();
        writer.copy_in(5000, b"hello");
        let mut back = [0; 5];
        memory.file().read_exact_at(&mut back, 5000).unwrap();
        assert_eq!(&back, b"hello");
        writer.store(8, 0x0102);
        memory.file().read_exact_at(&mut back, 8).unwrap();
        assert_eq!(back, [2, 1, 0, 0, 0]);
        assert!(memory.file().set_len(4096).is_err());
        assert!(memory.file().write_at(b"x", 0).is_err(), "sealed against everybody else");
        assert!(memory.iovec(8000, 192).is_some());
        assert!(memory.iovec(8000, 193).is_none());
        assert!(memory.iovec(usize::MAX, 2).is_none());
    }

    #[test]
    #[should_panic(expected = "outside the mapping")]
    fn copy_outside_the_mapping_is_stopped() {
        let (_memory, mut writer) = Memory::create(c"test", 4096).unwrap();
        writer.copy_in(4090, &[0; 7]);
    }
}
