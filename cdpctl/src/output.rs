//! Results as text or JSON.

use cdp_api::{
    Bookmark, Conflict, DamagedPart, Disk, DiskSummary, Journal, OverflowPolicy, Points, ProtectionState,
    Verification,
};
use serde::Serialize;

use crate::args::Format;

/// Lays out results.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    format: Format,
}

impl Output {
    pub(crate) const fn new(format: Format) -> Self {
        Self { format }
    }

    fn show<T: Serialize>(self, value: &T, text: impl FnOnce(&T) -> String) -> String {
        match self.format {
            Format::Text => text(value),
            // These types have no maps with odd keys and no failing parts; JSON always works.
            Format::Json => serde_json::to_string_pretty(value).unwrap_or_default() + "\n",
        }
    }

    pub(crate) fn disks(self, disks: &[DiskSummary]) -> String {
        self.show(&disks, |disks| {
            let head = ["DISK", "SIZE", "WANTED", "STATE", "NEWEST POINT", "UUID"].map(str::to_owned);
            let faults = disks.iter().filter_map(|disk| Some((disk, disk.fault.as_ref()?)));
            let faults = faults.map(|(disk, fault)| {
                format!("\n{} ({}): {}\nhint: {}\n", name(disk), disk.id, fault.message, fault.hint)
            });
            let conflicts =
                disks.iter().flat_map(|disk| disk.conflicts.iter().map(move |other| (disk, other)));
            let conflicts = conflicts
                .map(|(disk, other)| format!("\n{} ({}): {}\n", name(disk), disk.id, conflict(other)));
            table(std::iter::once(head).chain(disks.iter().map(disk_row)))
                + &faults.collect::<String>()
                + &conflicts.collect::<String>()
        })
    }

    pub(crate) fn disk(self, disk: &Disk) -> String {
        self.show(disk, disk_text)
    }

    pub(crate) fn protection(self, disk: &str, state: &ProtectionState) -> String {
        self.show(state, |state| {
            let reason = if state.reason.is_empty() { String::new() } else { format!(" ({})", state.reason) };
            format!("{disk}: protection {}, now {}{reason}\n", on_off(state.enabled), state.phase)
        })
    }

    pub(crate) fn points(self, points: &Points) -> String {
        self.show(points, points_text)
    }

    pub(crate) fn checks(self, checks: &[Verification]) -> String {
        self.show(&checks, |checks| checks.iter().map(check_text).collect())
    }

    pub(crate) fn bookmark(self, bookmark: &Bookmark) -> String {
        self.show(bookmark, |b| format!("bookmark {}: lsn {}, {}\n", b.name, b.lsn, b.time))
    }
}

fn check_text(check: &Verification) -> String {
    let damage = match check.damage.len() {
        0 => "no damage".to_owned(),
        n => format!("{n}{} damaged parts", if check.more_damage { " and more" } else { "" }),
    };
    let (disk, first, last) = (&check.disk, check.first_lsn, check.last_lsn);
    let head = format!("{disk}: {} checked, lsn {first} to {last}: {damage}\n", bytes(check.done_bytes));
    head + &check.damage.iter().map(part_text).collect::<String>()
}

fn part_text(part: &DamagedPart) -> String {
    let last = if part.last_lsn == u64::MAX { "the end".to_owned() } else { part.last_lsn.to_string() };
    format!(
        "  {}: {} at byte {}, lsn {} to {last}: {}\n    hint: {}\n",
        part.kind, part.file, part.offset, part.first_lsn, part.detail, part.hint
    )
}

fn on_off(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}

fn disk_row(disk: &DiskSummary) -> [String; 6] {
    let newest = disk.newest.as_ref().map_or_else(|| "-".to_owned(), |point| point.time.clone());
    let wanted = on_off(disk.protection.enabled).to_owned();
    [name(disk), bytes(disk.disk_bytes), wanted, disk.protection.phase.to_string(), newest, disk.id.clone()]
}

fn name(disk: &DiskSummary) -> String {
    if disk.vm.is_empty() { "-".to_owned() } else { format!("{}/{}", disk.vm, disk.device) }
}

fn disk_text(disk: &Disk) -> String {
    let summary = &disk.summary;
    let mut lines = vec![
        ("disk", name(summary)),
        ("uuid", summary.id.clone()),
        ("size", bytes(summary.disk_bytes)),
        ("host", summary.host.clone()),
        ("online", if disk.online { "yes" } else { "no" }.to_owned()),
        ("node", format!("{} ({})", disk.node, disk.driver)),
        ("qemu", disk.qemu_version.clone()),
        ("protection", format!("{}, now {}", on_off(summary.protection.enabled), summary.protection.phase)),
    ];
    if !summary.protection.reason.is_empty() {
        lines.push(("reason", summary.protection.reason.clone()));
    }
    if let Some(fault) = &summary.fault {
        let kind = fault.kind.as_str();
        lines.push(("fault", format!("{kind} since {}: {}", fault.since, fault.message)));
        lines.push(("hint", fault.hint.clone()));
    }
    lines.extend(summary.conflicts.iter().map(|other| ("conflict", conflict(other))));
    lines.push(("ring full", overflow(&summary.protection)));
    lines.push(("sync", sync(&summary.protection)));
    lines.extend(summary.newest.as_ref().map(|point| ("newest point", point.to_string())));
    lines.extend(disk.journal.iter().flat_map(journal_lines));
    lines.into_iter().map(|(key, value)| format!("{:<14}{value}\n", format!("{key}:"))).collect()
}

