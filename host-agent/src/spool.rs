//! The spool: frames that the outbox has no room for, in files of this host, while the server is away or slow.
//!
//! Files hold the entries of the outbox's area (`docs/formats/outbox.md`), one behind the other, and are freed whole
//! when the server has made their frames durable. They are read back in LSN order through the outbox. A file that
//! cannot be written costs nothing but the spool: frames then wait in the outbox and the ring. Nothing is synced, since
//! nothing rests on it: what a power cut took is noticed when the files are read, and costs history, never its truth
//! (the argument and its cases: `docs/formats/outbox.md`).

use std::collections::VecDeque;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use journal_format::wire::{MESSAGE_HEADER_BYTES, MessageHeader, MessageType};
use journal_format::{DiskId, Epoch, Lsn};
use nix::libc::ELOOP;
use zerocopy::{FromBytes, IntoBytes};

use crate::drill::Drill;
use crate::error::AgentError;
use crate::limits::{SPOOL_FILE_BYTES, SPOOL_RETRY};
use crate::lock::{self, LockError};
use crate::outbox::adopt::{packed_frame, read_entry, read_message};
use crate::outbox::layout::{KIND_FRAME, RawEntry, SpoolHeader, entry_bytes};
use crate::outbox::{Packed, PackedFrame};

/// Bytes before the first entry of a file.
const HEADER_BYTES: u64 = size_of::<SpoolHeader>() as u64;

/// What is written to find out whether something can be: a block, so that a full disk refuses it.
const PROBE_BYTES: usize = 4096;

/// Where spools are, and how large one may become.
#[derive(Clone, Debug)]
pub struct SpoolPlace {
    /// The folder for all disks' spools.
    pub folder: PathBuf,
    /// Most bytes of files for one disk; 0 for no spool.
    pub limit_bytes: u64,
    /// What fails there on purpose.
    pub drill: Option<Drill>,
}

impl SpoolPlace {
    /// Makes the folder and takes it for this agent alone. A place that no agent could ever use is an error; one that fails
    /// (a full or failing disk) is only warned of: the agent is of use without it, and tries again. `None` when there is
    /// no spool to be, or none that works.
    ///
    /// # Errors
    /// [`AgentError::Config`] when the folder cannot be one, may not be written to, or is another agent's.
    pub fn take(&self) -> Result<Option<File>, AgentError> {
        if self.limit_bytes == 0 {
            return Ok(None);
        }
        let folder = self.folder.display();
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&self.folder).map_err(LockError::Os);
        let error = match made.and_then(|()| lock::take(&self.folder.join("lock"))) {
            Ok(lock) => return Ok(Some(lock)),
            Err(error) => error,
        };
        let bad = |detail| AgentError::Config { setting: "spool_dir", detail };
        use io::ErrorKind as E;
        match error {
            LockError::Held(pid) => Err(bad(format!(
                "another agent (process {pid}) spools to {folder}; stop that one first, or give this one another --spool-dir"
            ))),
            LockError::Os(error)
                if matches!(
                    error.kind(),
                    E::PermissionDenied
                        | E::AlreadyExists
                        | E::NotADirectory
                        | E::InvalidFilename
                        | E::NotFound
                ) || error.raw_os_error() == Some(ELOOP) =>
            {
                Err(bad(format!(
                    "cannot write to {folder}: {error}; give --spool-dir a folder that this user may write to, or \
                     --spool-mib 0 for no spool"
                )))
            }
            LockError::Os(error) => {
                tracing::warn!(%folder, %error, hint = daemon::advice(&error),
                    "the spool cannot be written to; frames wait in memory, and writes go by uncaptured when that is full");
                Ok(None)
            }
        }
    }
}

#[derive(Debug)]
struct Segment {
    path: PathBuf,
    file: File,
    last_lsn: Lsn,
    bytes: u64,
}

/// One epoch's spool.
#[derive(Debug)]
pub struct Spool {
    folder: PathBuf,
    limit: u64,
    drill: Option<Drill>,
    disk: DiskId,
    epoch: Epoch,
    segments: VecDeque<Segment>,
    /// How far its frames reach.
    last: Option<Packed>,
    /// The segment that is being read, and where in it.
    reading: (usize, u64),
    /// Frames not read yet.
    unread: u64,
    /// The next of them, once it was looked at: with the bytes of its entry.
    ahead: Option<(PackedFrame, u64)>,
    trouble: Option<Trouble>,
}

/// Why its files cannot be written to, and when that is tried again.
#[derive(Debug)]
struct Trouble {
    error: String,
    retry_at: Duration,
}

