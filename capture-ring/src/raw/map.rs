//! Mappings of real memfds.

use core::num::NonZeroUsize;
use core::ptr::NonNull;
use core::sync::atomic::AtomicU64;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use crate::error::{RingError, RingErrorKind};
use crate::layout::{
    Block, CLOCK_BYTES, DESCRIPTION_BYTES, Description, Geometry, HEADER_BYTES, PAGE_BYTES, Slab, Slot, Words,
};
use crate::limits::{SLAB_UNITS, UNIT_BYTES};

const SEALS: SealFlag = SealFlag::F_SEAL_SHRINK.union(SealFlag::F_SEAL_GROW).union(SealFlag::F_SEAL_SEAL);

/// From Linux's `include/uapi/asm-generic/mman-common.h`, since 6.1; neither libc nor nix names it.
const MADV_COLLAPSE: libc::c_int = 25;

/// What one entry of the page table's second level maps on x86-64, and on aarch64 with pages of 4 KiB. Where it is another size
/// nothing is collapsed.
const HUGE_BYTES: usize = 2 << 20;

/// A new memfd of that size, which nobody can resize any more.
pub(crate) fn create_sealed(name: &std::ffi::CStr, bytes: u64) -> Result<OwnedFd, RingError> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let fd = memfd_create(name, flags).map_err(|e| RingError::os("cannot create a memfd", e))?;
    let size = libc::off_t::try_from(bytes)
        .map_err(|_| RingError::new(RingErrorKind::Limits, "the ring is larger than a file can be"))?;
    nix::unistd::ftruncate(&fd, size).map_err(|e| RingError::os("cannot size the memfd", e))?;
    fcntl(&fd, FcntlArg::F_ADD_SEALS(SEALS)).map_err(|e| RingError::os("cannot seal the memfd", e))?;
    Ok(fd)
}

/// Size of a memfd that is sealed against shrinking (or else a peer could turn our accesses into SIGBUS).
pub(crate) fn file_bytes(fd: BorrowedFd<'_>) -> Result<u64, RingError> {
    let seals = fcntl(fd, FcntlArg::F_GET_SEALS)
        .map_err(|_| RingError::new(RingErrorKind::Layout, "the descriptor is not a memfd"))?;
    if !SealFlag::from_bits_retain(seals).contains(SealFlag::F_SEAL_SHRINK) {
        return Err(RingError::new(RingErrorKind::Layout, "the memfd is not sealed against shrinking"));
    }
    let stat = nix::sys::stat::fstat(fd).map_err(|e| RingError::os("cannot stat the memfd", e))?;
    u64::try_from(stat.st_size).map_err(|_| RingError::new(RingErrorKind::Layout, "the memfd has no size"))
}

/// Takes over a descriptor that the kernel has just made for this process (`recvmsg`, `accept4`).
pub(crate) fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: both callers pass a number that the kernel returned from the call before, which nobody else has seen,
    // so it is open and has no other owner.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// A private copy of a ring's description.
pub(crate) fn read_description(fd: BorrowedFd<'_>) -> Result<[u8; DESCRIPTION_BYTES], RingError> {
    let mut bytes = [0_u8; DESCRIPTION_BYTES];
    let read =
        nix::sys::uio::pread(fd, &mut bytes, 0).map_err(|e| RingError::os("cannot read the ring", e))?;
    if read == DESCRIPTION_BYTES {
        Ok(bytes)
    } else {
        Err(RingError::new(RingErrorKind::Layout, "the ring's description is cut"))
    }
}

/// Writes the description of a new ring.
pub(crate) fn write_description(fd: BorrowedFd<'_>, description: &Description) -> Result<(), RingError> {
    use zerocopy::IntoBytes;
    let written = nix::sys::uio::pwrite(fd, description.as_bytes(), 0)
        .map_err(|e| RingError::os("cannot write the ring's description", e))?;
    if written == DESCRIPTION_BYTES {
        Ok(())
    } else {
        Err(RingError::new(RingErrorKind::Os, "the ring's description was written in part"))
    }
}

