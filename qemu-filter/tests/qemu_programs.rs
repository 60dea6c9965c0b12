//! The programs without devices, and a system emulator that goes to the background.

mod support;

use std::process::{Command, Stdio};

use journal_format::Op;

use support::agent::{Agent, Filter, Taken, wait_for};
use support::programs::{Ends, Site};
use support::qmp::Qmp;

/// Ends a process that is not our child any more.
struct Background(u32);

impl Drop for Background {
    fn drop(&mut self) {
        // It may have ended already.
        let _ended = Command::new("kill").args(["-KILL", &self.0.to_string()]).status();
    }
}

/// Writes through an NBD export, and compares what was captured with the image.
fn captured_through_export(site: &Site, filter: &mut Filter<'_>, device: &str) {
    let tap = filter.attach(device);
    let url = site.nbd_url();
    site.run(
        "qemu-io",
        &["-f", "raw", "-c", "write -P 7 64k 96k", "-c", "write -z 96k 4k", "-c", "flush", &url],
    );
    site.run("qemu-img", &["bench", "-q", "-w", "-c", "2000", "-d", "8", "-s", "8k", "-f", "raw", &url]);
    tap.wait_synced();
    let image = tap.image();
    filter.detach(device);
    assert!(image == site.contents("raw", "disk"), "the captured image differs");
}

#[test]
fn a_storage_daemon_in_the_background_is_protected_by_node_name() {
    let site = Site::new();
    site.create("raw", "disk", "8M");
    let agent = Agent::listen(site.path());
    let status = site
        .filtered("qemu-storage-daemon", &agent)
        .args(["--daemonize", "--pidfile", &site.inside("pid")])
        .args(["--blockdev", &format!("driver=file,node-name=disk,filename={}", site.inside("disk"))])
        .args(["--nbd-server", &format!("addr.type=unix,addr.path={}", site.inside("nbd"))])
        .args(["--export", "type=nbd,id=e,name=disk,node-name=disk,writable=on"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
    let pid = std::fs::read_to_string(site.path().join("pid")).unwrap().trim().parse().unwrap();
    let _ends = Background(pid);
    let mut filter = agent.accept();
    assert_eq!(filter.hello.program, "qemu-storage-daemon");
    captured_through_export(&site, &mut filter, "disk");
}

#[test]
fn a_network_block_device_server_that_forks_is_protected() {
    let site = Site::new();
    site.create("raw", "disk", "8M");
    let agent = Agent::listen(site.path());
    let options = format!("driver=file,node-name=disk,filename={}", site.inside("disk"));
    let status = site
        .filtered("qemu-nbd", &agent)
        .args(["--fork", "--persistent", "--pid-file", &site.inside("pid"), "--socket", &site.inside("nbd")])
        .args(["--export-name", "disk", "--image-opts", &options])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
    let pid = std::fs::read_to_string(site.path().join("pid")).unwrap().trim().parse().unwrap();
    let _ends = Background(pid);
    let mut filter = agent.accept();
    captured_through_export(&site, &mut filter, "disk");
}

#[test]
fn a_system_emulator_in_the_background_is_protected() {
    let site = Site::new();
    site.create("raw", "disk", "8M");
    let agent = Agent::listen(site.path());
    let status = site
        .filtered("qemu-system-x86_64", &agent)
        .args([
            "-accel",
            "tcg",
            "-machine",
            "pc",
            "-m",
            "64",
            "-display",
            "none",
            "-nodefaults",
            "-S",
            "-daemonize",
        ])
        .args([
            "-pidfile",
            &site.inside("pid"),
            "-qmp",
            &format!("unix:{},server=on,wait=off", site.inside("qmp")),
        ])
        .args(["-drive", &format!("if=none,id=d,format=raw,file={}", site.inside("disk"))])
        .args(["-device", "ide-hd,id=disk0,drive=d"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
    let pid = std::fs::read_to_string(site.path().join("pid")).unwrap().trim().parse().unwrap();
    let _ends = Background(pid);
    let mut qmp = Qmp::connect(&site.path().join("qmp"));
    let mut filter = agent.accept();
    let tap = filter.attach("disk0");
    qmp.io("/machine/peripheral/disk0", "write -P 5 1M 64k");
    tap.wait_synced();
    let image = tap.image();
    filter.detach("disk0");
    assert!(image == site.contents("raw", "disk"), "the captured image differs");
}

#[test]
fn an_export_on_an_iothread_is_protected_where_qemu_survives_draining_it() {
    let site = Site::new();
    site.create("raw", "disk", "8M");
    let agent = Agent::listen(site.path());
    let child = site
        .filtered("qemu-storage-daemon", &agent)
        .args(["--object", "iothread,id=io0"])
        .args(["--blockdev", &format!("driver=file,node-name=disk,filename={}", site.inside("disk"))])
        .args(["--nbd-server", &format!("addr.type=unix,addr.path={}", site.inside("nbd"))])
        .args(["--export", "type=nbd,id=e,name=disk,node-name=disk,writable=on,iothread=io0"])
        .spawn()
        .unwrap();
    let _daemon = Ends(child);
    let mut filter = agent.accept();
    let is_old = filter.hello.qemu_version.starts_with("7.2");
    wait_for("the export", || filter.list().iter().any(|disk| disk.device == "disk").then_some(()));
    if is_old {
        assert!(filter.try_attach("disk").err().unwrap().contains("iothread"));
    } else {
        captured_through_export(&site, &mut filter, "disk");
    }
}

/// A storage daemon under load, switched on and off, keeps neither threads nor descriptors nor memory.
#[test]
fn switching_on_and_off_leaves_nothing_behind() {
    let site = Site::new();
    let agent = Agent::listen(site.path());
    let daemon = site.storage_daemon(&agent);
    let mut filter = agent.accept();
    let url = site.nbd_url();
    let load = || {
        let mut load = site.command("qemu-img");
        load.args(["bench", "-w", "-c", "10000000", "-d", "8", "-s", "8k", "-f", "raw", &url]);
        Ends(load.stdout(Stdio::null()).spawn().unwrap())
    };
    filter.disk("disk");
    let tap = filter.attach("disk");
    let mut running = load();
    wait_for("the load", || {
        // The socket is there before the export is; a client that comes in between is turned away.
        if running.0.try_wait().unwrap().is_some() {
            running = load();
        }
        let is_guests = |taken: &Taken| matches!(taken.record.op, Op::Write { fill: false, .. });
        tap.records().iter().any(is_guests).then_some(())
    });
    filter.detach("disk");
    drop(tap);
    let mut toggle = |rounds: usize| {
        for _ in 0..rounds {
            drop(filter.attach("disk"));
            filter.detach("disk");
        }
    };
    toggle(10);
    let before = Belongings::of(daemon.0.id());
    toggle(100);
    let after = Belongings::of(daemon.0.id());
    assert!(running.0.try_wait().unwrap().is_none(), "a request has failed");
    assert_eq!(after.descriptors, before.descriptors);
    assert_eq!(after.mappings, before.mappings);
    assert!(after.memory_kib < before.memory_kib + 4096, "{before:?} {after:?}");
}

#[derive(Debug)]
struct Belongings {
    descriptors: usize,
    /// Mappings of rings: memfds.
    mappings: usize,
    memory_kib: u64,
}

impl Belongings {
    fn of(pid: u32) -> Self {
        let file = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap();
        let status = file("status");
        let memory = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        Self {
            descriptors: std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count(),
            mappings: file("maps").lines().filter(|line| line.contains("memfd:cdp")).count(),
            memory_kib: memory.trim().trim_end_matches("kB").trim().parse().unwrap(),
        }
    }
}
