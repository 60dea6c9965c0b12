//! The control thread against an agent that this test plays.

use std::os::fd::AsFd as _;
use std::sync::Mutex;
use std::time::Instant;

use capture_ring::control::{CaptureFds, Fds, Listener, Message, Received};
use capture_ring::{Bell, HostClock, Ring, RingConfig};
use journal_format::{DiskId, Epoch, Lsn};

use super::*;
use crate::engine::{InFlight, Mode, Outcome, Request, WaitToken};

/// A process with disks that only exist in this list.
#[derive(Default)]
struct FakeHost {
    disks: Mutex<Vec<DiskInfo>>,
    attached: Mutex<Vec<(String, Arc<Capture>)>>,
    log: Mutex<Vec<String>>,
}

impl FakeHost {
    fn plug(&self, device: &str) {
        let disk = DiskInfo { device: device.to_owned(), disk_bytes: 1 << 20, ..DiskInfo::default() };
        self.disks.lock().expect("unpoisoned").push(disk);
    }

    fn capture(&self, device: &str) -> Option<Arc<Capture>> {
        let attached = self.attached.lock().expect("unpoisoned");
        attached.iter().find(|(name, _)| name == device).map(|(_, capture)| Arc::clone(capture))
    }

    fn log(&self) -> Vec<String> {
        self.log.lock().expect("unpoisoned").clone()
    }
}

impl Host for FakeHost {
    fn identity(&self) -> Identity {
        Identity { program: "test".to_owned(), vm_name: "é".repeat(100), ..Identity::default() }
    }

    fn disks(&self) -> Result<Vec<DiskInfo>, String> {
        Ok(self.disks.lock().expect("unpoisoned").clone())
    }

    fn wake_fn(&self) -> WakeFn {
        |_| {}
    }

    fn attach(&self, device: &str, capture: Arc<Capture>, _image: Option<ImageTag>) -> Result<(), String> {
        if device == "broken" {
            panic!("a bug in the glue");
        }
        if !self.disks.lock().expect("unpoisoned").iter().any(|disk| disk.device == device) {
            return Err(format!("no device {device}"));
        }
        self.log.lock().expect("unpoisoned").push(format!("attach {device}"));
        self.attached.lock().expect("unpoisoned").push((device.to_owned(), capture));
        Ok(())
    }

    fn must_go(&self, _device: &str) -> bool {
        false
    }

    fn detach(&self, device: &str) -> Result<(), String> {
        self.log.lock().expect("unpoisoned").push(format!("detach {device}"));
        if let Some(capture) = self.capture(device) {
            capture.detach();
        }
        self.attached.lock().expect("unpoisoned").retain(|(name, _)| name != device);
        Ok(())
    }
}

/// The agent's side.
struct Agent {
    folder: tempfile::TempDir,
    listener: Listener,
    host: Arc<FakeHost>,
    clock: std::os::fd::OwnedFd,
    next: u64,
}

impl Agent {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("agent.sock");
        let listener = Listener::bind(&path).expect("a socket");
        let host = Arc::new(FakeHost::default());
        host.plug("disk0");
        start(Arc::clone(&host) as Arc<dyn Host>, path).expect("a thread");
        let (_, clock) = HostClock::create().expect("a clock");
        Self { folder, listener, host, clock, next: 0 }
    }

    /// Waits for the filter and takes its greeting.
    fn accept(&self) -> Connection {
        let connection = self.listener.accept().expect("the filter connects");
        let Message::Hello(hello) = receive(&connection) else { panic!("no hello") };
        // A character of two bytes does not fit in front of the mark.
        assert_eq!((hello.program.as_str(), hello.vm_name.len()), ("test", 127));
        assert!(matches!(receive(&connection), Message::Disks { .. }));
        connection
    }

    fn attach(&mut self, connection: &Connection, device: &str) -> (bool, String) {
        self.next += 1;
        let (_ring, fd) = ring();
        let bell = Bell::create().expect("an eventfd");
        let fds = self.fds(fd, &bell);
        connection.send_attach(self.next, device, None, &fds).expect("the filter listens");
        self.result(connection)
    }

    /// The ring stands for the outbox, too: the filter looks into neither.
    fn fds(&self, ring: std::os::fd::OwnedFd, bell: &Bell) -> CaptureFds {
        let outbox = ring.try_clone().expect("a duplicate");
        let clock = self.clock.try_clone().expect("a duplicate");
        CaptureFds { ring, clock, bell: bell.as_fd().try_clone_to_owned().expect("a duplicate"), outbox }
    }

    /// As [`Agent::accept`], for a filter that holds one capture.
    fn accept_held(&self) -> (Connection, String, bool, CaptureFds) {
        let connection = self.listener.accept().expect("the filter connects");
        assert!(matches!(receive(&connection), Message::Hello(_)));
        let received =
            connection.recv(Some(Duration::from_secs(30))).expect("a good message").expect("in time");
        let Received { message: Message::Held { device, ended }, fds: Fds::Capture(fds) } = received else {
            panic!("nothing is held")
        };
        assert!(matches!(receive(&connection), Message::Disks { .. }), "one capture is held");
        (connection, device, ended, fds)
    }

    fn result(&self, connection: &Connection) -> (bool, String) {
        loop {
            if let Message::Result { request, ok, message } = receive(connection) {
                assert_eq!(request, self.next);
                return (ok, message);
            }
        }
    }
}

