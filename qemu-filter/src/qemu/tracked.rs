//! What QEMU knows of a request in flight: the list of a node's tracked requests.
//!
//! A request of a guest has one entry in the list of each node that it passes, from before the first call of the
//! driver until after the last, and the entry names the coroutine in which all those calls are made. So the entry of
//! the coroutine that we are in tells whether a call is all of a request, or one part of it ([`super::parts`]).
//!
//! # The lock
//!
//! The list has a lock, which QEMU itself takes twice for each request, for a few instructions each time. Here it is
//! taken for a walk along the list, by requests that may be a part only: zeroes, discards, writes near the driver's
//! limit ([`may_be_part`]). Other writes look at two numbers. Nothing yields while it is held. In 7.2 a node's requests
//! run in one thread, and the list has a lock of coroutines instead, which is never held across a yield either.

use std::ffi::c_uint;
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

use journal_format::ByteRange;

use super::Glue;
use super::maps::Maps;
use super::types::{BlockDriverState, Coroutine, QemuMutex, TrackedRequest};
use crate::engine::{Kind, MAX_WRITE_BYTES, Standing};

/// `BDRV_TRACKED_WRITE`: writes, and writes of zeroes.
const TRACKED_WRITE: c_uint = 1;
/// `BDRV_TRACKED_DISCARD`.
const TRACKED_DISCARD: c_uint = 2;

/// Most entries that are looked at: far more than a disk has requests in flight.
const MAX_WALK: usize = 1 << 16;

/// Bytes of glibc's `pthread_mutex_t`, which begins with a word that is 0 while it is free. A `QemuMutex` has a flag
/// behind it that is 1 once it is initialised.
const MUTEX_BYTES: usize = 40;

/// A number in a node.
///
/// # Safety
/// The node is live, and has such a number at that offset.
unsafe fn number(node: *mut BlockDriverState, offset: usize) -> u32 {
    let field = node.cast::<u8>().wrapping_add(offset).cast::<AtomicU32>();
    // SAFETY: by the caller's promise; aligned, as the tables are.
    let number = unsafe { &*field };
    // ORDERING: Relaxed: changed while no request is in flight, or by this one's own coroutine before.
    number.load(Ordering::Relaxed)
}

/// Whether a write of so many bytes may be a part of a longer request: near the driver's limit, longer than a record, or
/// while a request is in flight that the block layer pads.
#[inline]
pub(crate) fn may_be_part(glue: &Glue, node: *mut BlockDriverState, bytes: i64) -> bool {
    let layout = &glue.layout.node;
    // SAFETY: the node of a request in flight; the table is proven.
    let most = unsafe { number(node, layout.max_transfer) };
    // SAFETY: as above.
    let serialising = unsafe { number(node, layout.serialising_in_flight) };
    // The limit is rounded down to the node's alignment, which is at most the limit.
    serialising != 0 || bytes > MAX_WRITE_BYTES as i64 || (most != 0 && bytes > i64::from(most / 2))
}

/// Holds the lock of a node's list.
struct Locked<'a> {
    glue: &'a Glue,
    lock: Option<*mut QemuMutex>,
}

impl<'a> Locked<'a> {
    /// The node is live, and nothing yields until the drop.
    fn new(glue: &'a Glue, node: *mut BlockDriverState) -> Self {
        let lock = glue.layout.node.reqs_lock.map(|offset| node.cast::<u8>().wrapping_add(offset).cast());
        if let Some(lock) = lock {
            // SAFETY: the node's own lock, by the proven table.
            unsafe { (glue.symbols.qemu_mutex_lock_impl)(lock, c"qemu-cdp".as_ptr(), 0) };
        }
        Self { glue, lock }
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        if let Some(lock) = self.lock {
            // SAFETY: locked in `new`, by this thread.
            unsafe { (self.glue.symbols.qemu_mutex_unlock_impl)(lock, c"qemu-cdp".as_ptr(), 0) };
        }
    }
}

/// The newest request of a node.
fn newest(glue: &Glue, node: *mut BlockDriverState) -> *const TrackedRequest {
    let field = node.cast::<u8>().wrapping_add(glue.layout.node.tracked_requests);
    // SAFETY: the node is live, and has this pointer there by the table.
    let field = unsafe { &*field.cast::<AtomicPtr<TrackedRequest>>() };
    // ORDERING: Relaxed: under the list's lock, or in the only thread that changes it.
    field.load(Ordering::Relaxed)
}

