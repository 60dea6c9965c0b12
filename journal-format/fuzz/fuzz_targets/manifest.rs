//! See `bodies::manifest`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| bodies::manifest(input));
