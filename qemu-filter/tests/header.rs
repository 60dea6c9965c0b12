//! The committed header is what `src/ffi` says.

use std::path::Path;

fn generated() -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).expect("cbindgen.toml");
    let bindings = cbindgen::Builder::new()
        .with_config(config)
        .with_src(root.join("src/ffi/types.rs"))
        .with_src(root.join("src/ffi/api.rs"))
        .generate()
        .expect("the interface can be said in C");
    let mut text = Vec::new();
    bindings.write(&mut text);
    String::from_utf8(text).expect("cbindgen writes UTF-8")
}

#[test]
fn the_header_is_what_the_source_says() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("include/cdp_filter.h");
    if std::env::var_os("CDP_BLESS").is_some() {
        std::fs::write(&path, generated()).expect("the header can be written");
    }
    let committed = std::fs::read_to_string(&path).expect("include/cdp_filter.h is there");
    assert!(
        committed == generated(),
        "include/cdp_filter.h is not what src/ffi says; make it anew with: CDP_BLESS=1 cargo test -p qemu-filter --test header"
    );
}
