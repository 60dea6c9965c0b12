//! The bytes of a request's pieces in the ring. The engine hands out pointers, as QEMU needs them; this is the
//! simulation's only `unsafe`.
#![allow(unsafe_code)]

use cdp_filter::engine::Piece;
use cdp_filter::ffi::copy::copy_in;

/// Copies `bytes` to the beginning of the pieces.
///
/// # Panics
/// When they do not fit.
pub(crate) fn fill(pieces: &[Piece], bytes: &[u8]) {
    let iov = nix::libc::iovec { iov_base: bytes.as_ptr() as *mut _, iov_len: bytes.len() };
    // SAFETY: one entry, which describes a live slice; the simulation calls this between begin and finish only.
    let copied = unsafe { copy_in(pieces, &raw const iov, 1, 0) };
    assert_eq!(copied, bytes.len(), "the engine made too little room for a write");
}

/// What the pieces hold.
#[must_use]
pub(crate) fn bytes_of(pieces: &[Piece]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for piece in pieces {
        // SAFETY: called between begin and finish only; the one thread of a run is the only one that writes here.
        bytes.extend_from_slice(unsafe { std::slice::from_raw_parts(piece.ptr.as_ptr(), piece.len) });
    }
    bytes
}
