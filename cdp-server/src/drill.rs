//! Drills: a store that fails on purpose, so that operators see what a failure looks like before they have one.
//!
//! The knobs sit at the store's I/O seam: everything above it, from recovery to the agent's patience, is the real thing.
//! What each drill shows and how to come back is in `docs/operating/drills.md`.

use std::fmt;
use std::io;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use daemon::drill::{Count, Knob, Window, bytes, count, injected, no_space, read, window};
use journal_store::io::{Access, Bytes, File, Lock, Storage, Way};

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

impl FromStr for Drill {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut drill = Self { text: text.to_owned(), ..Self::default() };
        read(text, &KNOBS, |knob, value| {
            match knob {
                "disk-full-after" => drill.disk_full_after = Some(bytes(value)?),
                "disk-full-for" => drill.disk_full = Some(window(value)?),
                "fsync-error-after" => drill.fsync_error_after = Some(value.parse().ok()?),
                "write-error-every" => drill.write_error_every = Some(count(value)?),
                "read-error-every" => drill.read_error_every = Some(count(value)?),
                _ => drill.freeze = Some(window(value)?),
            }
            Some(())
        })?;
        Ok(drill)
    }
}

impl fmt::Display for Drill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

const KNOBS: [Knob; 6] = [
    ("disk-full-after", "64MiB"),
    ("disk-full-for", "20s@30s"),
    ("fsync-error-after", "100"),
    ("write-error-every", "1000"),
    ("read-error-every", "1000"),
    ("freeze-for", "10s@30s"),
];

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
    written: Count,
    writes: Count,
    reads: Count,
    syncs: Count,
}

/// Decides which call fails.
#[derive(Debug)]
struct Fate {
    drill: Drill,
    start: Instant,
    counts: Counts,
}

impl Fate {
    fn is_in(&self, window: Option<Window>) -> Option<Duration> {
        window?.left(self.start.elapsed())
    }

    /// Hangs while everything is frozen.
    fn freeze(&self) {
        if let Some(left) = self.is_in(self.drill.freeze) {
            thread::sleep(left);
        }
    }

    fn read(&self) -> io::Result<()> {
        self.freeze();
        self.counts.reads.fail_each(self.drill.read_error_every, "read")
    }

    /// Before `length` bytes are written, or (with 0) a name is made.
    fn write(&self, length: u64) -> io::Result<()> {
        self.freeze();
        let written = self.counts.written.add(length);
        let over = self.drill.disk_full_after.is_some_and(|most| written.saturating_add(length) > most);
        if over || self.is_in(self.drill.disk_full).is_some() {
            return Err(no_space());
        }
        self.counts.writes.fail_each(self.drill.write_error_every, "write")
    }

    fn sync(&self) -> io::Result<()> {
        self.freeze();
        let before = self.counts.syncs.add(1);
        if self.drill.fsync_error_after == Some(before) { Err(injected("fsync")) } else { Ok(()) }
    }
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

    fn write_pages(&self, pages: &[u8], position: u64) -> io::Result<Way> {
        self.fate.write(pages.len() as u64)?;
        self.inner.write_pages(pages, position)
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
    fn every_example_is_one() {
        for (name, value) in KNOBS {
            let drill: Drill = format!("{name}={value}").parse().expect(name);
            assert_ne!(Drill { text: String::new(), ..drill }, Drill::default(), "{name} does something");
        }
        for wrong in ["disk-full-after=64MB", "freeze-for=10s", "read-error-every=0", "fsync=1"] {
            assert!(wrong.parse::<Drill>().is_err(), "{wrong}");
        }
    }
}
