//! The plain C interface (`include/cdp_filter.h`), through which another block device tees its writes into the
//! same engine, and the few helpers of this crate that need `unsafe` outside `qemu`.
//!
//! *The boundary*: every function checks its pointers for NULL, stops panics, and answers a negative errno whose
//! text [`api::cdp_last_error`] gives. Structures start with their size and version and are only ever appended
//! to, so that old callers keep working.
//!
//! *Threads*: a handle may be used by any number of threads. Two threads of ours exist per handle: `cdp-control`,
//! and `cdp-resync` while the agent captures the disk.
#![allow(unsafe_code)]

pub mod api;
pub mod copy;
mod device;
mod error;
mod futex;
pub(crate) mod signals;
#[cfg(test)]
pub(crate) mod testing;
pub mod types;
