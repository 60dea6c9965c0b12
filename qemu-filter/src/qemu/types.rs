//! The few C types of QEMU that cross the border, and the signatures of its driver callbacks.
//!
//! QEMU's objects are opaque: only the fields named in [`super::layout`] and here are ever read, at the
//! offsets measured there.

use std::ffi::{c_char, c_int, c_uint, c_void};

/// An object of QEMU's that only its own functions look into.
macro_rules! opaque {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {$(
        $(#[$doc])*
        #[repr(C)]
        #[derive(Debug)]
        pub(crate) struct $name {
            _opaque: [u8; 0],
        }
    )*};
}

opaque! {
    /// A table of driver callbacks.
    BlockDriver,
    /// A node of the block graph.
    BlockDriverState,
    /// What a device, job or export opens a node through.
    BlockBackend,
    /// An edge of the block graph.
    BdrvChild,
    /// An event loop.
    AioContext,
    /// A coroutine.
    Coroutine,
    /// A lock of QEMU's.
    QemuMutex,
    /// A dictionary of options.
    QDict,
    /// An error with its message.
    QemuError,
}

/// `QEMUIOVector`: a scatter list, the same in every release. `size` overlays the length of its local vector.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct QemuIoVector {
    pub(crate) iov: *mut libc::iovec,
    pub(crate) niov: c_int,
    _padding: c_int,
    /// -1: the list is not QEMU's to grow or free. (A C union of 8-byte alignment begins here.)
    pub(crate) nalloc: c_int,
    local_iov_base: *mut c_void,
    pub(crate) size: usize,
}

const _: () = assert!(
    size_of::<QemuIoVector>() == 40
        && std::mem::offset_of!(QemuIoVector, nalloc) == 16
        && std::mem::offset_of!(QemuIoVector, size) == 32
);

impl QemuIoVector {
    /// A list over `iov`, which outlives it and holds `size` bytes in all.
    pub(crate) fn over(iov: &mut [libc::iovec], size: usize) -> Self {
        Self {
            iov: iov.as_mut_ptr(),
            niov: c_int::try_from(iov.len()).unwrap_or(0),
            _padding: 0,
            nalloc: -1,
            local_iov_base: std::ptr::null_mut(),
            size,
        }
    }
}

/// `Notifier`: a callback in one of QEMU's lists. Lives at a fixed address while it is in a list.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Notifier {
    pub(crate) notify: unsafe extern "C" fn(*mut Notifier, *mut c_void),
    next: *mut Notifier,
    previous: *mut *mut Notifier,
}

impl Notifier {
    pub(crate) const fn new(notify: unsafe extern "C" fn(*mut Notifier, *mut c_void)) -> Self {
        Self { notify, next: std::ptr::null_mut(), previous: std::ptr::null_mut() }
    }
}

/// `QemuCoSleep`: a sleeping coroutine that can be woken early.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct CoSleep {
    to_wake: *mut Coroutine,
}

impl CoSleep {
    pub(crate) const fn new() -> Self {
        Self { to_wake: std::ptr::null_mut() }
    }
}

/// `BdrvTrackedRequest`, the same in every release: a request in flight, on its coroutine's stack.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct TrackedRequest {
    pub(crate) node: *mut BlockDriverState,
    pub(crate) offset: i64,
    pub(crate) bytes: i64,
    /// `enum BdrvTrackedRequestType`.
    pub(crate) kind: c_uint,
    pub(crate) serialising: bool,
    overlap_offset: i64,
    overlap_bytes: i64,
    /// The next older one of the node.
    pub(crate) next: *const TrackedRequest,
    previous: *const *const TrackedRequest,
    pub(crate) coroutine: *mut Coroutine,
    /// Coroutines that wait for it (`CoQueue`).
    wait_queue: [usize; 2],
    /// The request that QEMU makes it wait for.
    pub(crate) waiting_for: *const TrackedRequest,
}

const _: () = assert!(
    std::mem::offset_of!(TrackedRequest, kind) == 24
        && std::mem::offset_of!(TrackedRequest, serialising) == 28
        && std::mem::offset_of!(TrackedRequest, next) == 48
        && std::mem::offset_of!(TrackedRequest, coroutine) == 64
        && std::mem::offset_of!(TrackedRequest, waiting_for) == 88
);

/// `VersionTriple`.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct VersionTriple {
    pub(crate) major: i64,
    pub(crate) minor: i64,
    pub(crate) micro: i64,
}

/// `VersionInfo`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct VersionInfo {
    pub(crate) qemu: *mut VersionTriple,
    pub(crate) package: *mut c_char,
}

/// Bits of `BdrvRequestFlags`.
pub(crate) mod flags {
    use std::ffi::c_int;

    /// The request may unmap the range.
    pub(crate) const MAY_UNMAP: c_int = 0x4;
    /// The buffers were registered with the driver beforehand.
    pub(crate) const REGISTERED_BUF: c_int = 0x8;
    /// Force unit access.
    pub(crate) const FUA: c_int = 0x10;
    /// What the guest reads does not change (copy-on-read, streaming).
    pub(crate) const WRITE_UNCHANGED: c_int = 0x40;
    /// Zeroes must not be written out: answer -ENOTSUP instead.
    pub(crate) const NO_FALLBACK: c_int = 0x100;
}

