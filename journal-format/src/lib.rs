//! The bytes of qemu-cdp: units, records, frames, segments, index entries and wire messages.
//!
//! *Owns* every layout that is written to a disk, sent over a socket or compared across processes, the
//! checks a reader makes on them, and the limits they obey; and the words in which a history is told:
//! points, gaps, ranges. The authority for each layout is `docs/formats/`; a test compares it with the code.
//!
//! *Must not know* files, sockets, clocks or threads: every function here takes bytes and values and
//! returns bytes and values.
//!
//! *Threads*: all of it is pure; any thread may call anything; nothing blocks. Decoders return errors on
//! any input; they never panic, index out of range or allocate what a length field says (invariant I7).

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects
    )
)]
#![forbid(unsafe_code)]

pub mod bookmarks;
#[cfg(feature = "wire")]
pub mod chunk_hash;
#[cfg(feature = "codec")]
pub mod codec;
pub mod durable_mark;
pub mod error;
pub mod frame;
pub mod history;
pub mod index;
pub mod layout;
pub mod limits;
pub mod manifest;
pub mod parts;
pub mod point;
pub mod record;
pub mod recovery;
pub mod segment;
pub mod units;
#[cfg(feature = "wire")]
pub mod wire;

#[cfg(feature = "wire")]
pub use chunk_hash::ChunkHash;
pub use error::{FormatError, FormatErrorKind};
pub use frame::{CheckedFrame, Codec, Frame, FrameHeader, FrameMeta};
pub use history::{EpochStart, Gap, History, RecoverableRange};
pub use point::{Point, PointError, PointKind, PointSpec};
pub use record::{DataSpan, GapReason, Op, Record};
pub use units::{ByteOffset, ByteRange, DiskId, Epoch, ImageTag, Lsn, SegmentNumber, Stamp};
