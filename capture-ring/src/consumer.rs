//! The consuming end. Whatever the memory holds, it returns records that keep every rule of `journal_format`, or an
//! error; it never panics, never reads outside the mapping and never loops without bound.

use std::collections::VecDeque;
use std::sync::Arc;

use journal_format::limits::{MAX_BOOKMARK_BYTES, MAX_DISK_BYTES, MAX_RECORD_DATA_BYTES};
use journal_format::{ByteRange, DataSpan, GapReason, ImageTag, Lsn, Op, Record, Stamp};

use crate::clock::HostClock;
use crate::error::{RingError, RingErrorKind};
use crate::layout::{STATE_FILL, STATE_FREE, flag, kind};
use crate::limits::{CREDIT_BATCH, HOLD_BYTES, HOLD_RECORDS, MAX_PIECES, MAX_STAMP, SLAB_UNITS, UNIT_BYTES};
use crate::ring::Ring;
use crate::slots::{Entry, Look};
use crate::sync::Ordering;

/// What [`Consumer::next`] found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Next {
    /// The next record. Its data, if it has any, was appended to the caller's vector; the record's span says where.
    Record(Record),
    /// The next record has this many bytes of data, more than the caller has room for. Nothing was taken.
    NoRoom(u32),
    /// Nothing is published.
    Empty,
}

/// A record whose every field was copied and checked.
#[derive(Clone, Copy, Debug)]
struct Checked {
    entry: Entry,
    op: Op,
    chain: Chain,
    data_bytes: u32,
}

/// Unit and units of each piece of a record.
type Chain = ([(u32, u32); MAX_PIECES as usize], usize);

/// The pieces of records that were copied out and are still in the ring, in order.
#[derive(Debug, Default)]
struct Held {
    /// Number of the first.
    first: u64,
    /// How many pieces each has.
    counts: VecDeque<u8>,
    pieces: VecDeque<(u32, u32)>,
    /// Arena units of all of them.
    units: u64,
}

/// The consuming end of a ring. There is one per ring, used by one thread.
///
/// A record is taken in two steps, so that whoever must not lose it can put it into a safe place in between:
/// [`Consumer::copy`] leaves it where it is, [`Consumer::free`] gives the room of all up to one back.
/// [`Consumer::next`] is both.
#[derive(Debug)]
pub struct Consumer {
    ring: Arc<Ring>,
    clock: HostClock,
    /// Number of the next record.
    head: u64,
    /// Records freed whose credits are not given back yet.
    unreturned: u64,
    last_stamp: Stamp,
    /// The clock when last looked at: saves touching its cache line for every record.
    clock_seen: Stamp,
    /// The record at `head`, when it was looked at but there was no room for it.
    looked: Option<Checked>,
    /// Those before `head` whose room is not given back yet.
    held: Held,
    /// Once the producers are dead: how many slots they had reserved.
    closed_at: Option<u64>,
    failed: Option<(RingErrorKind, &'static str, Lsn)>,
}

impl Consumer {
    /// The consumer of a new ring, at its first record.
    #[must_use]
    pub const fn new(ring: Arc<Ring>, clock: HostClock) -> Self {
        Self {
            ring,
            clock,
            head: 0,
            unreturned: 0,
            last_stamp: Stamp::ZERO,
            clock_seen: Stamp::ZERO,
            looked: None,
            held: Held { first: 0, counts: VecDeque::new(), pieces: VecDeque::new(), units: 0 },
            closed_at: None,
            failed: None,
        }
    }

