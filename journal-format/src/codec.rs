//! Compression of frame data: zstd, skipped when it does not pay, in parts where there is much.

use std::io::{self, Cursor};
use std::sync::{Mutex, MutexGuard, PoisonError};

use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::compress_bound;

use crate::error::{FormatError, FormatErrorKind};
use crate::frame::Codec;
use crate::limits::{MAX_FRAME_RAW_BYTES, PART_RAW_BYTES};
use crate::parts::{self, Part};

/// Frames of at least this many raw bytes are probed first: it takes many samples to be sure.
const PROBED_FROM_BYTES: usize = 256 << 10;
/// A sample is taken of each stripe of this many bytes. Whatever lies in one piece and would make a frame pay (1/16 of
/// the smallest that is probed, or more) fills a stripe, or most of two.
const STRIPE_BYTES: usize = 16 << 10;
/// Bytes of a sample.
const SAMPLE_BYTES: usize = 1 << 10;
/// A group of stripes whose samples are compressed together, and which is compressed or not as a whole: a stripe in it that
/// shrinks must show beside the others. Whole parts.
const GROUP_BYTES: usize = 128 << 10;
/// So many doubtful groups of a frame are tried in vain; then the others are kept raw.
const MOST_DOUBTS: usize = 2;
/// How far a sample is moved in its stripe against the one before, around it: what repeats every 4, 8 or 64 KiB (pages that
/// begin or end alike) shows all its parts.
const SAMPLE_STEP_BYTES: usize = 9_497;
/// Blocks of a file system, whose first bytes tell whether one comes twice.
const BLOCK_BYTES: usize = 4 << 10;

/// Makes of `raw` what is stored of it, in `out`: zstd at `level`, unless that saves less than 1/16, because reading raw
/// bytes back costs nothing. More than [`PART_RAW_BYTES`] are stored in parts, for each of which that is decided anew.
/// What `out` held is gone; what `raw` holds afterwards is of no use. The memory of both is used again.
///
/// Large frames are probed first, 128 KiB at a time, because most of what does not compress does so nowhere (films, archives,
/// whatever is encrypted), and a whole pass over it costs more than all the rest that is done with a frame. The probe is a
/// sixteenth of the frame, at the same level: it misses what pays in so few places that hardly a sample hits them.
#[must_use]
pub fn compress(raw: &mut Vec<u8>, level: i32, out: &mut Vec<u8>) -> Codec {
    out.clear();
    let raw_bytes = raw.len();
    let mut lengths = Vec::new();
    // Without a context there is no memory for one: then it stays raw.
    if let Ok(mut context) = COMPRESSORS.take(|| Compressor::new(level)) {
        if context.set_compression_level(level).is_ok() {
            let worth = worth(&mut context, raw);
            if worth.iter().any(|group| *group != Worth::Nothing) {
                lengths = store(&mut context, raw, &worth, out);
            }
        }
        COMPRESSORS.give_back(context);
    }
    if lengths.is_empty() {
        lengths = raw.chunks(PART_RAW_BYTES as usize).map(bytes_of).collect();
        std::mem::swap(raw, out);
    }
    if raw_bytes > PART_RAW_BYTES as usize {
        parts::push_table(out, &lengths);
        Codec::Parts
    } else if out.len() < raw_bytes {
        Codec::Zstd
    } else {
        Codec::Raw
    }
}

