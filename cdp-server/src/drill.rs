//! Drills: a store that fails on purpose, so that operators see what a failure looks like before they have one.
//!
//! The knobs sit at the store's I/O seam: everything above it, from recovery to the agent's patience, is the real thing.
//! What each drill shows and how to come back is in `docs/operating/drills.md`.

use std::fmt;
use std::io;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use journal_store::io::{Access, Bytes, File, Lock, Storage};

/// What shall fail. Text form: `knob=value` with commas in between.
///
/// | knob | what happens |
/// | --- | --- |
/// | `disk-full-after=64MiB` | once so much was written, writing says "no space left" |
/// | `disk-full-for=20s@30s` | the same for 20 s, beginning 30 s after the start |
/// | `fsync-error-after=N` | after N good durability steps one fails |
/// | `write-error-every=N`, `read-error-every=N` | each N-th write, or read, fails |
/// | `freeze-for=10s@30s` | all of the store's I/O hangs for 10 s, beginning 30 s after the start |
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Drill {
    text: String,
    disk_full_after: Option<u64>,
    disk_full: Option<Window>,
    fsync_error_after: Option<u64>,
    write_error_every: Option<u64>,
    read_error_every: Option<u64>,
    freeze: Option<Window>,
}

/// A stretch of time, counted from the start.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Window {
    begin: Duration,
    end: Duration,
}

impl FromStr for Drill {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut drill = Self { text: text.to_owned(), ..Self::default() };
        for part in text.split(',') {
            let (knob, value) =
                part.trim().split_once('=').ok_or_else(|| format!("`{part}` is no knob=value"))?;
            let bad = || format!("`{value}` is no value of {knob}; such as {}", example(knob));
            match knob {
                "disk-full-after" => drill.disk_full_after = Some(bytes(value).ok_or_else(bad)?),
                "disk-full-for" => drill.disk_full = Some(window(value).ok_or_else(bad)?),
                "fsync-error-after" => drill.fsync_error_after = Some(value.parse().map_err(|_| bad())?),
                "write-error-every" => drill.write_error_every = Some(count(value).ok_or_else(bad)?),
                "read-error-every" => drill.read_error_every = Some(count(value).ok_or_else(bad)?),
                "freeze-for" => drill.freeze = Some(window(value).ok_or_else(bad)?),
                _ => {
                    return Err(format!(
                        "there is no knob `{knob}`; there are {}",
                        KNOBS.map(|(name, _)| name).join(", ")
                    ));
                }
            }
        }
        Ok(drill)
    }
}

impl fmt::Display for Drill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

const KNOBS: [(&str, &str); 6] = [
    ("disk-full-after", "64MiB"),
    ("disk-full-for", "20s@30s"),
    ("fsync-error-after", "100"),
    ("write-error-every", "1000"),
    ("read-error-every", "1000"),
    ("freeze-for", "10s@30s"),
];

fn example(knob: &str) -> String {
    KNOBS
        .iter()
        .find(|(name, _)| *name == knob)
        .map_or_else(String::new, |(name, value)| format!("{name}={value}"))
}

fn count(text: &str) -> Option<u64> {
    text.parse().ok().filter(|count| *count > 0)
}