    /// Goes on where the consumer of a process that died has stopped. `next` is the first record that it had not put
    /// into a safe place, `stamp` that of the last one that it had; `freed` is what [`Consumer::free`] said last. What
    /// it had not begun to free nobody else will, so it is done now, and said to `before`.
    ///
    /// # Errors
    /// `Corrupt` when the ring cannot have been left there by such a consumer; then nothing was changed.
    pub fn adopt(
        ring: Arc<Ring>,
        clock: HostClock,
        next: Lsn,
        stamp: Stamp,
        freed: (Lsn, u8),
        before: impl FnMut(Lsn, u8),
    ) -> Result<Self, RingError> {
        let slots = ring.geometry().slots;
        // ORDERING: Acquire pairs with the Release in `return_credits`; its writer is dead.
        let given_back = ring.memory().words().head.load(Ordering::Acquire);
        let taken = next.0.checked_sub(ring.config().first_lsn.0);
        let head = taken.filter(|head| {
            let tail = ring.slots().tail();
            let backlog = tail.checked_sub(given_back).is_some_and(|backlog| backlog <= slots);
            backlog && (given_back..=tail).contains(head)
        });
        let head = head.ok_or(RingError::corrupt("the ring does not go on where its last agent stopped"))?;
        if stamp > clock.last() {
            return Err(RingError::corrupt("the last record is later than the host's clock"));
        }
        if head.saturating_sub(given_back) > 2 * HOLD_RECORDS {
            return Err(RingError::corrupt(
                "the ring's last agent is said to have held more than any agent does",
            ));
        }
        let mut held = Held { first: given_back, ..Held::default() };
        for number in given_back..head {
            let lsn = ring.slots().lsn(number);
            held.push(&left_of(&ring, number, freed).map_err(|error| error.at(lsn))?);
        }
        let mut consumer = Self { head, last_stamp: stamp, held, ..Self::new(ring, clock) };
        consumer.free(next.prev(), before);
        consumer.return_credits();
        consumer.disarm_sleep();
        Ok(consumer)
    }

    /// The ring.
    #[must_use]
    pub fn ring(&self) -> &Ring {
        &self.ring
    }

    /// LSN of the next record.
    #[must_use]
    pub fn next_lsn(&self) -> Lsn {
        self.ring.slots().lsn(self.head)
    }

    /// Takes the next record out, if one is published: appends its data to `data` and frees its room. A record with
    /// more than `max_bytes` of data stays where it is.
    ///
    /// # Errors
    /// `Corrupt` when the memory breaks the ring's rules, `Stopped` when capture ended without a gap record. Either
    /// is final: every later call returns it again, and nothing behind it may be used.
    pub fn next(&mut self, data: &mut Vec<u8>, max_bytes: u32) -> Result<Next, RingError> {
        let next = self.copy(data, max_bytes)?;
        self.free(Lsn::MAX, |_, _| {});
        Ok(next)
    }

    /// The first half of [`Consumer::next`]: copies the record and its data and leaves both in the ring.
    ///
    /// # Errors
    /// As [`Consumer::next`].
    pub fn copy(&mut self, data: &mut Vec<u8>, max_bytes: u32) -> Result<Next, RingError> {
        if let Some((kind, what, lsn)) = self.failed {
            return Err(RingError::new(kind, what).at(lsn));
        }
        let result = self.try_copy(data, max_bytes);
        result.map_err(|error| {
            self.failed = Some((error.kind(), error.what(), self.next_lsn()));
            error.at(self.next_lsn())
        })
    }

    fn try_copy(&mut self, data: &mut Vec<u8>, max_bytes: u32) -> Result<Next, RingError> {
        let checked = match self.looked.take() {
            Some(checked) => checked,
            None => match self.ring.slots().look(self.head) {
                Look::Published(_) if !self.is_usable()? => return Ok(Next::Empty),
                Look::Published(entry) => self.check(entry)?,
                Look::Pending => {
                    self.is_usable()?;
                    return self.nothing_published();
                }
                Look::Corrupt => {
                    return Err(RingError::corrupt("a slot's word is one that no producer writes"));
                }
            },
        };
        if checked.data_bytes > max_bytes {
            self.looked = Some(checked);
            return Ok(Next::NoRoom(checked.data_bytes));
        }
        let op = self.copy_data(&checked, data)?;
        Ok(Next::Record(self.record(checked.entry.stamp, op, &checked.chain)))
    }

