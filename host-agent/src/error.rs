//! The crate's one error type.

use std::io;
use std::path::PathBuf;

use journal_format::FormatError;

/// Why the agent, or a part of it, could not do something.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// A setting that makes no sense.
    #[error("configuration: {setting}: {detail}")]
    Config {
        /// Name of the setting.
        setting: &'static str,
        /// What is wrong and what to do.
        detail: String,
    },
    /// The control socket cannot be opened.
    #[error("control socket {}: {detail}", path.display())]
    Socket {
        /// Where it should be.
        path: PathBuf,
        /// What is wrong and what to do.
        detail: String,
    },
    /// The operating system refused something.
    #[error("{what}: {source}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// Its answer.
        source: io::Error,
    },
    /// The server sent something that is no message of the protocol.
    #[error("the server's stream: {0}")]
    Format(#[from] FormatError),
    /// The server sent a message that it may not send.
    #[error("the server broke the protocol: {0}")]
    Protocol(String),
    /// A filter broke the rules of the control socket, or cannot be reached.
    #[error("filter: {0}")]
    Filter(String),
    /// A capture ring could not be made, or what QEMU wrote into it is no ring any more.
    #[error("capture ring: {0}")]
    Ring(String),
}

impl daemon::Fatal for AgentError {
    fn is_usage(&self) -> bool {
        matches!(self, Self::Config { .. })
    }

    fn hint(&self) -> String {
        match self {
            Self::Os { source, .. } => daemon::advice(source).to_owned(),
            _ => String::new(),
        }
    }
}

impl AgentError {
    /// Wraps an answer of the operating system.
    pub fn os(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Os { what, source }
    }

    /// Wraps an errno.
    pub fn errno(what: &'static str) -> impl FnOnce(nix::Error) -> Self {
        move |errno| Self::Os { what, source: errno.into() }
    }
}
