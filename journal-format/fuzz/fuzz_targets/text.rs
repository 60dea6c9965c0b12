//! See `bodies::text`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| bodies::text(input));
