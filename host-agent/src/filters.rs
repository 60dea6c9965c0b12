//! The control socket: filters connect here, say who they are, and are commanded.
//!
//! One thread accepts; one thread per filter reads. What a filter says is bounded by the socket's messages and by the
//! limits here, and goes to the hub's bounded queue; a filter that breaks a rule loses its connection. Commands are
//! sent by the hub, which never waits for a filter: one that does not read is closed.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use capture_ring::control::{
    CaptureFds, Connection, DiskInfo as WireDisk, Fds, Hello, Listener, Message, PROTOCOL_VERSION,
};
use capture_ring::{Ring, RingError, RingErrorKind};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{Shutdown, shutdown};

use crate::config::Config;
use crate::error::AgentError;
use crate::events::{Gone, Input, Sender};
use crate::limits::{HELLO_TIMEOUT, MAX_DISKS_PER_FILTER, MAX_FILTERS, MAX_HELD_PER_FILTER, MAX_SOCKET_PATH};
use crate::lock::{self, LockError};
use crate::seam::process::ProcessHandle;
use crate::session::{DiskInfo, Event, FilterId, Holding, VmInfo};
use journal_format::ImageTag;

/// A connected filter, as the hub sees it.
#[derive(Debug)]
pub struct FilterLink {
    connection: Connection,
    process: ProcessHandle,
    pid: u32,
}

impl FilterLink {
    /// Asks to attach a device.
    ///
    /// # Errors
    /// When the filter does not take it; close the connection.
    pub fn attach(
        &self,
        request: u64,
        device: &str,
        image: Option<ImageTag>,
        fds: &CaptureFds,
    ) -> Result<(), AgentError> {
        self.check_writable()?;
        self.connection.send_attach(request, device, image, fds).map_err(control_error)
    }

    /// Asks to hold a new outbox.
    ///
    /// # Errors
    /// As [`FilterLink::attach`].
    pub fn hold(&self, request: u64, device: &str, outbox: &OwnedFd) -> Result<(), AgentError> {
        self.check_writable()?;
        self.connection.send_hold(request, device, outbox.as_fd()).map_err(control_error)
    }

    /// Says that nothing of a device's ended capture is needed any more.
    ///
    /// # Errors
    /// As [`FilterLink::attach`].
    pub fn forget(&self, device: &str) -> Result<(), AgentError> {
        self.send(&Message::Forget { device: device.to_owned() })
    }

    /// Asks to detach a device.
    ///
    /// # Errors
    /// As [`FilterLink::attach`].
    pub fn detach(&self, request: u64, device: &str) -> Result<(), AgentError> {
        self.send(&Message::Detach { request, device: device.to_owned() })
    }

    /// Says that a device's ring has room again.
    ///
    /// # Errors
    /// As [`FilterLink::attach`].
    pub fn resync(&self, request: u64, device: &str) -> Result<(), AgentError> {
        self.send(&Message::Resync { request, device: device.to_owned() })
    }

    /// Ends the connection; its reader sees the end and reports it.
    pub fn close(&self) {
        let _ = shutdown(self.connection.as_fd().as_raw_fd(), Shutdown::Both);
    }

    /// Whether this is an ended connection of the process that `other` is of.
    #[must_use]
    pub fn has_ended_before(&self, other: &Self) -> bool {
        let mut fds = [PollFd::new(self.connection.as_fd(), PollFlags::empty())];
        let ended = PollFlags::POLLHUP | PollFlags::POLLERR;
        let polled = poll(&mut fds, PollTimeout::ZERO);
        let [fd] = fds;
        self.pid == other.pid && polled.is_ok() && fd.revents().is_some_and(|seen| seen.intersects(ended))
    }

    /// Whether its process is dead.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.process.is_dead()
    }

    fn send(&self, message: &Message) -> Result<(), AgentError> {
        self.check_writable()?;
        self.connection.send(message).map_err(control_error)
    }

    /// Sending to a filter whose socket is full would block the hub, and with it every other disk.
    fn check_writable(&self) -> Result<(), AgentError> {
        let mut fds = [PollFd::new(self.connection.as_fd(), PollFlags::POLLOUT)];
        match poll(&mut fds, PollTimeout::ZERO) {
            Ok(ready) if ready > 0 => Ok(()),
            _ => Err(AgentError::Filter("it does not read its messages".to_owned())),
        }
    }
}

fn control_error(error: RingError) -> AgentError {
    AgentError::Filter(error.to_string())
}

/// The listening socket and its thread.
#[derive(Debug)]
pub struct Filters {
    listener: Arc<Listener>,
    path: PathBuf,
    stopping: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    /// Held while this agent lives, however it ends.
    _lock: File,
}

