//! Rows, their medians and ratios, as JSON, Markdown and SVG.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use serde_json::{Value, json};

use crate::{Effort, machine};

/// What one variant did in one round.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    section: String,
    medium: String,
    pattern: String,
    variant: String,
    round: usize,
    /// Nothing else ran when the round began.
    quiet: bool,
    /// In the order in which they are shown; the first is the table's main one.
    values: Vec<(String, f64)>,
}

impl Row {
    pub(crate) fn new(section: &str, medium: &str, pattern: &str, variant: &str, round: usize) -> Self {
        let [section, medium, pattern, variant] = [section, medium, pattern, variant].map(str::to_owned);
        Self { section, medium, pattern, variant, round, quiet: true, values: Vec::new() }
    }

    pub(crate) fn set(&mut self, name: &str, value: f64) {
        self.values.push((name.to_owned(), value));
    }

    fn value(&self, name: &str) -> Option<f64> {
        self.values.iter().find(|(key, _)| key == name).map(|(_, value)| *value)
    }

    fn table(&self) -> String {
        format!("{}, {}, {}", self.section, self.medium, self.pattern)
    }
}

/// All rows of one run.
pub(crate) struct Report {
    name: String,
    quick: bool,
    /// Whether the present round began quietly.
    quiet: bool,
    /// How long rounds may still wait for a quiet moment.
    patience: Duration,
    /// Only tables with this in their name are wanted.
    only: Option<String>,
    rows: Vec<Row>,
}

/// Median, least and greatest.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spread(pub(crate) f64, pub(crate) f64, pub(crate) f64);

impl Spread {
    fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let upper = *values.get(values.len() / 2)?;
        // Of an even number the mean of the two in the middle.
        let lower = if values.len().is_multiple_of(2) { *values.get(values.len() / 2 - 1)? } else { upper };
        Some(Self(f64::midpoint(lower, upper), *values.first()?, *values.last()?))
    }
}

impl Report {
    pub(crate) fn new(name: &str, quick: bool, only: Option<String>) -> Self {
        Self {
            name: name.to_owned(),
            quick,
            quiet: true,
            patience: machine::PATIENCE,
            only,
            rows: Vec::new(),
        }
    }

    /// Whether a table of `capture` or `ingest` is wanted.
    pub(crate) fn wants(&self, section: &str, medium: &str, pattern: &str) -> bool {
        self.only.as_ref().is_none_or(|only| format!("{section}, {medium}, {pattern}").contains(only))
    }

    /// Waits for a quiet moment, where the effort has the patience; the rows that follow say whether one was seen.
    pub(crate) fn begin_round(&mut self, effort: Effort) {
        self.quiet = effort.patient && machine::wait_until_idle(&mut self.patience);
    }

    pub(crate) fn add(&mut self, row: Row) {
        let row = Row { quiet: self.quiet, ..row };
        println!("{} | {} | round {} | {:?}", row.table(), row.variant, row.round, row.values);
        self.rows.push(row);
    }

    /// Writes `NAME.json`, `NAME.md` and a plot for each table. An incomplete run says so.
    pub(crate) fn write(&self, out: &Path, complete: bool) {
        let put = |name: String, text: &str| {
            let path = out.join(name);
            fs::write(&path, text).unwrap_or_else(|e| panic!("cannot write {}: {e}", path.display()));
        };
        let document = serde_json::to_string_pretty(&self.json()).expect("JSON");
        put(format!("{}.json", self.name), &document);
        let mut plots = Vec::new();
        for (number, table) in self.tables().into_iter().enumerate() {
            let file = format!("{}-{number}.svg", self.name);
            put(file.clone(), &self.plot(&table));
            plots.push(file);
        }
        put(format!("{}.md", self.name), &self.markdown(&plots, complete));
        println!("{}", out.join(format!("{}.md", self.name)).display());
    }

    /// What one says to have this run again.
    fn command(&self) -> String {
        let only = self.only.as_ref().map_or(String::new(), |only| format!(" --only '{only}'"));
        format!("scripts/bench {}{}{only}", self.name, if self.quick { " --quick" } else { "" })
    }

    fn json(&self) -> Value {
        let rows = self.rows.iter().map(|row| {
            let values: BTreeMap<_, _> = row.values.iter().cloned().collect();
            json!({"section": row.section, "medium": row.medium, "pattern": row.pattern, "variant": row.variant,
                "round": row.round, "quiet": row.quiet, "main": row.values.first().map(|(name, _)| name), "values": values})
        });
        let machine: BTreeMap<_, _> = machine::describe(&self.command()).into_iter().collect();
        json!({"name": self.name, "quick": self.quick, "machine": machine, "rows": rows.collect::<Vec<_>>()})
    }

