//! The C interface, and the memory helpers that need `unsafe`.
#![allow(unsafe_code)]
pub mod copy;
pub(crate) mod signals;
#[cfg(test)]
pub(crate) mod testing;
