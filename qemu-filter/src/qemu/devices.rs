//! The disks of this process: which there are, and which of them can be protected. QEMU's main thread.

use std::ffi::c_char;

use super::Glue;
use super::driver::Driver;
use super::graph;
use super::hook;
use super::layout::STATE_DRV;
use super::maps::Maps;
use super::names;
use super::types::{AioContext, BlockBackend, BlockDriver, BlockDriverState};
use super::version::c_text;
use crate::control::DiskInfo;

/// `BLK_PERM_WRITE`.
const PERMISSION_WRITE: u64 = 0x02;

/// Where devices with an ID of the operator's are in QEMU's object tree.
const NAMED_DEVICES: &str = "/machine/peripheral/";
/// Root of the object tree's machine.
const MACHINE: &str = "/machine/";

/// A disk and what it is reached through.
#[derive(Debug)]
pub(crate) struct Disk {
    pub(crate) blk: *mut BlockBackend,
    pub(crate) info: DiskInfo,
}

/// Holds a device's AioContext, where this QEMU has such a lock (7.2).
#[derive(Debug)]
pub(crate) struct ContextLock<'a> {
    glue: &'a Glue,
    context: *mut AioContext,
}

impl<'a> ContextLock<'a> {
    /// Locks a context.
    pub(crate) fn of(glue: &'a Glue, context: *mut AioContext) -> Self {
        if let Some(acquire) = glue.symbols.aio_context_acquire {
            // SAFETY: a live context; the lock is recursive.
            unsafe { acquire(context) };
        }
        Self { glue, context }
    }

    /// Locks the context of a live BlockBackend.
    pub(crate) fn of_device(glue: &'a Glue, blk: *mut BlockBackend) -> Self {
        // SAFETY: live by the caller's promise, in the main thread.
        let context = unsafe { (glue.symbols.blk_get_aio_context)(blk) };
        Self::of(glue, context)
    }

    /// Runs something with the context unlocked.
    pub(crate) fn released<R>(&self, run: impl FnOnce() -> R) -> R {
        if let Some(release) = self.glue.symbols.aio_context_release {
            // SAFETY: locked in `of`.
            unsafe { release(self.context) };
        }
        let answer = run();
        if let Some(acquire) = self.glue.symbols.aio_context_acquire {
            // SAFETY: as in `of`; our reference on what runs in it keeps the context.
            unsafe { acquire(self.context) };
        }
        answer
    }
}

impl Drop for ContextLock<'_> {
    fn drop(&mut self) {
        if let Some(release) = self.glue.symbols.aio_context_release {
            // SAFETY: locked in `of`.
            unsafe { release(self.context) };
        }
    }
}

/// The driver of a live node; null for one that has given it up.
pub(crate) fn driver_of(node: *mut BlockDriverState) -> *mut BlockDriver {
    // SAFETY: `drv` is at this offset in every release that has a table.
    let field = unsafe { node.cast::<u8>().add(STATE_DRV) };
    // SAFETY: as above, aligned.
    unsafe { field.cast::<*mut BlockDriver>().read() }
}

/// The node at which a device's writes are captured: the first that is not a filter.
pub(crate) fn top_node(glue: &Glue, blk: *mut BlockBackend) -> *mut BlockDriverState {
    // SAFETY: live by the caller's promise, in the main thread or a request of the device's.
    let root = unsafe { (glue.symbols.blk_bs)(blk) };
    // SAFETY: NULL or a live node.
    unsafe { (glue.symbols.bdrv_skip_filters)(root) }
}

/// All BlockBackends, in QEMU's order.
fn all(glue: &Glue) -> Vec<*mut BlockBackend> {
    let mut found = Vec::new();
    // SAFETY: main thread; NULL asks for the first.
    let mut blk = unsafe { (glue.symbols.blk_all_next)(std::ptr::null_mut()) };
    while !blk.is_null() {
        found.push(blk);
        // SAFETY: main thread; nothing has run since this one was given, so it is live.
        blk = unsafe { (glue.symbols.blk_all_next)(blk) };
    }
    found
}

/// Whether a BlockBackend still exists. Whatever may have run the main loop in between may have removed it.
pub(crate) fn exists(glue: &Glue, blk: *mut BlockBackend) -> bool {
    all(glue).contains(&blk)
}

/// All disks, in QEMU's order.
pub(crate) fn list(glue: &Glue) -> Vec<Disk> {
    let maps = Maps::load().ok();
    let mut disks: Vec<Disk> = Vec::new();
    for blk in all(glue) {
        // Asking the one before for its length may have run the main loop.
        if !exists(glue, blk) {
            continue;
        }
        let _lock = ContextLock::of_device(glue, blk);
        if let Some(info) = describe(glue, blk, maps.as_ref())
            && disks.iter().all(|known| known.info.device != info.device)
        {
            disks.push(Disk { blk, info });
        }
    }
    disks
}

