//! The mapping: the only module of the crate with `unsafe`.
//!
//! It turns a sealed memfd into slices of atomics (which are sound whatever the other process stores in them) and
//! into bounded copies from and to the arena (which are bytes that nobody interprets before they were copied).
//! Every region's place comes from a [`Geometry`] that this process computed; the file cannot shrink, because it is
//! sealed.
#![allow(unsafe_code)]

#[cfg(not(loom))]
mod futex;
#[cfg(loom)]
mod heap;
#[cfg(not(loom))]
mod map;

#[cfg(not(loom))]
pub use futex::monotonic_ns;
#[cfg(loom)]
pub(crate) use heap::{ClockMemory, Memory};
#[cfg(all(test, not(loom)))]
pub(crate) use map::CLOCK_WORDS_AT;
#[cfg(not(loom))]
pub(crate) use map::{
    ClockMemory, Memory, create_sealed, file_bytes, own, read_description, write_description,
};

#[cfg(doc)]
use crate::layout::Geometry;
