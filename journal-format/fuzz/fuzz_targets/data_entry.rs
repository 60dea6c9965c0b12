//! See `bodies::data_entry`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| bodies::data_entry(input));
