//! Storage that asks before each call: for tests and drills that let calls fail, get lost or come late.

use std::fmt::Debug;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Access, Bytes, File, Lock, Storage, Way};

/// What a call is about to do.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum CallKind {
    /// [`Storage::create`]
    Create,
    /// [`Storage::open`]
    Open,
    /// [`Storage::load`]
    Load,
    /// [`Storage::list`]
    List,
    /// [`Storage::rename`]; the path is the new name.
    Rename,
    /// [`Storage::remove`]
    Remove,
    /// [`Storage::create_dir`]
    CreateDir,
    /// [`Storage::sync_dir`]
    SyncDir,
    /// [`File::read_at`]
    Read,
    /// [`File::write_at`], [`File::write_pages`]
    Write,
    /// [`File::sync`]
    Sync,
    /// [`File::set_len`]
    SetLen,
}

impl CallKind {
    /// Whether it changes something, or makes it durable.
    #[must_use]
    pub const fn changes(self) -> bool {
        !matches!(self, Self::Open | Self::Load | Self::List | Self::Read)
    }
}

/// A call that is about to be made.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    /// What it does.
    pub kind: CallKind,
    /// To which file or folder.
    pub path: &'a Path,
    /// How many bytes it reads or writes.
    pub bytes: usize,
}

/// What to do with a call.
#[derive(Debug)]
pub enum Answer {
    /// Make it.
    Go,
    /// Do not make it, and say that it was made. Only for calls that return nothing.
    Skip,
    /// Make it after the next one that changes something, and say now that it was made. Only for calls that return nothing.
    Later,
    /// Do not make it, and say that it failed; of a write, make the first half.
    Fail(io::Error),
}

/// Decides what becomes of calls.
pub trait Hook: Send + Sync + Debug {
    /// Is asked before each call.
    fn before(&self, call: &Call<'_>) -> Answer;

    /// Is told before a call is made that it has put off.
    fn before_late(&self) {}
}

/// A call that was put off.
type Late = Box<dyn FnOnce() -> io::Result<()> + Send>;

struct Inner {
    storage: Arc<dyn Storage>,
    hook: Arc<dyn Hook>,
    late: Mutex<Vec<Late>>,
}

impl Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hooked")
            .field("storage", &self.storage)
            .field("hook", &self.hook)
            .finish_non_exhaustive()
    }
}

impl Inner {
    fn late(&self) -> MutexGuard<'_, Vec<Late>> {
        self.late.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ask(&self, kind: CallKind, path: &Path, bytes: usize) -> Answer {
        self.hook.before(&Call { kind, path, bytes })
    }

    /// A call that returns something: it is made, or it fails.
    fn value<T>(&self, kind: CallKind, path: &Path, call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        if let Answer::Fail(error) = self.ask(kind, path, 0) {
            return Err(error);
        }
        let value = call()?;
        if kind.changes() {
            self.catch_up()?;
        }
        Ok(value)
    }

    /// A call that returns nothing.
    fn action(
        &self,
        (kind, path, bytes): (CallKind, &Path, usize),
        call: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> io::Result<()> {
        match self.ask(kind, path, bytes) {
            Answer::Go => {
                call()?;
                self.catch_up()
            }
            Answer::Skip => Ok(()),
            Answer::Later => {
                self.late().push(Box::new(call));
                Ok(())
            }
            Answer::Fail(error) => Err(error),
        }
    }

    /// Makes the calls that were put off.
    fn catch_up(&self) -> io::Result<()> {
        let late = std::mem::take(&mut *self.late());
        late.into_iter().try_for_each(|call| {
            self.hook.before_late();
            call()
        })
    }
}

/// Storage with a [`Hook`]. Clones share it.
#[derive(Clone, Debug)]
pub struct HookStorage(Arc<Inner>);

impl HookStorage {
    /// Wraps storage.
    #[must_use]
    pub fn new(storage: Arc<dyn Storage>, hook: Arc<dyn Hook>) -> Self {
        Self(Arc::new(Inner { storage, hook, late: Mutex::default() }))
    }

