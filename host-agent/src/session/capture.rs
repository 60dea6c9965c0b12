//! One protected disk: the transitions of its phases, and what its link to the server may do.

use std::collections::BTreeMap;
use std::time::Duration;

use journal_format::{DiskId, Epoch, GapReason, ImageTag, Lsn, Stamp, wire};

use super::commands::{BookmarkWait, Waiter};
use super::inventory::Place;
use super::{Action, Attach, Ending, FilterId, Sample, Session, ToServer};
use crate::limits::{FAULT_HOLD, FILTER_ANSWER, OPEN_AGAIN, RESYNC_EVERY, STATUS_EVERY, TICK};

/// Where a capture is in its life; the diagram is in the module above.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Phase {
    /// The server was asked for an epoch.
    Opening,
    /// The server was asked whether it can go on with what the spool has.
    Recovering,
    /// What a filter holds is being read; then the filter is asked to hold the new outbox.
    Adopting { request: u64, ended: bool },
    /// The filter was asked to attach.
    Attaching { request: u64 },
    /// Guest writes go through the ring.
    Capturing,
    /// The filter was asked to detach.
    Detaching { request: u64 },
    /// The filter refused to detach; it is asked again then.
    DetachAgain { at: Duration },
    /// The filter's connection is lost, its process alive: the ring may still fill.
    Orphaned,
    /// Nothing is published any more; what there is goes to the server.
    Draining,
}

/// Whether frames of the disk may be sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum DiskLink {
    /// Not before an answer to `OpenDisk`.
    Closed,
    /// Yes.
    Open,
    /// The server refused; ask again then.
    Wait(Duration),
}

/// Where the server's journal of a disk ends.
#[derive(Clone, Copy, Debug)]
pub(super) struct Opened {
    pub(super) durable: Lsn,
    pub(super) stamp: Stamp,
    /// The epoch to use.
    pub(super) epoch: Epoch,
    /// How the last epoch left the image, if the journal ends with its close.
    pub(super) closed_image: Option<ImageTag>,
    /// Why a new epoch begins with a gap, as far as the server knows.
    pub(super) begins: GapReason,
}

/// The state of one protected disk.
#[derive(Debug)]
pub(super) struct Capture {
    pub(super) filter: FilterId,
    pub(super) device: String,
    pub(super) disk_bytes: u64,
    pub(super) phase: Phase,
    pub(super) epoch: Epoch,
    /// Last LSN in the outbox.
    pub(super) packed: Lsn,
    /// Last LSN handed to this connection's socket.
    pub(super) shipped: Lsn,
    /// Last LSN handed to any connection's socket; the server cannot have more.
    pub(super) ever_shipped: Lsn,
    /// Last LSN that is durable.
    pub(super) acked: Lsn,
    pub(super) link: DiskLink,
    /// The drain thread has ended; `packed` is final.
    pub(super) drained: bool,
    /// The server cannot continue this epoch: its frames are thrown away.
    discard: bool,
    /// Ring and outbox were taken from a filter, and the ring is still as the agent before left it.
    pub(super) is_parked: bool,
    /// What is in the outbox is known: there is one.
    pub(super) is_loaded: bool,
    /// Detach as soon as attaching is over.
    pub(super) unwanted: bool,
    /// Capture anew when this epoch is closed.
    pub(super) reopen: bool,
    pub(super) protect: Vec<Waiter>,
    pub(super) unprotect: Vec<Waiter>,
    pub(super) bookmarks: Vec<BookmarkWait>,
    last_resync: Option<Duration>,
    last_status: Option<Duration>,
}

impl Capture {
    pub(super) fn new(place: &Place) -> Self {
        Self {
            filter: place.filter,
            device: place.device.clone(),
            disk_bytes: place.disk_bytes,
            phase: Phase::Opening,
            epoch: Epoch(0),
            packed: Lsn::ZERO,
            shipped: Lsn::ZERO,
            ever_shipped: Lsn::ZERO,
            acked: Lsn::ZERO,
            link: DiskLink::Closed,
            drained: false,
            discard: false,
            is_parked: false,
            is_loaded: false,
            unwanted: false,
            reopen: false,
            protect: Vec::new(),
            unprotect: Vec::new(),
            bookmarks: Vec::new(),
            last_resync: None,
            last_status: None,
        }
    }

