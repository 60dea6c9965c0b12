//! The program as whoever calls it the wrong way sees it.

#![allow(missing_docs, reason = "tests document themselves by their names")]

use std::process::Command;

#[test]
fn wrong_usage_is_said_in_one_line_and_ends_with_2() {
    for arguments in [&["--config", "/nowhere.toml"][..], &["--server", "nowhere"]] {
        let mut program = Command::new(env!("CARGO_BIN_EXE_cdp-agent"));
        let ended = program.env("RUST_BACKTRACE", "1").args(arguments).output().expect("runs");
        let said = String::from_utf8(ended.stderr).expect("text");
        assert_eq!(ended.status.code(), Some(2), "{arguments:?}: {said}");
        assert!(said.starts_with("cdp-agent: ") && said.lines().count() == 1, "{said}");
    }
}
