//! A connection (TCP or Unix) driven by io_uring: sends go out straight from the outbox's memory.
//!
//! Three operations are in flight at most: one `sendmsg`, one `recv`, one poll of the wake descriptor. The kernel owns
//! the send's batch and the receive buffer until their completions; dropping the link shuts the socket down and waits
//! for them.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, squeue};
use nix::sys::eventfd::EventFd;

use super::batch::SendBatch;
use crate::limits::RECV_BYTES;
use crate::socket::Socket;

const SEND: u64 = 1;
const RECV: u64 = 2;
const WAKE: u64 = 3;

/// How long a dropped link waits for the kernel to give its buffers back before it leaks them.
const TEARDOWN: Duration = Duration::from_secs(5);

/// The connection. One send at a time; receiving goes on always.
pub struct UringLink {
    ring: IoUring,
    socket: Socket,
    wake: Arc<EventFd>,
    /// Owned by the kernel while `send_in_flight`.
    sending: Option<SendBatch>,
    send_in_flight: bool,
    /// Owned by the kernel while `recv_in_flight`.
    buffer: Box<[u8]>,
    recv_in_flight: bool,
    wake_in_flight: bool,
    broken: Option<io::Error>,
}

impl UringLink {
    /// Makes a ring for a connected, blocking socket. On failure the socket is given back, for plain calls.
    ///
    /// # Errors
    /// The socket, and why: `EPERM` or `ENOSYS` where io_uring is switched off, `ENOTSUP` on kernels before 5.11.
    pub fn new(socket: Socket, wake: Arc<EventFd>) -> Result<Self, (Socket, io::Error)> {
        let ring = match IoUring::new(8) {
            Ok(ring) if ring.params().is_feature_ext_arg() => ring,
            Ok(_) => return Err((socket, io::Error::from_raw_os_error(libc::ENOTSUP))),
            Err(error) => return Err((socket, error)),
        };
        Ok(Self {
            ring,
            socket,
            wake,
            sending: None,
            send_in_flight: false,
            buffer: vec![0; RECV_BYTES].into_boxed_slice(),
            recv_in_flight: false,
            wake_in_flight: false,
            broken: None,
        })
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
        self.arm()?;
        self.enter(timeout)?;
        self.reap(received);
        self.broken.take().map_or(Ok(()), Err)
    }

    fn arm(&mut self) -> io::Result<()> {
        let fd = Fd(self.socket.as_fd().as_raw_fd());
        if !self.recv_in_flight {
            let len = u32::try_from(self.buffer.len()).unwrap_or(u32::MAX);
            let entry = opcode::Recv::new(fd, self.buffer.as_mut_ptr(), len).build().user_data(RECV);
            self.push(&entry)?;
            self.recv_in_flight = true;
        }
        if !self.wake_in_flight {
            let events = u32::try_from(libc::POLLIN).unwrap_or(1);
            let entry = opcode::PollAdd::new(Fd(self.wake.as_raw_fd()), events).build().user_data(WAKE);
            self.push(&entry)?;
            self.wake_in_flight = true;
        }
        if !self.send_in_flight
            && let Some(batch) = &mut self.sending
        {
            let flags = u32::try_from(libc::MSG_NOSIGNAL | libc::MSG_WAITALL).unwrap_or(0);
            let entry = opcode::SendMsg::new(fd, batch.message()).flags(flags).build().user_data(SEND);
            self.push(&entry)?;
            self.send_in_flight = true;
        }
        Ok(())
    }

    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        // SAFETY: the entry's pointers stay valid until its completion: the receive buffer and the batch are fields
        // that are neither moved off the heap nor touched while their `*_in_flight` flag is set, the descriptors are
        // open for as long as the link lives, and `drop` waits for the completions before it frees anything.
        unsafe { self.ring.submission().push(entry) }.map_err(io::Error::other)
    }

    fn enter(&self, timeout: Duration) -> io::Result<()> {
        let time = Timespec::from(timeout);
        let args = SubmitArgs::new().timespec(&time);
        match self.ring.submitter().submit_with_args(1, &args) {
            Ok(_) => Ok(()),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ETIME | libc::EINTR | libc::EBUSY)) => {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn reap(&mut self, received: &mut Vec<u8>) {
        loop {
            let Some(entry) = self.ring.completion().next() else { return };
            let result = usize::try_from(entry.result());
            let error = || io::Error::from_raw_os_error(entry.result().saturating_neg());
            match entry.user_data() {
                SEND => {
                    self.send_in_flight = false;
                    self.finish_send(result.map_err(|_| error()));
                }
                RECV => {
                    self.recv_in_flight = false;
                    self.finish_recv(result.map_err(|_| error()), received);
                }
                _ => self.wake_in_flight = false,
            }
        }
    }

    fn finish_send(&mut self, result: io::Result<usize>) {
        let Some(batch) = &mut self.sending else { return };
        match result {
            Ok(count) => {
                batch.advance(count);
                if batch.is_done() {
                    self.sending = None;
                }
            }
            Err(error) => self.fail(error),
        }
    }

    fn finish_recv(&mut self, result: io::Result<usize>, received: &mut Vec<u8>) {
        match result {
            Ok(0) => {
                self.fail(io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed the connection"));
            }
            Ok(count) => received.extend_from_slice(self.buffer.get(..count).unwrap_or(&self.buffer)),
            Err(error) => self.fail(error),
        }
    }

    fn fail(&mut self, error: io::Error) {
        let passing = matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock);
        if !passing && self.broken.is_none() {
            self.broken = Some(error);
        }
    }
}

impl Drop for UringLink {
    fn drop(&mut self) {
        self.socket.shutdown();
        let end = Instant::now() + TEARDOWN;
        let mut rest = Vec::new();
        while (self.send_in_flight || self.recv_in_flight) && Instant::now() < end {
            if self.enter(Duration::from_millis(50)).is_err() {
                break;
            }
            self.reap(&mut rest);
        }
        if self.send_in_flight || self.recv_in_flight {
            // The kernel may still use them, so they are never freed.
            core::mem::forget(self.sending.take());
            core::mem::forget(core::mem::take(&mut self.buffer));
            tracing::error!("io_uring did not give two buffers back; they are leaked");
        }
    }
}
