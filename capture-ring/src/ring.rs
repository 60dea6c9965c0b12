//! A ring: its memory, checked, and what both sides may ask of it.

use journal_format::{DiskId, Epoch, GapReason, Lsn};

use crate::arena::Arena;
use crate::dirty::Dirty;
use crate::layout::Geometry;
use crate::limits::{DEFAULT_ARENA_BYTES, DEFAULT_SLOTS, SLAB_BYTES};
use crate::mode::ModeWord;
use crate::raw::Memory;
use crate::slots::Slots;
use crate::sync::Ordering;

/// What a ring is for, and how large it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RingConfig {
    /// The disk whose writes it carries.
    pub disk: DiskId,
    /// The capture session; a ring serves one.
    pub epoch: Epoch,
    /// LSN of its first record.
    pub first_lsn: Lsn,
    /// Size of the disk in bytes when the ring is made.
    pub disk_bytes: u64,
    /// Bytes for data in flight: a multiple of 256 KiB, from 512 KiB to 64 GiB.
    pub arena_bytes: u64,
    /// Records in flight: a power of two from 4 to 2^24.
    pub slots: u32,
    /// Why the gap that the epoch begins with is there.
    pub begins: GapReason,
}

impl RingConfig {
    /// A configuration with the default sizes: 64 MiB of data and 65536 records. The epoch begins because protection does.
    #[must_use]
    pub const fn new(disk: DiskId, epoch: Epoch, first_lsn: Lsn, disk_bytes: u64) -> Self {
        let (arena_bytes, slots) = (DEFAULT_ARENA_BYTES, DEFAULT_SLOTS);
        Self { disk, epoch, first_lsn, disk_bytes, arena_bytes, slots, begins: GapReason::Attach }
    }
}

/// A mapped ring. Shared by the producers and the consumer of a process through an `Arc`.
pub struct Ring {
    memory: Memory,
    config: RingConfig,
}

impl core::fmt::Debug for Ring {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Ring")
            .field("config", &self.config)
            .field("mode", &self.mode())
            .finish_non_exhaustive()
    }
}

#[cfg(not(loom))]
mod shared {
    use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
    use std::sync::Arc;

    use super::{Ring, RingConfig};
    use crate::error::RingError;
    use crate::layout::{Description, Geometry};
    use crate::limits::WARM_BYTES;
    use crate::raw::{Memory, create_sealed, file_bytes, read_description, write_description};

    impl Ring {
        /// A new ring in a sealed memfd, and the descriptor to hand to the filter.
        ///
        /// # Errors
        /// `Limits` for a size out of range, `Os` when the kernel refuses memory.
        pub fn create(config: &RingConfig) -> Result<(Arc<Self>, OwnedFd), RingError> {
            let geometry = Geometry::new(config)?;
            let fd = create_sealed(c"cdp-ring", geometry.total_bytes)?;
            let ring = Self { memory: Memory::map(fd.as_fd(), geometry)?, config: *config };
            ring.init();
            write_description(fd.as_fd(), &Description::new(config, &geometry))?;
            Ok((Arc::new(ring), fd))
        }

        /// Opens a ring made by [`Ring::create`], here or in another process, after checking its description
        /// against this release's layout and the file's real size.
        ///
        /// # Errors
        /// `Layout` or `Limits` when it is none that can be used, `Os` when it cannot be mapped.
        pub fn open(fd: BorrowedFd<'_>) -> Result<Arc<Self>, RingError> {
            let file_bytes = file_bytes(fd)?;
            let (config, geometry) = Description::check(&read_description(fd)?, file_bytes)?;
            Ok(Arc::new(Self { memory: Memory::map(fd, geometry)?, config }))
        }

        /// Has the kernel provide a new ring's memory ([`WARM_BYTES`] of it): in huge pages where it can, so that a copy needs few
        /// translations of pages, and a direct write from the ring few segments. Takes some 20 ms for 64 MiB, and may take a
        /// few tenths of a second where memory has to be made to lie together.
        pub fn provide(&self) {
            self.memory.provide(WARM_BYTES);
            self.memory.warm(WARM_BYTES);
        }

