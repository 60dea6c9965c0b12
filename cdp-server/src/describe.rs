//! A disk as the API shows it: catalog, live state and journal put together.

use std::time::Instant;

use cdp_api::{Disk, DiskSummary, Journal, time};
use journal_format::{DiskId, Lsn, Stamp};
use journal_store::DiskStore;

use crate::catalog::DiskRow;
use crate::core::Core;
use crate::error::ServerError;
use crate::fleet::LiveDisk;
use crate::{faults, protection, resolve};

/// Everything that is known of a disk now.
pub(crate) fn disk(core: &Core, row: &DiskRow) -> Result<Disk, ServerError> {
    let now = Instant::now();
    let live = core.fleet.live(row.id, now);
    let store = core.store.disk(row.id);
    let gap_open = store.as_ref().is_none_or(|disk| gap_is_open(row, disk));
    let fault = core.faults.of(row.id).or_else(|| live.as_ref().and_then(faults::spool));
    let summary = DiskSummary {
        id: row.id.to_string(),
        vm: row.vm.clone(),
        device: row.device.clone(),
        host: row.host_name.clone(),
        disk_bytes: row.disk_bytes,
        protection: protection::state(core, row, live.as_ref(), gap_open),
        newest: store.as_ref().and_then(|disk| resolve::newest(disk)),
        fault,
        conflicts: core.fleet.conflicts(row.id),
    };
    Ok(Disk {
        summary,
        // A UUID's text form is the same for VMs and disks.
        vm_uuid: row.vm_uuid.map(|uuid| DiskId(uuid).to_string()),
        vm_pid: live.as_ref().map(|live| live.vm_pid).filter(|pid| *pid != 0),
        qemu_version: row.qemu_version.clone(),
        node: row.node.clone(),
        driver: row.driver.clone(),
        read_only: row.read_only,
        online: live.is_some(),
        last_seen: (row.seen_ns > 0).then(|| time::rfc3339(row.seen_ns)),
        journal: store.map(|disk| journal(core, row.id, &disk, live.as_ref(), now)),
    })
}

/// Whether the present lies in a gap. Before the first record arrives the whole disk is as unknown as in a gap; so is
/// a capture session that was handed out and whose gap-begin has not arrived yet.
pub(crate) fn gap_is_open(row: &DiskRow, disk: &DiskStore) -> bool {
    disk.last_epoch() < row.epoch || disk.gap_is_open()
}

fn journal(core: &Core, id: DiskId, disk: &DiskStore, live: Option<&LiveDisk>, now: Instant) -> Journal {
    let durable = disk.durable_lsn();
    let stats = disk.stats();
    let mut journal = Journal {
        epoch: disk.last_epoch().0,
        durable_lsn: durable.0,
        captured_lsn: durable.0,
        raw_bytes: stats.raw_bytes,
        stored_data_bytes: stats.stored_data_bytes,
        stored_meta_bytes: stats.stored_meta_bytes,
        segments: stats.segments,
        ..Journal::default()
    };
    let Some(status) = live.filter(|live| live.fresh).map(|live| &live.status) else { return journal };
    // A status is up to a second old, and what it counted as captured may be durable by now.
    journal.captured_lsn = status.captured_lsn.max(durable.0);
    journal.lag_lsns = Lsn(status.captured_lsn).since(durable);
    if journal.lag_lsns > 0 {
        let covered =
            core.fleet.covered_until(id, durable, now).unwrap_or(Stamp::ZERO).max(disk.durable_stamp());
        journal.lag_bytes = status.unacked_bytes;
        journal.lag_s = seconds(status.host_stamp.saturating_sub(covered.0));
    }
    journal.dirty_bytes = status.dirty_bytes;
    journal.sync_read_bytes = status.sync_read_bytes;
    journal.sync_compared_bytes = status.sync_compared_bytes;
    journal.sync_equal_bytes = status.sync_equal_bytes;
    journal.sync_shipped_bytes = status.sync_shipped_bytes;
    journal.ring_used_bytes = status.ring_used_bytes;
    journal.ring_bytes = status.ring_bytes;
    journal.spool_used_bytes = status.spool_used_bytes;
    journal.spool_bytes = status.spool_bytes;
    journal.spool_failing = !status.spool_trouble.is_empty();
    journal
}

#[expect(clippy::cast_precision_loss, reason = "a lag is shown to the millisecond")]
fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}
