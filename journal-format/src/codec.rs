//! Compression of frame data: zstd, skipped when it does not pay.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use zstd::bulk::Compressor;

use crate::error::{FormatError, FormatErrorKind};
use crate::frame::Codec;
use crate::limits::MAX_FRAME_RAW_BYTES;

/// Compresses `raw` at zstd `level`, unless that saves less than 1/16 of it: then the data stays raw, because
/// reading it back costs nothing. Returns the codec used and, for zstd, the compressed bytes (`None` means `raw` as it is).
#[must_use]
pub fn compress(raw: &[u8], level: i32) -> (Codec, Option<Vec<u8>>) {
    let pays = |out: &Vec<u8>| out.len() < raw.len().saturating_sub(raw.len() / 16);
    match zstd_compress(raw, level).ok().filter(pays) {
        Some(out) => (Codec::Zstd, Some(out)),
        None => (Codec::Raw, None),
    }
}

/// Contexts that wait for the next frame. A new one is about a megabyte of fresh pages: making it costs several times what
/// compressing a frame does.
static IDLE: Mutex<Vec<Compressor<'static>>> = Mutex::new(Vec::new());
/// Contexts that are kept; more exist only while more threads than this compress at the same moment.
const MAX_IDLE: usize = 8;

fn idle() -> MutexGuard<'static, Vec<Compressor<'static>>> {
    // Nothing can panic while it is held.
    IDLE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn zstd_compress(raw: &[u8], level: i32) -> io::Result<Vec<u8>> {
    let kept = idle().pop();
    let mut context = kept.map_or_else(|| Compressor::new(level), Ok)?;
    context.set_compression_level(level)?;
    let out = context.compress(raw)?;
    let mut idle = idle();
    if idle.len() < MAX_IDLE {
        idle.push(context);
    }
    Ok(out)
}

/// Undoes [`compress`]; `raw_bytes` is what the frame header says and is checked against its limit before anything
/// is allocated.
///
/// # Errors
/// `TooLarge` for a length over the limit, `Invalid` for bytes that are no zstd frame or have another length.
pub fn decompress(codec: Codec, data: &[u8], raw_bytes: u32) -> Result<Vec<u8>, FormatError> {
    if raw_bytes > MAX_FRAME_RAW_BYTES {
        return Err(FormatError::new(FormatErrorKind::TooLarge, "frame data", "raw length over the limit"));
    }
    let raw = match codec {
        Codec::Raw => data.to_vec(),
        Codec::Zstd => zstd::bulk::decompress(data, raw_bytes as usize)
            .map_err(|_| FormatError::new(FormatErrorKind::Invalid, "frame data", "zstd refuses it"))?,
    };
    if raw.len() == raw_bytes as usize {
        Ok(raw)
    } else {
        Err(FormatError::new(FormatErrorKind::Invalid, "frame data", "another length than the header says"))
    }
}
