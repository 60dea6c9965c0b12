//! Who a host and a disk are: ids that survive restarts of agent, VM and host.

use std::path::Path;

use journal_format::DiskId;

use crate::error::AgentError;

/// 16 bytes that name a host for ever.
pub type HostId = [u8; 16];

/// Turns 16 bytes of a hash into a UUID of version 8 (RFC 9562, "custom").
fn uuid_v8(hash: &blake3::Hash) -> [u8; 16] {
    let mut id = [0_u8; 16];
    for (to, from) in id.iter_mut().zip(hash.as_bytes()) {
        *to = *from;
    }
    id[6] = (id[6] & 0x0f) | 0x80;
    id[8] = (id[8] & 0x3f) | 0x80;
    id
}

fn hash_field(hasher: &mut blake3::Hasher, field: &[u8]) {
    // The length in front keeps ("ab", "c") and ("a", "bc") apart.
    hasher.update(&(field.len() as u64).to_le_bytes());
    hasher.update(field);
}

/// The id of a disk: from its VM's UUID and device, or, where QEMU was given no UUID, from host, VM name and device.
///
/// The same VM on another host (after a migration) keeps its ids as long as it has a UUID.
#[must_use]
pub fn disk_id(host: &HostId, vm_uuid: &[u8; 16], vm_name: &str, device: &str) -> DiskId {
    let mut hasher = blake3::Hasher::new_derive_key("qemu-cdp disk id v1");
    if *vm_uuid == [0; 16] {
        hash_field(&mut hasher, b"host+name");
        hash_field(&mut hasher, host);
        hash_field(&mut hasher, vm_name.as_bytes());
    } else {
        hash_field(&mut hasher, b"uuid");
        hash_field(&mut hasher, vm_uuid);
    }
    hash_field(&mut hasher, device.as_bytes());
    DiskId(uuid_v8(&hasher.finalize()))
}

/// Where a host's machine id is (machine-id(5)).
pub const MACHINE_ID: &str = "/etc/machine-id";

/// Reads the machine id: 32 hexadecimal digits, in the named file or in [`MACHINE_ID`]. Where no file was named and that one
/// has none, the id is derived from the host's name, which is as stable as the name is; the log says so.
///
/// # Errors
/// [`AgentError::Config`] when a file was named that cannot be read or has none, or holds something else.
pub fn host_id(named: Option<&Path>, host_name: &str) -> Result<HostId, AgentError> {
    host_id_from(named, Path::new(MACHINE_ID), host_name)
}

fn host_id_from(named: Option<&Path>, default: &Path, host_name: &str) -> Result<HostId, AgentError> {
    let path = named.unwrap_or(default);
    let bad = |detail: String| AgentError::Config { setting: "machine_id", detail };
    let hint =
        "name a file that holds 32 hexadecimal digits (systemd-machine-id-setup makes one), or leave it out";
    let text = match (std::fs::read_to_string(path), named) {
        (Ok(text), _) => text,
        (Err(error), Some(_)) => {
            return Err(bad(format!("cannot read {}: {error}; {hint}", path.display())));
        }
        (Err(_), None) => String::new(),
    };
    let text = text.trim();
    // Images that have never booted have an empty file, or this word in it (machine-id(5)).
    if text.is_empty() || text == "uninitialized" {
        if named.is_some() {
            return Err(bad(format!("{} holds no machine id yet; {hint}", path.display())));
        }
        tracing::warn!(
            host_name,
            "this host has no machine id: it is known by its name, and another one with that name would be taken for it; \
             run systemd-machine-id-setup"
        );
        let mut hasher = blake3::Hasher::new_derive_key("qemu-cdp host id v1");
        hash_field(&mut hasher, host_name.as_bytes());
        return Ok(uuid_v8(&hasher.finalize()));
    }
    let number = u128::from_str_radix(text, 16).ok().filter(|_| text.len() == 32);
    number
        .map(u128::to_be_bytes)
        .ok_or_else(|| bad(format!("{} does not hold 32 hexadecimal digits; {hint}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: HostId = [1; 16];

    #[test]
    fn disk_ids_differ_by_vm_device_and_host_and_repeat() {
        let base = disk_id(&HOST, &[7; 16], "vm", "virtio0");
        assert_eq!(base, disk_id(&[2; 16], &[7; 16], "other name", "virtio0"), "a UUID alone names the VM");
        assert_ne!(base, disk_id(&HOST, &[8; 16], "vm", "virtio0"));
        assert_ne!(base, disk_id(&HOST, &[7; 16], "vm", "virtio1"));
        let nameless = disk_id(&HOST, &[0; 16], "vm", "virtio0");
        assert_ne!(nameless, disk_id(&[2; 16], &[0; 16], "vm", "virtio0"));
        assert_ne!(nameless, disk_id(&HOST, &[0; 16], "vmv", "irtio0"));
    }

    #[test]
    fn disk_ids_are_uuids_of_version_8() {
        let text = disk_id(&HOST, &[7; 16], "vm", "virtio0").to_string();
        assert_eq!(text.as_bytes()[14], b'8');
        assert!(matches!(text.as_bytes()[19], b'8' | b'9' | b'a' | b'b'));
    }

    #[test]
    fn host_id_is_the_machine_id_or_comes_from_the_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("machine-id");
        let from_name = host_id_from(None, &path, "alpha").unwrap();
        assert_eq!(from_name, host_id_from(None, &path, "alpha").unwrap());
        assert_ne!(from_name, host_id_from(None, &path, "beta").unwrap());
        assert!(host_id_from(Some(&path), &path, "alpha").is_err(), "a file that was named is not there");
        std::fs::write(&path, "000102030405060708090a0b0c0d0e0f\n").unwrap();
        for named in [None, Some(path.as_path())] {
            let id = host_id_from(named, &path, "alpha").unwrap();
            assert_eq!(id, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
        }
        for unset in ["", "uninitialized\n"] {
            std::fs::write(&path, unset).unwrap();
            assert_eq!(host_id_from(None, &path, "alpha").unwrap(), from_name);
            assert!(host_id_from(Some(&path), &path, "alpha").is_err(), "a file that was named has none");
        }
        std::fs::write(&path, "0001\n").unwrap();
        assert!(host_id_from(None, &path, "alpha").is_err());
    }
}
