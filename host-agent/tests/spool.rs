//! What a spool that cannot be written to looks like from outside.

mod common;

use common::filter::FakeFilter;
use common::server::FakeServer;
use common::{config, wait_for};
use host_agent::agent::Agent;
use journal_format::wire::disk_id;

#[test]
fn a_spool_that_fails_is_said_while_nothing_needs_it_and_until_it_works() {
    let dir = tempfile::tempdir().unwrap();
    let server = FakeServer::start();
    let mut config = config(dir.path(), &server, false);
    config.spool.limit_bytes = 64 << 20;
    let agent = Agent::start(config).unwrap();
    let _filter = FakeFilter::connect(&dir.path().join("run/agent.sock"), "vm", &["virtio0"]);
    let id = server.wait_for_disk("vm", "virtio0").disk;
    // A file where the disk's folder should be.
    let folder = dir.path().join("spool").join(disk_id(&id).unwrap().to_string());
    std::fs::write(&folder, b"").unwrap();
    assert_eq!(server.set_protection(&id, true).error, "");
    let failing = wait_for("a status that says so", || {
        server.status(&id).filter(|status| !status.spool_trouble.is_empty())
    });
    assert_eq!((failing.spool_bytes, failing.spool_used_bytes), (64 << 20, 0));
    assert!(failing.spool_trouble.contains(folder.to_str().unwrap()), "{}", failing.spool_trouble);
    std::fs::remove_file(&folder).unwrap();
    wait_for("a status without it", || server.status(&id).filter(|status| status.spool_trouble.is_empty()));
    assert!(!folder.exists(), "what tried it out is gone");
    agent.stop().unwrap();
}
