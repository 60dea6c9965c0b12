//! Our driver callbacks: each finds QEMU's own, asks whether the node is captured, and calls it.
//!
//! None of these may panic, allocate, lock or use a thread-local across a call of QEMU's: any such call may
//! yield, and the coroutine may go on in another thread. The engine stops its own panics. The first request after
//! a change of nodes pays for looking at them ([`graph`]), no other does.

use std::cell::Cell;
use std::ffi::{c_char, c_int, c_uint, c_ulong, c_void};

use super::layout::{Callback, STATE_DRV};
use super::slots::{self, Caller, User};
use super::types::{
    AioIoctl, AioPdiscard, AioPwritev, BdrvChild, BlockDriver, BlockDriverState, ChildPerm, CoCopyRange,
    CoInvalidateCache, CoIoctl, CoPdiscard, CoPwriteZeroes, CoPwritev, CoPwritevCompressed,
    CoPwritevCompressedPart, CoPwritevPart, CoTruncate, CoWritev, CoZoneAppend, CoZoneMgmt, Completion,
    Coroutine, OnDrain, OnNode, QemuError, QemuIoVector, SnapshotGoto, flags,
};
use super::write::{self, Source};
use super::{Glue, glue, graph, hook, mainloop};
use crate::engine::Kind;

/// Bytes of a sector, the unit of `bdrv_co_writev`.
const SECTOR_BYTES: i64 = 512;

/// `SG_IO`: a SCSI command straight to the device.
const SG_IO: c_ulong = 0x2285;

/// Callbacks that we call but leave where they are: the block layer prefers what we put beside them.
pub(crate) const KEPT: [Callback; 2] = [Callback::AioPwritev, Callback::AioPdiscard];

/// Each callback that we replace, and the address of ours.
pub(crate) const REPLACEMENTS: [(Callback, fn() -> usize); 22] = [
    (Callback::MakeEmpty, || make_empty as OnNode as usize),
    (Callback::Inactivate, || inactivate as OnNode as usize),
    (Callback::SnapshotGoto, || snapshot_goto as SnapshotGoto as usize),
    (Callback::ChildPerm, || child_perm as ChildPerm as usize),
    (Callback::DrainBegin, || drain_begin as OnDrain as usize),
    (Callback::DrainEnd, || drain_end as OnDrain as usize),
    (Callback::CoWritev, || co_writev as CoWritev as usize),
    (Callback::CoPwritev, || co_pwritev as CoPwritev as usize),
    (Callback::CoPwritevPart, || co_pwritev_part as CoPwritevPart as usize),
    (Callback::CoPwriteZeroes, || co_pwrite_zeroes as CoPwriteZeroes as usize),
    (Callback::CoPdiscard, || co_pdiscard as CoPdiscard as usize),
    (Callback::CoCopyRangeTo, || co_copy_range_to as CoCopyRange as usize),
    (Callback::CoInvalidateCache, || co_invalidate_cache as CoInvalidateCache as usize),
    (Callback::CoFlush, || co_flush as OnNode as usize),
    (Callback::CoFlushToOs, || co_flush_to_os as OnNode as usize),
    (Callback::CoTruncate, || co_truncate as CoTruncate as usize),
    (Callback::CoPwritevCompressed, || co_pwritev_compressed as CoPwritevCompressed as usize),
    (Callback::CoPwritevCompressedPart, || co_pwritev_compressed_part as CoPwritevCompressedPart as usize),
    (Callback::CoZoneMgmt, || co_zone_mgmt as CoZoneMgmt as usize),
    (Callback::CoZoneAppend, || co_zone_append as CoZoneAppend as usize),
    (Callback::AioIoctl, || aio_ioctl as AioIoctl as usize),
    (Callback::CoIoctl, || co_ioctl as CoIoctl as usize),
];

