//! The store: its disks, and committing across them.

use std::collections::BTreeMap;
use std::io::Error;
use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use journal_format::{DiskId, Frame};

use crate::cache::Cache;
use crate::config::StoreConfig;
use crate::disk::pages::PageWriting;
use crate::disk::{Commit, DiskStore, Env, create, exists, open};
use crate::error::StoreError;
use crate::files;
use crate::io::{Lock, RealStorage, Storage};
use crate::syncing::Syncing;

/// A folder of disks' journals.
#[derive(Debug)]
pub struct Store {
    env: Arc<Env>,
    disks: RwLock<BTreeMap<DiskId, Arc<DiskStore>>>,
    /// Disks that could not be opened, and why.
    damaged: RwLock<BTreeMap<DiskId, Arc<StoreError>>>,
    /// One commit, and one opening of a disk, at a time.
    changing: Mutex<()>,
    syncing: Syncing,
    /// `None` when opened for reading only.
    lock: Option<Box<dyn Lock>>,
}

impl Store {
    /// Opens a store on the local file system for writing, making it if it does not exist, and recovers all its disks.
    /// A disk that cannot be opened is left out and listed by [`Store::damaged`].
    ///
    /// # Errors
    /// `Locked` while another process writes it; `Io`.
    pub fn open(root: impl AsRef<Path>) -> Result<Self, StoreError> {
        Self::open_with(root, Arc::new(RealStorage), StoreConfig::default())
    }

