//! Storage in memory that knows what is durable, and what a power cut could leave.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Access, Bytes, File, Lock, Storage};

/// Unit in which an unsynced write may be torn, in bytes: a sector.
const SECTOR_BYTES: usize = 512;

/// A change of a file's contents that is not durable yet.
#[derive(Clone, Debug)]
enum Change {
    Write { position: usize, bytes: Vec<u8> },
    SetLen(usize),
}

#[derive(Clone, Default, Debug)]
struct Inode {
    now: Vec<u8>,
    durable: Vec<u8>,
    pending: Vec<Change>,
}

/// A change of names that is not durable yet: what each name stands for afterwards.
type NameChange = Vec<(PathBuf, Option<usize>)>;

#[derive(Default, Debug)]
struct State {
    inodes: Vec<Inode>,
    names: BTreeMap<PathBuf, usize>,
    durable_names: BTreeMap<PathBuf, usize>,
    pending_names: Vec<NameChange>,
    dirs: BTreeSet<PathBuf>,
    locked: BTreeSet<PathBuf>,
    /// Durability steps of files still to succeed before one fails; `None`: none fails.
    syncs_left: Option<u64>,
}

/// Files in memory. Clones share them.
#[derive(Clone, Default, Debug)]
pub struct MemStorage {
    state: Arc<Mutex<State>>,
}

fn apply(contents: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Write { position, bytes } => {
            let end = position.saturating_add(bytes.len());
            if contents.len() < end {
                contents.resize(end, 0);
            }
            if let Some(place) = contents.get_mut(*position..end) {
                place.copy_from_slice(bytes);
            }
        }
        Change::SetLen(length) => contents.resize(*length, 0),
    }
}

/// A part of a change that a power cut may have let through: nothing, all, or, of a write, some of its sectors.
fn torn(change: &Change, choose: &mut impl FnMut(usize) -> usize) -> Vec<Change> {
    match (choose(3), change) {
        (0, _) => Vec::new(),
        (1, Change::Write { position, bytes }) => {
            let sectors = bytes.chunks(SECTOR_BYTES).enumerate();
            let kept = sectors.filter(|_| choose(2) == 0);
            kept.map(|(i, sector)| Change::Write {
                position: position + i * SECTOR_BYTES,
                bytes: sector.to_vec(),
            })
            .collect()
        }
        (_, change) => vec![change.clone()],
    }
}

impl MemStorage {
    /// Storage without files.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A copy of what a power cut now could leave: everything durable, and of the rest whatever `choose` decides.
    /// `choose(n)` returns a number below `n`; unsynced writes are lost, kept or torn by sectors, each on its own;
    /// unsynced changes of names are lost or kept, each on its own (a rename as a whole).
    #[must_use]
    pub fn crash(&self, mut choose: impl FnMut(usize) -> usize) -> Self {
        let state = self.state();
        let mut inodes = Vec::with_capacity(state.inodes.len());
        for inode in &state.inodes {
            let mut contents = inode.durable.clone();
            for part in inode.pending.iter().flat_map(|change| torn(change, &mut choose)) {
                apply(&mut contents, &part);
            }
            inodes.push(Inode { now: contents.clone(), durable: contents, pending: Vec::new() });
        }
        let mut names = state.durable_names.clone();
        for (name, inode) in state.pending_names.iter().filter(|_| choose(2) == 0).flatten() {
            match inode {
                Some(inode) => names.insert(name.clone(), *inode),
                None => names.remove(name),
            };
        }
        let crashed = State {
            inodes,
            durable_names: names.clone(),
            names,
            pending_names: Vec::new(),
            dirs: state.dirs.clone(),
            locked: BTreeSet::new(),
            syncs_left: None,
        };
        Self { state: Arc::new(Mutex::new(crashed)) }
    }

    /// The durability step of a file after `good` more fails, as on a disk that could not write: what it should have made
    /// durable stays readable, is never made durable by a later step, and is gone after a crash. So does Linux: the pages
    /// are called clean once the failure was reported.
    pub fn fail_sync_after(&self, good: u64) {
        self.state().syncs_left = Some(good);
    }

    /// All files with their contents, as a program would read them now.
    #[must_use]
    pub fn files(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let state = self.state();
        let contents =
            |inode: &usize| state.inodes.get(*inode).map(|inode| inode.now.clone()).unwrap_or_default();
        state.names.iter().map(|(name, inode)| (name.clone(), contents(inode))).collect()
    }