/// Appends what is stored of each part of `raw` to `out`, compressed in those groups where it may pay; the bytes of each.
fn store(context: &mut Compressor<'_>, raw: &[u8], worth: &[Worth], out: &mut Vec<u8>) -> Vec<u32> {
    out.reserve(raw.len().saturating_add(compress_bound(PART_RAW_BYTES as usize)));
    let mut lengths = Vec::with_capacity(raw.len().div_ceil(PART_RAW_BYTES as usize));
    let mut doubts = MOST_DOUBTS;
    for (group, worth) in raw.chunks(GROUP_BYTES).zip(worth) {
        let mut is_tried = match worth {
            Worth::Nothing => false,
            Worth::Doubtful => doubts > 0,
            Worth::Something => true,
        };
        for part in group.chunks(PART_RAW_BYTES as usize) {
            let start = out.len();
            let pays = is_tried && {
                let mut end = Cursor::new(&mut *out);
                end.set_position(start as u64);
                let packed = context.compress_to_buffer(part, &mut end);
                packed.is_ok_and(|length| length < most_stored(part.len()))
            };
            if !pays {
                out.truncate(start);
                out.extend_from_slice(part);
            }
            if is_tried && !pays && *worth == Worth::Doubtful {
                (is_tried, doubts) = (false, doubts.saturating_sub(1));
            }
            lengths.push(u32::try_from(out.len().saturating_sub(start)).unwrap_or(u32::MAX));
        }
    }
    lengths
}

/// What is stored of so many bytes is less than this, or the bytes themselves.
const fn most_stored(raw_bytes: usize) -> usize {
    raw_bytes.saturating_sub(raw_bytes / 16)
}

fn bytes_of(part: &[u8]) -> u32 {
    u32::try_from(part.len()).unwrap_or(u32::MAX)
}

/// Contexts that wait for the next frame. A new one is up to a megabyte of fresh pages: making it costs several times what
/// (de)compressing does.
struct Idle<T>(Mutex<Vec<T>>);

static COMPRESSORS: Idle<Compressor<'static>> = Idle(Mutex::new(Vec::new()));
static DECOMPRESSORS: Idle<Decompressor<'static>> = Idle(Mutex::new(Vec::new()));
/// Contexts that are kept; more exist only while more threads than this need one at the same moment.
const MAX_IDLE: usize = 8;

impl<T> Idle<T> {
    fn lock(&self) -> MutexGuard<'_, Vec<T>> {
        // Nothing can panic while it is held.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, make: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let kept = self.lock().pop();
        kept.map_or_else(make, Ok)
    }

    fn give_back(&self, context: T) {
        let mut idle = self.lock();
        if idle.len() < MAX_IDLE {
            idle.push(context);
        }
    }
}

/// What the samples of a group say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Worth {
    /// It does not compress.
    Nothing,
    /// It shrinks by less than what pays. A sample shows less than a part does: try one.
    Doubtful,
    /// It pays.
    Something,
}

/// Of each group, whether there is reason to compress it. There is in a frame that is so small that trying costs nothing, or where the
/// samples of the whole frame shrink by 1/16, or those of the group or one beside it (what pays may begin in a group and
/// end in the next).
fn worth(context: &mut Compressor<'_>, raw: &[u8]) -> Vec<Worth> {
    let groups = raw.chunks(GROUP_BYTES);
    if raw.len() < PROBED_FROM_BYTES {
        return groups.map(|_| Worth::Something).collect();
    }
    let mut out = Vec::with_capacity(compress_bound(GROUP_BYTES / STRIPE_BYTES * SAMPLE_BYTES));
    let (mut sampled, mut left) = (0_usize, 0_usize);
    let mut worth = Vec::with_capacity(groups.len());
    for (number, group) in groups.enumerate() {
        let sample = sample_of(group, number.saturating_mul(GROUP_BYTES / STRIPE_BYTES));
        let packed = context.compress_to_buffer(&sample, &mut out).unwrap_or(sample.len());
        sampled = sampled.saturating_add(sample.len());
        left = left.saturating_add(packed.min(sample.len()));
        let repeats = || group.chunks(PART_RAW_BYTES as usize).any(repeats);
        worth.push(match packed {
            // zstd gives up a block that saves less than 1/64: the least that it says counts.
            _ if packed < most_stored(sample.len()) || repeats() => Worth::Something,
            _ if packed < sample.len() => Worth::Doubtful,
            _ => Worth::Nothing,
        });
    }
    if left < most_stored(sampled) {
        worth.fill(Worth::Something);
    }
    // What a sample shows little of, the next one may not show at all.
    if worth.contains(&Worth::Doubtful) {
        worth.iter_mut().filter(|group| **group == Worth::Nothing).for_each(|group| *group = Worth::Doubtful);
    }
    let is_something = |at: usize| worth.get(at) == Some(&Worth::Something);
    let beside = |at: usize| is_something(at.wrapping_sub(1)) || is_something(at.saturating_add(1));
    let own = worth.iter().enumerate();
    own.map(|(at, worth)| if beside(at) { Worth::Something } else { *worth }).collect()
}

