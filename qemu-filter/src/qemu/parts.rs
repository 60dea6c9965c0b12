//! One call of a driver that is a part of a guest's request, or may be: finds the whole request and makes its parts one
//! request of the engine ([`crate::engine::Split`]).
//!
//! What the parts of one request can be, by QEMU's `block/io.c`:
//!
//! | request | calls, in this order |
//! | --- | --- |
//! | write | data, each at most as long as the driver takes |
//! | zeroes | perhaps data: the first bytes padded to the node's unit; then zeroes, cut at the driver's unit and limit, each of which comes again as data where the driver answers -ENOTSUP; then perhaps data: the padded last bytes. With `detect-zeroes`, padded bytes that are all 0 come as zeroes |
//! | discard | discards, cut in the same way; -ENOTSUP is passed over |
//!
//! The data of a request of zeroes lies in QEMU's own buffers, so it needs no copy. It is looked at all the same: a
//! record of zeroes is written only for bytes that were 0.

use std::ffi::c_int;

use journal_format::ByteRange;

use super::types::{Coroutine, QemuIoVector, flags};
use super::write::{self, MAX_PIECES, Source};
use super::{Glue, tracked, types::BlockDriverState};
use crate::engine::{Begin, Capture, Kind, PartEnd, Piece, Request, Split, WaitToken};
use crate::ffi::copy;

/// A call of the driver of a protected disk.
#[derive(Clone, Copy)]
pub(crate) struct Call<'a> {
    pub(crate) glue: &'a Glue,
    pub(crate) capture: &'a Capture,
    pub(crate) node: *mut BlockDriverState,
}

impl Call<'_> {
    fn coroutine(&self) -> *mut Coroutine {
        // SAFETY: takes nothing; every request runs in a coroutine.
        unsafe { (self.glue.symbols.qemu_coroutine_self)() }
    }

    fn token(&self) -> WaitToken {
        WaitToken(self.coroutine() as usize)
    }

    /// Whether a write behind the disk's end is a request of a guest's, because the disk has just grown; else it is the
    /// VM's state, which `savevm` keeps there.
    #[cold]
    pub(crate) fn is_request(&self) -> bool {
        tracked::whole(self.glue, self.node, self.coroutine(), Kind::Write { fua: false }).is_some()
    }

    /// The request that a write is a part of; `None` when it is all of it.
    #[inline]
    pub(crate) fn split_of_write(&self, offset: i64, bytes: i64, fua: bool) -> Option<Split> {
        let may_be_part = tracked::may_be_part(self.glue, self.node, bytes);
        if !may_be_part && !self.capture.holds_any() {
            return None;
        }
        let part = ByteRange::new(offset as u64, bytes as u64)?;
        let held = self.capture.take_held(self.token());
        if held.is_none() && !may_be_part {
            return None;
        }
        self.look_for(held, Kind::Write { fua }, part)
    }

    #[cold]
    fn look_for(&self, held: Option<Split>, kind: Kind, part: ByteRange) -> Option<Split> {
        let whole = tracked::whole(self.glue, self.node, self.coroutine(), kind);
        if let Some(split) = self.continued(held, whole, part) {
            return Some(split);
        }
        let whole = whole.filter(|whole| whole.end() > part.end() && whole.overlaps(part))?;
        // Only zeroes are padded after their request was noted.
        let kind = match kind {
            Kind::Write { fua } if part.offset() < whole.offset() => Kind::Zero { fua, may_unmap: false },
            kind => kind,
        };
        Some(Split::new(rest(kind, whole, part)))
    }

    /// The request that zeroes or a discard are a part of, or all of. (A padded part may begin before its request, where
    /// QEMU finds that all of it is 0.)
    fn split_of_range(&self, kind: Kind, part: ByteRange) -> Split {
        let whole = tracked::whole(self.glue, self.node, self.coroutine(), kind);
        self.continued(self.capture.take_held(self.token()), whole, part).unwrap_or_else(|| {
            let whole = whole.filter(|whole| whole.overlaps(part)).unwrap_or(part);
            Split::new(rest(kind, whole, part))
        })
    }

    /// What this coroutine's last part left open, if this is the next one. A request that was given up between two
    /// parts ends here.
    fn continued(&self, held: Option<Split>, whole: Option<ByteRange>, part: ByteRange) -> Option<Split> {
        let split = held?;
        if whole.is_some_and(|whole| split.continues(whole, part.offset())) {
            return Some(split);
        }
        self.capture.give_up_split(split);
        None
    }

    fn begin(&self, split: &mut Split) {
        while self.capture.begin_split(split, self.token()) == Begin::Wait {
            // SAFETY: we are in a coroutine, and the engine wakes it with the token.
            unsafe { (self.glue.symbols.qemu_coroutine_yield)() };
        }
    }

    fn end(&self, split: Split, part: ByteRange, ended: PartEnd) {
        if let Some(split) = self.capture.end_part(split, part, ended, self.token()) {
            write::wait_durable(self.glue, self.capture, split.sync_wait());
        }
    }

    /// Zeroes or a discard.
    pub(crate) fn range(
        &self,
        kind: Kind,
        part: ByteRange,
        request_flags: c_int,
        issue: impl FnOnce() -> c_int,
    ) -> c_int {
        let mut split = self.split_of_range(kind, part);
        self.begin(&mut split);
        let answer = issue();
        let ended = match answer {
            0.. => PartEnd::Done,
            answer if answer != -libc::ENOTSUP => PartEnd::Failed,
            _ if kind == Kind::Discard => PartEnd::NotDone,
            _ if request_flags & flags::NO_FALLBACK == 0 => PartEnd::ComesAgain,
            _ => PartEnd::Refused,
        };
        self.end(split, part, ended);
        answer
    }

    /// Data that is a part of `split`.
    pub(crate) fn write(
        &self,
        mut split: Split,
        source: Source,
        request_flags: c_int,
        issue: &impl Fn(Source, c_int) -> c_int,
    ) -> c_int {
        let Some(part) = ByteRange::new(source.offset as u64, source.bytes as u64) else {
            return -libc::EINVAL;
        };
        self.begin(&mut split);
        let answer = if split.is_recorded_in_parts() {
            write::in_parts(self, source, request_flags, issue)
        } else if matches!(split.request().kind, Kind::Write { .. }) {
            copied(&split, source, request_flags, issue)
        } else {
            if !zeroes(&split, part, source) {
                split.spoil();
            }
            issue(source, request_flags)
        };
        self.end(split, part, if answer >= 0 { PartEnd::Done } else { PartEnd::Failed });
        answer
    }
}

