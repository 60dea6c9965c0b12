//! The socket: whole messages with their descriptors. Everything here may block.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::time::Duration;

use nix::cmsg_space;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::{PeerCredentials, SendTimeout};
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    accept4, bind, connect, getsockopt, listen, recvmsg, sendmsg, setsockopt, socket, socketpair,
};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::control::{CaptureFds, DiskInfo, Fds, Message, Received, decode, encode};
use crate::error::{RingError, RingErrorKind};
use crate::limits::MAX_MESSAGE_BYTES;
use crate::raw::own;
use journal_format::ImageTag;

/// A peer that does not read for this long is given up.
const SEND_TIMEOUT_S: i64 = 5;
/// Most descriptors that the kernel lets anyone send in one message (`SCM_MAX_FD`): room for all of them, so that
/// what a hostile peer sends is received, owned and closed rather than leaked.
const KERNEL_MAX_FDS: usize = 253;

/// The agent's listening socket.
#[derive(Debug)]
pub struct Listener(OwnedFd);

impl Listener {
    /// Listens at `path`; a socket left there by an agent that died is replaced. The caller makes the folder and
    /// decides who may enter it.
    ///
    /// # Errors
    /// `Os` when the path cannot be bound; also when something lies there that is no socket, which is left alone.
    pub fn bind(path: &Path) -> Result<Self, RingError> {
        let address =
            UnixAddr::new(path).map_err(|e| RingError::os("the control socket's path is no good", e))?;
        if connect_to(&address).is_ok() {
            return Err(RingError::os("another agent listens on the control socket", Errno::EADDRINUSE));
        }
        if std::fs::symlink_metadata(path).is_ok_and(|found| !found.file_type().is_socket()) {
            let what =
                "what lies at the control socket's path is no socket: name another path, or move it away";
            return Err(RingError::os(what, Errno::EEXIST));
        }
        let _ = nix::unistd::unlink(path);
        let fd = new_socket()?;
        bind(fd.as_raw_fd(), &address).map_err(|e| RingError::os("cannot bind the control socket", e))?;
        listen(&fd, Backlog::MAXCONN).map_err(|e| RingError::os("cannot listen on the control socket", e))?;
        Ok(Self(fd))
    }

    /// Waits for the next filter.
    ///
    /// # Errors
    /// `Os` when no more connections can be accepted.
    pub fn accept(&self) -> Result<Connection, RingError> {
        let fd = loop {
            match accept4(self.0.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
                Err(Errno::EINTR | Errno::ECONNABORTED) => {}
                other => break other.map_err(|e| RingError::os("cannot accept on the control socket", e))?,
            }
        };
        Connection::over(own(fd))
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// One connection between a filter and the agent.
#[derive(Debug)]
pub struct Connection(OwnedFd);

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn new_socket() -> Result<OwnedFd, RingError> {
    socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)
        .map_err(|e| RingError::os("cannot make a control socket", e))
}

fn connect_to(address: &UnixAddr) -> Result<OwnedFd, RingError> {
    let fd = new_socket()?;
    connect(fd.as_raw_fd(), address)
        .map_err(|e| RingError::os("no agent listens on the control socket", e))?;
    Ok(fd)
}

impl Connection {
    /// Connects to the agent at `path`.
    ///
    /// # Errors
    /// `Os` when no agent listens there.
    pub fn connect(path: &Path) -> Result<Self, RingError> {
        let address =
            UnixAddr::new(path).map_err(|e| RingError::os("the control socket's path is no good", e))?;
        Self::over(connect_to(&address)?)
    }

    /// Two connected ends in one process.
    ///
    /// # Errors
    /// `Os` when the kernel refuses the sockets.
    pub fn pair() -> Result<(Self, Self), RingError> {
        let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC);
        let (one, other) = pair.map_err(|e| RingError::os("cannot make a pair of control sockets", e))?;
        Ok((Self::over(one)?, Self::over(other)?))
    }

    fn over(fd: OwnedFd) -> Result<Self, RingError> {
        setsockopt(&fd, SendTimeout, &TimeVal::seconds(SEND_TIMEOUT_S))
            .map_err(|e| RingError::os("cannot set up the control socket", e))?;
        Ok(Self(fd))
    }

    /// Process and user id of the peer, as the kernel knows them.
    ///
    /// # Errors
    /// `Os` when the kernel does not say.
    pub fn peer(&self) -> Result<(i32, u32), RingError> {
        let credentials = getsockopt(&self.0, PeerCredentials);
        let credentials =
            credentials.map_err(|e| RingError::os("cannot ask for the peer's credentials", e))?;
        Ok((credentials.pid(), credentials.uid()))
    }

    /// Sends a message without descriptors. Waits up to 5 s for the peer to make room.
    ///
    /// # Errors
    /// `Message` when it is over a limit (nothing was sent), `Closed` or `Os` when the connection is no more good.
    pub fn send(&self, message: &Message) -> Result<(), RingError> {
        self.send_with(message, &[])
    }

    /// Sends a whole list of disks, in as many messages as it needs.
    ///
    /// # Errors
    /// As [`Connection::send`].
    pub fn send_disks(&self, disks: &[DiskInfo]) -> Result<(), RingError> {
        // A disk takes at most 503 bytes, so a hundred fit with room to spare.
        let mut parts = disks.chunks(100).peekable();
        if parts.peek().is_none() {
            return self.send(&Message::Disks { disks: Vec::new(), more: false });
        }
        while let Some(part) = parts.next() {
            self.send(&Message::Disks { disks: part.to_vec(), more: parts.peek().is_some() })?;
        }
        Ok(())
    }