    /// The second half of [`Consumer::next`]: gives the room of the records up to `to` back that were copied.
    ///
    /// A record's last piece is freed first, so that its chain leads to all that are left. `before(lsn, n)` is called
    /// before piece `n` of a record is freed: a consumer that takes over must free those that were not begun, and leave
    /// the one at which this process died alone (it may be in use again).
    pub fn free(&mut self, to: Lsn, mut before: impl FnMut(Lsn, u8)) {
        while let Some(count) = self.held.counts.front().copied() {
            let lsn = self.ring.slots().lsn(self.held.first);
            if lsn > to {
                break;
            }
            let pieces = usize::from(count).min(self.held.pieces.len());
            for (number, (block, _)) in (0..count).zip(self.held.pieces.range(..pieces)).rev() {
                before(lsn, number);
                self.ring.set_state(*block, STATE_FREE, 0);
                self.ring.arena().free(*block);
            }
            self.held.pop(pieces);
            self.unreturned = self.unreturned.saturating_add(1);
            if self.unreturned >= CREDIT_BATCH.min(self.ring.geometry().slots / 4) {
                self.return_credits();
            }
        }
    }

    /// Whether so much was copied and not freed that producers would feel it: a quarter of the slots or of the arena, or
    /// more than stays in the caches, where the pieces that are used next should be.
    #[must_use]
    pub fn holds_much(&self) -> bool {
        let (config, records) = (self.ring.config(), self.held.counts.len() as u64);
        let bytes = self.held.units.saturating_mul(u64::from(UNIT_BYTES));
        records >= HOLD_RECORDS.min(u64::from(config.slots) / 4)
            || bytes >= HOLD_BYTES.min(config.arena_bytes / 4)
    }

    /// Whether the record at the head comes before the point at which capture stopped; false while that is being
    /// worked out.
    fn is_usable(&self) -> Result<bool, RingError> {
        let words = self.ring.memory().words();
        // ORDERING: Relaxed: the slot's word was loaded with Acquire, and if its publisher reserved after the stop, the
        // chain of `tail` makes the stop visible. For a slot that is not published it is a hint.
        if words.stopped.load(Ordering::Relaxed) == 0 {
            return Ok(true);
        }
        // ORDERING: Acquire pairs with `Producer::stop`.
        match words.stopped_at.load(Ordering::Acquire) {
            0 if self.closed_at.is_none() => Ok(false),
            at if at > self.head.wrapping_add(1) => Ok(true),
            _ => Err(RingError::new(
                RingErrorKind::Stopped,
                "capture ended in the filter without a gap record",
            )),
        }
    }

    fn nothing_published(&mut self) -> Result<Next, RingError> {
        self.return_credits();
        match self.closed_at {
            // A slot whose writer died with it. Only the very first record, where the filter died while it attached,
            // has none before it to take the stamp from.
            Some(end) if self.head < end => {
                let stamp = if self.last_stamp == Stamp::ZERO { self.clock.now() } else { self.last_stamp };
                Ok(Next::Record(self.record(stamp.0, Op::Void, &([(0, 0); MAX_PIECES as usize], 0))))
            }
            _ => Ok(Next::Empty),
        }
    }

    /// The record at the head, of which everything was copied.
    fn record(&mut self, stamp: u64, op: Op, chain: &Chain) -> Record {
        let lsn = self.next_lsn();
        self.last_stamp = self.last_stamp.max(Stamp(stamp));
        self.held.push(chain);
        self.head = self.head.saturating_add(1);
        Record { lsn, stamp: self.last_stamp, op }
    }