/// A piece of each stripe of a group, one behind the other; `first` is the number of its first stripe in the frame.
fn sample_of(group: &[u8], first: usize) -> Vec<u8> {
    let mut sample = Vec::with_capacity(GROUP_BYTES / STRIPE_BYTES * SAMPLE_BYTES);
    for (number, stripe) in (first..).zip(group.chunks(STRIPE_BYTES)) {
        let places = stripe.len().saturating_sub(SAMPLE_BYTES).saturating_add(1);
        let at = number.wrapping_mul(SAMPLE_STEP_BYTES).checked_rem(places).unwrap_or_default();
        sample.extend(stripe.iter().skip(at).take(SAMPLE_BYTES));
    }
    sample
}

/// Whether a part has blocks that come again often enough to pay even if nothing in them can be compressed. No sample would
/// show that.
fn repeats(part: &[u8]) -> bool {
    let mut heads: Vec<[u8; 8]> =
        part.chunks(BLOCK_BYTES).filter_map(|block| block.first_chunk().copied()).collect();
    let blocks = heads.len();
    heads.sort_unstable();
    heads.dedup();
    blocks.saturating_sub(heads.len()) >= blocks.div_ceil(16).max(1)
}

/// Undoes [`compress`]; `raw_bytes` is what the frame header says and is checked against its limit before anything
/// is allocated. Of data in parts each is compared with its checksum.
///
/// # Errors
/// `TooLarge` for a length over the limit, `Invalid` for bytes that are no zstd frame or have another length, `Checksum`
/// for a part that is not what was stored.
pub fn decompress(codec: Codec, data: &[u8], raw_bytes: u32) -> Result<Vec<u8>, FormatError> {
    if raw_bytes > MAX_FRAME_RAW_BYTES {
        return Err(FormatError::new(FormatErrorKind::TooLarge, "frame data", "raw length over the limit"));
    }
    let mut raw = Vec::new();
    match codec {
        Codec::Raw => raw.extend_from_slice(data),
        Codec::Zstd => unpack(data, raw_bytes, &mut raw)?,
        Codec::Parts => {
            for part in parts::parts_of(data, raw_bytes)? {
                raw.reserve(part.raw_bytes as usize);
                decompress_part(&part, data.get(part.stored()).unwrap_or_default(), &mut raw)?;
            }
        }
    }
    if raw.len() == raw_bytes as usize {
        Ok(raw)
    } else {
        Err(FormatError::new(FormatErrorKind::Invalid, "frame data", "another length than the header says"))
    }
}

/// Compares a part as stored with its checksum, and appends its raw bytes to `raw`.
///
/// # Errors
/// `Checksum` for bytes that are not what was stored, `Invalid` for ones that are no zstd frame of that length.
pub fn decompress_part(part: &Part, stored: &[u8], raw: &mut Vec<u8>) -> Result<(), FormatError> {
    part.check(stored)?;
    if part.is_raw() {
        raw.extend_from_slice(stored);
        return Ok(());
    }
    unpack(stored, part.raw_bytes, raw)
}

