//! Safe access to pieces for the engine's tests, which play QEMU on buffers that nobody else touches.

use crate::engine::Piece;

/// Copies `bytes` to the beginning of the pieces.
pub(crate) fn fill(pieces: &[Piece], bytes: &[u8]) {
    let iov = libc::iovec { iov_base: bytes.as_ptr() as *mut _, iov_len: bytes.len() };
    // SAFETY: one entry, which describes a live slice; tests call this between begin and finish only.
    let copied = unsafe { super::copy::copy_in(pieces, &raw const iov, 1, 0) };
    assert_eq!(copied, bytes.len());
}

/// What the pieces hold.
pub(crate) fn bytes_of(pieces: &[Piece]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for piece in pieces {
        // SAFETY: tests call this between begin and finish only, and write to the pieces in the same thread.
        bytes.extend_from_slice(unsafe { std::slice::from_raw_parts(piece.ptr.as_ptr(), piece.len) });
    }
    bytes
}
