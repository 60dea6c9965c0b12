//! A server and a filter for tests: real sockets, real rings, in this process.

#![allow(unreachable_pub, reason = "a test is no library")]
#![allow(dead_code, reason = "each test program uses a part of it")]

pub mod filter;
pub mod server;

use std::path::Path;
use std::time::{Duration, Instant};

use host_agent::agent::Agent;
use host_agent::config::Config;
use host_agent::spool::SpoolPlace;

/// Longest wait for anything; only a hang takes so long.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `done` gives something.
pub fn wait_for<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(Instant::now() < end, "waited too long for: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Settings for an agent in `dir` with small buffers.
pub fn config(dir: &Path, server: &server::FakeServer, no_io_uring: bool) -> Config {
    Config {
        server: server.address().parse().expect("an address"),
        socket: dir.join("run/agent.sock"),
        socket_mode: 0o600,
        socket_group: None,
        ring_bytes: 16 << 20,
        outbox_bytes: 16 << 20,
        spool: SpoolPlace { folder: dir.join("spool"), limit_bytes: 0, drill: None },
        host_name: "testhost".into(),
        machine_id: None,
        token: "token".into(),
        tls: None,
        no_io_uring,
        drill: None,
    }
}

/// Everything running: server, agent, one filter with one disk.
pub struct Bench {
    pub server: server::FakeServer,
    pub agent: Agent,
    pub filter: filter::FakeFilter,
    pub dir: tempfile::TempDir,
}

impl Bench {
    pub fn start(no_io_uring: bool) -> Self {
        Self::start_with(|config| config.no_io_uring = no_io_uring)
    }

    pub fn start_with(change: impl FnOnce(&mut Config)) -> Self {
        Self::between(server::FakeServer::start(), tempfile::tempdir().expect("a folder"), change)
    }

    /// The same with a Unix socket between agent and server.
    pub fn start_over_unix(no_io_uring: bool) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let server = server::FakeServer::start_at(&dir.path().join("server.sock"));
        Self::between(server, dir, |config| config.no_io_uring = no_io_uring)
    }

    fn between(server: server::FakeServer, dir: tempfile::TempDir, change: impl FnOnce(&mut Config)) -> Self {
        let _ = tracing_subscriber::fmt().with_test_writer().with_max_level(tracing::Level::INFO).try_init();
        let mut config = config(dir.path(), &server, false);
        change(&mut config);
        let agent = Agent::start(config).expect("an agent");
        let filter = filter::FakeFilter::connect(&dir.path().join("run/agent.sock"), "vm", &["virtio0"]);
        Self { server, agent, filter, dir }
    }

    /// The id of the only VM's first disk.
    pub fn disk(&self) -> Vec<u8> {
        self.server.wait_for_disk("vm", "virtio0").disk
    }

    pub fn protect(&self) -> Vec<u8> {
        let disk = self.disk();
        assert_eq!(self.server.set_protection(&disk, true).error, "");
        disk
    }

    pub fn socket(&self) -> std::path::PathBuf {
        self.dir.path().join("run/agent.sock")
    }
}

/// Bytes that do not compress, the same for the same seed.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut step = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x
    };
    (0..len.div_ceil(8)).flat_map(|_| step().to_le_bytes()).take(len).collect()
}
