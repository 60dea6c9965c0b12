//! The functions of the C interface.
//!
//! Every pointer's precondition is the one of `include/cdp_filter.h`: it is NULL, which is refused, or points to
//! what its type says, valid for the call (a handle: until it is closed; a request: from begin to end).

use std::ffi::{CStr, c_char, c_int};
use std::mem::MaybeUninit;
use std::path::PathBuf;
use std::sync::Arc;

use journal_format::limits::MAX_DISK_BYTES;

use super::copy::copy_in;
use super::device::{Callbacks, ControlThread, Device};
use super::error::{Failure, boundary, last_error};
use super::futex::Waiter;
use super::types::{
    CDP_ABI_VERSION, CDP_FUA, CDP_MAY_UNMAP, CDP_MODE_CAPTURING, CDP_MODE_OFF, CDP_MODE_TRACKING,
    CDP_NONBLOCK, cdp_capture, cdp_options, cdp_request, cdp_status,
};
use crate::control::{Identity, socket_path};
use crate::engine::{
    Begin, Capture, InFlight, Kind, MAX_WRITE_BYTES, Mode, Outcome, Phase, Request, SyncWait,
};

/// In a live handle; wiped by `cdp_close`, so that most uses after it are refused.
const HANDLE_MAGIC: u64 = u64::from_le_bytes(*b"cdp-hndl");
/// In a request that has begun.
const REQUEST_MAGIC: u64 = u64::from_le_bytes(*b"cdp-rqst");

/// What a `cdp_request` holds.
#[repr(C)]
struct Begun {
    magic: u64,
    /// The capture of the moment when it began, or null.
    capture: *const Capture,
    phase: Phase,
    /// New size, for a resize.
    resize: Option<u64>,
    in_flight: InFlight,
}

const _: () =
    assert!(std::mem::offset_of!(cdp_options, size) == 0 && std::mem::offset_of!(cdp_status, size) == 0);
const _: () = assert!(size_of::<Begun>() <= size_of::<cdp_request>());
const _: () = assert!(align_of::<Begun>() <= align_of::<cdp_request>());

/// The version of the interface that the library has: compare with CDP_ABI_VERSION.
#[unsafe(no_mangle)]
pub extern "C" fn cdp_abi_version() -> u32 {
    CDP_ABI_VERSION
}

/// The text of this thread's last failed call, in words for an operator. Valid until the thread's next call.
#[unsafe(no_mangle)]
pub extern "C" fn cdp_last_error() -> *const c_char {
    last_error()
}

/// Opens a disk: tells the agent that it exists, and lets the agent switch capture on and off. It returns at once,
/// whether or not an agent is there. 0 and a handle in `*out`, or a negative errno.
///
/// # Safety
/// `options` and `out` are NULL or point to what their types say.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cdp_open(options: *const cdp_options, out: *mut *mut cdp_capture) -> c_int {
    boundary(|| {
        if out.is_null() {
            return Err(Failure::invalid("out is NULL"));
        }
        // SAFETY: NULL is refused inside; otherwise a `cdp_options` of the size that it says.
        let options = unsafe { read_options(options) }?;
        // SAFETY: the texts of the caller's options are NULL or end with a NUL.
        let (device, socket) = unsafe { device_of(&options) }?;
        let control = ControlThread::start(&device, socket)?;
        let handle = Box::new(cdp_capture { magic: HANDLE_MAGIC, device, control });
        // SAFETY: `out` is not NULL, so it points to a place for the handle.
        unsafe { out.write(Box::into_raw(handle)) };
        Ok(())
    })
}