    /// Storage with exactly these files, all durable.
    #[must_use]
    pub fn with_files(files: &BTreeMap<PathBuf, Vec<u8>>) -> Self {
        let mut state = State::default();
        for (name, bytes) in files {
            state.names.insert(name.clone(), state.inodes.len());
            state.inodes.push(Inode { now: bytes.clone(), durable: bytes.clone(), pending: Vec::new() });
            state.dirs.extend(name.ancestors().skip(1).map(Path::to_owned));
        }
        state.durable_names = state.names.clone();
        Self { state: Arc::new(Mutex::new(state)) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn file(&self, inode: usize, access: Access) -> Arc<dyn File> {
        Arc::new(MemFile { storage: self.clone(), inode, access })
    }
}

impl State {
    fn find(&self, path: &Path) -> io::Result<usize> {
        self.names.get(path).copied().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn change_names(&mut self, change: NameChange) {
        for (name, inode) in &change {
            match inode {
                Some(inode) => self.names.insert(name.clone(), *inode),
                None => self.names.remove(name),
            };
        }
        self.pending_names.push(change);
    }

    fn inode(&mut self, inode: usize) -> io::Result<&mut Inode> {
        self.inodes.get_mut(inode).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn change(&mut self, inode: usize, change: Change) -> io::Result<()> {
        let inode = self.inode(inode)?;
        apply(&mut inode.now, &change);
        inode.pending.push(change);
        Ok(())
    }
}

#[derive(Debug)]
struct MemFile {
    storage: MemStorage,
    inode: usize,
    access: Access,
}

impl MemFile {
    fn writable(&self) -> io::Result<()> {
        match self.access {
            Access::ReadWrite => Ok(()),
            Access::Read => Err(io::ErrorKind::PermissionDenied.into()),
        }
    }
}

fn to_usize(value: u64) -> io::Result<usize> {
    usize::try_from(value).map_err(|_| io::ErrorKind::InvalidInput.into())
}

impl File for MemFile {
    fn read_at(&self, buf: &mut [u8], position: u64) -> io::Result<()> {
        let (mut state, position) = (self.storage.state(), to_usize(position)?);
        let now = &state.inode(self.inode)?.now;
        let bytes =
            now.get(position..position.saturating_add(buf.len())).ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(bytes);
        Ok(())
    }

    fn write_at(&self, bytes: &[u8], position: u64) -> io::Result<()> {
        self.writable()?;
        let change = Change::Write { position: to_usize(position)?, bytes: bytes.to_vec() };
        self.storage.state().change(self.inode, change)
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.storage.state();
        let fails = state.syncs_left == Some(0);
        state.syncs_left = if fails { None } else { state.syncs_left.map(|left| left.saturating_sub(1)) };
        let inode = state.inode(self.inode)?;
        if fails {
            inode.pending.clear();
            return Err(io::Error::other("injected failure"));
        }
        for change in std::mem::take(&mut inode.pending) {
            apply(&mut inode.durable, &change);
        }
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.storage.state().inode(self.inode)?.now.len() as u64)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.writable()?;
        self.storage.state().change(self.inode, Change::SetLen(to_usize(length)?))
    }
}

#[derive(Debug)]
struct MemLock {
    storage: MemStorage,
    path: PathBuf,
}

impl Lock for MemLock {}

impl Drop for MemLock {
    fn drop(&mut self) {
        self.storage.state().locked.remove(&self.path);
    }
}

impl Storage for MemStorage {
    fn create(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        let mut state = self.state();
        if path.parent().is_some_and(|dir| !state.dirs.contains(dir)) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let inode = state.inodes.len();
        state.inodes.push(Inode::default());
        state.change_names(vec![(path.to_owned(), Some(inode))]);
        drop(state);
        Ok(self.file(inode, Access::ReadWrite))
    }

    fn open(&self, path: &Path, access: Access) -> io::Result<Arc<dyn File>> {
        let inode = self.state().find(path)?;
        Ok(self.file(inode, access))
    }

    fn load(&self, path: &Path) -> io::Result<Bytes> {
        let mut state = self.state();
        let inode = state.find(path)?;
        Ok(Bytes::Heap(state.inode(inode)?.now.clone()))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.state();
        let inode = state.find(from)?;
        state.change_names(vec![(from.to_owned(), None), (to.to_owned(), Some(inode))]);
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.find(path)?;
        state.change_names(vec![(path.to_owned(), None)]);
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let state = self.state();
        if !state.dirs.contains(dir) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let inside = |path: &PathBuf| {
            let name = path.file_name().filter(|_| path.parent() == Some(dir))?;
            name.to_str().map(str::to_owned)
        };
        let names: BTreeSet<String> = state.names.keys().chain(&state.dirs).filter_map(inside).collect();
        Ok(names.into_iter().collect())
    }

    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        self.state().dirs.extend(dir.ancestors().map(Path::to_owned));
        Ok(())
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let mut state = self.state();
        let here = |change: &NameChange| change.iter().all(|(name, _)| name.parent() == Some(dir));
        let (synced, rest): (Vec<_>, Vec<_>) =
            std::mem::take(&mut state.pending_names).into_iter().partition(here);
        state.pending_names = rest;
        for (name, inode) in synced.into_iter().flatten() {
            match inode {
                Some(inode) => state.durable_names.insert(name, inode),
                None => state.durable_names.remove(&name),
            };
        }
        Ok(())
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn Lock>> {
        if !self.state().locked.insert(path.to_owned()) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(Box::new(MemLock { storage: self.clone(), path: path.to_owned() }))
    }
}
