//! An agent's end of the wire without an agent: frames that lie ready in memory, sent as fast as the server takes them.

use std::borrow::Cow;
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
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use zerocopy::IntoBytes;

use crate::contents::{Batch, DISK_BYTES, Journal};

/// Bytes on their way at a time: what an agent's outbox holds.
const WINDOW_BYTES: usize = 256 << 20;

/// What is read from and written to, encrypted or not.
trait Duplex: Read + Write + Send {}

impl<T: Read + Write + Send> Duplex for T {}

/// A connection to a server that has all its disks open.
pub(crate) struct Feed {
    stream: TcpStream,
    /// Of an encrypted one, until its load runs.
    tls: Option<ClientConnection>,
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

/// The client's end of a TLS connection to 127.0.0.1, which shows a certificate of the authority in that file.
pub(crate) fn tls_session(ca: &str) -> ClientConnection {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(ca).expect("a certificate")).expect("an authority");
    let config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    let name = ServerName::try_from("127.0.0.1").expect("an address");
    ClientConnection::new(Arc::new(config), name).expect("a session")
}

impl Feed {
    /// Connects, to `HOST:PORT` or `unix:/path`, and opens that many disks.
    pub(crate) fn connect(address: &str, disks: usize) -> Self {
        let mut stream = Self::socket(address);
        let journals = open(&mut stream, disks);
        Self { stream, tls: None, journals }
    }

    /// The same through TLS, to a server at 127.0.0.1 whose certificate is of the authority in that file.
    pub(crate) fn connect_tls(address: &str, ca: &str, disks: usize) -> Self {
        let mut session = tls_session(ca);
        session.set_buffer_limit(None);
        let mut stream = StreamOwned::new(session, Self::socket(address));
        let journals = open(&mut stream, disks);
        let (session, stream) = stream.into_parts();
        Self { stream, tls: Some(session), journals }
    }

    fn socket(address: &str) -> TcpStream {
        let stream = match address.strip_prefix("unix:") {
            // What is asked of the stream (read, write, a timeout, a duplicate) is the same for any stream socket.
            Some(path) => TcpStream::from(OwnedFd::from(UnixStream::connect(path).expect("a server"))),
            None => {
                let stream = TcpStream::connect(address).expect("a server");
                stream.set_nodelay(true).expect("no delay");
                stream
            }
        };
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        stream
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
        // Encrypted before the clock starts as well: it is the server that is measured. Nothing can be said in between then.
        let answers = self.tls.is_none();
        let sealed: Option<Vec<Vec<u8>>> = self
            .tls
            .as_mut()
            .map(|session| frames.iter().map(|frame| sealed(session, &parts(frame, batches))).collect());
        before();
        let flight = Arc::new((Mutex::new(Flight::default()), Condvar::new()));
        let (reader, shared, count) =
            (self.stream.try_clone().expect("the stream"), Arc::clone(&flight), frames.len());
        let reader: Box<dyn Duplex> = match self.tls.take() {
            Some(session) => Box::new(StreamOwned::new(session, reader)),
            None => Box::new(reader),
        };
        let began = Instant::now();
        let acks = thread::spawn(move || acknowledged(reader, answers, &shared, count));
        for (number, frame) in frames.iter().enumerate() {
            let parts = parts(frame, batches);
            let length = parts.iter().map(|part| part.len()).sum::<usize>();
            let room = |flight: &mut Flight| flight.bytes > WINDOW_BYTES;
            let mut state =
                flight.1.wait_while(flight.0.lock().expect("the flight"), room).expect("the flight");
            state.bytes += length;
            state.frames.entry(frame.disk).or_default().push_back((frame.last, Instant::now(), length));
            drop(state);
            match &sealed {
                Some(sealed) => self.stream.write_all(&sealed[number]).expect("the server takes frames"),
                None => write_all(&mut self.stream, &parts),
            }
        }
        acks.join().expect("acknowledgements");
        let seconds = began.elapsed().as_secs_f64();
        let mut waits_ms = std::mem::take(&mut flight.0.lock().expect("the flight").waits_ms);
        waits_ms.sort_by(f64::total_cmp);
        Fed { seconds, raw_bytes: raw, records, waits_ms }
    }
}

