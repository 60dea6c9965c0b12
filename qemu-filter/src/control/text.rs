//! Texts within the limits of the control socket.

use capture_ring::control::{DiskInfo, Hello, PROTOCOL_VERSION, text};

use super::Identity;

/// The first at most `limit` bytes of a text, cut between characters.
pub(super) fn cut(text: &str, limit: usize) -> String {
    text[..text.floor_char_boundary(limit)].to_owned()
}

pub(super) fn hello(identity: &Identity) -> Hello {
    Hello {
        protocol: PROTOCOL_VERSION,
        pid: std::process::id(),
        program: cut(&identity.program, text::PROGRAM),
        qemu_version: cut(&identity.qemu_version, text::QEMU_VERSION),
        vm_name: cut(&identity.vm_name, text::VM_NAME),
        vm_uuid: identity.vm_uuid,
        refused: cut(&identity.refused, text::REFUSED),
    }
}

/// The disks as they are told to the agent. One whose device name is too long to be named in a command is refused.
pub(super) fn told(disks: &[DiskInfo]) -> Vec<DiskInfo> {
    let told = |disk: &DiskInfo| DiskInfo {
        device: cut(&disk.device, text::DEVICE),
        node: cut(&disk.node, text::NODE),
        driver: cut(&disk.driver, text::DRIVER),
        disk_bytes: disk.disk_bytes,
        read_only: disk.read_only,
        refused: if disk.device.len() > text::DEVICE {
            format!("the device's name is longer than {} bytes; give it a shorter id", text::DEVICE)
        } else {
            cut(&disk.refused, text::REFUSED)
        },
    };
    disks.iter().map(told).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_cut_between_characters() {
        assert_eq!(cut("abc", 5), "abc");
        assert_eq!(cut("aé", 2), "a");
        assert_eq!(cut("aéb", 3), "aé");
    }

    #[test]
    fn a_device_that_cannot_be_named_is_refused() {
        let disk = DiskInfo { device: "d".repeat(text::DEVICE + 1), ..DiskInfo::default() };
        assert!(told(&[disk])[0].refused.contains("shorter id"));
    }
}
