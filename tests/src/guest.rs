//! A real Linux guest (`scripts/guest-image`) on `qemu-system-x86_64` with the filter loaded, commanded over its serial port.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::process::Process;
use crate::programs::{program, workspace};
use crate::site::Site;
use crate::wait_for;

/// A line that the guest printed, and when it arrived, in nanoseconds since 1970 on the host's clock.
type Heard = Arc<Mutex<Vec<(u64, String)>>>;

/// A running guest. Dropping it kills it.
#[derive(Debug)]
pub struct Guest {
    /// The process.
    pub process: Process,
    serial: UnixStream,
    heard: Heard,
}

impl Guest {
    /// Boots a guest whose disks are these raw images: `vda`, `vdb` and so on, each on an iothread of its own.
    ///
    /// # Panics
    /// When it does not come up.
    #[must_use]
    pub fn boot(site: &Site, name: &str, images: &[PathBuf]) -> Self {
        let file = |image: &PathBuf| format!("driver=file,filename={}", image.display());
        Self::boot_nodes(site, name, &images.iter().map(file).collect::<Vec<_>>())
    }

    /// The same with disks that are these nodes: QEMU's options of each, but for its name.
    ///
    /// # Panics
    /// When it does not come up.
    #[must_use]
    pub fn boot_nodes(site: &Site, name: &str, nodes: &[String]) -> Self {
        let (guest, socket) = (guest_image(), site.directory().join(format!("{name}.serial")));
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-accel", "tcg", "-m", "256", "-nodefaults", "-display", "none", "-no-reboot"]);
        command.args(["-name", name, "-kernel"]).arg(guest.join("vmlinuz"));
        command.arg("-initrd").arg(guest.join("initramfs"));
        command.args(["-append", "console=ttyS0 quiet panic=-1", "-serial", "chardev:serial"]);
        // QEMU waits for the connection, so that no line is lost.
        command.args(["-chardev", &format!("socket,id=serial,path={},server=on,wait=on", socket.display())]);
        for (letter, node) in ('a'..).zip(nodes) {
            let blockdev = format!("node-name=node-{letter},{node}");
            let device = format!("virtio-blk-pci,id=vd{letter},drive=node-{letter},iothread=io-{letter}");
            command.args(["-object", &format!("iothread,id=io-{letter}"), "-blockdev", &blockdev]);
            command.args(["-device", &device]);
        }
        command.env("LD_PRELOAD", program("libcdp_filter.so")).env("CDP_AGENT_SOCKET", site.agent_socket());
        let process = Process::start(site.directory(), name, &mut command);
        let serial = wait_for("the guest's serial port", || UnixStream::connect(&socket).ok());
        let heard = Heard::default();
        let (reader, lines) = (serial.try_clone().expect("the serial port"), Arc::clone(&heard));
        std::thread::spawn(move || listen(reader, &lines));
        let guest = Self { process, serial, heard };
        guest.hear("GUEST-READY");
        guest
    }

    /// Has the guest's shell run a line; returns the time just before it was said.
    ///
    /// # Panics
    /// When the serial port is closed.
    pub fn say(&mut self, line: &str) -> u64 {
        let now = now_ns();
        writeln!(self.serial, "{line}").expect("the guest listens");
        now
    }

    /// Waits until the guest has printed this very line; returns the time of its arrival.
    ///
    /// # Panics
    /// When it does not.
    #[must_use = "the time at which it was heard"]
    pub fn heard(&self, line: &str) -> u64 {
        wait_for(&format!("the guest to print {line:?}"), || {
            let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
            heard.iter().rev().find(|(_, said)| said == line).map(|(when, _)| *when)
        })
    }

    /// As [`Guest::heard`], whenever it was.
    ///
    /// # Panics
    /// When it does not.
    pub fn hear(&self, line: &str) {
        let _ = self.heard(line);
    }
}

impl Drop for Guest {
    /// A test that fails shows what its guest has said last.
    fn drop(&mut self) {
        if std::thread::panicking() {
            let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
            eprintln!("---- guest (last lines that it printed)");
            for (_, line) in heard.iter().skip(heard.len().saturating_sub(20)) {
                eprintln!("{line}");
            }
        }
    }
}

fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

fn listen(serial: UnixStream, heard: &Heard) {
    let mut serial = BufReader::new(serial);
    let mut line = Vec::new();
    while serial.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
        let text = String::from_utf8_lossy(&line).trim_end().to_owned();
        heard.lock().unwrap_or_else(PoisonError::into_inner).push((now_ns(), text));
        line.clear();
    }
}

/// The folder with the guest's kernel and initramfs, made if it is not there.
fn guest_image() -> &'static Path {
    static GUEST: OnceLock<PathBuf> = OnceLock::new();
    GUEST.get_or_init(|| {
        let folder = workspace().join("target/guest");
        let status = Command::new(workspace().join("scripts/guest-image")).arg(&folder).status();
        assert!(status.expect("scripts/guest-image runs").success(), "no guest image could be made");
        folder
    })
}