    pub(super) fn may_ship(&self) -> bool {
        self.link == DiskLink::Open && !self.discard && self.shipped < self.packed
    }

    pub(super) fn has_ring(&self) -> bool {
        !matches!(self.phase, Phase::Opening | Phase::Recovering) && !self.is_loading()
    }

    fn is_loading(&self) -> bool {
        self.is_parked && !self.is_loaded
    }
}

impl Session {
    /// Asks the server where the disk's journal ends: for a new epoch, or to go on with this one.
    pub(super) fn open_disk(&mut self, disk: DiskId) {
        let Some(capture) = self.captures.get_mut(&disk) else { return };
        *self.asked.entry(disk).or_default() += 1;
        self.opened.insert(disk);
        capture.link = DiskLink::Closed;
        let (disk_bytes, resume_epoch) = (capture.disk_bytes, capture.epoch.0);
        self.send(ToServer::OpenDisk(wire::OpenDisk { disk: disk.0.to_vec(), disk_bytes, resume_epoch }));
    }

    pub(super) fn disk_opened(&mut self, now: Duration, disk: DiskId, opened: Opened, refused: &str) {
        let Opened { durable, epoch, .. } = opened;
        let Some(asked) = self.asked.get_mut(&disk).filter(|asked| **asked > 0) else { return };
        *asked -= 1;
        // Only the answer to the last question counts: an earlier one may speak of another epoch.
        if *asked > 0 {
            return;
        }
        self.asked.remove(&disk);
        // Of what is still being read nothing was asked: this speaks of the reading before, which was abandoned.
        if self.captures.get(&disk).is_none_or(Capture::is_loading) {
            return;
        }
        if refused.is_empty() {
            self.note_taken(disk);
        } else {
            self.note_refusal(disk, refused);
        }
        let Some(capture) = self.captures.get_mut(&disk) else { return };
        // Only a refusal that is for good names the epoch that another host has.
        let overtaken = epoch.0 > 0 && epoch != capture.epoch;
        if overtaken && !refused.is_empty() {
            self.opened.remove(&disk);
            // The next epoch here comes after one of that host.
            self.ended.remove(&disk);
        }
        match capture.phase {
            Phase::Opening if refused.is_empty() => self.attach(now, disk, opened),
            Phase::Opening => {
                let waiters = core::mem::take(&mut capture.protect);
                self.captures.remove(&disk);
                self.answer_all(waiters, &format!("the server does not take this disk: {refused}"));
            }
            Phase::Recovering => self.recoverable(now, disk, durable, epoch, refused),
            _ if refused.is_empty() => self.resume(now, disk, durable, epoch),
            // Its frames have no place in history any more: nobody waits for room that will not come.
            _ if capture.discard => {}
            _ if overtaken => self.start_over(now, disk, refused),
            _ => capture.link = DiskLink::Wait(now.saturating_add(OPEN_AGAIN)),
        }
    }

