//! Errors of the API: `application/problem+json` (RFC 9457) with a stable kind and a hint.

use core::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::types::ResolvedPoint;

/// Media type of every error's body.
pub const PROBLEM_JSON: &str = "application/problem+json";

/// What went wrong, for programs to match on. A client must take a kind it does not know for [`Kind::Internal`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The request is malformed: a parameter, the body, the method.
    BadRequest,
    /// A value of the body is out of its range.
    BadValue,
    /// No such address under the API.
    NotFound,
    /// The address knows other methods than this one.
    MethodNotAllowed,
    /// The body is larger than the API takes.
    TooLarge,
    /// The body is not JSON.
    UnsupportedMediaType,
    /// No disk has that id or that `vm/device`.
    NoSuchDisk,
    /// Several disks have that `vm/device`; use the id.
    AmbiguousDisk,
    /// The disk has no journal: it was never protected.
    NoJournal,
    /// The text is no point in time.
    BadPoint,
    /// The point lies in a gap: writes of that time may be missing. `before` and `after` are the nearest good points.
    PointInGap,
    /// The point lies before the first or after the newest one. `before` and `after` are the nearest good points.
    PointOutOfRange,
    /// No bookmark has that name.
    NoSuchBookmark,
    /// A bookmark of that name exists.
    BookmarkExists,
    /// The host's agent refused to do it, and says why.
    AgentRefused,
    /// The host's agent is not connected, or the VM does not run, and the request needs it.
    AgentOffline,
    /// The agent did not answer in time.
    AgentTimeout,
    /// The store failed: a disk is full or broken.
    StoreFailed,
    /// Stored bytes that the request needs are not what was written; which, is in the detail.
    Damaged,
    /// The server is stopping or has too much to do.
    Unavailable,
    /// A fault of the server.
    #[serde(other)]
    Internal,
}

impl Kind {
    /// The name in JSON.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::BadRequest => "bad-request",
            Self::BadValue => "bad-value",
            Self::NotFound => "not-found",
            Self::MethodNotAllowed => "method-not-allowed",
            Self::TooLarge => "too-large",
            Self::UnsupportedMediaType => "unsupported-media-type",
            Self::NoSuchDisk => "no-such-disk",
            Self::AmbiguousDisk => "ambiguous-disk",
            Self::NoJournal => "no-journal",
            Self::BadPoint => "bad-point",
            Self::PointInGap => "point-in-gap",
            Self::PointOutOfRange => "point-out-of-range",
            Self::NoSuchBookmark => "no-such-bookmark",
            Self::BookmarkExists => "bookmark-exists",
            Self::AgentRefused => "agent-refused",
            Self::AgentOffline => "agent-offline",
            Self::AgentTimeout => "agent-timeout",
            Self::StoreFailed => "store-failed",
            Self::Damaged => "damaged",
            Self::Unavailable => "unavailable",
            Self::Internal => "internal",
        }
    }

    /// The HTTP status that goes with it.
    #[must_use]
    pub const fn status(self) -> u16 {
        match self {
            Self::BadRequest | Self::BadPoint => 400,
            Self::NotFound | Self::NoSuchDisk | Self::NoJournal | Self::NoSuchBookmark => 404,
            Self::MethodNotAllowed => 405,
            Self::AmbiguousDisk
            | Self::PointInGap
            | Self::PointOutOfRange
            | Self::BookmarkExists
            | Self::AgentRefused => 409,
            Self::TooLarge => 413,
            Self::UnsupportedMediaType => 415,
            Self::BadValue => 422,
            Self::Damaged | Self::Internal => 500,
            Self::AgentOffline | Self::Unavailable => 503,
            Self::AgentTimeout => 504,
            Self::StoreFailed => 507,
        }
    }

    /// A short title that does not change from case to case.
    #[must_use]
    pub const fn title(self) -> &'static str {
        match self {
            Self::BadRequest => "The request is malformed",
            Self::BadValue => "A value is out of its range",
            Self::NotFound => "No such address",
            Self::MethodNotAllowed => "This address knows other methods",
            Self::TooLarge => "The request's body is too large",
            Self::UnsupportedMediaType => "The request's body must be JSON",
            Self::NoSuchDisk => "No such disk",
            Self::AmbiguousDisk => "Several disks have that name",
            Self::NoJournal => "The disk has no journal",
            Self::BadPoint => "Not a point in time",
            Self::PointInGap => "The point lies in a gap",
            Self::PointOutOfRange => "The point is out of range",
            Self::NoSuchBookmark => "No such bookmark",
            Self::BookmarkExists => "The bookmark exists",
            Self::AgentRefused => "The host's agent refused",
            Self::AgentOffline => "The host's agent is not there",
            Self::AgentTimeout => "The host's agent did not answer",
            Self::StoreFailed => "The store failed",
            Self::Damaged => "Stored bytes are damaged",
            Self::Unavailable => "The server cannot do it now",
            Self::Internal => "A fault of the server",
        }
    }
}

/// The body of every error.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// `urn:qemu-cdp:problem:` and the kind: an identifier, not an address to fetch.
    #[serde(rename = "type")]
    pub type_uri: String,
    /// Short, the same for every error of the kind.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What went wrong, for programs.
    pub kind: Kind,
    /// What went wrong this time, for people.
    pub detail: String,
    /// What to do next.
    pub hint: String,
    /// For a point that cannot be restored: the nearest good one before it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<ResolvedPoint>,
    /// For a point that cannot be restored: the nearest good one after it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<ResolvedPoint>,
}

impl Problem {
    /// A problem of that kind.
    #[must_use]
    pub fn new(kind: Kind, detail: impl Into<String>, hint: impl Into<String>) -> Self {
        Self {
            type_uri: format!("urn:qemu-cdp:problem:{}", kind.as_str()),
            title: kind.title().to_owned(),
            status: kind.status(),
            kind,
            detail: detail.into(),
            hint: hint.into(),
            before: None,
            after: None,
        }
    }

    /// The same problem with the nearest good points.
    #[must_use]
    pub fn with_points(self, before: Option<ResolvedPoint>, after: Option<ResolvedPoint>) -> Self {
        Self { before, after, ..self }
    }
}

impl fmt::Display for Problem {
    /// One line: the detail. Hint and points are for the caller to lay out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.detail)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_of_a_newer_server_is_read_as_internal() {
        let kind: Kind = serde_json::from_str("\"out-of-coffee\"").expect("any kind reads");
        assert_eq!(kind, Kind::Internal);
    }

    #[test]
    fn the_name_of_a_kind_is_its_json() {
        for kind in [Kind::BadRequest, Kind::PointInGap, Kind::AgentOffline, Kind::Internal] {
            assert_eq!(serde_json::to_string(&kind).expect("serializes"), format!("\"{}\"", kind.as_str()));
        }
    }
}
