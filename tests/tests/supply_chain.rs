//! Holds every build to `deny.toml` without needing cargo-deny: banned crates, licences, sources.
//!
//! Only these parts of the file are read here; `cargo deny check` reads all of it.

use std::collections::BTreeSet;
use std::process::Command;

use serde_json::Value;

fn metadata() -> Value {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml");
    let out = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--locked", "--manifest-path", root])
        .output()
        .expect("cargo metadata runs");
    assert!(out.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).expect("cargo metadata prints JSON")
}

fn deny_file() -> toml::Table {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../deny.toml");
    std::fs::read_to_string(path).expect("deny.toml is there").parse().expect("deny.toml is TOML")
}

fn packages(metadata: &Value) -> impl Iterator<Item = (&str, &Value)> {
    let list = metadata["packages"].as_array().expect("packages");
    list.iter().map(|package| (package["name"].as_str().expect("a name"), package))
}

/// The names of the packages that something here is built with, on any system. The lock file has more: crates that a feature
/// would have if somebody asked for them (`ring?/alloc` of rustls-webpki names `ring`, which nobody builds).
fn built() -> BTreeSet<String> {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml");
    let out = Command::new(env!("CARGO"))
        .args([
            "tree",
            "--workspace",
            "--locked",
            "--target",
            "all",
            "--prefix",
            "none",
            "--manifest-path",
            root,
        ])
        .output()
        .expect("cargo tree runs");
    assert!(out.status.success(), "cargo tree: {}", String::from_utf8_lossy(&out.stderr));
    let text = String::from_utf8(out.stdout).expect("cargo tree prints text");
    text.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect()
}

/// The names of the packages that depend on `name`, other than for their own tests.
fn dependents<'a>(metadata: &'a Value, name: &str) -> BTreeSet<&'a str> {
    let depends = |package: &Value| {
        let list = package["dependencies"].as_array().expect("dependencies");
        list.iter().any(|dep| dep["name"] == name && dep["kind"] != "dev" && dep["optional"] == false)
    };
    packages(metadata).filter(|(_, package)| depends(package)).map(|(name, _)| name).collect()
}

#[test]
fn no_banned_crate_is_in_the_graph() {
    let (metadata, deny, present) = (metadata(), deny_file(), built());
    assert!(
        present.contains("rustls") && present.contains("lazy_static"),
        "cargo tree prints one crate a line"
    );
    for ban in deny["bans"]["deny"].as_array().expect("bans.deny") {
        let name = ban["name"].as_str().expect("a name");
        if !present.contains(name) {
            continue;
        }
        let wrappers: BTreeSet<&str> = match ban.get("wrappers") {
            Some(list) => list.as_array().expect("wrappers").iter().filter_map(toml::Value::as_str).collect(),
            None => BTreeSet::new(),
        };
        let users = dependents(&metadata, name);
        let stray: Vec<_> = users.difference(&wrappers).filter(|user| present.contains(**user)).collect();
        assert!(
            !wrappers.is_empty() && stray.is_empty(),
            "{name} is banned ({}) and comes in through {stray:?}",
            ban["reason"]
        );
    }
}

#[test]
fn every_licence_is_allowed() {
    let (metadata, deny) = (metadata(), deny_file());
    let list = deny["licenses"]["allow"].as_array().expect("licenses.allow");
    let allowed: BTreeSet<&str> = list.iter().filter_map(toml::Value::as_str).collect();
    let exceptions = deny["licenses"]["exceptions"].as_array().expect("licenses.exceptions");
    for (name, package) in packages(&metadata) {
        let licence = package["license"].as_str().unwrap_or("");
        let mut allowed = allowed.clone();
        for exception in exceptions.iter().filter(|exception| exception["crate"].as_str() == Some(name)) {
            let list = exception["allow"].as_array().expect("an exception's allow");
            allowed.extend(list.iter().filter_map(toml::Value::as_str));
        }
        assert!(
            expression_is_allowed(licence, &allowed),
            "{name} has the licence '{licence}', not allowed by deny.toml"
        );
    }
}

/// An SPDX expression of OR and AND without deep nesting, as crates use them ("MIT/Apache-2.0" is the old form of OR).
fn expression_is_allowed(licence: &str, allowed: &BTreeSet<&str>) -> bool {
    let flat = licence.replace('/', " OR ").replace(['(', ')'], "");
    let all_of = |part: &str| {
        part.split(" AND ").all(|one| one.split(" OR ").any(|name| allowed.contains(name.trim())))
    };
    if licence.contains(") AND ") || licence.contains(" AND (") {
        return all_of(&flat);
    }
    flat.split(" OR ").any(|part| part.split(" AND ").all(|name| allowed.contains(name.trim())))
}

#[test]
fn licence_expressions_are_read_as_written() {
    let allowed = BTreeSet::from(["MIT", "Unicode-3.0"]);
    for (licence, expected) in [
        ("MIT", true),
        ("GPL-3.0", false),
        ("MIT OR GPL-3.0", true),
        ("GPL-3.0/MIT", true),
        ("MIT AND GPL-3.0", false),
        ("(MIT OR Apache-2.0) AND Unicode-3.0", true),
        ("(GPL-2.0 OR Apache-2.0) AND MIT", false),
        ("", false),
    ] {
        assert_eq!(expression_is_allowed(licence, &allowed), expected, "{licence}");
    }
}

#[test]
fn everything_comes_from_the_registry_or_this_tree() {
    for (name, package) in packages(&metadata()) {
        let source = package["source"].as_str().unwrap_or("this tree");
        assert!(source == "this tree" || source.starts_with("registry+"), "{name} comes from {source}");
    }
}
