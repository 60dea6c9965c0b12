//! The nodes that a disk's contents come from, and what a change of them has done to the contents.
//!
//! Management changes nodes below a running device: snapshots put overlays on top, commits and mirrors pivot to
//! another image, and `qom-set`, `blockdev-snapshot` and `blockdev-reopen` put anything there that they are told to. Some
//! of these leave what the guest reads as it is, and history goes on without a gap. The others change the disk
//! without a write. So each change is judged (`docs/decisions/0013-a-change-of-nodes-is-judged.md`):
//!
//! | the disk's first image is now | its contents |
//! | --- | --- |
//! | the target of a mirror of all of the disk, or of an active commit, that was running | as before |
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
use super::layout::STATE_OPAQUE;
use super::slots::{self, Caller, Slot, User};
use super::types::{BlockBackend, BlockDriverState};
use super::version::c_text;
use super::{Glue, glue, image, mainloop, mirror};
use crate::engine::{Capture, guard};

/// Most nodes below a device that are followed.
const MAX_NODES: usize = 1024;
/// The driver whose nodes may show a part of what is below: `BDRVRawState` (`block/raw-format.c`) begins with offset, size, and
/// whether it has a size, in every release that has a table.
const RAW: &str = "raw";

/// A driver that has several sources of the same data: no callback tells when it gets another one.
const BLIND: &str = "quorum";

/// The address of a node, to be compared only: it may be gone.
type Address = usize;

/// An image of a chain.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Image {
    /// A node that is no filter.
    node: Address,
    /// Its sources can change unseen.
    is_blind: bool,
    /// What part of its data it shows, where it can show a part.
    shows: [u64; 3],
    /// The nodes that have its data, all the way down.
    data: Vec<Image>,
}

/// What a device's nodes were when they were last judged.
#[derive(Debug, Default)]
pub(crate) struct Known {
    /// From the device's down.
    chain: Vec<Image>,
    /// The target of a job, seen since, that makes it the same as the disk.
    twin: Option<Address>,
}

/// A device's nodes as they are now.
#[derive(Debug, Default)]
struct Now {
    root: *mut BlockDriverState,
    chain: Vec<Image>,
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
        let (Some(was), Some(is)) = (self.chain.first(), now.chain.first()) else {
            return Verdict::Changed;
        };
        if self.twin == Some(is.node) {
            return Verdict::Same;
        }
        match now.chain.ends_with(&self.chain) {
            true => Verdict::SameIfEmptyAbove(was.node),
            false => Verdict::Changed,
        }
    }

    /// Remembers the jobs that are running now.
    fn note(&mut self, now: &Now) {
        self.twin = now.twin.or(self.twin);
    }

    /// These nodes are the disk from now on.
    fn settle(&mut self, now: Now) {
        let Now { chain, twin, .. } = now;
        *self = Self { chain, twin };
    }
}

/// Where a slot keeps what is known; locked for a short time, only where nodes may have changed.
#[derive(Debug)]
pub(crate) struct Place(Mutex<Known>);