    fn wrap(&self, file: Arc<dyn File>, path: &Path) -> Arc<dyn File> {
        Arc::new(HookFile { file, path: path.to_owned(), inner: Arc::clone(&self.0) })
    }
}

#[derive(Debug)]
struct HookFile {
    file: Arc<dyn File>,
    path: PathBuf,
    inner: Arc<Inner>,
}

impl HookFile {
    /// A write, which `now` makes.
    fn write(
        &self,
        bytes: &[u8],
        position: u64,
        now: impl FnOnce(&dyn File) -> io::Result<()>,
    ) -> io::Result<()> {
        match self.inner.ask(CallKind::Write, &self.path, bytes.len()) {
            Answer::Go => {
                now(&*self.file)?;
                self.inner.catch_up()
            }
            Answer::Skip => Ok(()),
            Answer::Later => {
                let (file, bytes) = (Arc::clone(&self.file), bytes.to_vec());
                self.inner.late().push(Box::new(move || file.write_at(&bytes, position)));
                Ok(())
            }
            Answer::Fail(error) => {
                self.file.write_at(bytes.get(..bytes.len() / 2).unwrap_or(&[]), position)?;
                Err(error)
            }
        }
    }
}

impl File for HookFile {
    fn read_at(&self, buf: &mut [u8], position: u64) -> io::Result<()> {
        match self.inner.ask(CallKind::Read, &self.path, buf.len()) {
            Answer::Fail(error) => Err(error),
            _ => self.file.read_at(buf, position),
        }
    }

    fn write_at(&self, bytes: &[u8], position: u64) -> io::Result<()> {
        self.write(bytes, position, |file| file.write_at(bytes, position))
    }

    fn write_pages(&self, pages: &[u8], position: u64) -> io::Result<Way> {
        // Of a write that is put off or left out it does not matter which way it would have gone.
        let mut way = Way::Direct;
        self.write(pages, position, |file| {
            way = file.write_pages(pages, position)?;
            Ok(())
        })?;
        Ok(way)
    }

    fn sync(&self) -> io::Result<()> {
        let file = Arc::clone(&self.file);
        self.inner.action((CallKind::Sync, &self.path, 0), move || file.sync())
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        let file = Arc::clone(&self.file);
        self.inner.action((CallKind::SetLen, &self.path, 0), move || file.set_len(length))
    }
}

impl Storage for HookStorage {
    fn create(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        let file = self.0.value(CallKind::Create, path, || self.0.storage.create(path))?;
        Ok(self.wrap(file, path))
    }

    fn open(&self, path: &Path, access: Access) -> io::Result<Arc<dyn File>> {
        let file = self.0.value(CallKind::Open, path, || self.0.storage.open(path, access))?;
        Ok(self.wrap(file, path))
    }

    fn load(&self, path: &Path) -> io::Result<Bytes> {
        self.0.value(CallKind::Load, path, || self.0.storage.load(path))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let (storage, from_path, to_path) = (Arc::clone(&self.0.storage), from.to_owned(), to.to_owned());
        self.0.action((CallKind::Rename, to, 0), move || storage.rename(&from_path, &to_path))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let (storage, owned) = (Arc::clone(&self.0.storage), path.to_owned());
        self.0.action((CallKind::Remove, path, 0), move || storage.remove(&owned))
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        self.0.value(CallKind::List, dir, || self.0.storage.list(dir))
    }

    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        self.0.value(CallKind::CreateDir, dir, || self.0.storage.create_dir(dir))
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let (storage, owned) = (Arc::clone(&self.0.storage), dir.to_owned());
        self.0.action((CallKind::SyncDir, dir, 0), move || storage.sync_dir(&owned))
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn Lock>> {
        self.0.storage.lock(path)
    }
}
