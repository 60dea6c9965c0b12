//! What a disk is called in a program without devices.
//!
//! There a disk is what an export serves, or what `qemu-io` has open: a BlockBackend, which has no name of its own. It
//! is known by the node that it was opened on. A snapshot or a finished copy puts another node there, and the disk is
//! still the same one; so the name is kept from the first look until the BlockBackend loses its node for good.
//! QEMU's main thread.

use std::cell::UnsafeCell;
use std::ffi::c_void;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::types::{BlockBackend, Notifier};
use super::{Glue, glue};

/// The name of one BlockBackend. QEMU has the notifier's address.
struct Named {
    blk: *mut BlockBackend,
    name: String,
    removal: UnsafeCell<Notifier>,
}

// SAFETY: used by the main thread only.
unsafe impl Send for Named {}

/// Boxed because QEMU has the notifiers' addresses.
type Names = Vec<Box<Named>>;

/// Locked by the main thread only, and never while something of QEMU's runs.
static NAMES: Mutex<Names> = Mutex::new(Vec::new());

fn names() -> MutexGuard<'static, Names> {
    NAMES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The name of a BlockBackend that has a node: the one given at the first look, which is `node` if this is it.
pub(crate) fn of(glue: &Glue, blk: *mut BlockBackend, node: &str) -> String {
    if let Some(named) = names().iter().find(|named| named.blk == blk) {
        return named.name.clone();
    }
    let removal = UnsafeCell::new(Notifier::new(on_removal));
    let named = Box::new(Named { blk, name: node.to_owned(), removal });
    // SAFETY: live, in the main thread; the notifier stays in its box until it is out of the list.
    unsafe { (glue.symbols.blk_add_remove_bs_notifier)(blk, named.removal.get()) };
    names().push(named);
    node.to_owned()
}

/// The BlockBackend is about to lose its node: its address may soon be another's.
unsafe extern "C" fn on_removal(notifier: *mut Notifier, _blk: *mut c_void) {
    let Some(glue) = glue() else { return };
    // SAFETY: added in `of`; QEMU allows this while it goes through the list.
    unsafe { (glue.symbols.notifier_remove)(notifier) };
    names().retain(|named| named.removal.get() != notifier);
}