/// QEMU's own callback for a node, or `None` where its driver has none.
///
/// # Safety
/// `node` is a live node whose driver's table has our callbacks, and `F` is the type of this callback.
unsafe fn original<F: Copy>(node: *mut BlockDriverState, callback: Callback) -> Option<F> {
    const { assert!(size_of::<F>() == size_of::<usize>()) };
    // SAFETY: `drv` is at this offset in every release that has a table, proven on the scratch node.
    let field = unsafe { node.cast::<u8>().add(STATE_DRV) };
    // SAFETY: as above; null for a node whose driver has given it up.
    let driver = unsafe { field.cast::<*const BlockDriver>().read() };
    let address = hook::originals(driver)?.address(callback);
    // SAFETY: not null, and of this type by the caller's promise.
    (address != 0).then(|| unsafe { std::mem::transmute_copy::<usize, F>(&address) })
}

/// The slot of a protected device whose node this is, for a callback of a coroutine.
fn user(node: *mut BlockDriverState) -> Option<(&'static Glue, User)> {
    let glue = glue()?;
    let user = slots::find(glue, node, Caller::Coroutine)?;
    if !user.is_judged {
        graph::settle(glue, &user);
    }
    Some((glue, user))
}

/// As [`user`], for callbacks that QEMU calls in its main thread outside coroutines.
fn user_in_main_thread(node: *mut BlockDriverState) -> Option<User> {
    slots::find(glue()?, node, Caller::MainThread)
}

unsafe extern "C" fn co_pwritev_part(
    node: *mut BlockDriverState,
    offset: i64,
    bytes: i64,
    qiov: *mut QemuIoVector,
    skip: usize,
    request_flags: c_int,
) -> c_int {
    // SAFETY: QEMU calls this through the table of the node's driver.
    let Some(original) = (unsafe { original::<CoPwritevPart>(node, Callback::CoPwritevPart) }) else {
        return -libc::ENOMEDIUM;
    };
    let issue = |source: Source, flags| {
        // SAFETY: QEMU's arguments, or a part of them with a scatter list of the same bytes.
        unsafe { original(node, source.offset, source.bytes, source.qiov, source.skip, flags) }
    };
    let source = Source { offset, bytes, qiov, skip };
    match user(node) {
        None => issue(source, request_flags),
        Some((glue, user)) => write::captured(glue, node, &user, source, request_flags, issue),
    }
}

unsafe extern "C" fn co_pwritev(
    node: *mut BlockDriverState,
    offset: i64,
    bytes: i64,
    qiov: *mut QemuIoVector,
    request_flags: c_int,
) -> c_int {
    let source = Source { offset, bytes, qiov, skip: 0 };
    // SAFETY: QEMU calls this through the table of the node's driver.
    if let Some(original) = unsafe { original::<CoPwritev>(node, Callback::CoPwritev) } {
        let issue = |source: Source, flags| {
            // SAFETY: QEMU's arguments, or a part of them with a scatter list of just these bytes.
            source.whole(|qiov| unsafe { original(node, source.offset, source.bytes, qiov, flags) })
        };
        return match user(node) {
            None => issue(source, request_flags),
            Some((glue, user)) => write::captured(glue, node, &user, source, request_flags, issue),
        };
    }
    // SAFETY: as above.
    let Some(original) = (unsafe { original::<AioPwritev>(node, Callback::AioPwritev) }) else {
        return -libc::ENOMEDIUM;
    };
    let Some(glue) = glue() else { return -libc::ENOMEDIUM };
    let issue = |source: Source, flags| {
        source.whole(|qiov| {
            wait_for(glue, |done, context| {
                // SAFETY: as above; `done` and `context` stay until the completion was called.
                unsafe { original(node, source.offset, source.bytes, qiov, flags, done, context) }
            })
        })
    };
    match user(node) {
        None => issue(source, request_flags),
        Some((glue, user)) => write::captured(glue, node, &user, source, request_flags, issue),
    }
}

