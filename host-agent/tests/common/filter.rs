//! A filter without QEMU: one process's side of the control socket, with disks in memory.

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use capture_ring::control::{CaptureFds, Connection, DiskInfo, Fds, Hello, Message, PROTOCOL_VERSION};
use capture_ring::{Bell, HostClock, Mode, Producer, Resync, Ring};
use journal_format::{ByteRange, GapReason};

/// Size of every fake disk.
pub const DISK_BYTES: u64 = 4 << 20;

/// A disk in memory, captured or not.
pub struct FakeDisk {
    pub image: Mutex<Vec<u8>>,
    producer: Mutex<Option<Arc<Producer>>>,
    ring_file: Mutex<Option<File>>,
    /// What is held for the next agent, and whether its capture has ended.
    held: Mutex<Option<(CaptureFds, bool)>>,
    /// A ring has one resync at a time.
    resyncing: Mutex<()>,
}

pub struct FakeFilter {
    vm: String,
    connection: Arc<Connection>,
    disks: Arc<HashMap<String, Arc<FakeDisk>>>,
    pub resyncs: Arc<AtomicU64>,
}

pub fn hello(vm: &str) -> Hello {
    Hello {
        protocol: PROTOCOL_VERSION,
        pid: std::process::id(),
        program: "fake".into(),
        qemu_version: "0.0".into(),
        vm_name: vm.into(),
        vm_uuid: [0; 16],
        refused: String::new(),
    }
}

impl FakeFilter {
    /// Connects, says hello, lists the devices and serves commands on a thread.
    pub fn connect(socket: &Path, vm: &str, devices: &[&str]) -> Self {
        let disks: HashMap<String, Arc<FakeDisk>> =
            devices.iter().map(|device| ((*device).to_owned(), Arc::new(FakeDisk::new()))).collect();
        Self::greet(socket, vm, Arc::new(disks), devices)
    }

    /// The same process connects again, with these of its devices.
    pub fn again(&self, socket: &Path, devices: &[&str]) -> Self {
        Self::greet(socket, &self.vm, Arc::clone(&self.disks), devices)
    }

    fn greet(socket: &Path, vm: &str, disks: Arc<HashMap<String, Arc<FakeDisk>>>, devices: &[&str]) -> Self {
        let connection = Arc::new(Connection::connect(socket).expect("the agent listens"));
        connection.send(&Message::Hello(hello(vm))).expect("hello");
        for (device, disk) in disks.iter() {
            if let Some((fds, ended)) = &*disk.held.lock().unwrap() {
                connection.send_held(device, *ended, fds).expect("held");
            }
        }
        let filter = Self { vm: vm.to_owned(), connection, disks, resyncs: Arc::default() };
        filter.list(devices);
        let server = Self {
            vm: vm.to_owned(),
            connection: Arc::clone(&filter.connection),
            disks: Arc::clone(&filter.disks),
            resyncs: Arc::clone(&filter.resyncs),
        };
        std::thread::spawn(move || server.serve());
        filter
    }

    /// Lists these devices from now on.
    pub fn list(&self, devices: &[&str]) {
        let info = |device: &&str| DiskInfo {
            device: (*device).to_owned(),
            node: "node".into(),
            driver: "raw".into(),
            disk_bytes: DISK_BYTES,
            read_only: false,
            refused: String::new(),
        };
        self.connection.send_disks(&devices.iter().map(info).collect::<Vec<_>>()).expect("a list");
    }

    pub fn disk(&self, device: &str) -> Arc<FakeDisk> {
        Arc::clone(&self.disks[device])
    }

    pub fn fault(&self, device: &str) {
        self.connection
            .send(&Message::Fault { device: device.into(), message: "test".into() })
            .expect("sent");
    }

    /// Ends the connection while the process lives on.
    pub fn hang_up(&self) {
        use std::os::fd::{AsFd, AsRawFd};
        let _ =
            nix::sys::socket::shutdown(self.connection.as_fd().as_raw_fd(), nix::sys::socket::Shutdown::Both);
    }

    fn serve(&self) {
        while let Ok(received) = self.connection.recv(Some(Duration::from_secs(3600))) {
            let Some(received) = received else { continue };
            let (request, outcome) = match received.message {
                Message::Attach { request, device, .. } => {
                    let Fds::Capture(fds) = received.fds else { panic!("no descriptors") };
                    (request, self.disks[&device].attach(fds))
                }
                Message::Hold { request, device } => {
                    let Fds::Outbox(outbox) = received.fds else { panic!("no descriptor") };
                    let mut held = self.disks[&device].held.lock().unwrap();
                    held.as_mut().expect("something is held").0.outbox = outbox;
                    (request, Ok(()))
                }
                Message::Forget { device } => {
                    let mut held = self.disks[&device].held.lock().unwrap();
                    held.take_if(|(_, ended)| *ended);
                    continue;
                }
                Message::Detach { request, device } => {
                    self.disks[&device].detach();
                    (request, Ok(()))
                }
                Message::Resync { request, device } => {
                    self.resyncs.fetch_add(1, Ordering::Relaxed);
                    let disk = Arc::clone(&self.disks[&device]);
                    std::thread::spawn(move || disk.resync());
                    (request, Ok(()))
                }
                other => panic!("the agent sent {other:?}"),
            };
            let (ok, message) = (outcome.is_ok(), outcome.err().unwrap_or_default());
            if self.connection.send(&Message::Result { request, ok, message }).is_err() {
                return;
            }
        }
    }
}

