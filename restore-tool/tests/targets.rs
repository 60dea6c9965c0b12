//! What `cdp-restore` may write to: images and devices that others use, and real block devices.
//!
//! The devices are loop devices that these tests make and detach. On a machine without them (no `/dev/loop-control`, no
//! root and no password-less sudo) the tests fail and say so.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use common::{DISK, DISK_BYTES, Journal, example, stderr};
use nix::libc::O_EXCL;

/// Only bounds a hanging test.
const PATIENCE: Duration = Duration::from_secs(60);

/// A program that is stopped with the test.
struct Running(Child);

impl Running {
    /// Starts `command` and waits until it has `path` open.
    fn with(command: &mut Command, path: &Path) -> Self {
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("starts");
        let mut running = Self(child);
        let begin = Instant::now();
        let descriptors = format!("/proc/{}/fd", running.0.id());
        let is_it = |fd: fs::DirEntry| fs::read_link(fd.path()).is_ok_and(|open| open == path);
        while !fs::read_dir(&descriptors).into_iter().flatten().flatten().any(is_it) {
            assert!(running.0.try_wait().expect("wait").is_none(), "{command:?} has ended");
            assert!(begin.elapsed() < PATIENCE, "{command:?} does not open {}", path.display());
            std::thread::sleep(Duration::from_millis(10));
        }
        running
    }