/// One BlockBackend as a disk, or `None` when it is not a guest's.
fn describe(glue: &Glue, blk: *mut BlockBackend, maps: Option<&Maps>) -> Option<DiskInfo> {
    let has_devices = glue.symbols.qemu_add_machine_init_done_notifier.is_some();
    let device = attached_device(glue, blk);
    let node = top_node(glue, blk);
    if device.is_empty() && (has_devices || node.is_null()) {
        return None;
    }
    let mut info = DiskInfo { device: device_name(&device), ..DiskInfo::default() };
    if node.is_null() {
        info.refused = "no medium is inserted".to_owned();
        return Some(info);
    }
    // SAFETY: a live node; the text belongs to it.
    info.node = c_text(unsafe { (glue.symbols.bdrv_get_node_name)(node) }).unwrap_or_default();
    // SAFETY: as above.
    info.driver = c_text(unsafe { (glue.symbols.bdrv_get_format_name)(node) }).unwrap_or_default();
    // SAFETY: as above.
    info.read_only = unsafe { (glue.symbols.bdrv_is_read_only)(node) };
    // A program without devices that does not want to write is no guest; an operator's read-only disk has a name, though.
    // Without a name, QEMU itself opens files for a moment, to find out their format.
    if !has_devices && !may_write(glue, blk) && (!info.read_only || info.node.starts_with('#')) {
        return None;
    }
    info.disk_bytes = size(glue, blk).unwrap_or(0);
    if info.device.is_empty() {
        info.device = names::of(glue, blk, &info.node);
    }
    let fragile = (!has_devices && breaks_when_drained(glue, blk)).then(|| BREAKS_WHEN_DRAINED.to_owned());
    info.refused = fragile.or_else(|| refusal(glue, &info, node, maps)).unwrap_or_default();
    Some(info)
}

/// Size in bytes of a live BlockBackend that has a node. May run the main loop.
pub(crate) fn size(glue: &Glue, blk: *mut BlockBackend) -> Option<u64> {
    let _lock = ContextLock::of_device(glue, blk);
    // SAFETY: live by the caller's promise, in the main thread.
    u64::try_from(unsafe { (glue.symbols.blk_getlength)(blk) }).ok()
}

/// Whether a BlockBackend was opened for writing. (Only without devices: a device's permission follows the guest's state
/// and tells nothing.)
fn may_write(glue: &Glue, blk: *mut BlockBackend) -> bool {
    let (mut granted, mut shared) = (0, 0);
    // SAFETY: live; the two numbers outlive the call.
    unsafe { (glue.symbols.blk_get_perm)(blk, &raw mut granted, &raw mut shared) };
    granted & PERMISSION_WRITE != 0
}

const BREAKS_WHEN_DRAINED: &str = "an export on an iothread can end QEMU 7.2 when it is drained, as switching on does: use no iothread, or QEMU 10.0";

/// Whether this is an export on an iothread in 7.2. Its NBD server does not survive being drained under load there,
/// with or without us: `blockdev-reopen` in a loop ends it as well.
fn breaks_when_drained(glue: &Glue, blk: *mut BlockBackend) -> bool {
    // SAFETY: live, in the main thread.
    let context = unsafe { (glue.symbols.blk_get_aio_context)(blk) };
    // SAFETY: takes nothing.
    glue.symbols.aio_context_acquire.is_some() && context != unsafe { (glue.symbols.qemu_get_aio_context)() }
}

/// Why a disk cannot be protected.
fn refusal(glue: &Glue, info: &DiskInfo, node: *mut BlockDriverState, maps: Option<&Maps>) -> Option<String> {
    if info.read_only {
        return Some("it is read-only: nothing of it changes".to_owned());
    }
    if info.disk_bytes == 0 {
        return Some("it has no size".to_owned());
    }
    let driver = maps.and_then(|maps| Driver::new(driver_of(node), glue.layout, maps));
    let Some(driver) = driver else { return Some("its driver is not readable".to_owned()) };
    hook::unseen_writes(driver).or_else(|| graph::refusal(glue, node))
}

/// The ID or object path of the device on a BlockBackend; empty when there is none.
fn attached_device(glue: &Glue, blk: *mut BlockBackend) -> String {
    // SAFETY: live, in the main thread.
    let text: *mut c_char = unsafe { (glue.symbols.blk_get_attached_dev_id)(blk) };
    let device = c_text(text).unwrap_or_default();
    // SAFETY: the text was made for us by glib's allocator.
    unsafe { (glue.symbols.g_free)(text.cast()) };
    device
}

/// The name that an operator knows a device by: "virtio-disk0" for
/// "/machine/peripheral/virtio-disk0/virtio-backend", `unattached/device[10]` for `/machine/unattached/device[10]`.
fn device_name(path: &str) -> String {
    if let Some(named) = path.strip_prefix(NAMED_DEVICES) {
        return named.split('/').next().unwrap_or(named).to_owned();
    }
    let tail = path.strip_prefix(MACHINE).unwrap_or(path);
    tail.strip_suffix("/virtio-backend").unwrap_or(tail).to_owned()
}

#[cfg(test)]
mod tests {
    use super::device_name;

    #[test]
    fn a_device_is_named_as_the_operator_named_it() {
        for (path, name) in [
            ("/machine/peripheral/virtio-disk0/virtio-backend", "virtio-disk0"),
            ("/machine/peripheral/scsi0-0-0", "scsi0-0-0"),
            ("/machine/peripheral-anon/device[1]/virtio-backend", "peripheral-anon/device[1]"),
            ("/machine/unattached/device[10]", "unattached/device[10]"),
            ("ide0-0-0", "ide0-0-0"),
            ("", ""),
        ] {
            assert_eq!(device_name(path), name, "{path}");
        }
    }
}
