//! A system emulator with a virtio disk and a SCSI disk on iothreads, its processor stopped.

use std::process::{Child, Command, Stdio};

use super::agent::{Agent, Filter};
use super::programs::Site;
use super::qmp::Qmp;

/// The virtio disk, `disk0`.
pub const VIRTIO: &str = "/machine/peripheral/disk0/virtio-backend";
/// The SCSI disk, `disk1`.
pub const SCSI: &str = "/machine/peripheral/disk1";
/// The virtual machine's.
pub const UUID: &str = "12345678-9abc-def0-1234-56789abcdef0";

/// A virtual machine whose processor is stopped, with a virtio disk and a SCSI disk on iothreads.
pub struct Vm {
    pub child: Child,
    pub qmp: Qmp,
}

impl Vm {
    /// Starts what `command` says so far with the two disks, whose images exist, and a monitor of that name.
    pub fn start(site: &Site, mut command: Command, monitor: &str) -> Self {
        command.args([
            "-accel",
            "tcg",
            "-machine",
            "q35",
            "-m",
            "64",
            "-nodefaults",
            "-display",
            "none",
            "-S",
        ]);
        command.args(["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]);
        command.args([
            "-name",
            "guest",
            "-uuid",
            UUID,
            "-object",
            "iothread,id=io0",
            "-object",
            "iothread,id=io1",
        ]);
        for disk in ["disk0", "disk1"] {
            let file = site.inside(disk);
            let node = format!(
                "driver=qcow2,node-name=node-{disk},file.driver=file,file.node-name=file-{disk},file.filename={file}"
            );
            command.args(["-blockdev", &node]);
        }
        command.args(["-device", "virtio-blk-pci,id=disk0,drive=node-disk0,iothread=io0,share-rw=on"]);
        command.args(["-device", "virtio-scsi-pci,id=scsi0,iothread=io1"]);
        command.args(["-device", "scsi-hd,id=disk1,drive=node-disk1,bus=scsi0.0"]);
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", site.inside(monitor))]);
        let child = command.stdout(Stdio::null()).spawn().unwrap();
        Self { child, qmp: Qmp::connect(&site.path().join(monitor)) }
    }

    /// Ends it; it must end well.
    pub fn quit(mut self) {
        self.qmp.must("{'execute': 'quit'}");
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // It may have ended already.
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// Many writes through an NBD export of the same node on an iothread, as a guest would make them: two programs whose
/// writes overlap, each with a pattern of its own.
pub struct Load([Child; 2]);

impl Load {
    /// Starts it.
    pub fn on(site: &Site, qmp: &mut Qmp, node: &str, iothread: &str) -> Self {
        Self::with(site, qmp, node, iothread, &["-d", "16"])
    }

    /// Starts one that leaves time for others: each program waits for each write to be durable.
    pub fn gentle_on(site: &Site, qmp: &mut Qmp, node: &str, iothread: &str) -> Self {
        Self::with(site, qmp, node, iothread, &["-d", "1", "--flush-interval", "1"])
    }

    fn with(site: &Site, qmp: &mut Qmp, node: &str, iothread: &str, arguments: &[&str]) -> Self {
        let socket = site.inside("nbd");
        qmp.must(&format!(
            "{{'execute': 'nbd-server-start', 'arguments': {{'addr': {{'type': 'unix', 'data': {{'path': '{socket}'}}}}}}}}"
        ));
        let export =
            format!("'type': 'nbd', 'id': 'load', 'node-name': '{node}', 'name': 'load', 'writable': true");
        qmp.must(&format!(
            "{{'execute': 'block-export-add', 'arguments': {{{export}, 'iothread': '{iothread}'}}}}"
        ));
        let url = format!("nbd+unix:///load?socket={socket}");
        Self([("8k", "1"), ("16k", "2")].map(|(size, pattern)| {
            let mut command = site.command("qemu-img");
            command.args(["bench", "-w", "-c", "10000000", "-s", size, "-f", "raw"]).args(arguments);
            command.args([&format!("--pattern={pattern}"), &url]).stdout(Stdio::null()).spawn().unwrap()
        }))
    }

    /// Ends it, unless a request has failed before.
    pub fn end(mut self) {
        for child in &mut self.0 {
            assert!(child.try_wait().unwrap().is_none(), "a request has failed");
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}

/// Empty images for the two disks.
pub fn create_disks(site: &Site) {
    for disk in ["disk0", "disk1"] {
        site.create("qcow2", disk, "8M");
    }
}

/// A virtual machine with empty disks and the library loaded, and its filter.
pub fn start<'a>(site: &Site, agent: &'a Agent) -> (Vm, Filter<'a>) {
    create_disks(site);
    let vm = Vm::start(site, site.preloaded("qemu-system-x86_64", agent), "qmp");
    (vm, agent.accept())
}
