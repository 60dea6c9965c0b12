//! Compression of frame data: zstd, skipped when it does not pay.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use zstd::bulk::Compressor;

use crate::error::{FormatError, FormatErrorKind};
use crate::frame::Codec;
use crate::limits::MAX_FRAME_RAW_BYTES;

/// Frames of at least this many raw bytes are probed first: it takes many samples to be sure.
const PROBED_FROM_BYTES: usize = 256 << 10;
/// A sample is taken of each stripe of this many bytes. Whatever lies in one piece and would make a frame pay (1/16 of
/// the smallest that is probed, or more) fills a stripe, or most of two.
const STRIPE_BYTES: usize = 16 << 10;
/// Bytes of a sample.
const SAMPLE_BYTES: usize = 1 << 10;
/// Samples of so many bytes in all are compressed together: one that shrinks must show beside the others.
const PROBE_BYTES: usize = 8 << 10;
/// How far a sample is moved in its stripe against the one before, around it: what repeats every 4, 8 or 64 KiB (pages that
/// begin or end alike) shows all its parts.
const SAMPLE_STEP_BYTES: usize = 9_497;
/// Blocks of a file system, whose first bytes tell whether one comes twice.
const BLOCK_BYTES: usize = 4 << 10;

/// Compresses `raw` at zstd `level` into `out`, unless that saves less than 1/16 of it: then the data stays raw, because
/// reading it back costs nothing, and `out` is empty. What `out` held is gone; its memory is used again.
///
/// Large frames are probed first, because most of what does not compress does so nowhere (films, archives, whatever is
/// encrypted), and a whole pass over it costs more than all the rest that is done with a frame. The probe is a sixteenth
/// of the frame, at the same level: it misses what pays in so few places that hardly a sample hits them.
#[must_use]
pub fn compress(raw: &[u8], level: i32, out: &mut Vec<u8>) -> Codec {
    let most = raw.len().saturating_sub(raw.len() / 16);
    if matches!(zstd_compress(raw, level, out), Ok(true)) && out.len() < most {
        return Codec::Zstd;
    }
    out.clear();
    Codec::Raw
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

/// False when a probe says that it cannot pay.
fn zstd_compress(raw: &[u8], level: i32, out: &mut Vec<u8>) -> io::Result<bool> {
    let kept = idle().pop();
    let mut context = kept.map_or_else(|| Compressor::new(level), Ok)?;
    context.set_compression_level(level)?;
    let mut into_out = |bytes: &[u8]| {
        out.clear();
        out.reserve(zstd::zstd_safe::compress_bound(bytes.len()));
        context.compress_to_buffer(bytes, out)
    };
    let mut may_pay = raw.len() < PROBED_FROM_BYTES || repeats(raw);
    if !may_pay {
        for part in sample_of(raw).chunks(PROBE_BYTES) {
            // zstd gives up a block that saves less than 1/64: the least that it says counts.
            may_pay |= into_out(part)? < part.len();
        }
    }
    if may_pay {
        into_out(raw)?;
    }
    let mut idle = idle();
    if idle.len() < MAX_IDLE {
        idle.push(context);
    }
    Ok(may_pay)
}

/// A piece of each stripe, one behind the other.
fn sample_of(raw: &[u8]) -> Vec<u8> {
    let stripes = raw.chunks(STRIPE_BYTES);
    let mut sample = Vec::with_capacity(stripes.len().saturating_mul(SAMPLE_BYTES));
    for (number, stripe) in stripes.enumerate() {
        let places = stripe.len().saturating_sub(SAMPLE_BYTES).saturating_add(1);
        let at = number.wrapping_mul(SAMPLE_STEP_BYTES).checked_rem(places).unwrap_or_default();
        sample.extend(stripe.iter().skip(at).take(SAMPLE_BYTES));
    }
    sample
}

/// Whether blocks come again often enough to pay even if nothing in them can be compressed. No sample would show that.
fn repeats(raw: &[u8]) -> bool {
    let mut heads: Vec<[u8; 8]> =
        raw.chunks(BLOCK_BYTES).filter_map(|block| block.first_chunk().copied()).collect();
    let blocks = heads.len();
    heads.sort_unstable();
    heads.dedup();
    blocks.saturating_sub(heads.len()) >= blocks.div_ceil(16)
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

#[cfg(test)]
mod tests {
    use super::*;

    const FRAME: usize = 512 << 10;

    /// Bytes that do not compress.
    fn noise(bytes: usize) -> Vec<u8> {
        let mut x = 1_u64;
        let next = || {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (x >> 56) as u8
        };
        std::iter::repeat_with(next).take(bytes).collect()
    }

    fn stored(raw: &[u8]) -> usize {
        // What is in it must not matter.
        let mut out = vec![7; 100];
        match compress(raw, 1, &mut out) {
            Codec::Raw => {
                assert!(out.is_empty());
                raw.len()
            }
            Codec::Zstd => {
                assert_eq!(decompress(Codec::Zstd, &out, u32::try_from(raw.len()).unwrap()).unwrap(), raw);
                out.len()
            }
        }
    }

    /// What would be stored if each frame were compressed to see what comes of it.
    fn without_probe(raw: &[u8]) -> usize {
        let packed = zstd::bulk::compress(raw, 1).unwrap().len();
        if packed < raw.len() - raw.len() / 16 { packed } else { raw.len() }
    }

    #[test]
    fn what_compresses_nowhere_is_not_compressed_as_a_whole() {
        for bytes in [PROBED_FROM_BYTES, FRAME, FRAME + 1, 4 << 20] {
            assert!(!zstd_compress(&noise(bytes), 1, &mut Vec::new()).unwrap(), "{bytes} bytes");
            assert_eq!(stored(&noise(bytes)), bytes);
        }
        assert_eq!(stored(&[]), 0);
        assert_eq!(stored(&noise(5000)), 5000);
    }

    #[test]
    fn a_part_that_makes_a_frame_pay_is_found_wherever_it_lies() {
        // Zeroes come again; of these letters only that they are few is to be seen.
        let letters: Vec<u8> = noise(FRAME).iter().map(|byte| byte & 3).collect();
        for (bytes, part, what) in
            [(FRAME, 12, &[0; FRAME][..]), (300_001, 12, &[0; FRAME]), (FRAME, 8, &letters)]
        {
            let part = bytes / part;
            for begin in (0..bytes - part).step_by(7_777).chain([bytes - part]) {
                let mut raw = noise(bytes);
                raw[begin..begin + part].copy_from_slice(&what[..part]);
                assert_eq!(stored(&raw), without_probe(&raw), "{part} of {bytes} bytes, from {begin} on");
            }
        }
    }

    /// Pages that have a header, or room at one of their places, and are noise otherwise.
    #[test]
    fn what_is_alike_in_every_page_is_found_wherever_in_the_page_it_lies() {
        for page in [4 << 10, 8 << 10, 16 << 10, 64 << 10] {
            for place in 0..8 {
                let mut raw = noise(FRAME);
                for page in raw.chunks_mut(page) {
                    let part = page.len() / 8;
                    page[place * part..(place + 1) * part].fill(0);
                }
                assert!(stored(&raw) < FRAME - FRAME / 16, "eighth {place} of each {page} bytes is zero");
            }
        }
    }

    #[test]
    fn noise_that_comes_twice_and_digits_of_noise_are_compressed() {
        let (half, block) = (noise(FRAME / 2), noise(FRAME / 8));
        assert!(
            stored(&[half.clone(), half.clone()].concat()) < FRAME * 6 / 10,
            "the second half is the first"
        );
        let twice = [half.as_slice(), &block, &block, &noise(FRAME / 4)].concat();
        assert!(stored(&twice) < twice.len() - twice.len() / 16, "an eighth comes twice");
        let digits: Vec<u8> = half.iter().flat_map(|byte| [b'a' + byte / 16, b'a' + byte % 16]).collect();
        assert!(stored(&digits) < FRAME * 6 / 10, "hexadecimal digits");
    }
}
