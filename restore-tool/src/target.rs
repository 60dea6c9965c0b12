//! What a restore may overwrite, and what each failure leaves behind.
//!
//! | target | while it is written | after success | after a failure |
//! | --- | --- | --- | --- |
//! | file | a temporary file beside it, `.NAME.XXXXXX.cdp-restore-partial`; the old file is whole | the new image under its name, in one rename | the temporary file is removed, also after SIGINT, SIGTERM and SIGHUP (after a `kill -9` or a power cut it stays, and may be deleted); the name still means what it meant before |
//! | block device | overwritten in place | the disk's bytes; what lies behind them is as before | partly overwritten: restore again before using it |
//!
//! A file of 0 bytes counts as empty, and a device of which every byte is zero. Anything else is overwritten only with
//! `--force`. What somebody else uses (`in_use`) is refused with `--force` as well, and nobody can begin to use it while
//! it is written: a VM would go on writing to the replaced, nameless file, or see its disk change under it.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use nix::libc;
use tempfile::NamedTempFile;

use crate::error::RestoreError;
use crate::in_use;
use crate::limits::BLOCK_BYTES;
use crate::output::{Device, Output, Qcow2File, RawFile};

/// Format of the restored image.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The disk's bytes as they are; zeroes take no space in a file.
    Raw,
    /// QEMU's qcow2, version 3, without a backing file.
    Qcow2,
}

/// Suffix of the temporary file beside a file target.
const PARTIAL_SUFFIX: &str = ".cdp-restore-partial";

/// So many bytes of the target's name are in the temporary one's, which has to fit into the 255 of a name.
const PARTIAL_NAME_BYTES: usize = 200;

/// A target that has passed all checks. Dropping it without [`Target::commit`] removes what is temporary.
#[derive(Debug)]
pub struct Target {
    path: PathBuf,
    kind: TargetKind,
}

#[derive(Debug)]
enum TargetKind {
    /// `replaces` is the file that has the name now, claimed.
    File {
        temporary: NamedTempFile,
        replaces: Option<File>,
    },
    Device {
        file: File,
        device_bytes: u64,
    },
}

impl Target {
    /// Checks that `path` may be written to, and opens it (a device) or a temporary file beside it (a file). Nothing of the
    /// target changes yet.
    ///
    /// # Errors
    /// `Refused` for something that is neither file nor block device, is not empty (without `force`), is in use, belongs to
    /// a store, is too small for `disk_bytes`, or cannot be opened or made.
    pub fn prepare(path: &Path, format: Format, disk_bytes: u64, force: bool) -> Result<Self, RestoreError> {
        if is_in_a_journal(path) {
            let detail = "it lies in the folder of a disk's journal";
            return Err(refused(path, detail, "choose an --output outside of the store"));
        }
        match fs::metadata(path) {
            Ok(meta) if meta.is_file() => {
                if meta.len() > 0 && !force {
                    return Err(not_empty(path, &format!("it is a file of {} bytes", meta.len())));
                }
                Self::file(path, Some(&meta))
            }
            Ok(meta) if meta.file_type().is_block_device() => Self::device(path, format, disk_bytes, force),
            Ok(meta) if meta.is_dir() => {
                let example = path.join("disk.raw");
                let hint = format!("give a file's name in it, such as {}", example.display());
                Err(refused(path, "it is a folder", &hint))
            }
            Ok(_) => Err(refused(
                path,
                "it is neither a file nor a block device, and cannot be read back and compared",
                "restore to a file, and send that on when it is complete",
            )),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Self::new_file(path),
            Err(error) => Err(unusable(path, "it cannot be looked at")(error)),
        }
    }

    fn new_file(path: &Path) -> Result<Self, RestoreError> {
        if let Ok(elsewhere) = fs::read_link(path) {
            let detail = format!("it is a symbolic link to {}, which is not there", elsewhere.display());
            return Err(refused(path, &detail, "remove the link, or give the file's own name as --output"));
        }
        if path.as_os_str().as_bytes().ends_with(b"/") {
            let hint = "give a file's name, without the / at its end";
            return Err(refused(path, "it ends with /, and there is no such folder", hint));
        }
        Self::file(path, None)
    }