/// A shared mapping of a whole memfd.
struct Mapping {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping is process-wide memory that no thread owns; every access through it is atomic or, for arena
// bytes, ordered by the protocol above it.
unsafe impl Send for Mapping {}
// SAFETY: as for `Send`; `&Mapping` hands out only shared references to atomics and raw pointers.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(fd: BorrowedFd<'_>, bytes: u64) -> Result<Self, RingError> {
        let limits = || RingError::new(RingErrorKind::Limits, "the ring does not fit the address space");
        let bytes = usize::try_from(bytes).ok().and_then(NonZeroUsize::new).ok_or_else(limits)?;
        let refused = |e| RingError::os("cannot map the memfd", e);
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let mapped = if bytes.get() < HUGE_BYTES {
            // SAFETY: a fresh mapping at an address of the kernel's choice aliases no Rust object.
            unsafe { mmap(None, bytes, prot, MapFlags::MAP_SHARED, fd, 0) }
        } else {
            let base = Self::reserve(bytes).map_err(refused)?;
            let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED;
            // SAFETY: these addresses were just reserved, and nobody else has seen them. If it fails they stay reserved, or (before
            // Linux 6.12) free for others: so they are not given back.
            unsafe { mmap(Some(base.addr()), bytes, prot, flags, fd, 0) }
        };
        Ok(Self { base: mapped.map_err(refused)?.cast(), bytes: bytes.get() })
    }

    /// Addresses for `bytes` where huge pages of a file can be mapped as such. The kernel chooses such by itself only on hosts
    /// that give huge pages to all shared memory: reserve more, and give the edges back.
    fn reserve(bytes: NonZeroUsize) -> nix::Result<NonNull<u8>> {
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        let all = bytes.saturating_add(HUGE_BYTES);
        // SAFETY: a fresh mapping at an address of the kernel's choice aliases no Rust object.
        let start: NonNull<u8> = unsafe { mmap_anonymous(None, all, ProtFlags::PROT_NONE, flags) }?.cast();
        let before = start.as_ptr().align_offset(HUGE_BYTES).min(HUGE_BYTES);
        // SAFETY: `before` is within what was reserved.
        let base = unsafe { start.add(before) };
        // SAFETY: so is this: `before` is at most `HUGE_BYTES`.
        let after = unsafe { base.add(bytes.get()) };
        for (edge, bytes) in [(start, before), (after, HUGE_BYTES.saturating_sub(before))] {
            // SAFETY: the reservation's edges, to which nothing refers. Nothing is unmapped where there is none.
            let _ = unsafe { munmap(edge.cast(), bytes) };
        }
        Ok(base)
    }

    /// `count` values of `T` at byte offset `at`; `T` consists of `AtomicU64` only. Empty when that is not inside.
    fn atomics<T>(&self, at: u64, count: u64) -> &[T] {
        let Some((at, count)) = self.inside::<T>(at, count) else { return &[] };
        // SAFETY: `inside` proved that `at` lies in the mapping.
        let start = unsafe { self.base.add(at) }.cast::<T>();
        // SAFETY: `inside` proved alignment and that all values lie in the mapping, which lives as long as `self`;
        // memory from `mmap` is initialised, any bit pattern is an `AtomicU64`, and atomics may be shared with
        // other writers, in this process or another.
        unsafe { core::slice::from_raw_parts(start.as_ptr(), count) }
    }

    fn inside<T>(&self, at: u64, count: u64) -> Option<(usize, usize)> {
        let (at, count) = (usize::try_from(at).ok()?, usize::try_from(count).ok()?);
        let end = at.checked_add(count.checked_mul(size_of::<T>())?)?;
        (end <= self.bytes && at.is_multiple_of(align_of::<T>())).then_some((at, count))
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: base and length are those of the mapping, and every reference into it borrows `self`. A raw
        // pointer from `Memory::piece` must not outlive the ring; its documentation says so.
        let _ = unsafe { munmap(self.base.cast(), self.bytes) };
    }
}

