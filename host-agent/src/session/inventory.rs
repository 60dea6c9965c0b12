//! Which VMs and disks are on this host, and who may use a disk's id.

use std::collections::BTreeMap;

use journal_format::{DiskId, wire};

use super::FilterId;
use crate::identity::{HostId, disk_id};

/// What a filter says of its process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VmInfo {
    /// Process id, checked against the socket's peer.
    pub pid: u32,
    /// Program name.
    pub program: String,
    /// Version text of the running QEMU.
    pub qemu_version: String,
    /// Name of the VM; empty where QEMU has none.
    pub name: String,
    /// UUID of the VM; zeroes where QEMU has none.
    pub uuid: [u8; 16],
    /// Why this QEMU cannot be protected, or empty.
    pub refused: String,
}

impl VmInfo {
    /// The VM's name, or one made of program and process.
    #[must_use]
    pub fn display_name(&self) -> String {
        if self.name.is_empty() { format!("{}-{}", self.program, self.pid) } else { self.name.clone() }
    }
}

/// What a filter says of one disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskInfo {
    /// Device id.
    pub device: String,
    /// Node below it.
    pub node: String,
    /// The node's driver.
    pub driver: String,
    /// Size in bytes.
    pub disk_bytes: u64,
    /// Whether the guest cannot write to it.
    pub read_only: bool,
    /// Why it cannot be protected, or empty.
    pub refused: String,
}

/// Where a disk is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) filter: FilterId,
    pub(super) device: String,
    pub(super) disk_bytes: u64,
    pub(super) refused: String,
}

#[derive(Debug)]
struct Vm {
    info: VmInfo,
    disks: Vec<(DiskId, DiskInfo)>,
}

/// The filters that are connected, with what they said.
#[derive(Debug)]
pub(super) struct Inventory {
    host: HostId,
    vms: BTreeMap<FilterId, Vm>,
}

impl Inventory {
    pub(super) fn new(host: HostId) -> Self {
        Self { host, vms: BTreeMap::new() }
    }

    pub(super) fn add(&mut self, filter: FilterId, info: VmInfo) {
        self.vms.insert(filter, Vm { info, disks: Vec::new() });
    }

    pub(super) fn remove(&mut self, filter: FilterId) {
        self.vms.remove(&filter);
    }

    /// Replaces a filter's disks; `false` when that filter is not known.
    pub(super) fn set_disks(&mut self, filter: FilterId, disks: Vec<DiskInfo>) -> bool {
        let Some(vm) = self.vms.get_mut(&filter) else { return false };
        let name = vm.info.display_name();
        let id = |disk: &DiskInfo| disk_id(&self.host, &vm.info.uuid, &name, &disk.device);
        vm.disks = disks.into_iter().map(|disk| (id(&disk), disk)).collect();
        true
    }

    pub(super) fn pid(&self, filter: FilterId) -> Option<u32> {
        self.vms.get(&filter).map(|vm| vm.info.pid)
    }

    /// The id that a device of that filter has, listed or not.
    pub(super) fn id_for(&self, filter: FilterId, device: &str) -> Option<DiskId> {
        let vm = self.vms.get(&filter)?;
        Some(disk_id(&self.host, &vm.info.uuid, &vm.info.display_name(), device))
    }

    pub(super) fn disk_of(&self, filter: FilterId, device: &str) -> Option<DiskId> {
        let vm = self.vms.get(&filter)?;
        vm.disks.iter().find(|(_, disk)| disk.device == device).map(|(id, _)| *id)
    }

    /// The first that claimed each id has it: filters are numbered as they connect.
    pub(super) fn find(&self, wanted: DiskId) -> Option<Place> {
        let all =
            self.vms.iter().flat_map(|(filter, vm)| vm.disks.iter().map(move |disk| (filter, vm, disk)));
        let (filter, vm, (_, disk)) = all.into_iter().find(|(_, _, (id, _))| *id == wanted)?;
        let refused = [&vm.info.refused, &disk.refused].into_iter().find(|text| !text.is_empty());
        Some(Place {
            filter: *filter,
            device: disk.device.clone(),
            disk_bytes: disk.disk_bytes,
            refused: refused.cloned().unwrap_or_default(),
        })
    }

    /// Which filters claim a disk that another one claimed first, and what to do about it.
    pub(super) fn rivals(&self) -> BTreeMap<(DiskId, FilterId), String> {
        let mut owners: BTreeMap<DiskId, FilterId> = BTreeMap::new();
        let mut rivals = BTreeMap::new();
        for (filter, vm) in &self.vms {
            for (id, _) in &vm.disks {
                let owner = *owners.entry(*id).or_insert(*filter);
                if let Some(owner) = self.vms.get(&owner).filter(|_| owner != *filter) {
                    rivals.insert((*id, *filter), taken(&owner.info.display_name(), owner.info.pid));
                }
            }
        }
        rivals
    }

    /// Everything, for the server. A disk whose id somebody else claimed first is listed with the reason.
    pub(super) fn to_wire(&self) -> wire::Inventory {
        let rivals = self.rivals();
        let mut vms = Vec::with_capacity(self.vms.len());
        for (filter, vm) in &self.vms {
            let (name, pid) = (vm.info.display_name(), vm.info.pid);
            let mut disks = Vec::with_capacity(vm.disks.len());
            for (id, disk) in &vm.disks {
                let mut listed = wire_disk(*id, disk);
                if let Some(why) = rivals.get(&(*id, *filter)) {
                    listed.refused.clone_from(why);
                }
                disks.push(listed);
            }
            let uuid = if vm.info.uuid == [0; 16] { Vec::new() } else { vm.info.uuid.to_vec() };
            let (qemu_version, refused) = (vm.info.qemu_version.clone(), vm.info.refused.clone());
            vms.push(wire::Vm { uuid, name, pid, qemu_version, disks, refused });
        }
        wire::Inventory { vms }
    }
}

fn taken(vm: &str, pid: u32) -> String {
    format!(
        "process {pid} (VM {vm}) already has this disk: same VM UUID or name, same device; give the VM its own UUID"
    )
}

fn wire_disk(id: DiskId, disk: &DiskInfo) -> wire::Disk {
    wire::Disk {
        disk: id.0.to_vec(),
        device: disk.device.clone(),
        node: disk.node.clone(),
        driver: disk.driver.clone(),
        disk_bytes: disk.disk_bytes,
        read_only: disk.read_only,
        refused: disk.refused.clone(),
    }
}
