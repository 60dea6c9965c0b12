//! Whether anybody uses the target, and keeping others from using it while it is written.
//!
//! QEMU marks an image that it has open with locks on single bytes of it: `100 + n` says "I use it in way n", `200 + n`
//! "others must not use it in way n" (`block/file-posix.c`, `RAW_LOCK_PERM_BASE` and `RAW_LOCK_SHARED_BASE`; the ways are
//! the `BLK_PERM_*` bits). They are shared locks of the open file description, and whoever finds one in its way gives up.
//! One exclusive lock over all of these bytes therefore answers both questions at once: it is refused while any QEMU
//! program (or another `cdp-restore`) has the image open, and while it is held none can open it.
//!
//! A lock belongs to an inode. A block device can have several (libvirt makes each VM device nodes of its own), so for
//! devices every process that has it open for writing counts too, as far as `/proc` shows it.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

/// The bytes on which QEMU puts its locks, with room for ways of use that a later QEMU may add.
const FIRST_LOCK_BYTE: i64 = 100;
const LOCK_BYTES: i64 = 200;

/// Most users that are named; more help nobody.
const MAX_NAMED: usize = 4;

/// A process that uses the target.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct User {
    pid: u32,
    /// Name of the program.
    program: String,
    /// Name of the virtual machine, where the command line tells one.
    vm: Option<String>,
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (process {}", self.program, self.pid)?;
        match &self.vm {
            Some(vm) => write!(f, ", VM {vm})"),
            None => write!(f, ")"),
        }
    }
}

/// Takes the target for this process alone, until `file`, which is open for writing, and all its clones are closed.
///
/// # Errors
/// The outer one is the system's. The inner one says that others use it, and who, as a sentence.
pub(crate) fn claim(file: &File) -> io::Result<Result<(), String>> {
    let meta = file.metadata()?;
    let is_device = meta.file_type().is_block_device();
    if !lock(file)? {
        return Ok(Err(in_use_by(&users(&meta, |fd| fd.locks))));
    }
    let writers = if is_device { users(&meta, |fd| fd.writes) } else { Vec::new() };
    if !writers.is_empty() {
        return Ok(Err(in_use_by(&writers)));
    }
    Ok(loop_device_over(&meta).map_or(Ok(()), |device| {
        Err(format!("it is behind the loop device {device}, which losetup --detach {device} takes away"))
    }))
}

/// The loop device that a file is attached to: the kernel has it open, and no process.
fn loop_device_over(file: &fs::Metadata) -> Option<String> {
    let devices = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    devices.map(|entry| entry.path()).find_map(|device| {
        let behind = fs::read_to_string(device.join("loop/backing_file")).ok()?;
        let same = fs::metadata(behind.trim_end_matches('\n')).is_ok_and(|behind| is_same(&behind, file));
        same.then(|| format!("/dev/{}", device.file_name().unwrap_or_default().to_string_lossy()))
    })
}

/// Whether the lock was got. A filesystem that has no locks has none of QEMU's either.
fn lock(file: &File) -> io::Result<bool> {
    let range = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: FIRST_LOCK_BYTE,
        l_len: LOCK_BYTES,
        l_pid: 0,
    };
    match fcntl(file, FcntlArg::F_OFD_SETLK(&range)) {
        Ok(_) | Err(Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL) => Ok(true),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

fn in_use_by(users: &[User]) -> String {
    if users.is_empty() {
        return "it is locked by a process that cannot be seen from here (see /proc/locks as root, and other hosts that \
                share this storage)"
            .to_owned();
    }
    let named: Vec<_> = users.iter().take(MAX_NAMED).map(User::to_string).collect();
    let more = if users.len() > MAX_NAMED { " and others" } else { "" };
    format!("it is in use by {}{more}", named.join(", "))
}

/// What `/proc` says of an open file.
struct Descriptor {
    locks: bool,
    writes: bool,
}

/// The other processes that have the target open in the way that `counts` asks for. Those that this user may not look into
/// are missing.
fn users(target: &fs::Metadata, counts: fn(&Descriptor) -> bool) -> Vec<User> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let others = pids.filter(|pid| *pid != std::process::id());
    others.filter(|pid| uses(*pid, target, counts)).map(user).collect()
}