unsafe extern "C" fn co_writev(
    node: *mut BlockDriverState,
    first_sector: i64,
    sectors: c_int,
    qiov: *mut QemuIoVector,
    request_flags: c_int,
) -> c_int {
    // SAFETY: QEMU calls this through the table of the node's driver.
    let Some(original) = (unsafe { original::<CoWritev>(node, Callback::CoWritev) }) else {
        return -libc::ENOMEDIUM;
    };
    let issue = |source: Source, flags| {
        // A part of a request of whole sectors is cut at a multiple of 4 MiB: its sectors fit an int as theirs did.
        let sectors = (source.bytes / SECTOR_BYTES) as c_int;
        // SAFETY: as in `co_pwritev`.
        source.whole(|qiov| unsafe { original(node, source.offset / SECTOR_BYTES, sectors, qiov, flags) })
    };
    let source = Source {
        offset: first_sector.saturating_mul(SECTOR_BYTES),
        bytes: i64::from(sectors) * SECTOR_BYTES,
        qiov,
        skip: 0,
    };
    match user(node) {
        None => issue(source, request_flags),
        Some((glue, user)) => write::captured(glue, node, &user, source, request_flags, issue),
    }
}

unsafe extern "C" fn co_pwritev_compressed_part(
    node: *mut BlockDriverState,
    offset: i64,
    bytes: i64,
    qiov: *mut QemuIoVector,
    skip: usize,
) -> c_int {
    // SAFETY: QEMU calls this through the table of the node's driver.
    let callback = unsafe { original::<CoPwritevCompressedPart>(node, Callback::CoPwritevCompressedPart) };
    let Some(original) = callback else { return -libc::ENOTSUP };
    // SAFETY: as in `co_pwritev_part`.
    let issue =
        |source: Source, _| unsafe { original(node, source.offset, source.bytes, source.qiov, source.skip) };
    let source = Source { offset, bytes, qiov, skip };
    match user(node) {
        None => issue(source, 0),
        Some((glue, user)) => write::captured(glue, node, &user, source, 0, issue),
    }
}

unsafe extern "C" fn co_pwritev_compressed(
    node: *mut BlockDriverState,
    offset: i64,
    bytes: i64,
    qiov: *mut QemuIoVector,
) -> c_int {
    // SAFETY: QEMU calls this through the table of the node's driver.
    let callback = unsafe { original::<CoPwritevCompressed>(node, Callback::CoPwritevCompressed) };
    let Some(original) = callback else { return -libc::ENOTSUP };
    let issue = |source: Source, _| {
        // SAFETY: as in `co_pwritev`.
        source.whole(|qiov| unsafe { original(node, source.offset, source.bytes, qiov) })
    };
    let source = Source { offset, bytes, qiov, skip: 0 };
    match user(node) {
        None => issue(source, 0),
        Some((glue, user)) => write::captured(glue, node, &user, source, 0, issue),
    }
}

unsafe extern "C" fn co_pwrite_zeroes(
    node: *mut BlockDriverState,
    offset: i64,
    bytes: i64,
    request_flags: c_int,
) -> c_int {
    // SAFETY: QEMU calls this through the table of the node's driver.
    let Some(original) = (unsafe { original::<CoPwriteZeroes>(node, Callback::CoPwriteZeroes) }) else {
        return -libc::ENOTSUP;
    };
    // SAFETY: QEMU's own arguments.
    let issue = || unsafe { original(node, offset, bytes, request_flags) };
    let unchanged = request_flags & flags::WRITE_UNCHANGED != 0;
    match user(node) {
        Some((glue, user)) if !unchanged => {
            let kind = Kind::Zero {
                fua: request_flags & flags::FUA != 0,
                may_unmap: request_flags & flags::MAY_UNMAP != 0,
            };
            write::range(glue, node, &user, kind, (offset, bytes), request_flags, issue)
        }
        _ => issue(),
    }
}

unsafe extern "C" fn co_pdiscard(node: *mut BlockDriverState, offset: i64, bytes: i64) -> c_int {
    let Some(glue) = glue() else { return -libc::ENOTSUP };
    let issue = || {
        // SAFETY: QEMU calls this through the table of the node's driver; its own arguments.
        if let Some(original) = unsafe { original::<CoPdiscard>(node, Callback::CoPdiscard) } {
            // SAFETY: as above.
            return unsafe { original(node, offset, bytes) };
        }
        // SAFETY: as above.
        let Some(original) = (unsafe { original::<AioPdiscard>(node, Callback::AioPdiscard) }) else {
            return -libc::ENOTSUP;
        };
        wait_for(glue, |done, context| {
            // The block layer keeps discards below 2 GiB for drivers that take an int.
            let bytes = c_int::try_from(bytes).unwrap_or(c_int::MAX);
            // SAFETY: as above; `done` and `context` stay until the completion was called.
            unsafe { original(node, offset, bytes, done, context) }
        })
    };
    match user(node) {
        None => issue(),
        Some((glue, user)) => write::range(glue, node, &user, Kind::Discard, (offset, bytes), 0, issue),
    }
}