/// A mapped ring.
pub(crate) struct Memory {
    mapping: Mapping,
    geometry: Geometry,
}

impl Memory {
    /// Maps a ring whose file has exactly `geometry.total_bytes`.
    pub(crate) fn map(fd: BorrowedFd<'_>, geometry: Geometry) -> Result<Self, RingError> {
        let mapping = Mapping::new(fd.as_fd(), geometry.total_bytes)?;
        Ok(Self { mapping, geometry })
    }

    pub(crate) const fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// The page of shared words.
    pub(crate) fn words(&self) -> &Words {
        // SAFETY: the header's second page is inside every mapping: `Geometry::lay_out` puts all regions behind it.
        let words = unsafe { self.mapping.base.add(HEADER_BYTES as usize / 2) }.cast::<Words>();
        // SAFETY: mapped, page-aligned and initialised; `Words` consists of `AtomicU64` only, which may be shared
        // with other writers.
        unsafe { words.as_ref() }
    }

    pub(crate) fn dirty(&self) -> &[AtomicU64] {
        self.mapping.atomics(self.geometry.dirty_at, self.geometry.dirty_bits / 64)
    }

    pub(crate) fn slots(&self) -> &[Slot] {
        self.mapping.atomics(self.geometry.slots_at, self.geometry.slots)
    }

    pub(crate) fn blocks(&self) -> &[Block] {
        self.mapping.atomics(self.geometry.blocks_at, self.geometry.units)
    }

    pub(crate) fn slabs(&self) -> &[Slab] {
        self.mapping.atomics(self.geometry.slabs_at, self.geometry.slabs)
    }

    /// The arena bytes of a piece of `length` bytes that begins at `block`; `None` unless it lies in one slab.
    /// The pointer is good for as long as the ring is mapped.
    pub(crate) fn piece(&self, block: u32, length: u32) -> Option<NonNull<u8>> {
        let room = SLAB_UNITS.checked_sub(block.checked_rem(SLAB_UNITS)?)?.checked_mul(UNIT_BYTES)?;
        if u64::from(block) >= self.geometry.units || length > room {
            return None;
        }
        let at = u64::from(block).checked_mul(u64::from(UNIT_BYTES))?.checked_add(self.geometry.arena_at)?;
        let (at, _) = self.mapping.inside::<u8>(at, u64::from(length))?;
        // SAFETY: `inside` proved that the piece lies in the mapping.
        Some(unsafe { self.mapping.base.add(at) })
    }

    /// Copies `bytes` into a piece, from `at` on; false when they do not fit in it. The caller owns the piece.
    pub(crate) fn copy_in(&self, block: u32, at: u32, bytes: &[u8]) -> bool {
        let end = u32::try_from(bytes.len()).ok().and_then(|len| len.checked_add(at));
        let Some(start) = end.and_then(|end| self.piece(block, end)) else { return false };
        // SAFETY: `piece` proved that `at + bytes.len()` bytes from `start` are mapped.
        let to = unsafe { start.add(at as usize) };
        // SAFETY: source and destination are valid for that length and cannot overlap: a Rust slice never points
        // into the mapping. Another process may write there at the same time; these are plain bytes that nobody
        // has interpreted.
        unsafe { core::ptr::copy_nonoverlapping(bytes.as_ptr(), to.as_ptr(), bytes.len()) };
        true
    }

    /// Appends the first `length` bytes of a piece to `out`, read once; false when it is not in the arena.
    pub(crate) fn copy_out(&self, block: u32, length: u32, out: &mut Vec<u8>) -> bool {
        let Some(from) = self.piece(block, length) else { return false };
        let length = length as usize;
        out.reserve(length);
        let (to, used) = (out.spare_capacity_mut().as_mut_ptr().cast::<u8>(), out.len());
        // SAFETY: `piece` proved the source mapped for `length` bytes, `reserve` made the destination so; a vector's
        // memory is not the mapping. What a concurrent writer does only changes which bytes are copied.
        unsafe { core::ptr::copy_nonoverlapping(from.as_ptr(), to, length) };
        // SAFETY: capacity was reserved and the bytes up to the new length are initialised by the copy.
        unsafe { out.set_len(used.saturating_add(length)) };
        true
    }

