//! An agent's end of the wire without an agent: frames that lie ready in memory, sent as fast as the server takes them.

use std::collections::{HashMap, VecDeque};
use std::io::{IoSlice, Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Instant;

use cdp_tests::PATIENCE;
use journal_format::wire::{
    self, Ack, DiskOpened, Hello, MESSAGE_HEADER_BYTES, MessageHeader, MessageType, OpenDisk,
    PROTOCOL_VERSION, Ping, Welcome,
};
use journal_format::{DiskId, Epoch, Lsn};
use zerocopy::IntoBytes;

use crate::contents::{Batch, DISK_BYTES, Journal};

/// Bytes on their way at a time: what an agent's outbox holds.
const WINDOW_BYTES: usize = 256 << 20;

/// A connection to a server that has all its disks open.
pub(crate) struct Feed {
    stream: TcpStream,
    journals: Vec<Journal>,
}

/// A frame that is ready to go.
struct Ready {
    disk: DiskId,
    head: Vec<u8>,
    /// Which batch its data is.
    batch: Option<usize>,
    last: Lsn,
}

/// What became of a load.
pub(crate) struct Fed {
    /// From the first byte sent to the last acknowledgement.
    pub(crate) seconds: f64,
    pub(crate) raw_bytes: u64,
    pub(crate) records: u64,
    /// From a frame's first byte sent to its acknowledgement, in milliseconds, ascending.
    pub(crate) waits_ms: Vec<f64>,
}

impl Fed {
    /// The wait that so many of 1000 frames were within.
    pub(crate) fn wait_ms(&self, of_1000: usize) -> f64 {
        let at = (self.waits_ms.len() * of_1000 / 1000).min(self.waits_ms.len().saturating_sub(1));
        self.waits_ms.get(at).copied().unwrap_or_default()
    }
}

/// What is under way.
#[derive(Default)]
struct Flight {
    frames: HashMap<DiskId, VecDeque<(Lsn, Instant, usize)>>,
    bytes: usize,
    waits_ms: Vec<f64>,
}

impl Feed {
    /// Connects, to `HOST:PORT` or `unix:/path`, and opens that many disks.
    pub(crate) fn connect(address: &str, disks: usize) -> Self {
        let mut stream = match address.strip_prefix("unix:") {
            // What is asked of the stream (read, write, a timeout, a duplicate) is the same for any stream socket.
            Some(path) => TcpStream::from(OwnedFd::from(UnixStream::connect(path).expect("a server"))),
            None => {
                let stream = TcpStream::connect(address).expect("a server");
                stream.set_nodelay(true).expect("no delay");
                stream
            }
        };
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let hello = Hello {
            protocol: PROTOCOL_VERSION,
            host_id: vec![7; 16],
            host_name: "bench".to_owned(),
            ..Hello::default()
        };
        send(&mut stream, &hello);
        let welcome: Welcome = next(&mut stream, MessageType::Welcome);
        assert_eq!(welcome.refused, "", "the server refuses the bench");
        let journals = (0..disks).map(|number| {
            let disk = DiskId(std::array::from_fn(|at| if at < 2 { (number >> (8 * at)) as u8 } else { 9 }));
            send(&mut stream, &OpenDisk { disk: disk.0.to_vec(), disk_bytes: DISK_BYTES, resume_epoch: 0 });
            let opened: DiskOpened = next(&mut stream, MessageType::DiskOpened);
            assert_eq!(opened.refused, "", "the server refuses a disk");
            let journal = Journal::new(disk, DISK_BYTES, Epoch(opened.epoch));
            journal.behind(Lsn(opened.durable_lsn), opened.durable_stamp)
        });
        let journals = journals.collect();
        Self { stream, journals }
    }

    /// Sends that many bytes of guests' data in frames of these batches, disks in turn; `before` is called when everything
    /// lies ready.
    pub(crate) fn run(&mut self, batches: &[Batch], raw_bytes: u64, before: impl FnOnce()) -> Fed {
        let (mut frames, mut raw, mut records) = (Vec::new(), 0, 0);
        for journal in &mut self.journals {
            for head in journal.begin() {
                frames.push(Ready { disk: journal.disk, head, batch: None, last: journal.last() });
            }
        }
        let disks = self.journals.len();
        for (number, at) in (0..batches.len()).cycle().enumerate() {
            if raw >= raw_bytes {
                break;
            }
            let (journal, batch) = (&mut self.journals[number % disks], &batches[at]);
            let first = journal.last();
            let head = journal.frame(batch, None);
            raw += batch.raw.len() as u64;
            records += journal.last().since(first);
            frames.push(Ready { disk: journal.disk, head, batch: Some(at), last: journal.last() });
        }
        before();
        let flight = Arc::new((Mutex::new(Flight::default()), Condvar::new()));
        let (reader, shared, count) =
            (self.stream.try_clone().expect("the stream"), Arc::clone(&flight), frames.len());
        let began = Instant::now();
        let acks = thread::spawn(move || acknowledged(reader, &shared, count));
        for frame in &frames {
            let data = frame.batch.map_or(&[][..], |at| &batches[at].data);
            let length = MESSAGE_HEADER_BYTES + frame.head.len() + data.len();
            let room = |flight: &mut Flight| flight.bytes > WINDOW_BYTES;
            let mut state =
                flight.1.wait_while(flight.0.lock().expect("the flight"), room).expect("the flight");
            state.bytes += length;
            state.frames.entry(frame.disk).or_default().push_back((frame.last, Instant::now(), length));
            drop(state);
            let header =
                MessageHeader::new(MessageType::Frame, frame.head.len() + data.len()).expect("a header");
            write_all(&mut self.stream, [header.as_bytes(), &frame.head, data]);
        }
        acks.join().expect("acknowledgements");
        let seconds = began.elapsed().as_secs_f64();
        let mut waits_ms = std::mem::take(&mut flight.0.lock().expect("the flight").waits_ms);
        waits_ms.sort_by(f64::total_cmp);
        Fed { seconds, raw_bytes: raw, records, waits_ms }
    }
}

/// Reads acknowledgements until every frame has its own.
fn acknowledged(mut stream: TcpStream, flight: &(Mutex<Flight>, Condvar), mut left: usize) {
    while left > 0 {
        let (kind, body) = message(&mut stream);
        let ack: Ack = match kind {
            MessageType::Ack => wire::decode(&body).expect("an acknowledgement"),
            MessageType::Ping => {
                let ping: Ping = wire::decode(&body).expect("a ping");
                let pong = wire::encode_as(MessageType::Pong, &ping).expect("a pong");
                stream.write_all(&pong).expect("the server takes it");
                continue;
            }
            MessageType::SetProtection => continue,
            other => panic!("the server says {other:?}: {}", String::from_utf8_lossy(&body)),
        };
        let (now, disk) = (Instant::now(), wire::disk_id(&ack.disk).expect("a disk"));
        let mut state = flight.0.lock().expect("the flight");
        let state = &mut *state;
        let waiting = state.frames.entry(disk).or_default();
        while let Some((_, sent, length)) = waiting.pop_front_if(|(last, ..)| last.0 <= ack.durable_lsn) {
            state.bytes -= length;
            state.waits_ms.push(now.duration_since(sent).as_secs_f64() * 1000.0);
            left -= 1;
        }
        flight.1.notify_all();
    }
}

fn send<M: wire::Control>(stream: &mut TcpStream, message: &M) {
    stream.write_all(&wire::encode(message).expect("a message")).expect("the server takes it");
}

/// The next message of that kind, over others.
fn next<M: wire::Control>(stream: &mut TcpStream, wanted: MessageType) -> M {
    loop {
        let (kind, body) = message(stream);
        if kind == wanted {
            return wire::decode(&body).expect("the body");
        }
    }
}

fn message(stream: &mut TcpStream) -> (MessageType, Vec<u8>) {
    let mut header = [0; MESSAGE_HEADER_BYTES];
    stream.read_exact(&mut header).expect("the server answers");
    let (kind, length) = MessageHeader::parse(&header).expect("a header");
    let mut body = vec![0; length];
    stream.read_exact(&mut body).expect("the body");
    (kind, body)
}

fn write_all(stream: &mut TcpStream, parts: [&[u8]; 3]) {
    let mut slices = parts.map(IoSlice::new);
    let mut slices = &mut slices[..];
    IoSlice::advance_slices(&mut slices, 0);
    while !slices.is_empty() {
        let written = stream.write_vectored(slices).expect("the server takes frames");
        assert!(written > 0, "the server closed the connection");
        IoSlice::advance_slices(&mut slices, written);
    }
}