impl FakeDisk {
    fn new() -> Self {
        let image = Mutex::new(vec![0; usize::try_from(DISK_BYTES).unwrap()]);
        Self {
            image,
            producer: Mutex::new(None),
            ring_file: Mutex::new(None),
            held: Mutex::new(None),
            resyncing: Mutex::new(()),
        }
    }

    fn attach(&self, fds: CaptureFds) -> Result<(), String> {
        use std::os::fd::AsFd;
        let text = |error: capture_ring::RingError| error.to_string();
        let ring = Ring::open(fds.ring.as_fd()).map_err(text)?;
        let clock = HostClock::open(fds.clock.as_fd()).map_err(text)?;
        let bell = Bell::from(fds.bell.try_clone().expect("a duplicate"));
        let producer = Producer::new(ring, clock, bell);
        producer.attach().map_err(|full| full.to_string())?;
        *self.ring_file.lock().unwrap() = Some(File::from(fds.ring.try_clone().expect("a duplicate")));
        *self.producer.lock().unwrap() = Some(Arc::new(producer));
        *self.held.lock().unwrap() = Some((fds, false));
        Ok(())
    }

    /// Whether anything is held for the next agent.
    pub fn is_held(&self) -> bool {
        self.held.lock().unwrap().is_some()
    }

    /// Puts something else where the descriptors of the capture are held.
    pub fn tamper(&self, change: impl FnOnce(&mut CaptureFds)) {
        change(&mut self.held.lock().unwrap().as_mut().expect("held").0);
    }

    /// Ends the capture, as a detach does, or the unplugging of the device.
    pub fn detach(&self) {
        if let Some((_, ended)) = &mut *self.held.lock().unwrap() {
            *ended = true;
        }
        if let Some(producer) = self.producer.lock().unwrap().take() {
            producer.detach();
        }
        *self.ring_file.lock().unwrap() = None;
    }

    pub fn producer(&self) -> Arc<Producer> {
        Arc::clone(self.producer.lock().unwrap().as_ref().expect("attached"))
    }

    /// What a guest's flush does.
    pub fn flush(&self) {
        if let Some(producer) = self.producer.lock().unwrap().as_ref() {
            let _full_or_lsn = producer.flush_record();
        }
    }

    pub fn is_attached(&self) -> bool {
        self.producer.lock().unwrap().is_some()
    }

    /// The ring's memfd, to vandalise it.
    pub fn ring_file(&self) -> File {
        self.ring_file.lock().unwrap().as_ref().expect("attached").try_clone().unwrap()
    }

    pub fn mode(&self) -> Mode {
        self.producer().ring().mode().mode
    }

    /// What a guest's write does: the capture rule of the filter, simplified.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let Some(producer) = self.producer.lock().unwrap().clone() else {
            return self.put(offset, data);
        };
        let range = ByteRange::new(offset, data.len() as u64).unwrap();
        loop {
            if producer.ring().mode().mode == Mode::Capturing {
                match producer.begin_write(range, false) {
                    Ok(ticket) => {
                        assert!(producer.copy_in(&ticket, data));
                        self.put(offset, data);
                        producer.complete(ticket);
                        return;
                    }
                    Err(_) => producer.enter_tracking(GapReason::Overflow),
                }
            }
            if let Some(tracked) = producer.begin_tracked(range) {
                self.put(offset, data);
                producer.end_tracked(tracked);
                return;
            }
        }
    }

    fn put(&self, offset: u64, data: &[u8]) {
        let at = usize::try_from(offset).unwrap();
        self.image.lock().unwrap()[at..at + data.len()].copy_from_slice(data);
    }

    /// Copies what is dirty until the gap ends; gives up when there is no room (the agent asks again).
    pub fn resync(&self) {
        let _alone = self.resyncing.lock().unwrap();
        let producer = self.producer();
        if !producer.try_resume() {
            return;
        }
        while producer.ring().mode().mode == Mode::Capturing {
            match producer.finish_resync() {
                Resync::Done(_) | Resync::Whole | Resync::Paused => return,
                Resync::Busy | Resync::Full => std::thread::sleep(Duration::from_millis(1)),
                Resync::Dirty => self.copy_one(&producer),
            }
        }
    }

    /// Takes the dirty bits, then the LSN, then reads: the order that `docs/formats/ring.md` asks for.
    fn copy_one(&self, producer: &Producer) {
        let Some(range) = producer.ring().dirty().take_run(0, 64 << 10) else { return };
        let Ok(ticket) = producer.reserve_fill(64 << 10) else {
            producer.mark_dirty(range);
            std::thread::sleep(Duration::from_millis(1));
            return;
        };
        let (from, to) = (usize::try_from(range.offset()).unwrap(), usize::try_from(range.end()).unwrap());
        let data = self.image.lock().unwrap()[from..to].to_vec();
        assert!(producer.copy_in_fill(&ticket, &data));
        producer.complete_fill_write(ticket, range).unwrap();
    }
}
