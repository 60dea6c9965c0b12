//! Rows, their medians and ratios, as JSON, Markdown and SVG.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::ExitCode;

use serde_json::{Value, json};

use crate::machine;

/// What one variant did in one round.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    section: String,
    medium: String,
    pattern: String,
    variant: String,
    pub(crate) round: usize,
    /// Nothing else ran when the round began.
    pub(crate) quiet: bool,
    values: BTreeMap<String, f64>,
}

impl Row {
    pub(crate) fn new(section: &str, medium: &str, pattern: &str, variant: &str, round: usize) -> Self {
        let [section, medium, pattern, variant] = [section, medium, pattern, variant].map(str::to_owned);
        Self { section, medium, pattern, variant, round, quiet: true, values: BTreeMap::new() }
    }

    pub(crate) fn set(&mut self, name: &str, value: f64) {
        self.values.insert(name.to_owned(), value);
    }

    fn table(&self) -> String {
        format!("{}, {}, {}", self.section, self.medium, self.pattern)
    }
}

/// All rows of one run.
pub(crate) struct Report {
    name: String,
    quick: bool,
    rows: Vec<Row>,
}

/// Median, least and greatest.
#[derive(Clone, Copy, Debug)]
struct Spread(f64, f64, f64);

impl Spread {
    fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        Some(Self(values.get(values.len() / 2).copied()?, *values.first()?, *values.last()?))
    }
}

impl Report {
    pub(crate) fn new(name: &str, quick: bool) -> Self {
        Self { name: name.to_owned(), quick, rows: Vec::new() }
    }

    pub(crate) fn add(&mut self, row: Row) {
        println!("{} | {} | round {} | {:?}", row.table(), row.variant, row.round, row.values);
        self.rows.push(row);
    }

    /// Writes `NAME.json`, `NAME.md` and a plot for each table.
    pub(crate) fn write(&self, out: &Path) {
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
        put(format!("{}.md", self.name), &self.markdown(&plots));
        println!("{}", out.join(format!("{}.md", self.name)).display());
    }

    fn json(&self) -> Value {
        let rows = self.rows.iter().map(|row| {
            json!({"section": row.section, "medium": row.medium, "pattern": row.pattern, "variant": row.variant,
                "round": row.round, "quiet": row.quiet, "values": row.values})
        });
        let machine: BTreeMap<_, _> = machine::describe().into_iter().collect();
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

    fn spread(&self, table: &str, variant: &str, value: &str) -> Option<Spread> {
        let rows = self.rows.iter().filter(|row| row.table() == table && row.variant == variant);
        Spread::of(rows.filter_map(|row| row.values.get(value).copied()).collect())
    }

    /// The variant's value over that of the plain disk in the same round.
    fn ratio(&self, table: &str, variant: &str, value: &str) -> Option<Spread> {
        let find = |variant: &str, round: usize| {
            let mut rows = self.rows.iter().filter(|row| row.table() == table && row.variant == variant);
            rows.find(|row| row.round == round)?.values.get(value).copied()
        };
        let rounds = self.rows.iter().map(|row| row.round).max().map_or(0, |last| last + 1);
        let ratio = |round| Some(find(variant, round)? / find("plain", round).filter(|plain| *plain > 0.0)?);
        Spread::of((0..rounds).filter_map(ratio).collect())
    }

    fn markdown(&self, plots: &[String]) -> String {
        let mut text = format!("# {}\n\n", self.name);
        for (what, value) in machine::describe() {
            let _ = writeln!(text, "- {what}: {value}");
        }
        let noisy = self.rows.iter().filter(|row| !row.quiet).count();
        let _ = writeln!(
            text,
            "- {} rows, {noisy} of them in rounds that did not begin quietly",
            self.rows.len()
        );
        if self.quick {
            text += "- a quick run: it shows that the benchmark works, not how fast anything is\n";
        }
        text += "\nEach cell: median of the rounds [least to greatest]; in brackets behind it the median of the ratios to the plain disk of the same round.\n";
        for (table, plot) in self.tables().iter().zip(plots) {
            let values: Vec<&String> = {
                let mut all: Vec<&String> = Vec::new();
                for row in self.rows.iter().filter(|row| row.table() == *table) {
                    all.extend(row.values.keys().filter(|key| !all.contains(key)).collect::<Vec<_>>());
                }
                all
            };
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

    /// A bar for each variant: the first value of its table, over the plain disk's.
    fn plot(&self, table: &str) -> String {
        let variants = self.variants(table);
        let value = match self.rows.iter().find(|row| row.table() == table) {
            Some(row) if row.values.contains_key("iops") => "iops",
            Some(row) if row.values.contains_key("us_per_write") => "us_per_write",
            _ => "max_ms",
        };
        let bars: Vec<(&str, f64)> = variants
            .iter()
            .filter_map(|variant| Some((*variant, self.ratio(table, variant, value)?.0)))
            .collect();
        let longest = bars.iter().map(|(_, ratio)| *ratio).fold(1.0, f64::max);
        let height = 30 + 22 * bars.len();
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"640\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
             <text x=\"4\" y=\"16\">{value}, times the plain disk's</text>\n"
        );
        for (number, (variant, ratio)) in bars.iter().enumerate() {
            let (y, width) = (26 + 22 * number, 340.0 * ratio / longest);
            let color = if variant.starts_with("qemu-cdp") { "#1a6fb5" } else { "#9aa5ad" };
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

/// Medians of two runs side by side, by their ratios to the plain disk; fails when one of ours got worse by a tenth or more.
pub(crate) fn compare(old: &Path, new: &Path) -> ExitCode {
    let (Some(old), Some(new)) = (read(old), read(new)) else { return ExitCode::from(2) };
    let mut worse = 0;
    for table in new.tables().iter().filter(|table| old.tables().contains(table)) {
        for variant in new.variants(table) {
            for value in ["us_per_write", "iops", "p99_us", "max_ms"] {
                let pair = old.ratio(table, variant, value).zip(new.ratio(table, variant, value));
                let Some((Spread(before, ..), Spread(after, ..))) = pair else { continue };
                let change = if value == "iops" { before / after } else { after / before };
                let verdict = if change >= 1.1 && variant.starts_with("qemu-cdp") {
                    worse += 1;
                    "WORSE"
                } else {
                    ""
                };
                println!("{table} | {variant} | {value} | × {before:.3} → × {after:.3} {verdict}");
            }
        }
    }
    println!("{worse} worse");
    if worse == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn read(path: &Path) -> Option<Report> {
    let text = fs::read_to_string(path).map_err(|e| e.to_string());
    let parsed = text.and_then(|text| serde_json::from_str::<Value>(&text).map_err(|e| e.to_string()));
    let value = parsed.inspect_err(|e| eprintln!("bench: {}: {e}", path.display())).ok()?;
    let text = |row: &Value, key: &str| row[key].as_str().unwrap_or_default().to_owned();
    let rows = value["rows"].as_array().into_iter().flatten().map(|row| {
        let values = row["values"].as_object().into_iter().flatten();
        let number = |value: &Value| usize::try_from(value.as_u64().unwrap_or_default()).unwrap_or_default();
        Row {
            section: text(row, "section"),
            medium: text(row, "medium"),
            pattern: text(row, "pattern"),
            variant: text(row, "variant"),
            round: number(&row["round"]),
            quiet: row["quiet"].as_bool().unwrap_or_default(),
            values: values.map(|(key, value)| (key.clone(), value.as_f64().unwrap_or_default())).collect(),
        }
    });
    Some(Report { name: text(&value, "name"), quick: value["quick"].as_bool()?, rows: rows.collect() })
}
