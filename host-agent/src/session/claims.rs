//! Disks that somebody else claims too: another QEMU of this host, or another host. Each such conflict is logged once
//! when it begins and once when it is over; and what this host no longer needs is given up, so that another may have it.

use std::collections::BTreeMap;

use journal_format::{DiskId, wire};

use super::{FilterId, Session, ToServer};

/// What was said of conflicts, so that it is not said again.
#[derive(Debug, Default)]
pub(super) struct Said {
    /// QEMUs that want a disk which another QEMU of this host has.
    rivals: BTreeMap<(DiskId, FilterId), String>,
    /// Why the server refused a disk last.
    refusals: BTreeMap<DiskId, String>,
}

impl Session {
    /// Gives up every disk that was opened on this connection and is not captured any more. A stopping agent keeps them
    /// for the next one.
    pub(super) fn close_unused(&mut self) {
        let captures = &self.captures;
        let unused: Vec<DiskId> =
            self.opened.iter().filter(|disk| !captures.contains_key(*disk)).copied().collect();
        if self.stopping {
            return;
        }
        for disk in unused {
            self.opened.remove(&disk);
            let ended = self.ended.remove(&disk).map_or(0, |ended| ended as u32);
            self.send(ToServer::CloseDisk(wire::CloseDisk { disk: disk.0.to_vec(), ended }));
        }
    }

    /// Logs which QEMUs of this host have begun, or ceased, to claim a disk that another one has.
    pub(super) fn note_rivals(&mut self) {
        let now = self.inventory.rivals();
        for ((disk, filter), why) in &now {
            if !self.said.rivals.contains_key(&(*disk, *filter)) {
                let pid = self.inventory.pid(*filter);
                tracing::warn!(%disk, pid, reason = why, "a second process claims this disk and is not protected");
            }
        }
        for (disk, filter) in self.said.rivals.keys().filter(|key| !now.contains_key(key)) {
            tracing::info!(%disk, ?filter, "one process fewer claims this disk");
        }
        self.said.rivals = now;
    }

    /// Logs why the server does not take a disk, unless that was the last thing said about it.
    pub(super) fn note_refusal(&mut self, disk: DiskId, why: &str) {
        if self.said.refusals.get(&disk).is_none_or(|said| said != why) {
            tracing::warn!(%disk, reason = why, "the server does not take this disk now; it is asked again");
            self.said.refusals.insert(disk, why.to_owned());
        }
    }

    /// The server takes the disk.
    pub(super) fn note_taken(&mut self, disk: DiskId) {
        if self.said.refusals.remove(&disk).is_some() {
            tracing::info!(%disk, "the server takes this disk again");
        }
    }
}