/// Appends the `raw_bytes` that a zstd frame has.
fn unpack(packed: &[u8], raw_bytes: u32, raw: &mut Vec<u8>) -> Result<(), FormatError> {
    let refused = || FormatError::new(FormatErrorKind::Invalid, "frame data", "zstd refuses it");
    let start = raw.len();
    raw.reserve_exact(raw_bytes as usize);
    let mut end = Cursor::new(&mut *raw);
    end.set_position(start as u64);
    let mut context = DECOMPRESSORS.take(Decompressor::new).map_err(|_| refused())?;
    let unpacked = context.decompress_to_buffer(packed, &mut end);
    DECOMPRESSORS.give_back(context);
    if unpacked.is_ok_and(|length| length == raw_bytes as usize) {
        Ok(())
    } else {
        raw.truncate(start);
        Err(refused())
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
        let codec = compress(&mut raw.to_vec(), 1, &mut out);
        assert_eq!(codec == Codec::Parts, raw.len() > PART_RAW_BYTES as usize);
        let raw_bytes = u32::try_from(raw.len()).unwrap();
        assert_eq!(decompress(codec, &out, raw_bytes).unwrap(), raw);
        out.len() - if codec == Codec::Parts { parts::table_bytes(raw_bytes) as usize } else { 0 }
    }

    /// What would be stored if each part were compressed to see what comes of it.
    fn without_probe(raw: &[u8]) -> usize {
        let parts = raw.chunks(PART_RAW_BYTES as usize).map(|part| {
            let packed = zstd::bulk::compress(part, 1).unwrap().len();
            if packed < part.len() - part.len() / 16 { packed } else { part.len() }
        });
        parts.sum()
    }

    #[test]
    fn what_compresses_nowhere_is_not_compressed_as_a_whole() {
        for bytes in [PROBED_FROM_BYTES, FRAME, FRAME + 1, 4 << 20] {
            let mut context = Compressor::new(1).unwrap();
            assert!(
                worth(&mut context, &noise(bytes)).iter().all(|group| *group == Worth::Nothing),
                "{bytes} bytes"
            );
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

    #[test]
    fn only_the_groups_around_what_pays_are_compressed() {
        let mut context = Compressor::new(1).unwrap();
        let mut raw = noise(2 << 20);
        raw[5 * GROUP_BYTES..6 * GROUP_BYTES].fill(0);
        let around = |group| if (4..=6).contains(&group) { Worth::Something } else { Worth::Nothing };
        assert_eq!(worth(&mut context, &raw), (0..16).map(around).collect::<Vec<_>>());
        // One byte in 16 is always zero: some 4 % less, after which it would be kept raw.
        let mut weak = noise(2 << 20);
        weak.iter_mut().step_by(16).for_each(|byte| *byte = 0);
        let packed = zstd::bulk::compress(&weak[..PART_RAW_BYTES as usize], 1).unwrap().len();
        assert!(
            (most_stored(PART_RAW_BYTES as usize)..PART_RAW_BYTES as usize).contains(&packed),
            "{packed}"
        );
        assert!(worth(&mut context, &weak).iter().all(|group| *group != Worth::Something));
        assert_eq!(stored(&weak), weak.len());
    }

    /// A sample shows less than a part: what is alike in all pages is there once or not at all.
    #[test]
    fn what_a_sample_shows_little_of_is_tried() {
        for (page, alike, at_most) in
            [(4096, 320, 0.95), (4096, 512, 0.91), (8192, 1024, 0.92), (8192, 2048, 0.83)]
        {
            let mut raw = noise(4 << 20);
            for (number, page) in raw.chunks_mut(page).enumerate() {
                page[..alike].copy_from_slice(&noise(alike));
                // Not in the bytes that tell whether blocks come twice.
                page[..8].copy_from_slice(&(number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
            }
            let bytes = stored(&raw);
            assert!(
                (bytes as f64) < raw.len() as f64 * at_most,
                "{alike} of {page}: {bytes} of {}",
                raw.len()
            );
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
        let (half, part) = (noise(FRAME / 2), PART_RAW_BYTES as usize);
        let doubled: Vec<u8> = half.chunks(part / 2).flat_map(|piece| [piece, piece].concat()).collect();
        assert!(stored(&doubled) < FRAME * 6 / 10, "the second half of each part is the first");
        let again = noise(part / 4).repeat(4);
        let once = [&half[part..], &again, &half].concat();
        assert!(stored(&once) < once.len() - part / 2, "one part is a block again and again");
        let digits: Vec<u8> = half.iter().flat_map(|byte| [b'a' + byte / 16, b'a' + byte % 16]).collect();
        assert!(stored(&digits) < FRAME * 6 / 10, "hexadecimal digits");
    }
}
