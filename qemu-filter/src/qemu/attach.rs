//! Switching capture of one device on and off. Everything here runs in QEMU's main thread.
//!
//! Both happen with the device drained, as QEMU's own snapshots do: so no request is in flight that was not seen
//! from its beginning, and none is left half seen. A device that goes away, or loses its medium, tells before it
//! does, and its capture ends there.

use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use journal_format::ImageTag;

use super::background::Background;
use super::devices::{self, ContextLock};
use super::drain::{AllDrained, Drained, Restless};
use super::hook::{self, Emptying};
use super::slots::{self, MAX_DEVICES, Slot};
use super::types::{AioContext, BlockBackend, Coroutine, Notifier};
use super::{Glue, glue, graph, image, mainloop, proof, tracked};
use crate::control::DiskInfo;
use crate::engine::{Capture, Standing};

/// A device whose capture was switched on.
struct Attached {
    device: String,
    index: usize,
    slot: &'static Slot,
    blk: *mut BlockBackend,
    background: Arc<Background>,
    /// The device or its medium has gone, and the slot is empty.
    gone: bool,
}

// SAFETY: the pointer is used by the main thread only.
unsafe impl Send for Attached {}

/// Locked by the main thread only, and never while something of QEMU's runs that may run the main loop.
static ATTACHED: Mutex<Vec<Attached>> = Mutex::new(Vec::new());

fn attached() -> MutexGuard<'static, Vec<Attached>> {
    ATTACHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A slot that no device has.
fn free_slot() -> Option<(usize, &'static Slot)> {
    let list = attached();
    let index = (0..MAX_DEVICES).find(|index| {
        list.iter().all(|attached| attached.gone || attached.index != *index)
            && slots::peek(*index).is_some_and(|slot| !slot.is_used())
    })?;
    slots::slot(index).map(|slot| (index, slot))
}

/// All disks. Also hooks drivers that a module has brought since the last time, notes sizes that have changed, and
/// looks after requests in parts.
pub(crate) fn disks(glue: &Glue) -> Vec<DiskInfo> {
    if attached().iter().any(|attached| !attached.gone) {
        watch_drivers(glue);
    }
    look_after_held(glue);
    devices::list(glue).into_iter().map(|disk| disk.info).collect()
}

/// A protected disk may by now be on a driver that came with a module later: what was written until its driver was
/// hooked was not seen.
fn watch_drivers(glue: &Glue) {
    let unseen: Vec<(usize, *mut BlockBackend)> = attached()
        .iter()
        .filter(|attached| !attached.gone)
        .map(|attached| (attached.index, attached.blk))
        .filter(|(_, blk)| !is_hooked(glue, *blk))
        .collect();
    if let Some(glue) = super::glue() {
        graph::look_around(glue);
    }
    watch_sizes(glue);
    // Without the list of mappings nothing is hooked now; the next look tries again.
    let _unreadable = hook::hook_all(glue);
    for (index, blk) in unseen {
        let Some(slot) = slots::slot(index) else { continue };
        if is_hooked(glue, blk) {
            slot.with_capture(Capture::contents_changed);
        } else {
            slot.with_capture(|capture| {
                capture.fault("the disk has moved to a driver that cannot be captured")
            });
        }
    }
}

/// A node of another size in a disk's place (a snapshot's overlay, say) changes the disk's size without a request.
fn watch_sizes(glue: &Glue) {
    let protected: Vec<(usize, *mut BlockBackend)> = attached()
        .iter()
        .filter(|attached| !attached.gone)
        .map(|attached| (attached.index, attached.blk))
        .collect();
    for (index, blk) in protected {
        let Some(slot) = slots::slot(index) else { continue };
        if size_differs(glue, slot, blk).is_some() {
            // A change of size that is a request, and is under way, ends here. (Restless: the next look tries again.)
            let Ok(_drained) = Drained::device(glue, blk) else { continue };
            if let Some(disk_bytes) = size_differs(glue, slot, blk) {
                slot.with_capture(|capture| capture.size_changed(disk_bytes));
            }
        }
    }
}

/// The size of a slot's disk, if it is not what its capture knows.
fn size_differs(glue: &Glue, slot: &Slot, blk: *mut BlockBackend) -> Option<u64> {
    // Asking or draining may have run the main loop, in which the device went.
    if slot.blk() != blk || devices::top_node(glue, blk).is_null() {
        return None;
    }
    let disk_bytes = devices::size(glue, blk)?;
    let mut known = None;
    slot.with_capture(|capture| known = Some(capture.disk_bytes()));
    known.filter(|known| slot.blk() == blk && *known != disk_bytes).map(|_| disk_bytes)
}

fn is_hooked(glue: &Glue, blk: *mut BlockBackend) -> bool {
    let node = devices::top_node(glue, blk);
    !node.is_null() && hook::is_hooked(devices::driver_of(node))
}

