//! Drills: an agent whose surroundings fail on purpose, so that operators see what that looks like before it happens.
//!
//! The knobs sit where the agent meets the world (the spool's files, the connection, the drain's thread): everything
//! behind them, from the spool's patience to the disk's policy, is the real thing. What each drill shows and how to come back is
//! in `docs/operating/drills.md`.

use std::fmt;
use std::io;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use daemon::drill::{Count, Knob, Window, bytes, count, injected, no_space, read, window};

/// What shall fail. Text form: `knob=value` with commas in between.
///
/// | knob | what happens |
/// | --- | --- |
/// | `spool-full-after=64MiB` | once so much was written to spools, writing to them says "no space left" |
/// | `spool-full-for=20s@30s` | the same for 20 s, beginning 30 s after the start |
/// | `spool-error-every=N` | each N-th write to a spool fails |
/// | `cut-for=20s@30s` | no connection to the server for 20 s, beginning 30 s after the start |
/// | `send-stall-for=20s@30s` | for so long nothing is sent to the server, and the connection stays |
/// | `drain-stall-for=20s@30s` | for so long nothing is taken out of rings |
///
/// Clones count together; time counts from when it was read.
#[derive(Clone, Debug)]
pub struct Drill {
    text: String,
    spool_full_after: Option<u64>,
    spool_full: Option<Window>,
    spool_error_every: Option<u64>,
    cut: Option<Window>,
    send_stall: Option<Window>,
    drain_stall: Option<Window>,
    started: Instant,
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    written: Count,
    writes: Count,
}

const KNOBS: [Knob; 6] = [
    ("spool-full-after", "64MiB"),
    ("spool-full-for", "20s@30s"),
    ("spool-error-every", "100"),
    ("cut-for", "20s@30s"),
    ("send-stall-for", "20s@30s"),
    ("drain-stall-for", "20s@30s"),
];

impl FromStr for Drill {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut drill = Self {
            text: text.to_owned(),
            spool_full_after: None,
            spool_full: None,
            spool_error_every: None,
            cut: None,
            send_stall: None,
            drain_stall: None,
            started: Instant::now(),
            counts: Arc::default(),
        };
        read(text, &KNOBS, |knob, value| {
            match knob {
                "spool-full-after" => drill.spool_full_after = Some(bytes(value)?),
                "spool-full-for" => drill.spool_full = Some(window(value)?),
                "spool-error-every" => drill.spool_error_every = Some(count(value)?),
                "cut-for" => drill.cut = Some(window(value)?),
                "send-stall-for" => drill.send_stall = Some(window(value)?),
                _ => drill.drain_stall = Some(window(value)?),
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

impl Drill {
    fn left(&self, window: Option<Window>) -> Option<Duration> {
        window?.left(self.started.elapsed())
    }

    /// Before so many bytes are written to a spool: how many of them still get there, and the error, if that fails.
    pub(crate) fn spool_write(&self, length: usize) -> Result<(), (usize, io::Error)> {
        let more = length as u64;
        let written = self.counts.written.add(more);
        let room = self.spool_full_after.map_or(u64::MAX, |most| most.saturating_sub(written));
        if room < more {
            return Err((usize::try_from(room).unwrap_or(0), no_space()));
        }
        if self.left(self.spool_full).is_some() {
            return Err((0, no_space()));
        }
        let failed = self.counts.writes.fail_each(self.spool_error_every, "write");
        failed.map_err(|error| (length / 2, error))
    }

    /// Whether there is no connection now; why.
    pub(crate) fn cut(&self) -> Option<io::Error> {
        self.left(self.cut).map(|_| injected("network"))
    }

    /// Whether nothing is sent now.
    pub(crate) fn stalls_sends(&self) -> bool {
        self.left(self.send_stall).is_some()
    }

    /// How long nothing is taken out of rings from now on.
    pub(crate) fn stalls_drains(&self) -> Option<Duration> {
        self.left(self.drain_stall)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_example_is_one_and_nothing_else() {
        for (name, value) in KNOBS {
            assert!(format!("{name}={value}").parse::<Drill>().is_ok(), "{name}");
        }
        for wrong in ["spool-full-after=64MB", "cut-for=10s", "spool-error-every=0", "fsync=1", ""] {
            assert!(wrong.parse::<Drill>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_spool_is_full_where_it_was_said_and_a_part_of_the_write_gets_there() {
        let drill: Drill = "spool-full-after=10KiB".parse().unwrap();
        assert!(drill.spool_write(8000).is_ok());
        let (part, error) = drill.clone().spool_write(4000).unwrap_err();
        assert_eq!((part, error.kind()), (2240, io::ErrorKind::StorageFull));
        assert_eq!(drill.spool_write(1).unwrap_err().0, 0, "clones count together");
    }
}
