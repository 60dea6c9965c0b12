//! Storage that fails at the N-th call that changes something.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::{Access, Bytes, File, Lock, Storage};

/// What happens after the first failure.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FailMode {
    /// One call fails; later ones work. A failed write has written its first half.
    Once,
    /// Everything that would change something fails from then on, as on a volume that went read-only.
    FromThenOn,
}

#[derive(Debug)]
struct Trigger {
    calls: AtomicU64,
    fail_at: AtomicU64,
    always: AtomicBool,
}

impl Trigger {
    /// Counts a call; whether it shall fail. (A counter on its own, read by one test thread: `Relaxed` is enough.)
    fn fires(&self) -> bool {
        let call = self.calls.fetch_add(1, Ordering::Relaxed).saturating_add(1); // ORDERING: pairs with nothing
        let at = self.fail_at.load(Ordering::Relaxed); // ORDERING: pairs with nothing, set before the calls it counts
        let always = self.always.load(Ordering::Relaxed); // ORDERING: as above
        at != 0 && (call == at || (always && call > at))
    }

    fn check(&self) -> io::Result<()> {
        if self.fires() { Err(injected()) } else { Ok(()) }
    }
}

fn injected() -> io::Error {
    io::Error::other("injected failure")
}

/// Wraps storage; counts the calls that change something (create, write, sync, set_len, rename, remove, create_dir,
/// sync_dir) and fails the chosen one. Reading never fails here.
#[derive(Debug, Clone)]
pub struct FailStorage {
    inner: Arc<dyn Storage>,
    trigger: Arc<Trigger>,
}

impl FailStorage {
    /// Storage that does not fail yet.
    #[must_use]
    pub fn new(inner: Arc<dyn Storage>) -> Self {
        let trigger =
            Trigger { calls: AtomicU64::new(0), fail_at: AtomicU64::new(0), always: AtomicBool::new(false) };
        Self { inner, trigger: Arc::new(trigger) }
    }

    /// The `n`-th changing call from now on fails, counted from 1; 0 switches failures off.
    pub fn fail_at(&self, n: u64, mode: FailMode) {
        self.trigger.calls.store(0, Ordering::Relaxed); // ORDERING: pairs with nothing, see `Trigger::fires`
        self.trigger.always.store(mode == FailMode::FromThenOn, Ordering::Relaxed); // ORDERING: as above
        self.trigger.fail_at.store(n, Ordering::Relaxed); // ORDERING: as above
    }

    /// Changing calls since the last [`FailStorage::fail_at`].
    #[must_use]
    pub fn calls(&self) -> u64 {
        self.trigger.calls.load(Ordering::Relaxed) // ORDERING: pairs with nothing, see `Trigger::fires`
    }

    fn wrap(&self, file: Arc<dyn File>) -> Arc<dyn File> {
        Arc::new(FailFile { inner: file, trigger: Arc::clone(&self.trigger) })
    }
}

#[derive(Debug)]
struct FailFile {
    inner: Arc<dyn File>,
    trigger: Arc<Trigger>,
}

impl File for FailFile {
    fn read_at(&self, buf: &mut [u8], position: u64) -> io::Result<()> {
        self.inner.read_at(buf, position)
    }

    fn write_at(&self, bytes: &[u8], position: u64) -> io::Result<()> {
        if self.trigger.fires() {
            let half = bytes.get(..bytes.len() / 2).unwrap_or(&[]);
            self.inner.write_at(half, position)?;
            return Err(injected());
        }
        self.inner.write_at(bytes, position)
    }

    fn sync(&self) -> io::Result<()> {
        self.trigger.check()?;
        self.inner.sync()
    }

    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.trigger.check()?;
        self.inner.set_len(length)
    }
}

impl Storage for FailStorage {
    fn create(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        self.trigger.check()?;
        Ok(self.wrap(self.inner.create(path)?))
    }

    fn open(&self, path: &Path, access: Access) -> io::Result<Arc<dyn File>> {
        Ok(self.wrap(self.inner.open(path, access)?))
    }

    fn load(&self, path: &Path) -> io::Result<Bytes> {
        self.inner.load(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.trigger.check()?;
        self.inner.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.trigger.check()?;
        self.inner.remove(path)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        self.inner.list(dir)
    }

    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        self.trigger.check()?;
        self.inner.create_dir(dir)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.trigger.check()?;
        self.inner.sync_dir(dir)
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn Lock>> {
        self.inner.lock(path)
    }
}
