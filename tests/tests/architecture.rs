//! Who may know whom: the dependencies between the crates of the workspace, as `ARCHITECTURE.md` draws them.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;

/// Each crate, and the crates of the workspace that it may use.
const ALLOWED: &[(&str, &[&str])] = &[
    ("journal-format", &[]),
    ("capture-ring", &["journal-format"]),
    ("journal-store", &["journal-format"]),
    ("qemu-filter", &["capture-ring", "journal-format"]),
    ("host-agent", &["capture-ring", "daemon", "journal-format"]),
    ("cdp-api", &["journal-format"]),
    ("daemon", &[]),
    ("cdp-server", &["cdp-api", "daemon", "journal-format", "journal-store"]),
    ("restore-tool", &["cdp-api", "journal-format", "journal-store"]),
    ("cdpctl", &["cdp-api"]),
    // The ring, the store and the filter for `bench` alone, which measures their parts.
    ("cdp-tests", &["capture-ring", "cdp-api", "journal-format", "journal-store", "qemu-filter"]),
];

/// What is loaded into other people's virtual machines carries none of these.
const NOT_IN_QEMU: &[&str] = &[
    "tokio",
    "async-std",
    "smol",
    "rustls",
    "openssl",
    "native-tls",
    "serde",
    "serde_json",
    "prost",
    "bincode",
];

fn cargo(arguments: &[&str]) -> String {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    let output = Command::new(env!("CARGO")).args(arguments).current_dir(root).output().expect("cargo runs");
    assert!(output.status.success(), "cargo {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("cargo prints text")
}

/// For each crate of the workspace the other ones that it uses, in programs and libraries (tests may use more).
fn uses() -> BTreeMap<String, BTreeSet<String>> {
    let metadata = cargo(&["metadata", "--format-version", "1", "--locked", "--no-deps"]);
    let metadata: Value = serde_json::from_str(&metadata).expect("JSON");
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    let packages = metadata["packages"].as_array().expect("packages");
    let names: BTreeSet<_> = packages.iter().map(|package| text(&package["name"])).collect();
    let used = |package: &Value| {
        let dependencies = package["dependencies"].as_array().expect("dependencies");
        let shipped = dependencies.iter().filter(|dependency| dependency["kind"] != "dev");
        shipped.map(|dependency| text(&dependency["name"])).filter(|name| names.contains(name)).collect()
    };
    packages.iter().map(|package| (text(&package["name"]), used(package))).collect()
}

#[test]
fn dependencies_run_one_way() {
    let allowed: BTreeMap<_, _> = ALLOWED.iter().copied().collect();
    for (name, used) in uses() {
        let may =
            allowed.get(name.as_str()).unwrap_or_else(|| panic!("{name} is new: say here what it may use"));
        for other in used {
            assert!(may.contains(&other.as_str()), "{name} must not know {other}");
        }
    }
}

#[test]
fn the_filter_brings_no_runtime_into_qemu() {
    let tree = cargo(&["tree", "--locked", "-p", "qemu-filter", "-e", "normal", "--prefix", "none"]);
    let names: BTreeSet<_> = tree.lines().filter_map(|line| line.split_whitespace().next()).collect();
    assert!(names.contains("capture-ring"), "cargo tree prints one crate a line");
    for name in NOT_IN_QEMU {
        assert!(!names.contains(name), "{name} must not be loaded into QEMU");
    }
}

/// Where `unsafe` is allowed: files or folders under the root, as `ARCHITECTURE.md` lists them.
const UNSAFE_IS_IN: &[&str] = &[
    "capture-ring/src/raw/",
    "host-agent/src/seam/",
    "journal-store/src/io/map.rs",
    "journal-store/src/io/stream.rs",
    "qemu-filter/examples/",
    "qemu-filter/src/ffi/",
    "qemu-filter/src/qemu/",
];

fn sources(folder: &std::path::Path, found: &mut Vec<std::path::PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() && path.file_name().is_some_and(|name| name != "target") {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn unsafe_is_switched_on_only_where_the_architecture_says() {
    let root = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    let mut switched_on = 0;
    for (member, _) in ALLOWED.iter().filter(|(member, _)| *member != "cdp-tests") {
        let mut files = Vec::new();
        sources(&root.join(member), &mut files);
        for path in files {
            let text = std::fs::read_to_string(&path).expect("a source file");
            if !text.lines().any(|line| line.contains("allow(") && line.contains("unsafe_code")) {
                continue;
            }
            let name = path.strip_prefix(root).expect("under the root").to_string_lossy().into_owned();
            assert!(UNSAFE_IS_IN.iter().any(|place| name.starts_with(place)), "{name} allows unsafe code");
            switched_on += 1;
        }
    }
    assert!(
        switched_on >= UNSAFE_IS_IN.len() - 1,
        "the lint's name has changed, or this test looks in the wrong place"
    );
}
