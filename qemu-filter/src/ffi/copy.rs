//! Copies between a caller's scatter list and the pieces of a request's memory in the ring.
//!
//! On AMD's processors long pieces are written around the caches (*streamed*). Their memory was read by the agent's core last,
//! so a plain store has to fetch each line from there before it overwrites it, and puts the guest's own lines out of the caches.
//! A page of 4 KiB gains nothing: it has to wait for its last stores before its record can be published. Measured by
//! `scripts/bench filter`, 64 KiB: AMD EPYC 7.9 instead of 10.9 us streamed, Intel Xeon 6.1 instead of 4.6. On a newer Intel Xeon the
//! copy alone gains (1 MiB 77 instead of 141 us on `null-co`), and the write that is then issued from it loses as much, because it
//! fetches from memory what a plain store leaves in the cache: 64 KiB on tmpfs 10.8 instead of 7.2 us in all, 1 MiB the same, on the
//! disk nothing won. So plain stores there, of any length.

#[cfg(target_arch = "x86_64")]
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::engine::Piece;

/// From how many contiguous bytes on a copy is streamed, where that is faster.
#[cfg(target_arch = "x86_64")]
const STREAM_BYTES: usize = 16 << 10;
/// The same for this machine, once somebody has asked; 0 before.
#[cfg(target_arch = "x86_64")]
static STREAMED_FROM: AtomicUsize = AtomicUsize::new(0);

/// Copies the caller's data, from its byte `skip` on, into the pieces until these are full. Returns the bytes
/// copied: fewer than the pieces hold when the list was too short.
///
/// # Safety
/// `iov` points to `iovcnt` entries (it may be null when that is 0), each of them readable memory for the
/// duration of the call. The pieces are those of a request that has begun and not finished.
pub unsafe fn copy_in(pieces: &[Piece], iov: *const libc::iovec, iovcnt: usize, skip: usize) -> usize {
    let list = if iovcnt == 0 {
        &[]
    } else {
        // SAFETY: the caller promises `iovcnt` entries at `iov`, and nobody changes the list during the call.
        unsafe { std::slice::from_raw_parts(iov, iovcnt) }
    };
    let mut source = Cursor { list, skip };
    let mut copied = 0;
    for piece in pieces {
        let mut filled = 0;
        while filled < piece.len {
            let Some((from, len)) = source.take(piece.len - filled) else { return copied };
            // SAFETY: `filled < piece.len`, so this stays inside the piece, which is one mapping.
            let to = unsafe { piece.ptr.as_ptr().add(filled) };
            // SAFETY: `from` has `len` readable bytes (the caller's promise; `take` stays inside an entry), `to` has
            // at least `piece.len - filled >= len` writable ones, and the ring's arena is never a guest's buffer. A
            // guest that writes to its memory meanwhile gets any mix of its bytes, as with a real device.
            unsafe { copy(from, to, len) };
            filled += len;
            copied += len;
        }
    }
    copied
}

/// [`STREAM_BYTES`], or more than any copy has.
#[cfg(target_arch = "x86_64")]
fn streamed_from() -> usize {
    // ORDERING: Relaxed: the number stands alone, and all who ask the processor hear the same.
    match STREAMED_FROM.load(Ordering::Relaxed) {
        0 => {
            let from = if is_amd() { STREAM_BYTES } else { usize::MAX };
            // ORDERING: as above.
            STREAMED_FROM.store(from, Ordering::Relaxed);
            from
        }
        known => known,
    }
}

/// Whether the processor says that it is AMD's.
#[cfg(target_arch = "x86_64")]
fn is_amd() -> bool {
    vendor() == *b"AuthenticAMD"
}

/// The name of the processor's maker, as it says it itself.
#[cfg(target_arch = "x86_64")]
fn vendor() -> Vec<u8> {
    let names = std::arch::x86_64::__cpuid(0);
    [names.ebx, names.edx, names.ecx].map(u32::to_le_bytes).concat()
}

/// Copies `len` bytes that do not overlap, past the caches where they are many.
///
/// # Safety
/// As for [`std::ptr::copy_nonoverlapping`].
unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
    #[cfg(target_arch = "x86_64")]
    if len >= STREAM_BYTES && len >= streamed_from() && (to as usize).is_multiple_of(LINE) {
        let lines = len / LINE;
        let streamed = lines * LINE;
        // SAFETY: `lines` whole lines of both, aligned at the destination.
        unsafe { stream(from, to, lines) };
        let (from, to) = (from.wrapping_add(streamed), to.wrapping_add(streamed));
        // SAFETY: what is left of `len` after them.
        unsafe { std::ptr::copy_nonoverlapping(from, to, len - streamed) };
        return;
    }
    // SAFETY: the caller's promise.
    unsafe { std::ptr::copy_nonoverlapping(from, to, len) };
}

