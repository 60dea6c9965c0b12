//! `libcdp_filter.so`: the part of qemu-cdp that lives inside QEMU's process.
//!
//! *Owns* QEMU's symbols and structure layouts (`qemu`), the life of a captured request (`engine`), the
//! conversation with the host's agent (`control`) and the plain C interface (`ffi`, `include/cdp_filter.h`).
//!
//! *Must not know* retention, REST, sites, TLS, or anything else beyond the agent's socket.
//!
//! *Threads*: requests run on QEMU's I/O threads inside coroutines and never block, lock, allocate or make a
//! system call of ours. One thread of our own, `cdp-control`, talks to the agent and may block; it exists only
//! in a process that is a QEMU.
//!
//! *Never harm the guest* (invariant I1): every entry from C stops panics and goes on without us.

pub mod control;
pub mod engine;
pub mod ffi;
mod qemu;