    fn file(path: &Path, old: Option<&fs::Metadata>) -> Result<Self, RestoreError> {
        // Through a symbolic link, the file that it points to is replaced, not the link.
        let path = match old {
            Some(_) => fs::canonicalize(path).map_err(unusable(path, "it cannot be resolved"))?,
            None => path.to_owned(),
        };
        let replaces = old.map(|_| claimed(&path)).transpose()?;
        let name = path
            .file_name()
            .ok_or_else(|| refused(&path, "it has no file name", "choose another --output"))?;
        let name = name.as_bytes();
        let mut prefix = std::ffi::OsString::from(".");
        prefix.push(OsStr::from_bytes(&name[..name.len().min(PARTIAL_NAME_BYTES)]));
        prefix.push(".");
        let mut builder = tempfile::Builder::new();
        builder.prefix(&prefix).suffix(PARTIAL_SUFFIX);
        // Readable by nobody else: it is all that a guest keeps. A file that is replaced keeps its owner and mode.
        builder.permissions(Permissions::from_mode(0o600));
        let temporary = builder
            .tempfile_in(directory_of(&path))
            .map_err(unusable(&path, "no file can be made beside it"))?;
        if let Some(old) = old {
            let keep = |file: &File| {
                fchown(file, Some(old.uid()), Some(old.gid()))?;
                file.set_permissions(Permissions::from_mode(old.mode() & 0o7777))
            };
            keep(temporary.as_file()).map_err(unusable(&path, "its owner and mode cannot be kept"))?;
        }
        Ok(Self { path, kind: TargetKind::File { temporary, replaces } })
    }

    fn device(path: &Path, format: Format, disk_bytes: u64, force: bool) -> Result<Self, RestoreError> {
        if format != Format::Raw {
            return Err(refused(
                path,
                "a block device takes only --format raw",
                "leave --format out, or restore to a file",
            ));
        }
        // O_EXCL on a block device: fails while it is mounted or otherwise in use.
        let file = OpenOptions::new().read(true).write(true).custom_flags(OFlag::O_EXCL.bits()).open(path);
        let mut file = file.map_err(|error| match error.kind() {
            io::ErrorKind::ResourceBusy => {
                refused(path, "it is mounted or in use", "unmount it, or choose another device")
            }
            _ => unusable(path, "it cannot be opened")(error),
        })?;
        claim(path, &file)?;
        let device_bytes = file.seek(SeekFrom::End(0)).map_err(failed(path, "measuring"))?;
        if device_bytes < disk_bytes {
            let detail = format!("the device has {device_bytes} bytes, the disk {disk_bytes}");
            return Err(refused(path, &detail, "choose a device that is at least as large"));
        }
        if !force && let Some(at) = first_non_zero(&mut file).map_err(failed(path, "reading"))? {
            return Err(not_empty(path, &format!("the device holds data at byte {at}")));
        }
        Ok(Self { path: path.to_owned(), kind: TargetKind::Device { file, device_bytes } })
    }

    /// The image to be written there.
    ///
    /// # Errors
    /// `Output` when the file cannot be set up.
    pub(crate) fn output(&self, format: Format, disk_bytes: u64) -> Result<Box<dyn Output>, RestoreError> {
        let open = || -> io::Result<Box<dyn Output>> {
            Ok(match &self.kind {
                TargetKind::Device { file, .. } => Box::new(Device::new(file.try_clone()?)),
                TargetKind::File { temporary, .. } => {
                    let file = temporary.as_file().try_clone()?;
                    match format {
                        Format::Raw => Box::new(RawFile::create(file, disk_bytes)?),
                        Format::Qcow2 => Box::new(Qcow2File::create(file, disk_bytes)?),
                    }
                }
            })
        };
        open().map_err(failed(&self.path, "setting up"))
    }

    /// Gives the finished image its name, durably. For a device there is nothing left to do.
    ///
    /// # Errors
    /// `Refused` when a file has appeared under a name that was free; `Output` when the rename fails.
    pub fn commit(self) -> Result<(), RestoreError> {
        let TargetKind::File { temporary, replaces } = self.kind else {
            return Ok(());
        };
        let path = &self.path;
        let named = match &replaces {
            Some(_) => temporary.persist(path),
            None => temporary.persist_noclobber(path),
        };
        named.map_err(|e| match e.error.kind() {
            io::ErrorKind::AlreadyExists => not_empty(path, "something has appeared there meanwhile"),
            _ => failed(path, "renaming the finished image to")(e.error),
        })?;
        let directory = File::open(directory_of(path)).and_then(|directory| directory.sync_all());
        directory.map_err(failed(path, "making durable the name of"))
    }

    /// The target's path, with symbolic links resolved where a file is replaced.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The temporary file that becomes the target in the end, unless that is a device.
    #[must_use]
    pub fn temporary(&self) -> Option<PathBuf> {
        match &self.kind {
            TargetKind::File { temporary, .. } => Some(temporary.path().to_owned()),
            TargetKind::Device { .. } => None,
        }
    }