    fn attach(&mut self, now: Duration, disk: DiskId, opened: Opened) {
        let Opened { durable, stamp, epoch, closed_image, begins } = opened;
        let place = self.inventory.find(disk);
        let settings = self.settings.get(&disk).copied().unwrap_or_default();
        let request = self.request();
        // What the server was told of the end is newer; what only this agent saw, nobody could tell it.
        let seen = self.ended.get(&disk).copied().filter(|_| begins == GapReason::UncleanEnd);
        let Some(capture) = self.captures.get_mut(&disk) else { return };
        let Some(place) = place.filter(|place| place.filter == capture.filter && epoch.0 > 0) else {
            let waiters = core::mem::take(&mut capture.protect);
            self.captures.remove(&disk);
            self.answer_all(waiters, "the disk went away, or the server gave it no epoch; try again");
            return;
        };
        (capture.epoch, capture.disk_bytes) = (epoch, place.disk_bytes);
        (capture.packed, capture.shipped, capture.ever_shipped, capture.acked) =
            (durable, durable, durable, durable);
        capture.link = DiskLink::Open;
        capture.phase = Phase::Attaching { request };
        for waiter in &mut capture.protect {
            waiter.deadline = now.saturating_add(FILTER_ANSWER);
        }
        self.out.push(Action::Attach(Attach {
            filter: place.filter,
            request,
            device: place.device,
            disk,
            epoch,
            first_lsn: durable.next(),
            disk_bytes: place.disk_bytes,
            clock_floor: stamp,
            closed_image,
            begins: seen.unwrap_or(begins),
            settings,
        }));
    }

    fn resume(&mut self, now: Duration, disk: DiskId, durable: Lsn, epoch: Epoch) {
        let Some(capture) = self.captures.get_mut(&disk) else { return };
        if capture.discard {
            return;
        }
        let fits = epoch == capture.epoch && durable >= capture.acked && durable <= capture.ever_shipped;
        if !fits {
            let why = format!(
                "the server's journal ends at epoch {} LSN {durable}, which does not continue epoch {} acknowledged \
                 up to LSN {} and sent up to {}",
                epoch.0, capture.epoch.0, capture.acked, capture.ever_shipped
            );
            self.ended.insert(disk, GapReason::AgentLost);
            self.start_over(now, disk, &why);
            return;
        }
        capture.link = DiskLink::Open;
        capture.shipped = durable;
        // How far behind the server is, it should learn at once.
        capture.last_status = None;
        self.advance(disk, durable);
    }

    /// The epoch cannot be continued: end it, throw its frames away, and begin a new one with a full sync.
    fn start_over(&mut self, now: Duration, disk: DiskId, why: &str) {
        tracing::error!(%disk, why, "this epoch cannot go on; beginning a new one with a full sync");
        let Some(capture) = self.captures.get_mut(&disk) else { return };
        capture.discard = true;
        capture.reopen = !self.stopping && capture.unprotect.is_empty() && !capture.unwanted;
        capture.link = DiskLink::Closed;
        let (epoch, packed) = (capture.epoch, capture.packed);
        self.out.push(Action::Discard(disk, epoch));
        self.out.push(Action::Release(disk, epoch, packed));
        self.begin_detach(now, disk);
        self.close_if_done(disk);
    }

    /// Asks the filter to detach, or remembers to once it can be asked.
    pub(super) fn begin_detach(&mut self, now: Duration, disk: DiskId) {
        let request = self.request();
        let Some(capture) = self.captures.get_mut(&disk) else { return };
        capture.unwanted = true;
        match capture.phase {
            Phase::Capturing | Phase::DetachAgain { .. } => {
                capture.phase = Phase::Detaching { request };
                for waiter in &mut capture.unprotect {
                    waiter.deadline = now.saturating_add(FILTER_ANSWER);
                }
                let (filter, device) = (capture.filter, capture.device.clone());
                self.out.push(Action::Detach(filter, request, device));
            }
            Phase::Opening
            | Phase::Recovering
            | Phase::Adopting { .. }
            | Phase::Attaching { .. }
            | Phase::Detaching { .. }
            | Phase::Orphaned
            | Phase::Draining => {}
        }
    }

