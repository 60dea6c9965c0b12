//! Storage in memory that knows what is durable, and what a power cut could leave.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Access, Bytes, File, Lock, Storage, Way, are_pages};

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

/// How finely a power cut divides what is not durable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Tearing {
    /// Each write arrived or did not: few enough images to try them all.
    Whole,
    /// Of each write any sectors may have arrived, or a part that begins or ends at any byte.
    Torn,
}

/// What a power cut may have let through of a change.
fn arrived(change: &Change, tearing: Tearing, choose: &mut impl FnMut(usize) -> usize) -> Vec<Change> {
    let Change::Write { position, bytes } = change else {
        return if choose(2) == 0 { Vec::new() } else { vec![change.clone()] };
    };
    let part = |from: usize, to: usize| {
        let part = bytes.get(from..to).unwrap_or_default().to_vec();
        Change::Write { position: position.saturating_add(from), bytes: part }
    };
    match choose(if tearing == Tearing::Whole { 2 } else { 5 }) {
        0 => Vec::new(),
        1 => vec![change.clone()],
        2 => vec![part(0, choose(bytes.len().max(1)))],
        3 => vec![part(choose(bytes.len().max(1)), bytes.len())],
        _ => {
            // Sectors are those of the file, not of the write.
            let mut from = 0;
            let mut kept = Vec::new();
            while from < bytes.len() {
                let to = bytes.len().min(from + SECTOR_BYTES - (position + from) % SECTOR_BYTES);
                if choose(2) == 0 {
                    kept.push(part(from, to));
                }
                from = to;
            }
            kept
        }
    }
}

/// What a power cut may leave of a file's contents.
fn contents_after(inode: &Inode, tearing: Tearing, choose: &mut impl FnMut(usize) -> usize) -> Vec<u8> {
    let mut contents = inode.durable.clone();
    let (durable, now) = (inode.durable.len(), inode.now.len());
    if inode.pending.is_empty() {
        return contents;
    }
    // The new length may have arrived without the data: then what is there is zero, or what the blocks held before.
    match if now > durable { choose(3) } else { 0 } {
        0 => {}
        1 => contents.resize(now, 0),
        _ => {
            let old = if choose(2) == 0 { vec![0xdb] } else { inode.durable.clone() };
            let stale = old.iter().copied().cycle().skip(durable % 64).take(now - durable);
            contents.extend(stale);
            contents.resize(now, 0);
        }
    }
    for part in inode.pending.iter().flat_map(|change| arrived(change, tearing, choose)) {
        apply(&mut contents, &part);
    }
    contents
}

impl MemStorage {
    /// Storage without files.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A copy of what a power cut now could leave: everything durable, and of the rest whatever `choose` decides.
    /// `choose(n)` returns a number below `n`. Every unsynced write is lost, kept or torn on its own; a file that was
    /// extended has its old length or the new one, with zeroes or old bytes where no data arrived; every unsynced change
    /// of names is lost or kept on its own (a rename as a whole). A `choose` that always returns 0 loses everything.
    #[must_use]
    pub fn crash(&self, tearing: Tearing, mut choose: impl FnMut(usize) -> usize) -> Self {
        let state = self.state();
        let mut inodes = Vec::with_capacity(state.inodes.len());
        for inode in &state.inodes {
            let contents = contents_after(inode, tearing, &mut choose);
            inodes.push(Inode { now: contents.clone(), durable: contents, pending: Vec::new() });
        }
        let mut names = state.durable_names.clone();
        for (name, inode) in state.pending_names.iter().filter(|_| choose(2) == 1).flatten() {
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
        };
        Self { state: Arc::new(Mutex::new(crashed)) }
    }

    /// A copy as it is when the process dies and the system goes on: nothing is lost, and nothing more is durable.
    #[must_use]
    pub fn fork(&self) -> Self {
        let state = self.state();
        let forked = State {
            inodes: state.inodes.clone(),
            names: state.names.clone(),
            durable_names: state.durable_names.clone(),
            pending_names: state.pending_names.clone(),
            dirs: state.dirs.clone(),
            locked: BTreeSet::new(),
        };
        Self { state: Arc::new(Mutex::new(forked)) }
    }

    /// What a failed durability step may do to a file: what was not durable will never be, unless it is written again;
    /// until a power cut it can still be read.
    pub fn forget(&self, path: &Path) {
        let mut state = self.state();
        if let Ok(inode) = state.find(path)
            && let Ok(inode) = state.inode(inode)
        {
            inode.pending.clear();
        }
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

    fn write_pages(&self, pages: &[u8], position: u64) -> io::Result<Way> {
        if !are_pages(pages, position) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.write_at(pages, position).map(|()| Way::Direct)
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.storage.state();
        let inode = state.inode(self.inode)?;
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
        let inode = match state.find(path) {
            Ok(inode) => {
                state.change(inode, Change::SetLen(0))?;
                inode
            }
            Err(_) => {
                state.inodes.push(Inode::default());
                let inode = state.inodes.len() - 1;
                state.change_names(vec![(path.to_owned(), Some(inode))]);
                inode
            }
        };
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