    /// Gives the credits of freed records back, so that producers can use their slots.
    ///
    /// Records that are freed give their credits back in batches. Call it before a pause between records, so that
    /// nobody waits for the rest of a batch.
    pub fn return_credits(&mut self) {
        if self.unreturned > 0 {
            // ORDERING: a gauge, and the place to go on for an agent that comes back.
            self.ring.memory().words().head.store(self.held.first, Ordering::Release);
            self.ring.slots().give_back(self.unreturned);
            self.unreturned = 0;
            self.ring.tell_waiters();
        }
    }

    /// Checks every field of a slot's private copy, and walks its chain.
    fn check(&mut self, entry: Entry) -> Result<Checked, RingError> {
        self.check_stamp(entry.stamp)?;
        let allowed = match entry.kind {
            kind::WRITE => flag::FILL | flag::FUA,
            kind::ZERO => flag::FILL | flag::FUA | flag::MAY_UNMAP,
            _ => 0,
        };
        if entry.flags & !allowed != 0 || (entry.reason != 0 && entry.kind != kind::GAP_BEGIN) {
            return Err(RingError::corrupt("a record has a flag or reason that its kind does not have"));
        }
        let (op, data_bytes) = op_of(&entry)?;
        let chain = walk(&self.ring, &entry, entry.pieces)?;
        let room = pieces_of(&chain).iter().fold(0, |sum: u32, (_, units)| sum.saturating_add(*units));
        let has_block = matches!(entry.kind, kind::WRITE | kind::BOOKMARK);
        if has_block && entry.pieces == 0 {
            Err(RingError::corrupt("a record has an impossible number of pieces"))
        } else if room.saturating_mul(UNIT_BYTES) < data_bytes {
            Err(RingError::corrupt("a record's pieces are smaller than its data"))
        } else {
            Ok(Checked { entry, op, chain, data_bytes })
        }
    }

    fn check_stamp(&mut self, stamp: u64) -> Result<(), RingError> {
        if Stamp(stamp) > self.clock_seen {
            self.clock_seen = self.clock.last();
        }
        if stamp == 0 || Stamp(stamp) > self.clock_seen || stamp >= MAX_STAMP {
            return Err(RingError::corrupt("a record's stamp is 0 or later than the host's clock"));
        }
        Ok(())
    }

    /// Copies a checked record's data out.
    fn copy_data(&self, checked: &Checked, data: &mut Vec<u8>) -> Result<Op, RingError> {
        let pos =
            u32::try_from(data.len()).map_err(|_| RingError::corrupt("the caller's data passes 4 GiB"))?;
        let mut left = checked.data_bytes;
        for &(block, units) in pieces_of(&checked.chain) {
            let bytes = left.min(units.saturating_mul(UNIT_BYTES));
            if bytes > 0 && !self.ring.memory().copy_out(block, bytes, data) {
                return Err(RingError::corrupt("a piece lies outside the arena"));
            }
            left = left.saturating_sub(bytes);
        }
        let span = DataSpan { pos, len: checked.data_bytes };
        match checked.op {
            Op::Write { range, fill, fua, .. } => Ok(Op::Write { range, data: span, fill, fua }),
            Op::Bookmark { .. } => {
                let name = data.get(pos as usize..).unwrap_or(&[]);
                if core::str::from_utf8(name).is_err() {
                    return Err(RingError::corrupt("a bookmark's name is not UTF-8"));
                }
                Ok(Op::Bookmark { name: span })
            }
            op => Ok(op),
        }
    }

    /// Whether a record can be taken without waiting.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.looked.is_some()
            || self.closed_at.is_some_and(|end| self.head < end)
            || !matches!(self.ring.slots().look(self.head), Look::Pending)
    }

    /// Tells producers that this end is about to sleep on its bell until the next record is published. False when
    /// that has happened already: do not sleep. Call [`Consumer::disarm_sleep`] after waking, whatever woke it.
    #[must_use]
    pub fn arm_sleep(&mut self) -> bool {
        self.return_credits();
        !self.is_ready() && self.ring.slots().sleep_until(self.head)
    }