impl Filters {
    /// Makes the folder and the socket and starts to accept.
    ///
    /// # Errors
    /// [`AgentError::Socket`] saying what to do.
    pub fn listen(config: &Config, events: Sender) -> Result<Self, AgentError> {
        let path = config.socket.clone();
        let fail = |detail: String| AgentError::Socket { path: path.clone(), detail };
        let bytes = path.as_os_str().len();
        if bytes > MAX_SOCKET_PATH {
            let why = format!(
                "a socket's path has at most {MAX_SOCKET_PATH} bytes, not {bytes}: give a shorter --socket"
            );
            return Err(fail(why));
        }
        make_folder(&path)
            .map_err(|error| fail(format!("cannot make its folder: {error}; {}", elsewhere(&error))))?;
        let lock = lock(&path).map_err(&fail)?;
        let listener = Listener::bind(&path).map_err(|error| fail(with_source(&error)))?;
        set_access(config).map_err(fail)?;
        let listener = Arc::new(listener);
        let stopping = Arc::new(AtomicBool::new(false));
        let acceptor = Acceptor {
            listener: Arc::clone(&listener),
            stopping: Arc::clone(&stopping),
            events,
            connected: Arc::new(AtomicUsize::new(0)),
            next: AtomicU64::new(1),
        };
        let thread = std::thread::Builder::new()
            .name("cdp-accept".into())
            .spawn(move || acceptor.run())
            .map_err(AgentError::os("cannot start a thread"))?;
        Ok(Self { listener, path, stopping, thread: Some(thread), _lock: lock })
    }
}

impl Drop for Filters {
    /// Stops accepting and removes the socket, so that filters wait for the next agent instead of being refused.
    fn drop(&mut self) {
        // ORDERING: Release pairs with the acceptor's Acquire, before the shutdown that makes it look.
        self.stopping.store(true, Ordering::Release);
        let _ = fs::remove_file(&self.path);
        let _ = shutdown(self.listener.as_fd().as_raw_fd(), Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Takes the lock beside the socket: two agents must not serve the same filters.
fn lock(socket: &Path) -> Result<File, String> {
    let mut path = socket.as_os_str().to_owned();
    path.push(".lock");
    let path = PathBuf::from(path);
    lock::take(&path).map_err(|error| match error {
        LockError::Held(pid) => format!(
            "another agent (process {pid}) serves it; stop that one first, or give this one another --socket"
        ),
        LockError::Os(error) => {
            format!("cannot make {}: {error}; {}", path.display(), elsewhere(&error))
        }
    })
}

/// What to do about a place where no socket can be.
fn elsewhere(error: &io::Error) -> &'static str {
    match daemon::advice(error) {
        "" => "give another --socket",
        advice => advice,
    }
}

fn make_folder(path: &Path) -> io::Result<()> {
    match path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        Some(folder) => fs::DirBuilder::new().recursive(true).mode(0o755).create(folder),
        None => Ok(()),
    }
}

fn set_access(config: &Config) -> Result<(), String> {
    if let Some(name) = &config.socket_group {
        let group = nix::unistd::Group::from_name(name)
            .map_err(|errno| format!("cannot look up group {name}: {errno}"))?;
        let group = group.ok_or_else(|| format!("there is no group {name}; see `getent group`"))?;
        nix::unistd::chown(&config.socket, None, Some(group.gid))
            .map_err(|errno| format!("cannot give it to group {name}: {errno}"))?;
    }
    fs::set_permissions(&config.socket, Permissions::from_mode(config.socket_mode))
        .map_err(|error| format!("cannot set its mode: {error}"))
}

fn with_source(error: &RingError) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

struct Acceptor {
    listener: Arc<Listener>,
    stopping: Arc<AtomicBool>,
    events: Sender,
    connected: Arc<AtomicUsize>,
    next: AtomicU64,
}

impl Acceptor {
    fn run(self) {
        loop {
            let accepted = self.listener.accept();
            // ORDERING: Acquire pairs with `Filters::drop`.
            if self.stopping.load(Ordering::Acquire) {
                return;
            }
            match accepted {
                Ok(connection) => self.take(connection),
                Err(error) => {
                    tracing::warn!(error = with_source(&error), "cannot accept a filter; trying again");
                    std::thread::sleep(Duration::from_secs(1));
                }
            }
        }
    }