    /// As [`Store::open`], on other storage or with other settings.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_with(
        root: impl AsRef<Path>,
        storage: Arc<dyn Storage>,
        config: StoreConfig,
    ) -> Result<Self, StoreError> {
        let root = root.as_ref();
        let disks = files::disks_dir(root);
        // Each by itself: somebody else may have made the root, and not durably.
        for dir in [root, &disks] {
            storage.create_dir(dir).map_err(StoreError::io("create", dir))?;
        }
        let path = root.join("lock");
        let lock = storage.lock(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::WouldBlock => StoreError::Locked { path: path.clone() },
            _ => StoreError::io("lock", &path)(error),
        })?;
        Self::new(root, storage, config, Some(lock))
    }

    /// Opens a store on the local file system for reading. Changes no file and takes no lock; works whether a server
    /// writes the store or not. What is appended later is not seen.
    ///
    /// # Errors
    /// `Io` when the folder is no store.
    pub fn open_read_only(root: impl AsRef<Path>) -> Result<Self, StoreError> {
        Self::open_read_only_with(root, Arc::new(RealStorage), StoreConfig::default())
    }

    /// As [`Store::open_read_only`], on other storage or with other settings.
    ///
    /// # Errors
    /// As [`Store::open_read_only`].
    pub fn open_read_only_with(
        root: impl AsRef<Path>,
        storage: Arc<dyn Storage>,
        config: StoreConfig,
    ) -> Result<Self, StoreError> {
        Self::new(root.as_ref(), storage, config, None)
    }

    fn new(
        root: &Path,
        storage: Arc<dyn Storage>,
        config: StoreConfig,
        lock: Option<Box<dyn Lock>>,
    ) -> Result<Self, StoreError> {
        let data = Cache::new(config.cache_bytes);
        let pages = Arc::new(PageWriting::new(config.piece_bytes, config.pieces_under_way));
        let syncing = Syncing::new(config.sync_threads);
        let (root_dir, openings) = (root.to_owned(), AtomicU64::new(0));
        let env = Arc::new(Env { root: root_dir, storage, config, data, pages, openings });
        let store = Self {
            env,
            disks: RwLock::default(),
            damaged: RwLock::default(),
            changing: Mutex::default(),
            syncing,
            lock,
        };
        let dir = files::disks_dir(root);
        for name in store.env.storage.list(&dir).map_err(StoreError::io("list", &dir))? {
            if let Ok(disk) = name.parse::<DiskId>()
                && disk.to_string() == name
            {
                store.open_found(disk);
            }
        }
        Ok(store)
    }

    fn open_found(&self, disk: DiskId) {
        let opened = exists(&self.env, disk).and_then(|there| match there {
            true => open(&self.env, disk, self.lock.is_some()).map(Some),
            false => Ok(None),
        });
        match opened {
            Ok(Some(store)) => drop(self.disks_mut().insert(disk, store)),
            // A crash while the disk was made; it never existed for anybody.
            Ok(None) => {}
            Err(error) => {
                // What cannot be written now, because the file system is full, say, may be read.
                if self.lock.is_some()
                    && let Ok(store) = open(&self.env, disk, false)
                {
                    self.disks_mut().insert(disk, store);
                }
                self.damaged_mut().insert(disk, Arc::new(error));
            }
        }
    }

    /// The disks that could be opened, at least for reading.
    #[must_use]
    pub fn disks(&self) -> Vec<DiskId> {
        self.disks_ref().keys().copied().collect()
    }

    /// The disks that could not be opened, or not for writing, and why.
    #[must_use]
    pub fn damaged(&self) -> Vec<(DiskId, Arc<StoreError>)> {
        self.damaged_ref().iter().map(|(disk, why)| (*disk, Arc::clone(why))).collect()
    }

    /// A disk, if the store has it.
    #[must_use]
    pub fn disk(&self, disk: DiskId) -> Option<Arc<DiskStore>> {
        self.disks_ref().get(&disk).cloned()
    }

    /// The disk, ready to take frames: made if the store does not have it, opened again and recovered if a write has
    /// failed. `disk_bytes` is the size of a new disk in bytes.
    ///
    /// # Errors
    /// `Damaged` when where the journal ends cannot be known; `ReadOnly`; `Io`.
    pub fn open_or_create(&self, disk: DiskId, disk_bytes: u64) -> Result<Arc<DiskStore>, StoreError> {
        if self.lock.is_none() {
            return Err(StoreError::ReadOnly);
        }
        let _changing = self.changing();
        let is_damaged = self.damaged_ref().contains_key(&disk);
        let store = match self.disk(disk).filter(|store| !is_damaged && !store.is_poisoned()) {
            Some(store) => store,
            None => {
                if let Some(old) = self.disk(disk) {
                    old.stop_writing();
                }
                if !exists(&self.env, disk)? {
                    create(&self.env, disk, disk_bytes)?;
                }
                let store = open(&self.env, disk, true)?;
                self.damaged_mut().remove(&disk);
                self.disks_mut().insert(disk, Arc::clone(&store));
                store
            }
        };
        store.check_writable()?;
        Ok(store)
    }

    /// Appends a frame to its disk's journal. A frame that the journal has already is ignored. Nothing is durable before
    /// the next [`Store::commit`].
    ///
    /// # Errors
    /// `NoSuchDisk`; `Invalid` for a frame that does not follow the last one (nothing has changed then); `Poisoned`, `Io`
    /// after which the disk must be opened again; `Damaged`, `ReadOnly`.
    pub fn append(&self, frame: &Frame<'_>) -> Result<(), StoreError> {
        let disk = frame.header().disk();
        self.disk(disk).ok_or(StoreError::NoSuchDisk { disk })?.append(frame)
    }

    /// Makes everything appended to all disks durable, in one step, and shows it to readers. Returns the disks for which
    /// that failed; they are poisoned and nothing of them that was not durable before may be acknowledged.
    pub fn commit(&self) -> Vec<(DiskId, StoreError)> {
        let _changing = self.changing();
        let disks: Vec<_> = self.disks_ref().values().cloned().collect();
        let commits: Vec<Commit<'_>> = disks.iter().filter_map(|disk| disk.begin_commit()).collect();
        let files: Vec<_> = commits.iter().flat_map(Commit::files).collect();
        let mut results = self.syncing.sync(files).into_iter();
        let mut failures = Vec::new();
        for commit in commits {
            let disk = commit.disk();
            // Both of its files.
            let both = results.next().zip(results.next());
            let unknown = || StoreError::io("sync", &self.env.root)(Error::other("nobody knows how it went"));
            let synced = both.ok_or_else(unknown).and_then(|(data, meta)| data.and(meta));
            if let Err(error) = commit.finish(synced) {
                failures.push((disk, error));
            }
        }
        failures
    }

    /// Forgets decompressed data that nobody read since the last call, and memory for writing that nobody needed. Whoever
    /// calls it now and then bounds for how long reads and loads that have ended keep memory.
    pub fn forget_unused(&self) {
        self.env.data.forget_unused();
        self.env.pages.free.forget_unused();
    }

    /// Whether data that should have been written past the page cache went through it, because the file system or the device
    /// takes it no other way. That costs processor time and nothing else.
    #[must_use]
    pub fn writes_through_cache(&self) -> bool {
        // ORDERING: nothing is published by it.
        self.env.pages.cached.load(Relaxed)
    }

    fn changing(&self) -> MutexGuard<'_, ()> {
        // It guards no data, only an order.
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn disks_ref(&self) -> RwLockReadGuard<'_, BTreeMap<DiskId, Arc<DiskStore>>> {
        self.disks.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn disks_mut(&self) -> RwLockWriteGuard<'_, BTreeMap<DiskId, Arc<DiskStore>>> {
        self.disks.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn damaged_ref(&self) -> RwLockReadGuard<'_, BTreeMap<DiskId, Arc<StoreError>>> {
        self.damaged.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn damaged_mut(&self) -> RwLockWriteGuard<'_, BTreeMap<DiskId, Arc<StoreError>>> {
        self.damaged.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // Before the lock is given up: views may keep a disk for longer.
        self.disks_ref().values().for_each(|disk| disk.stop_writing());
    }
}