fn uses(pid: u32, target: &fs::Metadata, counts: fn(&Descriptor) -> bool) -> bool {
    let process = Path::new("/proc").join(pid.to_string());
    let descriptors = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
    descriptors.filter(|fd| fs::metadata(fd.path()).is_ok_and(|meta| is_same(&meta, target))).any(|fd| {
        let info = fs::read_to_string(process.join("fdinfo").join(fd.file_name()));
        info.is_ok_and(|info| counts(&descriptor(&info)))
    })
}

fn is_same(one: &fs::Metadata, other: &fs::Metadata) -> bool {
    match (one.file_type().is_block_device(), other.file_type().is_block_device()) {
        (true, true) => one.rdev() == other.rdev(),
        (false, false) => (one.dev(), one.ino()) == (other.dev(), other.ino()),
        _ => false,
    }
}

/// Reads `/proc/PID/fdinfo/FD` (proc(5)): a line `flags:` with the octal flags of open(2), and a line `lock:` for each lock.
fn descriptor(info: &str) -> Descriptor {
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|octal| i32::from_str_radix(octal.trim(), 8).ok()).unwrap_or_default();
    let writes = flags & libc::O_ACCMODE != libc::O_RDONLY;
    Descriptor { locks: info.lines().any(|line| line.starts_with("lock:")), writes }
}

fn user(pid: u32) -> User {
    let process = Path::new("/proc").join(pid.to_string());
    let program = fs::read_to_string(process.join("comm")).unwrap_or_default().trim().to_owned();
    let command = fs::read(process.join("cmdline")).unwrap_or_default();
    let words: Vec<_> = command.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
    User { pid, program, vm: vm_name(&words) }
}

/// The value of QEMU's `-name`: `web1` or `guest=web1,debug-threads=on`.
fn vm_name<S: AsRef<str>>(words: &[S]) -> Option<String> {
    let at = words.iter().position(|word| matches!(word.as_ref(), "-name" | "--name"))?;
    let first = words.get(at + 1)?.as_ref().split(',').next()?;
    let name = first.strip_prefix("guest=").unwrap_or(first);
    (!name.is_empty()).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_virtual_machine_is_known_by_its_name() {
        assert_eq!(vm_name(&["qemu", "-name", "web1", "-m", "64"]).as_deref(), Some("web1"));
        assert_eq!(vm_name(&["qemu", "-name", "guest=web1,debug-threads=on"]).as_deref(), Some("web1"));
        assert_eq!(vm_name(&["qemu", "-name"]), None);
        assert_eq!(vm_name(&["qemu-img", "info"]), None);
    }

    #[test]
    fn what_proc_says_of_a_descriptor_is_read() {
        let info =
            "pos:\t0\nflags:\t0100002\nmnt_id:\t30\nlock:\t1: OFDLCK  ADVISORY  READ -1 fe:00:7 100 101\n";
        let (with, without) = (descriptor(info), descriptor("pos:\t0\nflags:\t0100000\n"));
        assert!(with.locks && with.writes && !without.locks && !without.writes);
    }

    fn pause() -> bool {
        std::thread::sleep(std::time::Duration::from_millis(10));
        false
    }

    #[test]
    fn a_claim_keeps_others_out_until_it_is_closed() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let open = || File::options().read(true).write(true).open(file.path()).expect("opens");
        let first = open();
        assert_eq!(claim(&first).expect("locks"), Ok(()));
        let qemu_io = || Command::new("qemu-io").args(["-f", "raw", "-c", "flush"]).arg(file.path()).output();
        let output = qemu_io().expect("qemu-io runs");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains("lock"), "QEMU opens it: {said}");
        // The only process that holds it is this one, which is not named. (For a moment, one that another test starts is a copy
        // of this one, and holds what this one does.)
        let refused = || claim(&open()).expect("looks").expect_err("is claimed");
        assert!((0..1000).any(|_| refused().contains("locked") || pause()), "{}", refused());
        drop(first);
        assert!((0..1000).any(|_| qemu_io().expect("qemu-io runs").status.success() || pause()));
        assert!((0..1000).any(|_| claim(&open()).expect("locks").is_ok() || pause()));
    }
}
