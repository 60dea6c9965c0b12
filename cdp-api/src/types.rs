//! What the API sends and takes.

use core::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::time;

/// One disk in the list.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize, ToSchema)]
pub struct DiskSummary {
    /// The disk's UUID.
    pub id: String,
    /// Name of its VM; empty when only the journal is known and not whose it is.
    pub vm: String,
    /// Device in the VM; with `vm` it is the disk's other name, `vm/device`.
    pub device: String,
    /// Name of the host it was last seen on.
    pub host: String,
    /// Size in bytes.
    pub disk_bytes: u64,
    /// Whether it is to be protected, and whether it is.
    pub protection: ProtectionState,
    /// Newest durable record, when there is a journal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub newest: Option<ResolvedPoint>,
    /// What keeps the server's journal of the disk from taking writes or from being read, while something does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<Fault>,
    /// Other VMs that claim to have this disk and are not protected, because one history cannot follow two disks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conflicts: Vec<Conflict>,
}

/// A VM that runs with a disk that is another VM's: it was cloned with its UUID, or is just being moved.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
pub struct Conflict {
    /// Name of the host on which it runs.
    pub host: String,
    /// Its name.
    pub vm: String,
    /// Its process on that host.
    pub vm_pid: u32,
    /// Why it is not protected, and what to do.
    pub reason: String,
}

/// What is wrong with a disk's journal.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
pub struct Fault {
    /// What kind of failure it is, to act on.
    pub kind: FaultKind,
    /// What happened, where.
    pub message: String,
    /// What to do next.
    pub hint: String,
    /// When it was noticed, RFC 3339.
    pub since: String,
}

/// A check of everything that a disk's journal holds.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
pub struct Verification {
    /// The disk's UUID.
    pub disk: String,
    /// How far it is.
    pub state: VerificationState,
    /// When it began, RFC 3339.
    pub started: String,
    /// Bytes of stored data that are checked.
    pub done_bytes: u64,
    /// Bytes of stored data that there are to check.
    pub total_bytes: u64,
    /// First record that was checked; 0 when there was none.
    pub first_lsn: u64,
    /// Last record that was checked; 0 when there was none. What came later is not looked at.
    pub last_lsn: u64,
    /// What is damaged, by LSN; complete once `state` is `done`.
    pub damage: Vec<DamagedPart>,
    /// Whether there is more damage than the list holds.
    pub more_damage: bool,
}

/// How far a [`Verification`] is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum VerificationState {
    /// It waits for another disk's check to end: one disk is checked at a time.
    Waiting,
    /// It reads.
    Running,
    /// It has read everything.
    Done,
}

/// A part of a disk's journal that is not what was written.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
pub struct DamagedPart {
    /// What kind of bytes: `data`, `records`, `index`, `manifest`, `bookmarks`, `mark`, `header`,
    /// `foreign`, `unused`, `unreadable`, `missing`.
    pub kind: String,
    /// The file, on the server.
    pub file: String,
    /// Where in the file the damaged part begins, in bytes.
    pub offset: u64,
    /// First record that the part speaks of.
    pub first_lsn: u64,
    /// Last record that the part speaks of; the largest number there is when everything from the first on is.
    pub last_lsn: u64,
    /// Whether points cannot be restored because of it.
    pub loses_points: bool,
    /// What is wrong.
    pub detail: String,
    /// What to do about it.
    pub hint: String,
}

/// Kind of a [`Fault`]. A client must take a kind it does not know for [`FaultKind::IoError`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum FaultKind {
    /// The store's file system is full. Nothing is acknowledged until there is room; then it goes on by itself.
    DiskFull,
    /// Stored bytes are not what was written.
    Damaged,
    /// The host's agent cannot write to its spool. Nothing is lost as long as the server takes the frames.
    SpoolFailing,
    /// The store's disk or file system fails. Nothing is acknowledged until it works; then it goes on by itself.
    #[serde(other)]
    IoError,
}

impl FaultKind {
    /// The name in JSON.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::DiskFull => "disk-full",
            Self::Damaged => "damaged",
            Self::SpoolFailing => "spool-failing",
            Self::IoError => "io-error",
        }
    }
}

