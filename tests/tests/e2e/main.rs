//! End-to-end tests: real QEMU programs, the real filter, agent, server and `cdp-restore`.
//!
//! Each test has its own directory, ports and sockets, so that all can run at the same time.

mod consistency;
mod drivers;
mod identity;
mod interruptions;
mod outages;
mod policies;
mod resync;
mod tls;
mod toggle;
mod unix;
mod unseen;
mod witness;