/// A cache line, in bytes.
#[cfg(target_arch = "x86_64")]
const LINE: usize = 64;

/// Copies whole cache lines with non-temporal stores. They are ordered before everything that comes after.
///
/// # Safety
/// `from` has `lines` readable lines, `to` as many writable ones, aligned to a line; the two do not overlap.
#[cfg(target_arch = "x86_64")]
unsafe fn stream(from: *const u8, to: *mut u8, lines: usize) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_sfence, _mm_stream_si128};
    const WORDS: usize = LINE / size_of::<__m128i>();
    let (from, to) = (from.cast::<__m128i>(), to.cast::<__m128i>());
    for line in 0..lines {
        let (from, to) = (from.wrapping_add(line * WORDS), to.wrapping_add(line * WORDS));
        let words = [0, 1, 2, 3].map(|word| {
            // SAFETY: a word of a line that the caller promises; SSE2 is part of x86-64.
            unsafe { _mm_loadu_si128(from.wrapping_add(word)) }
        });
        for (word, value) in words.into_iter().enumerate() {
            // SAFETY: as above, and aligned to 16 bytes because the line is aligned to 64.
            unsafe { _mm_stream_si128(to.wrapping_add(word), value) };
        }
    }
    // SAFETY: SSE is part of x86-64. Non-temporal stores are ordered by nothing else: a record that is published after this
    // must not be seen before its data.
    unsafe { _mm_sfence() };
}

/// Walks a scatter list.
struct Cursor<'a> {
    list: &'a [libc::iovec],
    /// Bytes of the first entry that are used up.
    skip: usize,
}

impl Cursor<'_> {
    /// The next at most `most` contiguous bytes.
    fn take(&mut self, most: usize) -> Option<(*const u8, usize)> {
        loop {
            let (first, rest) = self.list.split_first()?;
            if self.skip >= first.iov_len {
                self.skip -= first.iov_len;
                self.list = rest;
                continue;
            }
            let len = most.min(first.iov_len - self.skip);
            // SAFETY: `skip` is less than the entry's length, so the result lies inside its memory.
            let from = unsafe { first.iov_base.cast::<u8>().cast_const().add(self.skip) };
            self.skip += len;
            return Some((from, len));
        }
    }
}

/// Whether every byte of the pieces is 0.
///
/// # Safety
/// The pieces are those of a step or request that has not been answered or finished, and nobody writes to them now.
#[must_use]
pub unsafe fn all_zero(pieces: &[Piece]) -> bool {
    pieces.iter().all(|piece| {
        // SAFETY: the caller promises that the piece is live and not written to; pieces are contiguous.
        let bytes = unsafe { std::slice::from_raw_parts(piece.ptr.as_ptr(), piece.len) };
        no_bit_set(bytes)
    })
}

/// Whether `length` bytes of a scatter list, from its byte `skip` on, are there and all 0.
///
/// # Safety
/// As for the list of [`copy_in`].
#[must_use]
pub unsafe fn is_zero(iov: *const libc::iovec, iovcnt: usize, skip: usize, length: usize) -> bool {
    let list = if iovcnt == 0 {
        &[]
    } else {
        // SAFETY: the caller promises `iovcnt` entries at `iov`, and nobody changes the list during the call.
        unsafe { std::slice::from_raw_parts(iov, iovcnt) }
    };
    let mut source = Cursor { list, skip };
    let mut left = length;
    while left > 0 {
        let Some((from, len)) = source.take(left) else { return false };
        // SAFETY: `take` stays inside an entry, which is readable by the caller's promise.
        if !no_bit_set(unsafe { std::slice::from_raw_parts(from, len) }) {
            return false;
        }
        left -= len;
    }
    true
}

fn no_bit_set(bytes: &[u8]) -> bool {
    bytes.chunks(128).all(|chunk| chunk.iter().fold(0, |or, byte| or | byte) == 0)
}

#[cfg(test)]
mod tests {
    use std::ptr::NonNull;

    use super::*;

