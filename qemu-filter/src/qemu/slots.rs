//! The protected devices, as the callbacks find them: a fixed table that is read without a lock.
//!
//! A slot is published by storing its BlockBackend and unpublished by clearing it, both in QEMU's main thread.
//! A callback that finds its node below a slot's BlockBackend counts itself as a user of the slot and then looks
//! whether the slot is still published. So when the main thread has cleared the BlockBackend and then finds no
//! user, none comes any more, and the capture may be let go.
//!
//! # Why the BlockBackend can be asked from any thread
//!
//! `blk_bs` and `bdrv_skip_filters` follow pointers that only the main thread changes. In 8.0 and later every
//! callback runs inside the block layer's graph read lock, and the main thread changes the graph, and removes a
//! node from a BlockBackend, only inside its write lock; a BlockBackend that is about to go tells
//! [`super::attach`] before. In 7.2 there is no such lock, but nodes belong to one AioContext, whose lock the main
//! thread holds for changes: there a slot also names its AioContext, and callbacks in others pass it by.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicI64, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::types::{AioContext, BlockBackend, BlockDriverState, Notifier};
use super::{Glue, graph, proof, tracked};
use crate::engine::{Capture, guard};

/// How many devices of one process can be protected at once.
pub(crate) const MAX_DEVICES: usize = 128;

/// One protected device, or the scratch node.
pub(crate) struct Slot {
    /// Whose root is captured; null while the slot is not published.
    blk: AtomicPtr<BlockBackend>,
    /// Only in 7.2: the AioContext of the device.
    context: AtomicPtr<AioContext>,
    /// From `Arc::into_raw`; null for the scratch node, whose requests are only noted in `seen`.
    capture: AtomicPtr<Capture>,
    /// The BlockBackend's root when [`graph`] last judged its nodes.
    judged: AtomicPtr<BlockDriverState>,
    /// What [`graph`] knows of them.
    pub(super) nodes: graph::Place,
    /// Callbacks between [`find`] and the drop of their [`User`].
    users: AtomicUsize,
    /// What the scratch node saw.
    pub(crate) seen: Seen,
    /// Told by QEMU when the BlockBackend loses its node.
    pub(crate) removal: UnsafeCell<Notifier>,
}

/// The arguments of the requests that a slot without a capture saw.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) requests: AtomicU64,
    pub(crate) offset: AtomicI64,
    pub(crate) bytes: AtomicI64,
    /// What [`tracked::prove`] said.
    tracked: Mutex<Result<(), String>>,
}

impl Seen {
    const fn new() -> Self {
        Self {
            requests: AtomicU64::new(0),
            offset: AtomicI64::new(0),
            bytes: AtomicI64::new(0),
            tracked: Mutex::new(Ok(())),
        }
    }

    fn tracked(&self) -> MutexGuard<'_, Result<(), String>> {
        self.tracked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the scratch node had its request where the table says.
    ///
    /// # Errors
    /// What was not as expected.
    pub(crate) fn take_tracked(&self) -> Result<(), String> {
        std::mem::replace(&mut *self.tracked(), Ok(()))
    }
}

// SAFETY: all fields but `removal` are atomic; `removal` is touched by QEMU's main thread only.
unsafe impl Sync for Slot {}

impl Slot {
    const fn new() -> Self {
        Self {
            blk: AtomicPtr::new(std::ptr::null_mut()),
            context: AtomicPtr::new(std::ptr::null_mut()),
            capture: AtomicPtr::new(std::ptr::null_mut()),
            judged: AtomicPtr::new(std::ptr::null_mut()),
            nodes: graph::Place::new(),
            users: AtomicUsize::new(0),
            seen: Seen::new(),
            removal: UnsafeCell::new(Notifier::new(super::attach::on_removal)),
        }
    }

    /// The BlockBackend while the slot is published.
    pub(crate) fn blk(&self) -> *mut BlockBackend {
        // ORDERING: SeqCst: see `find` and `unpublish`.
        self.blk.load(Ordering::SeqCst)
    }

