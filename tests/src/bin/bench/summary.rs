//! The tables of `docs/performance.md`: a selection of what was measured, written into the document from the reports' JSON.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::ExitCode;

use crate::report::{Report, Spread, read};

/// Stands before a table of a document, with the table's name up to [`MARK_END`].
const MARK: &str = "<!-- table: ";
const MARK_END: &str = " -->";

/// A table. A cell is what the table, its row and its column choose together: `report`, `section`, `medium`, `pattern`, `variant`, and
/// either `value` or `times` (a value, by its ratio to that of the first variant in the same round).
struct Table {
    name: &'static str,
    /// Its first cell.
    head: &'static str,
    choice: &'static str,
    columns: &'static [Line],
    /// In groups, as tables share some.
    rows: &'static [&'static [Line]],
}

/// A row or a column: what stands there, and what it chooses.
type Line = (&'static str, &'static str);

const PATTERNS: &[Line] = &[
    ("4 KiB, depth 1", "pattern: 4 KiB, depth 1"),
    ("4 KiB, depth 32", "pattern: 4 KiB, depth 32"),
    ("64 KiB, depth 8", "pattern: 64 KiB, depth 8"),
    ("1 MiB, depth 4", "pattern: 1 MiB, depth 4"),
];

/// A write of the plain disk, in process.
const WRITE: &[Line] = &[("plain, µs a write", "variant: plain; value: us_per_write")];

const BESIDE: &[Line] =
    &[("plain, the other core copies", "variant: plain, the other core copies; value: added_us")];

const ADDED: &[Line] = &[
    ("throttle, no limit", "variant: throttle, no limit; value: added_us"),
    ("qemu-cdp, off", "variant: qemu-cdp, off; value: added_us"),
    ("qemu-cdp, on", "variant: qemu-cdp, on; value: added_us"),
    ("blklogwrites, local", "variant: blklogwrites, local; value: added_us"),
    ("quorum of 2, local", "variant: quorum of 2, local; value: added_us"),
];

const ADDED_BY_REMOTE: &[Line] = &[
    ("blklogwrites, NBD", "variant: blklogwrites, NBD; value: added_us"),
    ("quorum of 2, NBD", "variant: quorum of 2, NBD; value: added_us"),
    ("copy-before-write, NBD", "variant: copy-before-write, NBD; value: added_us"),
];

const ADDED_TIME: &[Line] = &[
    ("qemu-cdp on, processor time added in QEMU, µs", "variant: qemu-cdp, on; value: added_cpu_us"),
    (
        "qemu-cdp on, of what blklogwrites adds to it",
        "variant: qemu-cdp, on; value: added_cpu_to_blklogwrites",
    ),
    ("qemu-cdp on, µs of the agent", "variant: qemu-cdp, on; value: cpu_agent_us"),
    ("qemu-cdp on, µs of the server", "variant: qemu-cdp, on; value: cpu_server_us"),
];

const CAPTURED: &[Line] = &[("qemu-cdp on: captured", "variant: qemu-cdp, on; value: captured")];

const IN_BURSTS: &[&[Line]] = &[WRITE, BESIDE, ADDED, ADDED_TIME];

const PLAIN_RATE: &[Line] = &[("plain, writes/s", "variant: plain; value: iops")];

const OFF: &[Line] = &[
    ("throttle, no limit", "variant: throttle, no limit; times: iops"),
    ("qemu-cdp, off", "variant: qemu-cdp, off; times: iops"),
];

const ON: &[Line] = &[("qemu-cdp, on", "variant: qemu-cdp, on; times: iops")];

const LOCAL: &[Line] = &[
    ("blklogwrites, local", "variant: blklogwrites, local; times: iops"),
    ("quorum of 2, local", "variant: quorum of 2, local; times: iops"),
];

const REMOTE: &[Line] = &[
    ("blklogwrites, NBD", "variant: blklogwrites, NBD; times: iops"),
    ("quorum of 2, NBD", "variant: quorum of 2, NBD; times: iops"),
    ("mirror, write-blocking", "variant: mirror, write-blocking; times: iops"),
    ("mirror, background", "variant: mirror, background; times: iops"),
    ("backup, sync=none", "variant: backup, sync=none; times: iops"),
];

