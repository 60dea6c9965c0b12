//! The nodes that a disk's contents come from, and what a change of them has done to the contents.
//!
//! Management changes nodes below a running device: snapshots put overlays on top, commits and mirrors pivot to
//! another image, and `qom-set`, `blockdev-snapshot` and `blockdev-reopen` put anything there that they are told to. Most
//! of these leave what the guest reads as it is, and history goes on without a gap. The others change the disk
//! without a write. So each change is judged (`docs/decisions/0013-a-change-of-nodes-is-judged.md`):
//!
//! | the disk's first image is now | its contents |
//! | --- | --- |
//! | the target of a mirror of all of the disk, or of an active commit, that was running | as before |
//! | as before, with fewer images below it, and a job was removing them (stream, commit) | as before |
//! | an overlay, or several, on the former one, in which nothing is allocated | as before |
//! | anything else | unknown: a gap until all has been compared |
//!
//! # When
//!
//! In 8.0 and later QEMU tells a driver when a section begins in which its node has no request in flight, and when
//! it ends; every change lies in one. So what a change leads to is known before the guest's next request. Whether
//! an overlay is empty is asked by the first request through it, before it is issued, and else when the command is
//! over.
//!
//! 7.2 tells from a coroutine, which may run when we are gone. There `bdrv_child_perm` tells that nodes change or that a job
//! takes hold of them, and they are looked at when the command is over; a request that comes before then notices a change
//! at the disk's first image, but not one below it. A driver that has nothing below it (`file` without a
//! format) is not asked; the look that is taken each second finds those changes, and a mirror that nobody has seen is a
//! change as any other.

use std::ffi::c_int;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::devices::{self, ContextLock};
use super::slots::{self, Caller, Slot, User};
use super::types::{BlockBackend, BlockDriverState};
use super::version::c_text;
use super::{Glue, glue, image, mainloop, mirror};
use crate::engine::{Capture, guard};

/// Most images of a chain that are followed.
const MAX_IMAGES: usize = 512;
/// Most nodes between a device and the end of its chain: filters too.
const MAX_NODES: usize = 2 * MAX_IMAGES;
/// The filters that jobs put above the images which they take out of a chain (`block/commit.c`, `block/stream.c`).
const REMOVING: [&str; 2] = ["commit_top", "copy-on-read"];

/// The address of a node, to be compared only: it may be gone.
type Address = usize;

/// An image of a chain: a node that is no filter, and the one that has its data.
type Image = (Address, Address);

/// What a device's nodes were when they were last judged.
#[derive(Debug, Default)]
pub(crate) struct Known {
    /// From the device's down.
    chain: Vec<Image>,
    /// A job that takes images out of the chain has been seen since.
    removing: bool,
    /// The target of a job, seen since, that makes it the same as the disk.
    twin: Option<Address>,
}

/// A device's nodes as they are now.
#[derive(Debug, Default)]
struct Now {
    root: *mut BlockDriverState,
    chain: Vec<Image>,
    removing: bool,
    twin: Option<Address>,
}

/// What a change of nodes has done to what the guest reads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Verdict {
    /// Nothing.
    Same,
    /// Nothing, if nothing is allocated in the images above this one.
    SameIfEmptyAbove(Address),
    /// It may be anything.
    Changed,
}

impl Known {
    fn judge(&self, now: &Now) -> Verdict {
        if now.chain == self.chain {
            return Verdict::Same;
        }
        let (Some(&was), Some(&is)) = (self.chain.first(), now.chain.first()) else {
            return Verdict::Changed;
        };
        if self.twin == Some(is.0) {
            return Verdict::Same;
        }
        let Some(above) = now.chain.iter().position(|image| *image == was) else { return Verdict::Changed };
        let below = &now.chain[above..];
        if below != self.chain && !(self.removing && is_thinned(below, &self.chain)) {
            return Verdict::Changed;
        }
        if above == 0 { Verdict::Same } else { Verdict::SameIfEmptyAbove(was.0) }
    }

    /// Remembers the jobs that are running now.
    fn note(&mut self, now: &Now) {
        self.removing |= now.removing;
        self.twin = now.twin.or(self.twin);
    }

    /// These nodes are the disk from now on.
    fn settle(&mut self, now: Now) {
        let Now { chain, removing, twin, .. } = now;
        *self = Self { chain, removing, twin };
    }
}

/// Whether a chain is the other one with some images taken out.
fn is_thinned(chain: &[Image], whole: &[Image]) -> bool {
    let mut rest = whole.iter();
    chain.iter().all(|image| rest.any(|candidate| candidate == image))
}

/// Where a slot keeps what is known; locked for a short time, only where nodes may have changed.
#[derive(Debug)]
pub(crate) struct Place(Mutex<Known>);

