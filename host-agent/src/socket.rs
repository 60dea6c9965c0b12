//! Where the server is, and a socket that is connected to it: TCP, or a Unix socket where both are on one host.

use std::fmt;
use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection};

use crate::limits::MAX_SOCKET_PATH;

/// What begins the address of a Unix socket.
const UNIX: &str = "unix:";

/// The server's address.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Address {
    /// `HOST:PORT`; names are looked up anew for each connection.
    Tcp(String),
    /// The absolute path of a Unix socket, written `unix:/path`.
    Unix(PathBuf),
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some(path) = text.strip_prefix(UNIX) else {
            return match is_host_and_port(text) {
                true => Ok(Self::Tcp(text.to_owned())),
                false => Err(format!(
                    "`{text}` is not HOST:PORT, such as backup1:7411, 10.0.0.2:7411 or [fd00::2]:7411, nor unix:/PATH"
                )),
            };
        };
        if !path.starts_with('/') {
            return Err(format!("`{text}` is no absolute path: write unix:/run/qemu-cdp/server.sock"));
        }
        if path.len() > MAX_SOCKET_PATH {
            let bytes = path.len();
            return Err(format!(
                "a socket's path has at most {MAX_SOCKET_PATH} bytes, not {bytes}: have the server listen at a shorter one"
            ));
        }
        Ok(Self::Unix(path.into()))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => f.write_str(address),
            Self::Unix(path) => write!(f, "{UNIX}{}", path.display()),
        }
    }
}

/// How the server is to prove who it is, and what it is shown.
#[derive(Clone, Debug)]
pub struct Tls {
    /// Authorities and own certificate.
    pub config: Arc<ClientConfig>,
    /// Whom the server's certificate has to name.
    pub name: ServerName<'static>,
}

/// A connection to the server, after the handshake if there is one.
#[derive(Debug)]
pub struct Connected {
    /// The socket.
    pub socket: Socket,
    /// The session of a connection that is encrypted. (Boxed: it is large.)
    pub tls: Option<Box<ClientConnection>>,
}

impl Address {
    /// The host's name or address; `None` for a Unix socket.
    #[must_use]
    pub fn host(&self) -> Option<&str> {
        let Self::Tcp(address) = self else { return None };
        let (host, _) = address.rsplit_once(':')?;
        Some(host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host))
    }

    /// Connects. With `tls`, which is for TCP only, the handshake may take `timeout` too. Blocks for names that are looked up, for at most `timeout` with each address of a host, and on a Unix
    /// socket for as long as a live server's queue of new connections is full.
    ///
    /// # Errors
    /// The last address's, and what to do where that is known.
    pub fn connect(&self, timeout: Duration, tls: Option<&Tls>) -> io::Result<Connected> {
        let plain = |socket| Connected { socket, tls: None };
        match (self, tls) {
            (Self::Tcp(address), Some(tls)) => encrypted(tcp(address, timeout)?, timeout, tls),
            (Self::Tcp(address), None) => tcp(address, timeout).map(Socket::Tcp).map(plain),
            (Self::Unix(path), _) => {
                UnixStream::connect(path).map(Socket::Unix).map(plain).map_err(|error| {
                    let hint = match error.kind() {
                        io::ErrorKind::PermissionDenied => {
                            "run the agent as root or as the server's user: the socket is for these alone"
                        }
                        io::ErrorKind::NotFound => "does the server have --listen-unix with this path?",
                        _ => return error,
                    };
                    io::Error::new(error.kind(), format!("{error}; {hint}"))
                })
            }
        }
    }
}

fn tcp(address: &str, timeout: Duration) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, timeout) {
            Ok(socket) => {
                socket.set_nodelay(true)?;
                return Ok(socket);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn encrypted(stream: TcpStream, timeout: Duration, tls: &Tls) -> io::Result<Connected> {
    let session = ClientConnection::new(Arc::clone(&tls.config), tls.name.clone());
    let mut session = session.map(Box::new).map_err(io::Error::other)?;
    // What is written is at most one batch at a time.
    session.set_buffer_limit(None);
    let mut timed = Timed { stream: &stream, deadline: Instant::now() + timeout };
    session.complete_io(&mut timed).map_err(|error| handshake_error(&error))?;
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)?;
    Ok(Connected { socket: Socket::Tcp(stream), tls: Some(session) })
}

/// A socket whose reads and writes end at a deadline, however often a byte comes. That it has passed is never `WouldBlock`:
/// rustls takes that for a reason to return, with a handshake that is not over, once anything has come.
struct Timed<'a> {
    stream: &'a TcpStream,
    deadline: Instant,
}

