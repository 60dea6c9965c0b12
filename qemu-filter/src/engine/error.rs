//! The engine's error type. Only starting a capture can fail; a running one handles everything itself.

use core::fmt;

use capture_ring::RingError;

/// What went wrong, coarsely enough to act on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EngineErrorKind {
    /// A descriptor from the agent is not a ring, or not one that this release can use.
    Ring,
    /// The ring has served another capture before; each needs a new one.
    RingUsed,
}

/// Why a capture could not be started.
#[derive(Debug)]
pub struct EngineError {
    kind: EngineErrorKind,
    source: Option<RingError>,
}

impl EngineError {
    pub(crate) const fn ring_used() -> Self {
        Self { kind: EngineErrorKind::RingUsed, source: None }
    }

    /// The kind, to match on.
    #[must_use]
    pub const fn kind(&self) -> EngineErrorKind {
        self.kind
    }
}

impl From<RingError> for EngineError {
    fn from(source: RingError) -> Self {
        Self { kind: EngineErrorKind::Ring, source: Some(source) }
    }
}

impl fmt::Display for EngineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.kind, &self.source) {
            (EngineErrorKind::Ring, Some(source)) => {
                write!(f, "cannot use the ring: {source}; agent and filter must be of one release")
            }
            (EngineErrorKind::Ring, None) => f.write_str("cannot use the ring"),
            (EngineErrorKind::RingUsed, _) => {
                f.write_str("the ring has been used by another capture; attach again with a new one")
            }
        }
    }
}

impl std::error::Error for EngineError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| source as _)
    }
}
