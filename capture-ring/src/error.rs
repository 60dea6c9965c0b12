//! The crate's error type, and the one condition that is not an error: the ring is full.

use journal_format::Lsn;

/// What went wrong, coarsely enough to act on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum RingErrorKind {
    /// The operating system refused something; the source says what.
    Os,
    /// A size or count outside its limits was asked for.
    Limits,
    /// The descriptor does not hold a ring (or clock) that this release can use.
    Layout,
    /// The memory's contents break the ring's rules; capture from this ring has to end.
    Corrupt,
    /// Capture ended inside the filter without room for a gap record: nothing after this point may be used.
    Stopped,
    /// A control message is malformed or too large; the connection has to be closed.
    Message,
    /// The peer closed the control connection.
    Closed,
}

/// An error of the ring, the clock or the control socket.
#[derive(Debug, thiserror::Error)]
#[error("{what}{}", .lsn.map(|lsn| format!(" (at LSN {lsn})")).unwrap_or_default())]
pub struct RingError {
    kind: RingErrorKind,
    what: &'static str,
    lsn: Option<Lsn>,
    #[source]
    source: Option<std::io::Error>,
}

impl RingError {
    pub(crate) const fn new(kind: RingErrorKind, what: &'static str) -> Self {
        Self { kind, what, lsn: None, source: None }
    }

    #[cfg(not(loom))]
    pub(crate) fn os(what: &'static str, source: impl Into<std::io::Error>) -> Self {
        Self { kind: RingErrorKind::Os, what, lsn: None, source: Some(source.into()) }
    }

    pub(crate) const fn corrupt(what: &'static str) -> Self {
        Self::new(RingErrorKind::Corrupt, what)
    }

    pub(crate) const fn at(mut self, lsn: Lsn) -> Self {
        self.lsn = Some(lsn);
        self
    }

    pub(crate) const fn what(&self) -> &'static str {
        self.what
    }

    /// The kind, to match on.
    #[must_use]
    pub const fn kind(&self) -> RingErrorKind {
        self.kind
    }

    /// The record at which the contents were found to be wrong.
    #[must_use]
    pub const fn lsn(&self) -> Option<Lsn> {
        self.lsn
    }
}

/// The ring cannot take the request now. Not an error: the disk's overflow policy says what happens next.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Full {
    /// No slot credit is left for this kind of record; the agent has to take records out first.
    #[error("no record slot is free")]
    Slots,
    /// The arena has no room for the data; the agent has to take records out first.
    #[error("the arena is full")]
    Arena,
    /// The request is larger than a record can ever be, or empty; split it.
    #[error("the request is empty or larger than one record; split it")]
    Length,
}