const TAILS: &[Line] = &[
    ("plain, p99 in µs", "variant: plain; value: p99_us"),
    ("qemu-cdp, on, p99 in µs", "variant: qemu-cdp, on; value: p99_us"),
    ("qemu-cdp, on, p99 to plain", "variant: qemu-cdp, on; times: p99_us"),
];

const ONE_CORE: &[Line] =
    &[("qemu-cdp, on, all on one core", "variant: qemu-cdp, on, all on one core; times: iops")];

const EXPORTED: &[&[Line]] = &[PLAIN_RATE, OFF, ON, LOCAL, REMOTE, TAILS, CAPTURED];

const FILTER: &[Line] = &[
    ("a copy within the cache", "variant: a copy within the cache"),
    ("a copy to what the other core has read", "variant: a copy to what the other core has read"),
    ("qemu-cdp, a request without data", "variant: qemu-cdp, a request without data"),
    ("qemu-cdp, a write", "variant: qemu-cdp, a write"),
];

const STALLED: &[Line] = &[
    ("plain", "variant: plain"),
    ("plain, the other core busy", "variant: plain, the other core busy"),
    ("qemu-cdp, server frozen", "variant: qemu-cdp, server frozen"),
    ("qemu-cdp, agent frozen", "variant: qemu-cdp, agent frozen"),
    ("qemu-cdp, network frozen", "variant: qemu-cdp, network frozen"),
    ("blklogwrites, NBD server frozen", "variant: blklogwrites, NBD server frozen"),
    ("quorum, NBD server frozen", "variant: quorum, NBD server frozen"),
    ("mirror write-blocking, NBD server frozen", "variant: mirror write-blocking, NBD server frozen"),
    ("mirror background, NBD server frozen", "variant: mirror background, NBD server frozen"),
    ("backup, NBD server frozen", "variant: backup, NBD server frozen"),
];

const STALLS: &[Line] = &[
    ("2 s: longest wait, ms", "medium: 2 s; value: max_ms"),
    ("2 s: writes, to plain", "medium: 2 s; times: writes"),
    ("for good: longest wait, ms", "medium: for good; value: max_ms"),
    ("for good: writes, to plain", "medium: for good; times: writes"),
    ("60 s: longest wait, ms", "medium: 60 s; value: max_ms"),
    ("60 s: writes, to plain", "medium: 60 s; times: writes"),
];

const LOADS: &[Line] = &[
    ("random data, 4 KiB", "pattern: random data, 4 KiB"),
    ("random data, 64 KiB", "pattern: random data, 64 KiB"),
    ("files, 64 KiB", "pattern: files, 64 KiB"),
    ("database pages, 8 KiB", "pattern: database pages, 8 KiB"),
];

const SERVERS: &[Line] = &[
    ("nbdkit file, MB/s", "variant: nbdkit file; value: mb_per_s"),
    ("nbdkit file, server s/GB", "variant: nbdkit file; value: server_cpu_s_per_gb"),
    ("qemu-nbd raw, MB/s", "variant: qemu-nbd raw; value: mb_per_s"),
    ("qemu-nbd raw, server s/GB", "variant: qemu-nbd raw; value: server_cpu_s_per_gb"),
    ("qemu-cdp, TCP, MB/s", "variant: qemu-cdp; value: mb_per_s"),
    ("qemu-cdp, TCP, server s/GB", "variant: qemu-cdp; value: server_cpu_s_per_gb"),
    ("qemu-cdp, Unix socket, MB/s", "variant: qemu-cdp, Unix socket; value: mb_per_s"),
    ("qemu-cdp, Unix socket, server s/GB", "variant: qemu-cdp, Unix socket; value: server_cpu_s_per_gb"),
    ("qemu-cdp, TLS, MB/s", "variant: qemu-cdp, TLS; value: mb_per_s"),
    ("qemu-cdp, TLS, server s/GB", "variant: qemu-cdp, TLS; value: server_cpu_s_per_gb"),
    (
        "qemu-cdp, Unix socket, store in memory, MB/s",
        "variant: qemu-cdp, Unix socket, store in memory; value: mb_per_s",
    ),
    (
        "qemu-cdp, Unix socket, store in memory, server s/GB",
        "variant: qemu-cdp, Unix socket, store in memory; value: server_cpu_s_per_gb",
    ),
    ("qemu-cdp, TCP, of it the receiving thread", "variant: qemu-cdp; value: receiver_s_per_gb"),
    ("qemu-cdp, TCP, of it the committing thread", "variant: qemu-cdp; value: committer_s_per_gb"),
    (
        "qemu-cdp, Unix socket, of it the committing thread",
        "variant: qemu-cdp, Unix socket; value: committer_s_per_gb",
    ),
    ("qemu-cdp, stored data, bytes a byte", "variant: qemu-cdp; value: data_bytes_per_byte"),
    ("qemu-cdp, stored metadata, bytes a record", "variant: qemu-cdp; value: metadata_bytes_per_record"),
];

