//! Where agents connect: a TCP port, with TLS or without, and a Unix socket if one is asked for.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket};
use nix::sys::stat::{Mode, fchmod};
use rustls::ServerConfig;

use crate::data::socket::Socket;
use crate::data::tls::TlsStream;
use crate::error::{LISTEN, ServerError};

/// Where agents connect.
#[derive(Debug)]
pub(crate) enum Listener {
    Tcp { listener: TcpListener, tls: Option<Arc<ServerConfig>> },
    Unix { listener: UnixListener, _place: Place },
}

impl Listener {
    /// Listens on an address, for TLS alone where that is set up; port 0 takes a free one.
    pub(crate) fn tcp(
        address: SocketAddr,
        tls: Option<Arc<ServerConfig>>,
    ) -> Result<(Self, SocketAddr), ServerError> {
        let io = |e| ServerError::io(LISTEN, address.to_string(), e);
        let listener = TcpListener::bind(address).map_err(io)?;
        let address = listener.local_addr().map_err(io)?;
        Ok((Self::Tcp { listener, tls }, address))
    }

    /// Listens on a socket file, which only this process's user (and root) may use. One that a dead server left is
    /// replaced; nothing else is.
    pub(crate) fn unix(path: &Path) -> Result<Self, ServerError> {
        let fail = |detail: String| ServerError::Socket { path: path.to_owned(), detail };
        let lock = lock(path).map_err(fail)?;
        remove_stale(path).map_err(fail)?;
        let listener = bind_private(path).map_err(|errno| {
            let error = io::Error::from(errno);
            let advice = match (errno, daemon::advice(&error)) {
                (Errno::ENOENT, _) => "make its folder first",
                (_, "") => "give another --listen-unix",
                (_, advice) => advice,
            };
            fail(format!("cannot listen: {error}; {advice}"))
        })?;
        Ok(Self::Unix { listener, _place: Place { path: path.to_owned(), inode: inode(path), _lock: lock } })
    }

    /// Waits for the next connection; an error when there is none to be had now, or after [`Listener::close`].
    pub(crate) fn accept(&self) -> io::Result<Socket> {
        match self {
            Self::Tcp { listener, tls } => {
                let (stream, _) = listener.accept()?;
                match tls {
                    Some(config) => TlsStream::new(stream, config).map(Box::new).map(Socket::Tls),
                    None => Ok(Socket::Tcp(stream)),
                }
            }
            Self::Unix { listener, .. } => listener.accept().map(|(stream, _)| Socket::Unix(stream)),
        }
    }

    /// Takes no more connections, and wakes whoever waits for one.
    pub(crate) fn close(&self) {
        let _ = nix::sys::socket::shutdown(self.as_fd().as_raw_fd(), nix::sys::socket::Shutdown::Both);
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp { listener, .. } => listener.as_fd(),
            Self::Unix { listener, .. } => listener.as_fd(),
        }
    }
}

/// A socket's file, which goes with it.
#[derive(Debug)]
pub(crate) struct Place {
    path: PathBuf,
    /// Which file it is: meanwhile somebody may have taken it away and put another there.
    inode: Option<(u64, u64)>,
    /// Held while this server lives, however it ends.
    _lock: File,
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.inode.is_some() && inode(&self.path) == self.inode {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Takes the lock beside the socket: of two servers that start at once, one would remove the other's socket.
fn lock(socket: &Path) -> Result<File, String> {
    let mut path = socket.as_os_str().to_owned();
    path.push(".lock");
    let path = PathBuf::from(path);
    let cannot = |error: io::Error| {
        let advice = match error.kind() {
            io::ErrorKind::NotFound => "make its folder first",
            _ => daemon::advice(&error),
        };
        format!("cannot lock {}: {error}; {advice}", path.display())
    };
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
    let file = file.map_err(cannot)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            Err("another cdp-server listens there: stop it, or give this one another --listen-unix"
                .to_owned())
        }
        Err(TryLockError::Error(error)) => Err(cannot(error)),
    }
}

/// Device and number of what has that name.
fn inode(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|found| (found.dev(), found.ino()))
}

