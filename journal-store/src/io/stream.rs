//! A copy around the caches, into memory that a device reads next.
#![allow(unsafe_code)]

/// From how many bytes on it is worth it.
#[cfg(any(target_arch = "x86_64", test))]
const STREAM_BYTES: usize = 16 << 10;
/// A cache line, in bytes.
#[cfg(target_arch = "x86_64")]
const LINE: usize = 64;

/// Copies `from` to `to`; a long one around the caches (*streamed*, with non-temporal stores) where that is faster.
///
/// Memory that was written to a disk has been read by whoever serves that disk: in a VM a thread of the host, on a core whose
/// caches may be others. A plain store has to fetch each line from there before it overwrites it, which an AMD EPYC took 0.15 to
/// 0.5 s/GB for, and 0.06 in times when that thread was near; a streamed one takes 0.05 to 0.1 in either. Intel's processors, whose
/// cores share one cache, were at 0.06 with plain stores, and keep them.
///
/// # Panics
/// When the lengths differ.
pub(crate) fn copy_around_caches(to: &mut [u8], from: &[u8]) {
    assert_eq!(to.len(), from.len(), "as many bytes as there is room for");
    #[cfg(target_arch = "x86_64")]
    if from.len() >= STREAM_BYTES && is_amd() {
        copy_streamed(to, from);
        return;
    }
    to.copy_from_slice(from);
}

/// Copies as many bytes as both have: whole lines of the destination are streamed.
#[cfg(target_arch = "x86_64")]
fn copy_streamed(to: &mut [u8], from: &[u8]) {
    let head = to.as_ptr().align_offset(LINE).min(to.len());
    let ((to_head, to), (from_head, from)) = (to.split_at_mut(head), from.split_at(head));
    let (to_lines, to_tail) = to.as_chunks_mut();
    let (from_lines, from_tail) = from.as_chunks();
    to_head.copy_from_slice(from_head);
    stream(to_lines, from_lines);
    to_tail.copy_from_slice(from_tail);
}

/// Whether the processor says that it is AMD's.
#[cfg(target_arch = "x86_64")]
fn is_amd() -> bool {
    use std::sync::LazyLock;
    static IS_AMD: LazyLock<bool> = LazyLock::new(|| {
        let names = std::arch::x86_64::__cpuid(0);
        [names.ebx, names.edx, names.ecx].map(u32::to_le_bytes).concat() == b"AuthenticAMD"
    });
    *IS_AMD
}

/// Copies whole lines, as many as both have, with non-temporal stores: `to` begins a line.
#[cfg(target_arch = "x86_64")]
fn stream(to: &mut [[u8; LINE]], from: &[[u8; LINE]]) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_sfence, _mm_stream_si128};
    const WORD: usize = size_of::<__m128i>();
    assert!(to.is_empty() || to.as_ptr().cast::<__m128i>().is_aligned(), "a line begins where a word does");
    for (to, from) in to.iter_mut().zip(from) {
        let words = [0, 1, 2, 3].map(|word| {
            // SAFETY: a word of the line, which has four; SSE2 is part of x86-64.
            unsafe { _mm_loadu_si128(from.as_ptr().wrapping_add(word * WORD).cast()) }
        });
        for (word, value) in words.into_iter().enumerate() {
            // SAFETY: as above, and aligned: the first line is (asserted), and lines are a multiple of words long.
            unsafe { _mm_stream_si128(to.as_mut_ptr().wrapping_add(word * WORD).cast(), value) };
        }
    }
    // SAFETY: SSE is part of x86-64. Non-temporal stores are ordered by nothing else, and another thread writes this memory out.
    unsafe { _mm_sfence() };
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Copies between all sorts of places.
    fn every_byte_is_copied_and_no_other(copy: fn(&mut [u8], &[u8])) {
        let from: Vec<u8> = (0..4 * STREAM_BYTES).map(|at| (at % 251 + 1) as u8).collect();
        let around = [STREAM_BYTES - 1, STREAM_BYTES, STREAM_BYTES + 1, STREAM_BYTES + 63];
        for length in [0, 1, 63, 64, 65, 200, 4096, 3 * STREAM_BYTES + 65].into_iter().chain(around) {
            for (to_at, from_at) in [(0, 0), (0, 1), (1, 0), (15, 7), (48, 16), (63, 64), (64, 63)] {
                let mut to = vec![0; 4 * STREAM_BYTES];
                copy(&mut to[to_at..][..length], &from[from_at..][..length]);
                let what = format!("{length} bytes from {from_at} to {to_at}");
                assert!(to[to_at..][..length] == from[from_at..][..length], "{what}");
                assert!(
                    to[..to_at].iter().chain(&to[to_at + length..]).all(|byte| *byte == 0),
                    "{what}: no other"
                );
            }
        }
    }

    #[test]
    fn the_copy_copies() {
        every_byte_is_copied_and_no_other(copy_around_caches);
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn a_streamed_copy_copies_on_every_processor() {
        every_byte_is_copied_and_no_other(copy_streamed);
    }

    #[test]
    #[should_panic(expected = "room")]
    fn lengths_that_differ_are_a_mistake() {
        copy_around_caches(&mut [0; 3], &[0; 4]);
    }
}
