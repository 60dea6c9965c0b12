//! Going on where a former agent stopped: with rings and outboxes that filters hold, and with frames in the spool.

use std::time::Duration;

use journal_format::{DiskId, Epoch, GapReason, Lsn};

use super::capture::{Capture, DiskLink, Phase};
use super::inventory::Place;
use super::{Action, Ending, FilterId, Session};
use crate::limits::{OPEN_AGAIN, SPOOL_GRACE};

/// What a filter says it holds, and what the ring's description says it is of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holding {
    /// The device.
    pub device: String,
    /// The capture has ended: nothing will be published any more.
    pub ended: bool,
    /// Disk and epoch of the ring; `None` when it is no ring of this release.
    pub of: Option<(DiskId, Epoch)>,
}

/// The details of [`Action::Adopt`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Adopt {
    /// Who holds it.
    pub filter: FilterId,
    /// Number for asking it to hold the new outbox.
    pub request: u64,
    /// The device.
    pub device: String,
    /// Its disk's id.
    pub disk: DiskId,
    /// The epoch that goes on.
    pub epoch: Epoch,
}

impl Session {
    pub(super) fn filter_holds(&mut self, filter: FilterId, holding: Holding) {
        if self.inventory.pid(filter).is_some() {
            self.holdings.entry(filter).or_default().push(holding);
        }
    }

    /// The filter has listed its disks: what it holds can be judged.
    pub(super) fn take_holdings(&mut self, now: Duration, filter: FilterId) {
        for holding in self.holdings.remove(&filter).unwrap_or_default() {
            match self.is_usable(filter, &holding) {
                Ok((disk, epoch)) => self.take_holding(now, filter, holding, disk, epoch),
                Err(why) => {
                    let device = &holding.device;
                    tracing::error!(
                        ?filter,
                        device,
                        why,
                        "what a former agent left cannot be used; its capture ends"
                    );
                    self.lose(filter, &holding.device);
                }
            }
        }
    }