impl Place {
    pub(crate) const fn new() -> Self {
        Self(Mutex::new(Known { chain: Vec::new(), twin: None }))
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The nodes of a live BlockBackend; none when it has gone. While nobody changes them: in the main thread, or in a request's
/// coroutine.
fn walk(glue: &Glue, blk: *mut BlockBackend, caller: Caller) -> Now {
    if blk.is_null() {
        return Now::default();
    }
    // SAFETY: live by the caller's promise.
    let root = unsafe { (glue.symbols.blk_bs)(blk) };
    let (mut twin, mut left) = (None, MAX_NODES);
    let mut see_filter = |node| {
        if caller == Caller::MainThread && twin.is_none() && name_of(glue, node) == mirror::FILTER {
            twin = mirror::twin(glue, node).map(|target| target as Address);
        }
    };
    let chain = chain(glue, root, &mut left, &mut see_filter);
    Now { root, chain, twin }
}

/// The chain of images from a node down; at most `left` nodes in all.
fn chain(
    glue: &Glue,
    top: *mut BlockDriverState,
    left: &mut usize,
    see_filter: &mut dyn FnMut(*mut BlockDriverState),
) -> Vec<Image> {
    let mut images = Vec::new();
    let mut next = (!top.is_null()).then_some(top);
    while let Some(node) = next
        && *left > 0
    {
        *left -= 1;
        // SAFETY: a live node: the top, or one below it.
        if unsafe { (glue.symbols.bdrv_skip_filters)(node) } == node {
            let data = glue.symbols.bdrv_primary_child.and_then(|which| image::child(which, node));
            let data = data.map_or(Vec::new(), |data| chain(glue, data, left, &mut |_| ()));
            let name = name_of(glue, node);
            let shows = if name == RAW { shows(node) } else { [0; 3] };
            images.push(Image { node: node as Address, is_blind: name == BLIND, shows, data });
        } else {
            see_filter(node);
        }
        next = image::child(glue.symbols.bdrv_filter_or_cow_child, node);
    }
    images
}

fn name_of(glue: &Glue, node: *mut BlockDriverState) -> String {
    // SAFETY: a live node; the text is its driver's.
    c_text(unsafe { (glue.symbols.bdrv_get_format_name)(node) }).unwrap_or_default()
}

/// What part of its data a `raw` node shows.
fn shows(node: *mut BlockDriverState) -> [u64; 3] {
    // SAFETY: `opaque` is at this offset in every release that has a table.
    let field = unsafe { node.cast::<u8>().add(STATE_OPAQUE) };
    // SAFETY: as above, of a live node, aligned.
    let state = unsafe { field.cast::<*const [u64; 3]>().read() };
    if state.is_null() {
        return [0; 3];
    }
    // SAFETY: a `BDRVRawState`: two numbers of 64 bits and a bool, padded to 24 bytes, which malloc aligns.
    let [offset, size, has_size] = unsafe { state.read() };
    // Of the last word only the bool is the driver's.
    [offset, size, has_size & 0xff]
}

const BLINDNESS: &str = "a quorum node has its data, whose children can change unseen: take the quorum away";

fn is_blind(images: &[Image]) -> bool {
    images.iter().any(|image| image.is_blind || is_blind(&image.data))
}

/// Why the nodes of a device, from `top` down, cannot be followed. Main thread.
pub(crate) fn refusal(glue: &Glue, top: *mut BlockDriverState) -> Option<String> {
    is_blind(&chain(glue, top, &mut { MAX_NODES }, &mut |_| ())).then(|| BLINDNESS.to_owned())
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
        Verdict::SameIfEmptyAbove(base) => {
            // Also where the root is a filter that was there before: the next request has to ask.
            user.slot().set_judged(std::ptr::null_mut());
            return Some(base);
        }
        Verdict::Changed if is_blind(&now.chain) => {
            capture.fault(&format!("the disk has moved to where {BLINDNESS}"))
        }
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
        let blk = user.slot().blk();
        if blk.is_null() {
            // Asking ran the main loop, in which the device or its protection went.
            return;
        }
        let mut known = user.slot().nodes.lock();
        let now = walk(glue, blk, caller);
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
            // Something is allocated, or it cannot be told, or the overlay is shorter.
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
        again | open | known.twin.is_some()
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
        known.twin = now.twin;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now(chain: &[Address]) -> Now {
        let file = |node| Image { node, is_blind: false, shows: [0; 3], data: Vec::new() };
        let image = |node: &Address| Image { data: vec![file(node + 100)], ..file(*node) };
        Now { chain: chain.iter().map(image).collect(), ..Now::default() }
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
        other_file.chain[1].data[0].node = 7;
        assert_eq!(known(&[2, 1]).judge(&other_file), Verdict::Changed);
        let mut other_part = now(&[2, 1]);
        other_part.chain[1].shows[0] = 512;
        assert_eq!(known(&[2, 1]).judge(&other_part), Verdict::Changed);
    }

    #[test]
    fn a_mirror_tells_what_it_will_leave() {
        let mut mirrored = known(&[2, 1]);
        mirrored.note(&Now { twin: Some(9), ..now(&[2, 1]) });
        assert_eq!(mirrored.judge(&now(&[9])), Verdict::Same);
        assert_eq!(mirrored.judge(&now(&[8])), Verdict::Changed);
        mirrored.settle(now(&[9]));
        assert_eq!(mirrored.judge(&now(&[2, 1])), Verdict::Changed, "there is no way back");
    }
}
