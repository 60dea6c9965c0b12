//! One connection to the agent, from hello to the loss of it.

use std::collections::BTreeMap;
use std::os::fd::AsFd as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use capture_ring::RingError;
use capture_ring::control::{CaptureFds, Connection, DiskInfo, Fds, Message, text};

use journal_format::ImageTag;

use super::Host;
use super::text::{cut, hello, told};
use crate::engine::{Capture, Runtime};

/// How often disks and faults are looked at.
const LOOK_PERIOD: Duration = Duration::from_secs(1);
/// Stack of a capture's thread, in bytes.
const WAITER_STACK_BYTES: usize = 256 << 10;

/// The captures of this process, by device.
#[derive(Default)]
pub(super) struct Captures {
    by_device: BTreeMap<String, Attached>,
}

impl Captures {
    /// Tells each whether there is an agent.
    pub(super) fn set_agent(&self, is_there: bool) {
        let captures = self.by_device.values().filter_map(|attached| attached.capture.as_ref());
        captures.for_each(|(capture, _)| capture.set_agent(is_there));
    }
}

struct Attached {
    /// With the thread that wakes who waits for the agent, and ends by itself when capture is off. `None` when the capture
    /// has ended, and the agent has not said that all of it is in its place.
    capture: Option<(Arc<Capture>, JoinHandle<()>)>,
    fault_told: bool,
    /// For the next agent, if this one dies.
    held: CaptureFds,
}

pub(super) struct Session<'a> {
    host: &'a Arc<dyn Host>,
    connection: &'a Connection,
    captures: &'a mut Captures,
    disks: Option<Vec<DiskInfo>>,
    served: bool,
}

impl<'a> Session<'a> {
    pub(super) fn new(
        host: &'a Arc<dyn Host>,
        connection: &'a Connection,
        captures: &'a mut Captures,
    ) -> Self {
        for attached in captures.by_device.values_mut() {
            attached.fault_told = false;
        }
        Self { host, connection, captures, disks: None, served: false }
    }

    /// Serves until the connection is lost or `stop` is set. Returns whether the agent ever asked for something.
    pub(super) fn run(mut self, stop: &AtomicBool) -> bool {
        // Every error of the connection means the same: the agent is gone or is none. It will be tried again.
        let _lost = self.serve(stop);
        self.served
    }

    fn serve(&mut self, stop: &AtomicBool) -> Result<(), RingError> {
        self.connection.send(&Message::Hello(hello(&self.host.identity())))?;
        for (device, attached) in &self.captures.by_device {
            self.connection.send_held(device, attached.capture.is_none(), &attached.held)?;
        }
        self.look(true)?;
        let mut next_look = Instant::now() + LOOK_PERIOD;
        // ORDERING: as in `run`.
        while !stop.load(Ordering::Relaxed) {
            let wait = next_look.saturating_duration_since(Instant::now());
            if let Some(received) = self.connection.recv(Some(wait))? {
                self.served = true;
                self.obey(received.message, received.fds)?;
            }
            if Instant::now() >= next_look {
                self.look(false)?;
                next_look = Instant::now() + LOOK_PERIOD;
            }
        }
        Ok(())
    }

    fn obey(&mut self, message: Message, fds: Fds) -> Result<(), RingError> {
        let (request, outcome) = match message {
            Message::List => return self.look(true),
            Message::Attach { request, device, image } => (request, self.attach(&device, image, fds)),
            Message::Detach { request, device } => (request, self.detach(&device)),
            Message::Resync { request, device } => (request, self.resync(&device)),
            Message::Hold { request, device } => (request, self.hold(&device, fds)),
            Message::Forget { device } => {
                self.forget(&device);
                return Ok(());
            }
            // What only a filter says; a newer agent may say more, which `recv` refuses.
            Message::Hello(_)
            | Message::Disks { .. }
            | Message::Result { .. }
            | Message::Fault { .. }
            | Message::Held { .. } => return Ok(()),
        };
        let (ok, message) = match outcome {
            Ok(()) => (true, String::new()),
            Err(message) => (false, cut(&message, text::MESSAGE)),
        };
        self.connection.send(&Message::Result { request, ok, message })
    }