/// One disk with all that is known of it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize, ToSchema)]
pub struct Disk {
    /// What the list says too.
    #[serde(flatten)]
    pub summary: DiskSummary,
    /// UUID of the VM, where it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm_uuid: Option<String>,
    /// Process id of the VM on its host, while it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm_pid: Option<u32>,
    /// Version of the QEMU that runs it, as it says itself.
    pub qemu_version: String,
    /// Node below the device.
    pub node: String,
    /// The node's driver (`qcow2`, `raw`, …).
    pub driver: String,
    /// Whether the guest can only read it.
    pub read_only: bool,
    /// Whether the host's agent is connected and reports this disk now.
    pub online: bool,
    /// When it was last reported, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_seen: Option<String>,
    /// Its journal, once it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub journal: Option<Journal>,
}

/// A disk's journal in numbers.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct Journal {
    /// Last capture session.
    pub epoch: u64,
    /// Last record that survives a power cut.
    pub durable_lsn: u64,
    /// Last record the host has captured, as far as the server knows.
    pub captured_lsn: u64,
    /// Records captured and not yet durable.
    pub lag_lsns: u64,
    /// Raw bytes taken out of the ring and not yet acknowledged.
    pub lag_bytes: u64,
    /// How far the newest durable state is behind the host's clock, in seconds; 0 while nothing is outstanding.
    pub lag_s: f64,
    /// Bytes of guest data recorded.
    pub raw_bytes: u64,
    /// Bytes stored for it: data.
    pub stored_data_bytes: u64,
    /// Bytes stored for it: records and indexes.
    pub stored_meta_bytes: u64,
    /// Segment files.
    pub segments: u64,
    /// Bytes of disk that the initial sync or a resync still has to read.
    pub dirty_bytes: u64,
    /// Bytes that the running or last sync has read back from the disk; holes are not read.
    #[serde(default)]
    pub sync_read_bytes: u64,
    /// Those of them that were compared with what the journal has, by hash.
    #[serde(default)]
    pub sync_compared_bytes: u64,
    /// Those that the journal had already; they did not travel.
    #[serde(default)]
    pub sync_equal_bytes: u64,
    /// Those that were shipped.
    #[serde(default)]
    pub sync_shipped_bytes: u64,
    /// Bytes of the host's capture ring in use.
    pub ring_used_bytes: u64,
    /// Bytes of the host's capture ring.
    pub ring_bytes: u64,
    /// Bytes of frames in the host's spool.
    #[serde(default)]
    pub spool_used_bytes: u64,
    /// Most bytes that it may take; 0 for no spool.
    #[serde(default)]
    pub spool_bytes: u64,
    /// Whether it cannot be written to; the disk's fault says why.
    #[serde(default)]
    pub spool_failing: bool,
}

/// Protection of a disk: wanted and real.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
pub struct ProtectionState {
    /// What the operator wants; kept over restarts of guest, agent and server.
    pub enabled: bool,
    /// What is the case.
    pub phase: ProtectionPhase,
    /// Why it is so and what to do, where that is not plain; else empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// How it is to be protected.
    #[serde(flatten)]
    pub options: ProtectionOptions,
    /// Whether flushes are what `sync` promises.
    #[serde(default)]
    pub sync_state: SyncState,
    /// Guest requests and flushes that wait now: for room in the ring, or for durability.
    #[serde(default)]
    pub waiting: u64,
    /// For how long some have waited without a break, in milliseconds.
    #[serde(default)]
    pub waiting_ms: u64,
}

/// How a disk is protected. Kept while protection is off.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
pub struct ProtectionOptions {
    /// What a guest's write does that finds the capture ring full.
    #[serde(default)]
    pub policy: OverflowPolicy,
    /// With `throttle`: how long a write waits at most, in milliseconds.
    pub throttle_ms: u32,
    /// Size of the capture ring in MiB; absent: the agent's own default. A change counts from the next capture on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ring_mib: Option<u32>,
    /// Whether a guest's flush completes only when the server has made everything before it durable.
    #[serde(default)]
    pub sync: bool,
    /// With `sync`: how long a flush waits at most, in milliseconds; then it completes, and sync is lost for a while.
    pub sync_timeout_ms: u32,
}

impl Default for ProtectionOptions {
    fn default() -> Self {
        Self {
            policy: OverflowPolicy::Track,
            throttle_ms: 1000,
            ring_mib: None,
            sync: false,
            sync_timeout_ms: 10_000,
        }
    }
}