    pub(super) fn filter_result(&mut self, now: Duration, filter: FilterId, request: u64, error: &str) {
        let asked = |capture: &Capture| {
            capture.filter == filter
                && matches!(capture.phase,
                    Phase::Attaching { request: n } | Phase::Detaching { request: n } | Phase::Adopting { request: n, .. }
                    if n == request)
        };
        let Some((disk, capture)) = self.captures.iter().find(|(_, capture)| asked(capture)) else {
            if !error.is_empty() {
                tracing::warn!(?filter, request, error, "a filter could not do what it was asked");
            }
            return;
        };
        let disk = *disk;
        match (capture.phase, error.is_empty()) {
            (Phase::Adopting { ended, .. }, _) => self.held(now, disk, ended, error),
            (Phase::Attaching { .. }, true) => self.attached(now, disk),
            (Phase::Attaching { .. }, false) => {
                let waiters =
                    self.captures.get_mut(&disk).map(|capture| core::mem::take(&mut capture.protect));
                self.answer_all(waiters.unwrap_or_default(), error);
                self.end_ring(disk, Ending::Dead);
            }
            (_, true) => self.end_ring(disk, Ending::Detached),
            (_, false) => self.detach_failed(now, disk, error),
        }
    }

    pub(super) fn attached(&mut self, now: Duration, disk: DiskId) {
        let Some(capture) = self.captures.get_mut(&disk) else { return };
        capture.phase = Phase::Capturing;
        self.ended.remove(&disk);
        if capture.unwanted {
            // Whoever waits now ordered the next epoch.
            self.begin_detach(now, disk);
        } else {
            let waiters = core::mem::take(&mut capture.protect);
            self.out.push(Action::ReportSoon);
            self.answer_all(waiters, "");
        }
    }

    fn detach_failed(&mut self, now: Duration, disk: DiskId, error: &str) {
        if self.inventory.find(disk).is_none() {
            // The device is gone, and so is its capture.
            self.end_ring(disk, Ending::Dead);
            return;
        }
        let Some(capture) = self.captures.get_mut(&disk) else { return };
        capture.phase = Phase::DetachAgain { at: now.saturating_add(Duration::from_secs(5)) };
        let waiters = core::mem::take(&mut capture.unprotect);
        self.answer_all(waiters, &format!("{error}; the agent asks again by itself"));
    }

    pub(super) fn end_ring(&mut self, disk: DiskId, ending: Ending) {
        let Some(capture) = self.captures.get_mut(&disk) else { return };
        capture.phase = Phase::Draining;
        capture.is_parked = false;
        if ending == Ending::Detached {
            self.ended.entry(disk).or_insert(GapReason::Attach);
        }
        if !capture.drained {
            self.out.push(Action::EndRing(disk, capture.epoch, ending));
        }
        self.close_if_done(disk);
    }

    pub(super) fn ring_fault(
        &mut self,
        now: Duration,
        (disk, epoch): (DiskId, Epoch),
        why: GapReason,
        message: &str,
    ) {
        let Some(capture) = self.captures.get_mut(&disk).filter(|capture| capture.epoch == epoch) else {
            return;
        };
        tracing::error!(%disk, reason = message, "what was captured cannot be used any more; its capture ends");
        capture.drained = true;
        self.hold(now, disk, why, message);
        self.begin_detach(now, disk);
        self.close_if_done(disk);
    }

    /// Leaves a disk alone for a while; its next epoch begins with a gap for that reason.
    pub(super) fn hold(&mut self, now: Duration, disk: DiskId, reason: GapReason, why: &str) {
        self.ended.insert(disk, reason);
        self.holds.insert(disk, (now.saturating_add(FAULT_HOLD), why.to_owned()));
        if let Some(capture) = self.captures.get_mut(&disk) {
            capture.reopen = false;
            let waiters = core::mem::take(&mut capture.protect);
            self.answer_all(waiters, why);
        }
    }

    pub(super) fn packed(&mut self, disk: DiskId, epoch: Epoch, lsn: Lsn) {
        let Some(capture) = self.captures.get_mut(&disk).filter(|capture| capture.epoch == epoch) else {
            return;
        };
        capture.packed = capture.packed.max(lsn);
        if capture.discard {
            self.out.push(Action::Release(disk, epoch, lsn));
        }
    }