    /// Makes callbacks find the slot. Main thread.
    pub(crate) fn publish(&self, blk: *mut BlockBackend, capture: Option<Arc<Capture>>) {
        let capture = capture.map_or(std::ptr::null(), Arc::into_raw);
        // ORDERING: Relaxed: published by the store of `blk` below.
        self.capture.store(capture.cast_mut(), Ordering::Relaxed);
        // ORDERING: SeqCst store, pairs with the loads in `find`: who sees the BlockBackend sees the capture.
        self.blk.store(blk, Ordering::SeqCst);
    }

    /// Hides the slot from callbacks that come from now on. Main thread.
    pub(crate) fn unpublish(&self) {
        // ORDERING: SeqCst: before the load of `users` in `is_used`, in one order with `find`'s increment and
        // second look: either the user is seen there, or it sees null here.
        self.blk.store(std::ptr::null_mut(), Ordering::SeqCst);
    }

    /// Whether a callback still uses the slot.
    pub(crate) fn is_used(&self) -> bool {
        // ORDERING: SeqCst: see `unpublish`; also acquires what the users did.
        self.users.load(Ordering::SeqCst) != 0
    }

    /// Calls `act` with the slot's capture, if it has one. Main thread.
    pub(crate) fn with_capture(&self, act: impl FnOnce(&Capture)) {
        // ORDERING: Relaxed: only the main thread stores it.
        let capture = self.capture.load(Ordering::Relaxed);
        // SAFETY: null, or an Arc's content that stays until `let_go`, in this same thread.
        if let Some(capture) = unsafe { capture.as_ref() } {
            act(capture);
        }
    }

    /// Lets the capture of an unpublished slot go. If a callback still uses it, which a drained device does not
    /// have, the capture is leaked rather than freed under it. Main thread.
    pub(crate) fn let_go(&self) {
        debug_assert!(self.blk().is_null(), "a published slot keeps its capture");
        if self.is_used() {
            return;
        }
        // ORDERING: Relaxed: only the main thread stores it, and the users are gone.
        let capture = self.capture.swap(std::ptr::null_mut(), Ordering::Relaxed);
        if !capture.is_null() {
            // SAFETY: it came from Arc::into_raw in `publish`, and the swap hands it out once.
            drop(unsafe { Arc::from_raw(capture.cast_const()) });
        }
    }

    /// Only in 7.2: callbacks in other AioContexts pass the slot by. Main thread.
    pub(crate) fn set_context(&self, context: *mut AioContext) {
        // ORDERING: Release/Acquire with `find`; changed only while the device is drained.
        self.context.store(context, Ordering::Release);
    }

    /// These nodes have been judged: requests through them go on.
    pub(super) fn set_judged(&self, root: *mut BlockDriverState) {
        // ORDERING: Release pairs with `enter`: what was said of the nodes to the capture comes before.
        self.judged.store(root, Ordering::Release);
    }

    /// The root of the slot's nodes, if `node` is the first of them that is no filter.
    fn root_above(
        glue: &Glue,
        blk: *mut BlockBackend,
        node: *mut BlockDriverState,
    ) -> Option<*mut BlockDriverState> {
        // SAFETY: the BlockBackend is live, see the module's text.
        let root = unsafe { (glue.symbols.blk_bs)(blk) };
        if root.is_null() {
            return None;
        }
        // SAFETY: the root of a live BlockBackend is a live node.
        (root == node || unsafe { (glue.symbols.bdrv_skip_filters)(root) } == node).then_some(root)
    }

    fn enter(&'static self, blk: *mut BlockBackend, root: *mut BlockDriverState) -> Option<User> {
        // ORDERING: SeqCst: counted before the second look; see `unpublish`.
        self.users.fetch_add(1, Ordering::SeqCst);
        // ORDERING: Acquire pairs with `set_judged`.
        let user = User { slot: self, is_judged: self.judged.load(Ordering::Acquire) == root };
        (self.blk() == blk).then_some(user)
    }
}

/// A callback that works for a protected device. Holds no lock and belongs to no thread, so a coroutine keeps it
/// across yields.
pub(crate) struct User {
    slot: &'static Slot,
    /// Whether the nodes are those that were judged last.
    pub(super) is_judged: bool,
}

