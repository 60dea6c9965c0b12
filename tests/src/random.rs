//! Repeatable random numbers: a seed is printed by the test that uses it and given back through `CDP_TEST_SEED`.

use std::ops::Range;

/// A small generator (splitmix64): good enough to mix loads, and the same on every machine.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Of `CDP_TEST_SEED`, else of `seed`; prints what is used, so that a failure can be repeated.
    #[must_use]
    pub fn seeded(seed: u64) -> Self {
        let seed = std::env::var("CDP_TEST_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(seed);
        println!("CDP_TEST_SEED={seed}");
        Self(seed)
    }

    /// Of `seed`, silently: for data.
    #[must_use]
    pub fn of(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number in `range`, which is not empty.
    pub fn within(&mut self, range: Range<u64>) -> u64 {
        range.start + self.next_u64() % (range.end - range.start)
    }

    /// `true` in `percent` of 100 cases.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.within(0..100) < percent
    }

    /// Bytes that do not compress.
    pub fn bytes(&mut self, length: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = Vec::with_capacity(length + 8);
        while bytes.len() < length {
            bytes.extend_from_slice(&self.next_u64().to_le_bytes());
        }
        bytes.truncate(length);
        bytes
    }
}
