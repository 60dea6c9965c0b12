//! Putting our callbacks into QEMU's driver tables, and QEMU's own back.
//!
//! What a driver had before is kept in a table that only grows and is never freed: a callback of ours that was
//! already entered, or whose pointer another thread had already read, still finds the original after the
//! pointers have been put back.
//!
//! Callbacks that a driver fills are replaced. Six that it leaves empty are filled, each because the block
//! layer then behaves the same and we see what we otherwise would not:
//!
//! | filled | where | why |
//! | --- | --- | --- |
//! | `co_flush_to_os` | no `co_flush` | the start of a guest's flush; answers 0, as an empty one does |
//! | `co_pwritev` | only `aio_pwritev` | preferred by the block layer; issues `aio_pwritev` and waits, as the block layer would |
//! | `co_pdiscard` | only `aio_pdiscard` | likewise |
//! | `inactivate` | anywhere | the disk is handed to another QEMU; answers 0 |
//! | `drain_begin`, `drain_end` | anywhere but in 7.2 | nodes may change in between; nothing to answer |
//!
//! An empty callback that is emptied again could be called by a thread that has just seen it filled. So it
//! happens only with all nodes drained ([`Emptying::Drained`]). Everything here runs in QEMU's main thread.

use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use super::Glue;
use super::callbacks;
use super::driver::Driver;
use super::layout::{CALLBACKS, Callback, Layout};
use super::maps::Maps;
use super::types::BlockDriver;

/// How many different drivers a process can have; the block layer has about 60.
const MAX_DRIVERS: usize = 256;

/// The callbacks of a driver as QEMU had them.
#[derive(Debug)]
pub(crate) struct Originals {
    driver: Driver,
    /// By [`Callback`]; 0 is empty.
    addresses: [usize; CALLBACKS],
    /// 1 while ours are in the driver's table.
    hooked: AtomicUsize,
}

impl Originals {
    /// Address of the original callback; 0 when it was empty.
    pub(crate) fn address(&self, callback: Callback) -> usize {
        self.addresses[callback as usize]
    }

    /// What we put in the place of a callback; 0 leaves it alone.
    fn replacement(&self, callback: Callback, ours: usize) -> usize {
        let is_empty = |callback| self.address(callback) == 0;
        let fill = match callback {
            Callback::CoFlushToOs => is_empty(Callback::CoFlush),
            Callback::CoPwritev => !is_empty(Callback::AioPwritev) && is_empty(Callback::CoPwritevPart),
            Callback::CoPdiscard => !is_empty(Callback::AioPdiscard),
            Callback::Inactivate | Callback::DrainBegin | Callback::DrainEnd => true,
            // Where drains tell of changes it is left alone.
            Callback::ChildPerm if self.driver.has(Callback::DrainEnd) => return 0,
            _ => false,
        };
        if !is_empty(callback) || fill { ours } else { 0 }
    }

    fn is_hooked(&self) -> bool {
        // ORDERING: Relaxed: only the main thread reads and writes it.
        self.hooked.load(Ordering::Relaxed) != 0
    }

    fn set_hooked(&self, hooked: bool) {
        // ORDERING: Relaxed: as above.
        self.hooked.store(usize::from(hooked), Ordering::Relaxed);
    }
}

/// An open-addressed table by the driver's address; a slot is filled once and never changes.
static TABLE: [AtomicPtr<Originals>; MAX_DRIVERS] =
    [const { AtomicPtr::new(std::ptr::null_mut()) }; MAX_DRIVERS];

/// Which positions to look at for a driver, in order.
fn probe(driver: *const BlockDriver) -> impl Iterator<Item = usize> {
    // Tables are at least 840 bytes apart; Fibonacci hashing spreads the rest.
    let hash = (driver as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
    let start = hash as usize % MAX_DRIVERS;
    (0..MAX_DRIVERS).map(move |step| (start + step) % MAX_DRIVERS)
}

/// The originals of a driver that is or was hooked. Called for every request.
pub(crate) fn originals(driver: *const BlockDriver) -> Option<&'static Originals> {
    for position in probe(driver) {
        // ORDERING: Acquire pairs with the store in `remember`.
        let entry = TABLE[position].load(Ordering::Acquire);
        // SAFETY: null, or a leaked box.
        let entry = unsafe { entry.as_ref() }?;
        if std::ptr::eq(entry.driver.pointer(), driver) {
            return Some(entry);
        }
    }
    None
}

/// All originals in the table.
fn all_originals() -> impl Iterator<Item = &'static Originals> {
    TABLE.iter().filter_map(|entry| {
        // ORDERING: Acquire pairs with the store in `remember`.
        let entry = entry.load(Ordering::Acquire);
        // SAFETY: null, or a leaked box.
        unsafe { entry.as_ref() }
    })
}

/// Remembers a driver's callbacks; once for each driver, because they never change but by us.
fn remember(driver: Driver) -> Option<&'static Originals> {
    if let Some(known) = originals(driver.pointer()) {
        return Some(known);
    }
    let mut addresses = [0; CALLBACKS];
    for callback in callbacks::REPLACEMENTS.map(|(callback, _)| callback).into_iter().chain(callbacks::KEPT) {
        addresses[callback as usize] = driver.callback(callback);
    }
    // ORDERING: Acquire: only this thread adds entries.
    let position = probe(driver.pointer()).find(|&free| TABLE[free].load(Ordering::Acquire).is_null())?;
    let entry = Box::leak(Box::new(Originals { driver, addresses, hooked: AtomicUsize::new(0) }));
    // ORDERING: Release pairs with the loads above: who finds the entry sees its content.
    TABLE[position].store(entry, Ordering::Release);
    Some(entry)
}

