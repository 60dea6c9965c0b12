//! The command line.

use core::ops::RangeInclusive;

use cdp_api::client::{parse_disk, parse_server};
use cdp_api::limits::{RING_MIB, SYNC_TIMEOUT_MS, THROTTLE_MS};
use clap::{Parser, Subcommand, ValueEnum};

const AFTER_HELP: &str = "\
Exit codes:
  0    done
  1    failed, or standard output could not be written
  2    the command line or a value in it is wrong
  3    the point is in a gap or out of range; the nearest points that can be restored are shown
  4    verify found damage
  141  the reader of standard output went away";

/// Looks after the disks that a qemu-cdp server protects.
///
/// A disk is named by its UUID or as vm/device, as `disk list` shows it; before a name that begins with a minus put `--`.
/// A point in time is `lsn:N`, `bookmark:NAME`, `latest`, a time such as
/// `2026-11-20T10:00:03Z`, `2026-11-20 10:00:03` or `10:00:03` (local), or how long ago, such as `-5m` or
/// `5 minutes ago`. A time to the second means the start of that second.
#[derive(Parser, Debug)]
#[command(
    name = "cdpctl",
    version,
    after_help = AFTER_HELP
)]
pub(crate) struct Args {
    /// Address of the server
    #[arg(
        long,
        global = true,
        env = "CDP_SERVER",
        value_name = "URL",
        value_parser = parse_server,
        default_value = "http://127.0.0.1:7410"
    )]
    pub(crate) server: String,
    /// How to print results
    #[arg(long, global = true, value_enum, value_name = "FORMAT", default_value = "text")]
    pub(crate) output_format: Format,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// How to print results.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Format {
    /// For people; the layout may change.
    Text,
    /// For programs: one document, the API's own JSON; after a failure {"error": {kind, detail, hint, …}}.
    Json,
}

/// On or off.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Switch {
    /// Yes.
    On,
    /// No.
    Off,
}

#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    /// Show disks
    #[command(subcommand)]
    Disk(DiskCommand),
    /// Switch protection of a disk on, or change how it is protected; works while its VM runs
    ///
    /// What no option speaks of stays as it is.
    Protect {
        /// UUID or vm/device
        #[arg(value_parser = parse_disk)]
        disk: String,
        /// What a guest's write does that finds the capture ring full: track (go on, a gap), throttle (wait for up to
        /// --throttle-ms, then track), strict (wait) [at first: track]
        #[arg(long, value_name = "POLICY", value_parser = ["track", "throttle", "strict"], hide_possible_values = true)]
        policy: Option<String>,
        /// With throttle: longest wait of a write, 1 to 600000 ms [at first: 1000]
        #[arg(long, value_name = "MS", value_parser = |text: &str| within(text, THROTTLE_MS))]
        throttle_ms: Option<u64>,
        /// Size of the capture ring, 8 to 16384 MiB; counts from the next capture on [at first: the agent's --ring-mib]
        #[arg(long, value_name = "MIB", value_parser = |text: &str| within(text, RING_MIB))]
        ring_mib: Option<u64>,
        /// Whether a guest's flush waits until the server has made everything before it durable
        #[arg(long, value_enum, value_name = "on|off")]
        sync: Option<Switch>,
        /// With sync: longest wait of a flush, 1 to 3600000 ms [at first: 10000]
        #[arg(long, value_name = "MS", value_parser = |text: &str| within(text, SYNC_TIMEOUT_MS))]
        sync_timeout_ms: Option<u64>,
    },
    /// Switch protection of a disk off; its history stays
    Unprotect {
        /// UUID or vm/device
        #[arg(value_parser = parse_disk)]
        disk: String,
    },
    /// Show what of a disk can be restored
    Points {
        /// UUID or vm/device
        #[arg(value_parser = parse_disk)]
        disk: String,
        /// Also show what this point resolves to
        #[arg(long, value_name = "POINT", allow_hyphen_values = true)]
        at: Option<String>,
    },
    /// Have the server read and check everything that it keeps of a disk, or of all disks
    ///
    /// Says what is damaged: file, place, records, and what to do. Ends with 4 when something is.
    Verify {
        /// UUID or vm/device; all disks when absent
        #[arg(value_parser = parse_disk)]
        disk: Option<String>,
    },
    /// Name a point of a disk: now, or one that exists
    Bookmark {
        /// UUID or vm/device
        #[arg(value_parser = parse_disk)]
        disk: String,
        /// 1 to 255 bytes, unique for the disk
        name: String,
        /// The point to name, instead of now
        #[arg(long, value_name = "POINT", allow_hyphen_values = true)]
        at: Option<String>,
    },
}

#[derive(Subcommand, Debug)]
pub(crate) enum DiskCommand {
    /// All disks, protected or not
    List,
    /// One disk with all that is known of it
    Show {
        /// UUID or vm/device
        #[arg(value_parser = parse_disk)]
        disk: String,
    },
}

/// Reads a number that the server would take.
fn within(text: &str, range: RangeInclusive<u32>) -> Result<u64, String> {
    let value = text.parse().ok().filter(|value| range.contains(value));
    value
        .map(u64::from)
        .ok_or_else(|| format!("give a whole number from {} to {}", range.start(), range.end()))
}