/// The newest request of a node that `wanted` wants.
fn find(
    glue: &Glue,
    node: *mut BlockDriverState,
    wanted: impl Fn(&TrackedRequest) -> bool,
) -> Option<TrackedRequest> {
    let _locked = Locked::new(glue, node);
    let mut next = newest(glue, node);
    for _ in 0..MAX_WALK {
        // SAFETY: an entry of the list, which its request takes out under the lock before it goes.
        let entry = unsafe { next.as_ref() }?;
        if wanted(entry) {
            return Some(*entry);
        }
        next = entry.next;
    }
    None
}

/// The range of the request that a coroutine is in the midst of. As the guest asked for it, if these are zeroes or a
/// discard, else in whole units of the node.
pub(crate) fn whole(
    glue: &Glue,
    node: *mut BlockDriverState,
    coroutine: *mut Coroutine,
    kind: Kind,
) -> Option<ByteRange> {
    let tracked = if kind == Kind::Discard { TRACKED_DISCARD } else { TRACKED_WRITE };
    let entry = find(glue, node, |entry| entry.coroutine == coroutine && entry.kind == tracked)?;
    ByteRange::new(u64::try_from(entry.offset).ok()?, u64::try_from(entry.bytes).ok()?)
}

/// How the change stands that a coroutine had in flight on a live node, and that ends at `end`. In 7.2 with the node's
/// context locked.
pub(crate) fn standing(
    glue: &Glue,
    node: *mut BlockDriverState,
    coroutine: *mut Coroutine,
    end: u64,
) -> Standing {
    let is_it = |entry: &TrackedRequest| {
        entry.coroutine == coroutine
            && matches!(entry.kind, TRACKED_WRITE | TRACKED_DISCARD)
            && entry.offset.checked_add(entry.bytes).is_some_and(|its| its as u64 == end)
    };
    match find(glue, node, is_it) {
        None => Standing::Over,
        Some(entry) if entry.waiting_for.is_null() => Standing::GoesOn,
        Some(_) => Standing::Waits,
    }
}

/// What is known of the only request of the scratch node while it is in flight.
pub(crate) struct Expected {
    pub(crate) offset: i64,
    pub(crate) bytes: i64,
    pub(crate) max_transfer: u32,
}

/// Compares the table with the scratch node, which has one request in flight, padded, in this coroutine. Follows no
/// pointer that does not lead to memory.
///
/// # Errors
/// What was not as expected.
pub(crate) fn prove(glue: &Glue, node: *mut BlockDriverState, expected: &Expected) -> Result<(), String> {
    let layout = &glue.layout.node;
    let maps = Maps::load().map_err(|error| error.to_string())?;
    let end = layout.tracked_requests + size_of::<usize>();
    if !maps.is_readable(node as usize, end) {
        return Err("a node is smaller than it should be".to_owned());
    }
    // SAFETY: inside the node, which is readable.
    let most = unsafe { number(node, layout.max_transfer) };
    if most != expected.max_transfer {
        return Err(format!("its longest transfer is {} and not {most} bytes", expected.max_transfer));
    }
    // SAFETY: as above.
    let serialising = unsafe { number(node, layout.serialising_in_flight) };
    if serialising != 1 {
        return Err(format!("one of its requests is padded, and not {serialising}"));
    }
    if let Some(lock) = layout.reqs_lock {
        // SAFETY: as above: it lies before the list.
        let word = unsafe { number(node, lock) };
        // SAFETY: as above.
        let flag = unsafe { number(node, lock + MUTEX_BYTES) };
        if word != 0 || flag & 0xff != 1 {
            return Err("its list of requests has no lock".to_owned());
        }
    }
    let entry = newest(glue, node);
    if !(entry as usize).is_multiple_of(8) || !maps.is_readable(entry as usize, size_of::<TrackedRequest>()) {
        return Err("its list of requests leads nowhere".to_owned());
    }
    // SAFETY: readable, aligned, and not changed by another: the scratch node is used by this thread only.
    let entry = unsafe { *entry };
    // SAFETY: takes nothing; we are in a coroutine.
    let coroutine = unsafe { (glue.symbols.qemu_coroutine_self)() };
    let is_only = entry.next.is_null() && entry.waiting_for.is_null();
    let is_ours = entry.node == node && entry.coroutine == coroutine && is_only;
    let as_written =
        (entry.offset, entry.bytes, entry.kind) == (expected.offset, expected.bytes, TRACKED_WRITE);
    if is_ours && as_written && entry.serialising {
        Ok(())
    } else {
        Err("its list of requests does not have the one in flight".to_owned())
    }
}
