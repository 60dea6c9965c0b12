//! Random mixes of requests: as commands for `qemu-io`, and as the image that they make.

use crate::wait_for;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use crate::qemu::failed;
use crate::random::Random;

/// Largest write, in bytes.
pub const MAX_WRITE_BYTES: u64 = 1 << 20;

const DATA_FILES: u64 = 8;
const SECTOR_BYTES: u64 = 512;

/// One request of a guest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Request {
    /// The start of data file number `file` goes to `offset`.
    Write {
        /// First byte.
        offset: u64,
        /// Length in bytes.
        length: u64,
        /// Which data file.
        file: u64,
        /// With force unit access.
        fua: bool,
    },
    /// One byte value all over.
    Pattern {
        /// First byte.
        offset: u64,
        /// Length in bytes.
        length: u64,
        /// The value.
        byte: u8,
    },
    /// Zeroes.
    Zero {
        /// First byte.
        offset: u64,
        /// Length in bytes.
        length: u64,
        /// The range may be unmapped.
        unmap: bool,
    },
    /// Discard.
    Discard {
        /// First byte.
        offset: u64,
        /// Length in bytes.
        length: u64,
    },
    /// Flush.
    Flush,
}

impl Request {
    /// Whether all that was answered before it is on stable storage once it is answered.
    #[must_use]
    pub const fn is_flush(&self) -> bool {
        matches!(self, Self::Flush)
    }

    /// The same, `by` bytes further on.
    #[must_use]
    pub fn moved(mut self, by: u64) -> Self {
        match &mut self {
            Self::Write { offset, .. }
            | Self::Pattern { offset, .. }
            | Self::Zero { offset, .. }
            | Self::Discard { offset, .. } => *offset += by,
            Self::Flush => {}
        }
        self
    }
}

/// A source of random requests for a disk of a given size.
#[derive(Debug)]
pub struct Load {
    random: Random,
    disk_bytes: u64,
    /// Offsets and lengths are multiples of this.
    grain: u64,
    data: Vec<Vec<u8>>,
    directory: PathBuf,
}

impl Load {
    /// Requests within `disk_bytes`, in multiples of `grain` bytes. Writes its data files into `directory`.
    ///
    /// # Panics
    /// When the files cannot be written.
    #[must_use]
    pub fn new(seed: u64, disk_bytes: u64, grain: u64, directory: &Path) -> Self {
        let random = Random::seeded(seed);
        let data: Vec<_> = (0..DATA_FILES).map(|i| Random::of(i).bytes(MAX_WRITE_BYTES as usize)).collect();
        for (i, bytes) in data.iter().enumerate() {
            fs::write(directory.join(format!("data-{i}")), bytes).expect("data file");
        }
        Self { random, disk_bytes, grain, data, directory: directory.to_owned() }
    }

    /// The next request.
    pub fn next_request(&mut self) -> Request {
        let kind = self.random.within(0..100);
        let length = self.length();
        let most = self.disk_bytes - length.next_multiple_of(SECTOR_BYTES) + 1;
        let offset = self.random.within(0..most) / self.grain * self.grain;
        match kind {
            0..50 => {
                Request::Write { offset, length, file: self.random.within(0..DATA_FILES), fua: kind < 5 }
            }
            50..70 => Request::Pattern { offset, length, byte: self.random.within(1..256) as u8 },
            70..82 => Request::Zero { offset, length, unmap: kind.is_multiple_of(2) },
            82..90 => {
                // In sectors: blklogwrites itself stumbles over others.
                let offset = offset / SECTOR_BYTES * SECTOR_BYTES;
                Request::Discard { offset, length: length.next_multiple_of(SECTOR_BYTES) }
            }
            _ => Request::Flush,
        }
    }

    /// Mostly small, sometimes up to [`MAX_WRITE_BYTES`] or a quarter of the disk.
    fn length(&mut self) -> u64 {
        let most = match self.random.within(0..10) {
            0..6 => 16 << 10,
            6..9 => 128 << 10,
            _ => MAX_WRITE_BYTES,
        };
        let most = most.min(self.disk_bytes / 4);
        self.random.within(1..most / self.grain + 1) * self.grain
    }

    /// The command that makes `qemu-io` send it.
    #[must_use]
    pub fn command(&self, request: &Request) -> String {
        match request {
            Request::Write { offset, length, file, fua } => {
                let fua = if *fua { "-f " } else { "" };
                let path = self.directory.join(format!("data-{file}"));
                format!("write {fua}-q -s {} {offset} {length}", path.display())
            }
            Request::Pattern { offset, length, byte } => format!("write -q -P {byte} {offset} {length}"),
            Request::Zero { offset, length, unmap } => {
                format!("write -q -z {}{offset} {length}", if *unmap { "-u " } else { "" })
            }
            Request::Discard { offset, length } => format!("discard -q {offset} {length}"),
            Request::Flush => "flush".to_owned(),
        }
    }

