//! Sections in which QEMU has no request in flight, as around QEMU's own snapshots; but never waited for without end.
//!
//! QEMU's own `bdrv_drained_begin` waits as long as it takes, in the main thread. In every release so far its NBD server can
//! make that endless: a client that finishes connecting after the section has begun is not told of it, waits for its
//! first request, and counts as a request in flight for ever (`nbd_drained_begin` and `nbd_drained_poll` in
//! `nbd/server.c`). So the two halves are called apart here, beginning and waiting, and the waiting has a limit;
//! after it the section is ended as if it had never begun, and whoever wanted it tries again later.

use std::time::{Duration, Instant};

use super::Glue;
use super::devices::ContextLock;
use super::types::{BlockBackend, BlockDriverState};

/// How long QEMU may take to come to rest. Guests wait meanwhile.
const LIMIT: Duration = Duration::from_secs(5);

/// Between two looks, when nothing happens in the main thread: requests may be under way in others.
const NAP: Duration = Duration::from_micros(100);

/// QEMU did not come to rest; nothing is drained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Restless;

impl Restless {
    /// For the operator.
    pub(crate) fn message(self) -> String {
        format!(
            "QEMU did not come to rest within {} s: a request does not end, or an NBD client was just connecting; \
             nothing was changed, try again",
            LIMIT.as_secs()
        )
    }
}

/// Runs what waits in the main thread until `busy` says no.
fn wait_while(
    glue: &Glue,
    lock: Option<&ContextLock<'_>>,
    mut busy: impl FnMut() -> bool,
) -> Result<(), Restless> {
    // SAFETY: takes nothing.
    let main = unsafe { (glue.symbols.qemu_get_aio_context)() };
    let begin = Instant::now();
    while busy() {
        if begin.elapsed() >= LIMIT {
            return Err(Restless);
        }
        let turn = || {
            // SAFETY: in the main thread, not in a coroutine, no context locked; does not block.
            if !unsafe { (glue.symbols.aio_poll)(main, false) } {
                std::thread::sleep(NAP);
            }
        };
        match lock {
            Some(lock) => lock.released(turn),
            None => turn(),
        }
    }
    Ok(())
}

/// Whether a quiesced node or anything above it has a request in flight.
fn is_busy(glue: &Glue, node: *mut BlockDriverState) -> bool {
    // SAFETY: a live node, in the main thread. 7.2 takes one more argument than the others, and all but the first are
    // 0 in either reading: not recursive, no parent to ignore, every parent counts.
    unsafe { (glue.symbols.bdrv_drain_poll)(node, 0, 0, 0) }
}

/// A section in which a device has no request in flight and begins none.
pub(crate) struct Drained<'a> {
    glue: &'a Glue,
    node: *mut BlockDriverState,
    lock: Option<ContextLock<'a>>,
}

impl<'a> Drained<'a> {
    /// Begins a section. Waiting runs the main loop: afterwards anything may have changed, even the device be gone.
    ///
    /// # Errors
    /// [`Restless`].
    pub(crate) fn device(glue: &'a Glue, blk: *mut BlockBackend) -> Result<Self, Restless> {
        let lock = ContextLock::of_device(glue, blk);
        // SAFETY: live, in the main thread.
        let node = unsafe { (glue.symbols.blk_bs)(blk) };
        // SAFETY: a live node; our reference keeps it while waiting runs the main loop.
        unsafe { (glue.symbols.bdrv_ref)(node) };
        // SAFETY: a live node, in the main thread, its context locked where there is such a lock. Only 7.2 reads the
        // third argument.
        unsafe { (glue.symbols.bdrv_do_drained_begin_quiesce)(node, std::ptr::null_mut(), 0) };
        // From here on dropping it ends the section.
        let drained = Self { glue, node, lock: Some(lock) };
        wait_while(glue, drained.lock.as_ref(), || is_busy(glue, node))?;
        Ok(drained)
    }
}

impl Drop for Drained<'_> {
    fn drop(&mut self) {
        // SAFETY: begun in `device`.
        unsafe { (self.glue.symbols.bdrv_drained_end)(self.node) };
        // SAFETY: taken in `device`.
        unsafe { (self.glue.symbols.bdrv_unref)(self.node) };
        self.lock = None;
    }
}

/// A section in which no node has a request in flight.
pub(crate) struct AllDrained<'a>(&'a Glue);

impl<'a> AllDrained<'a> {
    /// Begins a section, as [`Drained::device`] does.
    ///
    /// # Errors
    /// [`Restless`]; not in 7.2, which has no way to begin without waiting for everything.
    pub(crate) fn begin(glue: &'a Glue) -> Result<Self, Restless> {
        let Some(begin) = glue.symbols.bdrv_drain_all_begin_nopoll else {
            // SAFETY: main thread, no context locked.
            unsafe { (glue.symbols.bdrv_drain_all_begin)() };
            return Ok(Self(glue));
        };
        // SAFETY: main thread, no context locked.
        unsafe { begin() };
        let drained = Self(glue);
        wait_while(glue, None, || Self::any_is_busy(glue))?;
        Ok(drained)
    }

    fn any_is_busy(glue: &Glue) -> bool {
        let mut node = std::ptr::null_mut();
        let mut busy = false;
        loop {
            // SAFETY: main thread; nothing changes the graph in between.
            node = unsafe { (glue.symbols.bdrv_next_all_states)(node) };
            if node.is_null() {
                return busy;
            }
            // Each is asked: asking also wakes what only waits for its peer.
            busy |= is_busy(glue, node);
        }
    }
}

impl Drop for AllDrained<'_> {
    fn drop(&mut self) {
        // SAFETY: begun in `begin`.
        unsafe { (self.0.symbols.bdrv_drain_all_end)() };
    }
}
