//! A second host: an agent with a machine id, a socket and a spool of its own, at a site's server.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::network::Network;
use crate::process::Process;
use crate::programs::program;
use crate::site::Site;

/// The agent of one more host, with a [`Network`] between it and the server.
#[derive(Debug)]
pub struct Host {
    /// The agent.
    pub agent: Process,
    network: Network,
    socket: PathBuf,
}

impl Host {
    /// Starts the agent of a host of that name.
    ///
    /// # Panics
    /// When it does not come up.
    #[must_use]
    pub fn start(site: &Site, name: &str) -> Self {
        let file = |suffix: &str| site.directory().join(format!("{name}.{suffix}"));
        let id: String = name.bytes().chain([0; 16]).take(16).map(|byte| format!("{byte:02x}")).collect();
        fs::write(file("machine-id"), id + "\n").expect("machine id");
        let (network, socket) = (Network::to(site.data()), file("sock"));
        let mut command = Command::new(program("cdp-agent"));
        command.args(["--server", &network.address(), "--host-name", name]);
        command.arg("--socket").arg(&socket).arg("--spool-dir").arg(file("spool"));
        command.arg("--machine-id").arg(file("machine-id"));
        let mut agent = Process::start(site.directory(), name, &mut command);
        let _ = agent.ready("socket");
        Self { agent, network, socket }
    }

    /// What is between this agent and the server.
    #[must_use]
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// The socket on which this host's filters connect.
    #[must_use]
    pub fn agent_socket(&self) -> &Path {
        &self.socket
    }
}
