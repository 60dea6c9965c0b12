//! See `bodies::bookmarks`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| bodies::bookmarks(input));