/// Looks after requests of which QEMU has not sent the next part: those that it gave up end, which nobody else would see
/// to while others that overlap wait for them. Also of devices that are just being detached, or leave: their drains
/// wait for those others.
pub(crate) fn look_after_held(glue: &Glue) {
    for slot in slots::published() {
        let mut holds_any = false;
        slot.with_capture(|capture| holds_any = capture.holds_any());
        if holds_any {
            let blk = slot.blk();
            let _lock = ContextLock::of_device(glue, blk);
            // A request on a node that is the device's no more has ended: the device was drained for the change.
            let node = devices::top_node(glue, blk);
            slot.with_capture(|capture| {
                capture.look_after_held(|token, end| match node.is_null() {
                    true => Standing::Over,
                    false => tracked::standing(glue, node, token.0 as *mut Coroutine, end),
                });
            });
        }
    }
}

/// Switches capture of a device on.
///
/// # Errors
/// Why not, for the operator; then nothing is captured and nothing stays behind.
pub(crate) fn attach(
    glue: &Glue,
    device: &str,
    capture: Arc<Capture>,
    image: Option<ImageTag>,
) -> Result<(), String> {
    if attached().iter().any(|attached| attached.device == device && !attached.gone) {
        return Err(format!("'{device}' is protected already"));
    }
    let disk = devices::list(glue).into_iter().find(|disk| disk.info.device == device);
    let disk = disk.ok_or_else(|| format!("this QEMU has no disk '{device}'"))?;
    if !disk.info.refused.is_empty() {
        return Err(format!("'{device}' cannot be protected: {}", disk.info.refused));
    }
    let (index, slot) = free_slot().ok_or("too many disks of this QEMU are protected")?;
    proof::prove(glue, slot)?;
    hook::hook_all(glue)?;
    let answer = switch_on(glue, device, disk.blk, (index, slot), capture, image);
    if answer.is_err() {
        unhook_if_unused(glue);
    }
    answer
}

