//! See `bodies::outbox`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| bodies::outbox(input));