/// A number of bytes: plain, or in KiB, MiB, GiB.
fn bytes(text: &str) -> Option<u64> {
    let units = [("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("", 1)];
    let (number, unit) = units.iter().find_map(|(name, unit)| Some((text.strip_suffix(name)?, *unit)))?;
    number.parse::<u64>().ok()?.checked_mul(unit)
}

/// `10s@30s`: how long, and how long after the start it begins.
fn window(text: &str) -> Option<Window> {
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

/// The storage for a server: with a drill, one that fails as it says.
pub(crate) fn storage(real: Arc<dyn Storage>, drill: Option<&Drill>) -> Arc<dyn Storage> {
    let Some(drill) = drill else { return real };
    tracing::error!(%drill, "THIS IS A DRILL: the store fails on purpose; restart without --drill to end it");
    let counts = Counts::default();
    Arc::new(Drilled {
        inner: real,
        fate: Arc::new(Fate { drill: drill.clone(), start: Instant::now(), counts }),
    })
}

#[derive(Debug, Default)]
struct Counts {
    written: AtomicU64,
    writes: AtomicU64,
    reads: AtomicU64,
    syncs: AtomicU64,
}

/// Decides which call fails.
#[derive(Debug)]
struct Fate {
    drill: Drill,
    start: Instant,
    counts: Counts,
}

/// Adds to a count and gives it before that. (ORDERING: a count on its own; nothing is published through it.)
fn add(count: &AtomicU64, n: u64) -> u64 {
    count.fetch_add(n, Ordering::Relaxed) // ORDERING: see above
}

impl Fate {
    fn is_in(&self, window: Option<Window>) -> Option<Duration> {
        let (window, now) = (window?, self.start.elapsed());
        (now >= window.begin).then(|| window.end.checked_sub(now)).flatten()
    }

    /// Hangs while everything is frozen.
    fn freeze(&self) {
        if let Some(left) = self.is_in(self.drill.freeze) {
            thread::sleep(left);
        }
    }

    fn read(&self) -> io::Result<()> {
        self.freeze();
        fail_each(&self.counts.reads, self.drill.read_error_every, "read")
    }

    /// Before `length` bytes are written, or (with 0) a name is made.
    fn write(&self, length: u64) -> io::Result<()> {
        self.freeze();
        let written = add(&self.counts.written, length);
        let over = self.drill.disk_full_after.is_some_and(|most| written.saturating_add(length) > most);
        if over || self.is_in(self.drill.disk_full).is_some() {
            return Err(io::Error::new(io::ErrorKind::StorageFull, "drill: no space left on device"));
        }
        fail_each(&self.counts.writes, self.drill.write_error_every, "write")
    }

    fn sync(&self) -> io::Result<()> {
        self.freeze();
        let before = add(&self.counts.syncs, 1);
        if self.drill.fsync_error_after == Some(before) { Err(injected("fsync")) } else { Ok(()) }
    }
}

fn fail_each(count: &AtomicU64, every: Option<u64>, what: &str) -> io::Result<()> {
    let Some(every) = every else { return Ok(()) };
    if (add(count, 1) + 1).is_multiple_of(every) { Err(injected(what)) } else { Ok(()) }
}

fn injected(what: &str) -> io::Error {
    io::Error::other(format!("drill: {what} error"))
}

/// Storage that fails as a drill says.
#[derive(Debug)]
struct Drilled {
    inner: Arc<dyn Storage>,
    fate: Arc<Fate>,
}

#[derive(Debug)]
struct DrilledFile {
    inner: Arc<dyn File>,
    fate: Arc<Fate>,
}

impl Drilled {
    fn wrap(&self, inner: Arc<dyn File>) -> Arc<dyn File> {
        Arc::new(DrilledFile { inner, fate: Arc::clone(&self.fate) })
    }
}

impl File for DrilledFile {
    fn read_at(&self, buf: &mut [u8], position: u64) -> io::Result<()> {
        self.fate.read()?;
        self.inner.read_at(buf, position)
    }

    fn write_at(&self, bytes: &[u8], position: u64) -> io::Result<()> {
        self.fate.write(bytes.len() as u64)?;
        self.inner.write_at(bytes, position)
    }

    fn sync(&self) -> io::Result<()> {
        self.fate.sync()?;
        self.inner.sync()
    }

    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.fate.freeze();
        self.inner.set_len(length)
    }
}

impl Storage for Drilled {
    fn create(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        self.fate.write(0)?;
        Ok(self.wrap(self.inner.create(path)?))
    }

    fn open(&self, path: &Path, access: Access) -> io::Result<Arc<dyn File>> {
        Ok(self.wrap(self.inner.open(path, access)?))
    }

    fn load(&self, path: &Path) -> io::Result<Bytes> {
        self.fate.read()?;
        self.inner.load(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.inner.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.inner.remove(path)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        self.inner.list(dir)
    }

    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        self.inner.create_dir(dir)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.fate.sync()?;
        self.inner.sync_dir(dir)
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn Lock>> {
        self.inner.lock(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spec_parses_whole_or_is_refused_with_what_there_is() {
        let drill: Drill = "disk-full-after=64MiB, freeze-for=10s@500ms".parse().expect("parses");
        assert_eq!(drill.disk_full_after, Some(64 << 20));
        let (begin, end) = (Duration::from_millis(500), Duration::from_millis(10_500));
        assert_eq!(drill.freeze, Some(Window { begin, end }));
        for text in
            ["", "disk-full-after", "disk-full-after=64MB", "freeze-for=10s", "read-error-every=0", "x=1"]
        {
            assert!(text.parse::<Drill>().is_err(), "{text}");
        }
        let error = "fsync=1".parse::<Drill>().expect_err("refused");
        assert!(error.contains("fsync-error-after"), "{error}");
    }

    #[test]
    fn every_example_is_one() {
        for (name, value) in KNOBS {
            assert!(format!("{name}={value}").parse::<Drill>().is_ok(), "{name}");
        }
    }
}
