//! What the drills of both daemons have in common: how they are written, and when they strike. What fails is each one's own.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The name of something that can be made to fail, and an example of its value.
pub type Knob = (&'static str, &'static str);

/// Reads `knob=value`, with commas in between; `take` gets each pair, and says `None` to a value that is none.
///
/// # Errors
/// What is wrong and what there is, in words for the command line.
pub fn read(
    text: &str,
    knobs: &[Knob],
    mut take: impl FnMut(&str, &str) -> Option<()>,
) -> Result<(), String> {
    for part in text.split(',') {
        let (name, value) =
            part.trim().split_once('=').ok_or_else(|| format!("`{part}` is no knob=value"))?;
        let Some((_, example)) = knobs.iter().find(|(knob, _)| *knob == name) else {
            let all: Vec<&str> = knobs.iter().map(|(knob, _)| *knob).collect();
            return Err(format!("there is no knob `{name}`; there are {}", all.join(", ")));
        };
        take(name, value)
            .ok_or_else(|| format!("`{value}` is no value of {name}; such as {name}={example}"))?;
    }
    Ok(())
}

/// A number from 1.
#[must_use]
pub fn count(text: &str) -> Option<u64> {
    text.parse().ok().filter(|count| *count > 0)
}

/// A number of bytes: plain, or in KiB, MiB, GiB.
#[must_use]
pub fn bytes(text: &str) -> Option<u64> {
    let units = [("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("", 1)];
    let (number, unit) = units.iter().find_map(|(name, unit)| Some((text.strip_suffix(name)?, *unit)))?;
    number.parse::<u64>().ok()?.checked_mul(unit)
}

/// `10s@30s`: how long, and how long after the start it begins.
#[must_use]
pub fn window(text: &str) -> Option<Window> {
    let (length, begin) = text.split_once('@')?;
    let (length, begin) = (duration(length)?, duration(begin)?);
    Some(Window { begin, end: begin.checked_add(length)? })
}

fn duration(text: &str) -> Option<Duration> {
    if let Some(ms) = text.strip_suffix("ms") {
        return ms.parse().ok().map(Duration::from_millis);
    }
    text.strip_suffix('s')?.parse().ok().map(Duration::from_secs)
}

/// A stretch of time, counted from the start.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Window {
    /// When it begins.
    pub begin: Duration,
    /// When it is over.
    pub end: Duration,
}

impl Window {
    /// How long it still lasts; `None` outside of it.
    #[must_use]
    pub fn left(self, since_start: Duration) -> Option<Duration> {
        (since_start >= self.begin).then(|| self.end.checked_sub(since_start)).flatten()
    }
}

/// A count from any thread.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// Adds to it and gives what it was before.
    pub fn add(&self, n: u64) -> u64 {
        // ORDERING: a count on its own; nothing is published through it.
        self.0.fetch_add(n, Ordering::Relaxed)
    }

    /// Counts a call; fails each `every`-th.
    ///
    /// # Errors
    /// When it is this one's turn.
    pub fn fail_each(&self, every: Option<u64>, what: &str) -> io::Result<()> {
        let Some(every) = every else { return Ok(()) };
        if self.add(1).saturating_add(1).is_multiple_of(every) { Err(injected(what)) } else { Ok(()) }
    }
}

/// A call that fails on purpose.
#[must_use]
pub fn injected(what: &str) -> io::Error {
    io::Error::other(format!("drill: {what} error"))
}

/// A disk that is full on purpose.
#[must_use]
pub fn no_space() -> io::Error {
    io::Error::new(io::ErrorKind::StorageFull, "drill: no space left on device")
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOBS: [Knob; 2] = [("full-after", "64MiB"), ("freeze-for", "10s@30s")];

    fn parse(text: &str) -> Result<(Option<u64>, Option<Window>), String> {
        let (mut full, mut freeze) = (None, None);
        read(text, &KNOBS, |knob, value| {
            match knob {
                "full-after" => full = Some(bytes(value)?),
                _ => freeze = Some(window(value)?),
            }
            Some(())
        })?;
        Ok((full, freeze))
    }

    #[test]
    fn a_spec_parses_whole_or_is_refused_with_what_there_is() {
        let (begin, end) = (Duration::from_millis(500), Duration::from_millis(10_500));
        let both = parse("full-after=64MiB, freeze-for=10s@500ms");
        assert_eq!(both, Ok((Some(64 << 20), Some(Window { begin, end }))));
        for text in ["", "full-after", "full-after=64MB", "freeze-for=10s", "freeze-for=1s@x", "x=1"] {
            assert!(parse(text).is_err(), "{text}");
        }
        assert!(parse("fsync=1").expect_err("refused").contains("there are full-after, freeze-for"));
        assert!(parse("full-after=x").expect_err("refused").contains("full-after=64MiB"));
        assert_eq!((count("0"), count("3")), (None, Some(3)));
    }

    #[test]
    fn a_window_says_what_is_left_of_it() {
        let window = window("10s@30s").expect("parses");
        let left = |s| window.left(Duration::from_secs(s)).map(|left| left.as_secs());
        assert_eq!([left(29), left(30), left(39), left(41)], [None, Some(10), Some(1), None]);
    }
}