unsafe extern "C" fn co_truncate(
    node: *mut BlockDriverState,
    length: i64,
    exact: bool,
    preallocation: c_int,
    request_flags: c_int,
    error: *mut *mut QemuError,
) -> c_int {
    // SAFETY: QEMU calls this through the table of the node's driver.
    let Some(original) = (unsafe { original::<CoTruncate>(node, Callback::CoTruncate) }) else {
        return -libc::ENOTSUP;
    };
    // SAFETY: QEMU's own arguments.
    let issue = || unsafe { original(node, length, exact, preallocation, request_flags, error) };
    match user(node) {
        None => issue(),
        Some((glue, user)) => write::resize(glue, &user, length, issue),
    }
}

/// Copying inside the storage passes our buffers by: captured nodes say that they cannot, and the block layer
/// reads and writes instead.
unsafe extern "C" fn co_copy_range_to(
    node: *mut BlockDriverState,
    source: *mut BdrvChild,
    source_offset: i64,
    target: *mut BdrvChild,
    target_offset: i64,
    bytes: i64,
    read_flags: c_int,
    write_flags: c_int,
) -> c_int {
    if user(node).is_some() {
        return -libc::ENOTSUP;
    }
    // SAFETY: QEMU calls this through the table of the node's driver.
    match unsafe { original::<CoCopyRange>(node, Callback::CoCopyRangeTo) } {
        // SAFETY: QEMU's own arguments.
        Some(original) => unsafe {
            original(node, source, source_offset, target, target_offset, bytes, read_flags, write_flags)
        },
        None => -libc::ENOTSUP,
    }
}

fn record_flush(node: *mut BlockDriverState) {
    if let Some((glue, user)) = user(node)
        && let Some(capture) = user.capture()
    {
        write::wait_durable(glue, capture, capture.flush());
    }
}

/// Runs at the start of every guest flush.
unsafe extern "C" fn co_flush_to_os(node: *mut BlockDriverState) -> c_int {
    record_flush(node);
    // SAFETY: QEMU calls this through the table of the node's driver.
    match unsafe { original::<OnNode>(node, Callback::CoFlushToOs) } {
        // SAFETY: QEMU's own argument.
        Some(original) => unsafe { original(node) },
        None => 0,
    }
}

unsafe extern "C" fn co_flush(node: *mut BlockDriverState) -> c_int {
    record_flush(node);
    // SAFETY: QEMU calls this through the table of the node's driver.
    match unsafe { original::<OnNode>(node, Callback::CoFlush) } {
        // SAFETY: QEMU's own argument.
        Some(original) => unsafe { original(node) },
        None => -libc::ENOMEDIUM,
    }
}

/// Runs `change`, which changes the disk's contents behind the guest's back: all of it is unknown from before the
/// first change until it has been read again after the last. Reading it back meanwhile would find a driver's tables half
/// changed.
fn contents_change_now<T>(user: Option<&User>, change: impl FnOnce() -> T) -> T {
    let capture = user.and_then(User::capture);
    if let Some(capture) = capture {
        capture.begin_contents_change();
    }
    let answer = change();
    if let Some(capture) = capture {
        capture.end_contents_change();
    }
    answer
}

/// As [`contents_change_now`], in the main thread, for a change that is a part of a command: it ends with the command. (HMP's
/// `commit` empties an image while its backing file is hidden below a node of size 0: until it ends, the disk reads as
/// zeroes.)
fn contents_change<T>(user: Option<User>, change: impl FnOnce() -> T) -> T {
    if let Some(capture) = user.as_ref().and_then(User::capture) {
        capture.begin_contents_change();
    }
    let answer = change();
    if let Some((glue, user)) = glue().zip(user) {
        mainloop::schedule_at_rest(glue, move || {
            if let Some(capture) = user.capture() {
                capture.end_contents_change();
            }
        });
    }
    answer
}

