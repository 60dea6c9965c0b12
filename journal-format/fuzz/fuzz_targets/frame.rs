//! See `bodies::frame`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| bodies::frame(input));