/// Who else claims a disk, and why he has not got it.
fn conflict(other: &Conflict) -> String {
    let (vm, pid, host) = (&other.vm, other.vm_pid, &other.host);
    format!(
        "VM {vm}, process {pid} on host {host}, claims this disk too and is not protected: {}",
        other.reason
    )
}

/// The policy, and who waits because of it.
fn overflow(state: &ProtectionState) -> String {
    let mut text = state.options.policy.as_str().to_owned();
    if state.options.policy == OverflowPolicy::Throttle {
        text += &format!(" for up to {} ms", state.options.throttle_ms);
    }
    if state.waiting > 0 {
        text += &format!("; {} requests wait, since {} ms", state.waiting, state.waiting_ms);
    }
    text
}

fn sync(state: &ProtectionState) -> String {
    if state.options.sync {
        let (now, most) = (state.sync_state.as_str(), state.options.sync_timeout_ms);
        format!("on, now {now}; a flush waits for up to {most} ms")
    } else {
        "off".to_owned()
    }
}

fn journal_lines(journal: &Journal) -> [(&'static str, String); 6] {
    let stored = journal.stored_data_bytes.saturating_add(journal.stored_meta_bytes);
    [
        (
            "lag",
            format!("{} records, {}, {:.3} s", journal.lag_lsns, bytes(journal.lag_bytes), journal.lag_s),
        ),
        ("recorded", format!("{} raw, {} stored", bytes(journal.raw_bytes), bytes(stored))),
        ("to sync", bytes(journal.dirty_bytes)),
        (
            "last sync",
            format!(
                "{} read, {} compared, {} equal, {} shipped",
                bytes(journal.sync_read_bytes),
                bytes(journal.sync_compared_bytes),
                bytes(journal.sync_equal_bytes),
                bytes(journal.sync_shipped_bytes)
            ),
        ),
        ("ring", format!("{} of {}", bytes(journal.ring_used_bytes), bytes(journal.ring_bytes))),
        ("spool", spool(journal)),
    ]
}

fn spool(journal: &Journal) -> String {
    match (journal.spool_bytes, journal.spool_failing) {
        (0, _) => "-".to_owned(),
        (most, false) => format!("{} of {}", bytes(journal.spool_used_bytes), bytes(most)),
        (_, true) => format!("{} used; it cannot be written to", bytes(journal.spool_used_bytes)),
    }
}

fn points_text(points: &Points) -> String {
    let mut text = String::new();
    if let Some(point) = &points.resolved {
        let exact = if point.exact { "" } else { "  (newest known; later writes may be on their way)" };
        text += &format!("resolved:     {point}{exact}\n");
    }
    for range in &points.recoverable {
        text += &format!(
            "recoverable:  lsn {} to {}, {} to {}\n",
            range.from_lsn, range.to_lsn, range.from_time, range.to_time
        );
    }
    for gap in &points.gaps {
        let end = match (gap.to_lsn, &gap.to_time) {
            (Some(lsn), Some(time)) => format!("until lsn {lsn}, {time}"),
            _ => "still open".to_owned(),
        };
        text +=
            &format!("gap:          from lsn {}, {}, {end} ({})\n", gap.from_lsn, gap.from_time, gap.reason);
    }
    for bookmark in &points.bookmarks {
        text += &format!("bookmark:     {} at lsn {}, {}\n", bookmark.name, bookmark.lsn, bookmark.time);
    }
    match &points.newest {
        Some(point) => text += &format!("newest:       {point}\n"),
        None => text += "nothing can be restored yet\n",
    }
    text
}

/// Columns two spaces apart, as wide as their widest cell.
fn table<const N: usize>(rows: impl Iterator<Item = [String; N]>) -> String {
    let rows: Vec<_> = rows.collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    let mut text = String::new();
    for row in &rows {
        let line: String = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}  ")).collect();
        text += line.trim_end();
        text.push('\n');
    }
    text
}

/// Bytes with a binary unit and three digits, exact below 1 KiB.
fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    let mut value = count as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_exact_where_they_are_round() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1 << 30), "1.0 GiB");
        assert_eq!(bytes((1 << 20) - 1), "1.0 MiB");
        assert_eq!(bytes(u64::MAX), "16.0 EiB");
    }

    #[test]
    fn columns_line_up() {
        let rows = [["a", "b"], ["long", "c"]].map(|row| row.map(str::to_owned));
        assert_eq!(table(rows.into_iter()), "a     b\nlong  c\n");
    }
}