    /// Takes [`Consumer::arm_sleep`] back.
    pub fn disarm_sleep(&self) {
        self.ring.slots().awake();
    }

    /// The filter's process is dead, and this process has no bookmark under way: from now on a slot that was
    /// reserved and never published is handed out as [`Op::Void`], up to the last one reserved.
    ///
    /// # Errors
    /// `Corrupt` when the number of reserved slots is impossible; records published before are still handed out.
    pub fn close_dead(&mut self) -> Result<(), RingError> {
        let tail = self.ring.slots().tail();
        let slots = self.ring.geometry().slots;
        let in_reach = tail.checked_sub(self.head).is_some_and(|reserved| reserved <= slots);
        self.closed_at = Some(if in_reach { tail } else { self.head });
        if in_reach {
            Ok(())
        } else {
            Err(RingError::corrupt("more slots are reserved than the ring has").at(self.next_lsn()))
        }
    }

    /// After [`Consumer::close_dead`], when [`Consumer::next`] says `Empty` and everything is freed: the ranges of all
    /// requests that were begun and have no record, sorted and merged. What the disk holds there is unknown.
    ///
    /// # Errors
    /// `Corrupt` when a header is one that no producer writes: then the whole disk is unknown.
    pub fn issued_ranges(&self) -> Result<Vec<ByteRange>, RingError> {
        let mut ranges = Vec::new();
        for header in self.ring.memory().blocks() {
            // ORDERING: Acquire pairs with the Release in `set_state`; the writer is dead, so nothing changes.
            let [state, ..] = header.state.load(Ordering::Acquire).to_le_bytes();
            if state == STATE_FREE || state == STATE_FILL {
                continue;
            }
            let (offset, length) =
                (header.offset.load(Ordering::Relaxed), header.length.load(Ordering::Relaxed));
            let range = ByteRange::new(offset, length).filter(|_| state < STATE_FILL);
            ranges
                .push(range.ok_or(RingError::corrupt("a block's header has an impossible state or range"))?);
        }
        ranges.retain(|range| !range.is_empty());
        Ok(merged(ranges))
    }
}

impl Held {
    fn push(&mut self, chain: &Chain) {
        let pieces = pieces_of(chain);
        self.counts.push_back(u8::try_from(pieces.len()).unwrap_or(u8::MAX));
        for piece in pieces {
            self.pieces.push_back(*piece);
            self.units = self.units.saturating_add(u64::from(piece.1));
        }
    }

    /// Lets go of the first record, which has so many pieces.
    fn pop(&mut self, pieces: usize) {
        let units =
            self.pieces.drain(..pieces).fold(0, |sum: u64, (_, units)| sum.saturating_add(u64::from(units)));
        self.units = self.units.saturating_sub(units);
        self.counts.pop_front();
        self.first = self.first.saturating_add(1);
    }
}

fn pieces_of((pieces, count): &Chain) -> &[(u32, u32)] {
    pieces.get(..*count).unwrap_or(&[])
}

/// Copies and checks the headers of the first `most` of a record's pieces. Bounded by [`MAX_PIECES`].
fn walk(ring: &Ring, entry: &Entry, most: u32) -> Result<Chain, RingError> {
    let mut pieces = [(0, 0); MAX_PIECES as usize];
    let count = entry.pieces.min(most) as usize;
    if entry.pieces > MAX_PIECES {
        return Err(RingError::corrupt("a record has an impossible number of pieces"));
    }
    let mut block = entry.block;
    for place in pieces.iter_mut().take(count) {
        let header = ring.memory().blocks().get(block as usize);
        let header = header.ok_or(RingError::corrupt("a piece lies outside the arena"))?;
        // ORDERING: Relaxed, made visible by the slot's word. Read once.
        let link = header.link.load(Ordering::Relaxed);
        let room = SLAB_UNITS.saturating_sub(block % SLAB_UNITS);
        let units = u32::try_from(link >> 32).ok().filter(|units| (1..=room).contains(units));
        let units = units.ok_or(RingError::corrupt("a piece does not lie in one slab"))?;
        *place = (block, units);
        block = link as u32;
    }
    Ok((pieces, count))
}