fn is_socket(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket())
}

/// Makes way for a new socket where an old one has nobody behind it.
fn remove_stale(path: &Path) -> Result<(), String> {
    if !is_socket(path) {
        return match fs::symlink_metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(format!("cannot look at it: {error}; {}", daemon::advice(&error))),
            Ok(_) => {
                Err("what lies there is no socket: give another --listen-unix, or move it away".to_owned())
            }
        };
    }
    match try_connect(path) {
        Err(Errno::ECONNREFUSED) => fs::remove_file(path).map_err(|error| {
            format!("cannot remove what a dead server left: {error}; {}", daemon::advice(&error))
        }),
        // It is there, and busy or of another type.
        Ok(()) | Err(Errno::EAGAIN | Errno::EPROTOTYPE) => {
            Err("another program listens there: stop it, or give another --listen-unix".to_owned())
        }
        Err(errno) => Err(format!(
            "cannot see whether somebody listens there: {}; give another --listen-unix, or remove it",
            io::Error::from(errno)
        )),
    }
}

/// Without waiting: a program that is stopped may have its queue of connections full.
fn try_connect(path: &Path) -> Result<(), Errno> {
    let fd = new_socket(SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?;
    connect(fd.as_raw_fd(), &UnixAddr::new(path)?)
}

fn bind_private(path: &Path) -> Result<UnixListener, Errno> {
    let fd = new_socket(SockFlag::SOCK_CLOEXEC)?;
    // Before the file is there: it takes over the mode, and nobody finds it with another.
    fchmod(&fd, Mode::S_IRUSR | Mode::S_IWUSR)?;
    bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&fd, Backlog::MAXCONN)?;
    Ok(UnixListener::from(fd))
}

fn new_socket(flags: SockFlag) -> Result<OwnedFd, Errno> {
    socket(AddressFamily::Unix, SockType::Stream, flags, None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::time::Duration;

    fn refused(path: &Path) -> String {
        Listener::unix(path).expect_err("refused").to_string()
    }

    #[test]
    fn only_what_a_dead_server_left_is_replaced() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("server.sock");
        drop(UnixListener::bind(&path).expect("binds"));
        assert!(path.exists(), "std leaves the file, as a kill does");
        let listener = Listener::unix(&path).expect("replaces it");
        assert_eq!(fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600);
        assert!(refused(&path).contains("another cdp-server"));
        drop(listener);
        assert!(!path.exists(), "a clean end leaves none");

        let other = UnixListener::bind(&path).expect("binds");
        assert!(refused(&path).contains("another program"));
        drop(other);
        fs::remove_file(&path).expect("the socket");
        fs::write(&path, "precious").expect("a file");
        assert!(refused(&path).contains("no socket"));
        assert_eq!(fs::read(&path).expect("there"), b"precious");
        fs::remove_file(&path).expect("the file");
        std::os::unix::fs::symlink(dir.path().join("elsewhere"), &path).expect("a link");
        assert!(refused(&path).contains("no socket"), "a dangling link is not ours either");
        assert!(refused(&dir.path().join("missing/server.sock")).contains("make its folder"));
    }

    #[test]
    fn a_socket_that_took_the_place_of_ours_stays_when_we_end() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("server.sock");
        let listener = Listener::unix(&path).expect("listens");
        fs::remove_file(&path).expect("somebody tidies up");
        let _other = UnixListener::bind(&path).expect("and another program listens there");
        drop(listener);
        assert!(path.exists());
    }

    #[test]
    fn a_closed_listener_wakes_who_waits_for_a_connection() {
        let dir = tempfile::tempdir().expect("a directory");
        let (tcp, _) = Listener::tcp("127.0.0.1:0".parse().expect("an address"), None).expect("listens");
        for listener in [tcp, Listener::unix(&dir.path().join("server.sock")).expect("listens")] {
            std::thread::scope(|scope| {
                let waiting = scope.spawn(|| listener.accept());
                std::thread::sleep(Duration::from_millis(50));
                listener.close();
                waiting.join().expect("no panic").expect_err("no connection");
            });
        }
    }
}
