//! Memory that is used again: fresh memory costs a page fault for each page, which is more than copying into it.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Keeps values for whoever needs one next, up to a bound. Of any number of threads.
#[derive(Debug)]
pub(crate) struct Pool<T> {
    most_bytes: usize,
    inner: Mutex<Inner<T>>,
}

#[derive(Debug)]
struct Inner<T> {
    /// The values and their sizes in bytes; the one that was used last, whose memory may be in a cache, is the last.
    free: Vec<(T, usize)>,
    bytes: usize,
    /// Fewest that were free at once since unused ones were last forgotten: so many nobody needs.
    fewest: usize,
}

impl<T> Pool<T> {
    /// A pool that keeps at most so many bytes.
    pub(crate) const fn new(most_bytes: usize) -> Self {
        Self { most_bytes, inner: Mutex::new(Inner { free: Vec::new(), bytes: 0, fewest: 0 }) }
    }

    /// The value that was put in last, if there is one.
    pub(crate) fn take(&self) -> Option<T> {
        let mut inner = self.lock();
        let (value, bytes) = inner.free.pop()?;
        inner.bytes = inner.bytes.saturating_sub(bytes);
        inner.fewest = inner.fewest.min(inner.free.len());
        Some(value)
    }

    /// Gives a value of that size back. It is dropped if the pool is full.
    pub(crate) fn put(&self, value: T, bytes: usize) {
        let mut inner = self.lock();
        if bytes > 0 && inner.bytes.saturating_add(bytes) <= self.most_bytes {
            inner.bytes = inner.bytes.saturating_add(bytes);
            inner.free.push((value, bytes));
        }
    }

    /// Drops what nobody needed since the last call. Whoever calls it now and then gives memory back when a load ends.
    pub(crate) fn forget_unused(&self) {
        let mut inner = self.lock();
        let unused = inner.fewest.min(inner.free.len());
        let dropped: Vec<_> = inner.free.drain(..unused).collect();
        let bytes: usize = dropped.iter().map(|(_, bytes)| bytes).sum();
        inner.bytes = inner.bytes.saturating_sub(bytes);
        inner.fewest = inner.free.len();
    }

    /// Bytes that it keeps now.
    #[cfg(test)]
    pub(crate) fn bytes(&self) -> usize {
        self.lock().bytes
    }

    fn lock(&self) -> MutexGuard<'_, Inner<T>> {
        // What a panicking thread leaves behind is at worst a pool that has lost a value.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_put_in_last_comes_out_first_and_the_bound_holds() {
        let pool = Pool::new(10);
        assert_eq!(pool.take(), None);
        [("a", 4), ("b", 4), ("too much", 4), ("c", 2), ("nothing", 0)]
            .into_iter()
            .for_each(|(value, bytes)| pool.put(value, bytes));
        assert_eq!(pool.bytes(), 10);
        assert_eq!(
            [pool.take(), pool.take(), pool.take(), pool.take()],
            [Some("c"), Some("b"), Some("a"), None]
        );
        assert_eq!(pool.bytes(), 0);
    }

    #[test]
    fn what_nobody_needs_is_forgotten_and_what_a_load_uses_is_kept() {
        let pool = Pool::new(100);
        (0..5).for_each(|value| pool.put(value, 10));
        pool.forget_unused();
        assert_eq!(pool.bytes(), 50, "they were in use until now");
        let busy = [pool.take(), pool.take()];
        busy.into_iter().flatten().for_each(|value| pool.put(value, 10));
        pool.forget_unused();
        assert_eq!(pool.bytes(), 20, "two were used at once");
        pool.forget_unused();
        assert_eq!(pool.bytes(), 0);
    }
}