    /// Does to an image what the request does to the disk; a discarded range becomes zero.
    pub fn apply(&self, image: &mut [u8], request: &Request) {
        let range = |offset: &u64, length: &u64| *offset as usize..(offset + length) as usize;
        match request {
            Request::Write { offset, length, file, .. } => {
                image[range(offset, length)].copy_from_slice(&self.data[*file as usize][..*length as usize]);
            }
            Request::Pattern { offset, length, byte } => image[range(offset, length)].fill(*byte),
            Request::Zero { offset, length, .. } | Request::Discard { offset, length } => {
                image[range(offset, length)].fill(0);
            }
            Request::Flush => {}
        }
    }
}

/// A guest that never stops writing: one `qemu-io` that gets requests as fast as it takes them, many in flight and
/// overlapping.
#[derive(Debug)]
pub struct Busy {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    feeder: Option<JoinHandle<Child>>,
    reader: Option<JoinHandle<String>>,
}

impl Busy {
    /// Starts a load on an NBD export.
    ///
    /// # Panics
    /// When `qemu-io` does not start.
    #[must_use]
    pub fn start(mut load: Load, nbd_url: &str) -> Self {
        let mut command = Command::new("qemu-io");
        command.args(["-t", "writeback", "-f", "raw", nbd_url]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut child = command.spawn().expect("qemu-io starts");
        let output = child.stdout.take().expect("piped");
        let reader = std::thread::spawn(move || {
            let complaints = BufReader::new(output).lines().map_while(Result::ok).filter(|line| failed(line));
            complaints.collect::<Vec<_>>().join("\n")
        });
        let stop = Arc::new(AtomicBool::new(false));
        let sent = Arc::new(AtomicU64::new(0));
        let (stopped, counter) = (Arc::clone(&stop), Arc::clone(&sent));
        let feeder = std::thread::spawn(move || {
            let mut input = child.stdin.take().expect("piped");
            // ORDERING: Relaxed; a flag and a counter that stand alone.
            while !stopped.load(Ordering::Relaxed) {
                let request = load.next_request();
                let line = in_flight(&load.command(&request));
                writeln!(input, "{line}").expect("qemu-io takes commands");
                counter.fetch_add(1, Ordering::Relaxed);
            }
            writeln!(input, "aio_flush\nflush").expect("qemu-io takes commands");
            child
        });
        Self { stop, sent, feeder: Some(feeder), reader: Some(reader) }
    }

    /// Requests given to `qemu-io` so far.
    #[must_use]
    pub fn sent(&self) -> u64 {
        // ORDERING: Relaxed; the counter stands alone.
        self.sent.load(Ordering::Relaxed)
    }

    /// Waits until so many more were given to it.
    pub fn let_through(&self, requests: u64) {
        let goal = self.sent().saturating_add(requests);
        wait_for("requests under way", || (self.sent() >= goal).then_some(()));
    }

    /// Ends the load, waits for everything in flight, and returns how many requests there were.
    ///
    /// # Panics
    /// When any request failed.
    pub fn finish(mut self) -> u64 {
        let complaints = self.join();
        assert!(complaints.is_empty(), "guest requests failed:\n{complaints}");
        self.sent()
    }

    fn join(&mut self) -> String {
        // ORDERING: Relaxed; the flag stands alone.
        self.stop.store(true, Ordering::Relaxed);
        let Some((feeder, reader)) = self.feeder.take().zip(self.reader.take()) else {
            return String::new();
        };
        let child = feeder.join();
        let complaints = reader.join().expect("reader");
        match child {
            Ok(mut child) => {
                let status = child.wait().expect("wait");
                if status.success() { complaints } else { format!("{complaints}\nqemu-io: {status}") }
            }
            Err(_) => format!("{complaints}\nqemu-io ended early"),
        }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let _ = self.join();
    }
}

/// The same request without waiting for its end (discards and flushes always wait).
fn in_flight(command: &str) -> String {
    match command.strip_prefix("write ") {
        // Only plain writes know `-s` and `-f`; in flight, a pattern does as well.
        Some(rest) if !rest.contains("-s ") => format!("aio_write {rest}"),
        _ => command.to_owned(),
    }
}
