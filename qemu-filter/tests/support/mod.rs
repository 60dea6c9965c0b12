//! What the tests with real QEMU programs share: an agent that only listens, and the programs.

#![allow(dead_code, unreachable_pub, missing_docs)]

pub mod agent;
pub mod memory;
pub mod programs;
pub mod qmp;
pub mod vm;
