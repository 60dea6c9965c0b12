//! Our own side of a benchmark: server and agent, on the sink's core.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use cdp_api::Client;
use cdp_tests::network::Watch;
use cdp_tests::process::Process;
use cdp_tests::programs::program;
use cdp_tests::site::Site;
use cdp_tests::wait_for;

use crate::machine::{self, SINK_CORE};

/// Server and agent.
pub(crate) struct Ours {
    pub(crate) site: Site,
}

impl Ours {
    pub(crate) fn start() -> Self {
        Self::pinned(Site::start())
    }

    /// The same, with the store and all other files of it below that directory.
    pub(crate) fn start_below(parent: &Path) -> Self {
        Self::pinned(Site::start_below(parent))
    }

    /// The same, with somebody between them who sees what passes.
    pub(crate) fn start_watched(watch: Arc<dyn Watch>) -> Self {
        Self::pinned(Site::start_watched(watch))
    }

    fn pinned(site: Site) -> Self {
        machine::pin(site.agent.pid(), SINK_CORE);
        machine::pin(site.server.pid(), SINK_CORE);
        Self { site }
    }

    /// Loads the library into a QEMU program that stands for that VM.
    pub(crate) fn load(&self, command: &mut Command, vm: &str) {
        command.env("LD_PRELOAD", program("libcdp_filter.so"));
        command.env("CDP_AGENT_SOCKET", self.site.agent_socket()).env("CDP_VM_NAME", vm);
    }

    /// Records that the server has of the VM's disk, when it has caught up.
    pub(crate) fn records(&self, vm: &str) -> u64 {
        let disk = self.site.disk(vm, "");
        wait_for("the server to catch up", || {
            let journal = self.site.client().disk(&disk).expect("disk").journal?;
            (journal.lag_lsns == 0).then_some(journal.durable_lsn)
        })
    }
}

/// A server alone.
pub(crate) struct Server {
    pub(crate) process: Process,
    /// Its address for agents.
    pub(crate) data: String,
    /// Its address for REST, and a client of it.
    pub(crate) url: String,
    pub(crate) client: Client,
}

impl Server {
    /// Starts one on a store, which is made if it is not there.
    pub(crate) fn start(directory: &Path, store: &Path) -> Self {
        let mut command = machine::pinned(SINK_CORE, program("cdp-server"));
        command.arg("--store").arg(store).args(["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]);
        let mut process = Process::start(directory, "server", &mut command);
        let (data, http) = (process.ready("data"), process.ready("http"));
        let url = format!("http://{http}");
        let client = Client::new(&url).expect("a client");
        Self { process, data, url, client }
    }
}

/// Bytes that a store's files take on their disk: data, and everything else that belongs to disks.
pub(crate) fn stored(store: &Path) -> (u64, u64) {
    use std::os::unix::fs::MetadataExt;
    let folders = fs::read_dir(store.join("disks")).expect("a store").flatten();
    let files = folders.flat_map(|folder| fs::read_dir(folder.path()).expect("a disk").flatten());
    let (mut data, mut metadata) = (0, 0);
    for file in files {
        let bytes = file.metadata().map_or(0, |metadata| metadata.blocks() * 512);
        match file.file_name().to_string_lossy().starts_with("data-") {
            true => data += bytes,
            false => metadata += bytes,
        }
    }
    (data, metadata)
}
