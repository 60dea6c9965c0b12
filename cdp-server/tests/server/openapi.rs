//! The committed OpenAPI document says what the code does.

use std::path::Path;

use crate::Fixture;

#[test]
fn the_committed_document_is_the_code_s() {
    let text = serde_json::to_string_pretty(&cdp_server::rest::document()).expect("serializes") + "\n";
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/openapi.json");
    if std::env::var_os("UPDATE_OPENAPI").is_some() {
        std::fs::write(&path, &text).expect("writes");
    }
    let committed = std::fs::read_to_string(&path).expect("docs/openapi.json");
    assert!(
        committed == text,
        "docs/openapi.json is not what the code says; run this test with UPDATE_OPENAPI=1"
    );
}

#[test]
fn the_server_serves_the_committed_document() {
    let fixture = Fixture::start();
    let served =
        reqwest::blocking::get(fixture.url("/v1/openapi.json")).expect("answers").text().expect("text");
    let document: serde_json::Value = serde_json::from_str(&served).expect("JSON");
    let paths = document["paths"].as_object().expect("paths");
    for path in ["/v1/disks", "/v1/disks/{disk}", "/v1/disks/{disk}/protection", "/v1/disks/{disk}/points"] {
        assert!(paths.contains_key(path), "{path}");
    }
}
