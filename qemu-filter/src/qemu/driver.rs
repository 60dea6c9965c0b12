//! Reading and writing the callbacks of one `BlockDriver`, as its layout says.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::layout::{Callback, FORMAT_NAME, INSTANCE_SIZE, IS_FILTER, IS_FORMAT, Layout};
use super::maps::Maps;
use super::types::BlockDriver;
use super::version::c_text;

/// A `BlockDriver` of the running QEMU and the layout that it was found to have.
///
/// Making one is the promise that `driver` points to a live `BlockDriver` (they are never freed) and that the
/// layout is right for this process.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Driver {
    driver: *mut BlockDriver,
    layout: &'static Layout,
}

impl Driver {
    /// A driver whose memory is mapped; `None` when it is not, which is how a wrong layout shows itself.
    pub(crate) fn new(driver: *mut BlockDriver, layout: &'static Layout, maps: &Maps) -> Option<Self> {
        let aligned = !driver.is_null() && (driver as usize).is_multiple_of(align_of::<usize>());
        (aligned && maps.is_readable(driver as usize, layout.size)).then_some(Self { driver, layout })
    }

    /// Where it is.
    pub(crate) fn pointer(self) -> *mut BlockDriver {
        self.driver
    }

    /// Whether its callbacks may be replaced.
    pub(crate) fn is_writable(self, maps: &Maps) -> bool {
        maps.is_writable(self.driver as usize, self.layout.size)
    }

    /// `format_name`, when it is text.
    pub(crate) fn format_name(self, maps: &Maps) -> Option<String> {
        let name = self.read::<usize>(FORMAT_NAME);
        maps.is_readable(name, 1).then(|| c_text(name as *const std::ffi::c_char)).flatten()
    }

    /// `instance_size`, in bytes.
    pub(crate) fn instance_size(self) -> i32 {
        self.read(INSTANCE_SIZE)
    }

    /// `is_filter`. Read as a byte: a wrong layout may hold anything there.
    pub(crate) fn is_filter(self) -> bool {
        self.read::<u8>(IS_FILTER) != 0
    }

    /// `is_format`.
    pub(crate) fn is_format(self) -> bool {
        self.read::<u8>(IS_FORMAT) != 0
    }

    /// Next driver in QEMU's list, null at its end.
    pub(crate) fn next(self) -> *mut BlockDriver {
        self.read::<usize>(self.layout.list) as *mut BlockDriver
    }

    /// Whether this release has such a callback.
    pub(crate) fn has(self, callback: Callback) -> bool {
        self.field(callback).is_some()
    }

    /// Address of a callback; 0 when it is empty or does not exist in this release.
    pub(crate) fn callback(self, callback: Callback) -> usize {
        // ORDERING: Relaxed: QEMU reads and writes these without ordering too; a function's address is valid
        // on its own.
        self.field(callback).map_or(0, |field| field.load(Ordering::Relaxed))
    }

    /// Puts an address, or 0 for empty, into a callback.
    pub(crate) fn set_callback(self, callback: Callback, address: usize) {
        if let Some(field) = self.field(callback) {
            // ORDERING: Release: what a callback of ours needs was stored before it can be called.
            field.store(address, Ordering::Release);
        }
    }

    fn field(self, callback: Callback) -> Option<&'static AtomicUsize> {
        let offset = self.layout.offset(callback)?;
        // SAFETY: the offset is inside the structure (asserted for each table at compile time).
        let field = unsafe { self.driver.cast::<u8>().add(offset) };
        // SAFETY: aligned and live by the promise of this type; a driver table is never freed. QEMU's threads
        // read the field with plain aligned loads, which see either the old or the new pointer.
        Some(unsafe { AtomicUsize::from_ptr(field.cast()) })
    }

    fn read<T: Copy>(self, offset: usize) -> T {
        // SAFETY: the offsets passed here are inside the structure in every layout.
        let field = unsafe { self.driver.cast::<u8>().add(offset) };
        // SAFETY: readable by the check in `new`; T is an integer, for which every bit pattern is valid.
        unsafe { field.cast::<T>().read_unaligned() }
    }
}
