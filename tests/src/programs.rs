//! Where the programs under test are.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Directory with the workspace's programs and `libcdp_filter.so`, all of them up to date: what `CDP_BIN_DIR` says, else
/// the target directory that this test was built in, after a `cargo build` (which does nothing when all is built).
///
/// # Panics
/// When the build fails.
pub fn directory() -> &'static Path {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    DIRECTORY.get_or_init(|| match std::env::var_os("CDP_BIN_DIR") {
        Some(directory) => directory.into(),
        None => build(),
    })
}

fn build() -> PathBuf {
    // .../target/debug/deps/e2e-1234 → .../target/debug
    let test = std::env::current_exe().expect("the test's own path");
    let directory = test.ancestors().nth(2).expect("a target directory").to_owned();
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--workspace", "--quiet"]).current_dir(workspace());
    cargo.env("CARGO_TARGET_DIR", directory.parent().expect("a target directory"));
    if directory.ends_with("release") {
        cargo.arg("--release");
    }
    let status = cargo.status().expect("cargo runs");
    assert!(status.success(), "cargo build failed: {status}");
    directory
}

/// Root of the workspace.
#[must_use]
pub fn workspace() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// Path of a program of the workspace.
///
/// # Panics
/// When it is not there.
#[must_use]
pub fn program(name: &str) -> PathBuf {
    let path = directory().join(name);
    assert!(path.exists(), "{} is missing: cargo build --workspace", path.display());
    path
}
