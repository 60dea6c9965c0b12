//! The life of one captured request: begin, copy, issue from the copy, finish.

use std::ffi::c_int;

use journal_format::ByteRange;

use super::Glue;
use super::parts::Call;
use super::slots::User;
use super::types::{BlockDriverState, QemuIoVector, flags};
use crate::engine::{Begin, Capture, InFlight, Kind, MAX_WRITE_BYTES, Outcome, Request, SyncWait, WaitToken};
use crate::ffi::copy;

/// Longest part of a write that is captured as one request, in bytes.
const MAX_PART_BYTES: i64 = MAX_WRITE_BYTES as i64;

/// Most pieces that a part can have.
pub(crate) const MAX_PIECES: usize = capture_ring::limits::MAX_PIECES as usize;

/// Longest scatter list that QEMU builds (`IOV_MAX`).
const MAX_IOV: usize = 1024;

/// The data of a write: `bytes` bytes of `qiov` from byte `skip` on, for the disk at `offset`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Source {
    pub(crate) offset: i64,
    pub(crate) bytes: i64,
    pub(crate) qiov: *mut QemuIoVector,
    pub(crate) skip: usize,
}

impl Source {
    /// `bytes` bytes of it, `done` bytes further on.
    fn part(self, done: i64, bytes: i64) -> Self {
        Self {
            offset: self.offset.saturating_add(done),
            bytes,
            qiov: self.qiov,
            skip: self.skip.saturating_add(done as usize),
        }
    }

    /// Calls `issue` with a scatter list of just these bytes, for callbacks that take no `skip`.
    pub(crate) fn whole(self, issue: impl FnOnce(*mut QemuIoVector) -> c_int) -> c_int {
        // SAFETY: QEMU's scatter list of a request in flight.
        let size = unsafe { (*self.qiov).size };
        if self.skip == 0 && size as u64 == self.bytes as u64 { issue(self.qiov) } else { self.sliced(issue) }
    }

    /// Its own frame, because its list is 16 KiB.
    #[inline(never)]
    fn sliced(self, issue: impl FnOnce(*mut QemuIoVector) -> c_int) -> c_int {
        let mut slice = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; MAX_IOV];
        let (mut skip, mut left, mut used) = (self.skip, self.bytes as usize, 0);
        for entry in self.entries() {
            if skip >= entry.iov_len {
                skip -= entry.iov_len;
                continue;
            }
            let Some(free) = slice.get_mut(used) else { return -libc::EINVAL };
            let length = left.min(entry.iov_len - skip);
            *free = libc::iovec { iov_base: entry.iov_base.wrapping_byte_add(skip), iov_len: length };
            (skip, left, used) = (0, left - length, used + 1);
            if left == 0 {
                break;
            }
        }
        let Some(slice) = slice.get_mut(..used) else { return -libc::EINVAL };
        let mut list = QemuIoVector::over(slice, self.bytes as usize);
        issue(&raw mut list)
    }

    pub(crate) fn entries(&self) -> &[libc::iovec] {
        // SAFETY: QEMU's scatter list of a request in flight.
        let list = unsafe { &*self.qiov };
        let count = usize::try_from(list.niov).unwrap_or(0);
        if count == 0 {
            return &[];
        }
        // SAFETY: it has that many entries, and nobody changes them while the request is in flight.
        unsafe { std::slice::from_raw_parts(list.iov, count) }
    }
}

/// Issues a write to a protected disk, from the ring's copy where there is one.
pub(crate) fn captured(
    glue: &Glue,
    node: *mut BlockDriverState,
    user: &User,
    source: Source,
    request_flags: c_int,
    issue: impl Fn(Source, c_int) -> c_int,
) -> c_int {
    let Some(capture) = user.capture() else {
        user.note(glue, source.offset, source.bytes);
        return issue(source, request_flags);
    };
    if source.bytes <= 0 || request_flags & flags::WRITE_UNCHANGED != 0 {
        return issue(source, request_flags);
    }
    let call = Call { glue, capture, node };
    if source.offset as u64 >= capture.disk_bytes() && !call.is_request() {
        return issue(source, request_flags);
    }
    let fua = request_flags & flags::FUA != 0;
    if let Some(split) = call.split_of_write(source.offset, source.bytes, fua) {
        return call.write(split, source, request_flags, &issue);
    }
    if source.bytes <= MAX_PART_BYTES {
        return captured_part(glue, capture, source, request_flags, &issue);
    }
    capture.begin_large();
    let answer = in_parts(&call, source, request_flags, &issue);
    capture.end_large();
    answer
}

