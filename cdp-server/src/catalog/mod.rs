//! The catalog: hosts, VMs, disks, and which disks are to be protected. SQLite, one file.
//!
//! What the operator wants ([`DiskRow::protect`]) and the epochs handed out live only here. Everything else can be
//! learned again from agents and the store: with the catalog lost, the store's disks come back by their UUIDs with
//! `protect` unknown, and a disk that an agent is still capturing is taken to be wanted ([`Catalog::grant_epoch`]).
//!
//! WAL with `synchronous=FULL`: a change that was answered survives a power cut. Every call blocks on the file and
//! takes one lock; only the control plane, and the opening of a disk, come here.

mod schema;

use std::fs::{File, TryLockError};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cdp_api::{OverflowPolicy, ProtectionOptions};
use journal_format::{DiskId, Epoch, GapReason};
use rusqlite::{Connection, ErrorCode, OptionalExtension, Row, Transaction, params};

use crate::data::plane::Host;
use crate::error::ServerError;
use crate::limits::LOST_EPOCHS;
use crate::model::{DiskReport, HostId, HostReport, VmReport};

/// One disk as the catalog knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskRow {
    /// Its id.
    pub id: DiskId,
    /// Host of its VM; `None` when only the store knows it.
    pub host: Option<HostId>,
    /// Name of that host.
    pub host_name: String,
    /// Name of its VM; empty when only the store knows the disk.
    pub vm: String,
    /// UUID of its VM.
    pub vm_uuid: Option<[u8; 16]>,
    /// Version of its QEMU.
    pub qemu_version: String,
    /// Device in the VM.
    pub device: String,
    /// Node below the device.
    pub node: String,
    /// The node's driver.
    pub driver: String,
    /// Size in bytes.
    pub disk_bytes: u64,
    /// Whether the guest can only read it.
    pub read_only: bool,
    /// When an agent last reported it, nanoseconds since 1970 UTC; 0 for never.
    pub seen_ns: u64,
    /// Whether it is to be protected; `None` when that was lost with an older catalog.
    pub protect: Option<bool>,
    /// How it is to be protected.
    pub options: ProtectionOptions,
    /// Last epoch handed out.
    pub epoch: Epoch,
}

impl DiskRow {
    /// The disk's other name, `vm/device`; its UUID when it has none.
    #[must_use]
    pub fn name(&self) -> String {
        if self.vm.is_empty() { self.id.to_string() } else { format!("{}/{}", self.vm, self.device) }
    }
}

/// The open catalog; any thread may call it.
#[derive(Debug)]
pub struct Catalog {
    db: Mutex<Connection>,
    /// A write has failed, and none was good since.
    failed: AtomicBool,
}

/// Takes the lock beside the catalog's file, until what it returns is dropped: two servers with one catalog would hand out
/// the same epochs.
///
/// # Errors
/// `Catalog` when another server has it, or the file cannot be made.
pub(crate) fn lock(path: &Path) -> Result<File, ServerError> {
    let fail = |detail: String| ServerError::Catalog { path: path.to_owned(), detail };
    let mut beside = path.as_os_str().to_owned();
    beside.push(".lock");
    let file = File::options().write(true).create(true).truncate(false).open(&beside);
    let file = file.map_err(|e| {
        let (beside, hint) =
            (Path::new(&beside).display(), "name a file in a folder that this user may write to");
        fail(format!("cannot make {beside}: {e}; {hint} with --catalog"))
    })?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(fail(
            "another cdp-server has it: stop that one, or give this one another --catalog".to_owned(),
        )),
        Err(TryLockError::Error(error)) => {
            Err(fail(format!("cannot lock {}: {error}", Path::new(&beside).display())))
        }
    }
}

/// What to do about a file that SQLite does not open.
fn advice(error: &rusqlite::Error) -> &'static str {
    match error.sqlite_error_code() {
        Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => {
            "move it away: the disks come back from the store, their settings not"
        }
        Some(ErrorCode::CannotOpen | ErrorCode::PermissionDenied | ErrorCode::ReadOnly) => {
            "name a file in a folder that this user may write to with --catalog"
        }
        Some(ErrorCode::DiskFull) => "free space in its file system",
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => "end the program that has it locked",
        _ => "if it is damaged, move it away: the disks come back from the store, their settings not",
    }
}

