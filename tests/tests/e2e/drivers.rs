//! Disks of different drivers, and what management does to them while they are protected.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use cdp_api::PointSpec;
use cdp_tests::load::{Load, Request};
use cdp_tests::qemu::Qemu;
use cdp_tests::site::{Site, Via};
use cdp_tests::wait_for;
use serde_json::{Value, json};

const DISK_BYTES: u64 = 8 << 20;

fn qemu_img(arguments: &[&str]) {
    let status = Command::new("qemu-img").args(arguments).status().expect("qemu-img runs");
    assert!(status.success(), "qemu-img {arguments:?}");
}

fn path_text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

/// A format node `disk` above a file.
fn format_node(driver: &str, path: &Path) -> Value {
    let file = json!({"driver": "file", "filename": path, "discard": "unmap"});
    json!({"driver": driver, "node-name": "disk", "discard": "unmap", "file": file})
}

/// A protected disk, and the image that its guest expects on it.
struct Modelled<'a> {
    site: &'a Site,
    qemu: Qemu,
    disk: String,
    load: Load,
    image: Vec<u8>,
    checks: u32,
}

impl<'a> Modelled<'a> {
    fn new(site: &'a Site, qemu: Qemu, image: Vec<u8>, seed: u64) -> Self {
        let disk = site.disk(qemu.vm(), "");
        // Requests of any length, at any byte.
        let load = Load::new(seed, DISK_BYTES, 1, site.directory());
        Self { site, qemu, disk, load, image, checks: 0 }
    }

    fn write(&mut self, count: usize) {
        let mut commands = Vec::new();
        while commands.len() < count {
            let request = self.load.next_request();
            // A discard is a hint, and a new overlay does not take it; what the guest then reads is not defined.
            if !matches!(request, Request::Discard { .. }) {
                self.load.apply(&mut self.image, &request);
                commands.push(self.load.command(&request));
            }
        }
        self.qemu.io(&commands);
    }

    /// Restores the present moment and compares it with what the guest expects.
    fn check(&mut self, what: &str) -> u64 {
        self.checks += 1;
        let lsn = self.site.bookmark(&self.disk, &format!("check {}", self.checks));
        self.compare(lsn, what);
        lsn
    }

    fn compare(&self, lsn: u64, what: &str) {
        let restored = self.site.restore(&self.disk, &PointSpec::Lsn(lsn), Via::Server);
        assert_eq!(restored.len(), self.image.len(), "{what}: size");
        let differs = restored.iter().zip(&self.image).position(|(a, b)| a != b);
        assert_eq!(differs, None, "{what}: first differing byte");
    }
}

#[test]
fn a_raw_image_is_restored() {
    let site = Site::start();
    let path = site.directory().join("disk.raw");
    File::create(&path).expect("image").set_len(DISK_BYTES).expect("size");
    let qemu = Qemu::storage_daemon(&site, "raw", &[format_node("raw", &path)], "disk");
    let mut disk = Modelled::new(&site, qemu, vec![0; DISK_BYTES as usize], 20);
    disk.write(50);
    site.protect(&disk.disk);
    disk.write(50);
    disk.check("raw");
}

#[test]
fn a_qcow2_image_is_restored() {
    let site = Site::start();
    let path = site.directory().join("disk.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", path_text(&path), "8M"]);
    let qemu = Qemu::system(&site, "qcow2", &[format_node("qcow2", &path)], "disk");
    let mut disk = Modelled::new(&site, qemu, vec![0; DISK_BYTES as usize], 21);
    disk.write(50);
    site.protect(&disk.disk);
    disk.write(50);
    disk.check("qcow2");
}

#[test]
fn a_qcow2_image_with_a_backing_file_is_restored_whole() {
    let site = Site::start();
    let (base, path) = (site.directory().join("base.raw"), site.directory().join("disk.qcow2"));
    let contents = cdp_tests::random::Random::of(22).bytes(DISK_BYTES as usize);
    fs::write(&base, &contents).expect("base");
    qemu_img(&["create", "-q", "-f", "qcow2", "-F", "raw", "-b", path_text(&base), path_text(&path)]);
    let qemu = Qemu::storage_daemon(&site, "backed", &[format_node("qcow2", &path)], "disk");
    let mut disk = Modelled::new(&site, qemu, contents, 22);
    disk.write(30);
    site.protect(&disk.disk);
    disk.write(30);
    disk.check("what the backing file holds and what was written over it");
}

#[test]
fn a_disk_that_stores_nothing_has_the_right_records() {
    let site = Site::start();
    let node = json!({"driver": "null-co", "node-name": "disk", "size": DISK_BYTES, "read-zeroes": true});
    let qemu = Qemu::storage_daemon(&site, "null", &[node], "disk");
    let mut disk = Modelled::new(&site, qemu, vec![0; DISK_BYTES as usize], 23);
    site.protect(&disk.disk);
    disk.write(60);
    disk.check("what was written to null-co");
}

#[test]
fn snapshot_and_commit_are_followed() {
    let site = Site::start();
    let path = site.directory().join("disk.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", path_text(&path), "8M"]);
    let qemu = Qemu::system(&site, "snapshot", &[format_node("qcow2", &path)], "disk");
    let mut disk = Modelled::new(&site, qemu, vec![0; DISK_BYTES as usize], 24);
    site.protect(&disk.disk);
    disk.write(30);
    let before = disk.check("before the snapshot");

    let overlay = site.directory().join("overlay.qcow2");
    let snapshot = json!({
        "node-name": "disk", "snapshot-file": overlay, "snapshot-node-name": "overlay", "format": "qcow2",
    });
    disk.qemu.qmp.run("blockdev-snapshot-sync", snapshot);
    disk.write(30);
    disk.check("on the overlay");

    disk.qemu.qmp.run("block-commit", json!({"job-id": "commit", "device": "overlay"}));
    disk.qemu.qmp.event("BLOCK_JOB_READY");
    disk.write(10);
    disk.qemu.qmp.run("block-job-complete", json!({"device": "commit"}));
    let done = disk.qemu.qmp.event("BLOCK_JOB_COMPLETED");
    assert!(done["data"].get("error").is_none(), "{done}");
    disk.write(30);
    disk.check("after the commit");

    let gaps = site.points(&disk.disk).gaps;
    assert!(gaps.iter().all(|gap| gap.from_lsn < before), "management made a gap: {gaps:?}");
}

#[test]
fn a_disk_is_restored_with_the_size_it_had() {
    let site = Site::start();
    let path = site.directory().join("disk.raw");
    File::create(&path).expect("image").set_len(DISK_BYTES).expect("size");
    let qemu = Qemu::system(&site, "resized", &[format_node("raw", &path)], "disk");
    let mut disk = Modelled::new(&site, qemu, vec![0; DISK_BYTES as usize], 25);
    site.protect(&disk.disk);
    disk.write(20);
    let small = disk.check("before it grew");
    let small_image = disk.image.clone();

    disk.qemu.qmp.run("block_resize", json!({"node-name": "disk", "size": 2 * DISK_BYTES}));
    disk.image.resize(2 * DISK_BYTES as usize, 0);
    // What is behind the old end is read back, in a gap; until it ends no bookmark is taken.
    wait_for("the new part to be read", || site.client().create_bookmark(&disk.disk, "grown", None).ok());
    let end = 2 * DISK_BYTES as usize;
    disk.qemu.io(&[format!("write -P 77 {} 64k", end - (64 << 10))]);
    disk.image[end - (64 << 10)..].fill(77);
    disk.write(20);
    disk.check("after it grew");

    disk.image = small_image;
    disk.compare(small, "before it grew, looking back");
}
