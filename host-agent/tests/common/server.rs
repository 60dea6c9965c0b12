//! A server that keeps journals in memory and checks every frame.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Mutex};

use journal_format::chunk_hash::CHUNK_BYTES;
use journal_format::wire::{self, Control, MESSAGE_HEADER_BYTES, MessageHeader, MessageType};
use journal_format::{ChunkHash, Frame, GapReason, Lsn, Op, Record, Stamp, codec};

use super::wait_for;

/// What the server has of a disk.
#[derive(Clone, Default)]
pub struct Journal {
    pub durable: u64,
    pub stamp: u64,
    pub epoch: u64,
    /// The open epoch's question was answered on this connection.
    open: bool,
    /// Records in order, with the data of writes and the names of bookmarks.
    pub records: Vec<(Record, Vec<u8>)>,
    /// Received and not durable: lost when the connection ends.
    pending: Vec<(Record, Vec<u8>)>,
    pub frames: u64,
    /// Frames that came again although they were durable or pending.
    pub repeated: u64,
    pub opens: Vec<u64>,
    /// How its last epoch ended, as far as the agent said.
    ended: u32,
}

impl Journal {
    fn received(&self) -> u64 {
        self.pending.last().map_or(self.durable, |(record, _)| record.lsn.0)
    }

    fn commit(&mut self) {
        if let Some((last, _)) = self.pending.last() {
            (self.durable, self.stamp) = (last.lsn.0, last.stamp.0);
        }
        self.records.append(&mut self.pending);
    }

    /// The disk after every record.
    pub fn image(&self, bytes: u64) -> Vec<u8> {
        self.image_at(u64::MAX, bytes)
    }

    /// The disk after that record.
    pub fn image_at(&self, lsn: u64, bytes: u64) -> Vec<u8> {
        let mut image = vec![0; usize::try_from(bytes).unwrap()];
        for (record, data) in self.records.iter().take_while(|(record, _)| record.lsn.0 <= lsn) {
            if let Op::Write { range, .. } = record.op {
                let at = usize::try_from(range.offset()).unwrap();
                image[at..at + data.len()].copy_from_slice(data);
            }
        }
        image
    }

    pub fn ops(&self) -> impl Iterator<Item = Op> + '_ {
        self.records.iter().map(|(record, _)| record.op)
    }
}

#[derive(Default)]
struct State {
    journals: HashMap<Vec<u8>, Journal>,
    inventory: wire::Inventory,
    hello: Option<wire::Hello>,
    results: HashMap<u64, wire::CommandResult>,
    statuses: HashMap<Vec<u8>, wire::DiskStatus>,
    connection: Option<TcpStream>,
    connections: u64,
    requests: u64,
    withhold_acks: bool,
    /// End the connection after so many more frames.
    drop_after: Option<u64>,
    complaints: Vec<String>,
}

#[derive(Clone)]
pub struct FakeServer {
    state: Arc<Mutex<State>>,
    address: String,
}

