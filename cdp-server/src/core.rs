//! What all parts of the server share: catalog, store, live state, counters.

use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use journal_format::{DiskId, Lsn};
use journal_store::io::RealStorage;
use journal_store::{Store, StoreConfig, StoreError};
use tokio::sync::Semaphore;

use crate::catalog::{self, Catalog};
use crate::checks::Checks;
use crate::config::Config;
use crate::drill;
use crate::error::ServerError;
use crate::faults::Faults;
use crate::fleet::Fleet;
use crate::limits::{MAX_ANSWER_BYTES, MAX_READERS, Patience};
use crate::metrics::Counters;
use crate::names;

/// The shared parts; every one of them may be used from any thread.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) catalog: Catalog,
    pub(crate) store: Store,
    pub(crate) fleet: Fleet,
    /// Held while what agents report is written down.
    pub(crate) recording: Mutex<()>,
    pub(crate) faults: Faults,
    pub(crate) counters: Counters,
    /// Bounds how many REST requests read the store at once.
    pub(crate) readers: Arc<Semaphore>,
    /// Bounds how many bytes of disk contents are on their way to REST clients.
    pub(crate) answers: Arc<Semaphore>,
    pub(crate) patience: Patience,
    /// What fails on purpose, as the operator wrote it.
    pub(crate) drill: Option<String>,
    pub(crate) checks: Checks,
    pub(crate) token: Option<String>,
    store_dir: PathBuf,
    /// Held while this server lives, however it ends.
    _catalog_lock: File,
}

impl Core {
    /// Opens store and catalog, and makes the store's disks known to the catalog.
    pub(crate) fn open(config: &Config) -> Result<Self, ServerError> {
        let io = |e| ServerError::io("create the store", config.store.display().to_string(), e);
        std::fs::create_dir_all(&config.store).map_err(io)?;
        warn_of_readers(&config.store);
        let storage = drill::storage(Arc::new(RealStorage), config.drill.as_ref());
        let store = Store::open_with(&config.store, storage, StoreConfig::default())?;
        let catalog_lock = catalog::lock(&config.catalog)?;
        let (catalog, faults) = (Catalog::open(&config.catalog)?, Faults::default());
        for id in store.disks() {
            let Some(disk) = store.disk(id) else { continue };
            catalog.adopt_from_store(id, disk.disk_bytes())?;
            for damage in disk.known_damage() {
                faults.note_damage(&damage, now_ns());
            }
        }
        for (id, error) in store.damaged() {
            let disk = store.disk(id);
            if disk.is_none() {
                catalog.adopt_from_store(id, 0)?;
            }
            faults.note(id, &error, disk.map_or(Lsn::ZERO, |disk| disk.durable_lsn()), now_ns());
        }
        let fleet = Fleet::default();
        for (disk, host, epoch) in catalog.owners()? {
            fleet.had(disk, host, epoch);
        }
        let readers = Arc::new(Semaphore::new(MAX_READERS));
        let answers = Arc::new(Semaphore::new(MAX_ANSWER_BYTES as usize));
        let (token, store_dir) = (config.token.clone(), config.store.clone());
        Ok(Self {
            catalog,
            store,
            fleet,
            recording: Mutex::default(),
            faults,
            counters: Counters::default(),
            readers,
            answers,
            patience: config.patience,
            drill: config.drill.as_ref().map(ToString::to_string),
            checks: Checks::default(),
            token,
            store_dir,
            _catalog_lock: catalog_lock,
        })
    }

    /// The wall clock, nanoseconds since 1970 UTC.
    pub(crate) fn now_ns(&self) -> u64 {
        now_ns()
    }

    /// Notes that the store failed for a disk.
    pub(crate) fn note(&self, id: DiskId, error: &StoreError) {
        let durable = self.store.disk(id).map_or(Lsn::ZERO, |disk| disk.durable_lsn());
        self.faults.note(id, error, durable, now_ns());
    }

    /// Notes what lookups have found damaged, and mended, since this was last called.
    pub(crate) fn note_found(&self) {
        for disk in self.store.disks().into_iter().filter_map(|id| self.store.disk(id)) {
            disk.newly_found().iter().for_each(|damage| self.faults.note_damage(damage, now_ns()));
        }
    }

    /// Writes whose disk it is into the store. A failure costs names in an offline restore, nothing else.
    pub(crate) fn write_name(&self, id: DiskId) {
        let written = match self.catalog.disk(id) {
            Ok(Some(row)) => names::write(&self.store_dir, &row).map_err(|e| e.to_string()),
            Ok(None) => Ok(()),
            Err(error) => Err(error.to_string()),
        };
        if let Err(error) = written {
            tracing::warn!(disk = %id, error, "cannot write the disk's name.json");
        }
    }
}

/// A store whose folders are open to everybody is left as it is, since somebody may want it so, and the operator told.
fn warn_of_readers(store: &Path) {
    let is_open = |folder: &Path| folder.metadata().is_ok_and(|found| found.permissions().mode() & 0o7 != 0);
    if is_open(store) && is_open(&store.join("disks")) {
        tracing::warn!(
            store = %store.display(),
            "other users of this host may read the store's files, which hold what the protected disks hold; \
             `chmod -R go= STORE` closes them"
        );
    }
}

/// The only place where the server reads the wall clock.
fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
