//! What agents report, after checking: ids of the right length, names that fit, nothing without end.

use core::fmt;
use std::collections::HashMap;

use journal_format::DiskId;
use journal_format::limits::MAX_DISK_BYTES;
use journal_format::wire;

use crate::limits::{MAX_CLAIMS, MAX_HOST_DISKS, MAX_NAME_BYTES, MAX_REASON_BYTES};

/// Identity of a host: its machine id.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct HostId(pub [u8; 16]);

impl fmt::Debug for HostId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// What one agent reports of its host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostReport {
    /// The host.
    pub id: HostId,
    /// Its name, for people.
    pub name: String,
    /// The agent's version, for people.
    pub agent_version: String,
    /// The VMs that run there with the filter loaded.
    pub vms: Vec<VmReport>,
}

/// One running VM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VmReport {
    /// Its UUID, where it has one.
    pub uuid: Option<[u8; 16]>,
    /// Its name.
    pub name: String,
    /// Process id on the host.
    pub pid: u32,
    /// Version text of its QEMU.
    pub qemu_version: String,
    /// Why this QEMU cannot be protected; empty when it can.
    pub refused: String,
    /// Its disks.
    pub disks: Vec<DiskReport>,
}

/// One disk of a running VM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskReport {
    /// Its id.
    pub id: DiskId,
    /// Device in the VM.
    pub device: String,
    /// Node below the device.
    pub node: String,
    /// The node's driver.
    pub driver: String,
    /// Size in bytes.
    pub disk_bytes: u64,
    /// Whether the guest can only read it.
    pub read_only: bool,
    /// Why this disk cannot be protected; empty when it can.
    pub refused: String,
}

impl HostReport {
    /// Takes an inventory over. Disks without a proper id or device, those over the limit, and those that too many VMs
    /// of the host claim, are left out; how many, is the second value.
    #[must_use]
    pub fn from_wire(id: HostId, hello: &wire::Hello, inventory: wire::Inventory) -> (Self, usize) {
        let (mut kept, mut dropped) = (0, 0);
        let mut claims: HashMap<DiskId, usize> = HashMap::new();
        let mut vms = Vec::new();
        for vm in inventory.vms {
            let mut disks = Vec::new();
            for disk in vm.disks {
                let disk = disk_from_wire(disk).filter(|disk| {
                    let claims = claims.get(&disk.id).copied().unwrap_or_default();
                    kept < MAX_HOST_DISKS && claims < MAX_CLAIMS && !vm.name.is_empty()
                });
                match disk {
                    Some(disk) => {
                        kept += 1;
                        *claims.entry(disk.id).or_default() += 1;
                        disks.push(disk);
                    }
                    None => dropped += 1,
                }
            }
            if !disks.is_empty() {
                vms.push(VmReport {
                    uuid: vm.uuid.try_into().ok(),
                    name: cut(vm.name, MAX_NAME_BYTES),
                    pid: vm.pid,
                    qemu_version: cut(vm.qemu_version, MAX_NAME_BYTES),
                    refused: cut(vm.refused, MAX_REASON_BYTES),
                    disks,
                });
            }
        }
        let name = cut(hello.host_name.clone(), MAX_NAME_BYTES);
        let agent_version = cut(hello.agent_version.clone(), MAX_NAME_BYTES);
        (Self { id, name, agent_version, vms }, dropped)
    }
}

fn disk_from_wire(disk: wire::Disk) -> Option<DiskReport> {
    let id = wire::disk_id(&disk.disk).ok()?;
    (!disk.device.is_empty() && disk.disk_bytes <= MAX_DISK_BYTES).then(|| DiskReport {
        id,
        device: cut(disk.device, MAX_NAME_BYTES),
        node: cut(disk.node, MAX_NAME_BYTES),
        driver: cut(disk.driver, MAX_NAME_BYTES),
        disk_bytes: disk.disk_bytes,
        read_only: disk.read_only,
        refused: cut(disk.refused, MAX_REASON_BYTES),
    })
}

/// At most `most` bytes of the text, cut between characters, with control characters made visible: these texts end in
/// logs and on terminals.
pub(crate) fn cut(text: String, most: usize) -> String {
    let clean = if text.chars().any(char::is_control) {
        text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
    } else {
        text
    };
    let mut end = clean.len().min(most);
    while !clean.is_char_boundary(end) {
        end -= 1;
    }
    clean.get(..end).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(id_bytes: usize, device: &str) -> wire::Disk {
        wire::Disk { disk: vec![1; id_bytes], device: device.to_owned(), ..wire::Disk::default() }
    }

    #[test]
    fn what_is_malformed_is_left_out_and_counted() {
        let vm = wire::Vm {
            name: "vm".to_owned(),
            disks: vec![disk(16, "disk0"), disk(15, "disk1"), disk(16, "")],
            ..wire::Vm::default()
        };
        let nameless = wire::Vm { disks: vec![disk(16, "disk0")], ..wire::Vm::default() };
        let inventory = wire::Inventory { vms: vec![vm, nameless] };
        let (report, dropped) = HostReport::from_wire(HostId::default(), &wire::Hello::default(), inventory);
        assert_eq!((report.vms.len(), report.vms[0].disks.len(), dropped), (1, 1, 3));
    }

    #[test]
    fn an_endless_host_is_cut() {
        let own = |n: usize| wire::Disk { disk: (n as u128).to_le_bytes().to_vec(), ..disk(16, "d") };
        let disks = (0..MAX_HOST_DISKS + 5).map(own).collect();
        let vm = wire::Vm { name: "vm".to_owned(), disks, ..wire::Vm::default() };
        let (_, dropped) = HostReport::from_wire(
            HostId::default(),
            &wire::Hello::default(),
            wire::Inventory { vms: vec![vm] },
        );
        assert_eq!(dropped, 5);
    }

    #[test]
    fn a_disk_that_very_many_vms_of_a_host_claim_is_cut() {
        let vm =
            |pid| wire::Vm { name: "vm".to_owned(), pid, disks: vec![disk(16, "d")], ..wire::Vm::default() };
        let inventory = wire::Inventory { vms: (0..MAX_CLAIMS as u32 + 3).map(vm).collect() };
        let (report, dropped) = HostReport::from_wire(HostId::default(), &wire::Hello::default(), inventory);
        assert_eq!((report.vms.len(), dropped), (MAX_CLAIMS, 3));
    }

    #[test]
    fn a_name_is_cut_between_characters_and_carries_no_control_codes() {
        assert_eq!(cut("aé".to_owned(), 2), "a");
        assert_eq!(cut("a\u{1b}[2J".to_owned(), 9), "a\u{fffd}[2J");
    }
}