    pub(super) fn drained(&mut self, disk: DiskId, epoch: Epoch, lsn: Lsn) {
        let Some(capture) = self.captures.get_mut(&disk).filter(|capture| capture.epoch == epoch) else {
            return;
        };
        capture.packed = capture.packed.max(lsn);
        capture.drained = true;
        self.close_if_done(disk);
    }

    pub(super) fn acked(&mut self, now: Duration, disk: DiskId, lsn: Lsn) {
        let Some(capture) = self.captures.get(&disk) else { return };
        if capture.link != DiskLink::Open || capture.discard {
            return;
        }
        if lsn > capture.shipped {
            let why = format!("disk {disk}: LSN {lsn} acknowledged, but only {} was sent", capture.shipped);
            self.disconnect(now, why);
            return;
        }
        self.advance(disk, lsn);
    }

    fn advance(&mut self, disk: DiskId, durable: Lsn) {
        let Some(capture) = self.captures.get_mut(&disk) else { return };
        if durable > capture.acked {
            capture.acked = durable;
            self.out.push(Action::Durable(disk, capture.epoch, durable));
            self.out.push(Action::Release(disk, capture.epoch, durable));
            self.answer_bookmarks(disk);
        }
        self.close_if_done(disk);
    }

    pub(super) fn refused(&mut self, now: Duration, disk: DiskId, why: &str, retry_ms: u32) {
        let Some(capture) = self.captures.get_mut(&disk).filter(|capture| capture.has_ring()) else { return };
        tracing::warn!(%disk, why, "the server takes no frames of this disk now; they are kept");
        capture.link =
            DiskLink::Wait(now.saturating_add(Duration::from_millis(retry_ms.clamp(100, 60_000).into())));
    }

    /// When nothing more can come and everything is durable (or thrown away), the epoch is over.
    fn close_if_done(&mut self, disk: DiskId) {
        let Some(capture) = self.captures.get(&disk) else { return };
        let shipped = capture.discard || capture.acked >= capture.packed;
        if capture.phase != Phase::Draining || !capture.drained || !shipped {
            return;
        }
        let Some(capture) = self.captures.remove(&disk) else { return };
        self.out.push(Action::DropCapture(disk, capture.epoch));
        if self.inventory.pid(capture.filter).is_some() {
            self.out.push(Action::Forget(capture.filter, capture.device.clone()));
        }
        let last = Sample { mode: "off", captured_lsn: capture.packed, ..Sample::default() };
        self.send(ToServer::DiskStatus(status(disk, &capture, &last)));
        for lost in capture.bookmarks {
            self.answer(
                lost.request,
                "the capture ended before the bookmark was durable",
                Lsn::ZERO,
                Stamp::ZERO,
            );
        }
        self.answer_all(capture.unprotect, "");
        if (capture.reopen || !capture.protect.is_empty()) && self.server.is_up() && !self.stopping {
            self.start_opening(disk, capture.protect);
        }
        self.send_inventory();
    }

    /// The connection is gone: nothing can be sent or answered.
    pub(super) fn close_links(&mut self) {
        let recovering = self.captures.iter().filter(|(_, capture)| capture.phase == Phase::Recovering);
        self.spooled.extend(recovering.map(|(disk, capture)| (*disk, (capture.epoch, capture.disk_bytes))));
        self.captures.retain(|_, capture| !matches!(capture.phase, Phase::Opening | Phase::Recovering));
        self.asked.clear();
        self.opened.clear();
        for capture in self.captures.values_mut() {
            capture.link = DiskLink::Closed;
            capture.shipped = capture.acked;
            // Request numbers belong to their connection.
            capture.protect.clear();
            capture.unprotect.clear();
            capture.bookmarks.clear();
        }
    }

    /// The connection is back: go on with every epoch that can be continued.
    pub(super) fn reopen_links(&mut self) {
        let live: Vec<DiskId> = self
            .captures
            .iter()
            .filter(|(_, c)| !c.discard && !c.is_loading())
            .map(|(disk, _)| *disk)
            .collect();
        for disk in live {
            self.open_disk(disk);
        }
    }