impl User {
    pub(super) fn slot(&self) -> &'static Slot {
        self.slot
    }

    /// The capture, or `None` on the scratch node, where the request is noted.
    pub(crate) fn capture(&self) -> Option<&Capture> {
        // ORDERING: Relaxed: `enter` has synchronised with `publish`.
        let capture = self.slot.capture.load(Ordering::Relaxed);
        // SAFETY: null, or an Arc's content that stays as long as the slot has users.
        unsafe { capture.as_ref() }
    }

    /// Notes a request of the scratch node.
    pub(crate) fn note(&self, glue: &Glue, offset: i64, bytes: i64) {
        let seen = &self.slot.seen;
        // SAFETY: the scratch node's BlockBackend is live while it is published.
        let root = unsafe { (glue.symbols.blk_bs)(self.slot.blk()) };
        let proven = guard(|| tracked::prove(glue, root, &proof::REQUEST)).unwrap_or_else(Err);
        *seen.tracked() = proven;
        // ORDERING: Relaxed: read by the same thread, after the request.
        seen.offset.store(offset, Ordering::Relaxed);
        seen.bytes.store(bytes, Ordering::Relaxed);
        seen.requests.fetch_add(1, Ordering::Relaxed);
    }
}

impl Drop for User {
    fn drop(&mut self) {
        // ORDERING: Release pairs with `is_used`: all that the callback did comes before.
        self.slot.users.fetch_sub(1, Ordering::Release);
    }
}

static SLOTS: [Slot; MAX_DEVICES] = [const { Slot::new() }; MAX_DEVICES];

/// One past the highest slot that was ever used.
static EVER_USED: AtomicUsize = AtomicUsize::new(0);

/// Which callbacks may find a slot: see the module's text about 7.2.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Caller {
    /// A request's coroutine.
    Coroutine,
    /// QEMU's main thread, outside any coroutine.
    MainThread,
}

/// The slot whose first non-filter node is `node`, if it is protected: **the capture rule**.
pub(crate) fn find(glue: &Glue, node: *mut BlockDriverState, caller: Caller) -> Option<User> {
    // ORDERING: Acquire pairs with `slot`: the slots below it are initialised anyway (they are static).
    let used = EVER_USED.load(Ordering::Acquire).min(MAX_DEVICES);
    SLOTS[..used].iter().find_map(|slot| {
        let blk = slot.blk();
        if blk.is_null() || !in_context(glue, slot, caller) {
            return None;
        }
        slot.enter(blk, Slot::root_above(glue, blk, node)?)
    })
}

/// All slots with a capture, for the main thread.
pub(crate) fn users() -> impl Iterator<Item = User> {
    published()
        .filter_map(|slot| slot.enter(slot.blk(), std::ptr::null_mut()))
        .filter(|user| user.capture().is_some())
}

fn in_context(glue: &Glue, slot: &Slot, caller: Caller) -> bool {
    // ORDERING: Acquire pairs with `set_context`.
    let context = slot.context.load(Ordering::Acquire);
    if context.is_null() || caller == Caller::MainThread {
        return true;
    }
    // SAFETY: takes nothing, reads a thread-local of QEMU's.
    unsafe { (glue.symbols.qemu_get_current_aio_context)() == context }
}

/// The slots that callbacks find. Main thread.
pub(crate) fn published() -> impl Iterator<Item = &'static Slot> {
    SLOTS.iter().filter(|slot| !slot.blk().is_null())
}

/// The slot that a removal notifier belongs to.
pub(crate) fn by_notifier(notifier: *mut Notifier) -> Option<&'static Slot> {
    SLOTS.iter().find(|slot| slot.removal.get() == notifier)
}

/// A slot by its number, without counting it as used.
pub(crate) fn peek(index: usize) -> Option<&'static Slot> {
    SLOTS.get(index)
}

/// A slot by its number, for the main thread.
pub(crate) fn slot(index: usize) -> Option<&'static Slot> {
    let slot = SLOTS.get(index)?;
    // ORDERING: Release pairs with `find`.
    EVER_USED.fetch_max(index + 1, Ordering::Release);
    Some(slot)
}