/// Copies the caller's options; fields that an older caller does not know are zero.
///
/// # Safety
/// As `cdp_open`.
unsafe fn read_options(options: *const cdp_options) -> Result<cdp_options, Failure> {
    if options.is_null() {
        return Err(Failure::invalid("options is NULL"));
    }
    // SAFETY: not NULL; every version of the structure starts with its size.
    let size = unsafe { options.cast::<usize>().read() };
    let least = std::mem::offset_of!(cdp_options, opaque) + size_of::<*const u8>();
    if size < least {
        return Err(Failure::invalid("options.size is smaller than the first version of the structure"));
    }
    let mut copy = MaybeUninit::<cdp_options>::zeroed();
    let bytes = size.min(size_of::<cdp_options>());
    // SAFETY: the caller's structure has `size` bytes, the copy at least `bytes`, and they are not the same memory.
    unsafe { std::ptr::copy_nonoverlapping(options.cast::<u8>(), copy.as_mut_ptr().cast::<u8>(), bytes) };
    // SAFETY: all fields are integers, raw pointers and optional functions, for which any copied or zero bytes of a
    // C structure of this type are valid.
    let options = unsafe { copy.assume_init() };
    if options.version == 0 || options.reserved != 0 {
        return Err(Failure::invalid(
            "options.version is 0 or options.reserved is not; set version to CDP_ABI_VERSION",
        ));
    }
    Ok(options)
}

/// # Safety
/// The pointers in the options are NULL or point to texts and 16 bytes of UUID.
unsafe fn device_of(options: &cdp_options) -> Result<(Arc<Device>, PathBuf), Failure> {
    // SAFETY: the caller's promise, for each of the three texts.
    let text = |pointer: *const c_char| unsafe { text_of(pointer) };
    let name = text(options.device)?.filter(|name| !name.is_empty());
    let name =
        name.ok_or_else(|| Failure::invalid("options.device is NULL or empty; give the disk a name"))?;
    let program = std::env::current_exe().unwrap_or_default();
    let program = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let vm_name = text(options.vm_name)?.unwrap_or_else(|| format!("{program}-{}", std::process::id()));
    let vm_uuid = if options.vm_uuid.is_null() {
        [0; 16]
    } else {
        // SAFETY: not NULL, so it points to 16 bytes; byte arrays need no alignment.
        unsafe { options.vm_uuid.cast::<[u8; 16]>().read() }
    };
    let identity =
        Identity { program, qemu_version: String::new(), vm_name, vm_uuid, refused: String::new() };
    let callbacks = Callbacks::new(options.pread, options.block_status, options.opaque)?;
    let socket = text(options.socket_path)?.map_or_else(socket_path, PathBuf::from);
    Ok((Arc::new(Device::new(identity, name, options.disk_bytes, callbacks)), socket))
}

/// # Safety
/// NULL or a text that ends with a NUL.
unsafe fn text_of(pointer: *const c_char) -> Result<Option<String>, Failure> {
    if pointer.is_null() {
        return Ok(None);
    }
    // SAFETY: not NULL, so it is a text.
    let text = unsafe { CStr::from_ptr(pointer) };
    let text = text.to_str().map_err(|_| Failure::invalid("a text of the options is not UTF-8"))?;
    Ok(Some(text.to_owned()))
}

/// Ends capture in order and frees the handle. Every request has to have ended; `-EBUSY` when one has not. Takes up
/// to two seconds.
///
/// # Safety
/// A handle from `cdp_open`, not closed, and no other thread uses it any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cdp_close(capture: *mut cdp_capture) -> c_int {
    boundary(|| {
        // SAFETY: NULL is refused inside; otherwise a live handle.
        let handle = unsafe { handle_of(capture) }?;
        if handle.device.in_flight() > 0 {
            return Err(Failure::new(libc::EBUSY, "requests are in flight; end them before cdp_close"));
        }
        // SAFETY: the handle is live and came from `Box::into_raw`; the caller promises that nobody else uses it.
        let mut handle = unsafe { Box::from_raw(capture) };
        handle.magic = 0;
        let cdp_capture { device, control, .. } = *handle;
        // Off before the agent sees the connection end; and again, should it have attached in between.
        let off = device.end_capture();
        control.stop();
        off.and_then(|()| device.end_capture()).map_err(|text| Failure::new(libc::EBUSY, text))
    })
}

/// # Safety
/// NULL or a live handle.
unsafe fn handle_of<'a>(capture: *const cdp_capture) -> Result<&'a cdp_capture, Failure> {
    if capture.is_null() {
        return Err(Failure::invalid("the capture is NULL"));
    }
    // SAFETY: not NULL, so it is a live handle.
    let handle = unsafe { &*capture };
    if handle.magic == HANDLE_MAGIC {
        Ok(handle)
    } else {
        Err(Failure::invalid("this is not an open capture"))
    }
}

