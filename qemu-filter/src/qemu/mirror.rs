//! What a running mirror will have made of its target: the same as the disk, or not.
//!
//! A mirror's filter node has the job as the first word of its private state, and the job (`struct MirrorBlockJob` in
//! `block/mirror.c`) has, one after another in every release that has a table: its target's BlockBackend, the filter node, the
//! base, the base's overlay, three pointers, and what is to be copied. What comes before differs, and with it where this is.
//! So it is searched for: the filter's address, behind the address of a BlockBackend that exists.

use super::layout::{Copied, STATE_OPAQUE};
use super::types::{BlockBackend, BlockDriverState};
use super::{Glue, devices};

/// The driver of a mirror's filter node.
pub(crate) const FILTER: &str = "mirror_top";

/// How much of a job is searched, in words.
const MAX_WORDS: usize = 256;
/// Where the base is, in words behind the filter node.
const BASE: usize = 1;
/// Where it says what is copied, in words behind the filter node.
const WHAT: usize = 6;
/// Where it says that its target is taken for zeroes without a look (`target_is_zero`, a bool), where it has `sync_mode`.
const TARGET_IS_ZERO: usize = 7;
/// `MIRROR_SYNC_MODE_FULL`.
const SYNC_FULL: u32 = 1;

/// The image that will have the disk's contents when the mirror with this filter node is completed. In the main thread, or where
/// it waits.
pub(super) fn twin(glue: &Glue, filter: *mut BlockDriverState) -> Option<*mut BlockDriverState> {
    // SAFETY: `opaque` is at this offset in every release that has a table.
    let field = unsafe { filter.cast::<u8>().add(STATE_OPAQUE) };
    // SAFETY: as above, of a live node, aligned.
    let opaque = unsafe { field.cast::<*const usize>().read() };
    // SAFETY: null, or a `MirrorBDSOpaque`, whose first field is the job.
    let job = (!opaque.is_null()).then(|| unsafe { opaque.read() } as *mut usize)?;
    if job.is_null() {
        return None;
    }
    // SAFETY: a job is made by `g_malloc0`, which is malloc: so many bytes of it may be read.
    let bytes = unsafe { libc::malloc_usable_size(job.cast()) };
    let words = MAX_WORDS.min(bytes / size_of::<usize>());
    // SAFETY: as above; aligned as malloc's memory is. Nobody writes to what is looked at while the job runs.
    let words = unsafe { std::slice::from_raw_parts(job, words) };
    let at = words.iter().position(|word| *word == filter as usize)?;
    let target = *words.get(at.checked_sub(1)?)? as *mut BlockBackend;
    let (base, what) = (*words.get(at + BASE)?, *words.get(at + WHAT)?);
    if !devices::exists(glue, target) {
        return None;
    }
    let node = devices::top_node(glue, target);
    let all = match glue.layout.copied {
        Copied::UnlessNone => what as u8 == 0,
        // Taken for zeroes, a target may keep what it had where the disk has nothing.
        Copied::Mode => what as u32 == SYNC_FULL && *words.get(at + TARGET_IS_ZERO)? as u8 == 0,
    };
    // An active commit is a mirror to its own base.
    let same = base == node as usize || (base == 0 && all);
    (same && !node.is_null()).then_some(node)
}