    /// Whether this filter may have a ring of that disk.
    fn is_usable(&self, filter: FilterId, holding: &Holding) -> Result<(DiskId, Epoch), &'static str> {
        let (disk, epoch) = holding.of.ok_or("it is no ring of this release")?;
        if self.inventory.id_for(filter, &holding.device) != Some(disk) {
            return Err("the ring is of another disk");
        }
        match self.inventory.find(disk) {
            Some(place) if place.filter != filter => Err("another process has this disk"),
            None if !holding.ended => Err("the device is gone"),
            _ => Ok((disk, epoch)),
        }
    }

    fn take_holding(
        &mut self,
        now: Duration,
        filter: FilterId,
        holding: Holding,
        disk: DiskId,
        epoch: Epoch,
    ) {
        let same_process = |old: FilterId| self.orphans.get(&old) == self.inventory.pid(filter).as_ref();
        match self.captures.get(&disk) {
            None => self.adopt(filter, holding, disk, epoch),
            // It was read, and the ring is as it was.
            Some(capture) if capture.epoch == epoch && capture.is_parked => {
                self.out.push(Action::Abandon(disk, epoch));
                self.captures.remove(&disk);
                self.adopt(filter, holding, disk, epoch);
            }
            // Its connection was lost, but neither process.
            Some(capture)
                if capture.epoch == epoch
                    && capture.phase == Phase::Orphaned
                    && same_process(capture.filter) =>
            {
                self.reunite(now, filter, disk, holding.ended);
            }
            Some(capture) if capture.epoch == epoch && capture.phase == Phase::Draining && holding.ended => {
                if let Some(capture) = self.captures.get_mut(&disk) {
                    capture.filter = filter;
                }
            }
            Some(capture) => {
                tracing::warn!(%disk, phase = ?capture.phase, "a filter holds a capture that is none of this agent's; it ends");
                self.let_go(filter, &holding.device);
            }
        }
    }

    fn reunite(&mut self, now: Duration, filter: FilterId, disk: DiskId, ended: bool) {
        let Some(capture) = self.captures.get_mut(&disk) else { return };
        capture.filter = filter;
        capture.phase = Phase::Capturing;
        tracing::info!(%disk, "a filter is back; its capture goes on");
        if ended {
            self.end_ring(disk, Ending::Detached);
        } else if capture.unwanted || !capture.unprotect.is_empty() {
            self.begin_detach(now, disk);
        }
    }

    fn adopt(&mut self, filter: FilterId, holding: Holding, disk: DiskId, epoch: Epoch) {
        self.spooled.remove(&disk);
        let request = self.request();
        let device = holding.device;
        let place = self.inventory.find(disk);
        let disk_bytes = place.map_or(0, |place| place.disk_bytes);
        let place = Place { filter, device: device.clone(), disk_bytes, refused: String::new() };
        let mut capture = Capture::new(&place);
        capture.epoch = epoch;
        capture.phase = Phase::Adopting { request, ended: holding.ended };
        capture.is_parked = true;
        self.captures.insert(disk, capture);
        self.out.push(Action::Adopt(Adopt { filter, request, device, disk, epoch }));
    }

    /// Whether what was read is still wanted.
    #[must_use]
    pub fn awaits(&self, order: &Adopt) -> bool {
        let wanted = |capture: &Capture| matches!(capture.phase, Phase::Adopting { request, .. } if request == order.request);
        self.captures.get(&order.disk).is_some_and(wanted)
    }

    pub(super) fn loaded(&mut self, disk: DiskId, epoch: Epoch, acked: Lsn, packed: Lsn) {
        let Some(capture) = self.captures.get_mut(&disk).filter(|capture| capture.epoch == epoch) else {
            return;
        };
        tracing::info!(%disk, epoch = epoch.0, unacknowledged_from = acked.next().0, packed = packed.0,
            "going on where the agent before stopped");
        capture.is_loaded = true;
        // The agent before may have sent everything in the outbox.
        (capture.acked, capture.shipped, capture.ever_shipped, capture.packed) =
            (acked, acked, packed, packed);
        if self.server.is_up() {
            self.open_disk(disk);
        }
    }

    /// The filter's answer to being asked to hold the new outbox.
    pub(super) fn held(&mut self, now: Duration, disk: DiskId, ended: bool, error: &str) {
        let Some(capture) = self.captures.get_mut(&disk) else { return };
        if !capture.is_loaded {
            tracing::error!(%disk, error, "what the agent before left cannot be used; a new epoch begins with a gap");
            let Some(capture) = self.captures.remove(&disk) else { return };
            self.out.push(Action::DropSpool(disk));
            self.lose(capture.filter, &capture.device);
            self.answer_all(capture.unprotect, "");
            if !capture.protect.is_empty() {
                self.start_opening(disk, capture.protect);
            }
            return;
        }
        if !error.is_empty() {
            tracing::warn!(%disk, error, "the filter does not hold the outbox; if this agent dies now, a gap begins");
        }
        capture.is_parked = false;
        self.out.push(Action::Resume(disk, capture.epoch));
        if ended {
            self.end_ring(disk, Ending::Detached);
        } else {
            self.attached(now, disk);
        }
    }

    /// Ends what a former agent left with a filter and this one cannot use: it lost what it had taken.
    fn lose(&mut self, filter: FilterId, device: &str) {
        let place = |disk: &DiskId| self.inventory.find(*disk).is_some_and(|place| place.filter == filter);
        if let Some(disk) = self.inventory.id_for(filter, device).filter(place) {
            self.ended.insert(disk, GapReason::AgentLost);
        }
        self.let_go(filter, device);
    }

    /// Ends what a filter holds and nobody can use.
    pub(super) fn let_go(&mut self, filter: FilterId, device: &str) {
        let request = self.request();
        self.out.push(Action::Detach(filter, request, device.to_owned()));
        self.out.push(Action::Forget(filter, device.to_owned()));
    }

    /// Spools whose rings did not come back belong to processes that are gone.
    pub(super) fn recover_spools(&mut self, now: Duration) {
        if now < SPOOL_GRACE || !self.server.is_up() || self.stopping {
            return;
        }
        let left: Vec<DiskId> =
            self.spooled.keys().filter(|disk| !self.captures.contains_key(disk)).copied().collect();
        for disk in left {
            self.recover(disk);
        }
    }

    /// Asks whether the server can go on with what the spool has of a disk; false when it has nothing.
    pub(super) fn recover(&mut self, disk: DiskId) -> bool {
        let Some((epoch, disk_bytes)) = self.spooled.remove(&disk) else { return false };
        let nobody = FilterId(u64::MAX);
        let place = Place { filter: nobody, device: String::new(), disk_bytes, refused: String::new() };
        let mut capture = Capture::new(&place);
        (capture.epoch, capture.phase) = (epoch, Phase::Recovering);
        self.captures.insert(disk, capture);
        self.open_disk(disk);
        true
    }

    /// The server's answer for a spool.
    pub(super) fn recoverable(
        &mut self,
        now: Duration,
        disk: DiskId,
        durable: Lsn,
        epoch: Epoch,
        refused: &str,
    ) {
        let Some(capture) = self.captures.get_mut(&disk) else { return };
        if !refused.is_empty() && epoch.0 == 0 {
            // The server's trouble may pass, and the frames are all there is of their time.
            capture.link = DiskLink::Wait(now.saturating_add(OPEN_AGAIN));
            let waiters = core::mem::take(&mut capture.protect);
            self.answer_all(waiters, &format!("the server does not take this disk: {refused}"));
            return;
        }
        if refused.is_empty() && epoch == capture.epoch {
            (capture.packed, capture.shipped) = (durable, durable);
            (capture.ever_shipped, capture.acked) = (durable, durable);
            capture.link = DiskLink::Open;
            capture.phase = Phase::Draining;
            self.out.push(Action::Recover(disk, epoch, durable));
            return;
        }
        let was = capture.epoch.0;
        tracing::warn!(%disk, was, now = epoch.0, refused, "the server cannot go on with the frames in the spool; they are thrown away");
        let Some(capture) = self.captures.remove(&disk) else { return };
        self.out.push(Action::DropSpool(disk));
        if !capture.protect.is_empty() {
            self.start_opening(disk, capture.protect);
        }
    }
}