    fn take(&self, connection: Connection) {
        // ORDERING: a limit, not a lock; nothing else depends on it.
        if self.connected.fetch_add(1, Ordering::Relaxed) >= MAX_FILTERS {
            tracing::warn!("{MAX_FILTERS} filters are connected; one more is turned away");
            self.connected.fetch_sub(1, Ordering::Relaxed);
            return;
        }
        // ORDERING: only uniqueness matters.
        let filter = FilterId(self.next.fetch_add(1, Ordering::Relaxed));
        let (events, connected) = (self.events.clone(), Arc::clone(&self.connected));
        let spawned = std::thread::Builder::new().name("cdp-filter".into()).spawn(move || {
            serve(filter, connection, &events);
            connected.fetch_sub(1, Ordering::Relaxed);
        });
        if let Err(error) = spawned {
            tracing::warn!(%error, "cannot start a thread for a filter");
            self.connected.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Greets a filter and reads what it says until its connection ends.
fn serve(filter: FilterId, connection: Connection, events: &Sender) {
    let (info, process) = match greet(&connection) {
        Ok(greeted) => greeted,
        Err(error) => {
            tracing::warn!(?filter, %error, "a filter's greeting is no good; its connection is closed");
            return;
        }
    };
    tracing::info!(
        ?filter,
        pid = info.pid,
        vm = info.display_name(),
        qemu = info.qemu_version,
        "filter connected"
    );
    let link = Arc::new(FilterLink { connection, process, pid: info.pid });
    if events.send(Input::Filter(filter, Arc::clone(&link), info)).is_err() {
        return;
    }
    let reason = match read(filter, &link.connection, events) {
        Ok(Gone) => return,
        Err(error) => error,
    };
    match reason.kind() {
        RingErrorKind::Closed => tracing::info!(?filter, "filter disconnected"),
        _ => tracing::warn!(?filter, error = with_source(&reason), "a filter broke the protocol; closing it"),
    }
    let _ = events.event(Event::FilterLost(filter));
}

fn greet(connection: &Connection) -> Result<(VmInfo, ProcessHandle), AgentError> {
    let refuse = |detail: &str| AgentError::Filter(detail.to_owned());
    let (pid, _uid) = connection.peer().map_err(control_error)?;
    let pid = u32::try_from(pid).ok().filter(|pid| *pid > 0);
    let pid = pid.ok_or_else(|| refuse("its process is in a namespace that this agent does not see"))?;
    // Opened before anything is believed: from here on the number stays with this process.
    let process = ProcessHandle::open(pid).map_err(AgentError::os("cannot open the filter's process"))?;
    let first = connection.recv(Some(HELLO_TIMEOUT)).map_err(control_error)?;
    let Some(Message::Hello(hello)) = first.map(|received| received.message) else {
        return Err(refuse("it did not say hello"));
    };
    if hello.protocol != PROTOCOL_VERSION {
        return Err(refuse(
            "it speaks another version of the protocol; install filter and agent of one release",
        ));
    }
    if hello.pid != pid {
        return Err(AgentError::Filter(format!(
            "it says it is process {}, the kernel says {pid}",
            hello.pid
        )));
    }
    Ok((vm_info(hello), process))
}

fn vm_info(hello: Hello) -> VmInfo {
    VmInfo {
        pid: hello.pid,
        program: hello.program,
        qemu_version: hello.qemu_version,
        name: hello.vm_name,
        uuid: hello.vm_uuid,
        refused: hello.refused,
    }
}

/// Reads until the connection ends (the error) or the hub does.
fn read(filter: FilterId, connection: &Connection, events: &Sender) -> Result<Gone, RingError> {
    let (mut listed, mut held) = (Vec::new(), 0_usize);
    loop {
        let Some(received) = connection.recv(None)? else { continue };
        let event = match received.message {
            Message::Held { device, ended } => {
                let Fds::Capture(fds) = received.fds else { continue };
                held = held.saturating_add(1);
                if held > MAX_HELD_PER_FILTER {
                    continue;
                }
                let of = Ring::open(fds.ring.as_fd()).map(|ring| (ring.config().disk, ring.config().epoch));
                let holding = Holding { device, ended, of: of.ok() };
                if events.send(Input::Held(filter, holding, fds)).is_err() {
                    return Ok(Gone);
                }
                continue;
            }
            Message::Disks { disks, more } => {
                listed.extend(disks.into_iter().map(disk_info));
                listed.truncate(MAX_DISKS_PER_FILTER);
                if more {
                    continue;
                }
                Event::FilterDisks(filter, core::mem::take(&mut listed))
            }
            Message::Result { request, ok, message } => {
                let unnamed = || "the filter could not do it and does not say why".to_owned();
                let error = if ok {
                    String::new()
                } else {
                    Some(message).filter(|m| !m.is_empty()).unwrap_or_else(unnamed)
                };
                Event::FilterResult(filter, request, error)
            }
            Message::Fault { device, message } => Event::FilterFault(filter, device, message),
            Message::Hello(_)
            | Message::List
            | Message::Attach { .. }
            | Message::Detach { .. }
            | Message::Resync { .. }
            | Message::Hold { .. }
            | Message::Forget { .. } => {
                tracing::warn!(
                    ?filter,
                    "a filter sent a message that only an agent may send, or a second hello"
                );
                let _ = shutdown(connection.as_fd().as_raw_fd(), Shutdown::Both);
                continue;
            }
        };
        if events.event(event).is_err() {
            return Ok(Gone);
        }
    }
}

fn disk_info(disk: WireDisk) -> DiskInfo {
    DiskInfo {
        device: disk.device,
        node: disk.node,
        driver: disk.driver,
        disk_bytes: disk.disk_bytes,
        read_only: disk.read_only,
        refused: disk.refused,
    }
}
