//! Counters of the data plane, and the text that `/metrics` serves.
//!
//! The text is made afresh for each scrape from the counters, the store and the live state, so that a disk that is
//! gone leaves no stale series and a gauge never lags behind what REST says.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use cdp_api::Disk;
use journal_format::{DiskId, FrameHeader};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};
use std::sync::atomic::AtomicU64;

/// Media type of the text.
pub(crate) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What came in for one disk since the server started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ingested {
    pub(crate) frames: u64,
    pub(crate) records: u64,
    /// Bytes on the wire.
    pub(crate) bytes: u64,
    /// Bytes of guest data in them.
    pub(crate) raw_bytes: u64,
}

/// The data plane's counters.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    disks: Mutex<HashMap<DiskId, Ingested>>,
}

impl Counters {
    pub(crate) fn frame(&self, header: &FrameHeader) {
        let mut disks = self.disks.lock().unwrap_or_else(PoisonError::into_inner);
        let disk = disks.entry(header.disk()).or_default();
        disk.frames += 1;
        disk.records += u64::from(header.record_count());
        disk.bytes += header.frame_len() as u64;
        disk.raw_bytes += u64::from(header.raw_bytes());
    }

    pub(crate) fn of(&self, disk: DiskId) -> Ingested {
        self.disks.lock().unwrap_or_else(PoisonError::into_inner).get(&disk).copied().unwrap_or_default()
    }
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Labels {
    disk: String,
    vm: String,
    device: String,
}

type Gauges = Family<Labels, Gauge<f64, AtomicU64>>;
type Totals = Family<Labels, Counter>;

/// One disk for a scrape.
pub(crate) struct Sample {
    pub(crate) disk: Disk,
    pub(crate) ingested: Ingested,
}

/// The text for a scrape.
///
/// # Errors
/// Never in practice: writing to a `String` does not fail.
pub(crate) fn encode(samples: &[Sample], agents: usize, drill: bool) -> Result<String, core::fmt::Error> {
    let mut registry = Registry::with_prefix("cdp");
    let connected = Gauge::<i64>::default();
    connected.set(i64::try_from(agents).unwrap_or(i64::MAX));
    registry.register("agents", "Connected agents", connected);
    let drilled = Gauge::<i64>::default();
    drilled.set(i64::from(drill));
    registry.register("drill", "1 while the store fails on purpose (--drill)", drilled);
    register_gauges(&mut registry, samples);
    register_counters(&mut registry, samples);
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry)?;
    Ok(text)
}

fn labels(disk: &Disk) -> Labels {
    Labels { disk: disk.summary.id.clone(), vm: disk.summary.vm.clone(), device: disk.summary.device.clone() }
}