/// What a guest's write does that finds the capture ring full.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OverflowPolicy {
    /// It goes on at once, unrecorded: a gap begins, and ends when the disk has been read back.
    #[default]
    Track,
    /// It waits for room, up to `throttle_ms`, and then goes on unrecorded.
    Throttle,
    /// It waits for room for as long as it takes: no gap, but the guest stands still.
    Strict,
}

impl OverflowPolicy {
    /// The name in JSON.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Track => "track",
            Self::Throttle => "throttle",
            Self::Strict => "strict",
        }
    }

    /// The policy of that name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        [Self::Track, Self::Throttle, Self::Strict].into_iter().find(|policy| policy.as_str() == name)
    }
}

/// Whether flushes are what sync mode promises.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SyncState {
    /// Sync mode is off, or nothing is known of the capture.
    #[default]
    Off,
    /// A flush that completes is durable at the server.
    InForce,
    /// It cannot be while a gap is open: flushes complete at once.
    Suspended,
    /// A flush has waited too long: flushes complete at once until the server has caught up.
    Lost,
}

impl SyncState {
    /// The name in JSON.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::InForce => "in-force",
            Self::Suspended => "suspended",
            Self::Lost => "lost",
        }
    }

    /// The state of that name; off for one that is not known.
    #[must_use]
    pub fn named(name: &str) -> Self {
        let known = [Self::InForce, Self::Suspended, Self::Lost];
        known.into_iter().find(|state| state.as_str() == name).unwrap_or_default()
    }
}

/// What is the case with a disk's protection.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ProtectionPhase {
    /// Not wanted and not running.
    Off,
    /// Wanted; the agent has not reported that capture runs.
    Starting,
    /// Capture runs, and the disk's older contents are still being read; the gap is open, nothing of it can be
    /// restored yet.
    Syncing,
    /// Capture runs and every new write becomes a point.
    Protected,
    /// Writes are only noted, not recorded: the ring was full. A gap is open.
    Tracking,
    /// Not wanted any more; the agent has not yet reported that capture ended.
    Stopping,
    /// Wanted, but the agent is not connected or the VM does not run. It starts when both are back.
    Offline,
}

impl ProtectionPhase {
    /// The name in JSON.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Starting => "starting",
            Self::Syncing => "syncing",
            Self::Protected => "protected",
            Self::Tracking => "tracking",
            Self::Stopping => "stopping",
            Self::Offline => "offline",
        }
    }
}

impl fmt::Display for ProtectionPhase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Body of `PUT /v1/disks/{disk}/protection`. What is absent stays as it is.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Protection {
    /// On or off.
    pub enabled: bool,
    /// What a guest's write does that finds the capture ring full: `track`, `throttle` or `strict`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<OverflowPolicy>)]
    pub policy: Option<String>,
    /// With `throttle`: how long a write waits at most, 1 to 600000 milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub throttle_ms: Option<u64>,
    /// Size of the capture ring, 8 to 16384 MiB. Counts from the next capture on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ring_mib: Option<u64>,
    /// Whether a guest's flush completes only when the server has made everything before it durable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sync: Option<bool>,
    /// With `sync`: how long a flush waits at most, 1 to 3600000 milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sync_timeout_ms: Option<u64>,
}

/// A point of a disk's history: the state right after one record.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
pub struct ResolvedPoint {
    /// The record.
    pub lsn: u64,
    /// Its stamp: RFC 3339, UTC, nine digits of fraction.
    pub time: String,
    /// Its stamp: nanoseconds since 1970 UTC.
    pub stamp_ns: u64,
    /// What the record is.
    pub kind: PointKind,
    /// Whether this is just what was asked for. `false` for a time newer than the newest record of a disk whose
    /// host has not said that nothing came after: the newest record is then the best that is known.
    pub exact: bool,
}

impl ResolvedPoint {
    /// A point; the time's text is made from the stamp.
    #[must_use]
    pub fn new(lsn: u64, stamp_ns: u64, kind: PointKind, exact: bool) -> Self {
        Self { lsn, time: time::rfc3339(stamp_ns), stamp_ns, kind, exact }
    }
}

