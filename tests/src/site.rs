//! A server and an agent in a temporary directory, and what a test asks of them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use cdp_api::{Client, ClientError, DiskSummary, Kind, PointSpec, Points, ProtectionPhase};
use tempfile::TempDir;

use crate::network::{Network, Watch};
use crate::process::{Process, service};
use crate::programs::program;
use crate::wait_for;

/// In a site's directory, where one has a Unix socket between agent and server.
const SERVER_SOCKET: &str = "server.sock";

/// Where a restore reads from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Via {
    /// The running server.
    Server,
    /// The store's files.
    Store,
}

/// A server, an agent and a directory for everything else. Dropping it stops both.
#[derive(Debug)]
pub struct Site {
    /// The server.
    pub server: Process,
    /// The agent.
    pub agent: Process,
    agent_arguments: Vec<String>,
    server_arguments: Vec<String>,
    http: String,
    data: String,
    /// What the agent is given as the server's address.
    way: String,
    client: Client,
    /// What is between agent and server, if anything is.
    network: Option<Network>,
    restores: std::cell::Cell<u32>,
    directory: TempDir,
}

impl Site {
    /// Starts both on free ports and a private socket.
    ///
    /// # Panics
    /// When one does not come up.
    #[must_use]
    pub fn start() -> Self {
        Self::start_with(|_| None, &[], &[])
    }

    /// The same, with more arguments for the agent.
    ///
    /// # Panics
    /// When one does not come up.
    #[must_use]
    pub fn start_with_agent(arguments: &[&str]) -> Self {
        Self::start_with(|_| None, arguments, &[])
    }

    /// The same, with more arguments for the server.
    ///
    /// # Panics
    /// When one does not come up.
    #[must_use]
    pub fn start_with_server(arguments: &[&str]) -> Self {
        Self::start_with(|_| None, &[], arguments)
    }

    /// The same, with more arguments for either.
    ///
    /// # Panics
    /// When one does not come up.
    #[must_use]
    pub fn start_with_both(agent: &[&str], server: &[&str]) -> Self {
        Self::start_with(|_| None, agent, server)
    }

    /// The same, with a [`Network`] between agent and server.
    ///
    /// # Panics
    /// When one does not come up.
    #[must_use]
    pub fn start_with_network() -> Self {
        Self::start_with(|server| Some(Network::to(server)), &[], &[])
    }

    /// The same, with its files in a directory below that one.
    ///
    /// # Panics
    /// When one does not come up.
    #[must_use]
    pub fn start_with_network_below(parent: &Path) -> Self {
        Self::start_at(private_directory(parent), |server| Some(Network::to(server)), &[], &[])
    }

    /// The same, with somebody between agent and server who sees what passes.
    ///
    /// # Panics
    /// When one does not come up.
    #[must_use]
    pub fn start_watched(watch: Arc<dyn Watch>) -> Self {
        Self::start_with(|server| Some(Network::watched(server, watch)), &[], &[])
    }

    /// The same, with a Unix socket between agent and server.
    ///
    /// # Panics
    /// When one does not come up.
    #[must_use]
    pub fn start_over_unix() -> Self {
        Self::start_over_unix_below(&std::env::temp_dir())
    }

    /// The same, with all of its files in a directory below `parent`.
    ///
    /// # Panics
    /// When one does not come up.
    #[must_use]
    pub fn start_over_unix_below(parent: &Path) -> Self {
        let directory = private_directory(parent);
        let socket = directory.path().join(SERVER_SOCKET).display().to_string();
        Self::start_at(directory, |_| None, &[], &["--listen-unix", &socket])
    }

    fn start_with(
        network: impl FnOnce(&str) -> Option<Network>,
        arguments: &[&str],
        for_server: &[&str],
    ) -> Self {
        Self::start_at(private_directory(&std::env::temp_dir()), network, arguments, for_server)
    }