    /// Has the kernel provide `bytes` behind the dirty bitmap in huge pages, where it can (Linux 6.1; enough memory that lies
    /// together), whatever `transparent_hugepage/shmem_enabled` says but `deny`.
    pub(crate) fn provide(&self, bytes: u64) {
        let from = self.geometry.slots_at.next_multiple_of(HUGE_BYTES as u64);
        let to = self.geometry.slots_at.saturating_add(bytes).min(self.geometry.total_bytes);
        for extent in (from..to).step_by(HUGE_BYTES) {
            // One with nothing in it is taken for a hole.
            self.advise(extent, PAGE_BYTES, libc::MADV_POPULATE_WRITE);
        }
        self.advise(from, to.saturating_sub(from), MADV_COLLAPSE);
    }

    /// Has the kernel provide and map `bytes` behind the dirty bitmap (tables, then the arena), as far as it can: older ones
    /// than Linux 5.14 cannot, and then each page costs its first writer a fault.
    pub(crate) fn warm(&self, bytes: u64) {
        self.advise(self.geometry.slots_at, bytes, libc::MADV_POPULATE_WRITE);
    }

    /// Gives the kernel an advice about `bytes` from an offset on, or all that there are. It may refuse.
    fn advise(&self, offset: u64, bytes: u64, advice: libc::c_int) {
        let bytes = bytes.min(self.geometry.total_bytes.saturating_sub(offset));
        let Some((at, length)) = self.mapping.inside::<u8>(offset, bytes) else { return };
        // SAFETY: `inside` proved that the range lies in the mapping.
        let start = unsafe { self.mapping.base.add(at) };
        // SAFETY: the range is mapped; none of the advices that are given changes a byte of it.
        let _refused = unsafe { libc::madvise(start.as_ptr().cast(), length, advice) };
    }

    /// Asks the processor to fetch a slot that is about to be written.
    #[inline]
    pub(crate) fn prefetch_slot(&self, index: u64) {
        #[cfg(target_arch = "x86_64")]
        if let Some(slot) = self.slots().get(index as usize) {
            use core::arch::x86_64::{_MM_HINT_ET0, _mm_prefetch};
            // SAFETY: a prefetch of any address has no effect on the program's state; SSE is part of x86-64.
            unsafe { _mm_prefetch::<_MM_HINT_ET0>(core::ptr::from_ref(slot).cast()) };
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = index;
    }
}

/// Byte offsets of a clock page's words: magic number, version, newest stamp (on cache lines of its own).
pub(crate) const CLOCK_WORDS_AT: [usize; 3] = [0, 8, 128];

/// A mapped clock page.
pub(crate) struct ClockMemory(Mapping);

impl ClockMemory {
    pub(crate) fn map(fd: BorrowedFd<'_>) -> Result<Self, RingError> {
        Mapping::new(fd, CLOCK_BYTES).map(Self)
    }

    fn words(&self) -> [&AtomicU64; 3] {
        CLOCK_WORDS_AT.map(|at| {
            debug_assert!(at.is_multiple_of(8) && at < CLOCK_BYTES as usize);
            // SAFETY: all three offsets lie in the page that `map` mapped.
            let word = unsafe { self.0.base.add(at) }.cast::<AtomicU64>();
            // SAFETY: mapped, aligned to 8, initialised by `mmap`, and an atomic may be shared with other writers.
            unsafe { word.as_ref() }
        })
    }

    /// Magic number and version.
    pub(crate) fn signature(&self) -> [&AtomicU64; 2] {
        let [magic, version, _] = self.words();
        [magic, version]
    }

    /// The newest stamp given out.
    #[inline]
    pub(crate) fn last(&self) -> &AtomicU64 {
        let [_, _, last] = self.words();
        last
    }
}
