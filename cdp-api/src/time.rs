//! Stamps as text: nanoseconds since 1970 UTC to RFC 3339 and back.

use jiff::Timestamp;

/// RFC 3339 in UTC with nine digits of fraction, e.g. `2026-11-20T10:00:03.000000001Z`.
///
/// Every 64-bit number of nanoseconds has such a form (the last one is in the year 2554).
#[must_use]
pub fn rfc3339(stamp_ns: u64) -> String {
    let instant = Timestamp::from_nanosecond(i128::from(stamp_ns)).unwrap_or(Timestamp::MAX);
    format!("{instant:.9}")
}

/// Nanoseconds since 1970 UTC, or `None` before 1970 or after 2554.
#[must_use]
pub fn stamp_ns(instant: Timestamp) -> Option<u64> {
    u64::try_from(instant.as_nanosecond()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_has_nine_digits_and_reads_back_exactly() {
        for ns in [0, 1, 1_000_000_000, 1_795_168_803_000_000_001, u64::MAX] {
            let text = rfc3339(ns);
            assert_eq!(text.split_once('.').map(|(_, f)| f.len()), Some(10), "{text}");
            let back: Timestamp = text.parse().expect("own output parses");
            assert_eq!(stamp_ns(back), Some(ns));
        }
    }
}