/// Whether empty callbacks are filled as well.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Filling {
    /// As the table in the module's text says.
    FillEmpty,
    /// Replaced only, so that taking them back needs no drained section: for the proof.
    ReplaceOnly,
}

/// Hooks one driver.
///
/// # Errors
/// Why it cannot be hooked, for the operator; then it is untouched.
pub(crate) fn hook(driver: Driver, maps: &Maps, filling: Filling) -> Result<(), String> {
    let name = driver.format_name(maps).unwrap_or_default();
    if !driver.is_writable(maps) {
        return Err(format!("the table of driver '{name}' cannot be written"));
    }
    let originals = remember(driver).ok_or("more drivers than there is room for")?;
    if originals.is_hooked() {
        return Ok(());
    }
    if originals.addresses.iter().any(|&address| address != 0 && !maps.is_code(address)) {
        return Err(format!("driver '{name}' has a callback that is not QEMU's code"));
    }
    for (callback, ours) in callbacks::REPLACEMENTS {
        let replacement = originals.replacement(callback, ours());
        let empty = originals.address(callback) == 0;
        if replacement != 0 && !(empty && filling == Filling::ReplaceOnly) {
            driver.set_callback(callback, replacement);
        }
    }
    originals.set_hooked(true);
    Ok(())
}

/// Under what circumstances pointers are put back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Emptying {
    /// All nodes are drained.
    Drained,
    /// None had been filled ([`Filling::ReplaceOnly`]).
    NoneFilled,
}

/// Puts QEMU's own callbacks back everywhere.
pub(crate) fn unhook_all(_why_it_is_safe: Emptying) {
    for originals in all_originals().filter(|originals| originals.is_hooked()) {
        for (callback, ours) in callbacks::REPLACEMENTS {
            if originals.driver.callback(callback) == ours() {
                originals.driver.set_callback(callback, originals.address(callback));
            }
        }
        originals.set_hooked(false);
    }
}

/// How many drivers have our callbacks now.
pub(crate) fn hooked_drivers() -> usize {
    all_originals().filter(|originals| originals.is_hooked()).count()
}

/// Why writes through a driver could pass us by; `None` when they cannot.
pub(crate) fn unseen_writes(driver: Driver) -> Option<String> {
    let writes = [Callback::CoPwritevPart, Callback::CoPwritev, Callback::AioPwritev, Callback::CoWritev];
    let is_writable = writes.iter().any(|&callback| driver.callback(callback) != 0);
    (!is_writable).then(|| "its driver has no write callback that is known here".to_owned())
}

/// All registered drivers, newest first.
pub(crate) fn registered(glue: &Glue, maps: &Maps) -> Vec<Driver> {
    let mut found = Vec::new();
    let mut next = first_driver(glue);
    while let Some(driver) = Driver::new(next, glue.layout, maps)
        && found.len() < MAX_DRIVERS
    {
        next = driver.next();
        found.push(driver);
    }
    found
}

/// The first driver in QEMU's list.
///
/// The list's head is not exported, and `bdrv_iterate_format` names modules that are not loaded, which
/// `bdrv_find_format` would load into the process. A driver of ours, registered and taken off the list again at
/// once, tells where the head is. Nothing runs in between: the list belongs to the main thread.
fn first_driver(glue: &Glue) -> *mut BlockDriver {
    let Layout { size, list, .. } = *glue.layout;
    // Twice the size of the structure and zero: no callback, no flag.
    let mut scratch = vec![0_usize; size / 4];
    let ours: *mut BlockDriver = scratch.as_mut_ptr().cast();
    scratch[0] = c"cdp-scratch".as_ptr() as usize;
    // SAFETY: a zeroed structure with a name, at least as large as QEMU's; it stays until it is off the list.
    unsafe { (glue.symbols.bdrv_register)(ours) };
    let links = list / size_of::<usize>();
    let (next, head) = (scratch[links] as *mut BlockDriver, scratch[links + 1] as *mut *mut BlockDriver);
    // SAFETY: QLIST_INSERT_HEAD has just made `head` the address of the pointer to us.
    unsafe { head.write(next) };
    if !next.is_null() {
        let field = next.cast::<u8>().wrapping_add(list + size_of::<usize>());
        // SAFETY: the back link of the next driver, which pointed to our forward link; both are QEMU's to
        // change in this thread only.
        unsafe { field.cast::<*mut *mut BlockDriver>().write(head) };
    }
    next
}

/// Hooks every registered driver that is not a filter, also those that a module has brought since. A driver that
/// cannot be hooked is left alone: [`is_hooked`] tells, and no disk on it is protected.
///
/// # Errors
/// When this process's mappings cannot be read.
pub(crate) fn hook_all(glue: &Glue) -> Result<(), String> {
    let maps = Maps::load().map_err(|error| format!("cannot read /proc/self/maps: {error}"))?;
    for driver in registered(glue, &maps).into_iter().filter(|driver| !driver.is_filter()) {
        // What is wrong with a driver is said where a disk is to be protected on it.
        let _refused = hook(driver, &maps, Filling::FillEmpty);
    }
    Ok(())
}

/// Whether a driver has our callbacks now.
pub(crate) fn is_hooked(driver: *const BlockDriver) -> bool {
    originals(driver).is_some_and(Originals::is_hooked)
}
