//! The smallest agent there can be: it hands out a ring and keeps every record that comes.

use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use capture_ring::control::{CaptureFds, Connection, DiskInfo, Hello, Listener, Message};
use capture_ring::{Bell, Consumer, HostClock, Next, Ring, RingConfig};
use journal_format::{DiskId, Epoch, Lsn, Op, Record};

/// How long anything may take before a test fails.
pub const LIMIT: Duration = Duration::from_secs(20);

/// Waits until `ready` answers something.
pub fn wait_for<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(answer) = ready() {
            return answer;
        }
        assert!(began.elapsed() < LIMIT, "{what} did not happen within {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A listening agent.
pub struct Agent {
    listener: Listener,
    socket: PathBuf,
    clock: HostClock,
    clock_fd: std::os::fd::OwnedFd,
}

impl Agent {
    pub fn listen(folder: &Path) -> Self {
        let socket = folder.join("agent.sock");
        let listener = Listener::bind(&socket).unwrap();
        let (clock, clock_fd) = HostClock::create().unwrap();
        Self { listener, socket, clock, clock_fd }
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Waits for a filter.
    pub fn accept(&self) -> Filter<'_> {
        let connection = self.listener.accept().unwrap();
        let mut filter = Filter {
            agent: self,
            connection,
            hello: Hello::default(),
            disks: Vec::new(),
            requests: 0,
            faults: Vec::new(),
        };
        match filter.receive() {
            Message::Hello(hello) => filter.hello = hello,
            other => panic!("no hello but {other:?}"),
        }
        filter
    }
}

/// How many writes of the guest there are among records.
pub fn guest_writes(records: &[Taken]) -> usize {
    records.iter().filter(|taken| matches!(taken.record.op, Op::Write { fill: false, .. })).count()
}

/// A connected filter.
pub struct Filter<'a> {
    agent: &'a Agent,
    connection: Connection,
    pub hello: Hello,
    pub disks: Vec<DiskInfo>,
    requests: u64,
    pub faults: Vec<(String, String)>,
}

impl Filter<'_> {
    fn receive(&mut self) -> Message {
        let received = self.connection.recv(Some(LIMIT)).unwrap();
        let message = received.expect("the filter says nothing").message;
        match &message {
            Message::Disks { disks, more: false } => self.disks.clone_from(disks),
            Message::Fault { device, message } => self.faults.push((device.clone(), message.clone())),
            _ => {}
        }
        message
    }

    fn result(&mut self) -> Result<(), String> {
        loop {
            if let Message::Result { request, ok, message } = self.receive() {
                assert_eq!(request, self.requests);
                return if ok { Ok(()) } else { Err(message) };
            }
        }
    }

    /// Asks for the disks until the wanted one is there.
    pub fn disk(&mut self, device: &str) -> DiskInfo {
        let began = Instant::now();
        loop {
            if let Some(disk) = self.disks.iter().find(|disk| disk.device == device) {
                return disk.clone();
            }
            assert!(began.elapsed() < LIMIT, "no disk '{device}' but {:?}", self.disks);
            self.list();
        }
    }

    /// Asks for the disks.
    pub fn list(&mut self) -> &[DiskInfo] {
        self.connection.send(&Message::List).unwrap();
        while !matches!(self.receive(), Message::Disks { more: false, .. }) {}
        &self.disks
    }

    /// Waits for the message that capture of a device has ended by a fault.
    pub fn fault(&mut self) -> String {
        while self.faults.is_empty() {
            self.receive();
        }
        self.faults.remove(0).1
    }

    pub fn try_attach(&mut self, device: &str) -> Result<Tap, String> {
        self.try_attach_over(device, 64 << 20)
    }

    /// Attaches with a ring that holds no more than that.
    pub fn attach_over(&mut self, device: &str, arena_bytes: u64) -> Tap {
        at_rest(|| self.try_attach_over(device, arena_bytes))
    }

    fn try_attach_over(&mut self, device: &str, arena_bytes: u64) -> Result<Tap, String> {
        let disk = self.disk(device);
        let base = RingConfig::new(DiskId([7; 16]), Epoch(1), Lsn(1), disk.disk_bytes.max(512));
        let config = RingConfig { arena_bytes, ..base };
        let (ring, fd) = Ring::create(&config).unwrap();
        let bell = Bell::create().unwrap();
        self.requests += 1;
        let clock = self.agent.clock_fd.as_fd().try_clone_to_owned().unwrap();
        // The ring stands for the outbox, too: the filter looks into neither.
        let (outbox, bell) = (fd.try_clone().unwrap(), bell.as_fd().try_clone_to_owned().unwrap());
        let fds = CaptureFds { ring: fd, clock, bell, outbox };
        self.connection.send_attach(self.requests, device, None, &fds).unwrap();
        self.result()?;
        Ok(Tap::start(ring, self.agent.clock.clone(), disk.disk_bytes))
    }

    pub fn attach(&mut self, device: &str) -> Tap {
        at_rest(|| self.try_attach(device))
    }

    pub fn try_detach(&mut self, device: &str) -> Result<(), String> {
        self.requests += 1;
        let request = self.requests;
        self.connection.send(&Message::Detach { request, device: device.to_owned() }).unwrap();
        self.result()
    }

    pub fn detach(&mut self, device: &str) {
        at_rest(|| self.try_detach(device));
    }
}

