//! Real QEMU programs with the filter loaded: `qemu-storage-daemon` with an NBD export, and `qemu-system-x86_64` with a
//! virtio disk on an iothread.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::process::Process;
use crate::programs::program;
use crate::qmp::Qmp;
use crate::site::Site;

/// A running QEMU program.
#[derive(Debug)]
pub struct Qemu {
    /// The process.
    pub process: Process,
    /// Its monitor.
    pub qmp: Qmp,
    name: String,
    entry: Entry,
}

/// How requests get in.
#[derive(Clone, Debug)]
enum Entry {
    /// Through an NBD export on this socket.
    Nbd(PathBuf),
    /// Through the device with this id, by the monitor's `qemu-io` command.
    Device(String),
}

impl Qemu {
    /// Starts a storage daemon with these block nodes that exports `node` as `disk`.
    ///
    /// # Panics
    /// When it does not come up.
    #[must_use]
    pub fn storage_daemon(site: &Site, name: &str, nodes: &[Value], node: &str) -> Self {
        let exports =
            [json!({"type": "nbd", "id": "export0", "name": "disk", "node-name": node, "writable": true})];
        Self::storage_daemon_with(site, name, nodes, &[], &exports)
    }

    /// Starts a storage daemon that exports `image` as `disk`, on the host whose agent has that socket, and as the VM
    /// with that UUID.
    ///
    /// # Panics
    /// When it does not come up.
    #[must_use]
    pub fn storage_daemon_as(site: &Site, agent_socket: &Path, name: &str, uuid: &str, image: &Path) -> Self {
        let export =
            json!({"type": "nbd", "id": "export0", "name": "disk", "node-name": "disk", "writable": true});
        let (qmp, nbd) = sockets(site, name);
        let mut command = daemon(&qmp, &nbd, &[raw_file(image)], &[], &[export]);
        command.env("CDP_AGENT_SOCKET", agent_socket).env("CDP_VM_UUID", uuid);
        Self::start(site, name, &mut command, &qmp, Entry::Nbd(nbd))
    }

    /// Starts a storage daemon with these block nodes, iothreads and exports.
    ///
    /// # Panics
    /// When it does not come up.
    #[must_use]
    pub fn storage_daemon_with(
        site: &Site,
        name: &str,
        nodes: &[Value],
        iothreads: &[&str],
        exports: &[Value],
    ) -> Self {
        let (qmp, nbd) = sockets(site, name);
        let mut command = daemon(&qmp, &nbd, nodes, iothreads, exports);
        command.env("CDP_AGENT_SOCKET", site.agent_socket());
        Self::start(site, name, &mut command, &qmp, Entry::Nbd(nbd))
    }

    /// Starts a virtual machine, with these block nodes, whose only disk `disk0` is `node`, on an iothread. Its processor is
    /// stopped; the disk is not.
    ///
    /// # Panics
    /// When it does not come up.
    #[must_use]
    pub fn system(site: &Site, name: &str, nodes: &[Value], node: &str) -> Self {
        Self::system_with(site, &site.agent_socket(), name, nodes, node, &[])
    }

    /// The same, on the host whose agent has that socket, with more arguments.
    ///
    /// # Panics
    /// When it does not come up.
    #[must_use]
    pub fn system_with(
        site: &Site,
        agent_socket: &Path,
        name: &str,
        nodes: &[Value],
        node: &str,
        arguments: &[&str],
    ) -> Self {
        let (qmp, _) = sockets(site, name);
        let mut command = Command::new("qemu-system-x86_64");
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
        command.args(["-name", name, "-object", "iothread,id=io0"]);
        for blockdev in nodes {
            command.args(["-blockdev", &blockdev.to_string()]);
        }
        command
            .args(["-device", &format!("virtio-blk-pci,id=disk0,drive={node},iothread=io0,write-cache=on")]);
        command.args(["-chardev", &format!("socket,id=qmp,path={},server=on,wait=off", qmp.display())]);
        command.args(["-mon", "chardev=qmp,mode=control"]);
        command.args(arguments).env("CDP_AGENT_SOCKET", agent_socket);
        Self::start(
            site,
            name,
            &mut command,
            &qmp,
            Entry::Device("/machine/peripheral/disk0/virtio-backend".to_owned()),
        )
    }

    fn start(site: &Site, name: &str, command: &mut Command, qmp: &Path, entry: Entry) -> Self {
        command.env("LD_PRELOAD", program("libcdp_filter.so")).env("CDP_VM_NAME", name);
        let process = Process::start(site.directory(), name, command);
        Self { process, qmp: Qmp::connect(qmp), name: name.to_owned(), entry }
    }

    /// The name under which the server knows the virtual machine.
    #[must_use]
    pub fn vm(&self) -> &str {
        &self.name
    }

