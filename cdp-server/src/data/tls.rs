//! TLS over a connection on which one thread reads and others write.
//!
//! The session (keys, record counters) is under a lock that is held for as long as bytes are encrypted or decrypted, never
//! while the network is waited for. Writers take turns under a lock of their own, so that records leave in the order in
//! which they were encrypted.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustls::{ServerConfig, ServerConnection};

/// Bytes taken off the network at once: some records of 16 KiB.
const RECEIVE_BYTES: usize = 64 << 10;

/// One connection.
#[derive(Debug)]
pub(crate) struct TlsStream {
    stream: TcpStream,
    session: Mutex<ServerConnection>,
    sending: Mutex<()>,
    /// With the reader while it reads.
    incoming: Mutex<Incoming>,
}

/// What came and is not decrypted yet.
#[derive(Debug, Default)]
struct Incoming {
    bytes: Vec<u8>,
    used: usize,
    end: usize,
    /// Whether the other side said that nothing more comes, although its connection may stay.
    closed: bool,
}

impl TlsStream {
    /// Takes over a connection; its first reads shake hands.
    pub(crate) fn new(stream: TcpStream, config: &Arc<ServerConfig>) -> io::Result<Self> {
        let mut session = ServerConnection::new(Arc::clone(config)).map_err(io::Error::other)?;
        // What is written is at most one message at a time.
        session.set_buffer_limit(None);
        Ok(Self {
            stream,
            session: Mutex::new(session),
            sending: Mutex::default(),
            incoming: Mutex::default(),
        })
    }

    pub(crate) fn tcp(&self) -> &TcpStream {
        &self.stream
    }

    /// One wait for the network at most: `Interrupted` when what came is no whole record yet, so that the caller looks at
    /// its deadline.
    pub(crate) fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        let mut incoming = std::mem::take(&mut *lock(&self.incoming));
        let result = self.read_with(&mut incoming, buf);
        *lock(&self.incoming) = incoming;
        result
    }

    fn read_with(&self, incoming: &mut Incoming, buf: &mut [u8]) -> io::Result<usize> {
        let count = self.decrypt(incoming, buf)?;
        if count > 0 || incoming.closed {
            return Ok(count);
        }
        incoming.bytes.resize(RECEIVE_BYTES, 0);
        let received = (&self.stream).read(&mut incoming.bytes)?;
        if received == 0 {
            // Cut off or closed: whether a message is whole shows in the message.
            return Ok(0);
        }
        (incoming.used, incoming.end) = (0, received);
        match self.decrypt(incoming, buf)? {
            0 if !incoming.closed => Err(io::ErrorKind::Interrupted.into()),
            count => Ok(count),
        }
    }

    /// Decrypts into `buf` until that is full or what came is used up.
    fn decrypt(&self, incoming: &mut Incoming, buf: &mut [u8]) -> io::Result<usize> {
        let mut session = lock(&self.session);
        let mut done = 0;
        let failed = loop {
            done += match session.reader().read(buf.get_mut(done..).unwrap_or_default()) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                Err(error) => return Err(error),
            };
            let mut rest = incoming.bytes.get(incoming.used..incoming.end).unwrap_or_default();
            if done == buf.len() || rest.is_empty() {
                break None;
            }
            let taken = session.read_tls(&mut rest)?;
            incoming.used += taken;
            match session.process_new_packets() {
                Ok(state) => incoming.closed = state.peer_has_closed(),
                Err(error) => break Some(error),
            }
            if taken == 0 {
                break None;
            }
        };
        let has_answer = session.wants_write();
        drop(session);
        // The handshake's part, or what is wrong: then the reason counts, and not whether the other side still hears it.
        let answered = if has_answer { self.write(&[]) } else { Ok(0) };
        match failed {
            Some(error) => Err(daemon::tls::why_no_agent(&error)),
            None => answered.map(|_| done),
        }
    }

    pub(crate) fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let _turn = lock(&self.sending);
        let mut out = Vec::new();
        let mut session = lock(&self.session);
        session.writer().write_all(bytes)?;
        while session.wants_write() {
            session.write_tls(&mut out)?;
        }
        drop(session);
        (&self.stream).write_all(&out)?;
        Ok(bytes.len())
    }
}

/// A panic while a lock was held ends the thread and with it the connection.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
