//! Our own side of a benchmark: server and agent, on the sink's core.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use cdp_api::Client;
use cdp_tests::network::Watch;
use cdp_tests::process::Process;
use cdp_tests::programs::program;
use cdp_tests::site::Site;

use crate::machine::{self, SINK_CORE};

/// Server and agent.
pub(crate) struct Ours {
    pub(crate) site: Site,
}

impl Ours {
    /// Starts them, with the store and all other files of theirs below that directory, and a Unix socket between them, as the
    /// peers have to their other end.
    pub(crate) fn start_below(parent: &Path) -> Self {
        Self::pinned(Site::start_over_unix_below(parent))
    }

    /// The same, with a network between them that can stand still.
    pub(crate) fn start_with_network_below(parent: &Path) -> Self {
        Self::pinned(Site::start_with_network_below(parent))
    }

    /// Starts them, with somebody between them who sees what passes.
    pub(crate) fn start_watched(watch: Arc<dyn Watch>) -> Self {
        Self::pinned(Site::start_watched(watch))
    }

    fn pinned(site: Site) -> Self {
        let this = Self { site };
        this.pin(SINK_CORE);
        for process in [&this.site.agent, &this.site.server] {
            machine::give_way(process.pid());
        }
        this
    }

    /// Loads the library into a QEMU program that stands for that VM.
    pub(crate) fn load(&self, command: &mut Command, vm: &str) {
        command.env("LD_PRELOAD", program("libcdp_filter.so"));
        command.env("CDP_AGENT_SOCKET", self.site.agent_socket()).env("CDP_VM_NAME", vm);
    }

    /// Moves agent and server to one core.
    pub(crate) fn pin(&self, core: &str) {
        for process in [&self.site.agent, &self.site.server] {
            machine::pin(process.pid(), core);
        }
    }

    /// Processor time of agent and server so far, in seconds.
    pub(crate) fn cpu_seconds(&self) -> [f64; 2] {
        [&self.site.agent, &self.site.server].map(|process| machine::cpu_seconds(process.pid()))
    }

    /// Waits until all that the VM has written is durable at the server, and history has no gap any more.
    pub(crate) fn catch_up(&self, vm: &str) {
        let nanoseconds = UNIX_EPOCH.elapsed().expect("after 1970").as_nanos();
        self.site.bookmark(&self.site.disk(vm, ""), &format!("caught up {nanoseconds}"));
    }

    /// Which share of the time between two moments (in seconds since 1970) history has without a gap.
    pub(crate) fn captured(&self, disk: &str, from: f64, to: f64) -> f64 {
        let seconds = |nanoseconds: u64| nanoseconds as f64 / 1e9;
        let inside = |gap: &cdp_api::Gap| {
            let end = gap.to_stamp_ns.map_or(to, seconds).min(to);
            (end - seconds(gap.from_stamp_ns).max(from)).max(0.0)
        };
        1.0 - self.site.points(disk).gaps.iter().map(inside).sum::<f64>() / (to - from)
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
        Self::start_with(directory, store, &[])
    }

    /// The same, with more arguments.
    pub(crate) fn start_with(directory: &Path, store: &Path, arguments: &[&str]) -> Self {
        let mut command = machine::pinned(SINK_CORE, program("cdp-server"));
        command.arg("--store").arg(store).args(["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]);
        command.args(arguments);
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