    fn start_at(
        directory: TempDir,
        network: impl FnOnce(&str) -> Option<Network>,
        arguments: &[&str],
        for_server: &[&str],
    ) -> Self {
        let owned = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect::<Vec<String>>();
        let (agent_arguments, server_arguments) = (owned(arguments), owned(for_server));
        let mut server = start_server(directory.path(), "127.0.0.1:0", "127.0.0.1:0", &server_arguments);
        let (http, data) = (server.ready("http"), server.ready("data"));
        let network = network(&data);
        let unix = for_server.contains(&"--listen-unix").then(|| format!("unix:{}", server.ready("unix")));
        let way = unix.unwrap_or_else(|| network.as_ref().map_or(data.clone(), Network::address));
        let agent = start_agent(directory.path(), &way, &agent_arguments);
        let client = Client::new(&format!("http://{http}")).expect("client");
        let restores = std::cell::Cell::new(0);
        Self {
            server,
            agent,
            agent_arguments,
            server_arguments,
            http,
            data,
            way,
            client,
            network,
            restores,
            directory,
        }
    }

    /// What is between agent and server.
    ///
    /// # Panics
    /// When the site was started without.
    #[must_use]
    pub fn network(&self) -> &Network {
        self.network.as_ref().expect("a site with a network")
    }

    /// The server's address for agents.
    #[must_use]
    pub fn data(&self) -> &str {
        &self.data
    }

    /// The server's address for REST.
    #[must_use]
    pub fn http(&self) -> &str {
        &self.http
    }

    /// The directory for everything of this test.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The store's directory.
    #[must_use]
    pub fn store(&self) -> PathBuf {
        self.directory().join("store")
    }

    /// The socket on which filters connect.
    #[must_use]
    pub fn agent_socket(&self) -> PathBuf {
        self.directory().join("agent.sock")
    }

