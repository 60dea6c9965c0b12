//! A program in C that tees its writes through `include/cdp_filter.h`, against an agent that this test plays.

mod support;

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use journal_format::Op;
use support::agent::Agent;
use support::programs::library;

/// Compiles `tests/c/tee.c` against the header and the library of this build.
fn compile(folder: &Path) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let program = folder.join("tee");
    let libraries = library().parent().expect("a folder").to_owned();
    let status = Command::new("cc")
        .args(["-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", "-I"])
        .arg(root.join("include"))
        .arg(root.join("tests/c/tee.c"))
        .arg("-L")
        .arg(&libraries)
        .arg("-lcdp_filter")
        .arg(format!("-Wl,-rpath,{}", libraries.display()))
        .arg("-o")
        .arg(&program)
        .status()
        .expect("a C compiler");
    assert!(status.success(), "the C program does not compile against the header");
    program
}

#[test]
fn a_program_in_c_is_captured_byte_for_byte() {
    let folder = tempfile::tempdir().expect("a folder");
    let program = compile(folder.path());
    let image = folder.path().join("image");
    // Data before capture begins, a hole, and an end that is not a whole chunk.
    let before: Vec<u8> = (0..3_000_000).map(|i| (i % 253) as u8).collect();
    std::fs::write(&image, before).expect("an image");
    std::fs::OpenOptions::new()
        .write(true)
        .open(&image)
        .and_then(|file| file.set_len((8 << 20) + 1536))
        .expect("a hole");

    let agent = Agent::listen(folder.path());
    let mut child = Command::new(program)
        // The one it was linked with; the runner's own path may have an older one.
        .env("LD_LIBRARY_PATH", library().parent().expect("a folder"))
        .arg(agent.socket())
        .arg(&image)
        .args(["4", "1500"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let mut filter = agent.accept();
    assert_eq!((filter.hello.program.as_str(), filter.hello.vm_name.as_str()), ("tee", "tee"));
    assert_eq!(filter.hello.vm_uuid[..4], [1, 2, 3, 0]);
    let tap = filter.attach("disk0");
    let mut out = BufReader::new(child.stdout.take().expect("a pipe")).lines();
    assert_eq!(out.next().and_then(Result::ok).as_deref(), Some("done"));
    tap.wait_synced();

    let records = tap.records();
    let mut kinds = [0; 5];
    for taken in &records {
        match taken.record.op {
            Op::Write { fill: false, fua: true, .. } => kinds[0] += 1,
            Op::Zero { fill: false, may_unmap: true, .. } => kinds[1] += 1,
            Op::Discard { .. } => kinds[2] += 1,
            Op::Flush => kinds[3] += 1,
            Op::Resize { .. } => kinds[4] += 1,
            _ => {}
        }
    }
    assert!(kinds.iter().all(|count| *count > 0), "a kind of request is missing: {kinds:?}");
    assert!(tap.image() == std::fs::read(&image).expect("the image"), "the records make another disk");

    child.stdin.take().expect("a pipe").write_all(b"\n").expect("the program listens");
    assert_eq!(out.next().and_then(Result::ok).as_deref(), Some("closed"));
    assert!(child.wait().expect("it ends").success());
    assert_eq!(tap.finish().len(), records.len(), "closing adds no record");
}
