//! The atomics of the ring, exchangeable for loom's: everything that touches shared memory imports them from here.

#[cfg(not(loom))]
pub(crate) use core::sync::atomic::{AtomicU64, Ordering, fence};
#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicU64, Ordering, fence};

/// `N` words of a shared structure that nobody reads: distance between fields, or room for later versions.
#[cfg(not(loom))]
#[repr(transparent)]
pub(crate) struct Pad<const N: usize>([AtomicU64; N]);

/// Under loom every atomic costs time and padding has no meaning.
#[cfg(loom)]
pub(crate) struct Pad<const N: usize>;

#[cfg(loom)]
impl<const N: usize> Pad<N> {
    pub(crate) const fn new() -> Self {
        Self
    }
}
