//! The server's commands: protection on and off, bookmarks. All of them may be repeated.

use std::time::Duration;

use journal_format::limits::MAX_BOOKMARK_BYTES;
use journal_format::{DiskId, Lsn, Stamp};

use super::capture::{Capture, Phase};
use super::{Action, Session, Settings};
use crate::limits::{FILTER_ANSWER, MAX_WAITERS};

/// A request that is answered when its disk gets there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Waiter {
    pub(super) request: u64,
    /// While the filter is asked: when the server hears that QEMU does not answer.
    pub(super) deadline: Duration,
}

/// A bookmark on its way to the server's disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BookmarkWait {
    pub(super) request: u64,
    /// Where it is in the ring; `None` until the driver has put it there.
    pub(super) place: Option<(Lsn, Stamp)>,
}

impl Session {
    pub(super) fn answer_all(&mut self, waiters: Vec<Waiter>, error: &str) {
        for waiter in waiters {
            self.answer(waiter.request, error, Lsn::ZERO, Stamp::ZERO);
        }
    }

    fn fail(&mut self, request: u64, error: &str) {
        self.answer(request, error, Lsn::ZERO, Stamp::ZERO);
    }

    pub(super) fn protect(&mut self, now: Duration, request: u64, disk: DiskId, settings: Settings) {
        let known = self.settings.insert(disk, settings);
        if known != Some(settings)
            && let Some(capture) = self.captures.get(&disk).filter(|capture| capture.has_ring())
        {
            self.out.push(Action::SetPolicy(disk, capture.epoch, settings.policy));
        }
        if self.stopping {
            return self.fail(request, "the agent is stopping; try again when it runs");
        }
        if let Some((_, why)) = self.holds.get(&disk) {
            let why = format!("capture of this disk broke a moment ago ({why}); it is taken up again soon");
            return self.fail(request, &why);
        }
        let waiter = Waiter { request, deadline: now.saturating_add(FILTER_ANSWER) };
        let Some(capture) = self.captures.get_mut(&disk) else {
            return self.start_opening(disk, vec![waiter]);
        };
        if capture.phase == Phase::Capturing {
            return self.fail(request, "");
        }
        if capture.protect.len() >= MAX_WAITERS {
            return self.fail(request, "too many requests wait for this disk");
        }
        // While the epoch ends, the next one is ordered; while it begins, its outcome is waited for.
        let begins = matches!(
            capture.phase,
            Phase::Opening | Phase::Attaching { .. } | Phase::Adopting { ended: false, .. }
        );
        capture.reopen |= capture.unwanted || !begins;
        capture.protect.push(waiter);
    }

    /// Begins a new epoch of a disk that has none.
    pub(super) fn start_opening(&mut self, disk: DiskId, waiters: Vec<Waiter>) {
        if self.spooled.contains_key(&disk) && self.recover(disk) {
            if let Some(capture) = self.captures.get_mut(&disk) {
                (capture.protect, capture.reopen) = (waiters, true);
            }
            return;
        }
        let why = match self.inventory.find(disk) {
            None => "no VM on this host has this disk now".to_owned(),
            Some(place) if !place.refused.is_empty() => place.refused,
            Some(place) => {
                let mut capture = Capture::new(&place);
                capture.protect = waiters;
                self.captures.insert(disk, capture);
                return self.open_disk(disk);
            }
        };
        self.answer_all(waiters, &why);
    }

    pub(super) fn unprotect(&mut self, now: Duration, request: u64, disk: DiskId) {
        self.settings.remove(&disk);
        let Some(capture) = self.captures.get_mut(&disk) else {
            return self.fail(request, "");
        };
        if capture.phase == Phase::Opening {
            self.abandon_opening(disk, "protection was switched off meanwhile");
            return self.fail(request, "");
        }
        if capture.unprotect.len() >= MAX_WAITERS {
            return self.fail(request, "too many requests wait for this disk");
        }
        capture.reopen = false;
        if capture.phase == Phase::Recovering {
            let overtaken = core::mem::take(&mut capture.protect);
            self.answer_all(overtaken, "protection was switched off meanwhile");
            return self.fail(request, "");
        }
        capture.unprotect.push(Waiter { request, deadline: now.saturating_add(FILTER_ANSWER) });
        let overtaken = core::mem::take(&mut capture.protect);
        self.answer_all(overtaken, "protection was switched off meanwhile");
        self.begin_detach(now, disk);
    }

    pub(super) fn bookmark(&mut self, _now: Duration, request: u64, disk: DiskId, name: &str) {
        if name.is_empty() || name.len() > MAX_BOOKMARK_BYTES as usize {
            return self.fail(request, "a bookmark's name has 1 to 255 bytes");
        }
        let capturing = |capture: &&mut Capture| capture.phase == Phase::Capturing && !capture.drained;
        let Some(capture) = self.captures.get_mut(&disk).filter(capturing) else {
            return self.fail(request, "the disk is not being captured now");
        };
        if capture.bookmarks.iter().any(|bookmark| bookmark.request == request) {
            return;
        }
        if capture.bookmarks.len() >= MAX_WAITERS {
            return self.fail(request, "too many bookmarks wait for this disk");
        }
        capture.bookmarks.push(BookmarkWait { request, place: None });
        self.out.push(Action::PutBookmark(disk, request, name.to_owned()));
    }

    pub(super) fn bookmark_put(&mut self, disk: DiskId, request: u64, result: Result<(Lsn, Stamp), String>) {
        let Some(capture) = self.captures.get_mut(&disk) else { return };
        let Some(at) = capture.bookmarks.iter().position(|bookmark| bookmark.request == request) else {
            return;
        };
        match result {
            Ok(place) => {
                if let Some(bookmark) = capture.bookmarks.get_mut(at) {
                    bookmark.place = Some(place);
                }
            }
            Err(why) => {
                capture.bookmarks.remove(at);
                self.fail(request, &why);
            }
        }
    }

    /// Answers the bookmarks that have become durable.
    pub(super) fn answer_bookmarks(&mut self, disk: DiskId) {
        let Some(capture) = self.captures.get_mut(&disk) else { return };
        let acked = capture.acked;
        let done = |bookmark: &mut BookmarkWait| bookmark.place.is_some_and(|(lsn, _)| lsn <= acked);
        let done: Vec<BookmarkWait> = capture.bookmarks.extract_if(.., done).collect();
        for bookmark in done {
            if let Some((lsn, stamp)) = bookmark.place {
                self.answer(bookmark.request, "", lsn, stamp);
            }
        }
    }
}
