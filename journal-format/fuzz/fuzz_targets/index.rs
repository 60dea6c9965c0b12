//! See `bodies::index`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| bodies::index(input));
