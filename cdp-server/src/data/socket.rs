//! An agent's connection: TCP, with TLS or without, or a Unix socket for an agent on this host.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::data::tls::TlsStream;

/// An agent's connection.
#[derive(Debug)]
pub(crate) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
    Tls(Box<TlsStream>),
}

impl Socket {
    /// What is below TLS, if this is TCP.
    fn tcp(&self) -> Option<&TcpStream> {
        match self {
            Self::Tcp(stream) => Some(stream),
            Self::Tls(stream) => Some(stream.tcp()),
            Self::Unix(_) => None,
        }
    }

    /// The other side, for logs.
    pub(crate) fn peer(&self) -> String {
        match self.tcp() {
            Some(stream) => stream.peer_addr().map_or_else(|_| "unknown".to_owned(), |a| a.to_string()),
            None => "this host".to_owned(),
        }
    }

    /// Has small messages sent at once, and a write fail when the other side takes nothing for so long.
    pub(crate) fn set_up(&self, write_timeout: Duration) -> io::Result<()> {
        if let Some(stream) = self.tcp() {
            stream.set_nodelay(true)?;
        }
        match self {
            Self::Tcp(stream) => stream.set_write_timeout(Some(write_timeout)),
            Self::Unix(stream) => stream.set_write_timeout(Some(write_timeout)),
            Self::Tls(stream) => stream.tcp().set_write_timeout(Some(write_timeout)),
        }
    }

    /// Has a read fail when nothing comes for so long.
    pub(crate) fn set_read_timeout(&self, timeout: Duration) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.set_read_timeout(Some(timeout)),
            Self::Unix(stream) => stream.set_read_timeout(Some(timeout)),
            Self::Tls(stream) => stream.tcp().set_read_timeout(Some(timeout)),
        }
    }

    /// Ends it both ways, which wakes whoever reads or writes. One that is closed already stays so.
    pub(crate) fn cut(&self) {
        let _ = match self {
            Self::Tcp(stream) => stream.shutdown(Shutdown::Both),
            Self::Unix(stream) => stream.shutdown(Shutdown::Both),
            Self::Tls(stream) => stream.tcp().shutdown(Shutdown::Both),
        };
    }
}

impl Read for &Socket {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Socket::Tcp(stream) => { stream }.read(buf),
            Socket::Unix(stream) => { stream }.read(buf),
            Socket::Tls(stream) => stream.read(buf),
        }
    }
}

impl Write for &Socket {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Socket::Tcp(stream) => { stream }.write(buf),
            Socket::Unix(stream) => { stream }.write(buf),
            Socket::Tls(stream) => stream.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
