//! Where the processor's time of ingest goes: the same functions on the same frames, one after the other, in one thread.

use std::fs;
use std::io::{BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use cdp_tests::certificates::Authority;
use journal_format::{DiskId, Epoch, Frame, codec};
use journal_store::Store;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use crate::Effort;
use crate::contents::{Batch, DISK_BYTES, Journal, ZSTD_LEVEL};
use crate::feed::tls_session;
use crate::ingest::Load;
use crate::machine;
use crate::report::{Report, Row};

const FULL_BYTES: u64 = 256 << 20;
const QUICK_BYTES: u64 = 32 << 20;
/// What a commit makes durable under load.
const COMMIT_BYTES: usize = 16 << 20;

/// Adds a row for each part and round.
pub(crate) fn run(effort: Effort, report: &mut Report, load: &Load, batches: &[Batch], directory: &Path) {
    let bytes = if effort.patient { FULL_BYTES } else { QUICK_BYTES };
    for round in 0..effort.rounds {
        report.begin_round(effort);
        let mut journal = Journal::new(DiskId([8; 16]), DISK_BYTES, Epoch(1));
        let mut frames: Vec<Vec<u8>> = journal.begin().to_vec();
        let count = (bytes / batches[0].raw.len() as u64).max(1) as usize;
        let chosen: Vec<&Batch> = batches.iter().cycle().take(count).collect();
        let gigabytes = chosen.iter().map(|batch| batch.raw.len()).sum::<usize>() as f64 / 1e9;
        let mut add = |name: &str, seconds: f64| {
            let mut row = Row::new("parts of ingest", "disk", load.name, name, round);
            row.set("cpu_s_per_gb", seconds / gigabytes);
            report.add(row);
        };
        let (mut heads, mut packed, mut raw, mut out) = (0.0, 0.0, Vec::new(), Vec::new());
        for batch in &chosen {
            raw.clear();
            raw.extend_from_slice(&batch.raw);
            packed += timed(|| assert_eq!(codec::compress(&mut raw, ZSTD_LEVEL, &mut out), batch.codec));
            let mut frame = Vec::new();
            heads += timed(|| frame = journal.frame(batch, None));
            frame.extend_from_slice(&batch.data);
            frames.push(frame);
        }
        add("agent: compress (zstd 1)", packed);
        add("agent: records and checksums", heads);
        let (sender, receiver) = tcp_pair();
        add("server: receive (TCP)", received(&frames, sender, receiver));
        let (sender, receiver) = tcp_pair();
        let authority = Authority::new();
        let sender = StreamOwned::new(tls_session(&authority.ca()), sender);
        add(
            "server: receive (TLS)",
            received(&frames, sender, StreamOwned::new(accept(&authority), receiver)),
        );
        let (sender, receiver) = UnixStream::pair().expect("a pair");
        add("server: receive (Unix socket)", received(&frames, sender, receiver));
        add("server: check a frame", timed(|| frames.iter().for_each(|frame| drop(Frame::parse(frame)))));
        let (append, commit) = stored(&frames, &directory.join("parts"));
        add("server: append", append);
        add("server: make durable", commit);
    }
}

/// The two ends of a TCP connection.
fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let sender = TcpStream::connect(listener.local_addr().expect("its address")).expect("a connection");
    (sender, listener.accept().expect("a connection").0)
}

/// The server's end of a TLS connection.
fn accept(authority: &Authority) -> ServerConnection {
    let [cert, key] = authority.issue("127.0.0.1");
    let cert = CertificateDer::from_pem_file(cert).expect("a certificate");
    let key = PrivateKeyDer::from_pem_file(key).expect("a key");
    let config = ServerConfig::builder().with_no_client_auth().with_single_cert(vec![cert], key);
    ServerConnection::new(Arc::new(config.expect("a certificate and its key"))).expect("a session")
}

/// Processor time of the calling thread in `work`.
fn timed(work: impl FnOnce()) -> f64 {
    let before = machine::own_seconds();
    work();
    machine::own_seconds() - before
}

/// What it costs the reading end to take frames out of a socket.
fn received(frames: &[Vec<u8>], mut sender: impl Write, receiver: impl Read + Send + 'static) -> f64 {
    let lengths: Vec<usize> = frames.iter().map(Vec::len).collect();
    let reader = thread::spawn(move || {
        let mut stream = BufReader::with_capacity(64 << 10, receiver);
        timed(|| {
            for length in lengths {
                let mut frame = vec![0; length];
                stream.read_exact(&mut frame).expect("a frame");
            }
        })
    });
    frames.iter().for_each(|frame| sender.write_all(frame).expect("it is taken"));
    sender.flush().expect("it is taken");
    reader.join().expect("the reader")
}

/// Appends frames to a new store and makes them durable in batches; the time of either.
fn stored(frames: &[Vec<u8>], root: &Path) -> (f64, f64) {
    let store = Store::open(root).expect("a store");
    let first = Frame::parse(frames.first().expect("a frame")).expect("a frame").header().disk();
    store.open_or_create(first, DISK_BYTES).expect("a disk");
    let (mut append, mut commit, mut waiting) = (0.0, 0.0, 0);
    for (number, bytes) in (1..).zip(frames) {
        let frame = Frame::parse(bytes).expect("a frame");
        append += timed(|| store.append(&frame).expect("it is taken"));
        waiting += bytes.len();
        if waiting >= COMMIT_BYTES || number == frames.len() {
            waiting = 0;
            commit += timed(|| assert!(store.commit().is_empty(), "a commit failed"));
        }
    }
    drop(store);
    fs::remove_dir_all(root).expect("the store");
    (append, commit)
}
