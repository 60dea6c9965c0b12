//! The connection to the server: io_uring where the kernel has it, plain calls where it refuses.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::eventfd::EventFd;

use crate::seam::batch::SendBatch;
use crate::seam::plain::PlainLink;
use crate::seam::uring::UringLink;
use crate::socket::Socket;

/// A connection with one send at a time and receiving always on.
pub enum Link {
    /// Driven by io_uring. (Boxed: it is much larger than the other.)
    Uring(Box<UringLink>),
    /// Driven by plain system calls.
    Plain(PlainLink),
}

impl Link {
    /// Takes over a connected socket.
    ///
    /// # Errors
    /// When the socket cannot be made non-blocking, for plain calls.
    pub fn new(socket: Socket, wake: Arc<EventFd>, no_io_uring: bool) -> io::Result<Self> {
        if no_io_uring {
            return Ok(Self::Plain(PlainLink::new(socket, wake)?));
        }
        match UringLink::new(socket, Arc::clone(&wake)) {
            Ok(link) => Ok(Self::Uring(Box::new(link))),
            Err((socket, error)) => {
                tracing::info!(%error, "io_uring is not to be had here; using plain system calls");
                Ok(Self::Plain(PlainLink::new(socket, wake)?))
            }
        }
    }

    /// How it is driven, for logs and tests.
    #[must_use]
    pub fn driver(&self) -> &'static str {
        match self {
            Self::Uring(_) => "io_uring",
            Self::Plain(_) => "plain",
        }
    }

    /// Whether a send is under way.
    #[must_use]
    pub fn is_sending(&self) -> bool {
        match self {
            Self::Uring(link) => link.is_sending(),
            Self::Plain(link) => link.is_sending(),
        }
    }

    /// Starts a send.
    ///
    /// # Panics
    /// When one is under way.
    pub fn start_send(&mut self, batch: SendBatch) {
        match self {
            Self::Uring(link) => link.start_send(batch),
            Self::Plain(link) => link.start_send(batch),
        }
    }

    /// Waits until something happened; see [`UringLink::wait`].
    ///
    /// # Errors
    /// What ended the connection.
    pub fn wait(&mut self, timeout: Duration, received: &mut Vec<u8>) -> io::Result<()> {
        match self {
            Self::Uring(link) => link.wait(timeout, received),
            Self::Plain(link) => link.wait(timeout, received),
        }
    }
}