    /// The tables' names, in the order of their rows.
    fn tables(&self) -> Vec<String> {
        let mut names: Vec<String> = Vec::new();
        for row in &self.rows {
            let name = row.table();
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names
    }

    fn variants(&self, table: &str) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        for row in self.rows.iter().filter(|row| row.table() == table) {
            if !names.contains(&row.variant.as_str()) {
                names.push(&row.variant);
            }
        }
        names
    }

    pub(crate) fn spread(&self, table: &str, variant: &str, value: &str) -> Option<Spread> {
        let rows = self.rows.iter().filter(|row| row.table() == table && row.variant == variant);
        Spread::of(rows.filter_map(|row| row.value(value)).collect())
    }

    /// The table's main value, by its name.
    fn main_value(&self, table: &str) -> Option<&str> {
        let row = self.rows.iter().find(|row| row.table() == table)?;
        row.values.first().map(|(name, _)| name.as_str())
    }

    /// The variant's value over that of the table's first variant in the same round.
    pub(crate) fn ratio(&self, table: &str, variant: &str, value: &str) -> Option<Spread> {
        let base = *self.variants(table).first()?;
        let find = |variant: &str, round: usize| {
            let mut rows = self.rows.iter().filter(|row| row.table() == table && row.variant == variant);
            rows.find(|row| row.round == round)?.value(value)
        };
        let rounds = self.rows.iter().map(|row| row.round).max().map_or(0, |last| last + 1);
        let ratio = |round| Some(find(variant, round)? / find(base, round).filter(|base| *base > 0.0)?);
        Spread::of((0..rounds).filter_map(ratio).collect())
    }

    fn markdown(&self, plots: &[String], complete: bool) -> String {
        let mut text = format!("# {}\n\n", self.name);
        for (what, value) in machine::describe(&self.command()) {
            let _ = writeln!(text, "- {what}: {value}");
        }
        let noisy = self.rows.iter().filter(|row| !row.quiet).count();
        let _ = writeln!(
            text,
            "- {} rows, {noisy} of them in rounds that were not seen to begin quietly",
            self.rows.len()
        );
        if !complete {
            text += "- **incomplete**: the run failed before its end\n";
        }
        if self.quick {
            text += "- a quick run: it shows that the benchmark works, not how fast anything is\n";
        }
        text += "\nEach cell: median of the rounds [least to greatest]; in brackets behind it the median of the ratios to the table's first row in the same round.\n";
        for (table, plot) in self.tables().iter().zip(plots) {
            let mut values: Vec<&String> = Vec::new();
            for (name, _) in self.rows.iter().filter(|row| row.table() == *table).flat_map(|row| &row.values)
            {
                if !values.contains(&name) {
                    values.push(name);
                }
            }
            let _ = write!(text, "\n## {table}\n\n![{table}]({plot})\n\n| |");
            for value in &values {
                let _ = write!(text, " {value} |");
            }
            let _ = writeln!(text, "\n| --- |{}", " --- |".repeat(values.len()));
            for variant in self.variants(table) {
                let _ = write!(text, "| {variant} |");
                for value in &values {
                    let cell = self.spread(table, variant, value).map_or(String::new(), |spread| {
                        let ratio = self.ratio(table, variant, value);
                        let ratio = ratio.map_or(String::new(), |ratio| format!(" (× {:.2})", ratio.0));
                        format!("{} [{} to {}]{ratio}", short(spread.0), short(spread.1), short(spread.2))
                    });
                    let _ = write!(text, " {cell} |");
                }
                text.push('\n');
            }
        }
        text
    }

    /// A bar for each variant: the table's main value, over the first variant's.
    fn plot(&self, table: &str) -> String {
        let variants = self.variants(table);
        let (value, base) =
            (self.main_value(table).unwrap_or_default(), variants.first().copied().unwrap_or_default());
        let bars: Vec<(&str, f64)> = variants
            .iter()
            .filter_map(|variant| Some((*variant, self.ratio(table, variant, value)?.0)))
            .collect();
        let longest = bars.iter().map(|(_, ratio)| *ratio).fold(1.0, f64::max);
        let height = 30 + 22 * bars.len();
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"640\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
             <text x=\"4\" y=\"16\">{value}, times that of: {base}</text>\n"
        );
        for (number, (variant, ratio)) in bars.iter().enumerate() {
            let (y, width) = (26 + 22 * number, 340.0 * ratio / longest);
            let color = if is_ours(variant) { "#1a6fb5" } else { "#9aa5ad" };
            let _ = writeln!(
                svg,
                "<text x=\"4\" y=\"{}\">{variant}</text><rect x=\"240\" y=\"{y}\" width=\"{width:.1}\" height=\"16\" fill=\"{color}\"/>\
                 <text x=\"{:.1}\" y=\"{}\">{ratio:.2}</text>",
                y + 13,
                246.0 + width,
                y + 13
            );
        }
        svg + "</svg>\n"
    }
}

