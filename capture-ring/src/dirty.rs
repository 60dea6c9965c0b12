//! The dirty bitmap: one bit per 64 KiB of disk whose contents history does not have.

use journal_format::ByteRange;
use journal_format::limits::DIRTY_CHUNK_BYTES;

use crate::sync::{AtomicU64, Ordering};

/// The dirty bitmap of one ring. Any thread of either process may call anything.
#[derive(Clone, Copy)]
pub struct Dirty<'a> {
    pub(crate) words: &'a [AtomicU64],
    /// Size of the disk in bytes: bits beyond it are nobody's.
    pub(crate) disk_bytes: u64,
}

impl Dirty<'_> {
    /// Marks every chunk that the range touches. False when part of it lies beyond the bitmap: then the caller has
    /// to end capture, because that part would be forgotten.
    #[must_use]
    pub fn mark(&self, range: ByteRange) -> bool {
        if range.is_empty() {
            return true;
        }
        let (first, last) =
            (range.offset() / DIRTY_CHUNK_BYTES, range.end().saturating_sub(1) / DIRTY_CHUNK_BYTES);
        for index in first / 64..=last / 64 {
            let Some(word) = self.words.get(index as usize) else { return false };
            let mask = mask_of(index, first, last);
            // ORDERING: SeqCst pairs with `take_run` and `any`: a mark made before a request is issued, or before
            // an untracked request stops being counted, is seen by a scan that comes after.
            word.fetch_or(mask, Ordering::SeqCst);
        }
        true
    }

    /// Takes the first run of dirty chunks at or behind `from` (bytes), clears its bits and returns it, cut to
    /// `max_bytes` and to the disk's size; `None` when there is none up to the end. The caller reserves its fill's
    /// slot *after* this and reads the disk after that ([`crate::Producer::reserve_fill`] says why).
    #[must_use]
    pub fn take_run(&self, from: u64, max_bytes: u64) -> Option<ByteRange> {
        let chunks = self.chunks();
        let most = (max_bytes / DIRTY_CHUNK_BYTES).max(1);
        let mut first = self.next_dirty(from / DIRTY_CHUNK_BYTES, chunks)?;
        loop {
            let limit = first.saturating_add(most).min(chunks);
            let end = self.take_bits(first, limit);
            if end > first {
                let offset = first.checked_mul(DIRTY_CHUNK_BYTES)?;
                let end = end.saturating_mul(DIRTY_CHUNK_BYTES).min(self.disk_bytes);
                return ByteRange::new(offset, end.checked_sub(offset)?);
            }
            // Another thread took it first.
            first = self.next_dirty(first.saturating_add(1), chunks)?;
        }
    }

    /// Clears set bits from `first` up to the first clear one or `limit`; one past the last one cleared.
    fn take_bits(&self, first: u64, limit: u64) -> u64 {
        let mut at = first;
        while at < limit {
            let Some(word) = self.words.get((at / 64) as usize) else { break };
            let stop = (at / 64).saturating_mul(64).saturating_add(64).min(limit);
            let mask = mask_of(at / 64, at, stop.saturating_sub(1));
            // ORDERING: a guess; the fetch_and below tells what was really there.
            let run = u64::from((word.load(Ordering::Relaxed) >> (at % 64)).trailing_ones())
                .min(stop.saturating_sub(at));
            if run == 0 {
                break;
            }
            let wanted = mask & mask_of(at / 64, at, at.saturating_add(run).saturating_sub(1));
            // ORDERING: SeqCst pairs with `mark`: whoever marks after this is seen by a later scan, and whoever
            // marked before has issued its request before we read the disk, or will mark again at its end.
            let had = word.fetch_and(!wanted, Ordering::SeqCst) & wanted;
            let got = u64::from((had >> (at % 64)).trailing_ones()).min(run);
            if got < run {
                // Bits that another thread cleared under us: put back what lies behind the hole.
                let taken =
                    if got == 0 { 0 } else { mask_of(at / 64, at, at.saturating_add(got).saturating_sub(1)) };
                // ORDERING: as in `mark`.
                word.fetch_or(had & !taken, Ordering::SeqCst);
                return at.saturating_add(got);
            }
            at = at.saturating_add(run);
            if at < stop {
                break;
            }
        }
        at
    }

    /// Whether any chunk of the disk is dirty.
    #[must_use]
    pub fn any(&self) -> bool {
        self.next_dirty(0, self.chunks()).is_some()
    }

    /// Bytes of disk in dirty chunks, counted now; may be a moment old.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let chunks = self.chunks();
        let mut bits = 0_u64;
        for (index, word) in self.words.iter().take(chunks.div_ceil(64) as usize).enumerate() {
            let last = chunks.saturating_sub(1);
            // ORDERING: a gauge.
            let set = word.load(Ordering::Relaxed) & mask_of(index as u64, 0, last);
            bits = bits.saturating_add(u64::from(set.count_ones()));
        }
        bits.saturating_mul(DIRTY_CHUNK_BYTES).min(self.disk_bytes)
    }

    fn chunks(&self) -> u64 {
        self.disk_bytes.div_ceil(DIRTY_CHUNK_BYTES).min((self.words.len() as u64).saturating_mul(64))
    }

    fn next_dirty(&self, from: u64, chunks: u64) -> Option<u64> {
        let mut at = from;
        while at < chunks {
            let word = self.words.get((at / 64) as usize)?;
            // ORDERING: SeqCst pairs with `mark`.
            let rest = word.load(Ordering::SeqCst) >> (at % 64);
            if rest != 0 {
                let found = at.saturating_add(u64::from(rest.trailing_zeros()));
                return (found < chunks).then_some(found);
            }
            at = (at / 64).saturating_add(1).saturating_mul(64);
        }
        None
    }
}

/// The bits of word `index` that lie in the bit range `first..=last`.
const fn mask_of(index: u64, first: u64, last: u64) -> u64 {
    let base = index.saturating_mul(64);
    if last < base || first >= base.saturating_add(64) || first > last {
        return 0;
    }
    let low = first.saturating_sub(base);
    let high = last.saturating_sub(base);
    let from_low = u64::MAX << (if low > 63 { 63 } else { low });
    let to_high = if high >= 63 { u64::MAX } else { (1_u64 << (high.wrapping_add(1))).wrapping_sub(1) };
    from_low & to_high
}