        /// Maps the ring's memory here ([`WARM_BYTES`] of it), so that no guest's write pays for the first touch of a page. For
        /// each side, before the first request; [`Ring::provide`] does it as well.
        pub fn warm(&self) {
            self.memory.warm(WARM_BYTES);
        }
    }
}

impl Ring {
    /// A small ring on the heap, with a dirty bitmap of one word.
    ///
    /// # Panics
    /// When the configuration is out of range.
    #[cfg(loom)]
    #[must_use]
    #[expect(clippy::expect_used, reason = "tests only")]
    #[expect(clippy::arc_with_non_send_sync, reason = "loom runs its threads one at a time")]
    pub fn for_loom(config: &RingConfig) -> std::sync::Arc<Self> {
        let geometry = Geometry::new(config).expect("a valid configuration");
        let ring = Self { memory: Memory::new(geometry, 1), config: *config };
        ring.init();
        std::sync::Arc::new(ring)
    }

    fn init(&self) {
        let words = self.memory.words();
        // ORDERING: nobody else has the memory yet.
        words.credits.store(self.geometry().slots, Ordering::Relaxed);
        words.disk_bytes.store(self.config.disk_bytes, Ordering::Relaxed);
        self.arena().init();
    }

    /// What the ring is for and how large it is; checked when it was opened.
    #[must_use]
    pub const fn config(&self) -> &RingConfig {
        &self.config
    }

    /// Where everything lies.
    #[must_use]
    pub const fn geometry(&self) -> &Geometry {
        self.memory.geometry()
    }

    pub(crate) const fn memory(&self) -> &Memory {
        &self.memory
    }

    #[inline]
    pub(crate) fn slots(&self) -> Slots<'_> {
        Slots {
            words: self.memory.words(),
            slots: self.memory.slots(),
            geometry: self.memory.geometry(),
            first: self.config.first_lsn,
        }
    }

    #[inline]
    pub(crate) fn arena(&self) -> Arena<'_> {
        Arena { words: self.memory.words(), slabs: self.memory.slabs() }
    }

    /// The dirty bitmap.
    #[must_use]
    pub fn dirty(&self) -> Dirty<'_> {
        Dirty { words: self.memory.dirty(), disk_bytes: self.disk_bytes() }
    }

    /// The capture mode, its generation and the reason of that generation's gap.
    #[inline]
    #[must_use]
    pub fn mode(&self) -> ModeWord {
        // ORDERING: Acquire pairs with the exchanges in `mode`.
        ModeWord::unpack(self.memory.words().mode.load(Ordering::Acquire))
    }

    /// Whether history has a gap now: a generation has begun and not ended.
    #[must_use]
    pub fn gap_is_open(&self) -> bool {
        // ORDERING: a hint; `finish_resync` decides.
        self.mode().generation > self.memory.words().gap_ended.load(Ordering::Acquire)
    }

    /// Size of the disk in bytes, as the last resize left it.
    #[must_use]
    pub fn disk_bytes(&self) -> u64 {
        // ORDERING: Acquire pairs with the Release in `Producer::resized`.
        self.memory.words().disk_bytes.load(Ordering::Acquire)
    }

    /// The last LSN that was reserved; the one before the ring's first when there is none.
    #[must_use]
    pub fn captured_lsn(&self) -> Lsn {
        self.slots().lsn(self.slots().tail()).prev()
    }

    /// Records reserved and not yet freed by the consumer (as of its last batch).
    #[must_use]
    pub fn backlog(&self) -> u64 {
        // ORDERING: a gauge.
        let head = self.memory.words().head.load(Ordering::Relaxed);
        self.slots().tail().saturating_sub(head).min(self.geometry().slots)
    }

    /// Bytes of the arena in slabs that are not free. A gauge: it may be a moment old.
    #[must_use]
    pub fn arena_used_bytes(&self) -> u64 {
        self.geometry().slabs.saturating_sub(self.arena().free_slabs()).saturating_mul(SLAB_BYTES)
    }

    /// Whether requests would find room now: half of the slots and half of the arena are free. What the agent waits
    /// for before it asks the filter to resume.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.slots().credits() >= self.geometry().slots / 2
            && self.arena().free_slabs() >= self.geometry().slabs / 2
    }
}