impl Spool {
    /// The empty spool of an epoch that begins: whatever is in its place is not of it.
    #[must_use]
    pub fn begin(place: &SpoolPlace, disk: DiskId, epoch: Epoch) -> Self {
        discard(place, disk);
        Self::open(place, disk, epoch)
    }

    /// The spool of an epoch that goes on, with the frames that a former agent left there.
    #[must_use]
    pub fn open(place: &SpoolPlace, disk: DiskId, epoch: Epoch) -> Self {
        let mut spool = Self {
            folder: place.folder.join(disk.to_string()),
            limit: place.limit_bytes,
            drill: place.drill.clone(),
            disk,
            epoch,
            segments: VecDeque::new(),
            last: None,
            reading: (0, HEADER_BYTES),
            unread: 0,
            ahead: None,
            trouble: None,
        };
        spool.scan();
        // Who needs it first finds out too late.
        if let Some(error) = spool.probe().err().filter(|_| spool.limit > 0) {
            spool.fails(Duration::ZERO, &error);
        }
        spool
    }

    /// How far its frames reach; `None` when there is none.
    #[must_use]
    pub fn last(&self) -> Option<Packed> {
        self.last
    }

    /// The first LSN that is left.
    #[must_use]
    pub fn first_lsn(&self) -> Option<Lsn> {
        self.segments.front().and_then(|segment| name_of(&segment.path)).map(|(_, first)| first)
    }

