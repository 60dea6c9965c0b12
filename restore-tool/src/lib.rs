//! `cdp-restore`: brings a disk back as it was at any point of its journal.
//!
//! *Owns* the way from a point in time to a verified image: finding and resolving ([`source`]), checking what may be
//! overwritten ([`target`]), copying and reading back ([`mod@restore`]).
//!
//! *Must not know* the server's insides, the network protocol of the agents, or how a store lays out its files: it sees
//! a store through `journal_store` and a server through `cdp_api`.
//!
//! *Threads*: one; every call may block on disk or network.

#![forbid(unsafe_code)]

mod buffer;
mod copy;
pub mod error;
mod in_use;
pub mod limits;
mod output;
pub mod restore;
pub mod source;
pub mod target;

pub use error::RestoreError;
pub use restore::{Order, Report, restore};
pub use source::{Image, Listing, ServerSource, Source, StoreSource};
pub use target::Format;