const PARTS: &[Line] = &[
    ("agent: compress (zstd 1)", "variant: agent: compress (zstd 1)"),
    ("agent: records and checksums", "variant: agent: records and checksums"),
    ("server: receive (TCP)", "variant: server: receive (TCP)"),
    ("server: receive (TLS)", "variant: server: receive (TLS)"),
    ("server: receive (Unix socket)", "variant: server: receive (Unix socket)"),
    ("server: check a frame", "variant: server: check a frame"),
    ("server: append", "variant: server: append"),
    ("server: make durable", "variant: server: make durable"),
];

const MANY_DISKS: &[Line] = &[
    ("1 disk", "variant: qemu-cdp, 1 disks at once"),
    ("8 disks at once", "variant: qemu-cdp, 8 disks at once"),
    ("64 disks at once", "variant: qemu-cdp, 64 disks at once"),
    ("256 disks at once", "variant: qemu-cdp, 256 disks at once"),
];

const RATES: &[Line] = &[
    ("4 KiB, depth 32, 50 % of the most", "pattern: 4 KiB, depth 32, 50 % of the most"),
    ("4 KiB, depth 32, 90 % of the most", "pattern: 4 KiB, depth 32, 90 % of the most"),
    ("64 KiB, depth 8, 50 % of the most", "pattern: 64 KiB, depth 8, 50 % of the most"),
    ("64 KiB, depth 8, 90 % of the most", "pattern: 64 KiB, depth 8, 90 % of the most"),
];

const PROGRAMS: &[Line] = &[
    ("SQLite, write-ahead log", "pattern: SQLite, write-ahead log"),
    ("SQLite, rollback journal", "pattern: SQLite, rollback journal"),
    ("PostgreSQL, pgbench", "pattern: PostgreSQL, pgbench"),
    ("PostgreSQL, random values", "pattern: PostgreSQL, random values"),
    ("untar C headers", "pattern: untar C headers"),
    ("compile C sources", "pattern: compile C sources"),
    ("log, an fsync a line", "pattern: log, an fsync a line"),
    ("copy a film", "pattern: copy a film"),
];

const RESTORED: &[Line] = &[
    ("dd, direct I/O", "variant: dd, direct I/O"),
    ("qemu-img convert, direct I/O", "variant: qemu-img convert, direct I/O"),
    (
        "qemu-cdp, from the files, 10^5 records later",
        "variant: qemu-cdp, from the files, 100000 records later",
    ),
    (
        "qemu-cdp, through the server, 10^5 records later",
        "variant: qemu-cdp, through the server, 100000 records later",
    ),
    (
        "qemu-cdp, from the files, 10^6 records later",
        "variant: qemu-cdp, from the files, 1000000 records later",
    ),
    (
        "qemu-cdp, through the server, 10^6 records later",
        "variant: qemu-cdp, through the server, 1000000 records later",
    ),
];

const CHAINS: &[Line] = &[
    ("qcow2 chain of 1", "variant: qcow2 chain of 1"),
    ("qcow2 chain of 10", "variant: qcow2 chain of 10"),
    ("qcow2 chain of 50", "variant: qcow2 chain of 50"),
    ("qcow2 chain of 200", "variant: qcow2 chain of 200"),
    ("qemu-cdp, 10^5 records", "variant: qemu-cdp, 100000 records"),
    ("qemu-cdp, 10^6 records", "variant: qemu-cdp, 1000000 records"),
    ("qemu-cdp, 10^7 records", "variant: qemu-cdp, 10000000 records"),
    ("qemu-cdp, 10^8 records", "variant: qemu-cdp, 100000000 records"),
];