    /// The socket of the storage daemon's NBD server.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn nbd_socket(&self) -> &Path {
        match &self.entry {
            Entry::Nbd(socket) => socket,
            Entry::Device(_) => panic!("a system emulator exports nothing"),
        }
    }

    /// What `qemu-io` needs in order to reach the exported disk.
    ///
    /// # Panics
    /// When there is no export.
    #[must_use]
    pub fn nbd_url(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.nbd_socket().display())
    }

    /// Runs `qemu-io` commands one after another, each complete before the next begins.
    ///
    /// # Panics
    /// When one of them fails.
    pub fn io<S: AsRef<str>>(&mut self, commands: &[S]) {
        match self.entry.clone() {
            Entry::Nbd(_) => {
                let mut command = Command::new("qemu-io");
                command.args(["-t", "writeback", "-f", "raw"]);
                for line in commands {
                    command.args(["-c", line.as_ref()]);
                }
                let output = command.arg(self.nbd_url()).output().expect("qemu-io runs");
                let said = String::from_utf8_lossy(&output.stdout).into_owned()
                    + &String::from_utf8_lossy(&output.stderr);
                assert!(output.status.success() && !failed(&said), "qemu-io: {said}");
            }
            Entry::Device(device) => {
                for line in commands {
                    let said = self.qmp.human(&format!("qemu-io -d {device} \"{}\"", line.as_ref()));
                    assert!(said.is_empty(), "qemu-io {}: {said}", line.as_ref());
                }
                let said = self.process.stdout();
                assert!(!failed(&said), "qemu-io: {said}");
            }
        }
    }

    /// Everything that QMP shows of the block graph.
    ///
    /// # Panics
    /// When the monitor does not answer.
    pub fn block_graph(&mut self) -> Value {
        let nodes = self.qmp.run("query-named-block-nodes", json!({}));
        let devices = match self.entry {
            Entry::Device(_) => self.qmp.run("query-block", json!({})),
            Entry::Nbd(_) => self.qmp.run("query-block-exports", json!({})),
        };
        json!({ "nodes": nodes, "devices": devices })
    }
}

fn daemon(qmp: &Path, nbd: &Path, nodes: &[Value], iothreads: &[&str], exports: &[Value]) -> Command {
    let mut command = Command::new("qemu-storage-daemon");
    command.args(Qmp::arguments(qmp));
    for blockdev in nodes {
        command.args(["--blockdev", &blockdev.to_string()]);
    }
    command.args(["--nbd-server", &format!("addr.type=unix,addr.path={}", nbd.display())]);
    for iothread in iothreads {
        command.args(["--object", &format!("iothread,id={iothread}")]);
    }
    for export in exports {
        command.args(["--export", &export.to_string()]);
    }
    command
}

/// The main version of the installed QEMU.
///
/// # Panics
/// When there is none.
#[must_use]
pub fn main_version() -> u32 {
    let output =
        Command::new("qemu-storage-daemon").arg("--version").output().expect("qemu-storage-daemon runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let number = text.split("version ").nth(1).and_then(|rest| rest.split('.').next()?.parse().ok());
    number.unwrap_or_else(|| panic!("no version in {text:?}"))
}

/// Whether `qemu-io` said that a request failed.
#[must_use]
pub fn failed(said: &str) -> bool {
    said.contains("failed")
        || said.contains("error")
        || said.contains("not found")
        || said.contains("invalid")
}

fn sockets(site: &Site, name: &str) -> (PathBuf, PathBuf) {
    (site.directory().join(format!("{name}.qmp")), site.directory().join(format!("{name}.nbd")))
}

/// A raw file as one node, `disk`.
#[must_use]
pub fn raw_file(path: &Path) -> Value {
    json!({"driver": "file", "node-name": "disk", "filename": path, "discard": "unmap"})
}

/// An image in the format qcow2, with clusters of 64 KiB.
///
/// # Panics
/// When `qemu-img` fails.
pub fn create_qcow2(path: &Path, disk_bytes: u64) {
    let output = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-o", "cluster_size=65536"])
        .arg(path)
        .arg(disk_bytes.to_string())
        .output()
        .expect("qemu-img runs");
    assert!(output.status.success(), "qemu-img: {}", String::from_utf8_lossy(&output.stderr));
}

/// An image in the format qcow2 as node `disk`, on which discards take effect.
#[must_use]
pub fn qcow2_file(path: &Path) -> Value {
    json!({
        "driver": "qcow2", "node-name": "disk", "discard": "unmap",
        "file": {"driver": "file", "filename": path, "discard": "unmap"},
    })
}

/// A `blklogwrites` filter, node `witness`, above node `disk`; it logs to `log`, which must exist, with its header up to
/// date after every request.
#[must_use]
pub fn witness_above_disk(log: &Path) -> Value {
    json!({
        "driver": "blklogwrites", "node-name": "witness", "file": "disk", "discard": "unmap",
        "log": {"driver": "file", "filename": log}, "log-super-update-interval": 1,
    })
}