impl Catalog {
    /// Opens the file, creating or upgrading it.
    ///
    /// # Errors
    /// `Catalog` when the file cannot be opened or was written by a newer release.
    pub fn open(path: &Path) -> Result<Self, ServerError> {
        let fail = |detail: String| ServerError::Catalog { path: path.to_owned(), detail };
        let open = || -> rusqlite::Result<Connection> {
            let db = Connection::open(path)?;
            db.busy_timeout(Duration::from_secs(10))?;
            db.pragma_update(None, "journal_mode", "WAL")?;
            db.pragma_update(None, "synchronous", "FULL")?;
            db.pragma_update(None, "foreign_keys", true)?;
            Ok(db)
        };
        let mut db = open().map_err(|error| fail(format!("{error}; {}", advice(&error))))?;
        schema::migrate(&mut db).map_err(fail)?;
        Ok(Self { db: Mutex::new(db), failed: AtomicBool::new(false) })
    }

    /// Whether the file can be used: read, and written if that failed last.
    ///
    /// # Errors
    /// `Sqlite`: what does not work.
    pub fn check(&self) -> Result<(), ServerError> {
        // ORDERING: Relaxed: what it says is tried.
        if self.failed.load(Ordering::Relaxed) {
            return self.write(|db| db.pragma_update(None, "user_version", schema::VERSION));
        }
        let read = |row: &Row<'_>| row.get::<_, i64>(0);
        self.lock().query_row("SELECT count(*) FROM disks", [], read)?;
        Ok(())
    }