    /// The API.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Starts the server again, on the same ports and store, after it was stopped or killed.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn restart_server(&mut self) {
        self.restart_server_with(&[]);
    }

    /// The same, with more arguments this time.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn restart_server_with(&mut self, more: &[&str]) {
        let arguments: Vec<_> =
            self.server_arguments.iter().cloned().chain(more.iter().map(|&word| word.to_owned())).collect();
        self.server = start_server(self.directory.path(), &self.data, &self.http, &arguments);
        let _ = self.server.ready("http");
    }

    /// Starts the agent again, on the same socket, after it was stopped or killed.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn restart_agent(&mut self) {
        self.agent = start_agent(self.directory.path(), &self.way, &self.agent_arguments);
    }

    /// The same, with these arguments instead of its former ones.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn restart_agent_with(&mut self, arguments: &[&str]) {
        self.agent_arguments = arguments.iter().map(|&word| word.to_owned()).collect();
        self.restart_agent();
    }

    /// Waits until a disk of that VM is known, and that it can be written to (while QEMU sets up an export it cannot, for
    /// a moment), and returns its id. With several disks, `device` must be part of the
    /// name of the wanted one.
    ///
    /// # Panics
    /// When there is none, or more than one.
    #[must_use]
    pub fn disk(&self, vm: &str, device: &str) -> String {
        let wanted = |disk: &DiskSummary| disk.vm == vm && disk.device.contains(device);
        let found = wait_for(&format!("disk {vm}/{device} in the server's list"), || {
            let disks = self.client.disks().expect("list of disks");
            let found: Vec<_> = disks.into_iter().filter(wanted).collect();
            (!found.is_empty()).then_some(found)
        });
        assert_eq!(found.len(), 1, "several disks: {found:?}");
        wait_for("the disk to be writable", || {
            (!self.client.disk(&found[0].id).expect("disk").read_only).then_some(())
        });
        found[0].id.clone()
    }

    /// Switches protection on and waits until every new write becomes a point.
    ///
    /// # Panics
    /// When that does not happen.
    pub fn protect(&self, disk: &str) {
        self.switch(disk, true);
        self.wait_for_phase(disk, ProtectionPhase::Protected);
    }

    /// Switches protection off and waits until it is.
    ///
    /// # Panics
    /// When that does not happen.
    pub fn unprotect(&self, disk: &str) {
        self.switch(disk, false);
        self.wait_for_phase(disk, ProtectionPhase::Off);
    }

    /// Orders protection on or off; again when QEMU does not come to rest, which is what a client of its NBD server does to
    /// it that connects just then.
    ///
    /// # Panics
    /// When it is refused for another reason.
    pub fn switch(&self, disk: &str, enabled: bool) {
        let refused = wait_for("QEMU to come to rest", || match self.client.set_protection(disk, enabled) {
            Err(error) if format!("{error:?}").contains("did not come to rest") => None,
            answer => Some(answer.map(drop)),
        });
        refused.unwrap_or_else(|e| panic!("protection of {disk} to {enabled}: {e:?}"));
    }

    /// Waits until the server reports that phase.
    ///
    /// # Panics
    /// When it does not.
    pub fn wait_for_phase(&self, disk: &str, phase: ProtectionPhase) {
        wait_for(&format!("disk {disk}: {phase}"), || {
            let protection = self.client.disk(disk).expect("disk").summary.protection;
            (protection.phase == phase).then_some(())
        });
    }

    /// Names the present moment, waits until it is durable, and returns its LSN: everything the guest has seen complete
    /// has a smaller one. In a gap, and while nobody says that the disk is being captured, none is taken: it waits.
    ///
    /// # Panics
    /// When the bookmark is refused.
    pub fn bookmark(&self, disk: &str, name: &str) -> u64 {
        let not_yet = |error: &ClientError| {
            error.problem().is_some_and(|p| matches!(p.kind, Kind::PointInGap | Kind::AgentOffline))
        };
        let mark =
            wait_for("a bookmark outside of gaps", || match self.client.create_bookmark(disk, name, None) {
                Err(error) if not_yet(&error) => None,
                answer => Some(answer),
            });
        let refused = |e| panic!("bookmark: {e:?}; the gaps are {:?}", self.points(disk).gaps);
        let mark = mark.unwrap_or_else(refused);
        self.wait_for_durable(disk, mark.lsn);
        mark.lsn
    }

    /// Waits until that LSN is durable and can be listed.
    ///
    /// # Panics
    /// When it does not happen.
    pub fn wait_for_durable(&self, disk: &str, lsn: u64) {
        wait_for(&format!("LSN {lsn} to be durable"), || {
            self.points(disk).newest.filter(|newest| newest.lsn >= lsn).map(|_| ())
        });
    }

    /// What can be restored.
    ///
    /// # Panics
    /// When the server does not say.
    #[must_use]
    pub fn points(&self, disk: &str) -> Points {
        self.client.points(disk).expect("points")
    }

    /// Runs `cdp-restore` to a raw file and returns its bytes.
    ///
    /// # Panics
    /// When the restore fails.
    #[must_use]
    pub fn restore(&self, disk: &str, at: &PointSpec, via: Via) -> Vec<u8> {
        let (path, output) = self.try_restore(disk, &at.to_string(), via);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(output.status.success(), "restore {at}: {}{}", text(&output.stdout), text(&output.stderr));
        let image = fs::read(&path).expect("restored image");
        fs::remove_file(&path).expect("remove");
        image
    }

    /// Runs `cdp-restore` to a new raw file; returns its path and what the program said.
    ///
    /// # Panics
    /// When the program cannot be run.
    #[must_use]
    pub fn try_restore(&self, disk: &str, at: &str, via: Via) -> (PathBuf, Output) {
        self.restores.set(self.restores.get() + 1);
        let path = self.directory().join(format!("restored-{}.raw", self.restores.get()));
        let mut command = Command::new(program("cdp-restore"));
        command.args(["--disk", disk, "--at", at, "--output"]).arg(&path).env_remove("CDP_SERVER");
        match via {
            Via::Server => command.arg("--server").arg(format!("http://{}", self.http)),
            Via::Store => command.arg("--store").arg(self.store()),
        };
        (path, command.output().expect("cdp-restore runs"))
    }
}

fn private_directory(parent: &Path) -> TempDir {
    tempfile::Builder::new().prefix("cdp-e2e-").tempdir_in(parent).expect("temporary directory")
}

fn start_server(directory: &Path, data: &str, http: &str, arguments: &[String]) -> Process {
    let mut command = service(program("cdp-server"));
    command.arg("--store").arg(directory.join("store")).args(["--listen", data, "--http", http]);
    command.args(arguments);
    Process::start(directory, "server", &mut command)
}

fn start_agent(directory: &Path, data: &str, arguments: &[String]) -> Process {
    let mut command = service(program("cdp-agent"));
    command.args(["--server", data]).arg("--socket").arg(directory.join("agent.sock"));
    command.arg("--spool-dir").arg(directory.join("spool")).args(arguments);
    let mut agent = Process::start(directory, "agent", &mut command);
    let _ = agent.ready("socket");
    agent
}