/// Begins a write of the `iovcnt` parts of `iov` at `offset`: copies the data and says in `*out_iov` and
/// `*out_iovcnt` what to write to the disk, which is the copy while the disk is captured. That memory is valid until
/// the request ends. Blocks while an overlapping request is in flight, and while the ring is full where the disk's
/// policy is to wait; or answers `-EAGAIN` with CDP_NONBLOCK. At most
/// CDP_MAX_WRITE_BYTES. After 0, `cdp_end` must follow.
///
/// # Safety
/// The pointers are NULL or what their types say; `iov` has `iovcnt` parts.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cdp_write_begin(
    capture: *mut cdp_capture,
    offset: u64,
    iov: *const libc::iovec,
    iovcnt: c_int,
    flags: u32,
    request: *mut cdp_request,
    out_iov: *mut *const libc::iovec,
    out_iovcnt: *mut c_int,
) -> c_int {
    boundary(|| {
        if out_iov.is_null() || out_iovcnt.is_null() {
            return Err(Failure::invalid("out_iov or out_iovcnt is NULL"));
        }
        // SAFETY: the caller's promise about `iov`.
        let parts = unsafe { parts_of(iov, iovcnt) }?;
        let length = parts.iter().map(|part| part.iov_len as u64).fold(0, u64::saturating_add);
        if length > MAX_WRITE_BYTES {
            return Err(Failure::invalid("a write longer than CDP_MAX_WRITE_BYTES; split it"));
        }
        let write = Request::write(offset, length, flags & CDP_FUA != 0);
        // SAFETY: NULL is refused inside; otherwise a live handle and room for a request.
        let begun = unsafe { begin(capture, &write, flags, CDP_FUA | CDP_NONBLOCK, request) }?;
        let pieces = begun.in_flight.pieces();
        let (from, count) = if pieces.is_empty() {
            (iov, iovcnt)
        } else {
            // SAFETY: `parts` describes the caller's memory; the request has begun just now.
            unsafe { copy_in(pieces, parts.as_ptr(), parts.len(), 0) };
            // A piece is laid out as an iovec; see `Piece`.
            (pieces.as_ptr().cast(), pieces.len() as c_int)
        };
        // SAFETY: not NULL, so it points to a place for the list.
        unsafe { out_iov.write(from) };
        // SAFETY: not NULL, so it points to a place for the count.
        unsafe { out_iovcnt.write(count) };
        Ok(())
    })
}

/// # Safety
/// `iov` is NULL or has `iovcnt` parts, which outlive the result.
unsafe fn parts_of<'a>(iov: *const libc::iovec, iovcnt: c_int) -> Result<&'a [libc::iovec], Failure> {
    let count = usize::try_from(iovcnt).map_err(|_| Failure::invalid("iovcnt is negative"))?;
    if count == 0 {
        return Ok(&[]);
    }
    if iov.is_null() {
        return Err(Failure::invalid("iov is NULL"));
    }
    // SAFETY: not NULL, so it has that many parts.
    Ok(unsafe { std::slice::from_raw_parts(iov, count) })
}

/// Begins a request after which `length` bytes at `offset` read as zeroes. Flags: CDP_FUA, CDP_MAY_UNMAP,
/// CDP_NONBLOCK. After 0, `cdp_end` must follow.
///
/// # Safety
/// The pointers are NULL or what their types say.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cdp_zero_begin(
    capture: *mut cdp_capture,
    offset: u64,
    length: u64,
    flags: u32,
    request: *mut cdp_request,
) -> c_int {
    let zero = Request::zero(offset, length, flags & CDP_FUA != 0, flags & CDP_MAY_UNMAP != 0);
    let allowed = CDP_FUA | CDP_MAY_UNMAP | CDP_NONBLOCK;
    // SAFETY: NULL is refused inside; otherwise a live handle and room for a request.
    boundary(|| unsafe { begin(capture, &zero, flags, allowed, request) }.map(drop))
}

