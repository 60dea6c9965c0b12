//! Looks into a running QEMU from outside: a witness of what stands in its driver tables.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;

/// Bytes of a driver's table in every release, at least.
const TABLE_BYTES: usize = 840;

/// The driver tables that QEMU exports.
pub const EXPORTED: [&str; 3] = ["bdrv_raw", "bdrv_qcow2", "bdrv_file"];

/// The words of the tables of a process running `executable`.
pub fn driver_tables(pid: u32, executable: &Path) -> Vec<Vec<u64>> {
    let base = load_address(pid, executable);
    let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
    EXPORTED
        .iter()
        .map(|name| {
            let mut bytes = vec![0; TABLE_BYTES];
            memory.read_exact_at(&mut bytes, base + symbol(executable, name)).unwrap();
            bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect()
        })
        .collect()
}

/// How many words differ.
pub fn differing(one: &[Vec<u64>], other: &[Vec<u64>]) -> usize {
    let words = |tables: &[Vec<u64>]| tables.concat();
    words(one).iter().zip(words(other)).filter(|(one, other)| *one != other).count()
}

fn load_address(pid: u32, executable: &Path) -> u64 {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let name = executable.file_name().unwrap().to_str().unwrap();
    let line = maps.lines().find(|line| line.ends_with(name)).unwrap();
    u64::from_str_radix(line.split('-').next().unwrap(), 16).unwrap()
}

fn symbol(executable: &Path, name: &str) -> u64 {
    let output = Command::new("nm").args(["-D", "--defined-only"]).arg(executable).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let line = text.lines().find(|line| line.split_ascii_whitespace().nth(2) == Some(name)).unwrap();
    u64::from_str_radix(line.split_ascii_whitespace().next().unwrap(), 16).unwrap()
}
