//! Memory of frames that the journal has, for the next ones: memory that comes fresh from the kernel costs more than receiving
//! into it, as each page of it is zeroed and mapped when it is first touched.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::limits::{MIN_SPARE_BYTES, SPARE_BYTES};

/// Buffers that wait to be used again.
#[derive(Debug, Default)]
pub(crate) struct Spares(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    buffers: Vec<Vec<u8>>,
    bytes: usize,
}

impl Spares {
    /// A buffer for `len` bytes, of which some are there: whatever the one before has left. One that is much too large is not
    /// taken: the queue counts what a frame holds.
    pub(crate) fn take(&self, len: usize) -> Vec<u8> {
        let fits = |buffer: &Vec<u8>| (len..=len.saturating_mul(2)).contains(&buffer.capacity());
        let mut kept = self.lock();
        // The last that came is the one that the processor's cache has most of.
        match kept.buffers.iter().rposition(fits) {
            Some(at) => {
                let mut buffer = kept.buffers.remove(at);
                kept.bytes = kept.bytes.saturating_sub(buffer.capacity());
                buffer.truncate(len);
                buffer
            }
            None => Vec::with_capacity(len),
        }
    }

    /// Keeps a buffer that is not needed any more, in place of the oldest ones if there are too many, or drops it.
    pub(crate) fn give_back(&self, buffer: Vec<u8>) {
        if !(MIN_SPARE_BYTES..=SPARE_BYTES).contains(&buffer.capacity()) {
            return;
        }
        let mut kept = self.lock();
        let mut bytes = kept.bytes.saturating_add(buffer.capacity());
        let mut old = 0_usize;
        while bytes > SPARE_BYTES
            && let Some(oldest) = kept.buffers.get(old)
        {
            bytes = bytes.saturating_sub(oldest.capacity());
            old = old.saturating_add(1);
        }
        let dropped: Vec<Vec<u8>> = kept.buffers.drain(..old).collect();
        kept.buffers.push(buffer);
        kept.bytes = bytes;
        // The allocator may take a while.
        drop(kept);
        drop(dropped);
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        // Nothing can panic while it is held.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_used_again_where_it_fits() {
        let spares = Spares::default();
        let first = vec![7; MIN_SPARE_BYTES];
        let at = first.as_ptr();
        spares.give_back(first);
        assert!(spares.take(MIN_SPARE_BYTES + 1).is_empty(), "too small");
        assert!(spares.take(MIN_SPARE_BYTES / 2 - 1).is_empty(), "much too large");
        let again = spares.take(MIN_SPARE_BYTES - 1);
        assert_eq!((again.as_ptr(), again.len()), (at, MIN_SPARE_BYTES - 1));
        assert!(spares.take(MIN_SPARE_BYTES).is_empty(), "nothing is left");
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let spares = Spares::default();
        spares.give_back(vec![1; MIN_SPARE_BYTES - 1]);
        assert!(spares.lock().buffers.is_empty(), "not worth it");
        let each = 1 << 20;
        (0..2 * SPARE_BYTES / each).for_each(|_| spares.give_back(vec![1; each]));
        let kept = spares.lock();
        assert_eq!((kept.bytes, kept.buffers.len()), (SPARE_BYTES, SPARE_BYTES / each));
    }

    #[test]
    fn what_nobody_asks_for_makes_room() {
        let spares = Spares::default();
        (0..SPARE_BYTES / MIN_SPARE_BYTES).for_each(|_| spares.give_back(vec![1; MIN_SPARE_BYTES]));
        spares.give_back(vec![2; 512 << 10]);
        assert_eq!(spares.take(512 << 10).len(), 512 << 10);
        let kept = spares.lock();
        assert_eq!(kept.bytes, kept.buffers.iter().map(Vec::capacity).sum::<usize>());
    }
}
