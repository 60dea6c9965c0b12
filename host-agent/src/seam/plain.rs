//! A connection (TCP or Unix) driven by plain system calls, for kernels and containers that refuse io_uring.

use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;

use super::batch::SendBatch;
use crate::limits::RECV_BYTES;
use crate::socket::Socket;

/// The connection. One send at a time; receiving goes on always.
#[derive(Debug)]
pub struct PlainLink {
    socket: Socket,
    wake: Arc<EventFd>,
    sending: Option<SendBatch>,
    buffer: Box<[u8]>,
}

impl PlainLink {
    /// Takes over a connected socket.
    ///
    /// # Errors
    /// When the socket cannot be made non-blocking.
    pub fn new(socket: Socket, wake: Arc<EventFd>) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self { socket, wake, sending: None, buffer: vec![0; RECV_BYTES].into_boxed_slice() })
    }

    /// Whether a send is under way.
    #[must_use]
    pub fn is_sending(&self) -> bool {
        self.sending.is_some()
    }

    /// Starts a send.
    ///
    /// # Panics
    /// When one is under way.
    pub fn start_send(&mut self, batch: SendBatch) {
        assert!(self.sending.is_none(), "one send at a time");
        self.sending = Some(batch);
    }

    /// Moves bytes both ways; returns when something happened: a send finished, bytes came (appended to `received`),
    /// the wake descriptor fired or `timeout` passed.
    ///
    /// # Errors
    /// What ended the connection.
    pub fn wait(&mut self, timeout: Duration, received: &mut Vec<u8>) -> io::Result<()> {
        let was_sending = self.is_sending();
        self.push_out()?;
        if was_sending && !self.is_sending() {
            return self.pull_in(received);
        }
        let out = if self.sending.is_some() { PollFlags::POLLOUT } else { PollFlags::empty() };
        let mut fds = [
            PollFd::new(self.socket.as_fd(), PollFlags::POLLIN | out),
            PollFd::new(self.wake.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, poll_timeout(timeout)) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        self.push_out()?;
        self.pull_in(received)
    }

    fn push_out(&mut self) -> io::Result<()> {
        while let Some(batch) = &mut self.sending {
            if batch.is_done() {
                self.sending = None;
                return Ok(());
            }
            let message = batch.message();
            // SAFETY: `message` and everything it points to belong to `batch`, which outlives this call.
            let sent = unsafe { libc::sendmsg(self.socket.as_fd().as_raw_fd(), message, libc::MSG_NOSIGNAL) };
            match usize::try_from(sent) {
                Ok(count) => batch.advance(count),
                Err(_) => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
            }
        }
        Ok(())
    }

    fn pull_in(&mut self, received: &mut Vec<u8>) -> io::Result<()> {
        match self.socket.read(&mut self.buffer) {
            Ok(0) => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed the connection")),
            Ok(count) => {
                received.extend_from_slice(self.buffer.get(..count).unwrap_or(&self.buffer));
                Ok(())
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}

/// A poll timeout, rounded up to milliseconds so that a short wait is no busy loop.
pub(crate) fn poll_timeout(timeout: Duration) -> PollTimeout {
    let ms = timeout.as_nanos().div_ceil(1_000_000);
    PollTimeout::try_from(i32::try_from(ms).unwrap_or(i32::MAX)).unwrap_or(PollTimeout::MAX)
}
