//! Texts within the limits of the control socket.

use capture_ring::control::{DiskInfo, Hello, PROTOCOL_VERSION, text};

use super::Identity;

/// The first at most `limit` bytes of a text, cut between characters.
pub(super) fn cut(text: &str, limit: usize) -> String {
    text[..text.floor_char_boundary(limit)].to_owned()
}

/// A name within `limit`. One that is longer keeps its beginning and gets a mark of all of it, so that it is seen to be cut,
/// and two that differ stay two: the ids of disks are made from them.
fn named(name: &str, limit: usize) -> String {
    if name.len() <= limit {
        return name.to_owned();
    }
    // FNV-1a (http://www.isthe.com/chongo/tech/comp/fnv/): the same in every release, as the ids have to be.
    let mark = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    let mark = format!("~{mark:016x}");
    cut(name, limit.saturating_sub(mark.len())) + &mark
}

pub(super) fn hello(identity: &Identity) -> Hello {
    Hello {
        protocol: PROTOCOL_VERSION,
        pid: std::process::id(),
        program: cut(&identity.program, text::PROGRAM),
        qemu_version: cut(&identity.qemu_version, text::QEMU_VERSION),
        vm_name: named(&identity.vm_name, text::VM_NAME),
        vm_uuid: identity.vm_uuid,
        refused: cut(&identity.refused, text::REFUSED),
    }
}

/// The disks as they are told to the agent. One whose device name is too long to be named in a command is refused.
pub(super) fn told(disks: &[DiskInfo]) -> Vec<DiskInfo> {
    let told = |disk: &DiskInfo| DiskInfo {
        device: named(&disk.device, text::DEVICE),
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
    fn names_that_are_too_long_are_marked_and_stay_different() {
        let name = |end: &str| named(&("é".repeat(100) + end), text::VM_NAME);
        assert_eq!(named(&"v".repeat(text::VM_NAME), text::VM_NAME), "v".repeat(text::VM_NAME));
        assert_eq!(name("a"), name("a"));
        assert_ne!(name("a"), name("b"), "two machines would be one");
        assert!(name("a").len() <= text::VM_NAME && name("a").contains('~'), "{}", name("a"));
        // Ids are made from it: it must be the same for ever.
        assert_eq!(named("abcdefghijklmnopqrst", 18), "a~540532bba32d3e4d");
    }

    #[test]
    fn a_device_that_cannot_be_named_is_refused() {
        let disk = DiskInfo { device: "d".repeat(text::DEVICE + 1), ..DiskInfo::default() };
        assert!(told(&[disk])[0].refused.contains("shorter id"));
    }
}