/// `bdrv_co_pwritev`.
pub(crate) type CoPwritev =
    unsafe extern "C" fn(*mut BlockDriverState, i64, i64, *mut QemuIoVector, c_int) -> c_int;
/// `bdrv_co_pwritev_part`.
pub(crate) type CoPwritevPart =
    unsafe extern "C" fn(*mut BlockDriverState, i64, i64, *mut QemuIoVector, usize, c_int) -> c_int;
/// `bdrv_co_writev`: first sector, sectors.
pub(crate) type CoWritev =
    unsafe extern "C" fn(*mut BlockDriverState, i64, c_int, *mut QemuIoVector, c_int) -> c_int;
/// `BlockCompletionFunc`.
pub(crate) type Completion = unsafe extern "C" fn(*mut c_void, c_int);
/// `bdrv_aio_pwritev`: answers NULL when it could not start.
pub(crate) type AioPwritev = unsafe extern "C" fn(
    *mut BlockDriverState,
    i64,
    i64,
    *mut QemuIoVector,
    c_int,
    Completion,
    *mut c_void,
) -> *mut c_void;
/// `bdrv_aio_pdiscard`: the length is an `int`.
pub(crate) type AioPdiscard =
    unsafe extern "C" fn(*mut BlockDriverState, i64, c_int, Completion, *mut c_void) -> *mut c_void;
/// `bdrv_co_pwrite_zeroes`.
pub(crate) type CoPwriteZeroes = unsafe extern "C" fn(*mut BlockDriverState, i64, i64, c_int) -> c_int;
/// `bdrv_co_pdiscard`.
pub(crate) type CoPdiscard = unsafe extern "C" fn(*mut BlockDriverState, i64, i64) -> c_int;
/// `bdrv_co_copy_range_to`: node, source child, offset, target child, offset, bytes, flags.
pub(crate) type CoCopyRange = unsafe extern "C" fn(
    *mut BlockDriverState,
    *mut BdrvChild,
    i64,
    *mut BdrvChild,
    i64,
    i64,
    c_int,
    c_int,
) -> c_int;
/// `bdrv_co_pwritev_compressed`.
pub(crate) type CoPwritevCompressed =
    unsafe extern "C" fn(*mut BlockDriverState, i64, i64, *mut QemuIoVector) -> c_int;
/// `bdrv_co_pwritev_compressed_part`.
pub(crate) type CoPwritevCompressedPart =
    unsafe extern "C" fn(*mut BlockDriverState, i64, i64, *mut QemuIoVector, usize) -> c_int;
/// `bdrv_co_truncate`: new length, exact, preallocation, flags.
pub(crate) type CoTruncate =
    unsafe extern "C" fn(*mut BlockDriverState, i64, bool, c_int, c_int, *mut *mut QemuError) -> c_int;
/// `bdrv_child_perm`: edge, role, reopen queue, permissions and what is shared from above, and the same for below.
pub(crate) type ChildPerm = unsafe extern "C" fn(
    *mut BlockDriverState,
    *mut BdrvChild,
    c_uint,
    *mut c_void,
    u64,
    u64,
    *mut u64,
    *mut u64,
);
/// `bdrv_drain_begin`, `bdrv_drain_end`.
pub(crate) type OnDrain = unsafe extern "C" fn(*mut BlockDriverState);
/// `bdrv_co_flush`, `bdrv_co_flush_to_os`, `bdrv_make_empty`, `bdrv_inactivate`.
pub(crate) type OnNode = unsafe extern "C" fn(*mut BlockDriverState) -> c_int;
/// `bdrv_snapshot_goto`.
pub(crate) type SnapshotGoto = unsafe extern "C" fn(*mut BlockDriverState, *const c_char) -> c_int;
/// `bdrv_co_invalidate_cache`.
pub(crate) type CoInvalidateCache = unsafe extern "C" fn(*mut BlockDriverState, *mut *mut QemuError);
/// `bdrv_co_zone_mgmt`.
pub(crate) type CoZoneMgmt = unsafe extern "C" fn(*mut BlockDriverState, c_int, i64, i64) -> c_int;
/// `bdrv_co_zone_append`.
pub(crate) type CoZoneAppend =
    unsafe extern "C" fn(*mut BlockDriverState, *mut i64, *mut QemuIoVector, c_int) -> c_int;
/// `bdrv_co_ioctl`.
pub(crate) type CoIoctl =
    unsafe extern "C" fn(*mut BlockDriverState, std::ffi::c_ulong, *mut c_void) -> c_int;
/// `bdrv_aio_ioctl`.
pub(crate) type AioIoctl = unsafe extern "C" fn(
    *mut BlockDriverState,
    std::ffi::c_ulong,
    *mut c_void,
    Completion,
    *mut c_void,
) -> *mut c_void;
