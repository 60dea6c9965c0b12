//! Points in time as people write them: the one place that parses `--at` and `?at=`.
//!
//! | form | example | means |
//! | --- | --- | --- |
//! | LSN | `lsn:1042` | right after that record |
//! | bookmark | `bookmark:before-upgrade` | right after the bookmark's record |
//! | newest | `latest` | the newest durable record |
//! | RFC 3339 | `2026-11-20T10:00:03.5+01:00` | the newest record not later than that instant |
//! | with zone | `2026-11-20T10:00:03[Europe/Berlin]` | the same |
//! | local | `2026-11-20 10:00:03.25`, `2026-11-20`, `10:00:03` | the same, on the clock of the caller's time zone |
//! | ago | `-5m`, `-1h30m`, `5 minutes ago` | the same, counted back from now |
//!
//! A time given to the second means the *start* of that second: `10:00:03` is `10:00:03.000000000`, and resolves to
//! the newest record whose stamp is not larger. What the guest wrote *during* 10:00:03 is after that point.
//!
//! The forms are tried in this order: instant, instant with zone, local time, duration. The order matters: a parser of
//! local times would read `10:00:03+02:00` and drop the offset without a word, so texts with an offset must have been
//! taken by the first two before local time is tried, and one that was not is refused.

use core::fmt;

use jiff::civil::{DateTime, Time};
use jiff::{Span, Timestamp, Zoned};

use crate::error::PointSpecError;
use crate::limits::{MAX_BOOKMARK_BYTES, MAX_POINT_BYTES};
use crate::time;

/// A point in time as asked for; the server or the store resolves it to a record.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum PointSpec {
    /// Right after the record with this LSN.
    Lsn(u64),
    /// The newest record whose stamp (nanoseconds since 1970 UTC) is not larger.
    Time {
        /// The instant, in nanoseconds since 1970 UTC.
        stamp_ns: u64,
    },
    /// Right after the record that the bookmark names.
    Bookmark(String),
    /// The newest durable record.
    Latest,
}

impl PointSpec {
    /// Reads any of the forms above. `now` is the caller's wall clock, in the time zone that local times are in.
    ///
    /// # Errors
    /// [`PointSpecError`], whose message says what would have been understood.
    pub fn parse(text: &str, now: &Zoned) -> Result<Self, PointSpecError> {
        let text = text.trim();
        if text.is_empty() || text.len() > MAX_POINT_BYTES {
            return Err(PointSpecError::Length);
        }
        if let Some(number) = text.strip_prefix("lsn:") {
            // Digits only: the parser would also take a sign.
            let lsn = number.parse().ok().filter(|_| number.bytes().all(|b| b.is_ascii_digit()));
            return lsn.map(Self::Lsn).ok_or_else(|| PointSpecError::Lsn(text.to_owned()));
        }
        if let Some(name) = text.strip_prefix("bookmark:") {
            let fits = (1..=MAX_BOOKMARK_BYTES).contains(&name.len());
            return if fits {
                Ok(Self::Bookmark(name.to_owned()))
            } else {
                Err(PointSpecError::Bookmark(text.to_owned()))
            };
        }
        if text == "latest" {
            return Ok(Self::Latest);
        }
        let instant = parse_instant(text, now)?;
        let stamp_ns = time::stamp_ns(instant).ok_or_else(|| PointSpecError::Range(text.to_owned()))?;
        Ok(Self::Time { stamp_ns })
    }
}

impl fmt::Display for PointSpec {
    /// The canonical form, which [`PointSpec::parse`] reads back to the same value whatever the time zone.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lsn(lsn) => write!(f, "lsn:{lsn}"),
            Self::Time { stamp_ns } => f.write_str(&time::rfc3339(*stamp_ns)),
            Self::Bookmark(name) => write!(f, "bookmark:{name}"),
            Self::Latest => f.write_str("latest"),
        }
    }
}