/// A frame's message: header, head and data.
fn parts<'a>(frame: &'a Ready, batches: &'a [Batch]) -> [Cow<'a, [u8]>; 3] {
    let data = frame.batch.map_or(&[][..], |at| &batches[at].data);
    let header = MessageHeader::new(MessageType::Frame, frame.head.len() + data.len()).expect("a header");
    [Cow::Owned(header.as_bytes().to_vec()), Cow::Borrowed(&frame.head), Cow::Borrowed(data)]
}

fn sealed(session: &mut ClientConnection, parts: &[Cow<'_, [u8]>; 3]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for part in parts {
        session.writer().write_all(part).expect("encrypts");
    }
    while session.wants_write() {
        session.write_tls(&mut bytes).expect("into memory");
    }
    bytes
}

/// Says hello and opens that many disks.
fn open(stream: &mut dyn Duplex, disks: usize) -> Vec<Journal> {
    let hello = Hello {
        protocol: PROTOCOL_VERSION,
        host_id: vec![7; 16],
        host_name: "bench".to_owned(),
        ..Hello::default()
    };
    send(stream, &hello);
    let welcome: Welcome = next(stream, MessageType::Welcome);
    assert_eq!(welcome.refused, "", "the server refuses the bench");
    let journals = (0..disks).map(|number| {
        let disk = DiskId(std::array::from_fn(|at| if at < 2 { (number >> (8 * at)) as u8 } else { 9 }));
        send(stream, &OpenDisk { disk: disk.0.to_vec(), disk_bytes: DISK_BYTES, resume_epoch: 0 });
        let opened: DiskOpened = next(stream, MessageType::DiskOpened);
        assert_eq!(opened.refused, "", "the server refuses a disk");
        let journal = Journal::new(disk, DISK_BYTES, Epoch(opened.epoch));
        journal.behind(Lsn(opened.durable_lsn), opened.durable_stamp)
    });
    journals.collect()
}

/// Reads acknowledgements until every frame has its own.
fn acknowledged(
    mut stream: Box<dyn Duplex>,
    answers: bool,
    flight: &(Mutex<Flight>, Condvar),
    mut left: usize,
) {
    while left > 0 {
        let (kind, body) = message(&mut *stream);
        let ack: Ack = match kind {
            MessageType::Ack => wire::decode(&body).expect("an acknowledgement"),
            MessageType::Ping if answers => {
                let ping: Ping = wire::decode(&body).expect("a ping");
                let pong = wire::encode_as(MessageType::Pong, &ping).expect("a pong");
                stream.write_all(&pong).expect("the server takes it");
                continue;
            }
            MessageType::Ping | MessageType::SetProtection => continue,
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

fn send<M: wire::Control>(stream: &mut dyn Duplex, message: &M) {
    stream.write_all(&wire::encode(message).expect("a message")).expect("the server takes it");
}

/// The next message of that kind, over others.
fn next<M: wire::Control>(stream: &mut dyn Duplex, wanted: MessageType) -> M {
    loop {
        let (kind, body) = message(stream);
        if kind == wanted {
            return wire::decode(&body).expect("the body");
        }
    }
}

fn message(stream: &mut dyn Duplex) -> (MessageType, Vec<u8>) {
    let mut header = [0; MESSAGE_HEADER_BYTES];
    stream.read_exact(&mut header).expect("the server answers");
    let (kind, length) = MessageHeader::parse(&header).expect("a header");
    let mut body = vec![0; length];
    stream.read_exact(&mut body).expect("the body");
    (kind, body)
}

fn write_all(stream: &mut TcpStream, parts: &[Cow<'_, [u8]>; 3]) {
    let mut slices = parts.each_ref().map(|part| IoSlice::new(part));
    let mut slices = &mut slices[..];
    IoSlice::advance_slices(&mut slices, 0);
    while !slices.is_empty() {
        let written = stream.write_vectored(slices).expect("the server takes frames");
        assert!(written > 0, "the server closed the connection");
        IoSlice::advance_slices(&mut slices, written);
    }
}
