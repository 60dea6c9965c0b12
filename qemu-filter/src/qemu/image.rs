//! What a disk's image looks like from outside: whether anybody may have written to it while nobody looked.
//!
//! A VM that was stopped in good order and starts again need not have its disk read, if the image is as it was left. The
//! kernel knows: every write to a file sets its time of change (ctime), which nobody can set back. So the *tag* of an image
//! is made of the host's boot, the disk's size, and of each file of its chain: format, device, inode, size, and both times.
//! `docs/decisions/0011-a-close-names-its-image.md` has the argument.
//!
//! Only what is certain has a tag: chains of `raw`, `qcow2` and `file` nodes on regular files of local file systems.
//! For everything else (a block device, a network image, an external data file) there is none, and the disk is compared
//! with the journal, as after a crash.

use std::ffi::c_int;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::mem::MaybeUninit;
use std::thread;
use std::time::Duration;

use journal_format::ImageTag;

use super::Glue;
use super::devices;
use super::layout::{RAW_STATE_FD, STATE_OPAQUE, STATE_OPEN_FLAGS};
use super::types::{BdrvChild, BlockBackend, BlockDriverState};
use super::version::c_text;

/// `BDRV_O_INACTIVE`: the image belongs to another QEMU now (migration).
const OPEN_INACTIVE: c_int = 0x0800;
/// Most nodes of a chain that are followed.
const MAX_NODES: usize = 512;
/// The kernel takes times of change from a clock that advances with its tick, 1 to 10 ms: two changes within a tick look
/// like one. A time that is older than this will not be given to a later change.
const SETTLED_NS: i128 = 25_000_000;
/// How often a tag that is too young is made again.
const TRIES: u32 = 3;
/// Direct I/O wants buffers and lengths that are multiples of this.
const PAGE: usize = 4096;
/// First bytes of a qcow2 file.
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";
/// Bit of `incompatible_features` (the big-endian number at byte 72 of a qcow2 header of version 3): the data is in another
/// file.
const QCOW2_DATA_FILE: u64 = 1 << 2;

/// File systems that are this host's alone and keep times of change: ext2 to ext4, XFS, Btrfs, tmpfs, F2FS, ZFS, overlayfs
/// (`linux/magic.h`).
const LOCAL_FILE_SYSTEMS: [i64; 7] =
    [0xEF53, 0x5846_5342, 0x9123_683E, 0x0102_1994, 0xF2F5_2010, 0x2FC1_2FC1, 0x794C_7630];

/// What the tag is made of.
#[derive(Hash, PartialEq, Eq, Clone, Debug)]
struct Evidence {
    boot: String,
    disk_bytes: u64,
    files: Vec<FileState>,
}

#[derive(Hash, PartialEq, Eq, Clone, Debug)]
struct FileState {
    format: String,
    device: u64,
    inode: u64,
    bytes: i64,
    modified: (i64, i64),
    changed: (i64, i64),
}

/// The tag of a device's image. To be compared with an older one while the device is drained, in the main thread.
pub(super) fn tag(glue: &Glue, blk: *mut BlockBackend) -> Option<ImageTag> {
    evidence(glue, blk).map(|evidence| tag_of(&evidence))
}

/// The tag of a device's image that nobody writes to any more, waiting until later changes can be told from it. Main thread;
/// sleeps at most [`SETTLED_NS`] a few times, and not at all for a disk that was idle.
pub(super) fn settled_tag(glue: &Glue, blk: *mut BlockBackend) -> Option<ImageTag> {
    for _ in 0..TRIES {
        // The order matters: what is written after this moment has a greater time of change than any that has settled.
        let now = coarse_now()?;
        let evidence = evidence(glue, blk)?;
        if evidence.files.iter().all(|file| is_settled(file.changed, now)) {
            return Some(tag_of(&evidence));
        }
        thread::sleep(Duration::from_nanos(SETTLED_NS as u64));
    }
    None
}

fn is_settled(changed: (i64, i64), now: (i64, i64)) -> bool {
    let ns = |(seconds, ns): (i64, i64)| i128::from(seconds) * 1_000_000_000 + i128::from(ns);
    ns(changed) + SETTLED_NS <= ns(now)
}