fn ring() -> (Arc<Ring>, std::os::fd::OwnedFd) {
    Ring::create(&RingConfig::new(DiskId([7; 16]), Epoch(1), Lsn::FIRST, 1 << 20)).expect("a ring")
}

fn receive(connection: &Connection) -> Message {
    let received = connection.recv(Some(Duration::from_secs(30))).expect("a good message");
    received.expect("the filter answers").message
}

#[test]
fn a_device_is_attached_and_detached_on_command() {
    let mut agent = Agent::new();
    let connection = agent.accept();
    assert_eq!(agent.attach(&connection, "disk0"), (true, String::new()));
    let capture = agent.host.capture("disk0").expect("the host has it");
    assert_eq!(capture.mode(), Mode::Capturing);
    agent.next += 1;
    connection.send(&Message::Detach { request: agent.next, device: "disk0".to_owned() }).expect("sent");
    assert!(agent.result(&connection).0);
    assert_eq!(capture.mode(), Mode::Off);
    assert!(agent.host.capture("disk0").is_none());
    let (ok, message) = agent.attach(&connection, "disk9");
    assert!(!ok && message.contains("no device disk9"));
}

#[test]
fn captures_outlive_the_agent_and_a_new_attach_replaces_the_old_capture() {
    let mut agent = Agent::new();
    let connection = agent.accept();
    assert!(agent.attach(&connection, "disk0").0);
    let old = agent.host.capture("disk0").expect("attached");
    drop(connection);
    let (connection, device, ended, fds) = agent.accept_held();
    assert_eq!((device.as_str(), ended), ("disk0", false));
    assert_eq!(Ring::open(fds.ring.as_fd()).expect("the ring").mode().mode, Mode::Capturing);
    assert_eq!(old.mode(), Mode::Capturing, "losing the agent ends nothing");
    assert!(agent.attach(&connection, "disk0").0);
    assert_eq!(old.mode(), Mode::Off);
    let new = agent.host.capture("disk0").expect("attached");
    assert_eq!(new.mode(), Mode::Capturing);
    assert_eq!(agent.host.log(), ["attach disk0", "detach disk0", "attach disk0"]);
}

#[test]
fn an_ended_capture_is_held_until_it_is_forgotten_and_an_outbox_is_replaced() {
    let mut agent = Agent::new();
    let connection = agent.accept();
    assert!(agent.attach(&connection, "disk0").0);
    drop(connection);
    let (connection, _, _, fds) = agent.accept_held();
    assert!(Ring::open(fds.outbox.as_fd()).is_ok(), "the outbox that came with the attach");
    agent.next += 1;
    connection.send_hold(agent.next, "disk0", agent.clock.as_fd()).expect("sent");
    assert!(agent.result(&connection).0);
    drop(connection);
    let (connection, _, _, fds) = agent.accept_held();
    assert!(HostClock::open(fds.outbox.as_fd()).is_ok(), "the outbox that it was told to hold");
    connection.send(&Message::Forget { device: "disk0".to_owned() }).expect("sent");
    agent.next += 1;
    connection.send(&Message::Detach { request: agent.next, device: "disk0".to_owned() }).expect("sent");
    assert!(agent.result(&connection).0);
    drop(connection);
    let (connection, device, ended, _fds) = agent.accept_held();
    assert_eq!((device.as_str(), ended), ("disk0", true), "only an ended capture is forgotten");
    connection.send(&Message::Forget { device }).expect("sent");
    agent.next += 1;
    connection.send_hold(agent.next, "disk0", agent.clock.as_fd()).expect("sent");
    assert!(!agent.result(&connection).0, "nothing is held");
    drop(connection);
    agent.accept();
}