/// Issues a write that may be longer than a record can hold in parts, one after another.
pub(crate) fn in_parts(
    call: &Call<'_>,
    source: Source,
    request_flags: c_int,
    issue: &impl Fn(Source, c_int) -> c_int,
) -> c_int {
    let mut done = 0;
    while done < source.bytes {
        let part = source.part(done, MAX_PART_BYTES.min(source.bytes - done));
        let answer = captured_part(call.glue, call.capture, part, request_flags, issue);
        if answer < 0 {
            return answer;
        }
        done += part.bytes;
    }
    0
}

fn captured_part(
    glue: &Glue,
    capture: &Capture,
    source: Source,
    request_flags: c_int,
    issue: &impl Fn(Source, c_int) -> c_int,
) -> c_int {
    let kind = Kind::Write { fua: request_flags & flags::FUA != 0 };
    let mut in_flight = InFlight::default();
    begin(glue, capture, kind, source.offset, source.bytes, &mut in_flight);
    let mut list = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; MAX_PIECES];
    let answer = match copied(&in_flight, source, &mut list) {
        Some(mut qiov) => {
            let copy = Source { qiov: &raw mut qiov, skip: 0, ..source };
            issue(copy, request_flags & !flags::REGISTERED_BUF)
        }
        None => issue(source, request_flags),
    };
    let outcome = if answer >= 0 { Outcome::Succeeded } else { Outcome::Failed };
    capture.finish(&mut in_flight, outcome);
    wait_durable(glue, capture, in_flight.sync_wait());
    answer
}

/// With sync mode on, waits until a flush, or a write with FUA, is durable at the server.
pub(crate) fn wait_durable(glue: &Glue, capture: &Capture, wait: Option<SyncWait>) {
    let Some(mut wait) = wait else { return };
    // SAFETY: takes nothing; every flush and write runs in a coroutine.
    let token = WaitToken(unsafe { (glue.symbols.qemu_coroutine_self)() } as usize);
    while capture.wait_durable(&mut wait, token) == Begin::Wait {
        // SAFETY: we are in a coroutine, and the engine wakes it with the token.
        unsafe { (glue.symbols.qemu_coroutine_yield)() };
    }
}

/// Copies the guest's data into the request's pieces and makes `list` a scatter list of them; `None` when the
/// request has no pieces and is issued from the guest's buffers.
fn copied(
    in_flight: &InFlight,
    source: Source,
    list: &mut [libc::iovec; MAX_PIECES],
) -> Option<QemuIoVector> {
    let pieces = in_flight.pieces();
    if pieces.is_empty() {
        return None;
    }
    let entries = source.entries();
    // SAFETY: the entries are the guest's buffers of a request in flight, the pieces those of a request that has
    // begun and not finished.
    unsafe { copy::copy_in(pieces, entries.as_ptr(), entries.len(), source.skip) };
    for (entry, piece) in list.iter_mut().zip(pieces) {
        *entry = libc::iovec { iov_base: piece.ptr.as_ptr().cast(), iov_len: piece.len };
    }
    let used = list.get_mut(..pieces.len())?;
    Some(QemuIoVector::over(used, source.bytes as usize))
}

/// Issues zeroes or a discard to a protected disk.
pub(crate) fn range(
    glue: &Glue,
    node: *mut BlockDriverState,
    user: &User,
    kind: Kind,
    (offset, length): (i64, i64),
    request_flags: c_int,
    issue: impl FnOnce() -> c_int,
) -> c_int {
    let Some(capture) = user.capture() else {
        user.note(glue, offset, length);
        return issue();
    };
    let Some(part) = ByteRange::new(offset as u64, length as u64) else {
        capture.fault("a request lies beyond 256 TiB, which no disk reaches");
        return issue();
    };
    if part.is_empty() {
        return issue();
    }
    Call { glue, capture, node }.range(kind, part, request_flags, issue)
}

/// Issues a change of size to a protected disk.
pub(crate) fn resize(glue: &Glue, user: &User, length: i64, issue: impl FnOnce() -> c_int) -> c_int {
    let Some(capture) = user.capture() else {
        user.note(glue, 0, length);
        return issue();
    };
    let mut in_flight = InFlight::default();
    begin(glue, capture, Kind::Resize, 0, length, &mut in_flight);
    let answer = issue();
    capture.finish(&mut in_flight, if answer >= 0 { Outcome::Succeeded } else { Outcome::Failed });
    answer
}

/// Waits until no request in flight overlaps and, where the policy says so, for room in the ring.
fn begin(glue: &Glue, capture: &Capture, kind: Kind, offset: i64, length: i64, in_flight: &mut InFlight) {
    let request = Request { kind, offset: offset as u64, length: length as u64 };
    // SAFETY: takes nothing; every request runs in a coroutine.
    let token = WaitToken(unsafe { (glue.symbols.qemu_coroutine_self)() } as usize);
    while capture.begin(&request, token, in_flight) == Begin::Wait {
        // SAFETY: we are in a coroutine, and the engine wakes it with the token.
        unsafe { (glue.symbols.qemu_coroutine_yield)() };
    }
}
