//! A small NBD client with many requests in flight: the fixed newstyle handshake and simple replies of the NBD
//! protocol (`doc/proto.md` of the NetworkBlockDevice project). `qemu-io` waits for each request or does not tell which
//! one has ended; tests of ordering have to know both.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::wait_for;

const HELLO: u64 = 0x4e42_444d_4147_4943;
const OPTION: u64 = 0x4948_4156_454f_5054;
const REQUEST: u32 = 0x2560_9513;
const REPLY: u32 = 0x6744_6698;
/// Fixed newstyle, and no padding after the handshake.
const CLIENT_FLAGS: u32 = 3;
const EXPORT_NAME: u32 = 1;
const FUA: u16 = 1;
const NO_HOLE: u16 = 2;

/// One request. Offsets and lengths are in bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Command {
    /// Write these bytes.
    Write {
        /// First byte.
        offset: u64,
        /// What.
        data: Vec<u8>,
        /// Complete only when it is durable.
        fua: bool,
    },
    /// Make a range read as zeroes.
    Zero {
        /// First byte.
        offset: u64,
        /// Length.
        length: u64,
        /// The range may be unmapped.
        unmap: bool,
    },
    /// Say that a range is not needed.
    Discard {
        /// First byte.
        offset: u64,
        /// Length.
        length: u64,
    },
    /// Make durable what has completed.
    Flush,
}

/// A connection to an export.
#[derive(Debug)]
pub struct Nbd {
    stream: UnixStream,
    next: u64,
    in_flight: Vec<u64>,
}

impl Nbd {
    /// Connects to an export of the server at `socket`, as soon as it is there.
    ///
    /// # Panics
    /// When the server is none or has no such export.
    #[must_use]
    pub fn connect(socket: &Path, export: &str) -> Self {
        let mut stream = wait_for("the NBD socket", || UnixStream::connect(socket).ok());
        stream.set_read_timeout(Some(crate::PATIENCE)).expect("timeout");
        assert_eq!((read_u64(&mut stream), read_u64(&mut stream)), (HELLO, OPTION), "an NBD server");
        let mut server_flags = [0; 2];
        stream.read_exact(&mut server_flags).expect("the server's flags");
        let mut hello = CLIENT_FLAGS.to_be_bytes().to_vec();
        hello.extend(OPTION.to_be_bytes());
        hello.extend(EXPORT_NAME.to_be_bytes());
        hello.extend((export.len() as u32).to_be_bytes());
        hello.extend(export.as_bytes());
        stream.write_all(&hello).expect("the handshake");
        let mut size_and_flags = [0; 10];
        stream.read_exact(&mut size_and_flags).unwrap_or_else(|e| panic!("no export {export}: {e}"));
        Self { stream, next: 1, in_flight: Vec::new() }
    }

    /// Sends a request without waiting for its end; returns a number for it.
    ///
    /// # Panics
    /// When the connection breaks.
    pub fn send(&mut self, command: &Command) -> u64 {
        let (kind, flags, offset, length): (u16, u16, u64, u64) = match command {
            Command::Write { offset, data, fua } => (1, u16::from(*fua) * FUA, *offset, data.len() as u64),
            Command::Flush => (3, 0, 0, 0),
            Command::Discard { offset, length } => (4, 0, *offset, *length),
            Command::Zero { offset, length, unmap } => (6, u16::from(!unmap) * NO_HOLE, *offset, *length),
        };
        let number = self.next;
        self.next += 1;
        let mut bytes = REQUEST.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(number.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend((length as u32).to_be_bytes());
        if let Command::Write { data, .. } = command {
            bytes.extend(data);
        }
        self.stream.write_all(&bytes).expect("the server takes requests");
        self.in_flight.push(number);
        number
    }

    /// Waits until any request in flight has ended; returns its number.
    ///
    /// # Panics
    /// When it failed, or the connection breaks.
    pub fn wait(&mut self) -> u64 {
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply).expect("the server answers");
        let word = |at: usize| u32::from_be_bytes(reply[at..at + 4].try_into().expect("4 bytes"));
        let number = u64::from(word(8)) << 32 | u64::from(word(12));
        assert_eq!((word(0), word(4)), (REPLY, 0), "request {number}: the reply, its error");
        let at = self.in_flight.iter().position(|waiting| *waiting == number);
        self.in_flight.swap_remove(at.unwrap_or_else(|| panic!("a reply to nothing: {number}")))
    }

    /// Waits for everything in flight.
    ///
    /// # Panics
    /// As [`Nbd::wait`].
    pub fn wait_all(&mut self) {
        while !self.in_flight.is_empty() {
            self.wait();
        }
    }

    /// Sends a request, with nothing else in flight, and waits for its end.
    ///
    /// # Panics
    /// As [`Nbd::wait`].
    pub fn run(&mut self, command: &Command) {
        assert!(self.in_flight.is_empty(), "something is in flight");
        self.send(command);
        self.wait();
    }

    /// How many requests are in flight.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }
}

fn read_u64(stream: &mut UnixStream) -> u64 {
    let mut bytes = [0; 8];
    stream.read_exact(&mut bytes).expect("the server greets");
    u64::from_be_bytes(bytes)
}
