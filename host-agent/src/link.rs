//! The connection to the server: io_uring where the kernel has it, plain calls where it refuses; over TCP encrypted if that
//! is asked for, before the one drives and after the other.

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::eventfd::EventFd;
use rustls::ClientConnection;

use crate::seam::batch::SendBatch;
use crate::seam::plain::PlainLink;
use crate::seam::uring::UringLink;
use crate::socket::Connected;

/// A connection with one send at a time and receiving always on.
pub struct Link {
    driver: Driver,
    tls: Option<Tls>,
}

enum Driver {
    /// (Boxed: it is much larger than the other.)
    Uring(Box<UringLink>),
    Plain(PlainLink),
}

struct Tls {
    session: Box<ClientConnection>,
    /// What came in one wait.
    received: Vec<u8>,
}

impl Link {
    /// Takes over a connection.
    ///
    /// # Errors
    /// When the socket cannot be made non-blocking, for plain calls.
    pub fn new(connected: Connected, wake: Arc<EventFd>, no_io_uring: bool) -> io::Result<Self> {
        let Connected { socket, tls } = connected;
        let tls = tls.map(|session| Tls { session, received: Vec::new() });
        if no_io_uring {
            return Ok(Self { driver: Driver::Plain(PlainLink::new(socket, wake)?), tls });
        }
        let driver = match UringLink::new(socket, Arc::clone(&wake)) {
            Ok(link) => Driver::Uring(Box::new(link)),
            Err((socket, error)) => {
                tracing::info!(%error, "io_uring is not to be had here; using plain system calls");
                Driver::Plain(PlainLink::new(socket, wake)?)
            }
        };
        Ok(Self { driver, tls })
    }

    /// How it is driven, for logs and tests.
    #[must_use]
    pub fn driver(&self) -> &'static str {
        match self.driver {
            Driver::Uring(_) => "io_uring",
            Driver::Plain(_) => "plain",
        }
    }

    /// Whether it is encrypted.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        self.tls.is_some()
    }

    /// Whether a send is under way.
    #[must_use]
    pub fn is_sending(&self) -> bool {
        match &self.driver {
            Driver::Uring(link) => link.is_sending(),
            Driver::Plain(link) => link.is_sending(),
        }
    }

    /// Starts a send.
    ///
    /// # Errors
    /// When it cannot be encrypted; the connection must be closed.
    ///
    /// # Panics
    /// When one is under way.
    pub fn start_send(&mut self, batch: SendBatch) -> io::Result<()> {
        let batch = match &mut self.tls {
            Some(tls) => tls.encrypt(&batch)?,
            None => batch,
        };
        match &mut self.driver {
            Driver::Uring(link) => link.start_send(batch),
            Driver::Plain(link) => link.start_send(batch),
        }
        Ok(())
    }

    /// Waits until something happened; see [`UringLink::wait`].
    ///
    /// # Errors
    /// What ended the connection.
    pub fn wait(&mut self, timeout: Duration, received: &mut Vec<u8>) -> io::Result<()> {
        let raw = self.tls.as_mut().map_or(&mut *received, |tls| &mut tls.received);
        match &mut self.driver {
            Driver::Uring(link) => link.wait(timeout, raw)?,
            Driver::Plain(link) => link.wait(timeout, raw)?,
        }
        self.tls.as_mut().map_or(Ok(()), |tls| tls.decrypt(received))
    }
}

impl Tls {
    /// What is sent instead of a batch. What TLS itself has to say goes along.
    fn encrypt(&mut self, batch: &SendBatch) -> io::Result<SendBatch> {
        let plain = batch.copy_out();
        self.session.writer().write_all(&plain)?;
        let mut sealed = Vec::with_capacity(plain.len() + plain.len() / 256 + 256);
        while self.session.wants_write() {
            self.session.write_tls(&mut sealed)?;
        }
        let mut batch = SendBatch::default();
        batch.push_bytes(sealed);
        Ok(batch)
    }

    fn decrypt(&mut self, to: &mut Vec<u8>) -> io::Result<()> {
        let mut rest = &self.received[..];
        while !rest.is_empty() {
            self.session.read_tls(&mut rest)?;
            let state = self.session.process_new_packets();
            let state = state.map_err(|error| daemon::tls::why_no_server(&error))?;
            let (at, count) = (to.len(), state.plaintext_bytes_to_read());
            to.resize(at + count, 0);
            self.session.reader().read_exact(to.get_mut(at..).unwrap_or_default())?;
            if state.peer_has_closed() {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed the connection"));
            }
        }
        self.received.clear();
        Ok(())
    }
}
