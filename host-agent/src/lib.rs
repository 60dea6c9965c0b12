//! host-agent: the process that stands between the QEMUs of one host and the cdp-server.
//!
//! *Owns* the capture rings and the host's clock (it makes them and hands them to the filters), the inventory of VMs and
//! their disks, the outboxes with packed frames, and the connection to the server.
//!
//! *Must not know* QEMU's insides (it sees rings and the control socket), the store's files, policies or REST.
//!
//! *Threads*: the **hub** drives the [`session`] (all decisions, no I/O), talks to the server and commands filters; it
//! blocks only in its one wait. One **drain** per protected disk takes records out of its ring and fills its outbox; it
//! blocks when the outbox is full. One **accept** thread and one **reader** per filter turn what filters say into
//! events. A short-lived thread connects to the server.
//!
//! ```text
//!  QEMU ──ring──► drain ──outbox──► hub ─TCP/Unix► server        session: (now, event) → actions
//!  QEMU ◄─control socket─► reader ─events─► hub ◄──acks── server
//! ```
//!
//! *Trust*: what a filter writes into its ring or says on its socket may come from a guest that broke out; what
//! the server says may be wrong. Either is checked and bounded; a fault costs that disk's capture or that connection,
//! never the agent (invariant I7). Frames are dropped only when the server has made them durable.
//!
//! *When it stops* (SIGTERM): no disk is detached. Drains stop, what the outboxes hold is shipped for at most
//! [`limits::STOP_FLUSH`], and the process ends. QEMU keeps its rings and goes on: they fill, the filter goes over to
//! tracking, the guest notices nothing. The agent that starts next goes on where this one stopped, however it ended
//! (`docs/formats/outbox.md` has the argument why nothing is lost).

pub mod agent;
pub mod compare;
pub mod config;
pub mod drain;
pub mod drill;
pub mod error;
pub mod events;
pub mod filters;
pub mod hub;
pub mod identity;
pub mod inbox;
pub mod limits;
pub mod link;
pub mod live;
mod lock;
pub mod outbox;
pub mod packer;
pub mod seam;
pub mod session;
pub mod socket;
pub mod spool;
