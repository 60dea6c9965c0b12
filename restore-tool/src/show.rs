//! What people and programs get to see.

use std::fmt::Write as _;
use std::io::{self, IsTerminal};

use cdp_api::ResolvedPoint;
use cdp_api::program::Failure;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use restore_tool::restore::Stage;
use restore_tool::{Listing, Report, RestoreError};

/// `lsn 1042, 2026-11-20T10:00:03.000000000Z (2026-11-20 11:00:03.000000000 local), after a flush`.
pub(crate) fn point(point: &ResolvedPoint) -> String {
    format!("lsn {}, {} ({} local), {}", point.lsn, point.time, local(point.stamp_ns), point.kind.describe())
}

fn local(stamp_ns: u64) -> String {
    let instant = Timestamp::from_nanosecond(i128::from(stamp_ns)).unwrap_or(Timestamp::MAX);
    instant.to_zoned(TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S.%9f %:z").to_string()
}

/// What was done, for people.
pub(crate) fn report(report: &Report) -> String {
    let mut text = format!(
        "restored {} to {} ({} bytes, {} of them not zero), read back and compared, in {:.1} s",
        report.disk.label(),
        report.output.display(),
        report.disk_bytes,
        report.data_bytes,
        report.duration_s
    );
    if let Some(remark) = &report.remark {
        let _ = write!(text, "\nnote: {remark}");
    }
    text
}

/// An error, for people: what, where else to look, what is left, what next.
pub(crate) fn error(error: &RestoreError, left: Option<&str>) -> String {
    let mut text = format!("cdp-restore: {error}");
    if let RestoreError::Problem(problem) = error {
        for (word, near) in [("before", &problem.before), ("after", &problem.after)] {
            if let Some(near) = near {
                let _ = write!(text, "\n  nearest point {word}: {}", point(near));
            }
        }
    }
    if let Some(left) = left {
        let _ = write!(text, "\n  state: {left}");
    }
    if !error.hint().is_empty() {
        let _ = write!(text, "\n  hint: {}", error.hint());
    }
    text
}

/// An error, for programs.
pub(crate) fn error_json<'a>(error: &'a RestoreError, left: Option<&'a str>) -> Failure<'a> {
    let failure = Failure { state: left, ..Failure::new(error.kind(), error.to_string(), error.hint()) };
    match error {
        RestoreError::Problem(problem) => failure.near(problem),
        _ => failure,
    }
}

/// The disks and their points, for people.
pub(crate) fn listings(listings: &[Listing]) -> String {
    if listings.is_empty() {
        return "no disk has a journal here\n".to_owned();
    }
    let mut text = String::new();
    for listing in listings {
        let Listing { name, disk_bytes, points } = listing;
        let _ = writeln!(text, "{}  {}  {disk_bytes} bytes", name.label(), name.id);
        for range in &points.recoverable {
            let (from, to) = (local(range.from_stamp_ns), local(range.to_stamp_ns));
            let _ =
                writeln!(text, "  recoverable  lsn {} to {}  {from} to {to}", range.from_lsn, range.to_lsn);
        }
        for gap in &points.gaps {
            let end = match (gap.to_lsn, gap.to_stamp_ns) {
                (Some(lsn), Some(stamp)) => {
                    format!("before {lsn}  {} to {}", local(gap.from_stamp_ns), local(stamp))
                }
                _ => format!("open  since {}", local(gap.from_stamp_ns)),
            };
            let _ = writeln!(text, "  gap          lsn {} to {end}  ({})", gap.from_lsn, gap.reason);
        }
        for mark in &points.bookmarks {
            let _ =
                writeln!(text, "  bookmark     lsn {}  {}  {}", mark.lsn, local(mark.stamp_ns), mark.name);
        }
    }
    text
}

/// A progress bar on a terminal, nothing in a pipe.
pub(crate) struct Progress {
    bar: ProgressBar,
}

impl Progress {
    pub(crate) fn new(disk_bytes: u64) -> Self {
        let visible = io::stderr().is_terminal();
        let target = if visible { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(disk_bytes), target);
        let style = "{msg:9} [{bar:32}] {percent:>3}% {bytes}/{total_bytes} {bytes_per_sec}, {eta} left";
        bar.set_style(ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()));
        Self { bar }
    }

    pub(crate) fn at(&self, stage: Stage, position: u64) {
        let name = match stage {
            Stage::Copy => "restoring",
            Stage::Verify => "verifying",
        };
        if self.bar.message() != name {
            self.bar.set_message(name);
            self.bar.reset();
        }
        self.bar.set_position(position);
    }

    pub(crate) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
