//! What the REST API under `/v1` says: its types, points in time as text, and a blocking client.
//!
//! *Owns* the JSON shapes (with their OpenAPI schemas), how a history becomes them, the one parser of points in time, and
//! the client and the habits ([`program`]) that `cdpctl` and `cdp-restore` share.
//!
//! *Must not know* the server's insides, the store, or the wire between agent and server: of `journal-format` it uses only
//! the words in which a history is told (points, gaps, ranges).
//!
//! *Threads*: types and parser are pure. [`client`] (feature `client`) blocks the calling thread; do not call it from
//! an async task.
//!
//! Conventions of the JSON: `snake_case`; the unit is the last word of a name (`disk_bytes`, `lag_s`); a time is
//! RFC 3339 in UTC with nine digits of fraction, next to the same instant as an integer (`stamp_ns`), because the two
//! round-trip exactly while a floating-point number would not.

#![forbid(unsafe_code)]

#[cfg(feature = "client")]
pub mod client;
pub mod error;
pub mod history;
pub mod limits;
pub mod point_spec;
pub mod problem;
#[cfg(feature = "client")]
pub mod program;
pub mod time;
pub mod types;

#[cfg(feature = "client")]
pub use client::{Client, ClientError};
pub use error::PointSpecError;
pub use point_spec::PointSpec;
pub use problem::{Kind, Problem};
pub use types::{
    Bookmark, Conflict, CreateBookmark, DamagedPart, Disk, DiskSummary, Extent, ExtentKind, Extents, Fault,
    FaultKind, Gap, Journal, OverflowPolicy, PointKind, Points, Protection, ProtectionOptions,
    ProtectionPhase, ProtectionState, RecoverableRange, ResolvedPoint, SyncState, Verification,
    VerificationState,
};
