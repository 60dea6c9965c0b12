//! The harness of the end-to-end tests: it starts the real programs (server, agent, QEMU with the filter) in a
//! temporary directory, on free ports and private sockets, and looks at them only from outside.
//!
//! *Owns* starting and stopping programs ([`process`], [`site`], [`host`], [`qemu`], [`guest`]), the independent witness ([`witness`]), loads
//! ([`load`], [`nbd`], [`vhost`]), writers that remember what they wrote and when ([`ledger`]), a network that fails
//! ([`network`]), certificates ([`certificates`]), and what `/proc` says of a process ([`procfs`]).
//!
//! *Must not know* the insides of server, agent, filter or store: it uses the REST API, the command lines, and the
//! documented formats.
//!
//! *Failures* are panics with the reason: everything here is called by tests. A test that fails prints the logs of the
//! programs it started.

#![forbid(unsafe_code)]

pub mod certificates;
pub mod guest;
pub mod host;
pub mod journal;
pub mod ledger;
pub mod load;
pub mod nbd;
pub mod network;
pub mod process;
pub mod procfs;
pub mod programs;
pub mod qemu;
pub mod qmp;
pub mod random;
pub mod site;
pub mod vhost;
pub mod witness;

use std::time::{Duration, Instant};

/// Longest wait for anything to happen. It only bounds a hanging test: no test passes or fails by how long things take.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// Waits until `probe` gives a value.
///
/// # Panics
/// After [`PATIENCE`], naming `what` did not happen.
#[track_caller]
pub fn wait_for<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(value) = probe() {
            return value;
        }
        assert!(begin.elapsed() < PATIENCE, "{what}: did not happen within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