unsafe extern "C" fn make_empty(node: *mut BlockDriverState) -> c_int {
    // SAFETY: QEMU calls this through the table of the node's driver.
    let Some(original) = (unsafe { original::<OnNode>(node, Callback::MakeEmpty) }) else {
        return -libc::ENOTSUP;
    };
    // SAFETY: QEMU's own argument.
    contents_change(user_in_main_thread(node), || unsafe { original(node) })
}

unsafe extern "C" fn snapshot_goto(node: *mut BlockDriverState, snapshot: *const c_char) -> c_int {
    // SAFETY: QEMU calls this through the table of the node's driver.
    let Some(original) = (unsafe { original::<SnapshotGoto>(node, Callback::SnapshotGoto) }) else {
        return -libc::ENOTSUP;
    };
    // SAFETY: QEMU's own arguments.
    contents_change(user_in_main_thread(node), || unsafe { original(node, snapshot) })
}

/// Another QEMU has written to the image, and this one takes it over.
unsafe extern "C" fn co_invalidate_cache(node: *mut BlockDriverState, error: *mut *mut QemuError) {
    // SAFETY: QEMU calls this through the table of the node's driver.
    if let Some(original) = unsafe { original::<CoInvalidateCache>(node, Callback::CoInvalidateCache) } {
        let user = user(node).map(|(_, user)| user);
        // SAFETY: QEMU's own arguments.
        contents_change_now(user.as_ref(), || unsafe { original(node, error) });
    }
}

/// Edges below a node change, or a job takes hold of it: in the midst of a command, which may still take it back. Main thread.
unsafe extern "C" fn child_perm(
    node: *mut BlockDriverState,
    edge: *mut BdrvChild,
    role: c_uint,
    reopen_queue: *mut c_void,
    permissions: u64,
    shared: u64,
    needed: *mut u64,
    needed_shared: *mut u64,
) {
    // SAFETY: QEMU calls this through the table of the node's driver, which has the callback, or it would not be ours.
    if let Some(original) = unsafe { original::<ChildPerm>(node, Callback::ChildPerm) } {
        // SAFETY: QEMU's own arguments.
        unsafe { original(node, edge, role, reopen_queue, permissions, shared, needed, needed_shared) };
    }
    if let Some(glue) = glue() {
        graph::look_soon(glue);
    }
}

/// A section begins in which a node has no request in flight: nodes may change. Main thread.
unsafe extern "C" fn drain_begin(node: *mut BlockDriverState) {
    if let Some(glue) = glue() {
        graph::look_around(glue);
    }
    // SAFETY: QEMU calls this through the table of the node's driver.
    if let Some(original) = unsafe { original::<OnDrain>(node, Callback::DrainBegin) } {
        // SAFETY: QEMU's own argument.
        unsafe { original(node) };
    }
}

/// The section ends, and requests go on. Main thread.
unsafe extern "C" fn drain_end(node: *mut BlockDriverState) {
    // SAFETY: QEMU calls this through the table of the node's driver.
    if let Some(original) = unsafe { original::<OnDrain>(node, Callback::DrainEnd) } {
        // SAFETY: QEMU's own argument.
        unsafe { original(node) };
    }
    if let Some(glue) = glue() {
        graph::look_around(glue);
    }
}

/// Turns capture off because the disk can change in a way that is not seen here.
fn give_up(user: Option<User>, why: &str) {
    if let Some(capture) = user.as_ref().and_then(User::capture) {
        capture.fault(why);
    }
}

/// Migration hands the disk to another QEMU, which may write to it from now on.
unsafe extern "C" fn inactivate(node: *mut BlockDriverState) -> c_int {
    give_up(
        user_in_main_thread(node),
        "the disk was handed over to another QEMU (migration): protect it there",
    );
    // SAFETY: QEMU calls this through the table of the node's driver.
    match unsafe { original::<OnNode>(node, Callback::Inactivate) } {
        // SAFETY: QEMU's own argument.
        Some(original) => unsafe { original(node) },
        None => 0,
    }
}

const ZONED: &str = "the guest uses zone commands, which are not captured: unprotect this disk";

