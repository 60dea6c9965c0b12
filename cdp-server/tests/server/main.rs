//! The server as its peers see it: a fake agent over real sockets on one side, the REST client on the other, the real
//! store in between.

#![allow(missing_docs, reason = "tests document themselves by their names")]

mod agent;
mod bookmarks;
mod faults;
mod hashes;
mod health;
mod hostile;
mod ingest;
mod openapi;
mod owners;
mod program;
mod protection;
mod rest;
mod start;
mod unix;

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use cdp_api::{Client, Problem};
use cdp_server::{Config, Server};

/// A server on a store of its own.
struct Fixture {
    dir: tempfile::TempDir,
    server: Option<Server>,
    client: Client,
}

impl Fixture {
    fn start() -> Self {
        Self::start_with(|_| ())
    }

    fn start_with(change: impl FnOnce(&mut Config)) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let mut config = Config::on_free_ports(dir.path());
        change(&mut config);
        let server = Server::start(config).expect("starts");
        let client = client(&server);
        Self { dir, server: Some(server), client }
    }

    fn data(&self) -> std::net::SocketAddr {
        self.server.as_ref().expect("runs").data_address()
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.server.as_ref().expect("runs").http_address())
    }

    /// Stops it cleanly and starts it again on the same store.
    fn restart(&mut self) {
        self.restart_after(|_| ());
    }

    /// As [`Fixture::restart`], and does something to its files in between.
    fn restart_after(&mut self, meanwhile: impl FnOnce(&std::path::Path)) {
        self.server.take().expect("runs").stop();
        meanwhile(self.dir.path());
        self.start_again();
    }

    /// Starts it after it was stopped.
    fn start_again(&mut self) {
        self.start_again_with(|_| ());
    }

    fn start_again_with(&mut self, change: impl FnOnce(&mut Config)) {
        let mut config = Config::on_free_ports(self.dir.path());
        change(&mut config);
        let server = Server::start(config).expect("starts again");
        self.client = client(&server);
        self.server = Some(server);
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            server.stop();
        }
    }
}

fn client(server: &Server) -> Client {
    Client::new(&format!("http://{}", server.http_address())).expect("a client")
}

fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    u64::try_from(since.as_nanos()).expect("before 2554")
}

/// Waits until `what` gives something; fails the test after a time that no slow machine needs.
fn eventually<T>(mut what: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(value) = what() {
            return value;
        }
        assert!(Instant::now() < end, "it never came true");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn problem<T: std::fmt::Debug>(result: Result<T, cdp_api::ClientError>) -> Problem {
    result.expect_err("a problem").problem().expect("of the API").clone()
}
