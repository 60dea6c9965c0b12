//! Comparing fills with what the server has, so that a resync ships what differs and not the whole disk.
//!
//! The [`Comparer`] sees every record of one ring in LSN order. It knows one LSN, the *base*, whose image the server can
//! hash, and which chunks any record after the base has touched. Of a chunk that none has touched, replay up to just
//! before a fill shows what the base shows; if the fill brings the same bytes, leaving it out changes no image at any LSN.
//! That is the whole argument; `docs/decisions/0009-compare-instead-of-copy.md` goes through the races.
//!
//! The base is the end of the journal when the epoch begins, and moves to the gap-begin whenever a new gap opens in a
//! history that was whole. Outside a gap there are no fills, and nothing is tracked.
//!
//! Only hints about *when* to ask depend on time; what is left out depends on records and hashes alone.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use journal_format::chunk_hash::CHUNK_BYTES;
use journal_format::{ByteRange, ChunkHash, DataSpan, GapReason, Lsn, Op, Record};

use crate::limits::{COMPARE_WAIT, HASH_ANSWER, HASH_ASK_CHUNKS, HASH_FIRST_AHEAD, HASH_PAUSE, HASH_WINDOW};

const CHUNK: u64 = CHUNK_BYTES as u64;

/// Some chunks whose hashes at an LSN are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// At which LSN.
    pub lsn: Lsn,
    /// First chunk.
    pub first_chunk: u64,
    /// How many; at least one.
    pub chunks: u32,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// To what.
    pub wanted: Wanted,
    /// One for each chunk; `None` when nobody can say now.
    pub hashes: Option<Vec<ChunkHash>>,
}

/// Where answers wait for the drain's thread.
#[derive(Debug, Default)]
pub struct HashBox {
    answers: Mutex<Vec<Answer>>,
    arrived: Condvar,
}

impl HashBox {
    /// Puts an answer there.
    pub fn put(&self, answer: Answer) {
        let mut answers = self.lock();
        // The comparer never asks for more; whoever answers what was not asked fills no memory.
        if answers.len() <= (HASH_WINDOW / u64::from(HASH_ASK_CHUNKS)) as usize * 4 {
            answers.push(answer);
        }
        self.arrived.notify_one();
    }

    fn take(&self) -> Vec<Answer> {
        core::mem::take(&mut self.lock())
    }

