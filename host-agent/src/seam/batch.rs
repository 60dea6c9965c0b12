//! What one send hands to the kernel: runs of bytes, from memory of its own or straight from an outbox.

use std::sync::Arc;

use super::memory::Memory;

/// Bytes to send, in order, with everything that keeps them alive.
///
/// The `iovec`s point into `owned` and `memories`, both of which live on the heap and are not touched while the batch
/// exists; so the batch may move, but its pointers stay valid until it is dropped.
#[derive(Debug)]
pub struct SendBatch {
    header: Box<libc::msghdr>,
    iovecs: Vec<libc::iovec>,
    sent: usize,
    owned: Vec<Vec<u8>>,
    memories: Vec<Arc<Memory>>,
}

// SAFETY: the raw pointers inside point only to memory that the batch itself keeps alive, and nothing thread-bound.
unsafe impl Send for SendBatch {}

impl Default for SendBatch {
    fn default() -> Self {
        let header = libc::msghdr {
            msg_name: core::ptr::null_mut(),
            msg_namelen: 0,
            msg_iov: core::ptr::null_mut(),
            msg_iovlen: 0,
            msg_control: core::ptr::null_mut(),
            msg_controllen: 0,
            msg_flags: 0,
        };
        Self {
            header: Box::new(header),
            iovecs: Vec::new(),
            sent: 0,
            owned: Vec::new(),
            memories: Vec::new(),
        }
    }
}

impl SendBatch {
    /// Adds bytes of its own.
    pub fn push_bytes(&mut self, mut bytes: Vec<u8>) {
        self.iovecs.push(libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() });
        self.owned.push(bytes);
    }

    /// Adds `[pos, pos + len)` of a mapping, without copying.
    ///
    /// # Panics
    /// When that lies outside the mapping: positions come from the outbox, never from outside.
    pub fn push_memory(&mut self, memory: &Arc<Memory>, pos: usize, len: usize) {
        let iovec = memory.iovec(pos, len);
        assert!(iovec.is_some(), "a send starts or ends outside the mapping");
        self.iovecs.extend(iovec);
        self.memories.push(Arc::clone(memory));
    }

    /// Whether everything has been sent.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.iovecs.get(self.sent..).is_none_or(|left| left.iter().all(|iovec| iovec.iov_len == 0))
    }

    /// Bytes left.
    #[must_use]
    pub fn left_bytes(&self) -> usize {
        self.iovecs.get(self.sent..).map_or(0, |left| left.iter().map(|iovec| iovec.iov_len).sum())
    }

    /// A copy of what is left, for whoever has to change it on its way.
    #[must_use]
    pub fn copy_out(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.left_bytes()];
        let mut at = 0_usize;
        for iovec in self.iovecs.get(self.sent..).unwrap_or_default() {
            let to = bytes.get_mut(at..).unwrap_or_default();
            let len = iovec.iov_len.min(to.len());
            // SAFETY: `[iov_base, iov_base + iov_len)` lies in `owned` or in a mapping of `memories`, which live as long as
            // the batch; frames that are to be sent are not written to. `to` is a fresh buffer with room for `len`.
            unsafe { core::ptr::copy_nonoverlapping(iovec.iov_base.cast::<u8>(), to.as_mut_ptr(), len) };
            at = at.saturating_add(len);
        }
        bytes
    }

    /// Takes `count` bytes off the front: the kernel has them.
    pub(super) fn advance(&mut self, mut count: usize) {
        while let Some(iovec) = self.iovecs.get_mut(self.sent) {
            let step = count.min(iovec.iov_len);
            iovec.iov_base = iovec.iov_base.cast::<u8>().wrapping_add(step).cast();
            iovec.iov_len -= step;
            count -= step;
            if iovec.iov_len != 0 {
                break;
            }
            self.sent += 1;
        }
        assert!(count == 0, "the kernel sent more than it was given");
    }

    /// The message header over what is left; valid until the batch is changed or dropped.
    pub(super) fn message(&mut self) -> *const libc::msghdr {
        let left = self.iovecs.get_mut(self.sent..).unwrap_or_default();
        self.header.msg_iov = left.as_mut_ptr();
        self.header.msg_iovlen = left.len();
        core::ptr::from_ref(&*self.header)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batch_counts_down_over_piece_borders() {
        let mut batch = SendBatch::default();
        assert!(batch.is_done());
        batch.push_bytes(vec![1; 10]);
        batch.push_bytes(vec![2; 20]);
        assert_eq!(batch.left_bytes(), 30);
        batch.advance(4);
        assert_eq!(batch.left_bytes(), 26);
        assert_eq!(batch.copy_out(), [vec![1; 6], vec![2; 20]].concat());
        batch.advance(16);
        assert_eq!(batch.left_bytes(), 10);
        assert!(!batch.is_done());
        batch.advance(10);
        assert!(batch.is_done());
    }
}
