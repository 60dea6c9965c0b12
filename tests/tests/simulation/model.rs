//! What is true of one disk: an independent log of what it held after each record, kept from what the guest did and from
//! nothing that went through the journal.
//!
//! *Settled* contents are those of completed requests. A request in flight at the end of a gap may already be on the disk
//! in part, and the resync may have read that: until it completes, each of its sectors may be the old one or the new one,
//! as after a power cut of a real disk. Anywhere else a point is exact to the byte.

use std::collections::BTreeMap;
use std::rc::Rc;

use journal_format::GapReason;

/// Bytes that a disk writes in one go.
pub(crate) const SECTOR: usize = 512;

/// Points between two whole copies.
const KEYFRAME: usize = 48;

/// Bytes that changed.
#[derive(Clone, Debug)]
pub(crate) struct Delta {
    pub(crate) offset: usize,
    pub(crate) bytes: Rc<[u8]>,
}

/// A part that may also hold something else.
#[derive(Clone, Debug)]
pub(crate) struct Loose {
    /// The request that may have written it.
    pub(crate) request: u64,
    pub(crate) offset: usize,
    pub(crate) bytes: Rc<[u8]>,
}

/// A guest's request that was recorded: when it began and when it was complete, on one scale for all disks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub(crate) began: u64,
    pub(crate) ended: u64,
}

/// What is known of one LSN.
#[derive(Clone, Debug)]
pub(crate) struct Point {
    pub(crate) stamp: u64,
    /// Whether the disk's history is whole here.
    pub(crate) whole: bool,
    pub(crate) span: Option<Span>,
    pub(crate) loose: Rc<Vec<Loose>>,
    /// What the record was, for people.
    pub(crate) what: &'static str,
    deltas: Vec<Delta>,
    keyframe: Option<Rc<Vec<u8>>>,
}

/// A capture session as the filter saw it.
#[derive(Debug)]
pub(crate) struct Epoch {
    pub(crate) first: u64,
    /// Why it began with a gap.
    pub(crate) begins: GapReason,
    pub(crate) end: Option<End>,
    /// The operator has switched protection on anew since it began.
    pub(crate) switched: bool,
}

/// How an epoch ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum End {
    /// The agent had it detached, when so many agents and QEMUs had died.
    Detached(u64),
    /// QEMU was gone.
    VmGone,
}

/// The truth about one disk.
#[derive(Debug)]
pub(crate) struct Model {
    settled: Vec<u8>,
    pending: Vec<Delta>,
    loose: Rc<Vec<Loose>>,
    points: BTreeMap<u64, Point>,
    /// The epochs that the server may have something of, and the one that runs.
    pub(crate) epochs: Vec<Epoch>,
    since_keyframe: usize,
}

impl Model {
    pub(crate) fn new(contents: &[u8]) -> Self {
        Self {
            settled: contents.to_vec(),
            pending: Vec::new(),
            loose: Rc::default(),
            points: BTreeMap::new(),
            epochs: Vec::new(),
            since_keyframe: KEYFRAME,
        }
    }

    /// Bytes that are on the disk for good.
    pub(crate) fn settle(&mut self, offset: usize, bytes: &[u8]) {
        let end = (offset + bytes.len()).min(self.settled.len());
        let Some(len) = end.checked_sub(offset).filter(|len| *len > 0) else { return };
        self.settled[offset..end].copy_from_slice(&bytes[..len]);
        self.pending.push(Delta { offset, bytes: bytes[..len].into() });
    }

    /// Size of the disk in bytes.
    pub(crate) fn size(&self) -> usize {
        self.settled.len()
    }

    /// The settled contents from there on.
    pub(crate) fn tail(&self, from: usize) -> &[u8] {
        &self.settled[from..]
    }

    /// A new size; what is behind the old end reads as zeroes until it is settled.
    pub(crate) fn resize(&mut self, size: usize) {
        self.settled.resize(size, 0);
        self.since_keyframe = KEYFRAME;
    }

    /// Everything is as `contents` says, except for what requests in flight wrote.
    pub(crate) fn settle_all(&mut self, contents: Vec<u8>, loose: Vec<Loose>) {
        self.settled = contents;
        self.pending.clear();
        self.loose = Rc::new(loose);
        self.since_keyframe = KEYFRAME;
    }

