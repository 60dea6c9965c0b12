//! The I/O seam: the only place of the agent with `unsafe`. Memory that the kernel or another process may touch,
//! and io_uring.
//!
//! Nothing in here decides anything; it turns three facilities into safe types:
//! [`memory`] (a memfd mapping with one writer, whose bytes the kernel sends from), [`uring`] (a connection driven
//! by io_uring), [`process`] (pidfd). The plain-call connection lives beside it in [`plain`], because a send straight
//! from mapped memory needs a raw `iovec` there too.

#![allow(unsafe_code)]

pub mod batch;
pub mod memory;
pub mod plain;
pub mod process;
pub mod uring;
