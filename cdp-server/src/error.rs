//! The crate's one error type.

use std::io;
use std::path::PathBuf;

use journal_format::FormatError;

/// Why the server could not start, or a part of it could not go on.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The configuration makes no sense.
    #[error("{0}")]
    Config(String),
    /// An operation on a file or socket failed.
    #[error("{operation} {subject}: {source}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        subject: String,
        /// What the system says.
        source: io::Error,
    },
    /// The Unix socket for agents cannot be had.
    #[error("socket {path}: {detail}", path = path.display())]
    Socket {
        /// Where it should be.
        path: PathBuf,
        /// What is wrong and what to do.
        detail: String,
    },
    /// The catalog cannot be used.
    #[error("catalog {path}: {detail}", path = path.display())]
    Catalog {
        /// The catalog's file.
        path: PathBuf,
        /// What is wrong and what to do.
        detail: String,
    },
    /// An operation on the open catalog failed.
    #[error("catalog: {0}")]
    Sqlite(#[from] rusqlite::Error),
    /// The store failed.
    #[error("store: {0}")]
    Store(#[from] journal_store::StoreError),
    /// A peer sent bytes that are no message.
    #[error("protocol: {0}")]
    Format(#[from] FormatError),
    /// A peer broke the rules of the conversation.
    #[error("protocol: {0}")]
    Protocol(String),
    /// The server is stopping.
    #[error("the server is stopping")]
    Stopping,
}

impl daemon::Fatal for ServerError {
    fn is_usage(&self) -> bool {
        matches!(self, Self::Config(_))
    }

    fn hint(&self) -> String {
        let hint = match self {
            Self::Io { operation: LISTEN, source, .. } => match source.kind() {
                io::ErrorKind::AddrInUse => {
                    "another program has that port (ss -ltnp shows which; perhaps a cdp-server that still runs): stop it, or \
                     give another --listen (for agents) or --http (for REST)"
                }
                io::ErrorKind::AddrNotAvailable => {
                    "this host has no such address (ip addr shows those it has; 0.0.0.0 and [::] take all)"
                }
                io::ErrorKind::PermissionDenied => {
                    "ports below 1024 are for root: give another --listen or --http"
                }
                _ => daemon::advice(source),
            },
            Self::Io { source, .. } | Self::Store(journal_store::StoreError::Io { source, .. }) => {
                daemon::advice(source)
            }
            _ => "",
        };
        hint.to_owned()
    }
}

/// What a server does with its two addresses.
pub(crate) const LISTEN: &str = "listen on";

impl ServerError {
    pub(crate) fn io(operation: &'static str, subject: impl Into<String>, source: io::Error) -> Self {
        Self::Io { operation, subject: subject.into(), source }
    }
}
