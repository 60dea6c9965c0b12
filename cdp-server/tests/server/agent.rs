//! A fake agent: speaks the real wire protocol over a real socket, and captures a disk that exists only here.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use journal_format::frame::{self, Codec, FrameMeta};
use journal_format::wire::{self, Control, MESSAGE_HEADER_BYTES, MessageHeader, MessageType};
use journal_format::{ByteRange, DataSpan, DiskId, Epoch, GapReason, Lsn, Op, Record, Stamp};

use crate::now_ns;

/// The disk of most tests.
pub(crate) const DISK: DiskId = DiskId([0xd1; 16]);
/// Its size in bytes.
pub(crate) const DISK_BYTES: u64 = 1 << 20;

/// One connection.
#[derive(Debug)]
pub(crate) struct Agent {
    stream: TcpStream,
    /// The epoch of the disk opened last.
    pub(crate) epoch: u64,
}

impl Agent {
    /// Connects and introduces itself; the server must accept it.
    pub(crate) fn connect(server: SocketAddr) -> Self {
        let mut agent = Self::raw(server);
        let welcome = agent.hello(&hello());
        assert_eq!(welcome.refused, "");
        agent
    }

    /// Connects and says nothing.
    pub(crate) fn raw(server: SocketAddr) -> Self {
        Self::over(TcpStream::connect(server).expect("the server listens"))
    }

    /// Connects to a Unix socket and says nothing. What is asked of the stream (read, write, timeouts) is the same for any
    /// stream socket.
    pub(crate) fn raw_unix(server: &Path) -> Self {
        let stream = UnixStream::connect(server).expect("the server listens");
        Self::over(TcpStream::from(OwnedFd::from(stream)))
    }

    fn over(stream: TcpStream) -> Self {
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a socket option");
        Self { stream, epoch: 0 }
    }

    /// Connects, and reports [`DISK`] as `vm/disk0`.
    pub(crate) fn with_disk(server: SocketAddr) -> Self {
        let mut agent = Self::connect(server);
        agent.send(&inventory(DISK, "vm", "disk0"));
        agent
    }

    /// As [`Agent::with_disk`], of a disk that nobody wants anything of yet; the server has taken the report over, and so
    /// sends no command of its own for a wish that comes now.
    pub(crate) fn reported(server: SocketAddr) -> Self {
        let mut agent = Self::with_disk(server);
        agent.send(&wire::Ping::default());
        let (kind, _) = agent.receive().expect("the connection is open");
        assert_eq!(kind, MessageType::Pong);
        agent
    }

    pub(crate) fn hello(&mut self, hello: &wire::Hello) -> wire::Welcome {
        self.send(hello);
        self.expect()
    }

    pub(crate) fn send<M: Control>(&mut self, message: &M) {
        self.send_bytes(&wire::encode(message).expect("encodes"));
    }

    pub(crate) fn send_frame(&mut self, frame: &[u8]) {
        let header = MessageHeader::new(MessageType::Frame, frame.len()).expect("fits");
        self.send_bytes(&[zerocopy::IntoBytes::as_bytes(&header), frame].concat());
    }

    /// Sends a frame to a server that may be gone.
    pub(crate) fn try_send_frame(&mut self, frame: &[u8]) -> std::io::Result<()> {
        let header = MessageHeader::new(MessageType::Frame, frame.len()).expect("fits");
        self.try_send(&[zerocopy::IntoBytes::as_bytes(&header), frame].concat())
    }

    pub(crate) fn send_bytes(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("the server reads");
    }

    /// Sends what may be refused.
    pub(crate) fn try_send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// From now on sending fails when the other side takes nothing for so long.
    pub(crate) fn give_up_sending_after(&self, time: Duration) {
        self.stream.set_write_timeout(Some(time)).expect("a socket option");
    }

    /// The next message that is no ping.
    pub(crate) fn receive(&mut self) -> Option<(MessageType, Vec<u8>)> {
        loop {
            let mut header = [0; MESSAGE_HEADER_BYTES];
            self.stream.read_exact(&mut header).ok()?;
            let (kind, len) = MessageHeader::parse(&header).expect("the server's headers parse");
            let mut body = vec![0; len];
            self.stream.read_exact(&mut body).ok()?;
            if kind != MessageType::Ping {
                return Some((kind, body));
            }
        }
    }

