//! See `bodies::durable_mark`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| bodies::durable_mark(input));