const TABLES: &[Table] = &[
    Table {
        name: "in bursts, null-co",
        head: "",
        choice: "report: capture; section: in process, in bursts; medium: null-co",
        columns: PATTERNS,
        rows: IN_BURSTS,
    },
    Table {
        name: "in bursts, tmpfs",
        head: "",
        choice: "report: capture; section: in process, in bursts; medium: tmpfs",
        columns: PATTERNS,
        rows: IN_BURSTS,
    },
    Table {
        name: "without a pause, disk",
        head: "",
        choice: "report: capture; section: in process; medium: disk",
        columns: PATTERNS,
        rows: &[WRITE, ADDED, ADDED_BY_REMOTE, ADDED_TIME, CAPTURED],
    },
    Table {
        name: "export, tmpfs",
        head: "",
        choice: "report: capture; section: through an export; medium: tmpfs",
        columns: PATTERNS,
        rows: EXPORTED,
    },
    Table {
        name: "export, disk",
        head: "",
        choice: "report: capture; section: through an export; medium: disk",
        columns: PATTERNS,
        rows: EXPORTED,
    },
    Table {
        name: "export, the guest's core",
        head: "",
        choice: "report: capture; section: through an export, peers' NBD server on the guest's core; medium: tmpfs",
        columns: PATTERNS.split_at(2).0,
        rows: &[ON, REMOTE, ONE_CORE],
    },
    Table {
        name: "filter",
        head: "",
        choice: "report: filter; section: the filter alone; medium: memory; value: ns_per_write",
        columns: PATTERNS.split_at(3).0,
        rows: &[FILTER],
    },
    Table {
        name: "stall",
        head: "",
        choice: "report: stall; section: stall; pattern: 4 KiB, depth 8",
        columns: STALLS,
        rows: &[STALLED],
    },
    Table {
        name: "ingest",
        head: "",
        choice: "report: ingest; section: one core of the server; medium: disk",
        columns: LOADS,
        rows: &[SERVERS],
    },
    Table {
        name: "parts of ingest",
        head: "",
        choice: "report: ingest; section: parts of ingest; medium: disk; value: cpu_s_per_gb",
        columns: LOADS,
        rows: &[PARTS],
    },
    Table {
        name: "many disks",
        head: "",
        choice: "report: ingest; section: one core of the server; medium: disk; pattern: many disks, random data, 4 KiB",
        columns: &[
            ("MB/s", "value: mb_per_s"),
            ("server s/GB", "value: server_cpu_s_per_gb"),
            ("durable p50, ms", "value: durable_p50_ms"),
            ("durable p99, ms", "value: durable_p99_ms"),
        ],
        rows: &[MANY_DISKS],
    },
    Table {
        name: "durable",
        head: "",
        choice: "report: rpo; section: from completion to durable; medium: disk",
        columns: RATES,
        rows: &[&[
            ("write + fdatasync of 64 KiB, p50, ms", "variant: write + fdatasync of 64 KiB; value: p50_ms"),
            ("write + fdatasync of 64 KiB, p99, ms", "variant: write + fdatasync of 64 KiB; value: p99_ms"),
            ("qemu-cdp, p50, ms", "variant: qemu-cdp; value: p50_ms"),
            ("qemu-cdp, p99, ms", "variant: qemu-cdp; value: p99_ms"),
            ("qemu-cdp, writes/s", "variant: qemu-cdp; value: writes_per_s"),
        ]],
    },
    Table {
        name: "space",
        head: "",
        choice: "report: space; section: space; medium: ext4 in a guest",
        columns: &[
            ("blklogwrites", "variant: blklogwrites; value: kept_per_byte_written"),
            ("qemu-cdp", "variant: qemu-cdp; value: kept_per_byte_written"),
            ("data", "variant: qemu-cdp; value: data"),
            ("metadata", "variant: qemu-cdp; value: metadata"),
            ("metadata bytes a record", "variant: qemu-cdp; value: metadata_bytes_per_record"),
        ],
        rows: &[PROGRAMS],
    },
    Table {
        name: "restore",
        head: "",
        choice: "report: restore; section: full restore; medium: disk; pattern: to a new raw file, durable",
        columns: &[
            ("MB/s", "value: mb_per_s"),
            ("to `dd`", "times: mb_per_s"),
            ("s/GB", "value: cpu_s_per_gb"),
        ],
        rows: &[RESTORED],
    },
    Table {
        name: "history, from the files",
        head: "reads of 4 KiB from the files",
        choice: "report: history; section: history; medium: disk; pattern: 4 KiB reads in the past, from the files",
        columns: &[
            ("first byte, from opening them on, ms", "value: first_byte_ms"),
            ("p50, µs", "value: read_p50_us"),
            ("p99, µs", "value: read_p99_us"),
        ],
        rows: &[CHAINS],
    },
    Table {
        name: "history, through the server",
        head: "reads of 4 KiB through the server",
        choice: "report: history; section: history; medium: disk; pattern: 4 KiB reads in the past, through the server",
        columns: &[
            ("start, ms", "value: start_ms"),
            ("first byte, ms", "value: first_byte_ms"),
            ("p50, µs", "value: read_p50_us"),
            ("p99, µs", "value: read_p99_us"),
            ("memory, MiB", "value: rss_mib"),
            ("of it not mapped files", "value: of_it_not_mapped_files_mib"),
        ],
        rows: &[CHAINS.split_at(4).1],
    },
    Table {
        name: "what changed",
        head: "what changed since",
        choice: "report: history; section: history; medium: disk; pattern: what changed",
        columns: &[
            ("no record, ms", "value: nothing_ms"),
            ("1280 records, ms", "value: records_1280_ms"),
            ("a tenth of them all, ms", "value: a_tenth_ms"),
            ("the same by reading and comparing both points, ms", "value: scan_ms"),
        ],
        rows: &[CHAINS.split_at(4).1],
    },
    Table {
        name: "restart",
        head: "a server killed with an open segment",
        choice: "report: history; section: history; medium: disk; pattern: restart after kill -9",
        columns: &[
            ("ready, ms", "value: ready_ms"),
            ("journal: data, MiB", "value: journal_data_mib"),
            ("metadata, MiB", "value: journal_metadata_mib"),
        ],
        rows: &[CHAINS.split_at(4).1],
    },
];