    /// The next message of that kind; commands to switch protection that come in between are left unanswered.
    pub(crate) fn expect<M: Control>(&mut self) -> M {
        loop {
            let (kind, body) = self.receive().expect("the connection is open");
            if kind == M::KIND {
                return wire::decode(&body).expect("decodes");
            }
            assert_eq!(kind, MessageType::SetProtection, "waiting for {:?}", M::KIND);
        }
    }

    /// Waits until the server has closed the connection.
    pub(crate) fn expect_closed(mut self) {
        while self.receive().is_some() {}
        let mut byte = [0];
        // A reset is as good as an end.
        let end = self.stream.read(&mut byte);
        assert!(!matches!(&end, Ok(1)) && !is_timeout(&end), "the server closes the connection: {end:?}");
    }

    /// Opens [`DISK`] for a new epoch, or to go on with one.
    pub(crate) fn open(&mut self, resume: Option<Epoch>) -> wire::DiskOpened {
        let resume_epoch = resume.map_or(0, |epoch| epoch.0);
        self.send(&wire::OpenDisk { disk: DISK.0.to_vec(), disk_bytes: DISK_BYTES, resume_epoch });
        let opened: wire::DiskOpened = self.expect();
        assert_eq!(opened.refused, "");
        self.epoch = opened.epoch;
        opened
    }

    /// As [`Agent::with_disk`], of a server that may be gone.
    pub(crate) fn try_with_disk(server: SocketAddr) -> Option<Self> {
        let stream = TcpStream::connect(server).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(20))).ok()?;
        let mut agent = Self { stream, epoch: 0 };
        agent.try_send(&wire::encode(&hello()).expect("encodes")).ok()?;
        agent.receive()?;
        agent.try_send(&wire::encode(&inventory(DISK, "vm", "disk0")).expect("encodes")).ok()?;
        Some(agent)
    }

    /// As [`Agent::open`]; `None` when the server is gone or refuses.
    pub(crate) fn try_open(&mut self, resume: Option<Epoch>) -> Option<wire::DiskOpened> {
        let resume_epoch = resume.map_or(0, |epoch| epoch.0);
        let request = wire::OpenDisk { disk: DISK.0.to_vec(), disk_bytes: DISK_BYTES, resume_epoch };
        self.try_send(&wire::encode(&request).expect("encodes")).ok()?;
        loop {
            let (kind, body) = self.receive()?;
            if kind == MessageType::DiskOpened {
                let opened: wire::DiskOpened = wire::decode(&body).expect("decodes");
                return opened.refused.is_empty().then_some(opened);
            }
        }
    }

    /// Sends a frame, and waits until everything in it is durable.
    pub(crate) fn ship(&mut self, frame: &[u8], last: Lsn) {
        self.send_frame(frame);
        while self.expect::<wire::Ack>().durable_lsn < last.0 {}
    }

    /// Carries out a wish: opens [`DISK`], whose records are stamped from `stamp` on, and answers.
    pub(crate) fn carry_out(&mut self, command: &wire::SetProtection, stamp: u64) -> Capture {
        let capture = Capture::new(&self.open(None), stamp);
        self.done(command.request);
        capture
    }

    /// Ends the sync of a capture that has just begun, at LSN 2, and says so.
    pub(crate) fn synced(&mut self, capture: &mut Capture) {
        let frame = capture.begin().frame();
        self.ship(&frame, Lsn(2));
        self.status("capturing", Lsn(2), now_ns());
    }

    /// Answers a command as done.
    pub(crate) fn done(&mut self, request: u64) {
        self.send(&wire::CommandResult { request, ..wire::CommandResult::default() });
    }

    /// Says how [`DISK`] is doing.
    pub(crate) fn status(&mut self, mode: &str, captured: Lsn, host_stamp: u64) {
        self.send(&wire::DiskStatus {
            disk: DISK.0.to_vec(),
            mode: mode.to_owned(),
            captured_lsn: captured.0,
            epoch: self.epoch,
            host_stamp,
            ring_used_bytes: 4096,
            ring_bytes: 64 << 20,
            ..wire::DiskStatus::default()
        });
    }
}

fn is_timeout(end: &std::io::Result<usize>) -> bool {
    end.as_ref()
        .is_err_and(|e| matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut))
}

