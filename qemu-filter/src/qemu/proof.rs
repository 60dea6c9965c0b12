//! Proves the hook on a scratch node of our own before a guest's disk is touched.
//!
//! A `null-co` node, which stores nothing, is opened below a filter with limits and units of its own (`blkdebug`),
//! through a BlockBackend of its own; its driver is hooked; one write goes through QEMU's block layer, which has to pad
//! it to those units. The capture rule must find it, our callback must see offset and length as they come out of the
//! filter, the filter's node must have that one request in its list, where the table says ([`super::tracked`]), and
//! QEMU's own callback must answer success. Then all of it is taken away again. QEMU's main thread.

use std::ffi::c_int;
use std::sync::OnceLock;
use std::sync::atomic::Ordering;

use super::Glue;
use super::devices;
use super::driver::Driver;
use super::hook::{self, Emptying, Filling};
use super::maps::Maps;
use super::slots::Slot;
use super::tracked::Expected;
use super::types::{BlockBackend, QemuError};
use super::version::c_text;

/// `BDRV_O_RDWR`.
const OPEN_READ_WRITE: c_int = 0x2;

/// What the filter makes of the write below.
const OFFSET: i64 = 20 << 10;
const BYTES: i64 = 12 << 10;
/// What is written: neither end lies at a multiple of 4 KiB, the filter's unit.
const WRITTEN_OFFSET: i64 = OFFSET + 512;
const WRITTEN_BYTES: usize = (BYTES - 1536) as usize;
/// The filter's limit.
const MAX_TRANSFER: u32 = 64 << 10;

/// What its list of requests must say.
pub(crate) const REQUEST: Expected = Expected { offset: OFFSET, bytes: BYTES, max_transfer: MAX_TRANSFER };

static PROVEN: OnceLock<Result<(), String>> = OnceLock::new();

/// Proves the hook, the first time in this process, with a slot that is not in use.
///
/// # Errors
/// What was not as expected; the same for every later call: nothing is hooked in such a QEMU.
pub(crate) fn prove(glue: &Glue, slot: &'static Slot) -> Result<(), String> {
    PROVEN
        .get_or_init(|| {
            prove_once(glue, slot).map_err(|what| {
                format!("the hook did not work on a scratch disk ({what}), so no disk is touched: report this QEMU")
            })
        })
        .clone()
}

fn prove_once(glue: &Glue, slot: &'static Slot) -> Result<(), String> {
    let scratch = Scratch::open(glue)?;
    let maps = Maps::load().map_err(|error| error.to_string())?;
    let driver = Driver::new(devices::driver_of(devices::top_node(glue, scratch.blk)), glue.layout, &maps)
        .ok_or("its node has no driver where one must be")?;
    if driver.format_name(&maps).as_deref() != Some("null-co") {
        return Err("its node's driver is another".to_owned());
    }
    hook::hook(driver, &maps, Filling::ReplaceOnly)?;
    slot.publish(scratch.blk, None);
    let answer = scratch.write();
    slot.unpublish();
    hook::unhook_all(Emptying::NoneFilled);
    // ORDERING: Relaxed: the write has completed in this thread.
    let requests = slot.seen.requests.load(Ordering::Relaxed);
    let offset = slot.seen.offset.load(Ordering::Relaxed);
    let bytes = slot.seen.bytes.load(Ordering::Relaxed);
    match (answer, requests, offset, bytes) {
        (answer, ..) if answer < 0 => Err(format!("its write failed with {answer}")),
        (_, 1, OFFSET, BYTES) => slot.seen.take_tracked(),
        _ => Err(format!("{requests} requests seen, the last of {bytes} bytes at {offset}")),
    }
}

/// The scratch node's BlockBackend; its drop removes both.
struct Scratch<'a> {
    glue: &'a Glue,
    blk: *mut BlockBackend,
}

impl<'a> Scratch<'a> {
    fn open(glue: &'a Glue) -> Result<Self, String> {
        // SAFETY: takes nothing.
        let options = unsafe { (glue.symbols.qdict_new)() };
        for (key, value) in [
            (c"driver", c"blkdebug"),
            (c"align", c"4096"),
            (c"max-transfer", c"65536"),
            (c"image.driver", c"null-co"),
            (c"image.size", c"1048576"),
            (c"image.read-zeroes", c"on"),
        ] {
            // SAFETY: a live dictionary, which copies both texts.
            unsafe { (glue.symbols.qdict_put_str)(options, key.as_ptr(), value.as_ptr()) };
        }
        let mut error: *mut QemuError = std::ptr::null_mut();
        // SAFETY: main thread; the dictionary is given away; no file name and no reference are needed.
        let blk = unsafe {
            (glue.symbols.blk_new_open)(
                std::ptr::null(),
                std::ptr::null(),
                options,
                OPEN_READ_WRITE,
                &raw mut error,
            )
        };
        if blk.is_null() { Err(take_error(glue, error)) } else { Ok(Self { glue, blk }) }
    }

    fn write(&self) -> c_int {
        let data = [0x5A_u8; WRITTEN_BYTES];
        let bytes = WRITTEN_BYTES as i64;
        // SAFETY: live; the data outlives the call, which waits for the write.
        unsafe { (self.glue.symbols.blk_pwrite)(self.blk, WRITTEN_OFFSET, bytes, data.as_ptr().cast(), 0) }
    }
}

impl Drop for Scratch<'_> {
    fn drop(&mut self) {
        // SAFETY: ours, and the only reference.
        unsafe { (self.glue.symbols.blk_unref)(self.blk) };
    }
}

fn take_error(glue: &Glue, error: *mut QemuError) -> String {
    if error.is_null() {
        return "unknown error".to_owned();
    }
    // SAFETY: set by QEMU; the text belongs to it.
    let text = c_text(unsafe { (glue.symbols.error_get_pretty)(error) }).unwrap_or_default();
    // SAFETY: ours to free, and not used below.
    unsafe { (glue.symbols.error_free)(error) };
    text
}
