//! Memory for direct I/O.

use std::ops::{Deref, DerefMut};

/// What memory, offsets and lengths of direct I/O are multiples of, in bytes: a page, which is also the largest sector of
/// common disks.
pub(crate) const ALIGN_BYTES: usize = 4096;

/// Bytes that begin at a multiple of [`ALIGN_BYTES`] of memory; at first there are none.
#[derive(Default)]
pub(crate) struct Buffer {
    memory: Vec<u8>,
    /// Bytes of `memory` before the first aligned one.
    skipped: usize,
}

impl Buffer {
    /// Makes room for so many bytes at least. What it held is gone then.
    pub(crate) fn grow(&mut self, bytes: usize) {
        if self.len() < bytes {
            // Both are not needed at once.
            self.memory = Vec::new();
            self.memory = vec![0; bytes + ALIGN_BYTES];
            self.skipped = self.memory.as_ptr().align_offset(ALIGN_BYTES).min(ALIGN_BYTES);
        }
    }

    fn end(&self) -> usize {
        // As many bytes as were asked for, wherever they begin.
        self.memory.len().saturating_sub(ALIGN_BYTES - self.skipped).max(self.skipped)
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.skipped..self.end()]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        let end = self.end();
        &mut self.memory[self.skipped..end]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_as_large_as_asked_for_and_aligned() {
        let mut buffer = Buffer::default();
        assert!(buffer.is_empty());
        for bytes in [1, 4096, 70_000, 5 << 20] {
            buffer.grow(bytes);
            assert_eq!((buffer.len(), buffer.as_ptr().align_offset(ALIGN_BYTES)), (bytes, 0));
            buffer.fill(7);
        }
        buffer.grow(3);
        assert_eq!((buffer.len(), buffer[9]), (5 << 20, 7), "it is large enough already");
    }
}
