//! cdp-server: takes frames from agents, keeps them durable, and serves the REST API.
//!
//! *Owns* ingest (network → check → append → durable → acknowledge), the catalog, the protection controller, REST,
//! metrics.
//!
//! *Must not know* QEMU, rings, or how the store lays out its files.
//!
//! *Threads*: the data plane has its own (`data`: accept, two per agent, one committer); REST runs on
//! a small async runtime whose handlers send everything that blocks to the blocking pool; one thread compares wanted
//! and real protection, and forgets what no read needs any more. A slow disk holds up the committer and through the bounded queue the agents, never REST.
//!
//! Order of a disk's numbers, from largest to smallest: captured (agent) ≥ shipped ≥ received ≥ durable (store). Only
//! durable ones are acknowledged, listed or restored.

#![forbid(unsafe_code)]

pub mod catalog;
mod checks;
pub mod config;
mod core;
mod data;
mod describe;
pub mod drill;
pub mod error;
mod faults;
mod fleet;
mod http;
pub mod limits;
mod metrics;
pub mod model;
mod names;
mod protection;
mod resolve;
pub mod rest;
mod server;

pub use config::{Args, Config};
pub use data::{hashes, plane};
pub use error::ServerError;
pub use server::{Server, Signals};