#[test]
fn a_new_disk_is_told_and_an_unplugged_one_is_detached() {
    let mut agent = Agent::new();
    let connection = agent.accept();
    assert!(agent.attach(&connection, "disk0").0);
    agent.host.plug("disk1");
    let Message::Disks { disks, more: false } = receive(&connection) else { panic!("no list") };
    assert_eq!(disks.iter().map(|disk| disk.device.as_str()).collect::<Vec<_>>(), ["disk0", "disk1"]);
    agent.host.disks.lock().expect("unpoisoned").remove(0);
    let Message::Disks { disks, .. } = receive(&connection) else { panic!("no list") };
    assert_eq!(disks.len(), 1);
    assert_eq!(agent.host.log(), ["attach disk0", "detach disk0"]);
}

#[test]
fn a_fault_is_told_and_resync_says_what_to_do() {
    let mut agent = Agent::new();
    let connection = agent.accept();
    assert!(agent.attach(&connection, "disk0").0);
    let capture = agent.host.capture("disk0").expect("attached");
    agent.next += 1;
    connection.send(&Message::Resync { request: agent.next, device: "disk0".to_owned() }).expect("sent");
    assert!(agent.result(&connection).0, "a device that is captured has nothing to resume");
    capture.fault("something broke");
    let Message::Fault { device, message } = receive(&connection) else { panic!("no fault") };
    assert_eq!((device.as_str(), message.as_str()), ("disk0", "something broke"));
    agent.next += 1;
    connection.send(&Message::Resync { request: agent.next, device: "disk0".to_owned() }).expect("sent");
    let (ok, message) = agent.result(&connection);
    assert!(!ok && message.contains("attach again"));
    let mut request = InFlight::default();
    let _ = capture.begin(&Request::write(0, 4096, false), WaitToken(0), &mut request);
    assert!(request.pieces().is_empty(), "the guest goes on without us");
    capture.finish(&mut request, Outcome::Succeeded);
}

#[test]
fn a_capture_knows_whether_an_agent_is_connected() {
    let mut agent = Agent::new();
    let connection = agent.accept();
    assert!(agent.attach(&connection, "disk0").0);
    let capture = agent.host.capture("disk0").expect("attached");
    let wait_for = |there: bool| {
        let began = Instant::now();
        while capture.has_agent() != there {
            assert!(began.elapsed() < Duration::from_secs(30), "an agent is there: {there}");
            std::thread::yield_now();
        }
    };
    assert!(capture.has_agent());
    let path = agent.folder.path().join("agent.sock");
    drop((agent.listener, connection));
    wait_for(false);
    std::fs::remove_file(&path).expect("what the dead agent left");
    agent.listener = Listener::bind(&path).expect("a socket");
    let _connection = agent.accept_held();
    wait_for(true);
}

#[test]
fn a_panic_in_the_glue_costs_the_connection_and_nothing_else() {
    let mut agent = Agent::new();
    let connection = agent.accept();
    let (_ring, fd) = ring();
    let bell = Bell::create().expect("an eventfd");
    connection.send_attach(1, "broken", None, &agent.fds(fd, &bell)).expect("sent");
    let began = Instant::now();
    while connection.recv(Some(Duration::from_secs(30))).is_ok() {
        assert!(began.elapsed() < Duration::from_secs(30), "the connection is still there");
    }
    let connection = agent.accept();
    assert!(agent.attach(&connection, "disk0").0);
}