    /// Bytes of its files.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.segments.iter().map(|segment| segment.bytes).sum()
    }

    /// Why its files cannot be written to now, and what to do.
    #[must_use]
    pub fn trouble(&self) -> Option<&str> {
        self.trouble.as_ref().map(|trouble| trouble.error.as_str())
    }

    /// Tries again, now and then, whether it can be written to, also while no frame needs it.
    pub fn tend(&mut self, now: Duration) {
        if self.trouble.as_ref().is_none_or(|trouble| now < trouble.retry_at) {
            return;
        }
        match self.probe() {
            Ok(()) => self.works(),
            Err(error) => self.fails(now, &error),
        }
    }

    /// Whether a file can be made and filled in its folder.
    fn probe(&self) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.folder)?;
        let path = self.folder.join("probe");
        let written =
            File::create(&path).and_then(|file| write_at(self.drill.as_ref(), &file, &[0; PROBE_BYTES], 0));
        let _ = fs::remove_file(&path);
        if self.segments.is_empty() {
            let _ = fs::remove_dir(&self.folder);
        }
        written
    }

    fn works(&mut self) {
        if self.trouble.take().is_some() {
            tracing::info!(disk = %self.disk, "the spool can be written to again");
        }
    }

    fn fails(&mut self, now: Duration, error: &io::Error) {
        let (folder, hint) = (self.folder.display(), daemon::advice(error));
        if self.trouble.is_none() {
            tracing::warn!(disk = %self.disk, %folder, %error, hint,
                "cannot write to the spool; frames wait in memory, and writes go by uncaptured when that is full");
        }
        let error = format!("cannot write to {folder}: {error}");
        self.trouble = Some(Trouble { error, retry_at: now.saturating_add(SPOOL_RETRY) });
    }

    /// Whether all its frames were read back.
    #[must_use]
    pub fn is_read(&self) -> bool {
        self.unread == 0
    }

    /// Appends a frame; false when there is no room, or the files cannot be written to.
    pub fn append(&mut self, now: Duration, frame: &PackedFrame) -> bool {
        let need = entry_bytes(MESSAGE_HEADER_BYTES.saturating_add(frame.bytes()));
        let room = self.used_bytes().saturating_add(need).saturating_add(HEADER_BYTES) <= self.limit;
        if !room || self.trouble.as_ref().is_some_and(|trouble| now < trouble.retry_at) {
            return false;
        }
        if self.segments.back().is_some_and(|segment| segment.last_lsn.next() != frame.first_lsn) {
            // Frames have gone to the outbox directly, which they do only when it has all that is here. Files with a hole
            // would be taken for torn ones; so would one that got its name for a frame that could not be written.
            self.clear();
        }
        match self.try_append(frame, need) {
            Ok(()) => {
                self.works();
                self.unread = self.unread.saturating_add(1);
                self.last = Some(frame.packed());
                true
            }
            Err(error) => {
                self.fails(now, &error);
                false
            }
        }
    }

    fn try_append(&mut self, frame: &PackedFrame, need: u64) -> io::Result<()> {
        let file_limit = SPOOL_FILE_BYTES.min(self.limit / 4);
        if self.segments.back().is_none_or(|segment| segment.bytes >= file_limit) {
            let segment = self.new_segment(frame.first_lsn)?;
            self.segments.push_back(segment);
        }
        let Some(segment) = self.segments.back_mut() else { return Ok(()) };
        let message_bytes = MESSAGE_HEADER_BYTES.saturating_add(frame.bytes());
        let wire = MessageHeader::new(MessageType::Frame, frame.bytes()).map_err(io::Error::other)?;
        let entry = RawEntry::new(segment.bytes, KIND_FRAME, frame, message_bytes);
        let mut bytes = Vec::with_capacity(usize::try_from(need).unwrap_or(0));
        for part in [entry.as_bytes(), wire.as_bytes(), &frame.head, &frame.data] {
            bytes.extend_from_slice(part);
        }
        bytes.resize(usize::try_from(need).unwrap_or(bytes.len()), 0);
        // A part of it that got there is overwritten by the next attempt, or cut off by the next scan.
        write_at(self.drill.as_ref(), &segment.file, &bytes, segment.bytes)?;
        segment.bytes = segment.bytes.saturating_add(need);
        segment.last_lsn = frame.last_lsn;
        Ok(())
    }

    fn new_segment(&self, first_lsn: Lsn) -> io::Result<Segment> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.folder)?;
        let path = self.folder.join(format!("{:020}-{:020}.spool", self.epoch.0, first_lsn.0));
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(&path)?;
        let header = SpoolHeader::new(self.disk, self.epoch, first_lsn);
        if let Err(error) = write_at(self.drill.as_ref(), &file, header.as_bytes(), 0) {
            let _ = fs::remove_file(&path);
            return Err(error);
        }
        Ok(Segment { path, file, last_lsn: first_lsn.prev(), bytes: HEADER_BYTES })
    }

    /// The next frame to read back.
    ///
    /// # Errors
    /// When it is not there or damaged: the epoch cannot be continued behind it.
    pub fn peek(&mut self) -> io::Result<Option<&PackedFrame>> {
        if self.unread > 0 && self.ahead.is_none() {
            while self.segments.get(self.reading.0).is_some_and(|segment| self.reading.1 >= segment.bytes) {
                self.reading = (self.reading.0.saturating_add(1), HEADER_BYTES);
            }
            let segment = self.segments.get(self.reading.0);
            let segment = segment.ok_or_else(|| io::Error::other("a file of the spool is gone"))?;
            self.ahead = Some(read_frame(&segment.file, self.reading.1, self.disk, self.epoch)?);
        }
        Ok(self.ahead.as_ref().map(|(frame, _)| frame))
    }

    /// The frame that [`Spool::peek`] gave is in the outbox. It stays here until it is durable.
    pub fn advance(&mut self) {
        if let Some((_, bytes)) = self.ahead.take() {
            self.reading.1 = self.reading.1.saturating_add(bytes);
            self.unread = self.unread.saturating_sub(1);
        }
    }

    /// Passes by the frames up to `lsn`: they are in the outbox already.
    ///
    /// # Errors
    /// As [`Spool::peek`].
    pub fn pass(&mut self, lsn: Lsn) -> io::Result<()> {
        while self.peek()?.is_some_and(|frame| frame.last_lsn <= lsn) {
            self.advance();
        }
        Ok(())
    }

    /// Removes the files whose frames are all durable.
    pub fn release(&mut self, durable: Lsn) {
        while let Some(segment) = self.segments.front()
            && segment.last_lsn <= durable
            && (self.reading.0 > 0 || self.reading.1 >= segment.bytes)
        {
            remove(&segment.path);
            self.segments.pop_front();
            self.reading = match self.reading.0.checked_sub(1) {
                Some(number) => (number, self.reading.1),
                None => (0, HEADER_BYTES),
            };
            if self.segments.is_empty() {
                let _ = fs::remove_dir(&self.folder);
            }
        }
    }

    /// Throws everything away.
    pub fn clear(&mut self) {
        for segment in self.segments.drain(..) {
            remove(&segment.path);
        }
        (self.reading, self.unread, self.ahead) = ((0, HEADER_BYTES), 0, None);
        let _ = fs::remove_dir(&self.folder);
    }

    /// Finds the files of this epoch and where their whole entries end.
    fn scan(&mut self) {
        let mut torn = false;
        for (path, epoch, first) in files(&self.folder) {
            // A file may have lost all its frames and be whole to all appearance: its name says where it began.
            let follows = self.segments.back().is_none_or(|before| before.last_lsn.next() == first);
            if epoch != self.epoch || torn || !follows {
                tracing::warn!(file = %path.display(), disk = %self.disk, "what was spooled does not go on here; removing it");
                remove(&path);
                continue;
            }
            match self.scan_file(&path, first) {
                Ok(whole) => torn = !whole,
                Err(error) => {
                    tracing::warn!(file = %path.display(), disk = %self.disk, %error, "removing an unreadable file of the spool");
                    remove(&path);
                    torn = true;
                }
            }
        }
    }

    /// False when the file does not end with a whole entry.
    fn scan_file(&mut self, path: &Path, first: Lsn) -> io::Result<bool> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let mut bytes = [0; size_of::<SpoolHeader>()];
        file.read_exact_at(&mut bytes, 0)?;
        let header = SpoolHeader::read_from_bytes(&bytes).map_err(|_| io::Error::other("cut"))?;
        if !header.is_of(self.disk, self.epoch, first) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "its header is not that of its name"));
        }
        let end = file.metadata()?.len();
        let mut segment =
            Segment { path: path.to_owned(), file, last_lsn: first.prev(), bytes: HEADER_BYTES };
        while segment.bytes < end {
            let Ok((frame, bytes)) = read_frame(&segment.file, segment.bytes, self.disk, self.epoch) else {
                break;
            };
            if frame.first_lsn != segment.last_lsn.next() {
                break;
            }
            segment.bytes = segment.bytes.saturating_add(bytes);
            segment.last_lsn = frame.last_lsn;
            self.last = Some(frame.packed());
            self.unread = self.unread.saturating_add(1);
        }
        let whole = segment.bytes == end;
        if !whole {
            tracing::warn!(file = %path.display(), from = segment.bytes, "cutting off the torn end of a spool file");
            segment.file.set_len(segment.bytes)?;
        }
        self.segments.push_back(segment);
        Ok(whole)
    }
}