    /// What a failure after this point leaves, as a sentence.
    #[must_use]
    pub fn after_failure(&self) -> String {
        let path = self.path.display();
        match &self.kind {
            TargetKind::Device { .. } => {
                format!("{path} may be partly overwritten: restore again before using it")
            }
            TargetKind::File { replaces: Some(_), .. } => format!("{path} is as it was before"),
            TargetKind::File { replaces: None, .. } => format!("nothing was left at {path}"),
        }
    }

    /// What else the user should know, as a sentence.
    #[must_use]
    pub fn remark(&self, disk_bytes: u64) -> Option<String> {
        match &self.kind {
            TargetKind::Device { device_bytes, .. } if *device_bytes > disk_bytes => Some(format!(
                "the device is larger than the disk; its last {} bytes stay as they are",
                device_bytes - disk_bytes
            )),
            _ => None,
        }
    }
}

/// Opens the file that is to be replaced, and takes it for this process alone.
fn claimed(path: &Path) -> Result<File, RestoreError> {
    let file = OpenOptions::new().read(true).write(true).open(path);
    let file = file.map_err(unusable(path, "it cannot be opened"))?;
    claim(path, &file)?;
    Ok(file)
}

fn claim(path: &Path, file: &File) -> Result<(), RestoreError> {
    in_use::claim(file).map_err(failed(path, "locking"))?.map_err(|by| {
        refused(
            path,
            &by,
            "stop it first (shut the VM down), or choose another --output; --force does not help here",
        )
    })
}

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Position of the first byte that is not zero. A device in use differs from zero early, so this reads it all only when
/// it is blank.
fn first_non_zero(file: &mut File) -> io::Result<Option<u64>> {
    file.seek(SeekFrom::Start(0))?;
    let mut block = vec![0; BLOCK_BYTES as usize];
    let mut at = 0;
    loop {
        let got = file.read(&mut block)?;
        if got == 0 {
            return Ok(None);
        }
        if let Some(position) = block[..got].iter().position(|byte| *byte != 0) {
            return Ok(Some(at + position as u64));
        }
        at += got as u64;
    }
}

/// Whether a path is in a folder with segments of a journal: there nothing but the server writes, `--force` or not.
fn is_in_a_journal(path: &Path) -> bool {
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let Ok(entries) = fs::read_dir(directory_of(&path)) else { return false };
    let mut names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.any(|name| name.starts_with("meta-") && name.ends_with(".seg"))
}

fn refused(path: &Path, detail: &str, hint: &str) -> RestoreError {
    RestoreError::Refused { path: path.to_owned(), detail: detail.to_owned(), hint: hint.to_owned() }
}

/// A target that the system does not let this process write to: what to do depends on why.
fn unusable<'a>(path: &'a Path, what: &'a str) -> impl FnOnce(io::Error) -> RestoreError + 'a {
    use io::ErrorKind as E;
    move |error| {
        let folder = directory_of(path).display();
        let (why, hint) = match error.kind() {
            E::NotFound => (
                format!("its folder {folder} is not there"),
                format!("make the folder (mkdir -p {folder}), or choose another --output"),
            ),
            E::NotADirectory => (
                format!("a part of {folder} is a file, not a folder"),
                "check the path, or choose another --output".to_owned(),
            ),
            E::PermissionDenied => (
                format!("{what}: {error}"),
                "run cdp-restore as a user that may write there (root), or choose another --output"
                    .to_owned(),
            ),
            E::ReadOnlyFilesystem => (
                "its filesystem is mounted read-only".to_owned(),
                "choose an --output on another filesystem, or mount this one for writing".to_owned(),
            ),
            E::StorageFull | E::QuotaExceeded => (
                format!("{what}: {error}"),
                "free some space, or choose an --output with more of it".to_owned(),
            ),
            E::InvalidFilename => (
                "its name is too long for the filesystem".to_owned(),
                "choose a shorter --output: a name has at most 255 bytes, a path 4095".to_owned(),
            ),
            _ if error.raw_os_error() == Some(libc::ELOOP) => (
                "its symbolic links go round in a circle".to_owned(),
                "look at the links with namei, or choose another --output".to_owned(),
            ),
            _ => (format!("{what}: {error}"), "choose another --output".to_owned()),
        };
        refused(path, &why, &hint)
    }
}

fn not_empty(path: &Path, detail: &str) -> RestoreError {
    refused(path, detail, "choose another --output, or give --force to overwrite it")
}

fn failed(path: &Path, operation: &'static str) -> impl FnOnce(io::Error) -> RestoreError {
    let path = path.to_owned();
    move |source| RestoreError::Output { path, operation, offset: None, source }
}