    fn attach(&mut self, device: &str, image: Option<ImageTag>, fds: Fds) -> Result<(), String> {
        let Fds::Capture(fds) = fds else {
            return Err("an attach without a ring; agent and filter must be of one release".to_owned());
        };
        // An agent that attaches what is captured has lost the old ring: its epoch ends here.
        self.detach(device)?;
        let bell = fds.bell.try_clone().map_err(|error| format!("cannot duplicate a descriptor: {error}"))?;
        let runtime = Runtime::real(self.host.wake_fn());
        let capture = Capture::attach(fds.ring.as_fd(), fds.clock.as_fd(), bell, runtime)
            .map_err(|error| error.to_string())?;
        let waiter = start_waiter(self.host, device, &capture)?;
        if let Err(error) = self.host.attach(device, Arc::clone(&capture), image) {
            capture.detach();
            join(waiter);
            return Err(error);
        }
        let attached = Attached { capture: Some((capture, waiter)), fault_told: false, held: fds };
        self.captures.by_device.insert(device.to_owned(), attached);
        Ok(())
    }

    /// A device that is not captured is detached already. Its descriptors stay until the agent needs them no more.
    fn detach(&mut self, device: &str) -> Result<(), String> {
        if let Some(attached) = self.captures.by_device.get_mut(device)
            && let Some((capture, _)) = &attached.capture
        {
            capture.release_waiters();
            self.host.detach(device)?;
            end(attached);
        }
        Ok(())
    }

    fn hold(&mut self, device: &str, fds: Fds) -> Result<(), String> {
        let Fds::Outbox(outbox) = fds else { return Err("a hold without an outbox".to_owned()) };
        let attached = self.captures.by_device.get_mut(device);
        attached.ok_or("nothing of this device is held; attach it")?.held.outbox = outbox;
        Ok(())
    }

    fn forget(&mut self, device: &str) {
        self.captures.by_device.retain(|name, attached| name != device || attached.capture.is_some());
    }

    fn resync(&self, device: &str) -> Result<(), String> {
        let attached = self.captures.by_device.get(device).and_then(|attached| attached.capture.as_ref());
        let (capture, _) = attached.ok_or("the device is not captured; attach it")?;
        if capture.resume() {
            Ok(())
        } else {
            Err(match capture.fault_message() {
                Some(fault) => format!("a fault has ended capture; attach again: {fault}"),
                None => "the ring has no room yet; ask again when records were taken out".to_owned(),
            })
        }
    }

    /// Tells the agent the list of disks, if it has changed or `always`, and faults not told yet.
    fn look(&mut self, always: bool) -> Result<(), RingError> {
        if let Ok(disks) = self.host.disks() {
            self.drop_gone(&disks);
            let disks = told(&disks);
            if always || self.disks.as_ref() != Some(&disks) {
                self.connection.send_disks(&disks)?;
                self.disks = Some(disks);
            }
        }
        self.tell_faults()
    }

    /// Ends the captures of devices that have been unplugged. What cannot be ended now is tried at the next look.
    fn drop_gone(&mut self, disks: &[DiskInfo]) {
        let host = self.host;
        for (device, attached) in &mut self.captures.by_device {
            let listed = disks.iter().any(|disk| disk.device == *device);
            if !listed && attached.capture.is_some() && host.detach(device).is_ok() {
                end(attached);
            }
        }
    }

    fn tell_faults(&mut self) -> Result<(), RingError> {
        for (device, attached) in &mut self.captures.by_device {
            if let Some(fault) = attached.capture.as_ref().and_then(|(capture, _)| capture.fault_message())
                && !attached.fault_told
            {
                let message = cut(fault, text::MESSAGE);
                self.connection.send(&Message::Fault { device: device.clone(), message })?;
                attached.fault_told = true;
            }
        }
        Ok(())
    }
}

/// The thread of a capture that wakes who waits for the agent.
fn start_waiter(
    host: &Arc<dyn Host>,
    device: &str,
    capture: &Arc<Capture>,
) -> Result<JoinHandle<()>, String> {
    let (host, device, capture) = (Arc::clone(host), device.to_owned(), Arc::clone(capture));
    let serve = move || {
        let served = || capture.serve_waiters(|| host.must_go(&device));
        // A bug there must not leave a guest's request waiting (I1).
        if catch_unwind(AssertUnwindSafe(served)).is_err() {
            capture.fault("a fault of the filter's own while requests waited for the agent");
        }
    };
    let thread = std::thread::Builder::new().name("cdp-wait".to_owned()).stack_size(WAITER_STACK_BYTES);
    crate::ffi::signals::blocked(|| thread.spawn(serve))
        .map_err(|error| format!("cannot start the capture's thread: {error}"))
}

/// After the host has ended the capture.
fn end(attached: &mut Attached) {
    if let Some((capture, waiter)) = attached.capture.take() {
        // A host whose device had gone has ended it already.
        capture.detach();
        join(waiter);
    }
}

fn join(waiter: JoinHandle<()>) {
    // Its panics were caught.
    let _ended = waiter.join();
}