    /// A virtual machine `web1` whose disk is `path`. It is stopped when its monitor is there, so its locks are taken.
    fn machine(path: &Path, directory: &Path) -> Self {
        let monitor = directory.join("monitor");
        let mut command = Command::new("qemu-system-x86_64");
        command.args([
            "-accel",
            "tcg",
            "-machine",
            "q35",
            "-m",
            "64",
            "-nodefaults",
            "-display",
            "none",
            "-S",
        ]);
        command.args(["-name", "guest=web1,debug-threads=on", "-drive"]);
        command.arg(format!("file={},format=raw,if=virtio", path.display()));
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", monitor.display()));
        let mut running = Self::with(&mut command, path);
        let begin = Instant::now();
        let mut greeting = [0; 1];
        // The greeting comes from the main loop, which runs when all devices are there.
        while !std::os::unix::net::UnixStream::connect(&monitor)
            .is_ok_and(|mut socket| std::io::Read::read(&mut socket, &mut greeting).is_ok_and(|got| got > 0))
        {
            assert!(running.0.try_wait().expect("wait").is_none(), "QEMU has ended");
            assert!(begin.elapsed() < PATIENCE, "QEMU does not come up");
            std::thread::sleep(Duration::from_millis(10));
        }
        running
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Asserts that a restore with `--force` is refused because of `user`.
fn assert_in_use(output: &Output, user: &Running, name: &str) {
    let said = stderr(output);
    assert_eq!(output.status.code(), Some(4), "{said}");
    for part in [name, &format!("process {}", user.0.id()), "choose another --output"] {
        assert!(said.contains(part), "{part} is missing in: {said}");
    }
}

#[test]
fn an_image_that_a_virtual_machine_has_open_is_not_replaced() {
    let journal = example();
    let target = journal.path("disk.raw");
    fs::write(&target, vec![9; 1 << 20]).expect("image");
    let inode = fs::metadata(&target).expect("image").ino();
    let machine = Running::machine(&target, journal.directory.path());
    for format in ["raw", "qcow2"] {
        let output = journal.restore("latest", &target, &["--force", "--format", format]);
        assert_in_use(&output, &machine, "VM web1");
        assert_eq!(fs::metadata(&target).expect("image").ino(), inode, "it was replaced");
        assert!(fs::read(&target).expect("image").iter().all(|byte| *byte == 9), "it was changed");
    }
    drop(machine);
    let output = journal.restore("latest", &target, &["--force"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(fs::read(&target).expect("image") == journal.versions[6]);
}

#[test]
fn an_image_that_a_virtual_machine_only_reads_is_not_replaced() {
    let journal = example();
    let (base, overlay) = (journal.path("base.raw"), journal.path("overlay.qcow2"));
    fs::write(&base, vec![9; 1 << 20]).expect("image");
    let create = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b"];
    assert!(Command::new("qemu-img").args(create).arg(&base).arg(&overlay).status().expect("runs").success());
    let mut command = Command::new("qemu-io");
    command.args(["-f", "qcow2"]).arg(&overlay).stdin(Stdio::piped());
    command.args(["-c", "sleep 600000"]);
    let reader = Running::with(&mut command, &base);
    let output = journal.restore("latest", &base, &["--force"]);
    assert_in_use(&output, &reader, "qemu-io");
}

/// As root, or through sudo where this user may.
fn as_root(program: impl AsRef<std::ffi::OsStr>) -> Command {
    if nix::unistd::geteuid().is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("sudo");
    command.arg("-n").arg(program);
    command
}

/// A loop device over a file of its own. Dropping it detaches it, whatever happened.
struct LoopDevice {
    path: PathBuf,
    file: PathBuf,
}

impl LoopDevice {
    fn new(directory: &Path, bytes: u64, fill: u8) -> Self {
        assert!(
            Path::new("/dev/loop-control").exists(),
            "this test needs loop devices: load the module (modprobe loop), and let a container have /dev/loop-control and \
             /dev/loop*"
        );
        let file = directory.join("device");
        fs::write(&file, vec![fill; bytes as usize]).expect("file");
        // A losetup that looks for a free device opens the one that another has just taken, and is then a writer of it.
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let output = as_root("losetup").args(["--find", "--show"]).arg(&file).output().expect("losetup runs");
        let path = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        assert!(
            output.status.success() && path.starts_with("/dev/"),
            "this test needs root, or sudo without a password, for a loop device: {}",
            stderr(&output)
        );
        Self { path: path.into(), file }
    }

    /// Restores to the device, as root.
    fn restore(&self, journal: &Journal, at: &str, more: &[&str]) -> Output {
        journal.commit();
        let mut command = as_root(assert_cmd::cargo::cargo_bin("cdp-restore"));
        command.args(["--at", at, "--disk", &DISK.to_string()]).arg("--output").arg(&self.path);
        command.arg("--store").arg(journal.path("store")).args(more).output().expect("runs")
    }

    /// What is on the device: the restore has made it durable, so the file behind it has it.
    fn bytes(&self) -> Vec<u8> {
        fs::read(&self.file).expect("the file behind the device")
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let status = as_root("losetup").arg("--detach").arg(&self.path).status();
        if !status.as_ref().is_ok_and(std::process::ExitStatus::success) {
            eprintln!("{} stays attached: {status:?}", self.path.display());
        }
    }
}

#[test]
fn a_block_device_gets_the_disk_and_keeps_what_is_behind_it() {
    let journal = example();
    let tail = 1 << 20;
    let device = LoopDevice::new(journal.directory.path(), DISK_BYTES + tail, 0xAA);

    let output = device.restore(&journal, "lsn:3", &[]);
    assert_eq!(output.status.code(), Some(4), "{}", stderr(&output));
    assert!(stderr(&output).contains("--force"), "{}", stderr(&output));
    assert!(device.bytes().iter().all(|byte| *byte == 0xAA), "a refused device was changed");

    for lsn in [5, 3] {
        let output = device.restore(&journal, &format!("lsn:{lsn}"), &["--force"]);
        assert!(output.status.success(), "{}", stderr(&output));
        let bytes = device.bytes();
        let (disk, behind) = bytes.split_at(DISK_BYTES as usize);
        let differs = disk.iter().zip(&journal.versions[lsn]).position(|(a, b)| a != b);
        assert_eq!(differs, None, "lsn {lsn}: first differing byte");
        assert!(behind.iter().all(|byte| *byte == 0xAA), "what is behind the disk was changed");
    }
}

#[test]
fn a_blank_block_device_needs_no_force() {
    let journal = example();
    let device = LoopDevice::new(journal.directory.path(), DISK_BYTES, 0);
    let output = device.restore(&journal, "latest", &[]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(device.bytes() == journal.versions[6]);
}

#[test]
fn a_block_device_that_is_too_small_is_refused() {
    let journal = example();
    let device = LoopDevice::new(journal.directory.path(), DISK_BYTES - 4096, 0);
    let output = device.restore(&journal, "latest", &["--force"]);
    assert_eq!(output.status.code(), Some(4), "{}", stderr(&output));
    assert!(stderr(&output).contains("at least as large"), "{}", stderr(&output));
    assert!(device.bytes().iter().all(|byte| *byte == 0), "a refused device was changed");
}

#[test]
fn a_file_behind_a_loop_device_is_not_replaced() {
    let journal = example();
    let device = LoopDevice::new(journal.directory.path(), DISK_BYTES, 0xAA);
    let output = journal.restore("latest", &device.file, &["--force"]);
    assert_eq!(output.status.code(), Some(4), "{}", stderr(&output));
    let name = device.path.to_str().expect("UTF-8");
    assert!(stderr(&output).contains(&format!("losetup --detach {name}")), "{}", stderr(&output));
    assert!(device.bytes().iter().all(|byte| *byte == 0xAA), "a refused file was changed");
}

#[test]
fn a_block_device_in_use_is_refused() {
    let journal = example();
    let device = LoopDevice::new(journal.directory.path(), DISK_BYTES, 0);
    let assert_untouched =
        || assert!(device.bytes().iter().all(|byte| *byte == 0), "a refused device was changed");

    let machine = Running::machine(&device.path, journal.directory.path());
    assert_in_use(&device.restore(&journal, "latest", &["--force"]), &machine, "VM web1");
    drop(machine);
    assert_untouched();

    // A VM that locks another inode of the same device, as libvirt's do, is a writer without a lock here.
    let fifo = journal.path("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).expect("a fifo");
    let mut command = Command::new("sh");
    command.args(["-c", r#"exec 3<>"$1" 4<>"$2"; read -r line <&4"#, "sh"]).arg(&device.path).arg(&fifo);
    let writer = Running::with(&mut command, &device.path);
    assert_in_use(&device.restore(&journal, "latest", &["--force"]), &writer, "sh");
    drop(writer);
    assert_untouched();

    // As a mounted filesystem or the device mapper hold it.
    let held = File::options().read(true).write(true).custom_flags(O_EXCL).open(&device.path);
    let held = held.expect("the device opens (this part needs root)");
    let output = device.restore(&journal, "latest", &["--force"]);
    assert_eq!(output.status.code(), Some(4), "{}", stderr(&output));
    assert!(stderr(&output).contains("mounted or in use"), "{}", stderr(&output));
    held.write_all_at(&[0], 0).expect("it is still writable");
    drop(held);
    assert_untouched();
    assert!(device.restore(&journal, "latest", &[]).status.success(), "nobody uses it any more");
}
