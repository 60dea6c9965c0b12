//! The control thread: takes the agent's commands and carries them out through the [`Host`].
//!
//! One thread, `cdp-control`, which may block. It connects to the agent's socket (again and again, with growing
//! pauses, while there is none), says who this process is and which disks it has, and then does what the agent
//! asks: attach, detach, resync, list. Changes of the list of disks and faults are noticed by asking once a second.
//!
//! Beside it each capture has a thread `cdp-wait`, which sleeps unless guest requests wait for the agent.
//!
//! When the agent is lost, captures stay on: the ring fills, then writes are tracked. The descriptors of each capture are
//! kept, and offered to the agent that comes next; it goes on with them. One that attaches a device that is still
//! captured gets it: the old capture is ended first, and the new epoch begins with a gap.

mod session;
mod text;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

pub use capture_ring::control::DiskInfo;
use capture_ring::control::{Connection, DEFAULT_SOCKET, SOCKET_ENV};

use journal_format::ImageTag;

use crate::engine::{Capture, WakeFn};
use session::{Captures, Session};

/// First pause between attempts to reach the agent; doubled up to the longest one.
const FIRST_RETRY_PAUSE: Duration = Duration::from_millis(100);
/// An agent that comes back is found within this time.
const LONGEST_RETRY_PAUSE: Duration = Duration::from_secs(2);
/// Stack of the control thread, in bytes.
const STACK_BYTES: usize = 512 << 10;

/// Who this process is, told to the agent on every connect.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Identity {
    /// Name of the program, such as `qemu-system-x86_64`.
    pub program: String,
    /// Version text of the running QEMU.
    pub qemu_version: String,
    /// Name of the VM.
    pub vm_name: String,
    /// UUID of the VM; all zero when it has none.
    pub vm_uuid: [u8; 16],
    /// Why nothing here can be protected; empty when it can.
    pub refused: String,
}

/// What the control thread needs from the process it lives in. Every function is called from the control
/// thread only and may block for a bounded time (a few seconds); errors are sentences for the operator.
pub trait Host: Send + Sync {
    /// Who we are.
    fn identity(&self) -> Identity;
    /// All disks now.
    ///
    /// # Errors
    /// When the main thread did not answer in time; the last list stays valid.
    fn disks(&self) -> Result<Vec<DiskInfo>, String>;
    /// Wakes parked requests of captures that this host runs.
    fn wake_fn(&self) -> WakeFn;
    /// From now on every request of the device goes through the capture, and its resync runs. `image`: how the journal's last
    /// epoch left the disk; one that is still so need not be read ([`Capture::unchanged`]).
    ///
    /// # Errors
    /// No such device, not protectable, no answer in time: then nothing is captured and nothing stays behind.
    fn attach(&self, device: &str, capture: Arc<Capture>, image: Option<ImageTag>) -> Result<(), String>;
    /// Whether the process itself waits for the device's requests, so that none of them may wait for the agent. Asked
    /// while one waits, by a thread of the capture's own; may block for a second or so.
    fn must_go(&self, device: &str) -> bool;
    /// Undoes `attach`: drained, `Capture::detach` called, QEMU's pointers back when it was the last one.
    /// Also works for a device that has gone away meanwhile.
    ///
    /// # Errors
    /// No answer in time: the capture is still there; it may be tried again.
    fn detach(&self, device: &str) -> Result<(), String>;
}

/// Starts the control thread: call it once, after any fork of the process (daemonize), from any thread.
/// `socket` is where the agent listens. The thread takes no signals.
///
/// # Errors
/// When the thread cannot be created.
pub fn start(host: Arc<dyn Host>, socket: PathBuf) -> std::io::Result<()> {
    start_until(host, socket, Arc::new(AtomicBool::new(false))).map(drop)
}

/// As [`start`]; the thread ends within a few seconds after `stop` was set.
///
/// # Errors
/// When the thread cannot be created.
pub fn start_until(
    host: Arc<dyn Host>,
    socket: PathBuf,
    stop: Arc<AtomicBool>,
) -> std::io::Result<JoinHandle<()>> {
    let thread = std::thread::Builder::new().name("cdp-control".to_owned()).stack_size(STACK_BYTES);
    crate::ffi::signals::blocked(|| thread.spawn(move || run(&host, &socket, &stop)))
}

/// The agent's socket: `CDP_AGENT_SOCKET`, else `/run/qemu-cdp/agent.sock`.
#[must_use]
pub fn socket_path() -> PathBuf {
    std::env::var_os(SOCKET_ENV).map_or_else(|| PathBuf::from(DEFAULT_SOCKET), PathBuf::from)
}

fn run(host: &Arc<dyn Host>, socket: &Path, stop: &AtomicBool) {
    let mut captures = Captures::default();
    let mut pause = FIRST_RETRY_PAUSE;
    // ORDERING: Relaxed: a request to end, nothing is handed over with it.
    while !stop.load(Ordering::Relaxed) {
        if let Ok(connection) = Connection::connect(socket) {
            // A bug here must end neither the process nor the thread (I1): it costs this connection.
            captures.set_agent(true);
            let talk = || Session::new(host, &connection, &mut captures).run(stop);
            if let Ok(served) = catch_unwind(AssertUnwindSafe(talk))
                && served
            {
                pause = FIRST_RETRY_PAUSE;
            }
            captures.set_agent(false);
        }
        if !stop.load(Ordering::Relaxed) {
            std::thread::sleep(pause);
        }
        pause = (pause * 2).min(LONGEST_RETRY_PAUSE);
    }
}

#[cfg(test)]
mod tests;