impl Place {
    pub(crate) const fn new() -> Self {
        Self(Mutex::new(Known { chain: Vec::new(), removing: false, twin: None }))
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The nodes of a live BlockBackend. While nobody changes them: in the main thread, or in a request's coroutine.
fn walk(glue: &Glue, blk: *mut BlockBackend, caller: Caller) -> Now {
    let skip_filters = glue.symbols.bdrv_skip_filters;
    // SAFETY: live by the caller's promise.
    let root = unsafe { (glue.symbols.blk_bs)(blk) };
    let mut now = Now { root, ..Now::default() };
    let mut next = (!root.is_null()).then_some(root);
    for _ in 0..MAX_NODES {
        let Some(node) = next else { break };
        // SAFETY: a live node: the root, or one below it.
        if unsafe { skip_filters(node) } == node {
            let data = glue.symbols.bdrv_primary_child.and_then(|which| image::child(which, node));
            // SAFETY: a live node below this one.
            let data = data.map_or(0, |data| unsafe { skip_filters(data) } as Address);
            now.chain.push((node as Address, data));
        } else {
            // SAFETY: a live node; the text is its driver's.
            let name = c_text(unsafe { (glue.symbols.bdrv_get_format_name)(node) }).unwrap_or_default();
            now.removing |= REMOVING.contains(&name.as_str());
            if name == mirror::FILTER && caller == Caller::MainThread {
                now.twin = now.twin.or(mirror::twin(glue, node).map(|target| target as Address));
            }
        }
        next = image::child(glue.symbols.bdrv_filter_or_cow_child, node);
    }
    now
}

/// Remembers the nodes of a device that is about to be captured. Main thread.
pub(crate) fn begin(glue: &Glue, slot: &Slot, blk: *mut BlockBackend) {
    let now = walk(glue, blk, Caller::MainThread);
    slot.set_judged(now.root);
    slot.nodes.lock().settle(now);
}

/// Looks whether a device's nodes have changed, and what that has done. What is left to ask is whether the images above
/// the one that it gives are empty.
fn look(glue: &Glue, user: &User, caller: Caller) -> Option<Address> {
    let blk = user.slot().blk();
    if blk.is_null() {
        return None;
    }
    let capture = user.capture()?;
    let mut known = user.slot().nodes.lock();
    let now = walk(glue, blk, caller);
    known.note(&now);
    match known.judge(&now) {
        Verdict::SameIfEmptyAbove(base) => return Some(base),
        Verdict::Changed => capture.contents_changed(),
        Verdict::Same if now.chain == known.chain => {
            user.slot().set_judged(now.root);
            return None;
        }
        Verdict::Same => {}
    }
    user.slot().set_judged(now.root);
    known.settle(now);
    None
}

/// Looks, and asks what is left to ask. In a request's coroutine, or in the main thread at rest.
fn look_and_ask(glue: &Glue, user: &User, caller: Caller) {
    while let Some(base) = look(glue, user, caller) {
        let Some(capture) = user.capture() else { return };
        let emptiness = emptiness(glue, user, base, capture, caller);
        if emptiness == Emptiness::Moved {
            continue;
        }
        let mut known = user.slot().nodes.lock();
        let now = walk(glue, user.slot().blk(), caller);
        // Somebody else may have had the answer before, and have written since.
        if known.judge(&now) == Verdict::SameIfEmptyAbove(base) {
            if emptiness == Emptiness::Not {
                capture.contents_changed();
            }
            user.slot().set_judged(now.root);
            known.settle(now);
        }
        return;
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Emptiness {
    Empty,
    Not,
    /// The nodes have changed meanwhile.
    Moved,
}

/// Whether nothing is allocated in a device's images above `base`.
fn emptiness(glue: &Glue, user: &User, base: Address, capture: &Capture, caller: Caller) -> Emptiness {
    let mut offset = 0;
    let disk_bytes = i64::try_from(capture.disk_bytes()).unwrap_or(i64::MAX);
    while offset < disk_bytes {
        let blk = user.slot().blk();
        if blk.is_null() || look(glue, user, caller) != Some(base) {
            return Emptiness::Moved;
        }
        let range = (offset, disk_bytes - offset);
        match allocated_above(glue, blk, base as *mut BlockDriverState, range, caller) {
            (0, known) if known > 0 => offset += known,
            // The end of an overlay that is shorter.
            (0, _) => break,
            _ => return Emptiness::Not,
        }
    }
    Emptiness::Empty
}

/// What `bdrv_is_allocated_above` says of the beginning of a range of a device's nodes above `base`, and of how many bytes.
fn allocated_above(
    glue: &Glue,
    blk: *mut BlockBackend,
    base: *mut BlockDriverState,
    (offset, length): (i64, i64),
    caller: Caller,
) -> (c_int, i64) {
    // A coroutine has it, and no other request of the nodes ends while this one is in flight.
    let in_main = (caller == Caller::MainThread).then(|| ContextLock::of_device(glue, blk));
    let top = devices::top_node(glue, blk);
    let mut known = 0;
    if in_main.is_some() {
        // SAFETY: a live node: it may run the main loop.
        unsafe { (glue.symbols.bdrv_ref)(top) };
    }
    // SAFETY: a live node and one below it, and a place that outlives the call.
    let allocated =
        unsafe { (glue.symbols.bdrv_is_allocated_above)(top, base, false, offset, length, &raw mut known) };
    if in_main.is_some() {
        // SAFETY: taken above.
        unsafe { (glue.symbols.bdrv_unref)(top) };
    }
    (allocated, known)
}

/// Settles what a change of nodes has done before a request goes through them. In its coroutine.
pub(crate) fn settle(glue: &Glue, user: &User) {
    let _caught = guard(|| look_and_ask(glue, user, Caller::Coroutine));
}

/// Looks at all devices; whether anything is to be looked at again at rest. Main thread.
fn look_at_all(glue: &Glue) -> bool {
    slots::users().fold(false, |again, user| {
        let open = look(glue, &user, Caller::MainThread).is_some();
        let known = user.slot().nodes.lock();
        again | open | known.removing | known.twin.is_some()
    })
}

/// A node begins or ends a section without requests, or time has passed. Main thread, in whatever it does.
pub(crate) fn look_around(glue: &'static Glue) {
    let again = guard(|| look_at_all(glue)).unwrap_or(false);
    if again {
        mainloop::schedule_at_rest(glue, look_at_rest);
    }
}

/// Nodes are changing, or a job takes hold of them. Main thread, in the midst of a command: what it leads to is looked at
/// when it is over.
pub(crate) fn look_soon(glue: &Glue) {
    let note = || {
        slots::users().fold(false, |_, user| {
            let mut known = user.slot().nodes.lock();
            known.note(&walk(glue, user.slot().blk(), Caller::MainThread));
            true
        })
    };
    if guard(note).unwrap_or(false) {
        mainloop::schedule_at_rest(glue, look_at_rest);
    }
}

/// The command is over, and with it what a job does at its end.
fn look_at_rest() {
    let Some(glue) = glue() else { return };
    for user in slots::users() {
        look_and_ask(glue, &user, Caller::MainThread);
        let blk = user.slot().blk();
        if blk.is_null() {
            continue;
        }
        let mut known = user.slot().nodes.lock();
        let now = walk(glue, blk, Caller::MainThread);
        known.removing = now.removing;
        known.twin = now.twin;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now(chain: &[Address]) -> Now {
        Now { chain: chain.iter().map(|node| (*node, node + 100)).collect(), ..Now::default() }
    }

    fn known(chain: &[Address]) -> Known {
        let mut known = Known::default();
        known.settle(now(chain));
        known
    }

    #[test]
    fn what_is_not_known_to_leave_the_contents_changes_them() {
        for (is, verdict) in [
            (vec![2, 1], Verdict::Same),
            (vec![3, 2, 1], Verdict::SameIfEmptyAbove(2)),
            (vec![4, 3, 2, 1], Verdict::SameIfEmptyAbove(2)),
            (vec![1], Verdict::Changed),
            (vec![2], Verdict::Changed),
            (vec![2, 3, 1], Verdict::Changed),
            (vec![3, 2], Verdict::Changed),
            (vec![3], Verdict::Changed),
            (vec![3, 1], Verdict::Changed),
            (vec![], Verdict::Changed),
        ] {
            assert_eq!(known(&[2, 1]).judge(&now(&is)), verdict, "{is:?}");
        }
        let mut other_file = now(&[2, 1]);
        other_file.chain[1].1 = 7;
        assert_eq!(known(&[2, 1]).judge(&other_file), Verdict::Changed);
    }

    #[test]
    fn a_job_tells_what_it_will_leave() {
        let mut streamed = known(&[3, 2, 1]);
        streamed.note(&Now { removing: true, ..now(&[3, 2, 1]) });
        for (is, verdict) in [
            (vec![3], Verdict::Same),
            (vec![3, 1], Verdict::Same),
            (vec![4, 3], Verdict::SameIfEmptyAbove(3)),
            (vec![3, 4], Verdict::Changed),
            (vec![3, 1, 2], Verdict::Changed),
            (vec![2, 1], Verdict::Changed),
        ] {
            assert_eq!(streamed.judge(&now(&is)), verdict, "{is:?}");
        }
        let mut mirrored = known(&[2, 1]);
        mirrored.note(&Now { twin: Some(9), ..now(&[2, 1]) });
        assert_eq!(mirrored.judge(&now(&[9])), Verdict::Same);
        assert_eq!(mirrored.judge(&now(&[8])), Verdict::Changed);
        mirrored.settle(now(&[9]));
        assert_eq!(mirrored.judge(&now(&[2, 1])), Verdict::Changed, "there is no way back");
    }
}
