//! The shared-memory ring through which qemu-filter hands guest writes to host-agent, the host's clock, and the
//! control socket between the two.
//!
//! *Owns* the bytes of the ring and clock memfds (`docs/formats/ring.md`), every atomic access to them, the rules by
//! which a write becomes a numbered and stamped record, the capture mode with its gap protocol, and the messages of
//! the control socket (`docs/formats/control.md`).
//!
//! *Must not know* QEMU, the network, or what a record is used for.
//!
//! *Threads*: [`Producer`] may be called from any number of threads of the filter's process (and, for bookmarks, of
//! the agent's); after creation it neither blocks, locks, allocates nor, on the normal path, makes a system call.
//! [`Consumer`] belongs to one thread of the agent. The helpers of [`control`] block on their socket.
//!
//! *Trust*: the other process may be owned by a guest. Every shared word is an atomic that is read once into a
//! private copy, checked, and only then used (invariant I7); what leaves the mapping is bounded by the geometry
//! that was computed, not read. Nothing here panics on any content of the memory.
//!
//! ```text
//!  filter's threads                        memfd                              agent
//!  begin_write ── credit, arena pieces ──► blocks: issued
//!  (guest data copied in, disk write issued from the copy, disk answers)
//!  complete ───── stamp, slot, publish ──► slot n = LSN first+n ────────────► Consumer::next
//!                                          blocks: free ◄──── data copied out, pieces and credit given back
//! ```

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

mod arena;
mod bell;
mod clock;
mod consumer;
#[cfg(not(loom))]
pub mod control;
mod dirty;
mod error;
pub mod layout;
pub mod limits;
mod mode;
mod policy;
mod producer;
mod raw;
mod ring;
mod slots;
mod sync;
mod ticket;
mod waiting;

pub use bell::Bell;
pub use clock::HostClock;
pub use consumer::{Consumer, Next};
pub use dirty::Dirty;
pub use error::{Full, RingError, RingErrorKind};
pub use mode::{Mode, ModeWord, Resync, Tracked};
pub use policy::{Overflow, Policy, SyncState};
pub use producer::Producer;
#[cfg(not(loom))]
pub use raw::monotonic_ns;
pub use ring::{Ring, RingConfig};
pub use ticket::{FillTicket, OpKind, Piece, Pieces, Ticket};