/// The whole request from this part on. (It is its first: what came before an attach was drained.)
fn rest(kind: Kind, whole: ByteRange, part: ByteRange) -> Request {
    let offset = whole.offset().max(part.offset());
    Request { kind, offset, length: whole.end().saturating_sub(offset) }
}

/// Issues a part from the request's memory in the ring, where it has one.
fn copied(
    split: &Split,
    source: Source,
    request_flags: c_int,
    issue: &impl Fn(Source, c_int) -> c_int,
) -> c_int {
    let request = split.request();
    let (offset, end) = (source.offset as u64, request.offset + request.length);
    let within = (source.bytes as u64).min(end.saturating_sub(offset));
    let mut places = [Piece::EMPTY; MAX_PIECES];
    let pieces = split.pieces(offset, within, &mut places);
    let entries = source.entries();
    // SAFETY: the entries are the buffers of a request in flight, the pieces those of one that has begun and not ended.
    unsafe { copy::copy_in(pieces, entries.as_ptr(), entries.len(), source.skip) };
    if pieces.is_empty() || within < source.bytes as u64 {
        // Bytes behind the request's end are the block layer's padding, and so is the buffer.
        return issue(source, request_flags);
    }
    let mut list = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; MAX_PIECES];
    for (entry, piece) in list.iter_mut().zip(pieces) {
        *entry = libc::iovec { iov_base: piece.ptr.as_ptr().cast(), iov_len: piece.len };
    }
    let Some(used) = list.get_mut(..pieces.len()) else { return -libc::EINVAL };
    let mut qiov = QemuIoVector::over(used, source.bytes as usize);
    let copy = Source { qiov: &raw mut qiov, skip: 0, ..source };
    issue(copy, request_flags & !flags::REGISTERED_BUF)
}

/// Whether the bytes of a part that lie in the request are all 0.
fn zeroes(split: &Split, part: ByteRange, source: Source) -> bool {
    let request = split.request();
    let whole = ByteRange::new(request.offset, request.length);
    let Some(within) = whole.and_then(|whole| part.intersection(whole)) else { return true };
    let skip = source.skip.saturating_add((within.offset() - part.offset()) as usize);
    let entries = source.entries();
    // SAFETY: the entries are the buffers of a request in flight.
    unsafe { copy::is_zero(entries.as_ptr(), entries.len(), skip, within.length() as usize) }
}
