//! The ways into a QEMU: into one that runs already, and never twice.

mod support;

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use support::agent::{Agent, Filter};
use support::programs::{Site, library};
use support::vm::{VIRTIO, Vm, create_disks, start};

/// The folder that a running QEMU looks for its modules in.
fn module_folder(site: &Site) -> PathBuf {
    let version = site.run("qemu-system-x86_64", &["--version"]);
    let package = version.split(['(', ')']).nth(1).expect("a package version in brackets");
    let allowed = |letter: char| letter.is_ascii_alphanumeric() || "+.~-".contains(letter);
    let name: String = package.chars().map(|letter| if allowed(letter) { letter } else { '_' }).collect();
    site.root().join("run/qemu").join(name)
}

/// Removes what was put into the folder, whatever happens.
struct Module<'a>(&'a Path);

impl Drop for Module<'_> {
    fn drop(&mut self) {
        std::fs::remove_file(self.0).unwrap();
    }
}

/// All tests use one folder.
static FOLDER: Mutex<()> = Mutex::new(());

/// Loads a copy of the library into a running QEMU, as a module that it does not have.
fn load(site: &Site, vm: &mut Vm, module: &str, add: &str) {
    let _alone = FOLDER.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = module_folder(site);
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join(module);
    std::fs::copy(library(), &path).unwrap();
    let _module = Module(&path);
    let answer = vm.qmp.run(&add.replace('\'', "\""));
    assert!(answer.contains("\"error\""), "{answer}");
}

/// Threads of the library in the process, once a copy that was just loaded had time to start its own.
fn our_threads(vm: &Vm) -> usize {
    std::thread::sleep(Duration::from_millis(300));
    let tasks = std::fs::read_dir(format!("/proc/{}/task", vm.child.id())).unwrap();
    let names =
        tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).unwrap_or_default());
    names.filter(|name| name.starts_with("cdp-")).count()
}

const SSH: &str = "{'execute': 'blockdev-add', 'arguments': {'driver': 'ssh', 'node-name': 'none', 'path': '/', 'server': {'host': 'h', 'port': '1'}}}";
const NFS: &str = "{'execute': 'blockdev-add', 'arguments': {'driver': 'nfs', 'node-name': 'none', 'path': '/', 'server': {'host': 'h', 'type': 'inet'}}}";

/// Each write of the guest is captured once, and the captured image is the image.
fn captured_once(site: &Site, mut vm: Vm, mut filter: Filter<'_>) {
    vm.qmp.io(VIRTIO, "write -P 1 0 1M");
    let tap = filter.attach("disk0");
    tap.wait_synced();
    vm.qmp.io(VIRTIO, "write -P 2 512k 64k");
    let image = tap.image();
    filter.detach("disk0");
    vm.quit();
    assert!(image == site.contents("qcow2", "disk0"), "the captured image differs");
    assert_eq!(support::agent::guest_writes(&tap.finish()), 1);
}

#[test]
fn a_qemu_that_runs_already_is_entered_as_a_module() {
    let site = Site::new();
    let agent = Agent::listen(site.path());
    create_disks(&site);
    let mut vm = Vm::start(&site, site.pointed_at("qemu-system-x86_64", &agent), "qmp");
    load(&site, &mut vm, "block-ssh.so", SSH);
    let filter = agent.accept();
    captured_once(&site, vm, filter);
}

#[test]
fn a_copy_loaded_beside_a_preloaded_one_stays_idle() {
    let site = Site::new();
    let agent = Agent::listen(site.path());
    let (mut vm, filter) = start(&site, &agent);
    load(&site, &mut vm, "block-ssh.so", SSH);
    assert_eq!(our_threads(&vm), 1, "a second copy works");
    captured_once(&site, vm, filter);
}

#[test]
fn a_second_copy_loaded_into_a_running_qemu_stays_idle_and_says_so() {
    let site = Site::new();
    let agent = Agent::listen(site.path());
    create_disks(&site);
    let log = std::fs::File::create(site.path().join("log")).unwrap();
    let mut command = site.pointed_at("qemu-system-x86_64", &agent);
    command.stderr(Stdio::from(log));
    let mut vm = Vm::start(&site, command, "qmp");
    load(&site, &mut vm, "block-ssh.so", SSH);
    let filter = agent.accept();
    load(&site, &mut vm, "block-nfs.so", NFS);
    assert_eq!(our_threads(&vm), 1, "a second copy works");
    let said = std::fs::read_to_string(site.path().join("log")).unwrap();
    assert!(said.contains("the filter works in this process already"), "{said}");
    captured_once(&site, vm, filter);
}
