//! What `/proc` says of a process: what it holds, and whether QEMU's memory points into the filter.

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// What a process holds on to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Holdings {
    /// Threads.
    pub threads: usize,
    /// Open file descriptors.
    pub fds: usize,
    /// Memory mappings.
    pub mappings: usize,
    /// Resident memory in bytes that was written to: anonymous memory and touched memfds. What is only read from a
    /// file (programs and their libraries) is left out: whether it counts as this process's own depends on which
    /// others run the same program at the moment.
    pub dirty_bytes: u64,
}

/// Counts what `pid` holds now.
///
/// # Panics
/// When there is no such process.
#[must_use]
pub fn holdings(pid: u32) -> Holdings {
    let count = |what: &str| fs::read_dir(format!("/proc/{pid}/{what}")).expect("a running process").count();
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("a running process");
    let dirty =
        rollup.lines().filter(|line| line.starts_with("Private_Dirty") || line.starts_with("Shared_Dirty"));
    let kib = dirty.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).sum::<u64>();
    Holdings { threads: count("task"), fds: count("fd"), mappings: maps(pid).len(), dirty_bytes: kib * 1024 }
}

struct Mapping {
    range: Range<u64>,
    permissions: String,
    path: String,
}

fn maps(pid: u32) -> Vec<Mapping> {
    let text = fs::read_to_string(format!("/proc/{pid}/maps")).expect("a running process");
    let parse = |line: &str| {
        let mut words = line.split_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let range = u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?;
        Some(Mapping {
            range,
            permissions: words.next()?.to_owned(),
            path: words.nth(3).unwrap_or_default().to_owned(),
        })
    };
    text.lines().map(|line| parse(line).expect("a line of maps")).collect()
}

/// How many words in the data of QEMU's own program (where its driver tables lie) point into the filter's code.
///
/// # Panics
/// When the process is gone, or the filter is not loaded in it.
#[must_use]
pub fn pointers_into_filter(pid: u32) -> usize {
    let maps = maps(pid);
    let of_filter = |m: &&Mapping| m.path.ends_with("libcdp_filter.so") && m.permissions.contains('x');
    let code: Vec<_> = maps.iter().filter(of_filter).map(|m| m.range.clone()).collect();
    assert!(!code.is_empty(), "the filter is not loaded in process {pid}");
    let program = fs::read_link(format!("/proc/{pid}/exe")).expect("a running process");
    let program = program.to_string_lossy();
    let memory = File::open(format!("/proc/{pid}/mem")).expect("the memory of a process of our own");
    let data = maps.iter().filter(|m| m.path == program && m.permissions.starts_with("rw"));
    let mut found = 0;
    for mapping in data {
        let mut bytes = vec![0; (mapping.range.end - mapping.range.start) as usize];
        memory.read_exact_at(&mut bytes, mapping.range.start).expect("readable memory");
        let words = bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("8 bytes")));
        found += words.filter(|word| code.iter().any(|range| range.contains(word))).count();
    }
    found
}