#[expect(clippy::cast_precision_loss, reason = "a gauge is a float; 2^53 bytes are 8 PiB")]
fn register_gauges(registry: &mut Registry, samples: &[Sample]) {
    type Read = fn(&Disk) -> Option<f64>;
    let journal: [(&str, &str, Option<Unit>, Read); 17] = [
        ("lag", "Records captured and not yet durable", Some(Unit::Other("lsns".to_owned())), |d| {
            d.journal.as_ref().map(|j| j.lag_lsns as f64)
        }),
        ("lag", "Bytes taken out of the ring and not yet acknowledged", Some(Unit::Bytes), |d| {
            d.journal.as_ref().map(|j| j.lag_bytes as f64)
        }),
        ("lag", "How far the newest durable state is behind the host", Some(Unit::Seconds), |d| {
            d.journal.as_ref().map(|j| j.lag_s)
        }),
        ("ring_used", "Bytes of the capture ring in use", Some(Unit::Bytes), |d| {
            d.journal.as_ref().map(|j| j.ring_used_bytes as f64)
        }),
        ("ring", "Bytes of the capture ring", Some(Unit::Bytes), |d| {
            d.journal.as_ref().map(|j| j.ring_bytes as f64)
        }),
        ("spool_used", "Bytes of frames in the host's spool", Some(Unit::Bytes), |d| {
            d.journal.as_ref().map(|j| j.spool_used_bytes as f64)
        }),
        ("spool", "Most bytes that the host's spool may take", Some(Unit::Bytes), |d| {
            d.journal.as_ref().map(|j| j.spool_bytes as f64)
        }),
        ("spool_failing", "1 while the host's spool cannot be written to", None, |d| {
            d.journal.as_ref().map(|j| f64::from(u8::from(j.spool_failing)))
        }),
        ("dirty", "Bytes that a sync still has to read", Some(Unit::Bytes), |d| {
            d.journal.as_ref().map(|j| j.dirty_bytes as f64)
        }),
        ("sync_read", "Read back from the disk by the running or last sync", Some(Unit::Bytes), |d| {
            d.journal.as_ref().map(|j| j.sync_read_bytes as f64)
        }),
        ("sync_compared", "Of those, compared with the journal by hash", Some(Unit::Bytes), |d| {
            d.journal.as_ref().map(|j| j.sync_compared_bytes as f64)
        }),
        ("sync_equal", "Of those, equal and not shipped", Some(Unit::Bytes), |d| {
            d.journal.as_ref().map(|j| j.sync_equal_bytes as f64)
        }),
        ("sync_shipped", "Shipped by the running or last sync", Some(Unit::Bytes), |d| {
            d.journal.as_ref().map(|j| j.sync_shipped_bytes as f64)
        }),
        ("journal_raw", "Guest data recorded", Some(Unit::Bytes), |d| {
            d.journal.as_ref().map(|j| j.raw_bytes as f64)
        }),
        ("journal_stored_data", "Stored for it: data", Some(Unit::Bytes), |d| {
            d.journal.as_ref().map(|j| j.stored_data_bytes as f64)
        }),
        ("journal_stored_meta", "Stored for it: records and indexes", Some(Unit::Bytes), |d| {
            d.journal.as_ref().map(|j| j.stored_meta_bytes as f64)
        }),
        ("journal_durable_lsn", "Last record that survives a power cut", None, |d| {
            d.journal.as_ref().map(|j| j.durable_lsn as f64)
        }),
    ];
    let disks: [(&str, &str, Option<Unit>, Read); 7] = [
        ("waiting_requests", "Guest requests and flushes that wait for the agent", None, |d| {
            Some(d.summary.protection.waiting as f64)
        }),
        ("waiting", "For how long some have waited without a break", Some(Unit::Seconds), |d| {
            Some(d.summary.protection.waiting_ms as f64 / 1e3)
        }),
        ("sync_in_force", "1 while a guest's flush that completes is durable here", None, |d| {
            let in_force = d.summary.protection.sync_state == cdp_api::SyncState::InForce;
            Some(f64::from(u8::from(in_force)))
        }),
        ("disk", "Size of the disk", Some(Unit::Bytes), |d| Some(d.summary.disk_bytes as f64)),
        (
            "fault",
            "1 while the disk's journal takes no writes or is damaged, or its host's spool fails",
            None,
            |d| Some(f64::from(u8::from(d.summary.fault.is_some()))),
        ),
        ("protection_wanted", "1 when the disk is to be protected", None, |d| {
            Some(f64::from(u8::from(d.summary.protection.enabled)))
        }),
        ("protected", "1 while every new write becomes a point", None, |d| {
            let protected = d.summary.protection.phase == cdp_api::ProtectionPhase::Protected;
            Some(f64::from(u8::from(protected)))
        }),
    ];
    for (name, help, unit, read) in journal.into_iter().chain(disks) {
        let family = Gauges::default();
        for sample in samples {
            if let Some(value) = read(&sample.disk) {
                family.get_or_create(&labels(&sample.disk)).set(value);
            }
        }
        match unit {
            Some(unit) => registry.register_with_unit(name, help, unit, family),
            None => registry.register(name, help, family),
        }
    }
}

fn register_counters(registry: &mut Registry, samples: &[Sample]) {
    type Read = fn(&Ingested) -> u64;
    let counters: [(&str, &str, Option<Unit>, Read); 4] = [
        ("ingest", "Bytes of frames taken in since the server started", Some(Unit::Bytes), |i| i.bytes),
        ("ingest_raw", "Guest data in them", Some(Unit::Bytes), |i| i.raw_bytes),
        ("ingest_frames", "Frames taken in since the server started", None, |i| i.frames),
        ("ingest_records", "Records taken in since the server started", None, |i| i.records),
    ];
    for (name, help, unit, read) in counters {
        let family = Totals::default();
        for sample in samples {
            family.get_or_create(&labels(&sample.disk)).inc_by(read(&sample.ingested));
        }
        match unit {
            Some(unit) => registry.register_with_unit(name, help, unit, family),
            None => registry.register(name, help, family),
        }
    }
}