/// What an agent says of itself.
pub(crate) fn hello() -> wire::Hello {
    wire::Hello {
        protocol: wire::PROTOCOL_VERSION,
        host_id: vec![1; 16],
        host_name: "host1".to_owned(),
        agent_version: "test".to_owned(),
        token: String::new(),
    }
}

/// An inventory of one VM with one disk.
pub(crate) fn inventory(disk: DiskId, vm: &str, device: &str) -> wire::Inventory {
    let disk = wire::Disk {
        disk: disk.0.to_vec(),
        device: device.to_owned(),
        node: "node0".to_owned(),
        driver: "qcow2".to_owned(),
        disk_bytes: DISK_BYTES,
        ..wire::Disk::default()
    };
    let vm = wire::Vm { name: vm.to_owned(), pid: 77, disks: vec![disk], ..wire::Vm::default() };
    wire::Inventory { vms: vec![vm] }
}

/// The capture of a disk in one epoch: makes records, packs them into frames, and remembers what the disk holds.
#[derive(Debug)]
pub(crate) struct Capture {
    disk: DiskId,
    pub(crate) epoch: Epoch,
    pub(crate) next: Lsn,
    pub(crate) stamp: u64,
    records: Vec<Record>,
    data: Vec<u8>,
    /// The disk's contents after the last record.
    pub(crate) image: Vec<u8>,
}

impl Capture {
    /// Goes on where the server says that its journal ends. Stamps count up by a millisecond.
    pub(crate) fn new(opened: &wire::DiskOpened, stamp: u64) -> Self {
        Self {
            disk: wire::disk_id(&opened.disk).expect("an id"),
            epoch: Epoch(opened.epoch),
            next: Lsn(opened.durable_lsn).next(),
            stamp,
            records: Vec::new(),
            data: Vec::new(),
            image: vec![0; usize::try_from(DISK_BYTES).expect("small")],
        }
    }

    /// The whole beginning of an epoch: gap, no contents, end of the gap.
    pub(crate) fn begin(&mut self) -> &mut Self {
        self.push(Op::GapBegin { reason: GapReason::Attach, generation: 1 });
        self.push(Op::GapEnd { generation: 1 });
        self
    }

    pub(crate) fn gap_begin(&mut self, reason: GapReason, generation: u64) -> &mut Self {
        self.push(Op::GapBegin { reason, generation });
        self
    }

    pub(crate) fn gap_end(&mut self, generation: u64) -> &mut Self {
        self.push(Op::GapEnd { generation });
        self
    }

    pub(crate) fn flush(&mut self) -> &mut Self {
        self.push(Op::Flush);
        self
    }

    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) -> &mut Self {
        let data = self.span(bytes);
        let range = ByteRange::new(offset, bytes.len() as u64).expect("in range");
        let start = usize::try_from(offset).expect("small");
        self.image[start..start + bytes.len()].copy_from_slice(bytes);
        self.push(Op::Write { range, data, fill: false, fua: false });
        self
    }

    pub(crate) fn bookmark(&mut self, name: &str) -> &mut Self {
        let name = self.span(name.as_bytes());
        self.push(Op::Bookmark { name });
        self
    }

    fn span(&mut self, bytes: &[u8]) -> DataSpan {
        let pos = u32::try_from(self.data.len()).expect("small");
        self.data.extend_from_slice(bytes);
        DataSpan { pos, len: u32::try_from(bytes.len()).expect("small") }
    }

    fn push(&mut self, op: Op) {
        self.stamp += 1_000_000;
        self.records.push(Record { lsn: self.next, stamp: Stamp(self.stamp), op });
        self.next = self.next.next();
    }

    /// The last record's LSN.
    pub(crate) fn last(&self) -> Lsn {
        self.next.prev()
    }

    /// The records since the last call, as a frame.
    pub(crate) fn frame(&mut self) -> Vec<u8> {
        let (records, data) = (std::mem::take(&mut self.records), std::mem::take(&mut self.data));
        let meta = FrameMeta {
            disk: self.disk,
            epoch: self.epoch,
            first_lsn: records.first().expect("a record").lsn,
            disk_bytes: DISK_BYTES,
            codec: Codec::Raw,
            raw_bytes: u32::try_from(data.len()).expect("small"),
        };
        frame::encode(&meta, &records, &data).expect("encodes")
    }
}