impl fmt::Display for ResolvedPoint {
    /// One line for people: `lsn 1042, 2026-11-20T10:00:03.000000000Z, after a flush`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "lsn {}, {}, {}", self.lsn, self.time, self.kind.describe())
    }
}

/// What the record of a point is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PointKind {
    /// A guest write.
    Write,
    /// A guest write of zeroes.
    Zero,
    /// A discard.
    Discard,
    /// A guest flush: all that the guest had seen complete before it is in.
    Flush,
    /// A new size.
    Resize,
    /// A bookmark.
    Bookmark,
    /// The end of a gap: the disk is whole again from here.
    GapEnd,
    /// The VM let go of the disk in good order.
    Close,
    /// Any other record (the beginning of a gap, an empty slot).
    #[serde(other)]
    Other,
}

impl PointKind {
    /// In words.
    #[must_use]
    pub const fn describe(self) -> &'static str {
        match self {
            Self::Write => "after a write",
            Self::Zero => "after a write of zeroes",
            Self::Discard => "after a discard",
            Self::Flush => "after a flush",
            Self::Resize => "after a change of size",
            Self::Bookmark => "at a bookmark",
            Self::GapEnd => "at the end of a gap",
            Self::Close => "when the VM let go of the disk",
            Self::Other => "between writes",
        }
    }
}

/// What of a disk can be restored.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
pub struct Points {
    /// The disk's UUID.
    pub disk: String,
    /// Every point in these ranges can be restored; in time order, none overlapping.
    pub recoverable: Vec<RecoverableRange>,
    /// Where and why writes may be missing; in time order.
    pub gaps: Vec<Gap>,
    /// The bookmarks, in time order.
    pub bookmarks: Vec<Bookmark>,
    /// The newest point that can be restored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub newest: Option<ResolvedPoint>,
    /// With `?at=`: what that resolves to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resolved: Option<ResolvedPoint>,
}

/// A run of points that can all be restored.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
pub struct RecoverableRange {
    /// First point.
    pub from_lsn: u64,
    /// Its time, RFC 3339.
    pub from_time: String,
    /// Its time in nanoseconds since 1970 UTC.
    pub from_stamp_ns: u64,
    /// Last point.
    pub to_lsn: u64,
    /// Its time, RFC 3339.
    pub to_time: String,
    /// Its time in nanoseconds since 1970 UTC.
    pub to_stamp_ns: u64,
}

/// A run of records whose points cannot be restored.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
pub struct Gap {
    /// First record in the gap.
    pub from_lsn: u64,
    /// Its time, RFC 3339.
    pub from_time: String,
    /// Its time in nanoseconds since 1970 UTC.
    pub from_stamp_ns: u64,
    /// The record that ends it, which is a good point again; absent while the gap is open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to_lsn: Option<u64>,
    /// Its time, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to_time: Option<String>,
    /// Its time in nanoseconds since 1970 UTC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to_stamp_ns: Option<u64>,
    /// `attach`, `overflow`, `write-failed`, `agent-lost`, `filter-fault`, `contents-changed`, `unclean-end` or `large-request`.
    pub reason: String,
}

/// A named point.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
pub struct Bookmark {
    /// The name, unique for the disk.
    pub name: String,
    /// The point: right after this record.
    pub lsn: u64,
    /// Its time, RFC 3339.
    pub time: String,
    /// Its time in nanoseconds since 1970 UTC.
    pub stamp_ns: u64,
}

/// Body of `POST /v1/disks/{disk}/bookmarks`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateBookmark {
    /// 1 to 255 bytes, unique for the disk.
    pub name: String,
    /// A point that exists; absent means now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<String>,
}

/// What a stretch of the disk holds at a point.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ExtentKind {
    /// Bytes to be read with `data`.
    Data,
    /// Reads as zeroes.
    Zero,
}

/// A stretch of the disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
    /// What it holds.
    pub kind: ExtentKind,
}

/// What a range of the disk holds at a point: the extents cover it without holes or overlaps.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
pub struct Extents {
    /// The point.
    pub lsn: u64,
    /// Size of the disk at that point, in bytes.
    pub disk_bytes: u64,
    /// In order of offset.
    pub extents: Vec<Extent>,
    /// Where to ask again, when this answer does not reach the range's end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_offset: Option<u64>,
}
