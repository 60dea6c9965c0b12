//! The store: per disk a journal of frames, and images of the disk at any point of it.
//!
//! *Owns* the files of a store (`<root>/disks/<uuid>/…`), the order in which they are written and made durable, recovery
//! after a crash, and reading: [`View`] is a disk at one LSN. The bytes are `journal-format`'s.
//!
//! *Must not know* networks, REST, policies, clocks: time is an argument (invariant I8), all I/O goes through [`io`].
//!
//! *Threads*: everything public may be called from any thread. [`Store::append`] and [`Store::commit`] block on the disk
//! and exclude each other per disk; readers never wait for a durability step, only for the moment in which a frame is
//! put into the index.
//!
//! # Files
//!
//! ```text
//! <root>/lock                      held while a process may write
//! <root>/disks/<uuid>/manifest     which segments are live; replaced as a whole; has a copy
//! <root>/disks/<uuid>/bookmarks    named points; replaced as a whole; has a copy
//! <root>/disks/<uuid>/durable      up to which LSN the disk is durable; tells rot from a tear
//! <root>/disks/<uuid>/data-N.seg   data volume: frames' data as shipped
//! <root>/disks/<uuid>/meta-N.seg   metadata volume: frames' records and where their data lies
//! <root>/disks/<uuid>/index-N.idx  index of a sealed segment
//! ```
//!
//! # Order of writing
//!
//! 1. `append`: data entry, then metadata entry; nothing is durable yet, nothing is promised.
//! 2. `commit`: one durability step for both files of every touched disk; only then does the durable LSN move, and only
//!    what it covers is ever shown. Entries carry the data's checksum, so a half that is missing is seen at recovery.
//! 3. Seal (inside `commit`, when the segment is large enough): write index, make it durable; make the next segment's
//!    files, make them durable; make the folder durable; swap the manifest. A crash before the swap leaves orphans that
//!    the next opening removes; after it, the new segment is in use.
//!
//! Why that is right, what opening does about it, and which test shows it: `docs/formats/durability.md`.
//!
//! After a write or a durability step has failed, what the disk holds is unknown: the disk's writer is *poisoned* and
//! refuses everything until the disk is opened again ([`Store::open_or_create`]), which recovers. Views stay usable.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing))]

mod cache;
pub mod config;
mod damage;
mod disk;
pub mod error;
mod files;
pub mod io;
pub mod limits;
mod pool;
mod segment;
mod store;
mod timeline;
mod view;

pub use config::StoreConfig;
pub use damage::{Damage, DamageKind};
pub use disk::{DiskStore, Stats, Verified, VerifyProgress};
pub use error::{StoreError, StoreErrorKind};
/// The words in which this store tells a history.
pub use journal_format::bookmarks::Bookmark;
pub use journal_format::{
    EpochStart, Gap, History, Point, PointError, PointKind, PointSpec, RecoverableRange,
};
pub use store::Store;
pub use view::{Extent, ExtentKind, View};
