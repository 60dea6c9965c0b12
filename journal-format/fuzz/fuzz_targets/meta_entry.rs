//! See `bodies::meta_entry`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| bodies::meta_entry(input));