unsafe extern "C" fn co_zone_mgmt(
    node: *mut BlockDriverState,
    operation: c_int,
    offset: i64,
    bytes: i64,
) -> c_int {
    give_up(user(node).map(|(_, user)| user), ZONED);
    // SAFETY: QEMU calls this through the table of the node's driver.
    match unsafe { original::<CoZoneMgmt>(node, Callback::CoZoneMgmt) } {
        // SAFETY: QEMU's own arguments.
        Some(original) => unsafe { original(node, operation, offset, bytes) },
        None => -libc::ENOTSUP,
    }
}

unsafe extern "C" fn co_zone_append(
    node: *mut BlockDriverState,
    offset: *mut i64,
    qiov: *mut QemuIoVector,
    request_flags: c_int,
) -> c_int {
    give_up(user(node).map(|(_, user)| user), ZONED);
    // SAFETY: QEMU calls this through the table of the node's driver.
    match unsafe { original::<CoZoneAppend>(node, Callback::CoZoneAppend) } {
        // SAFETY: QEMU's own arguments.
        Some(original) => unsafe { original(node, offset, qiov, request_flags) },
        None => -libc::ENOTSUP,
    }
}

const PASS_THROUGH: &str = "the guest sends SCSI commands straight to the device, which are not captured: use scsi-hd, or unprotect it";

unsafe extern "C" fn co_ioctl(node: *mut BlockDriverState, request: c_ulong, buffer: *mut c_void) -> c_int {
    if request == SG_IO {
        give_up(user(node).map(|(_, user)| user), PASS_THROUGH);
    }
    // SAFETY: QEMU calls this through the table of the node's driver.
    match unsafe { original::<CoIoctl>(node, Callback::CoIoctl) } {
        // SAFETY: QEMU's own arguments.
        Some(original) => unsafe { original(node, request, buffer) },
        None => -libc::ENOTSUP,
    }
}

unsafe extern "C" fn aio_ioctl(
    node: *mut BlockDriverState,
    request: c_ulong,
    buffer: *mut c_void,
    done: Completion,
    context: *mut c_void,
) -> *mut c_void {
    if request == SG_IO {
        give_up(user(node).map(|(_, user)| user), PASS_THROUGH);
    }
    // SAFETY: QEMU calls this through the table of the node's driver.
    match unsafe { original::<AioIoctl>(node, Callback::AioIoctl) } {
        // SAFETY: QEMU's own arguments.
        Some(original) => unsafe { original(node, request, buffer, done, context) },
        None => std::ptr::null_mut(),
    }
}

/// A coroutine that waits for the completion of an `aio_` callback; lives on its stack.
struct Waiting {
    coroutine: *mut Coroutine,
    wake: unsafe extern "C" fn(*mut Coroutine),
    answer: Cell<c_int>,
}

unsafe extern "C" fn completed(context: *mut c_void, answer: c_int) {
    // SAFETY: the `Waiting` of `wait_for`, which stays until we wake its coroutine.
    let waiting = unsafe { &*context.cast::<Waiting>() };
    waiting.answer.set(answer);
    let (wake, coroutine) = (waiting.wake, waiting.coroutine);
    // SAFETY: the coroutine has yielded or is about to: `aio_co_wake` allows both.
    unsafe { wake(coroutine) };
}

/// Starts an `aio_` request and yields until it has completed, as the block layer does.
fn wait_for(glue: &Glue, start: impl FnOnce(Completion, *mut c_void) -> *mut c_void) -> c_int {
    // SAFETY: takes nothing; we are in a coroutine.
    let coroutine = unsafe { (glue.symbols.qemu_coroutine_self)() };
    let waiting =
        Waiting { coroutine, wake: glue.symbols.aio_co_wake, answer: Cell::new(-libc::EINPROGRESS) };
    let context = (&raw const waiting).cast_mut().cast::<c_void>();
    if start(completed, context).is_null() {
        return -libc::EIO;
    }
    // SAFETY: we are in a coroutine, and `completed` wakes it.
    unsafe { (glue.symbols.qemu_coroutine_yield)() };
    waiting.answer.get()
}