    /// Waits until there is an answer, or for that long.
    pub fn wait(&self, most: Duration) {
        let answers = self.lock();
        if answers.is_empty() {
            drop(self.arrived.wait_timeout(answers, most));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Answer>> {
        // A list of whole answers, whoever panicked.
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bytes of the running or last sync. Gauges.
#[derive(Debug, Default)]
pub struct SyncBytes {
    /// Read back from the disk, holes left out.
    pub read: AtomicU64,
    /// Those that were compared.
    pub compared: AtomicU64,
    /// Those that the journal has, and that were left out.
    pub equal: AtomicU64,
    /// The others.
    pub shipped: AtomicU64,
}

impl SyncBytes {
    /// Read, compared, equal, shipped.
    #[must_use]
    pub fn get(&self) -> [u64; 4] {
        // ORDERING: gauges.
        [&self.read, &self.compared, &self.equal, &self.shipped].map(|gauge| gauge.load(Ordering::Relaxed))
    }

    fn reset(&self) {
        for gauge in [&self.read, &self.compared, &self.equal, &self.shipped] {
            // ORDERING: a gauge.
            gauge.store(0, Ordering::Relaxed);
        }
    }
}

/// A request that is under way.
#[derive(Debug)]
struct Asked {
    wanted: Wanted,
    at: Duration,
}

impl Asked {
    const fn has(&self, chunk: u64) -> bool {
        let first = self.wanted.first_chunk;
        chunk >= first && chunk - first < self.wanted.chunks as u64
    }
}

/// Compares the fills of one ring.
#[derive(Debug)]
pub struct Comparer {
    base: Lsn,
    /// Generation of the open gap.
    gap: Option<u64>,
    /// In it there may be much that the journal has. Not where the ring was full or a request failed or was large: what is read
    /// back then is what the guest has just written.
    compares: bool,
    /// Size of the disk after the last record.
    disk_bytes: u64,
    /// One bit for each chunk that the disk had when the ring was made; what lies behind is never compared.
    touched: Vec<u64>,
    hashes: HashMap<u64, ChunkHash>,
    asked: VecDeque<Asked>,
    /// To be asked.
    wanted: VecDeque<Wanted>,
    /// Where the last fill ended, in bytes.
    position: u64,
    /// How many chunks ahead of `position` are asked for.
    ahead: u64,
    /// The chunk up to which they have been.
    asked_to: u64,
    /// Nothing is asked before then.
    quiet_until: Option<Duration>,
    /// Answers come, so waiting for one is worth it.
    patient: bool,
    /// The fill that waits for answers, and since when.
    held: Option<(Lsn, Duration)>,
    bytes: Arc<SyncBytes>,
}

impl Comparer {
    /// A comparer for the records after `base` of a disk that has `disk_bytes` there. History may be in a gap.
    #[must_use]
    pub fn new(base: Lsn, disk_bytes: u64) -> Self {
        let words = usize::try_from(disk_bytes.div_ceil(CHUNK).div_ceil(64)).unwrap_or(0);
        let mut comparer = Self {
            base,
            gap: Some(0),
            compares: true,
            disk_bytes,
            touched: vec![0; words],
            hashes: HashMap::new(),
            asked: VecDeque::new(),
            wanted: VecDeque::new(),
            position: 0,
            ahead: HASH_WINDOW,
            asked_to: 0,
            quiet_until: None,
            patient: true,
            held: None,
            bytes: Arc::default(),
        };
        comparer.want_ahead();
        comparer
    }

    /// Whether the record, which is the next one, is a fill that had better wait: the answer that it needs is on its way.
    /// `has_room`: the ring still has room for the guest's writes meanwhile. Ask again until it says no, then
    /// [`Comparer::admit`] it.
    #[must_use]
    pub fn holds(&mut self, now: Duration, record: &Record, has_room: bool) -> bool {
        let Op::Write { range, fill: true, .. } = record.op else { return false };
        if self.gap.is_none() {
            return false;
        }
        let since = match self.held {
            Some((lsn, since)) if lsn == record.lsn => since,
            _ => {
                self.expect(range);
                self.held = Some((record.lsn, now));
                now
            }
        };
        if self.patient && (!has_room || now.saturating_sub(since) >= COMPARE_WAIT) {
            // Until an answer comes, later fills do not wait at all.
            self.patient = false;
        }
        self.patient && self.is_waiting(range)
    }

    /// Takes the next record, whose data (if it has any) is the end of `data`. Returns the record to ship in its
    /// place: itself, or for a fill the part that differs, or a void.
    #[must_use]
    pub fn admit(&mut self, record: Record, data: &mut Vec<u8>) -> Record {
        let Op::Write { range, data: span, fill: true, fua } = record.op else {
            self.note(&record);
            return record;
        };
        let pos = span.pos as usize;
        let bytes = data.get(pos..).unwrap_or_default();
        let (from, to) = if self.gap.is_some() { self.differing(range, bytes) } else { (0, bytes.len()) };
        let shipped = ByteRange::new(range.offset().saturating_add(from as u64), (to - from) as u64);
        self.count(bytes.len(), to - from);
        let op = match shipped.filter(|shipped| !shipped.is_empty()) {
            Some(range) => {
                self.touch(range);
                data.truncate(pos + to);
                data.drain(pos..pos + from);
                let span = DataSpan { pos: span.pos, len: range.length() as u32 };
                Op::Write { range, data: span, fill: true, fua }
            }
            None => {
                data.truncate(pos);
                Op::Void
            }
        };
        Record { op, ..record }
    }

    fn note(&mut self, record: &Record) {
        match record.op {
            Op::GapBegin { reason, generation } => self.gap_begins(record.lsn, reason, generation),
            Op::GapEnd { generation } if self.gap.is_some_and(|open| open <= generation) => {
                self.gap = None;
                self.wanted.clear();
                let [read_bytes, compared_bytes, equal_bytes, shipped_bytes] = self.bytes.get();
                tracing::info!(
                    lsn = %record.lsn,
                    read_bytes,
                    compared_bytes,
                    equal_bytes,
                    shipped_bytes,
                    "synced: the gap is closed"
                );
            }
            Op::Resize { disk_bytes } => {
                // Behind the smaller end the journal now shows zeroes, whatever the base has there.
                self.touch_chunks(self.disk_bytes.min(disk_bytes) / CHUNK, u64::MAX);
                self.disk_bytes = disk_bytes;
            }
            Op::Zero { range, fill, .. } => {
                self.touch(range);
                if fill {
                    self.passed(range);
                }
            }
            Op::Write { range, .. } | Op::Discard { range } => self.touch(range),
            _ => {}
        }
    }

    fn gap_begins(&mut self, lsn: Lsn, reason: GapReason, generation: u64) {
        let compares =
            !matches!(reason, GapReason::Overflow | GapReason::WriteFailed | GapReason::LargeRequest);
        if let Some(open) = &mut self.gap {
            *open = generation.max(*open);
            if compares && !self.compares {
                (self.compares, self.asked_to) = (true, self.position / CHUNK);
                self.ahead = HASH_WINDOW;
                self.want_ahead();
            }
            return;
        }
        (self.gap, self.compares) = (Some(generation), compares);
        self.base = lsn;
        self.touched.fill(0);
        self.hashes.clear();
        self.asked.clear();
        self.wanted.clear();
        self.bytes.reset();
        (self.position, self.asked_to) = (0, 0);
        // Everything will be read, or a few places that nobody knows yet.
        self.ahead = if reason == GapReason::ContentsChanged { HASH_WINDOW } else { 0 };
        self.want_ahead();
    }

    /// A fill with data comes: asks for what it will be compared with, and for more if fills come one after the other.
    fn expect(&mut self, range: ByteRange) {
        let (first, end) = chunks_of(range);
        for chunk in first..end {
            if self.is_comparable(chunk, range) && !self.is_known(chunk) && !self.is_coming(chunk) {
                self.want(chunk, end);
                break;
            }
        }
        self.passed(range);
    }

    /// The resync has come to the end of this fill.
    fn passed(&mut self, range: ByteRange) {
        let end = range.end().div_ceil(CHUNK);
        let goes_on = range.offset() >= self.position && range.offset() / CHUNK <= self.asked_to;
        if goes_on {
            self.ahead = (self.ahead * 2).clamp(HASH_FIRST_AHEAD, HASH_WINDOW);
            self.asked_to = self.asked_to.max(end);
        } else {
            // A few places here and there: what lies ahead is not needed.
            (self.ahead, self.asked_to) = (0, end);
        }
        self.position = range.end();
        if !goes_on || self.hashes.len() as u64 > 2 * HASH_WINDOW {
            let passed = self.position / CHUNK;
            self.hashes.retain(|chunk, _| *chunk >= passed || chunks_of(range).0 <= *chunk);
        }
        self.want_ahead();
    }

    fn want_ahead(&mut self) {
        let end = self.disk_bytes.div_ceil(CHUNK);
        let target = (self.position / CHUNK).saturating_add(self.ahead).min(end);
        // In whole requests, or one for every fill would be sent.
        while self.asked_to + u64::from(HASH_ASK_CHUNKS) <= target || (target == end && self.asked_to < end) {
            let to = target.min(self.asked_to + u64::from(HASH_ASK_CHUNKS));
            self.want(self.asked_to, to);
            self.asked_to = to;
        }
    }

    fn want(&mut self, from: u64, to: u64) {
        let Ok(chunks) = u32::try_from(to.saturating_sub(from)) else { return };
        if self.compares && self.base > Lsn::ZERO && chunks > 0 {
            self.wanted.push_back(Wanted {
                lsn: self.base,
                first_chunk: from,
                chunks: chunks.min(HASH_ASK_CHUNKS),
            });
        }
    }

    /// What the running or last sync did.
    #[must_use]
    pub fn bytes(&self) -> Arc<SyncBytes> {
        Arc::clone(&self.bytes)
    }

    /// What to ask the server for now.
    pub fn ask(&mut self, now: Duration) -> Option<Wanted> {
        if self.quiet_until.is_some_and(|until| now < until) {
            self.wanted.clear();
            return None;
        }
        // Questions get lost with their connection.
        self.asked.retain(|asked| now.saturating_sub(asked.at) < HASH_ANSWER);
        if self.asked.len() >= (HASH_WINDOW / u64::from(HASH_ASK_CHUNKS)) as usize * 2 {
            return None;
        }
        let wanted = self.wanted.pop_front()?;
        self.asked.push_back(Asked { wanted, at: now });
        Some(wanted)
    }

    /// Takes what has come.
    pub fn take_answers(&mut self, now: Duration, answers: &HashBox) {
        for answer in answers.take() {
            let asked = self.asked.iter().position(|asked| asked.wanted == answer.wanted);
            // An answer to another base, or one that was given up, says nothing.
            let Some(asked) = asked.and_then(|at| self.asked.remove(at)) else { continue };
            match answer.hashes.filter(|hashes| hashes.len() == asked.wanted.chunks as usize) {
                Some(hashes) => {
                    self.patient = true;
                    self.hashes.extend((asked.wanted.first_chunk..).zip(hashes));
                }
                None => {
                    self.patient = false;
                    self.quiet_until = Some(now + HASH_PAUSE);
                }
            }
        }
    }

    fn is_waiting(&self, range: ByteRange) -> bool {
        let (first, end) = chunks_of(range);
        let needed = |chunk: &u64| self.is_comparable(*chunk, range) && !self.is_known(*chunk);
        (first..end).filter(needed).any(|chunk| self.is_coming(chunk))
    }

    /// From which byte to which a fill's data has to be shipped: the journal has the rest.
    fn differing(&mut self, range: ByteRange, data: &[u8]) -> (usize, usize) {
        let (first, end) = chunks_of(range);
        let mut differing: Option<(usize, usize)> = None;
        for chunk in first..end {
            let (start, stop) = part_of(chunk, range);
            let hash = self.hashes.remove(&chunk).filter(|hash| *hash != ChunkHash::UNKNOWN);
            let bytes = data.get(start..stop).unwrap_or_default();
            if let Some(hash) = hash.filter(|_| self.is_comparable(chunk, range)) {
                // ORDERING: a gauge.
                self.bytes.compared.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                if ChunkHash::of(bytes) == hash {
                    continue;
                }
            }
            differing = Some((differing.map_or(start, |(from, _)| from), stop));
        }
        differing.unwrap_or((0, 0))
    }

    fn count(&self, read: usize, shipped: usize) {
        let bytes = &self.bytes;
        for (gauge, by) in [(&bytes.read, read), (&bytes.equal, read - shipped), (&bytes.shipped, shipped)] {
            // ORDERING: a gauge.
            gauge.fetch_add(by as u64, Ordering::Relaxed);
        }
    }

    /// Whether the fill brings all that there is of an untouched chunk.
    fn is_comparable(&self, chunk: u64, fill: ByteRange) -> bool {
        let (start, stop) = (chunk * CHUNK, (chunk + 1) * CHUNK);
        fill.offset() <= start
            && (fill.end() >= stop || fill.end() == self.disk_bytes)
            && self.touched.get((chunk / 64) as usize).is_some_and(|word| word >> (chunk % 64) & 1 == 0)
    }

    fn is_known(&self, chunk: u64) -> bool {
        self.hashes.contains_key(&chunk)
    }

    fn is_coming(&self, chunk: u64) -> bool {
        let has = |wanted: &Wanted| {
            chunk >= wanted.first_chunk && chunk - wanted.first_chunk < u64::from(wanted.chunks)
        };
        self.asked.iter().any(|asked| asked.has(chunk)) || self.wanted.iter().any(has)
    }

    fn touch(&mut self, range: ByteRange) {
        if self.gap.is_none() || range.is_empty() {
            return;
        }
        let (first, end) = chunks_of(range);
        self.touch_chunks(first, end);
    }

    fn touch_chunks(&mut self, first: u64, end: u64) {
        let words = self.touched.len() as u64;
        let end = end.min(words * 64);
        let mut chunk = first;
        while chunk < end {
            let (word, bit) = (chunk / 64, chunk % 64);
            let count = (64 - bit).min(end - chunk);
            let mask = u64::MAX >> (64 - count) << bit;
            if let Some(word) = self.touched.get_mut(word as usize) {
                *word |= mask;
            }
            chunk += count;
        }
    }
}

/// The chunks that a range touches: first, and one past the last.
const fn chunks_of(range: ByteRange) -> (u64, u64) {
    (range.offset() / CHUNK, range.end().div_ceil(CHUNK))
}

/// The bytes of a fill's data that lie in a chunk.
fn part_of(chunk: u64, fill: ByteRange) -> (usize, usize) {
    let start = (chunk * CHUNK).max(fill.offset()) - fill.offset();
    let stop = ((chunk + 1) * CHUNK).min(fill.end()) - fill.offset();
    (start as usize, stop as usize)
}