/// The pieces of a record that was taken which a consumer that died had not begun to free, where `freed` is the last of
/// which it said that it would.
fn left_of(ring: &Ring, number: u64, (lsn, piece): (Lsn, u8)) -> Result<Chain, RingError> {
    let most = match ring.slots().lsn(number).cmp(&lsn) {
        core::cmp::Ordering::Less => 0,
        core::cmp::Ordering::Equal => u32::from(piece),
        core::cmp::Ordering::Greater => MAX_PIECES,
    };
    match ring.slots().look(number) {
        Look::Published(entry) => walk(ring, &entry, most),
        // It was given up as void.
        Look::Pending => Ok(([(0, 0); MAX_PIECES as usize], 0)),
        Look::Corrupt => Err(RingError::corrupt("a slot's word is one that no producer writes")),
    }
}

/// The record that a slot's copy means, with an empty span for its data, and how many bytes of data it has.
fn op_of(entry: &Entry) -> Result<(Op, u32), RingError> {
    let range = || {
        ByteRange::new(entry.offset, entry.length)
            .filter(|range| !range.is_empty())
            .ok_or(RingError::corrupt("a record's range is empty or passes the largest disk"))
    };
    let data = |most: u32| {
        u32::try_from(entry.length)
            .ok()
            .filter(|length| (1..=most).contains(length))
            .ok_or(RingError::corrupt("a record's data is empty or too long"))
    };
    let (fill, fua) = (entry.flags & flag::FILL != 0, entry.flags & flag::FUA != 0);
    let span = DataSpan { pos: 0, len: 0 };
    Ok(match entry.kind {
        kind::WRITE => (Op::Write { range: range()?, data: span, fill, fua }, data(MAX_RECORD_DATA_BYTES)?),
        kind::ZERO => {
            (Op::Zero { range: range()?, fill, fua, may_unmap: entry.flags & flag::MAY_UNMAP != 0 }, 0)
        }
        kind::DISCARD => (Op::Discard { range: range()? }, 0),
        kind::BOOKMARK => (Op::Bookmark { name: span }, data(MAX_BOOKMARK_BYTES)?),
        kind::RESIZE if entry.offset <= MAX_DISK_BYTES => (Op::Resize { disk_bytes: entry.offset }, 0),
        kind::GAP_BEGIN => {
            let reason = u8::try_from(entry.reason).ok().and_then(GapReason::from_u8);
            let reason = reason.ok_or(RingError::corrupt("a gap has an unknown reason"))?;
            (Op::GapBegin { reason, generation: entry.offset }, 0)
        }
        kind::GAP_END => (Op::GapEnd { generation: entry.offset }, 0),
        kind::FLUSH => (Op::Flush, 0),
        kind::VOID => (Op::Void, 0),
        kind::CLOSE => (Op::Close { image: ImageTag::from_halves([entry.offset, entry.length]) }, 0),
        _ => return Err(RingError::corrupt("a record has an unknown kind or size")),
    })
}

/// Sorts ranges and joins those that touch.
fn merged(mut ranges: Vec<ByteRange>) -> Vec<ByteRange> {
    ranges.sort_unstable_by_key(|range| range.offset());
    let mut out: Vec<ByteRange> = Vec::new();
    for range in ranges {
        match out.last_mut() {
            Some(last) if range.offset() <= last.end() => {
                let end = last.end().max(range.end());
                if let Some(joined) = ByteRange::new(last.offset(), end.saturating_sub(last.offset())) {
                    *last = joined;
                }
            }
            _ => out.push(range),
        }
    }
    out
}