    /// A request has completed: its sectors are exact again.
    pub(crate) fn tighten(&mut self, request: u64) {
        if self.loose.iter().any(|loose| loose.request == request) {
            let rest = self.loose.iter().filter(|loose| loose.request != request).cloned().collect();
            self.loose = Rc::new(rest);
        }
    }

    /// A new epoch begins at this LSN: what was recorded from there on is lost with the old one.
    pub(crate) fn begin_epoch(&mut self, first: u64, reason: GapReason) {
        self.points.split_off(&first);
        self.epochs.retain(|epoch| epoch.first < first);
        self.epochs.push(Epoch { first, begins: reason, end: None, switched: false });
        self.since_keyframe = KEYFRAME;
    }

    /// The epoch that runs ends.
    pub(crate) fn end_epoch(&mut self, end: End) {
        if let Some(epoch) = self.epochs.last_mut().filter(|epoch| epoch.end.is_none()) {
            epoch.end = Some(end);
        }
    }

    /// The operator switches protection on anew.
    pub(crate) fn switch_on(&mut self) {
        self.epochs.iter_mut().for_each(|epoch| epoch.switched = true);
    }

    /// The settled contents are those of this LSN.
    pub(crate) fn point(
        &mut self,
        lsn: u64,
        stamp: u64,
        whole: bool,
        span: Option<Span>,
        what: &'static str,
    ) {
        let last = self.last();
        assert!(last == 0 || lsn == last + 1, "LSN {lsn} follows {last}");
        let keyframe = (self.since_keyframe >= KEYFRAME).then(|| Rc::new(self.settled.clone()));
        self.since_keyframe = if keyframe.is_some() { 0 } else { self.since_keyframe + 1 };
        let deltas = std::mem::take(&mut self.pending);
        let loose = Rc::clone(&self.loose);
        self.points.insert(lsn, Point { stamp, whole, span, loose, what, deltas, keyframe });
    }

    /// Whether history is whole at its end.
    pub(crate) fn ends_whole(&self) -> bool {
        self.points.last_key_value().is_some_and(|(_, point)| point.whole)
    }

    /// The last LSN.
    pub(crate) fn last(&self) -> u64 {
        self.points.last_key_value().map_or(0, |(lsn, _)| *lsn)
    }

    pub(crate) fn get(&self, lsn: u64) -> Option<&Point> {
        self.points.get(&lsn)
    }

    /// The points up to `lsn`, newest first.
    pub(crate) fn back_from(&self, lsn: u64) -> impl Iterator<Item = (u64, &Point)> {
        self.points.range(..=lsn).rev().map(|(lsn, point)| (*lsn, point))
    }

    /// The points after `lsn`, oldest first.
    pub(crate) fn after(&self, lsn: u64) -> impl Iterator<Item = (u64, &Point)> {
        self.points.range(lsn + 1..).map(|(lsn, point)| (*lsn, point))
    }

    /// The disk at an LSN.
    pub(crate) fn image(&self, lsn: u64) -> Vec<u8> {
        let (at, frame) = self
            .back_from(lsn)
            .find_map(|(at, point)| point.keyframe.as_ref().map(|frame| (at, frame)))
            .expect("every epoch begins with a whole copy");
        let mut image = frame.as_ref().clone();
        let newer = self.points.range(at..=lsn).skip(1);
        for delta in newer.flat_map(|(_, point)| &point.deltas) {
            image[delta.offset..delta.offset + delta.bytes.len()].copy_from_slice(&delta.bytes);
        }
        image
    }

    /// The first byte at which `found` is not what the disk held at the LSN.
    pub(crate) fn differs(&self, lsn: u64, found: &[u8]) -> Option<usize> {
        let image = self.image(lsn);
        if image.len() != found.len() {
            return Some(image.len().min(found.len()));
        }
        if image == found {
            return None;
        }
        let point = &self.points[&lsn];
        let sectors = image.chunks(SECTOR).zip(found.chunks(SECTOR)).enumerate();
        for (index, (expected, found)) in sectors {
            let at = index * SECTOR;
            let may = |loose: &Loose| {
                let from = at.checked_sub(loose.offset);
                from.and_then(|from| loose.bytes.get(from..from + found.len())) == Some(found)
            };
            if expected != found && !point.loose.iter().any(may) {
                return Some(at);
            }
        }
        None
    }
}
