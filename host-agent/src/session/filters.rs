//! What filters say and how they go: changes of the inventory, and what they mean for captures.

use std::time::Duration;

use journal_format::{DiskId, GapReason};

use super::capture::{Capture, Phase};
use super::inventory::{DiskInfo, VmInfo};
use super::{Action, Ending, FilterId, Session};

impl Session {
    pub(super) fn filter_up(&mut self, filter: FilterId, info: VmInfo) {
        self.inventory.add(filter, info);
        self.send_inventory();
    }

    pub(super) fn filter_disks(&mut self, now: Duration, filter: FilterId, disks: Vec<DiskInfo>) {
        if !self.inventory.set_disks(filter, disks) {
            return;
        }
        self.take_holdings(now, filter);
        let gone = |(disk, capture): (&DiskId, &Capture)| {
            let listed = self.inventory.disk_of(filter, &capture.device) == Some(*disk);
            (capture.filter == filter && !listed).then_some(*disk)
        };
        let gone: Vec<DiskId> = self.captures.iter().filter_map(gone).collect();
        for disk in gone {
            let opening = self.captures.get(&disk).is_some_and(|capture| capture.phase == Phase::Opening);
            if opening {
                self.abandon_opening(disk, "the disk was removed from its VM");
            } else {
                self.begin_detach(now, disk);
            }
        }
        self.adopt_orphans(now);
        self.send_inventory();
    }

    pub(super) fn abandon_opening(&mut self, disk: DiskId, why: &str) {
        if let Some(capture) = self.captures.remove(&disk) {
            self.answer_all(capture.protect, why);
            self.answer_all(capture.unprotect, "");
        }
    }

    pub(super) fn filter_fault(&mut self, now: Duration, filter: FilterId, device: &str, message: &str) {
        let mine = |(_, capture): &(&DiskId, &Capture)| capture.filter == filter && capture.device == device;
        let Some(disk) = self.captures.iter().find(mine).map(|(disk, _)| *disk) else { return };
        tracing::error!(%disk, device, reason = message, "the filter switched capture off");
        self.hold(now, disk, GapReason::FilterFault, message);
        self.begin_detach(now, disk);
    }

    pub(super) fn filter_lost(&mut self, now: Duration, filter: FilterId) {
        let pid = self.inventory.pid(filter);
        self.inventory.remove(filter);
        self.holdings.remove(&filter);
        let mine: Vec<DiskId> =
            self.captures.iter().filter(|(_, c)| c.filter == filter).map(|(disk, _)| *disk).collect();
        let mut held = false;
        for disk in mine {
            let Some(capture) = self.captures.get_mut(&disk) else { continue };
            match capture.phase {
                Phase::Draining => continue,
                Phase::Opening => self.abandon_opening(disk, "QEMU went away"),
                Phase::Adopting { .. } if !capture.is_loaded => {
                    self.out.push(Action::Abandon(disk, capture.epoch));
                    self.abandon_opening(disk, "QEMU went away");
                }
                phase => {
                    if matches!(phase, Phase::Attaching { .. }) {
                        // Whether the epoch began is not known; if it did, nobody saw its end.
                        self.ended.remove(&disk);
                    }
                    held = true;
                    capture.phase = Phase::Orphaned;
                    let waiters = core::mem::take(&mut capture.protect);
                    self.answer_all(waiters, "QEMU went away");
                }
            }
        }
        if held {
            self.orphans.insert(filter, pid.unwrap_or(0));
            self.out.push(Action::Watch(filter));
        }
        self.adopt_orphans(now);
        self.send_inventory();
    }

    pub(super) fn process_dead(&mut self, filter: FilterId) {
        self.orphans.remove(&filter);
        let mine =
            |(_, capture): &(&DiskId, &Capture)| capture.filter == filter && capture.phase == Phase::Orphaned;
        let mine: Vec<DiskId> = self.captures.iter().filter(mine).map(|(disk, _)| *disk).collect();
        for disk in mine {
            self.end_ring(disk, Ending::Dead);
        }
    }

    /// A process that lost its connection is back: end its old rings cleanly, then capture anew.
    fn adopt_orphans(&mut self, now: Duration) {
        let orphaned: Vec<(DiskId, FilterId)> = self
            .captures
            .iter()
            .filter(|(_, capture)| capture.phase == Phase::Orphaned)
            .map(|(disk, capture)| (*disk, capture.filter))
            .collect();
        for (disk, old) in orphaned {
            let Some(place) = self.inventory.find(disk) else { continue };
            if self.orphans.get(&old) != self.inventory.pid(place.filter).as_ref() {
                continue;
            }
            let Some(capture) = self.captures.get_mut(&disk) else { continue };
            // It is back and does not hold the ring any more.
            capture.filter = place.filter;
            capture.phase = Phase::Capturing;
            capture.reopen = capture.unprotect.is_empty() && !capture.unwanted;
            self.begin_detach(now, disk);
        }
        let captures = &self.captures;
        self.orphans.retain(|filter, _| captures.values().any(|capture| capture.filter == *filter));
    }
}