impl Timed<'_> {
    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        // A timeout of less than a microsecond would be set as 0, which means none.
        Ok(Some(left.max(Duration::from_millis(1))))
    }
}

impl Read for Timed<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.left()?)?;
        self.stream.read(buf).map_err(timed_out)
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left()?)?;
        self.stream.write(buf).map_err(timed_out)
    }

    // rustls tries once to tell the server why it goes, after other records: all of them in one call.
    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left()?)?;
        self.stream.write_vectored(bufs).map_err(timed_out)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

fn timed_out(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::WouldBlock { io::ErrorKind::TimedOut.into() } else { error }
}

fn handshake_error(error: &io::Error) -> io::Error {
    if let Some(error) = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        return daemon::tls::why_no_server(error);
    }
    let hint = match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => {
            "has the server --tls-cert and --tls-key? Its log may say more"
        }
        io::ErrorKind::TimedOut => "the server does not answer: is it a cdp-server?",
        _ => "the server's log may say more",
    };
    io::Error::new(error.kind(), format!("TLS handshake: {error}; {hint}"))
}

fn is_host_and_port(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else { return false };
    let is_host = match host.strip_prefix('[').map(|host| host.strip_suffix(']')) {
        Some(inside) => inside.is_some_and(|host| host.parse::<std::net::Ipv6Addr>().is_ok()),
        None => !host.is_empty() && !host.contains([':', '/', ' ']),
    };
    is_host && port.parse::<u16>().is_ok_and(|port| port > 0)
}

/// A connected, blocking stream socket.
#[derive(Debug)]
pub enum Socket {
    /// Over the network, sending at once what it is given.
    Tcp(TcpStream),
    /// On this host.
    Unix(UnixStream),
}

impl Socket {
    /// As [`TcpStream::set_nonblocking`].
    ///
    /// # Errors
    /// The system's.
    pub fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        match self {
            Self::Tcp(socket) => socket.set_nonblocking(nonblocking),
            Self::Unix(socket) => socket.set_nonblocking(nonblocking),
        }
    }

    /// Ends it both ways. One that the other side has ended stays so.
    pub fn shutdown(&self) {
        let _ = match self {
            Self::Tcp(socket) => socket.shutdown(Shutdown::Both),
            Self::Unix(socket) => socket.shutdown(Shutdown::Both),
        };
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(socket) => socket.as_fd(),
            Self::Unix(socket) => socket.as_fd(),
        }
    }
}

impl Read for Socket {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(socket) => socket.read(buf),
            Self::Unix(socket) => socket.read(buf),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written_the_same_way() {
        for text in ["a:1", "10.0.0.2:7411", "[fd00::2]:7411", "unix:/run/qemu-cdp/server.sock"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        let long = format!("unix:/{}", "x".repeat(MAX_SOCKET_PATH));
        for (text, hint) in [
            ("nowhere", "HOST:PORT"),
            ("/run/qemu-cdp/server.sock", "unix:/PATH"),
            ("unix:server.sock", "unix:/run"),
            ("unix:", "unix:/run"),
            (&long, "107 bytes"),
        ] {
            let said = text.parse::<Address>().unwrap_err();
            assert!(said.contains(hint), "{text}: {said}");
        }
    }

    #[test]
    fn a_missing_socket_says_which_flag_makes_it() {
        let dir = tempfile::tempdir().unwrap();
        let address = Address::Unix(dir.path().join("missing"));
        let error = address.connect(Duration::from_secs(1), None).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(error.to_string().contains("--listen-unix"), "{error}");
    }

    #[test]
    fn a_server_that_trickles_is_given_up() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = Address::Tcp(listener.local_addr().unwrap().to_string());
        // A record of 16 KiB, a byte at a time, for as long as the agent takes it.
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(&[0x16, 3, 3, 0x40, 0]).unwrap();
            while stream.write_all(&[2]).is_ok() {
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config =
            ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let config = config.with_root_certificates(rustls::RootCertStore::empty()).with_no_client_auth();
        let tls = Tls { config: Arc::new(config), name: ServerName::try_from("localhost").unwrap() };
        let error = address.connect(Duration::from_millis(300), Some(&tls)).map(|_| ()).unwrap_err();
        assert!(error.to_string().contains("does not answer"), "{error}");
        server.join().unwrap();
    }
}