    /// All disks, in order of VM and device.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn disks(&self) -> Result<Vec<DiskRow>, ServerError> {
        let db = self.lock();
        let mut query = db.prepare_cached(&format!("{SELECT} ORDER BY vms.name, disks.device, disks.id"))?;
        let rows = query.query_map([], read_row)?.collect::<rusqlite::Result<Vec<_>>>()?;
        Ok(rows)
    }

    /// One disk.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn disk(&self, id: DiskId) -> Result<Option<DiskRow>, ServerError> {
        let db = self.lock();
        let mut query = db.prepare_cached(&format!("{SELECT} WHERE disks.id = ?1"))?;
        Ok(query.query_row([&id.0[..]], read_row).optional()?)
    }

    /// The disks with that `vm/device`: none, one, or several on different hosts.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn disks_named(&self, name: &str) -> Result<Vec<DiskRow>, ServerError> {
        let db = self.lock();
        let mut query = db.prepare_cached(&format!("{SELECT} WHERE vms.name || '/' || disks.device = ?1"))?;
        let rows = query.query_map([name], read_row)?.collect::<rusqlite::Result<Vec<_>>>()?;
        Ok(rows)
    }

    /// Writes down what a host reports, in one transaction. Disks that it no longer reports stay known.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn record_report(&self, host: &HostReport, now_ns: u64) -> Result<(), ServerError> {
        self.write(|db| {
            let tx = db.transaction()?;
            tx.execute(
                "INSERT INTO hosts (id, name, agent_version, seen_ns) VALUES (?1, ?2, ?3, ?4)
                 ON CONFLICT (id) DO UPDATE SET name = ?2, agent_version = ?3, seen_ns = ?4",
                params![&host.id.0[..], host.name, host.agent_version, to_sql(now_ns)],
            )?;
            for vm in &host.vms {
                record_vm(&tx, host.id, vm, now_ns)?;
            }
            tx.commit()
        })
    }

    /// Makes a disk of the store known when it is not: the catalog was lost, or the store came from elsewhere.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn adopt_from_store(&self, id: DiskId, disk_bytes: u64) -> Result<(), ServerError> {
        self.write(|db| {
            db.execute(
                "INSERT INTO disks (id, device, node, driver, disk_bytes, read_only, seen_ns, epoch)
             VALUES (?1, '', '', '', ?2, 0, 0, 0) ON CONFLICT (id) DO NOTHING",
                params![&id.0[..], to_sql(disk_bytes)],
            )
        })?;
        Ok(())
    }

    /// Writes down whether a disk is to be protected. What was captured before it is switched on is another time of
    /// protection, however that ended ([`Catalog::begins`]).
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn set_protect(&self, id: DiskId, protect: Option<bool>) -> Result<(), ServerError> {
        self.write(|db| {
            db.execute(
                "UPDATE disks SET protect = ?2,
                 ended = CASE WHEN ?2 IS 1 AND protect IS NOT 1 THEN ?3 ELSE ended END,
                 ended_epoch = CASE WHEN ?2 IS 1 AND protect IS NOT 1 THEN epoch ELSE ended_epoch END
             WHERE id = ?1",
                params![&id.0[..], protect, GapReason::Attach as u8],
            )
        })?;
        Ok(())
    }

    /// Writes down how a disk is to be protected.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn set_options(&self, id: DiskId, options: &ProtectionOptions) -> Result<(), ServerError> {
        self.write(|db| {
            db.execute(
            "UPDATE disks SET policy = ?2, throttle_ms = ?3, ring_mib = ?4, sync = ?5, sync_timeout_ms = ?6
             WHERE id = ?1",
            params![
                &id.0[..],
                options.policy.as_str(),
                options.throttle_ms,
                options.ring_mib,
                options.sync,
                options.sync_timeout_ms
            ],
        )
        })?;
        Ok(())
    }

    /// Durably hands an epoch out to a host, which owns the disk from now on: `resume`, if it is the last one that was
    /// handed out, else a new one. `stored` is the newest epoch in the disk's journal.
    ///
    /// An agent that is told another epoch than the one it meant to resume has been overtaken by another capture
    /// session of the same disk, and must begin a new one. A disk whose `protect` is unknown becomes a wanted one:
    /// an agent is capturing it, so somebody wanted it.
    ///
    /// A catalog that was lost, or is older than the store, does not know which epochs were handed out after the
    /// store's newest. The agent that holds one of them may go on with it, but no more than [`LOST_EPOCHS`] beyond the
    /// store's: whatever an agent says, the numbers do not run out. And a new epoch is numbered beyond all of these, so
    /// that none is handed out twice.
    ///
    /// # Errors
    /// `Sqlite`; `Protocol` when the numbers have run out: the store's newest is one that no server hands out.
    pub fn grant_epoch(
        &self,
        id: DiskId,
        stored: Epoch,
        resume: Option<Epoch>,
        host: HostId,
    ) -> Result<Epoch, ServerError> {
        let epoch = self.write(|db| {
            let tx = db.transaction()?;
            let granted: Option<i64> = tx
                .query_row("SELECT epoch FROM disks WHERE id = ?1", [&id.0[..]], |row| row.get(0))
                .optional()?;
            let epoch =
                next_epoch(granted.map_or(0, from_sql), stored.0, resume.map_or(0, |resume| resume.0));
            let Some(epoch) = epoch.filter(|epoch| i64::try_from(*epoch).is_ok()) else { return Ok(None) };
            tx.execute(
                "UPDATE disks SET epoch = ?2, owner = ?3, protect = coalesce(protect, 1),
                     ended_epoch = min(ended_epoch, ?2 - 1)
                 WHERE id = ?1",
                params![&id.0[..], to_sql(epoch), &host.0[..]],
            )?;
            tx.commit()?;
            Ok(Some(epoch))
        })?;
        let epoch = epoch.ok_or_else(|| {
            let newest = stored.0;
            ServerError::Protocol(format!(
                "the journal's newest epoch, {newest}, leaves no room for a new one"
            ))
        })?;
        Ok(Epoch(epoch))
    }

    /// Why a new epoch begins with a gap when the journal does not end with a close: how its newest epoch, `stored`, ended,
    /// as far as anybody said. Nobody speaks for a QEMU or a host that was killed.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn begins(&self, id: DiskId, stored: Epoch) -> Result<GapReason, ServerError> {
        let db = self.lock();
        let mut query = db.prepare_cached("SELECT ended FROM disks WHERE id = ?1 AND ended_epoch >= ?2")?;
        let ended = query.query_row(params![&id.0[..], to_sql(stored.0)], |row| row.get(0)).optional()?;
        Ok(ended.and_then(GapReason::from_u8).unwrap_or(GapReason::UncleanEnd))
    }

    /// The host to which the disk's last epoch was handed out, unless it gave the disk up; and that epoch.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn owner(&self, id: DiskId) -> Result<Option<(Host, Epoch)>, ServerError> {
        let db = self.lock();
        let mut query = db.prepare_cached(
            "SELECT disks.owner, hosts.name, disks.epoch FROM disks LEFT JOIN hosts ON hosts.id = disks.owner
             WHERE disks.id = ?1 AND disks.owner IS NOT NULL",
        )?;
        let read = |row: &Row<'_>| {
            let name = row.get::<_, Option<String>>(1)?.unwrap_or_default();
            Ok((Host { id: HostId(row.get(0)?), name }, Epoch(from_sql(row.get(2)?))))
        };
        Ok(query.query_row([&id.0[..]], read).optional()?)
    }

    /// The owners of all disks, and their epochs.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn owners(&self) -> Result<Vec<(DiskId, HostId, Epoch)>, ServerError> {
        let db = self.lock();
        let mut query = db.prepare("SELECT id, owner, epoch FROM disks WHERE owner IS NOT NULL")?;
        let read =
            |row: &Row<'_>| Ok((DiskId(row.get(0)?), HostId(row.get(1)?), Epoch(from_sql(row.get(2)?))));
        Ok(query.query_map([], read)?.collect::<rusqlite::Result<Vec<_>>>()?)
    }

    /// Writes down that the disk's owner has given it up, and how its last epoch ended if the owner knows.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn give_up(&self, id: DiskId, ended: Option<GapReason>) -> Result<(), ServerError> {
        self.write(|db| {
            db.execute(
                "UPDATE disks SET owner = NULL, ended = coalesce(?2, ended),
                 ended_epoch = CASE WHEN ?2 IS NULL THEN ended_epoch ELSE epoch END
             WHERE id = ?1",
                params![&id.0[..], ended.map(|ended| ended as u8)],
            )
        })?;
        Ok(())
    }

    /// Changes something, and remembers whether that could be done.
    fn write<T>(
        &self,
        change: impl FnOnce(&mut Connection) -> rusqlite::Result<T>,
    ) -> Result<T, ServerError> {
        let changed = change(&mut self.lock());
        // ORDERING: Relaxed, as in `check`.
        self.failed.store(changed.is_err(), Ordering::Relaxed);
        Ok(changed?)
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        // A panic while it was held left no open transaction: dropping one rolls it back.
        self.db.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The epoch for an agent that would go on with `resume` (0: with none); `None` when the numbers have run out.
fn next_epoch(granted: u64, stored: u64, resume: u64) -> Option<u64> {
    let is_lost = granted < stored;
    let newest = granted.max(stored);
    // A disk of which nothing is known may be one of a store that was lost too.
    let beyond = if is_lost || newest == 0 { LOST_EPOCHS } else { 0 };
    if resume > 0 && (newest..=newest.checked_add(beyond)?).contains(&resume) {
        return Some(resume);
    }
    newest.checked_add(if is_lost { LOST_EPOCHS } else { 0 })?.checked_add(1)
}

const SELECT: &str = "
    SELECT disks.id, vms.host, hosts.name, vms.name, vms.uuid, vms.qemu_version, disks.device, disks.node,
           disks.driver, disks.disk_bytes, disks.read_only, disks.seen_ns, disks.protect, disks.epoch,
           disks.policy, disks.throttle_ms, disks.ring_mib, disks.sync, disks.sync_timeout_ms
    FROM disks LEFT JOIN vms ON vms.id = disks.vm LEFT JOIN hosts ON hosts.id = vms.host";

fn read_row(row: &Row<'_>) -> rusqlite::Result<DiskRow> {
    let text = |index| row.get::<_, Option<String>>(index).map(Option::unwrap_or_default);
    Ok(DiskRow {
        id: DiskId(row.get(0)?),
        host: row.get::<_, Option<[u8; 16]>>(1)?.map(HostId),
        host_name: text(2)?,
        vm: text(3)?,
        vm_uuid: row.get(4)?,
        qemu_version: text(5)?,
        device: text(6)?,
        node: text(7)?,
        driver: text(8)?,
        disk_bytes: from_sql(row.get(9)?),
        read_only: row.get(10)?,
        seen_ns: from_sql(row.get(11)?),
        protect: row.get(12)?,
        epoch: Epoch(from_sql(row.get(13)?)),
        options: ProtectionOptions {
            policy: OverflowPolicy::named(&row.get::<_, String>(14)?).unwrap_or_default(),
            throttle_ms: row.get(15)?,
            ring_mib: row.get(16)?,
            sync: row.get(17)?,
            sync_timeout_ms: row.get(18)?,
        },
    })
}

fn record_vm(tx: &Transaction<'_>, host: HostId, vm: &VmReport, now_ns: u64) -> rusqlite::Result<()> {
    let uuid = vm.uuid.as_ref().map(|uuid| &uuid[..]);
    let vm_id: i64 = tx.query_row(
        "INSERT INTO vms (host, name, uuid, qemu_version, seen_ns) VALUES (?1, ?2, ?3, ?4, ?5)
         ON CONFLICT (host, name) DO UPDATE SET uuid = ?3, qemu_version = ?4, seen_ns = ?5 RETURNING id",
        params![&host.0[..], vm.name, uuid, vm.qemu_version, to_sql(now_ns)],
        |row| row.get(0),
    )?;
    for disk in &vm.disks {
        record_disk(tx, vm_id, disk, now_ns)?;
    }
    Ok(())
}

fn record_disk(tx: &Transaction<'_>, vm_id: i64, disk: &DiskReport, now_ns: u64) -> rusqlite::Result<()> {
    tx.execute(
        "INSERT INTO disks (id, vm, device, node, driver, disk_bytes, read_only, seen_ns, protect, epoch)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, 0, 0)
         ON CONFLICT (id) DO UPDATE SET
             vm = ?2, device = ?3, node = ?4, driver = ?5, disk_bytes = ?6, read_only = ?7, seen_ns = ?8",
        params![
            &disk.id.0[..],
            vm_id,
            disk.device,
            disk.node,
            disk.driver,
            to_sql(disk.disk_bytes),
            disk.read_only,
            to_sql(now_ns)
        ],
    )?;
    Ok(())
}

/// SQLite's integers are signed; what does not fit cannot be a size, a time or an epoch of this century.
fn to_sql(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn from_sql(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

#[cfg(test)]
mod tests;