fn parse_instant(text: &str, now: &Zoned) -> Result<Timestamp, PointSpecError> {
    if let Ok(instant) = text.parse::<Timestamp>() {
        return Ok(instant);
    }
    if let Ok(zoned) = text.parse::<Zoned>() {
        return Ok(zoned.timestamp());
    }
    if let Some(local) = parse_local(text, now) {
        let zoned = now.time_zone().to_ambiguous_zoned(local).unambiguous();
        return zoned.map(|z| z.timestamp()).map_err(|_| PointSpecError::Ambiguous(text.to_owned()));
    }
    parse_ago(text, now)
}

/// Date and time, date alone (its midnight), or time alone (today).
fn parse_local(text: &str, now: &Zoned) -> Option<DateTime> {
    let only_civil = |c: char| c.is_ascii_digit() || matches!(c, '-' | ':' | '.' | ',' | 'T' | 't' | ' ');
    // A minus sign behind the date would be an offset; "2026-11-20" has ten characters.
    let has_offset = text.get(10..).is_some_and(|rest| rest.contains('-'));
    if !text.chars().all(only_civil) || has_offset {
        return None;
    }
    if let Ok(local) = text.parse::<DateTime>() {
        return Some(local);
    }
    let time_only = text.contains(':') && !text.contains('-');
    text.parse::<Time>().ok().filter(|_| time_only).map(|time| now.date().to_datetime(time))
}

/// A text of which the first field is a number and a date's or a clock's separator follows: not meant as a duration,
/// though the parser of those would read `25:99:99` as one.
fn begins_like_a_time(text: &str) -> bool {
    let rest = text.trim_start_matches(|c: char| c.is_ascii_digit());
    rest.len() < text.len() && rest.starts_with([':', '-', '/'])
}