fn switch_on(
    glue: &Glue,
    device: &str,
    blk: *mut BlockBackend,
    (index, slot): (usize, &'static Slot),
    capture: Arc<Capture>,
    image: Option<ImageTag>,
) -> Result<(), String> {
    let gone = || format!("'{device}' went away while it was to be protected");
    // The proof has run the main loop.
    if !devices::exists(glue, blk) || devices::top_node(glue, blk).is_null() {
        return Err(gone());
    }
    let _drained = Drained::device(glue, blk).map_err(Restless::message)?;
    if !devices::exists(glue, blk) || devices::top_node(glue, blk).is_null() {
        return Err(gone());
    }
    if !is_hooked(glue, blk) {
        return Err(format!("'{device}' cannot be protected: its driver cannot be hooked"));
    }
    // Drained, and hooked: what is written from here on is seen.
    if image.is_some() && image == image::tag(glue, blk) {
        capture.unchanged();
    }
    watch(glue, blk, slot);
    graph::begin(glue, slot, blk);
    slot.publish(blk, Some(Arc::clone(&capture)));
    // It may have another size than when the agent was told. Before the first look at sizes the gap may have ended.
    if let Some(disk_bytes) = size_differs(glue, slot, blk) {
        capture.size_changed(disk_bytes);
    }
    let background = Background::start(glue, blk, capture);
    let entry = Attached { device: device.to_owned(), index, slot, blk, background, gone: false };
    attached().push(entry);
    Ok(())
}

/// Asks QEMU to tell when the device goes, and in 7.2 when it changes its context.
fn watch(glue: &Glue, blk: *mut BlockBackend, slot: &'static Slot) {
    // SAFETY: the slot's notifier is in no list, lives forever, and the device is live.
    unsafe { (glue.symbols.blk_add_remove_bs_notifier)(blk, slot.removal.get()) };
    if glue.symbols.aio_context_acquire.is_some() {
        // SAFETY: live, in the main thread.
        slot.set_context(unsafe { (glue.symbols.blk_get_aio_context)(blk) });
        let opaque = std::ptr::from_ref(slot).cast_mut().cast();
        // SAFETY: as above; both functions take the slot, which lives forever.
        unsafe { (glue.symbols.blk_add_aio_context_notifier)(blk, on_context, on_context_lost, opaque) };
    }
}

fn unwatch(glue: &Glue, blk: *mut BlockBackend, slot: &'static Slot) {
    // SAFETY: added in `watch`.
    unsafe { (glue.symbols.notifier_remove)(slot.removal.get()) };
    if glue.symbols.aio_context_acquire.is_some() {
        let opaque = std::ptr::from_ref(slot).cast_mut().cast();
        // SAFETY: added in `watch` with the same arguments.
        unsafe { (glue.symbols.blk_remove_aio_context_notifier)(blk, on_context, on_context_lost, opaque) };
    }
}

/// 7.2: the device's requests run in this context from now on.
unsafe extern "C" fn on_context(context: *mut AioContext, slot: *mut c_void) {
    // SAFETY: the slot that `watch` gave; it lives forever.
    let slot = unsafe { &*slot.cast::<Slot>() };
    slot.set_context(context);
}

/// 7.2: the device leaves its context; it is drained until [`on_context`] comes.
unsafe extern "C" fn on_context_lost(_slot: *mut c_void) {}

/// Whether a protected device is being drained, so that none of its requests may wait for the agent.
pub(crate) fn must_go(glue: &Glue, device: &str) -> bool {
    let blk = attached().iter().find(|attached| attached.device == device && !attached.gone).map(|a| a.blk);
    match (blk, glue.symbols.blk_in_drain) {
        // SAFETY: live as long as it is attached, in the main thread.
        (Some(blk), Some(in_drain)) => unsafe { in_drain(blk) },
        // 7.2 does not tell; there the main thread waits for every drain, and is not at rest.
        (Some(_), None) => false,
        (None, _) => true,
    }
}

/// Switches capture of a device off. Its background coroutine leaves some time later.
///
/// # Errors
/// No such device is protected, or QEMU does not come to rest: then it is still captured.
pub(crate) fn detach(glue: &Glue, device: &str) -> Result<Arc<Background>, String> {
    let entry = {
        let mut list = attached();
        let position = list.iter().position(|attached| attached.device == device);
        list.remove(position.ok_or_else(|| format!("'{device}' is not protected"))?)
    };
    if !entry.gone
        && let Err(restless) = switch_off_at_rest(glue, &entry)
    {
        // Still captured, unless the device has gone meanwhile; only its background coroutine has been told to leave.
        if entry.slot.blk() == entry.blk {
            attached().push(entry);
            return Err(restless.message());
        }
    }
    Ok(entry.background)
}

fn switch_off_at_rest(glue: &Glue, entry: &Attached) -> Result<(), Restless> {
    // Draining waits for all requests.
    entry.slot.with_capture(Capture::release_waiters);
    // It must not read on while the device is being drained.
    entry.background.stop(glue);
    let is_last = attached().iter().all(|attached| attached.gone);
    if is_last {
        let _drained = AllDrained::begin(glue)?;
        let _lock = ContextLock::of_device(glue, entry.blk);
        switch_off(glue, entry);
        hook::unhook_all(Emptying::Drained);
    } else {
        let _drained = Drained::device(glue, entry.blk)?;
        switch_off(glue, entry);
    }
    Ok(())
}

/// With the device drained.
fn switch_off(glue: &Glue, entry: &Attached) {
    // Draining has run the main loop: the device may have gone meanwhile.
    if entry.slot.blk() == entry.blk {
        unwatch(glue, entry.blk, entry.slot);
        end_capture(entry.slot);
    }
}

/// Lets the capture of a slot go; no request of its device is in flight.
fn end_capture(slot: &'static Slot) {
    slot.with_capture(|capture| {
        capture.look_after_held(|_, _| Standing::Over);
        capture.detach();
    });
    slot.unpublish();
    slot.let_go();
}

/// A BlockBackend is about to lose its node: the device is unplugged or its medium ejected, or QEMU ends.
pub(crate) unsafe extern "C" fn on_removal(notifier: *mut Notifier, blk: *mut c_void) {
    let Some(glue) = glue() else { return };
    let found = attached()
        .iter_mut()
        .find(|attached| !attached.gone && attached.slot.removal.get() == notifier)
        .map(|attached| {
            attached.gone = true;
            (attached.slot, Arc::clone(&attached.background))
        });
    let blk: *mut BlockBackend = blk.cast();
    let (slot, background) = match found {
        Some((slot, background)) => (slot, Some(background)),
        // It is being detached, and drained for that, right now.
        None => match slots::by_notifier(notifier) {
            Some(slot) => (slot, None),
            None => return,
        },
    };
    unwatch(glue, blk, slot);
    slot.with_capture(Capture::release_waiters);
    // SAFETY: live, in the main thread.
    unsafe { (glue.symbols.blk_drain)(blk) };
    slot.with_capture(|capture| capture.close(|| image::settled_tag(glue, blk)));
    end_capture(slot);
    if let Some(background) = background {
        background.stop(glue);
        background.drain(glue, blk);
    }
    mainloop::schedule(glue, || {
        if let Some(glue) = super::glue() {
            unhook_if_unused(glue);
        }
    });
}

/// Puts QEMU's own callbacks back when no device is protected.
fn unhook_if_unused(glue: &Glue) {
    if attached().iter().all(|attached| attached.gone) && hook::hooked_drivers() > 0 {
        // Restless: they stay, and let everything through; the next device that is switched off takes them along.
        let Ok(_drained) = AllDrained::begin(glue) else { return };
        // Draining has run the main loop.
        if attached().iter().all(|attached| attached.gone) {
            hook::unhook_all(Emptying::Drained);
        }
    }
}
