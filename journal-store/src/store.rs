//! The store: its disks, and committing across them.

use std::collections::BTreeMap;
use std::io::Error;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread::Builder;

use journal_format::{DiskId, Frame};

use crate::cache::Cache;
use crate::config::StoreConfig;
use crate::disk::pages::PageWriting;
use crate::disk::{Commit, DiskStore, Env, create, exists, open};
use crate::error::StoreError;
use crate::files;
use crate::io::{File, Lock, RealStorage, Storage};
use crate::limits::FILES_PER_SYNC_THREAD;

/// A folder of disks' journals.
#[derive(Debug)]
pub struct Store {
    env: Arc<Env>,
    disks: RwLock<BTreeMap<DiskId, Arc<DiskStore>>>,
    /// Disks that could not be opened, and why.
    damaged: RwLock<BTreeMap<DiskId, Arc<StoreError>>>,
    /// One commit, and one opening of a disk, at a time.
    changing: Mutex<()>,
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
        let StoreConfig { piece_bytes, whole_pieces, pieces_under_way, .. } = config;
        let pages = Arc::new(PageWriting::new(piece_bytes, whole_pieces, pieces_under_way));
        let (root_dir, openings) = (root.to_owned(), AtomicU64::new(0));
        let env = Arc::new(Env { root: root_dir, storage, config, data, pages, openings });
        let store = Self {
            env,
            disks: RwLock::default(),
            damaged: RwLock::default(),
            changing: Mutex::default(),
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
        let mut results = sync_all(&files, self.env.config.sync_threads).into_iter();
        let mut failures = Vec::new();
        for commit in commits {
            let disk = commit.disk();
            // Both of its files; `zip` would stop at the first failure and leave the other behind.
            let mut next = || results.next().unwrap_or_else(not_synced);
            let (data, meta) = (next(), next());
            let synced = data.and(meta);
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

/// Makes files durable, some at the same time; the results are in the order of the files.
fn sync_all(files: &[(Arc<dyn File>, PathBuf)], threads: usize) -> Vec<Result<(), StoreError>> {
    let results: Vec<OnceLock<Result<(), StoreError>>> = files.iter().map(|_| OnceLock::new()).collect();
    let next = AtomicUsize::new(0);
    let nth = |number| files.get(number).zip(results.get(number));
    // ORDERING: nothing is published by it, it only counts; the results are seen because the threads are joined.
    let take = || next.fetch_add(1, Relaxed);
    let work = || {
        while let Some(((file, path), result)) = nth(take()) {
            let _set_once = result.set(file.sync().map_err(StoreError::io("sync", path)));
        }
    };
    let threads = files.len().div_ceil(FILES_PER_SYNC_THREAD).max(2).min(files.len()).min(threads);
    std::thread::scope(|scope| {
        // With fewer threads than asked for it only takes longer.
        let start = |_| Builder::new().name("cdp-sync".to_owned()).spawn_scoped(scope, work).ok();
        let others: Vec<_> = (1..threads).filter_map(start).collect();
        work();
        for other in others {
            // A file whose thread panicked has no result.
            let _ended = other.join();
        }
    });
    results.into_iter().map(|result| result.into_inner().unwrap_or_else(not_synced)).collect()
}

/// For a file of which nobody has said that it is durable.
fn not_synced() -> Result<(), StoreError> {
    Err(StoreError::io("sync", Path::new("a segment"))(Error::other("nobody has said that it is durable")))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Mutex;

    use super::*;
    use crate::io::{Answer, Call, CallKind, Hook, HookStorage, MemStorage};

    /// Counts how often each file is made durable, and lets that fail for the third.
    #[derive(Default, Debug)]
    struct Syncs(Mutex<BTreeMap<PathBuf, usize>>);

    impl Hook for Syncs {
        fn before(&self, call: &Call<'_>) -> Answer {
            if call.kind != CallKind::Sync {
                return Answer::Go;
            }
            *self.0.lock().unwrap().entry(call.path.to_owned()).or_default() += 1;
            if call.path == Path::new("/folder/2") {
                Answer::Fail(Error::other("planted"))
            } else {
                Answer::Go
            }
        }
    }

    #[test]
    fn each_file_is_made_durable_once_and_has_its_own_result() {
        for (count, threads) in [(0, 16), (1, 16), (2, 1), (7, 3), (64, 16), (200, 16)] {
            let (memory, syncs) = (Arc::new(MemStorage::new()), Arc::new(Syncs::default()));
            let storage = HookStorage::new(memory, Arc::clone(&syncs) as Arc<dyn Hook>);
            storage.create_dir(Path::new("/folder")).unwrap();
            let paths: Vec<_> = (0..count).map(|number| PathBuf::from(format!("/folder/{number}"))).collect();
            let files: Vec<_> =
                paths.iter().map(|path| (storage.create(path).unwrap(), path.clone())).collect();
            let failed: Vec<_> = sync_all(&files, threads).iter().map(Result::is_err).collect();
            assert_eq!(failed, (0..count).map(|number| number == 2).collect::<Vec<_>>());
            let once: BTreeMap<_, _> = paths.into_iter().map(|path| (path, 1)).collect();
            assert_eq!(*syncs.0.lock().unwrap(), once);
        }
    }
}
