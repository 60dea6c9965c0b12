//! `name.json` in a disk's directory of the store: whose disk it is, for a restore without the server.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use journal_format::DiskId;
use serde::Serialize;

use crate::catalog::DiskRow;

#[derive(Serialize)]
struct Name<'a> {
    vm: &'a str,
    device: &'a str,
    host: &'a str,
    vm_uuid: Option<String>,
}

/// Writes the file if the disk has a directory, a name, and the file says something else. Atomic: a reader finds the
/// old or the new one.
///
/// # Errors
/// What the system says; the caller logs it and goes on, because only the convenience of names depends on it.
pub(crate) fn write(store: &Path, disk: &DiskRow) -> io::Result<()> {
    let dir = store.join("disks").join(disk.id.to_string());
    if disk.vm.is_empty() || !dir.is_dir() {
        return Ok(());
    }
    // A UUID's text form is the same for VMs and disks.
    let vm_uuid = disk.vm_uuid.map(|uuid| DiskId(uuid).to_string());
    let name = Name { vm: &disk.vm, device: &disk.device, host: &disk.host_name, vm_uuid };
    let text = serde_json::to_vec_pretty(&name)?;
    let path = dir.join("name.json");
    if fs::read(&path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    let fresh = dir.join("name.json.new");
    let mut file = File::create(&fresh)?;
    file.write_all(&text)?;
    file.sync_all()?;
    fs::rename(&fresh, &path)?;
    File::open(&dir)?.sync_all()
}