/// The frame at a place, and the bytes of its entry.
fn read_frame(file: &File, at: u64, disk: DiskId, epoch: Epoch) -> io::Result<(PackedFrame, u64)> {
    let entry = read_entry(file, at, (0, at))?;
    let frame = packed_frame(read_message(file, &entry, (0, at))?, disk, epoch)?;
    Ok((frame, entry_bytes(entry.message_bytes())))
}

/// Writes all of it, or fails; then a part of it may be there.
fn write_at(drill: Option<&Drill>, file: &File, bytes: &[u8], at: u64) -> io::Result<()> {
    if let Some(Err((part, error))) = drill.map(|drill| drill.spool_write(bytes.len())) {
        file.write_all_at(bytes.get(..part).unwrap_or_default(), at)?;
        return Err(error);
    }
    file.write_all_at(bytes, at)
}

fn remove(path: &Path) {
    if let Err(error) = fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(file = %path.display(), %error, "cannot remove a file of the spool; remove it by hand");
    }
}

/// Epoch and first LSN in a file's name.
fn name_of(path: &Path) -> Option<(Epoch, Lsn)> {
    let (epoch, first) = path.file_name()?.to_str()?.strip_suffix(".spool")?.split_once('-')?;
    Some((Epoch(epoch.parse().ok()?), Lsn(first.parse().ok()?)))
}

/// The spool files in a disk's folder, in order.
fn files(folder: &Path) -> Vec<(PathBuf, Epoch, Lsn)> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut files: Vec<_> =
        entries.filter_map(|path| name_of(&path).map(|(epoch, first)| (path, epoch, first))).collect();
    files.sort();
    files
}

/// The epochs that former agents left frames of, the newest of each disk, with the disk's size then.
#[must_use]
pub fn left_behind(place: &SpoolPlace) -> Vec<(DiskId, Epoch, u64)> {
    let folders = fs::read_dir(&place.folder).into_iter().flatten().flatten();
    let newest = |folder: fs::DirEntry| {
        let disk: DiskId = folder.file_name().to_str()?.parse().ok()?;
        let files = files(&folder.path());
        let (_, epoch, _) = *files.last()?;
        // A power cut may have left the newest files without their frames.
        let first_of = |path: &Path| read_frame(&File::open(path).ok()?, HEADER_BYTES, disk, epoch).ok();
        let (frame, _) = files.iter().rev().find_map(|(path, ..)| first_of(path))?;
        Some((disk, epoch, frame.disk_bytes))
    };
    folders.filter_map(newest).collect()
}

/// Removes what is left of a disk's spool.
pub fn discard(place: &SpoolPlace, disk: DiskId) {
    let folder = place.folder.join(disk.to_string());
    for (path, _, _) in files(&folder) {
        remove(&path);
    }
    let _ = fs::remove_dir(&folder);
}
