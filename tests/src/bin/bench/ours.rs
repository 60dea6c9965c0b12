//! Our own side of a benchmark: server and agent, on the sink's core.

use std::process::Command;

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
        let site = Site::start();
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