impl FakeServer {
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        Self::accept(address, move || listener.accept().ok().map(|(socket, _)| socket))
    }

    /// The same on a Unix socket at `path`.
    pub fn start_at(path: &Path) -> Self {
        let listener = UnixListener::bind(path).expect("a socket");
        let address = format!("unix:{}", path.display());
        // What is asked of the stream (read, write, shutdown, duplicate) is the same for any stream socket.
        Self::accept(address, move || {
            listener.accept().ok().map(|(socket, _)| TcpStream::from(OwnedFd::from(socket)))
        })
    }

    fn accept(address: String, mut next: impl FnMut() -> Option<TcpStream> + Send + 'static) -> Self {
        let server = Self { state: Arc::default(), address };
        let acceptor = server.clone();
        std::thread::spawn(move || {
            while let Some(socket) = next() {
                acceptor.serve(socket);
            }
        });
        server
    }

    pub fn address(&self) -> String {
        self.address.clone()
    }

    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        work(&mut self.state.lock().unwrap())
    }

    pub fn connections(&self) -> u64 {
        self.with(|state| state.connections)
    }

    pub fn hello(&self) -> wire::Hello {
        wait_for("a hello", || self.with(|state| state.hello.clone()))
    }

    pub fn inventory(&self) -> wire::Inventory {
        self.with(|state| state.inventory.clone())
    }

    pub fn status(&self, disk: &[u8]) -> Option<wire::DiskStatus> {
        self.with(|state| state.statuses.get(disk).cloned())
    }

    pub fn journal(&self, disk: &[u8]) -> Journal {
        self.check();
        self.with(|state| state.journals.get(disk).cloned().unwrap_or_default())
    }

    /// Fails when the agent did anything it must not.
    pub fn check(&self) {
        let complaints = self.with(|state| state.complaints.clone());
        assert!(complaints.is_empty(), "{complaints:?}");
    }

    pub fn wait_for_disk(&self, vm: &str, device: &str) -> wire::Disk {
        wait_for("the disk in the inventory", || {
            let inventory = self.inventory();
            let vm = inventory.vms.into_iter().find(|listed| listed.name == vm)?;
            vm.disks.into_iter().find(|disk| disk.device == device)
        })
    }

    pub fn wait_for_journal(&self, disk: &[u8], what: &str, done: impl Fn(&Journal) -> bool) -> Journal {
        wait_for(what, || Some(self.journal(disk)).filter(|journal| done(journal)))
    }

    pub fn withhold_acks(&self, withhold: bool) {
        self.with(|state| state.withhold_acks = withhold);
        if !withhold {
            let disks: Vec<Vec<u8>> = self.with(|state| state.journals.keys().cloned().collect());
            for disk in disks {
                self.ack(&disk);
            }
        }
    }

    pub fn drop_after(&self, frames: u64) {
        self.with(|state| state.drop_after = Some(frames));
    }

    pub fn send_bytes(&self, bytes: &[u8]) {
        let socket = wait_for("a connection", || {
            self.with(|state| state.connection.as_ref().and_then(|socket| socket.try_clone().ok()))
        });
        let _ = (&socket).write_all(bytes);
    }

    fn send<M: Control>(&self, message: &M) {
        self.send_bytes(&wire::encode(message).expect("a message"));
    }

    fn request(&self) -> u64 {
        self.with(|state| {
            state.requests += 1;
            state.requests
        })
    }

    fn result(&self, request: u64) -> wire::CommandResult {
        wait_for("the result of a command", || self.with(|state| state.results.get(&request).cloned()))
    }

    pub fn set_protection(&self, disk: &[u8], enabled: bool) -> wire::CommandResult {
        let request = self.request();
        self.send(&wire::SetProtection { request, disk: disk.to_vec(), enabled, options: None });
        self.result(request)
    }

    pub fn bookmark(&self, disk: &[u8], name: &str) -> wire::CommandResult {
        let request = self.request();
        self.send(&wire::InsertBookmark { request, disk: disk.to_vec(), name: name.into() });
        self.result(request)
    }

    fn serve(&self, socket: TcpStream) {
        let writer = socket.try_clone().expect("a duplicate");
        let number = self.with(|state| {
            state.connections += 1;
            // The one before is over, whether its thread has noticed or not.
            state.connection = None;
            state.inventory = wire::Inventory::default();
            for journal in state.journals.values_mut() {
                journal.open = false;
                journal.pending.clear();
            }
            state.connections
        });
        let mut reader = socket;
        let mut header = [0; MESSAGE_HEADER_BYTES];
        while reader.read_exact(&mut header).is_ok() {
            let (kind, len) = MessageHeader::parse(&header).expect("the agent's stream");
            let mut body = vec![0; len];
            if reader.read_exact(&mut body).is_err() || !self.take(kind, &body, &writer) {
                break;
            }
        }
        let _ = reader.shutdown(Shutdown::Both);
        self.with(|state| {
            if state.connections == number {
                state.connection = None;
                for journal in state.journals.values_mut() {
                    journal.pending.clear();
                }
            }
        });
    }

    /// False to end the connection.
    fn take(&self, kind: MessageType, body: &[u8], writer: &TcpStream) -> bool {
        match kind {
            MessageType::Hello => {
                let hello: wire::Hello = wire::decode(body).unwrap();
                let welcome = wire::Welcome { protocol: wire::PROTOCOL_VERSION, ..Default::default() };
                let _ = (&mut &*writer).write_all(&wire::encode(&welcome).unwrap());
                self.with(|state| {
                    state.hello = Some(hello);
                    state.connection = writer.try_clone().ok();
                });
            }
            MessageType::Inventory => {
                let inventory = wire::decode(body).unwrap();
                self.with(|state| state.inventory = inventory);
            }
            MessageType::OpenDisk => self.open(&wire::decode(body).unwrap()),
            MessageType::CloseDisk => self.close(&wire::decode(body).unwrap()),
            MessageType::Frame => return self.frame(body),
            MessageType::CommandResult => {
                let result: wire::CommandResult = wire::decode(body).unwrap();
                self.with(|state| state.results.insert(result.request, result));
            }
            MessageType::DiskStatus => {
                let status: wire::DiskStatus = wire::decode(body).unwrap();
                self.with(|state| state.statuses.insert(status.disk.clone(), status));
            }
            MessageType::Ping => {
                let ping: wire::Ping = wire::decode(body).unwrap();
                self.send_bytes(&wire::encode_as(MessageType::Pong, &ping).unwrap());
            }
            MessageType::Pong => {}
            MessageType::HashRequest => self.hashes(&wire::decode(body).unwrap()),
            other => self.complain(format!("the agent sent {other:?}")),
        }
        true
    }

    fn complain(&self, what: String) {
        self.with(|state| state.complaints.push(what));
    }

    fn close(&self, close: &wire::CloseDisk) {
        let was_open = self.with(|state| {
            let journal = state.journals.get_mut(&close.disk);
            journal.is_some_and(|journal| {
                journal.ended = close.ended;
                std::mem::take(&mut journal.open)
            })
        });
        if !was_open {
            self.complain("the agent gave up a disk that it had not opened".to_owned());
        }
    }

    fn open(&self, open: &wire::OpenDisk) {
        let answer = self.with(|state| {
            let journal = state.journals.entry(open.disk.clone()).or_default();
            journal.opens.push(open.resume_epoch);
            journal.open = true;
            if open.resume_epoch == 0 {
                journal.epoch += 1;
            }
            wire::DiskOpened {
                disk: open.disk.clone(),
                durable_lsn: journal.durable,
                durable_stamp: journal.stamp,
                epoch: journal.epoch,
                refused: String::new(),
                closed_image: Vec::new(),
                begins: match (open.resume_epoch, journal.durable, std::mem::take(&mut journal.ended)) {
                    (0, 0, _) => GapReason::Attach as u32,
                    (0, _, 0) => GapReason::UncleanEnd as u32,
                    (0, _, ended) => ended,
                    _ => 0,
                },
            }
        });
        self.send(&answer);
    }

    fn frame(&self, body: &[u8]) -> bool {
        let frame = match Frame::parse(body) {
            Ok(frame) => frame,
            Err(error) => {
                self.complain(format!("a bad frame: {error}"));
                return true;
            }
        };
        let header = frame.header();
        let raw =
            codec::decompress(header.codec(), frame.data(), header.raw_bytes()).expect("data that unpacks");
        let disk = header.disk().0.to_vec();
        let go_on = self.with(|state| {
            let mut complaints = Vec::new();
            let journal = state.journals.entry(disk.clone()).or_default();
            if !journal.open || header.epoch().0 != journal.epoch {
                complaints.push(format!("a frame of epoch {} that is not open", header.epoch().0));
            }
            let expected = Lsn(journal.received()).next();
            if header.first_lsn() > expected {
                complaints.push(format!("a hole: {} came, {expected} was expected", header.first_lsn()));
            }
            if header.first_lsn() < expected {
                journal.repeated += 1;
            }
            if Stamp(journal.stamp) > header.first_stamp() {
                complaints.push("stamps run backwards over frames".into());
            }
            journal.frames += 1;
            for record in frame.records().filter(|record| record.lsn >= expected) {
                let data = match record.op {
                    Op::Write { data, .. } | Op::Bookmark { name: data } => {
                        raw[data.pos as usize..data.end() as usize].to_vec()
                    }
                    _ => Vec::new(),
                };
                journal.pending.push((record, data));
            }
            state.complaints.append(&mut complaints);
            match &mut state.drop_after {
                Some(0) => {
                    state.drop_after = None;
                    false
                }
                Some(left) => {
                    *left -= 1;
                    true
                }
                None => true,
            }
        });
        if go_on && !self.with(|state| state.withhold_acks) {
            self.ack(&disk);
        }
        go_on
    }

    /// Hashes of the image at that LSN, if it is durable.
    fn hashes(&self, request: &wire::HashRequest) {
        let journal = self.with(|state| state.journals.get(&request.disk).cloned().unwrap_or_default());
        let (first, chunks) = (usize::try_from(request.first_chunk).unwrap(), request.chunks as usize);
        let hashes = if request.lsn > journal.durable {
            Vec::new()
        } else {
            let mut image = journal.image_at(request.lsn, super::filter::DISK_BYTES);
            image.resize((first + chunks) * CHUNK_BYTES, 0);
            image.chunks(CHUNK_BYTES).skip(first).flat_map(|chunk| ChunkHash::of(chunk).0).collect()
        };
        let (disk, epoch, lsn) = (request.disk.clone(), request.epoch, request.lsn);
        let (first_chunk, chunks) = (request.first_chunk, request.chunks);
        self.send(&wire::Hashes { disk, epoch, lsn, first_chunk, chunks, hashes });
    }

    fn ack(&self, disk: &[u8]) {
        let ack = self.with(|state| {
            let journal = state.journals.get_mut(disk).expect("a journal");
            journal.commit();
            wire::Ack { disk: disk.to_vec(), durable_lsn: journal.durable }
        });
        self.send(&ack);
    }
}