fn tag_of(evidence: &Evidence) -> ImageTag {
    // Against accidents, not against enemies: who can choose a file's times can write to it.
    let half = |seed: u64| {
        let mut hasher = DefaultHasher::new();
        (seed, evidence).hash(&mut hasher);
        hasher.finish()
    };
    ImageTag::from_halves([half(1), half(2)])
}

/// `CLOCK_REALTIME_COARSE`, from which the kernel takes times of change.
fn coarse_now() -> Option<(i64, i64)> {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the place outlives the call.
    let failed = unsafe { libc::clock_gettime(libc::CLOCK_REALTIME_COARSE, &raw mut now) };
    (failed == 0).then_some((now.tv_sec, now.tv_nsec))
}

fn evidence(glue: &Glue, blk: *mut BlockBackend) -> Option<Evidence> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let disk_bytes = devices::size(glue, blk)?;
    let mut files = Vec::new();
    let mut next = Some(devices::top_node(glue, blk));
    while let Some(node) = next {
        if node.is_null() || files.len() >= MAX_NODES || open_flags(node) & OPEN_INACTIVE != 0 {
            return None;
        }
        let format = format_of(glue, node)?;
        let file = if format == "file" { node } else { child(glue.symbols.bdrv_primary_child?, node)? };
        if format_of(glue, file)? != "file" {
            return None;
        }
        let fd = fd_of(file)?;
        let state = file_state(fd, format)?;
        match state.format.as_str() {
            "file" => {}
            // With an offset or a size of its own it shows a part of the file, which the file does not tell.
            "raw" if shows_all(glue, node, state.bytes) => {}
            "qcow2" if is_whole_qcow2(fd) => {}
            _ => return None,
        }
        files.push(state);
        next = child(glue.symbols.bdrv_cow_child?, node);
    }
    Some(Evidence { boot, disk_bytes, files })
}

fn format_of(glue: &Glue, node: *mut BlockDriverState) -> Option<String> {
    // SAFETY: a live node, in the main thread; the text is its driver's.
    c_text(unsafe { (glue.symbols.bdrv_get_format_name)(node) })
}

/// The node below an edge that `which` finds.
pub(super) fn child(
    which: unsafe extern "C" fn(*mut BlockDriverState) -> *mut BdrvChild,
    node: *mut BlockDriverState,
) -> Option<*mut BlockDriverState> {
    // SAFETY: a live node, whose edges nobody changes now.
    let edge = unsafe { which(node) };
    if edge.is_null() {
        return None;
    }
    // SAFETY: `bs` is the first field of an edge in every release that has a table.
    let below = unsafe { edge.cast::<*mut BlockDriverState>().read() };
    (!below.is_null()).then_some(below)
}

fn shows_all(glue: &Glue, node: *mut BlockDriverState, file_bytes: i64) -> bool {
    let Some(length) = glue.symbols.bdrv_getlength else { return false };
    // SAFETY: a live node, in the main thread. (Of a regular file; nothing runs the main loop.)
    let shown = unsafe { length(node) };
    // QEMU counts in sectors.
    u64::try_from(file_bytes).is_ok_and(|bytes| i64::try_from(bytes.next_multiple_of(512)) == Ok(shown))
}

fn open_flags(node: *mut BlockDriverState) -> c_int {
    // SAFETY: `open_flags` is at this offset in every release that has a table.
    let field = unsafe { node.cast::<u8>().add(STATE_OPEN_FLAGS) };
    // SAFETY: as above, of a live node, aligned.
    unsafe { field.cast::<c_int>().read() }
}

/// The descriptor of a `file` node.
fn fd_of(node: *mut BlockDriverState) -> Option<c_int> {
    // SAFETY: `opaque` is at this offset in every release that has a table.
    let field = unsafe { node.cast::<u8>().add(STATE_OPAQUE) };
    // SAFETY: as above, of a live node, aligned.
    let opaque = unsafe { field.cast::<*mut u8>().read() };
    if opaque.is_null() {
        return None;
    }
    // SAFETY: the private state of a `file` node, a `BDRVRawState`, whose `fd` is at this offset in those releases.
    let field = unsafe { opaque.add(RAW_STATE_FD) };
    // SAFETY: as above, aligned.
    let fd = unsafe { field.cast::<c_int>().read() };
    (fd >= 0).then_some(fd)
}