/// As an agent does: asks again while QEMU does not come to rest, which is what a client of its NBD server does to it that
/// connects just then.
fn at_rest<T>(mut ask: impl FnMut() -> Result<T, String>) -> T {
    for _ in 0..10 {
        match ask() {
            Err(error) if error.contains("did not come to rest") => {}
            answer => return answer.unwrap(),
        }
    }
    panic!("QEMU does not come to rest")
}

/// A record and its data.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Taken {
    pub record: Record,
    pub data: Vec<u8>,
}

/// Keeps what comes out of one ring.
pub struct Tap {
    ring: Arc<Ring>,
    taken: Arc<Mutex<Vec<Taken>>>,
    stop: Arc<AtomicBool>,
    frozen: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    disk_bytes: u64,
}

impl Tap {
    fn start(ring: Arc<Ring>, clock: HostClock, disk_bytes: u64) -> Self {
        let taken = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let mut consumer = Consumer::new(Arc::clone(&ring), clock);
        let frozen = Arc::new(AtomicBool::new(false));
        let (into, until, pause) = (Arc::clone(&taken), Arc::clone(&stop), Arc::clone(&frozen));
        let thread = std::thread::spawn(move || {
            loop {
                // ORDERING: Relaxed: a moment later is soon enough.
                while pause.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(1));
                }
                let mut data = Vec::new();
                match consumer.next(&mut data, u32::MAX).unwrap() {
                    Next::Record(record) => into.lock().unwrap().push(Taken { record, data }),
                    Next::NoRoom(bytes) => panic!("a record of {bytes} bytes"),
                    // ORDERING: Relaxed: only the end of the thread depends on it.
                    Next::Empty if until.load(Ordering::Relaxed) => return,
                    Next::Empty => std::thread::sleep(Duration::from_micros(200)),
                }
            }
        });
        Self { ring, taken, stop, frozen, thread: Some(thread), disk_bytes }
    }

    /// The ring.
    pub fn ring(&self) -> &Ring {
        &self.ring
    }

    /// Takes nothing out of the ring, or goes on.
    pub fn freeze(&self, frozen: bool) {
        // ORDERING: Relaxed: see the thread.
        self.frozen.store(frozen, Ordering::Relaxed);
    }

    /// Waits until the initial sync or a resync is done.
    pub fn wait_synced(&self) {
        wait_for("the end of the gap", || (!self.ring.gap_is_open()).then_some(()));
    }

    /// Everything captured until now.
    /// Waits until that many more records have come.
    pub fn wait_records(&self, count: u64) {
        let goal = self.ring.captured_lsn().0 + count;
        wait_for("more records", || (self.ring.captured_lsn().0 >= goal).then_some(()));
    }

    pub fn records(&self) -> Vec<Taken> {
        let until = self.ring.captured_lsn();
        wait_for("the last record", || {
            let taken = self.taken.lock().unwrap();
            (taken.last().map_or(0, |last| last.record.lsn.0) >= until.0).then(|| taken.clone())
        })
    }

    /// Ends it and gives everything captured.
    pub fn finish(mut self) -> Vec<Taken> {
        let records = self.records();
        self.end();
        records
    }

    fn end(&mut self) {
        // ORDERING: Relaxed: see the thread.
        self.stop.store(true, Ordering::Relaxed);
        self.freeze(false);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }

    /// The image that the records make.
    pub fn image(&self) -> Vec<u8> {
        replay(&self.records(), self.disk_bytes)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.end();
        }
    }
}

/// The image that records make of a disk that was all zeroes before.
pub fn replay(records: &[Taken], disk_bytes: u64) -> Vec<u8> {
    replay_each(records, disk_bytes, |_, _| {})
}

/// As [`replay`]; `look` gets the image after each record.
pub fn replay_each(records: &[Taken], disk_bytes: u64, mut look: impl FnMut(&Taken, &[u8])) -> Vec<u8> {
    let mut image = vec![0; usize::try_from(disk_bytes).unwrap()];
    for (index, taken) in records.iter().enumerate() {
        let Taken { record, data } = taken;
        assert_eq!(record.lsn.0, index as u64 + 1, "LSNs have no holes");
        if index > 0 {
            assert!(record.stamp >= records[index - 1].record.stamp, "stamps follow LSNs");
        }
        apply(&mut image, record, data);
        look(taken, &image);
    }
    image
}

fn apply(image: &mut Vec<u8>, record: &Record, data: &[u8]) {
    match &record.op {
        Op::Write { range, .. } => {
            let start = usize::try_from(range.offset()).unwrap();
            image[start..start + data.len()].copy_from_slice(data);
        }
        Op::Zero { range, .. } | Op::Discard { range } => {
            let start = usize::try_from(range.offset()).unwrap();
            image[start..start + usize::try_from(range.length()).unwrap()].fill(0);
        }
        Op::Resize { disk_bytes } => image.resize(usize::try_from(*disk_bytes).unwrap(), 0),
        _ => {}
    }
}
