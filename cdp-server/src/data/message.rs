//! Messages from a socket, with a deadline for each: a peer that trickles bytes holds one thread, for a bounded time,
//! and never more memory than it has sent, but for a buffer of an earlier frame that is used again.

use std::io::{self, BufRead, BufReader, Read};
use std::sync::Arc;
use std::time::{Duration, Instant};

use journal_format::wire::{MESSAGE_HEADER_BYTES, MessageHeader, MessageType};

use crate::data::socket::Socket;
use crate::data::spares::Spares;
use crate::error::ServerError;

const BUFFER_BYTES: usize = 64 << 10;
/// A body is filled by this much at a time, in bytes, as it arrives: the length field alone takes no memory, only
/// addresses, and a body is never copied because it grows.
const GROW_BYTES: usize = 256 << 10;
/// How a TLS connection begins: a handshake record.
const TLS_HANDSHAKE: [u8; 2] = [0x16, 0x03];

/// A socket whose reads end at a deadline.
#[derive(Debug)]
struct TimedStream {
    stream: Arc<Socket>,
    deadline: Instant,
    /// Longest wait for a byte.
    pause: Duration,
    /// When the last byte came.
    heard: Instant,
}

impl Read for TimedStream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            // A timeout of less than a microsecond would be set as 0, which means none.
            self.stream.set_read_timeout(left.min(self.pause).max(Duration::from_millis(1)))?;
            match (&*self.stream).read(buf) {
                // A process that was stopped and goes on finds its wait ended.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(length) if length > 0 => {
                    self.heard = Instant::now();
                    return Ok(length);
                }
                result => return result,
            }
        }
    }
}

/// Reads whole messages from one connection.
#[derive(Debug)]
pub(crate) struct MessageReader {
    stream: BufReader<TimedStream>,
    spares: Arc<Spares>,
}

impl MessageReader {
    pub(crate) fn new(stream: Arc<Socket>, spares: Arc<Spares>) -> Self {
        let now = Instant::now();
        let stream = TimedStream { stream, deadline: now, pause: Duration::ZERO, heard: now };
        Self { stream: BufReader::with_capacity(BUFFER_BYTES, stream), spares }
    }

    /// When the last byte came.
    pub(crate) fn heard(&self) -> Instant {
        self.stream.get_ref().heard
    }

    /// The next message: its first byte must come within `idle`, the rest within `whole` after that, with no pause
    /// longer than `idle`. `None` when the peer has closed between two messages. Types for which `accept` gives no limit are refused.
    pub(crate) fn next(
        &mut self,
        idle: Duration,
        whole: Duration,
        accept: impl Fn(MessageType) -> Option<usize>,
    ) -> Result<Option<(MessageType, Vec<u8>)>, ServerError> {
        self.stream.get_mut().pause = idle;
        self.set_deadline(idle);
        if self.stream.fill_buf().map_err(receive_error)?.is_empty() {
            return Ok(None);
        }
        self.set_deadline(whole);
        let mut header = [0_u8; MESSAGE_HEADER_BYTES];
        self.stream.read_exact(&mut header).map_err(receive_error)?;
        if header.starts_with(&TLS_HANDSHAKE) {
            return Err(ServerError::Protocol(
                "the agent speaks TLS and this server does not: give the server --tls-cert and --tls-key, or the agent no --tls-ca"
                    .to_owned(),
            ));
        }
        let (kind, len) = MessageHeader::parse(&header)?;
        match accept(kind) {
            Some(most) if len <= most => {
                // Other messages do not come back.
                let body =
                    if kind == MessageType::Frame { self.spares.take(len) } else { Vec::with_capacity(len) };
                Ok(Some((kind, self.fill(body, len)?)))
            }
            Some(most) => Err(ServerError::Protocol(format!("{kind:?} of {len} bytes; at most {most} here"))),
            None => Err(ServerError::Protocol(format!("{kind:?} is not for the server, or not yet"))),
        }
    }

    /// Receives `len` bytes, over whatever the buffer holds.
    fn fill(&mut self, mut body: Vec<u8>, len: usize) -> Result<Vec<u8>, ServerError> {
        let mut done = 0;
        while done < len {
            let end = len.min(done.saturating_add(GROW_BYTES));
            if body.len() < end {
                body.resize(end, 0);
            }
            let next = body.get_mut(done..end).unwrap_or_default();
            self.stream.read_exact(next).map_err(receive_error)?;
            done = end;
        }
        Ok(body)
    }

    fn set_deadline(&mut self, from_now: Duration) {
        self.stream.get_mut().deadline = Instant::now() + from_now;
    }
}

fn receive_error(source: io::Error) -> ServerError {
    match source.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            ServerError::Protocol("nothing arrived in time; the peer is gone or too slow".to_owned())
        }
        io::ErrorKind::UnexpectedEof => ServerError::Protocol("the peer closed inside a message".to_owned()),
        _ => ServerError::io("receive from", "agent", source),
    }
}