/// Writes the marked tables of `document` anew, from the reports in `reports`.
pub(crate) fn write(document: &Path, reports: &Path) -> ExitCode {
    let text = fs::read_to_string(document).map_err(|error| format!("{}: {error}", document.display()));
    let written = text.and_then(|text| filled(&text, reports)).and_then(|text| {
        fs::write(document, text).map_err(|error| format!("{}: {error}", document.display()))
    });
    match written {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::from(2)
        }
    }
}

/// The document with the lines behind each mark that are a table replaced by that table.
fn filled(document: &str, reports: &Path) -> Result<String, String> {
    let mut known = BTreeMap::new();
    let mut text = String::new();
    let mut lines = document.lines().peekable();
    while let Some(line) = lines.next() {
        text += line;
        text.push('\n');
        let Some(name) = line.strip_prefix(MARK).and_then(|rest| rest.strip_suffix(MARK_END)) else {
            continue;
        };
        let table = TABLES.iter().find(|table| table.name == name);
        let table = table.ok_or_else(|| format!("there is no table \"{name}\" to be written"))?;
        while lines.next_if(|line| line.starts_with('|')).is_some() {}
        text += &table.markdown(reports, &mut known)?;
    }
    Ok(text)
}

impl Table {
    /// How its first line begins.
    fn begin(&self) -> String {
        if self.head.is_empty() { "| |".to_owned() } else { format!("| {} |", self.head) }
    }

