//! Switching on and off: QEMU's own functions stand in its tables when nothing is protected, and a QEMU that is not
//! known, or a disk that cannot be captured, is refused and left alone.

mod support;

use std::io::Write as _;
use std::process::Stdio;

use support::agent::Agent;
use support::memory::{differing, driver_tables};
use support::programs::{QemuIo, Site, open};

fn raw(site: &Site) -> String {
    site.create("raw", "disk", "8M");
    format!("driver=raw,node-name=disk,file.driver=file,file.filename={}", site.inside("disk"))
}

#[test]
fn tables_hold_qemus_own_functions_before_and_after_protection() {
    let site = Site::new();
    let agent = Agent::listen(site.path());
    let (mut program, mut filter) = open(&site, &agent, &raw(&site));
    let executable = site.executable("qemu-io");
    let pid = site.pid_of(program.pid(), "qemu-io");
    let before = driver_tables(pid, &executable);
    for _ in 0..3 {
        let tap = filter.attach("disk");
        program.must("write -P 3 0 64k");
        assert!(differing(&before, &driver_tables(pid, &executable)) > 10, "nothing is hooked");
        filter.detach("disk");
        assert_eq!(differing(&before, &driver_tables(pid, &executable)), 0);
        drop(tap);
    }
    program.must("write -P 4 0 64k");
    program.quit();
}

#[test]
fn a_disk_that_goes_away_ends_its_capture_and_the_hook() {
    let site = Site::new();
    let agent = Agent::listen(site.path());
    let (mut program, mut filter) = open(&site, &agent, &raw(&site));
    let executable = site.executable("qemu-io");
    let pid = site.pid_of(program.pid(), "qemu-io");
    let before = driver_tables(pid, &executable);
    let tap = filter.attach("disk");
    program.must("write -P 3 0 64k");
    program.must("close");
    support::agent::wait_for("unhooking", || {
        filter.list();
        (differing(&before, &driver_tables(pid, &executable)) == 0).then_some(())
    });
    assert!(filter.disks.is_empty());
    filter.detach("disk");
    program.quit();
    drop(tap);
}

#[test]
fn protection_toggles_a_hundred_times_under_load_without_a_failed_request() {
    let site = Site::new();
    let agent = Agent::listen(site.path());
    let (mut program, mut filter) = open(&site, &agent, &raw(&site));
    program.must("write -P 1 0 8M");
    for round in 0..100_u32 {
        let offset = u64::from(round % 60) * 128;
        program.must(&format!("aio_write -P 5 {offset}k 96k"));
        program.must(&format!("aio_write -P 6 {}k 64k", offset + 32));
        let tap = filter.attach("disk");
        program.must(&format!("aio_write -P 7 {}k 96k", offset + 64));
        program.must(&format!("aio_write -P 8 {offset}k 96k"));
        filter.detach("disk");
        drop(tap);
    }
    let answer = program.run("aio_flush");
    assert!(!answer.contains("failed"), "{answer}");
    program.quit();
}

#[test]
fn attaching_twice_or_to_nothing_is_refused() {
    let site = Site::new();
    let agent = Agent::listen(site.path());
    let (program, mut filter) = open(&site, &agent, &raw(&site));
    let disk = filter.disk("disk");
    assert_eq!((disk.node.as_str(), disk.driver.as_str(), disk.disk_bytes), ("disk", "raw", 8 << 20));
    assert_eq!(disk.refused, "");
    assert_eq!((filter.hello.program.as_str(), filter.hello.vm_name.as_str()), ("qemu-io", "test"));
    assert_eq!(filter.hello.refused, "");
    filter.detach("disk");
    program.quit();
}

#[test]
fn a_wrong_version_is_refused_by_verification_and_changes_nothing() {
    let known = ["7.2.0", "10.0.0", "10.2.0"];
    for version in known {
        let site = Site::new();
        let agent = Agent::listen(site.path());
        let variable = format!("CDP_QEMU_VERSION={version}");
        let mut program = QemuIo::open_with(&site, &agent, &raw(&site), &[&variable]);
        let mut filter = agent.accept();
        if filter.hello.refused.is_empty() {
            // This is the right family for the release under test.
            filter.attach("disk");
            filter.detach("disk");
        } else {
            assert!(filter.hello.refused.contains("does not have the layout"), "{}", filter.hello.refused);
        }
        program.must("write -P 3 0 64k");
        program.quit();
    }
}

#[test]
fn an_unknown_version_is_refused_by_name() {
    let site = Site::new();
    let agent = Agent::listen(site.path());
    let mut program = QemuIo::open_with(&site, &agent, &raw(&site), &["CDP_QEMU_VERSION=8.2.1"]);
    let filter = agent.accept();
    assert!(filter.hello.refused.contains("8.2.1"), "{}", filter.hello.refused);
    program.must("write -P 3 0 64k");
    program.quit();
}

#[test]
fn a_read_only_disk_is_listed_and_refused() {
    let site = Site::new();
    let agent = Agent::listen(site.path());
    let options = format!("{},read-only=on", raw(&site));
    let mut command = site.filtered("qemu-io", &agent);
    command.args(["-r", "--image-opts", &options]).stdin(Stdio::piped()).stdout(Stdio::null());
    let mut child = command.spawn().unwrap();
    let mut filter = agent.accept();
    let disk = filter.disk("disk");
    assert!(disk.read_only && disk.refused.contains("read-only"), "{disk:?}");
    assert!(filter.try_attach("disk").err().unwrap().contains("read-only"));
    writeln!(child.stdin.take().unwrap(), "quit").unwrap();
    assert!(child.wait().unwrap().success());
}

#[test]
fn programs_that_are_not_qemu_and_qemu_img_run_unchanged() {
    let site = Site::new();
    let agent = Agent::listen(site.path());
    for (program, arguments) in [("true", &[][..]), ("qemu-img", &["--version"]), ("qemu-io", &["--version"])]
    {
        let output = site.filtered(program, &agent).args(arguments).output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{program}: {output:?}");
    }
}
