//! See `bodies::spool`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| bodies::spool(input));