    pub(super) fn capture_tick(&mut self, now: Duration) {
        let (mut ask, mut detach, mut late) = (Vec::new(), Vec::new(), Vec::new());
        for (disk, capture) in &mut self.captures {
            match (capture.link, capture.phase) {
                (DiskLink::Wait(at), _) if now >= at => ask.push(*disk),
                (_, Phase::DetachAgain { at }) if now >= at => detach.push(*disk),
                _ => {}
            }
            let waiting = matches!(
                capture.phase,
                Phase::Attaching { .. } | Phase::Detaching { .. } | Phase::Adopting { .. }
            );
            if waiting {
                late.extend(capture.protect.extract_if(.., |waiter| now >= waiter.deadline));
                late.extend(capture.unprotect.extract_if(.., |waiter| now >= waiter.deadline));
            }
        }
        self.answer_all(
            late,
            "QEMU does not answer; look whether its main loop is stuck. It may still answer later",
        );
        for disk in ask {
            self.open_disk(disk);
        }
        for disk in detach {
            self.begin_detach(now, disk);
        }
    }

    pub(super) fn sampled(&mut self, now: Duration, disk: DiskId, epoch: Epoch, sample: &Sample) {
        let request = self.next_request;
        let Some(capture) = self.captures.get_mut(&disk).filter(|capture| capture.epoch == epoch) else {
            return;
        };
        let keeps_up = sample.outbox_used_bytes <= sample.outbox_bytes / 2;
        let spools = sample.spool_trouble.is_empty() && sample.spool_used_bytes < sample.spool_bytes / 2;
        let room = sample.ring_has_room && (keeps_up || spools);
        let due = capture.last_resync.is_none_or(|last| now.saturating_sub(last) >= RESYNC_EVERY);
        if capture.phase == Phase::Capturing && sample.mode == "tracking" && room && due {
            capture.last_resync = Some(now);
            self.next_request = request.saturating_add(1);
            self.out.push(Action::Resync(capture.filter, request, capture.device.clone()));
        }
        if capture
            .last_status
            .is_none_or(|last| now.saturating_sub(last).saturating_add(TICK) >= STATUS_EVERY)
        {
            capture.last_status = Some(now);
            let status = status(disk, capture, sample);
            self.send(ToServer::DiskStatus(status));
        }
    }

    /// Captures by phase, for logs and tests.
    #[must_use]
    pub fn phases(&self) -> BTreeMap<DiskId, String> {
        self.captures.iter().map(|(disk, capture)| (*disk, format!("{:?}", capture.phase))).collect()
    }
}

fn status(disk: DiskId, capture: &Capture, sample: &Sample) -> wire::DiskStatus {
    wire::DiskStatus {
        disk: disk.0.to_vec(),
        mode: sample.mode.to_owned(),
        captured_lsn: sample.captured_lsn.max(capture.packed).0,
        captured_stamp: sample.captured_stamp.0,
        shipped_lsn: capture.shipped.0,
        unacked_bytes: sample.unacked_bytes,
        ring_used_bytes: sample.ring_used_bytes,
        ring_bytes: sample.ring_bytes,
        dirty_bytes: sample.dirty_bytes,
        outbox_used_bytes: sample.outbox_used_bytes,
        host_stamp: sample.host_stamp.0,
        epoch: capture.epoch.0,
        waiting: sample.waiting,
        waiting_ms: u64::try_from(sample.waited.as_millis()).unwrap_or(u64::MAX),
        sync: sample.sync.to_owned(),
        sync_read_bytes: sample.sync_read_bytes,
        sync_compared_bytes: sample.sync_compared_bytes,
        sync_equal_bytes: sample.sync_equal_bytes,
        sync_shipped_bytes: sample.sync_shipped_bytes,
        spool_used_bytes: sample.spool_used_bytes,
        spool_bytes: sample.spool_bytes,
        spool_trouble: sample.spool_trouble.clone(),
    }
}
