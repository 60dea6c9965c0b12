//! The structures of the C interface.
#![allow(non_camel_case_types, reason = "the names are C's")]

use std::ffi::{c_char, c_int, c_void};

/// Version of this interface. A library of a higher version serves callers of a lower one.
pub const CDP_ABI_VERSION: u32 = 1;

/// Force unit access: the data must be durable when the request ends. Only recorded; issuing is the caller's.
pub const CDP_FUA: u32 = 1;
/// Answer `-EAGAIN` instead of blocking when an overlapping request is in flight.
pub const CDP_NONBLOCK: u32 = 2;
/// A zero request may unmap its range.
pub const CDP_MAY_UNMAP: u32 = 4;

/// Largest write of one request, in bytes. Split longer ones and begin and end the parts one after another.
pub const CDP_MAX_WRITE_BYTES: u64 = 4194304;

/// Nothing is recorded: the agent has not switched protection on, or a fault has ended it.
pub const CDP_MODE_OFF: u32 = 0;
/// The ring was full: writes are only noted, and read back when there is room.
pub const CDP_MODE_TRACKING: u32 = 1;
/// Writes are recorded.
pub const CDP_MODE_CAPTURING: u32 = 2;

/// An opened disk. Any thread may use it.
pub struct cdp_capture {
    pub(super) magic: u64,
    pub(super) device: std::sync::Arc<super::device::Device>,
    pub(super) control: super::device::ControlThread,
}

/// One request between begin and end. Its memory is the caller's; a begin initialises it.
#[repr(C)]
pub struct cdp_request {
    /// For the library only.
    pub opaque: [u64; 96],
}

/// Reads `length` bytes of the disk at `offset` into `buffer`, all or nothing: 0, or a negative errno. Called from
/// a thread of the library, while requests of the caller are in flight too.
pub type cdp_pread_fn = Option<
    unsafe extern "C" fn(opaque: *mut c_void, buffer: *mut c_void, length: usize, offset: u64) -> c_int,
>;

/// Says what the disk holds from `offset` on: 1 when the first `*known` of the `length` bytes read as zeroes for
/// sure, 0 when they may hold data, a negative errno when that cannot be said. `*known` is at least 1.
pub type cdp_block_status_fn =
    Option<unsafe extern "C" fn(opaque: *mut c_void, offset: u64, length: u64, known: *mut u64) -> c_int>;

/// What to open. Zero it, set `size` to its size and `version` to CDP_ABI_VERSION, then the rest.
#[repr(C)]
pub struct cdp_options {
    /// `sizeof(struct cdp_options)`.
    pub size: usize,
    /// CDP_ABI_VERSION as the caller was compiled with.
    pub version: u32,
    /// 0.
    pub reserved: u32,
    /// Where the host's agent listens; NULL for $CDP_AGENT_SOCKET or /run/qemu-cdp/agent.sock.
    pub socket_path: *const c_char,
    /// Name of the VM; NULL for the program's name and process id.
    pub vm_name: *const c_char,
    /// The 16 bytes of the VM's UUID; NULL when it has none.
    pub vm_uuid: *const u8,
    /// Name of the device within the VM.
    pub device: *const c_char,
    /// Size of the disk in bytes.
    pub disk_bytes: u64,
    /// Reads the disk for the initial sync and resyncs.
    pub pread: cdp_pread_fn,
    /// Finds holes; may be NULL: then everything is read.
    pub block_status: cdp_block_status_fn,
    /// Handed to the two functions.
    pub opaque: *mut c_void,
}

/// What a capture is doing. Set `size` before the call.
#[repr(C)]
pub struct cdp_status {
    /// `sizeof(struct cdp_status)`.
    pub size: usize,
    /// CDP_MODE_OFF, CDP_MODE_TRACKING or CDP_MODE_CAPTURING.
    pub mode: u32,
    /// 1 while history has a gap: its points are not restorable.
    pub gap_is_open: u32,
    /// The last LSN given to a record; 0 before the first.
    pub captured_lsn: u64,
    /// Bytes of disk that history does not have yet.
    pub dirty_bytes: u64,
    /// Bytes of the ring in use.
    pub ring_used_bytes: u64,
    /// Requests between begin and end.
    pub in_flight: u64,
    /// Size of the disk in bytes.
    pub disk_bytes: u64,
}