    fn pieces(memory: &mut [Vec<u8>]) -> Vec<Piece> {
        let piece = |bytes: &mut Vec<u8>| Piece {
            ptr: NonNull::new(bytes.as_mut_ptr()).expect("a vector's memory"),
            len: bytes.len(),
        };
        memory.iter_mut().map(piece).collect()
    }

    fn iov(parts: &[&[u8]]) -> Vec<libc::iovec> {
        let entry = |part: &&[u8]| libc::iovec { iov_base: part.as_ptr() as *mut _, iov_len: part.len() };
        parts.iter().map(entry).collect()
    }

    #[test]
    fn data_keeps_its_order_however_it_is_cut() {
        let data: Vec<u8> = (0..200).collect();
        for cut in [0, 1, 7, 100, 199] {
            let list = iov(&[&data[..cut], &[], &data[cut..]]);
            for skip in [0, 1, 50, 101] {
                let mut memory = vec![vec![0; 64], vec![0; 1], vec![0; 30]];
                // SAFETY: the list and the pieces describe live vectors.
                let copied = unsafe { copy_in(&pieces(&mut memory), list.as_ptr(), list.len(), skip) };
                assert_eq!(copied, 95);
                assert_eq!(memory.concat(), &data[skip..skip + 95], "cut {cut} skip {skip}");
            }
        }
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn whose_processor_it_is_the_system_says_too() {
        let said = std::fs::read_to_string("/proc/cpuinfo").expect("the processors");
        let vendor = String::from_utf8(vendor()).expect("a name");
        assert!(said.contains(&vendor), "{vendor}");
        assert_eq!(is_amd(), said.contains("AuthenticAMD"));
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn long_copies_are_right_at_every_alignment_whatever_the_processor() {
        for from in [STREAM_BYTES, usize::MAX] {
            // ORDERING: Relaxed: this thread's own copies see it; others are right either way.
            STREAMED_FROM.store(from, Ordering::Relaxed);
            long_copies_are_right_at_every_alignment();
        }
        // ORDERING: as above.
        STREAMED_FROM.store(0, Ordering::Relaxed);
    }

    #[cfg(target_arch = "x86_64")]
    fn long_copies_are_right_at_every_alignment() {
        let data: Vec<u8> = (0..STREAM_BYTES + 300).map(|at| (at * 7 / 3) as u8).collect();
        for (skip, shift, len) in
            (0..70).flat_map(|skip| [0, 1, 16, 63].map(|shift| (skip, shift, STREAM_BYTES + skip * 3)))
        {
            let mut memory = vec![0xee; STREAM_BYTES + 512];
            let ptr = NonNull::new(memory[shift..].as_mut_ptr()).expect("a vector's memory");
            let list = iov(&[&data]);
            let len = len.min(data.len() - skip);
            // SAFETY: the list and the piece describe live vectors.
            assert_eq!(unsafe { copy_in(&[Piece { ptr, len }], list.as_ptr(), 1, skip) }, len);
            assert_eq!(memory[shift..shift + len], data[skip..skip + len], "skip {skip} shift {shift}");
            let around = memory[..shift].iter().chain(&memory[shift + len..]);
            assert!(around.copied().all(|byte| byte == 0xee), "skip {skip} shift {shift}: nothing else");
        }
    }

    #[test]
    fn a_list_that_is_too_short_is_copied_as_far_as_it_goes() {
        let list = iov(&[&[1, 2, 3]]);
        let mut memory = vec![vec![0; 8]];
        // SAFETY: the list and the pieces describe live vectors.
        assert_eq!(unsafe { copy_in(&pieces(&mut memory), list.as_ptr(), 1, 1) }, 2);
        // SAFETY: an empty list needs no memory.
        assert_eq!(unsafe { copy_in(&pieces(&mut memory), std::ptr::null(), 0, 0) }, 0);
        assert_eq!(memory[0], [2, 3, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn one_byte_anywhere_is_not_zero() {
        let mut memory = vec![vec![0; 300], vec![0; 128]];
        // SAFETY: the pieces describe live vectors.
        assert!(unsafe { all_zero(&pieces(&mut memory)) });
        for (part, at) in [(0, 0), (0, 127), (0, 299), (1, 127)] {
            memory[part][at] = 1;
            // SAFETY: the pieces describe live vectors.
            assert!(!unsafe { all_zero(&pieces(&mut memory)) });
            memory[part][at] = 0;
        }
    }
}