/// Begins a discard of `length` bytes at `offset`. Flags: CDP_NONBLOCK. After 0, `cdp_end` must follow.
///
/// # Safety
/// The pointers are NULL or what their types say.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cdp_discard_begin(
    capture: *mut cdp_capture,
    offset: u64,
    length: u64,
    flags: u32,
    request: *mut cdp_request,
) -> c_int {
    let discard = Request::discard(offset, length);
    // SAFETY: NULL is refused inside; otherwise a live handle and room for a request.
    boundary(|| unsafe { begin(capture, &discard, flags, CDP_NONBLOCK, request) }.map(drop))
}

/// Begins a change of the disk's size to `disk_bytes`. Flags: CDP_NONBLOCK. After 0, `cdp_end` must follow.
///
/// # Safety
/// The pointers are NULL or what their types say.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cdp_resize_begin(
    capture: *mut cdp_capture,
    disk_bytes: u64,
    flags: u32,
    request: *mut cdp_request,
) -> c_int {
    let resize = Request::resize(disk_bytes);
    boundary(|| {
        // SAFETY: NULL is refused inside; otherwise a live handle and room for a request.
        unsafe { begin(capture, &resize, flags, CDP_NONBLOCK, request) }?.resize = Some(disk_bytes);
        Ok(())
    })
}

/// # Safety
/// `capture` is NULL or a live handle, `request` NULL or memory for a request that lives until it ends.
unsafe fn begin<'a>(
    capture: *const cdp_capture,
    what: &Request,
    flags: u32,
    allowed: u32,
    request: *mut cdp_request,
) -> Result<&'a mut Begun, Failure> {
    // SAFETY: the caller's promise.
    let handle = unsafe { handle_of(capture) }?;
    if request.is_null() {
        return Err(Failure::invalid("request is NULL"));
    }
    if flags & !allowed != 0 {
        return Err(Failure::invalid("a flag that this request does not have"));
    }
    let end = what.offset.checked_add(what.length);
    let most = if what.kind == Kind::Resize { MAX_DISK_BYTES } else { handle.device.disk_bytes() };
    if end.is_none_or(|end| end > most) {
        return Err(Failure::invalid("beyond the end of the disk, or a disk larger than can be"));
    }
    let (phase, current) = handle.device.enter();
    let place = request.cast::<Begun>();
    let begun =
        Begun { magic: REQUEST_MAGIC, capture: current, phase, resize: None, in_flight: InFlight::default() };
    // SAFETY: not NULL, so it is memory for a `cdp_request`, which has room for and the alignment of a `Begun`.
    unsafe { place.write(begun) };
    // SAFETY: just initialised, and the caller's alone until it ends.
    let begun = unsafe { &mut *place };
    // SAFETY: null, or alive while the request counts in `device`.
    if let Some(current) = unsafe { current.as_ref() }
        && !enter(current, what, flags & CDP_NONBLOCK == 0, &mut begun.in_flight)
    {
        begun.magic = 0;
        handle.device.leave(phase);
        return Err(Failure::new(
            libc::EAGAIN,
            "an overlapping request is in flight, or the ring is full and the policy is to wait; try again later",
        ));
    }
    Ok(begun)
}

/// Begins with the capture; false when it would have to wait and must not.
fn enter(capture: &Capture, what: &Request, may_wait: bool, in_flight: &mut InFlight) -> bool {
    let waiter = Waiter::default();
    while capture.begin(what, waiter.token(), in_flight) == Begin::Wait {
        if !may_wait && capture.withdraw(in_flight) {
            return false;
        }
        waiter.wait();
    }
    true
}

/// With sync mode on, blocks until a flush, or a request with FUA, is durable at the server.
fn wait_durable(capture: &Capture, wait: Option<SyncWait>) {
    let Some(mut wait) = wait else { return };
    let waiter = Waiter::default();
    while capture.wait_durable(&mut wait, waiter.token()) == Begin::Wait {
        waiter.wait();
    }
}