    fn markdown(&self, reports: &Path, known: &mut BTreeMap<String, Report>) -> Result<String, String> {
        let heads: Vec<&str> = self.columns.iter().map(|(label, _)| *label).collect();
        let mut measured: Vec<(&str, &str)> = Vec::new();
        let mut text =
            format!("{} {} |\n| --- |{}\n", self.begin(), heads.join(" | "), " --- |".repeat(heads.len()));
        for (label, row) in self.rows.iter().copied().flatten() {
            text += &format!("| {label} |");
            for (head, column) in self.columns {
                let choice = Choice::of(&[self.choice, row, column]);
                let report = match known.entry(choice.get("report").to_owned()) {
                    std::collections::btree_map::Entry::Occupied(known) => known.into_mut(),
                    std::collections::btree_map::Entry::Vacant(new) => {
                        let path = reports.join(format!("{}.json", choice.get("report")));
                        new.insert(read(&path).ok_or_else(|| format!("no report in {}", path.display()))?)
                    }
                };
                let spread = choice.spread(report);
                measured.extend(spread.map(|_| (*label, *head)));
                text += &format!(" {} |", spread.map_or_else(|| "-".to_owned(), cell));
            }
            text.push('\n');
        }
        let rows = self
            .rows
            .iter()
            .copied()
            .flatten()
            .find(|(label, _)| !measured.iter().any(|(row, _)| row == label));
        let columns =
            self.columns.iter().find(|(head, _)| !measured.iter().any(|(_, column)| column == head));
        match rows.or(columns) {
            Some((label, _)) => {
                Err(format!("nothing of \"{label}\" in the table \"{}\" was measured", self.name))
            }
            None => Ok(text),
        }
    }
}

/// What a cell shows, by the names in [`Table`].
struct Choice(BTreeMap<&'static str, &'static str>);

impl Choice {
    fn of(parts: &[&'static str]) -> Self {
        Self(parts.iter().flat_map(|part| part.split("; ")).filter_map(|one| one.split_once(": ")).collect())
    }

    fn get(&self, name: &str) -> &'static str {
        self.0.get(name).copied().unwrap_or_default()
    }

    fn spread(&self, report: &Report) -> Option<Spread> {
        let table = ["section", "medium", "pattern"].map(|name| self.get(name)).join(", ");
        match self.0.get("times") {
            Some(value) => report.ratio(&table, self.get("variant"), value),
            None => report.spread(&table, self.get("variant"), self.get("value")),
        }
    }
}

/// Median, least and greatest, where they differ.
fn cell(Spread(median, least, greatest): Spread) -> String {
    let short = |value: f64| match value.abs() {
        0.0..10.0 => format!("{value:.2}"),
        10.0..100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    };
    if least == greatest {
        return short(median);
    }
    format!("{} [{} to {}]", short(median), short(least), short(greatest))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The project's folder.
    fn root() -> &'static Path {
        Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
    }

    #[test]
    fn the_tables_of_the_document_are_what_was_measured() {
        let document = fs::read_to_string(root().join("docs/performance.md")).expect("the document");
        for table in TABLES {
            let mark = format!("{MARK}{}{MARK_END}\n{}", table.name, table.begin());
            assert_eq!(document.matches(&mark).count(), 1, "{}", table.name);
        }
        let filled = filled(&document, &root().join("docs/benchmarks")).expect("reports");
        let differ = document.lines().zip(filled.lines()).find(|(is, should)| is != should);
        assert_eq!(differ, None, "run scripts/bench write docs/performance.md docs/benchmarks");
        assert!(document == filled);
    }

    #[test]
    fn a_mark_without_its_table_or_report_is_an_error() {
        let write = |text: &str, reports: &str| filled(text, &root().join(reports));
        let error =
            write("<!-- table: nothing of the kind -->\n", "docs/benchmarks").expect_err("no such table");
        assert!(error.contains("nothing of the kind"), "{error}");
        let error = write("<!-- table: filter -->\n", "docs").expect_err("no report there");
        assert!(error.contains("filter.json"), "{error}");
        // What is not a marked table stays.
        let text = "a\n\n| b |\n| --- |\n";
        assert_eq!(write(text, "docs/benchmarks").as_deref(), Ok(text));
    }

    #[test]
    fn cells_say_a_spread_only_where_there_is_one() {
        assert_eq!(cell(Spread(1.0, 1.0, 1.0)), "1.00");
        assert_eq!(cell(Spread(12.34, -0.5, 1234.5)), "12.3 [-0.50 to 1234]");
    }
}