fn parse_ago(text: &str, now: &Zoned) -> Result<Timestamp, PointSpecError> {
    if begins_like_a_time(text) {
        return Err(PointSpecError::Malformed(text.to_owned()));
    }
    // "-1:30" could be minutes or hours.
    if text.contains(':') {
        return Err(PointSpecError::Unknown(text.to_owned()));
    }
    let span: Span = text.parse().map_err(|_| PointSpecError::Unknown(text.to_owned()))?;
    if span.is_positive() {
        return Err(PointSpecError::Future(text.to_owned()));
    }
    // Calendar units count on the local calendar: "-1d" is the same time yesterday, also across a clock change.
    now.checked_add(span).map(|then| then.timestamp()).map_err(|_| PointSpecError::Range(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now() -> Zoned {
        "2026-11-20T12:00:00[Europe/Berlin]".parse().expect("a time with zone")
    }

    fn instant(text: &str) -> PointSpec {
        let instant: Timestamp = text.parse().expect("an instant");
        PointSpec::Time { stamp_ns: time::stamp_ns(instant).expect("in range") }
    }

    fn parse(text: &str) -> Result<PointSpec, PointSpecError> {
        PointSpec::parse(text, &now())
    }

    #[test]
    fn every_documented_form_is_understood() {
        let cases = [
            ("lsn:1042", PointSpec::Lsn(1042)),
            ("bookmark:before upgrade", PointSpec::Bookmark("before upgrade".to_owned())),
            ("latest", PointSpec::Latest),
            ("2026-11-20T10:00:03Z", instant("2026-11-20T10:00:03Z")),
            ("2026-11-20T10:00:03.5+01:00", instant("2026-11-20T09:00:03.5Z")),
            ("2026-11-20 10:00:03+01:00", instant("2026-11-20T09:00:03Z")),
            ("2026-11-20T10:00:03[America/New_York]", instant("2026-11-20T15:00:03Z")),
            ("2026-11-20 10:00:03", instant("2026-11-20T09:00:03Z")),
            ("2026-11-20T10:00:03.123456789", instant("2026-11-20T09:00:03.123456789Z")),
            ("2026-11-20 10:00", instant("2026-11-20T09:00:00Z")),
            ("2026-11-20", instant("2026-11-19T23:00:00Z")),
            ("10:00:03", instant("2026-11-20T09:00:03Z")),
            ("10:00:03.25", instant("2026-11-20T09:00:03.25Z")),
            ("-5m", instant("2026-11-20T10:55:00Z")),
            ("-1h30m", instant("2026-11-20T09:30:00Z")),
            ("5 minutes ago", instant("2026-11-20T10:55:00Z")),
            ("90s ago", instant("2026-11-20T10:58:30Z")),
            ("-PT2S", instant("2026-11-20T10:59:58Z")),
            ("-1d", instant("2026-11-19T11:00:00Z")),
        ];
        for (text, want) in cases {
            assert_eq!(parse(text), Ok(want), "{text}");
        }
    }

    #[test]
    fn a_time_to_the_second_is_the_start_of_that_second() {
        let stamp_ns = 1_795_168_803_000_000_000;
        assert_eq!(parse("2026-11-20T10:00:03Z"), Ok(PointSpec::Time { stamp_ns }));
    }

    #[test]
    fn an_offset_is_never_dropped() {
        for text in
            ["2026-11-20T10:00:03 02:00", "2026-11-20T10:00:03+99:00", "10:00:03+02:00", "10:00:03-02:00"]
        {
            assert!(matches!(parse(text), Err(PointSpecError::Malformed(_))), "{text}: {:?}", parse(text));
        }
    }

    #[test]
    fn what_begins_like_a_time_and_is_none_is_said_so() {
        let texts = [
            "25:99:99",
            "24:00:01",
            "10:60",
            "10:00:61",
            "1:2:3:4",
            "2026-13-01",
            "2026-02-30",
            "2026-11",
            "20/11/2026",
            "2026-11-20T25:00:00Z",
            "2026-11-20 10:00:03 PM",
            "10000-01-01",
            "2026-11-20T",
            "10:",
        ];
        for text in texts {
            let error = parse(text).expect_err(text);
            assert_eq!(error, PointSpecError::Malformed(text.to_owned()));
            assert!(error.to_string().contains("10:00:03"), "{error}");
        }
    }

    #[test]
    fn a_year_that_no_journal_can_hold_is_said_so() {
        for text in ["0000-01-01T00:00:00Z", "0000-01-01", "9999-01-01", "-100y", "-600000000s"] {
            let error = parse(text);
            let far = matches!(error, Err(PointSpecError::Range(_)));
            assert_eq!(far, text != "-600000000s", "{text}: {error:?}");
        }
    }

    #[test]
    fn a_local_time_that_the_clock_showed_twice_or_never_is_refused() {
        for text in ["2026-10-25 02:30:00", "2026-03-29 02:30:00"] {
            assert!(matches!(parse(text), Err(PointSpecError::Ambiguous(_))), "{text}");
        }
    }

    #[test]
    fn what_is_no_point_says_what_would_be_one() {
        assert_eq!(parse(""), Err(PointSpecError::Length));
        assert_eq!(parse(&"x".repeat(MAX_POINT_BYTES + 1)), Err(PointSpecError::Length));
        for text in ["lsn:", "lsn:-1", "lsn:+1", "lsn: 1", "lsn:1.5", "lsn:x", "lsn:18446744073709551616"] {
            assert!(matches!(parse(text), Err(PointSpecError::Lsn(_))), "{text}");
        }
        assert_eq!(parse("   "), Err(PointSpecError::Length));
        assert!(matches!(parse("bookmark:"), Err(PointSpecError::Bookmark(_))));
        for text in ["5m", "1h30m", "+5m", "5 minutes"] {
            assert!(matches!(parse(text), Err(PointSpecError::Future(_))), "{text}: {:?}", parse(text));
        }
        assert!(matches!(parse("1969-12-31T23:00:00Z"), Err(PointSpecError::Range(_))));
        for text in ["yesterday", "10", "1042", "-", "-5", "-1:30", "--5m", "-5x", "ago", "now", "LATEST"] {
            assert!(matches!(parse(text), Err(PointSpecError::Unknown(_))), "{text}: {:?}", parse(text));
        }
    }

    #[test]
    fn the_canonical_form_reads_back_in_any_zone() {
        let utc: Zoned = "2020-01-01T00:00:00[UTC]".parse().expect("a time with zone");
        for text in ["lsn:7", "bookmark:x:y", "latest", "10:00:03.25", "-5m"] {
            let spec = parse(text).expect("a point");
            assert_eq!(PointSpec::parse(&spec.to_string(), &utc), Ok(spec), "{text}");
        }
    }
}