/// Ends a request with the disk's answer: 0 or more, it is done; `-ENOTSUP`, nothing was changed; another negative
/// errno, it failed. Call it before the guest is told. With CDP_FUA and sync mode on it blocks as `cdp_flush` does.
///
/// # Safety
/// `capture` is NULL or the handle that the request began with, `request` NULL or a request that has begun.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cdp_end(
    capture: *mut cdp_capture,
    request: *mut cdp_request,
    result: c_int,
) -> c_int {
    boundary(|| {
        // SAFETY: NULL is refused inside; otherwise a live handle.
        let handle = unsafe { handle_of(capture) }?;
        // SAFETY: NULL, or the caller's memory that a begin has initialised.
        let begun = unsafe { request.cast::<Begun>().as_mut() };
        let begun = begun.filter(|begun| begun.magic == REQUEST_MAGIC);
        let begun = begun.ok_or_else(|| Failure::invalid("the request is NULL or has not begun"))?;
        begun.magic = 0;
        let outcome = match result {
            0.. => Outcome::Succeeded,
            error if error == -libc::ENOTSUP => Outcome::NotDone,
            _ => Outcome::Failed,
        };
        // SAFETY: null, or alive until the request leaves `device` below.
        if let Some(current) = unsafe { begun.capture.as_ref() } {
            current.finish(&mut begun.in_flight, outcome);
            wait_durable(current, begun.in_flight.sync_wait());
        }
        if let (Some(disk_bytes), Outcome::Succeeded) = (begun.resize, outcome) {
            handle.device.set_disk_bytes(disk_bytes);
        }
        handle.device.leave(begun.phase);
        Ok(())
    })
}

/// Marks the beginning of a guest's flush: everything that the guest saw end before has a smaller LSN. With sync mode on
/// it blocks until all that is durable at the server, or the policy's time is over.
///
/// # Safety
/// NULL or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cdp_flush(capture: *mut cdp_capture) -> c_int {
    boundary(|| {
        // SAFETY: NULL is refused inside; otherwise a live handle.
        let handle = unsafe { handle_of(capture) }?;
        let (phase, current) = handle.device.enter();
        // SAFETY: null, or alive while we count in `device`.
        if let Some(current) = unsafe { current.as_ref() } {
            wait_durable(current, current.flush());
        }
        handle.device.leave(phase);
        Ok(())
    })
}

/// Says what the capture is doing. An older caller's shorter structure is filled as far as it goes.
///
/// # Safety
/// `capture` is NULL or a live handle, `status` NULL or a structure whose size is set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cdp_status(capture: *mut cdp_capture, status: *mut cdp_status) -> c_int {
    boundary(|| {
        // SAFETY: NULL is refused inside; otherwise a live handle.
        let handle = unsafe { handle_of(capture) }?;
        if status.is_null() {
            return Err(Failure::invalid("status is NULL"));
        }
        // SAFETY: not NULL; every version of the structure starts with its size.
        let size = unsafe { status.cast::<usize>().read() };
        let mut filled = status_of(&handle.device);
        filled.size = size.min(size_of::<cdp_status>());
        if filled.size < std::mem::offset_of!(cdp_status, disk_bytes) + size_of::<u64>() {
            return Err(Failure::invalid("status.size is smaller than the first version of the structure"));
        }
        let from = (&raw const filled).cast::<u8>();
        // SAFETY: both have that many bytes and are not the same memory.
        unsafe { std::ptr::copy_nonoverlapping(from, status.cast::<u8>(), filled.size) };
        Ok(())
    })
}

fn status_of(device: &Device) -> cdp_status {
    let mut status = cdp_status {
        size: 0,
        mode: CDP_MODE_OFF,
        gap_is_open: 1,
        captured_lsn: 0,
        dirty_bytes: device.disk_bytes(),
        ring_used_bytes: 0,
        in_flight: device.in_flight(),
        disk_bytes: device.disk_bytes(),
    };
    let (phase, current) = device.enter();
    // SAFETY: null, or alive while we count in `device`.
    if let Some(current) = unsafe { current.as_ref() } {
        let now = current.status();
        status.mode = match now.mode {
            Mode::Off => CDP_MODE_OFF,
            Mode::Tracking => CDP_MODE_TRACKING,
            Mode::Capturing => CDP_MODE_CAPTURING,
        };
        status.gap_is_open = u32::from(now.gap_is_open);
        status.captured_lsn = now.captured_lsn.0;
        status.dirty_bytes = now.dirty_bytes;
        status.ring_used_bytes = now.ring_used_bytes;
    }
    device.leave(phase);
    status
}