    /// Sends [`Message::Attach`] with the descriptors of a capture.
    ///
    /// # Errors
    /// As [`Connection::send`].
    pub fn send_attach(
        &self,
        request: u64,
        device: &str,
        image: Option<ImageTag>,
        fds: &CaptureFds,
    ) -> Result<(), RingError> {
        self.send_with(&Message::Attach { request, device: device.to_owned(), image }, &fds.raw())
    }

    /// Sends [`Message::Held`] with the descriptors that came with an attach.
    ///
    /// # Errors
    /// As [`Connection::send`].
    pub fn send_held(&self, device: &str, ended: bool, fds: &CaptureFds) -> Result<(), RingError> {
        self.send_with(&Message::Held { device: device.to_owned(), ended }, &fds.raw())
    }

    /// Sends [`Message::Hold`] with an outbox.
    ///
    /// # Errors
    /// As [`Connection::send`].
    pub fn send_hold(&self, request: u64, device: &str, outbox: BorrowedFd<'_>) -> Result<(), RingError> {
        self.send_with(&Message::Hold { request, device: device.to_owned() }, &[outbox.as_raw_fd()])
    }

    fn send_with(&self, message: &Message, fds: &[i32]) -> Result<(), RingError> {
        let bytes = encode(message)?;
        let rights = [ControlMessage::ScmRights(fds)];
        let rights = if fds.is_empty() { &[] } else { &rights[..] };
        loop {
            let sent = sendmsg::<()>(
                self.0.as_raw_fd(),
                &[IoSlice::new(&bytes)],
                rights,
                MsgFlags::MSG_NOSIGNAL,
                None,
            );
            match sent {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(Errno::EPIPE | Errno::ECONNRESET) => return Err(closed()),
                Err(e) => return Err(RingError::os("cannot send on the control socket", e)),
            }
        }
    }

    /// Waits for the next message. `None` when `timeout` (no limit if absent) passed without one.
    ///
    /// # Errors
    /// `Closed` when the peer is gone, `Message` when it broke the protocol, `Os` otherwise. The connection is then
    /// of no more use.
    pub fn recv(&self, timeout: Option<Duration>) -> Result<Option<Received>, RingError> {
        if let Some(timeout) = timeout
            && !self.wait_readable(timeout)?
        {
            return Ok(None);
        }
        let mut bytes = vec![0_u8; MAX_MESSAGE_BYTES];
        let (length, flags, fds) = self.recv_raw(&mut bytes)?;
        if length == 0 {
            return Err(closed());
        }
        if flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) {
            return Err(RingError::new(RingErrorKind::Message, "a control message is longer than 64 KiB"));
        }
        let message = decode(bytes.get(..length).unwrap_or(&[]))?;
        let fds = sorted(&message, fds)?;
        Ok(Some(Received { message, fds }))
    }

    fn wait_readable(&self, timeout: Duration) -> Result<bool, RingError> {
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Ok(ready) => Ok(ready > 0),
            Err(Errno::EINTR) => Ok(false),
            Err(e) => Err(RingError::os("cannot wait on the control socket", e)),
        }
    }

    /// One `recvmsg`; every descriptor that arrived is owned by the result.
    fn recv_raw(&self, bytes: &mut [u8]) -> Result<(usize, MsgFlags, Vec<OwnedFd>), RingError> {
        let mut space = cmsg_space!([i32; KERNEL_MAX_FDS]);
        loop {
            let mut parts = [IoSliceMut::new(bytes)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let received = match recvmsg::<()>(self.0.as_raw_fd(), &mut parts, Some(&mut space), flags) {
                Err(Errno::EINTR) => continue,
                Err(Errno::ECONNRESET) => return Err(closed()),
                other => other.map_err(|e| RingError::os("cannot receive on the control socket", e))?,
            };
            let mut fds = Vec::new();
            let messages =
                received.cmsgs().map_err(|e| RingError::os("cannot read a message's descriptors", e))?;
            for message in messages {
                if let ControlMessageOwned::ScmRights(raw) = message {
                    fds.extend(raw.into_iter().map(own));
                }
            }
            return Ok((received.bytes, received.flags, fds));
        }
    }
}

impl CaptureFds {
    fn raw(&self) -> [i32; 4] {
        [&self.ring, &self.clock, &self.bell, &self.outbox].map(AsRawFd::as_raw_fd)
    }
}

/// The descriptors that a message brings, exactly as many as its kind needs.
fn sorted(message: &Message, fds: Vec<OwnedFd>) -> Result<Fds, RingError> {
    let wrong = RingError::new(RingErrorKind::Message, "a control message has a wrong number of descriptors");
    match message {
        Message::Attach { .. } | Message::Held { .. } => match <[OwnedFd; 4]>::try_from(fds) {
            Ok([ring, clock, bell, outbox]) => Ok(Fds::Capture(CaptureFds { ring, clock, bell, outbox })),
            Err(_) => Err(wrong),
        },
        Message::Hold { .. } => match <[OwnedFd; 1]>::try_from(fds) {
            Ok([outbox]) => Ok(Fds::Outbox(outbox)),
            Err(_) => Err(wrong),
        },
        _ if fds.is_empty() => Ok(Fds::None),
        _ => Err(wrong),
    }
}

const fn closed() -> RingError {
    RingError::new(RingErrorKind::Closed, "the peer closed the control connection")
}
