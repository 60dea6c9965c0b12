//! `docs/formats/durability.md` names a test for each case; they exist.
#![allow(missing_docs, reason = "test code")]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// The names of all tests in a folder's Rust files.
fn tests_in(folder: &Path, names: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).expect("folder") {
        let path = entry.expect("entry").path();
        if path.is_dir() {
            tests_in(&path, names);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).expect("file");
            let after = text.split("#[test]\n").skip(1);
            names.extend(
                after.filter_map(|after| {
                    Some(after.trim().strip_prefix("fn ")?.split_once('(')?.0.to_owned())
                }),
            );
        }
    }
}

#[test]
fn each_case_of_the_durability_page_names_a_test_that_exists() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut tests = BTreeSet::new();
    tests_in(&here.join("tests"), &mut tests);
    let page = fs::read_to_string(here.join("../docs/formats/durability.md")).expect("the page");
    let mut cases = 0;
    let mut in_table = false;
    for line in page.lines() {
        let cells: Vec<_> = line.split('|').map(str::trim).collect();
        let is_row = line.starts_with("| ");
        // The row above the dashes is the heading.
        if !is_row || cells.contains(&"test") {
            in_table = is_row && cells.contains(&"test");
            continue;
        }
        if in_table && !line.starts_with("| ---") {
            let test = cells[cells.len() - 2].trim_matches('`');
            assert!(tests.contains(test), "no test `{test}` for: {line}");
            cases += 1;
        }
    }
    assert!(cases > 20, "{cases} cases");
    for named in
        page.split('`').skip(1).step_by(2).filter(|word| word.matches('_').count() > 3 && !word.contains('/'))
    {
        assert!(tests.contains(named), "no test `{named}`");
    }
}