/// A number with about three digits that mean something.
fn short(value: f64) -> String {
    match value.abs() {
        0.0..0.01 => format!("{value:.4}"),
        0.01..10.0 => format!("{value:.2}"),
        10.0..100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

/// Medians of two runs side by side, by their ratios to each table's first variant, or as they are in tables whose first one is
/// ours, too; fails when one of ours got worse by a tenth or more in its table's main value, or in a tail.
pub(crate) fn compare(old: &Path, new: &Path) -> ExitCode {
    let (Some(old), Some(new)) = (read(old), read(new)) else { return ExitCode::from(2) };
    let mut worse = 0;
    for table in new.tables().iter().filter(|table| old.tables().contains(table)) {
        let main = new.main_value(table);
        let by_itself = new.variants(table).first().is_some_and(|first| is_ours(first));
        let (median, times) =
            if by_itself { (Report::spread as Median, "") } else { (Report::ratio as Median, "× ") };
        for variant in new.variants(table) {
            for value in
                main.into_iter().chain(["p99_us", "max_ms"].into_iter().filter(|tail| Some(*tail) != main))
            {
                let pair = median(&old, table, variant, value).zip(median(&new, table, variant, value));
                let Some((Spread(before, ..), Spread(after, ..))) = pair else { continue };
                let change = if more_is_better(value) { before / after } else { after / before };
                let verdict = if change >= 1.1 && is_ours(variant) {
                    worse += 1;
                    "WORSE"
                } else {
                    ""
                };
                println!("{table} | {variant} | {value} | {times}{before:.3} → {times}{after:.3} {verdict}");
            }
        }
    }
    println!("{worse} worse");
    if worse == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// How a value of a table's variant is taken for a comparison.
type Median = fn(&Report, &str, &str, &str) -> Option<Spread>;

fn is_ours(variant: &str) -> bool {
    variant.starts_with("qemu-cdp")
}

/// Rates; everything else is a time, a size or a share.
fn more_is_better(value: &str) -> bool {
    value == "iops" || value.ends_with("_per_s")
}

/// Makes one report of several parts of a table (`--only`).
pub(crate) fn join(out: &Path, first: &str, others: &[&str]) -> ExitCode {
    let Some(mut joined) = read(first.as_ref()) else { return ExitCode::from(2) };
    for other in others {
        match read(other.as_ref()) {
            Some(part) if (&part.name, part.quick) == (&joined.name, joined.quick) => {
                // What was measured again takes the place of what there was.
                let again = part.tables();
                joined.rows.retain(|row| !again.contains(&row.table()));
                joined.rows.extend(part.rows);
            }
            Some(_) => {
                eprintln!("bench: {other} is of another table, or only one of them of a quick run");
                return ExitCode::from(2);
            }
            None => return ExitCode::from(2),
        }
    }
    fs::create_dir_all(out).unwrap_or_else(|e| panic!("cannot make {}: {e}", out.display()));
    joined.write(out, true);
    ExitCode::SUCCESS
}

/// A report's JSON; `None` when there is none, which is said.
pub(crate) fn read(path: &Path) -> Option<Report> {
    let text = fs::read_to_string(path).map_err(|e| e.to_string());
    let parsed = text.and_then(|text| serde_json::from_str::<Value>(&text).map_err(|e| e.to_string()));
    let value = parsed.inspect_err(|e| eprintln!("bench: {}: {e}", path.display())).ok()?;
    let text = |row: &Value, key: &str| row[key].as_str().unwrap_or_default().to_owned();
    let rows = value["rows"].as_array().into_iter().flatten().map(|row| {
        let main = text(row, "main");
        let values = row["values"].as_object().into_iter().flatten();
        let mut values: Vec<_> =
            values.map(|(key, value)| (key.clone(), value.as_f64().unwrap_or_default())).collect();
        values.sort_by_key(|(key, _)| *key != main);
        let number = |value: &Value| usize::try_from(value.as_u64().unwrap_or_default()).unwrap_or_default();
        Row {
            section: text(row, "section"),
            medium: text(row, "medium"),
            pattern: text(row, "pattern"),
            variant: text(row, "variant"),
            round: number(&row["round"]),
            quiet: row["quiet"].as_bool().unwrap_or_default(),
            values,
        }
    });
    Some(Report {
        quiet: true,
        rows: rows.collect(),
        ..Report::new(&text(&value, "name"), value["quick"].as_bool()?, None)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_is_between_the_two_in_the_middle() {
        let of = |values: &[f64]| Spread::of(values.to_vec()).map(|Spread(median, ..)| median);
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[3.0]), Some(3.0));
        assert_eq!(of(&[4.0, 1.0]), Some(2.5));
        assert_eq!(of(&[9.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(of(&[9.0, 1.0, 2.0, 4.0]), Some(3.0));
    }
}
