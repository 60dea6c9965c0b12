//! See `bodies::codec`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| bodies::codec(input));