fn file_state(fd: c_int, format: String) -> Option<FileState> {
    let mut system = MaybeUninit::<libc::statfs>::uninit();
    let mut stat = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: the place outlives the call; a descriptor that is none is refused by the kernel.
    if unsafe { libc::fstatfs(fd, system.as_mut_ptr()) } != 0 {
        return None;
    }
    // SAFETY: as above.
    if unsafe { libc::fstat(fd, stat.as_mut_ptr()) } != 0 {
        return None;
    }
    // SAFETY: filled in by the call.
    let system = unsafe { system.assume_init() };
    // SAFETY: as above.
    let stat = unsafe { stat.assume_init() };
    let is_file = stat.st_mode & libc::S_IFMT == libc::S_IFREG;
    (is_file && LOCAL_FILE_SYSTEMS.contains(&system.f_type)).then_some(FileState {
        format,
        device: stat.st_dev,
        inode: stat.st_ino,
        bytes: stat.st_size,
        modified: (stat.st_mtime, stat.st_mtime_nsec),
        changed: (stat.st_ctime, stat.st_ctime_nsec),
    })
}

/// A page of a file, where direct I/O may put it.
#[repr(C, align(4096))]
struct Page([u8; PAGE]);

/// Whether a qcow2 file has its data in itself.
fn is_whole_qcow2(fd: c_int) -> bool {
    let mut page = Box::new(Page([0; PAGE]));
    // SAFETY: the page outlives the call and has that many bytes.
    let read = unsafe { libc::pread(fd, page.0.as_mut_ptr().cast(), PAGE, 0) };
    let Some((header, _)) = page.0.split_first_chunk::<80>() else { return false };
    let (magic, version, features) = (&header[..4], &header[4..8], &header[72..80]);
    let version = version.try_into().map_or(0, u32::from_be_bytes);
    let features = features.try_into().map_or(u64::MAX, u64::from_be_bytes);
    // Version 2 has no such field.
    read >= 80 && magic == QCOW2_MAGIC && (version == 2 || features & QCOW2_DATA_FILE == 0)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write as _;
    use std::os::fd::AsRawFd as _;

    use super::*;

    fn evidence_of(file: &File) -> Evidence {
        let state = file_state(file.as_raw_fd(), "raw".to_owned()).expect("a regular, local file");
        Evidence { boot: "boot".to_owned(), disk_bytes: 512, files: vec![state] }
    }

    #[test]
    fn a_write_of_the_same_bytes_changes_the_tag() {
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(&[1; 512]).expect("written");
        thread::sleep(Duration::from_nanos(2 * SETTLED_NS as u64));
        let before = evidence_of(&file);
        assert!(is_settled(before.files[0].changed, coarse_now().expect("the clock")));
        assert_eq!(tag_of(&before), tag_of(&evidence_of(&file)));
        std::os::unix::fs::FileExt::write_all_at(&file, &[1; 512], 0).expect("written");
        let after = evidence_of(&file);
        assert_ne!(tag_of(&before), tag_of(&after));
        let other = Evidence { boot: "another".to_owned(), ..before.clone() };
        assert_ne!(tag_of(&before), tag_of(&other));
        let longer = Evidence { disk_bytes: 1024, ..before.clone() };
        assert_ne!(tag_of(&before), tag_of(&longer));
    }

    #[test]
    fn what_was_changed_just_now_has_not_settled() {
        let ms = 1_000_000;
        assert!(!is_settled((7, 990 * ms), (8, 10 * ms)));
        assert!(is_settled((7, 985 * ms), (8, 10 * ms)));
        assert!(!is_settled((9, 0), (8, 0)), "from the future");
    }

    #[test]
    fn only_regular_files_have_a_state() {
        let null = File::open("/dev/null").expect("opens");
        assert!(file_state(null.as_raw_fd(), "raw".to_owned()).is_none());
        let procfs = File::open("/proc/self/status").expect("opens");
        assert!(file_state(procfs.as_raw_fd(), "raw".to_owned()).is_none());
    }
}
