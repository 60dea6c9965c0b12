//! What happens when the library is loaded: by `LD_PRELOAD` before the program's `main`, or into a running QEMU.
//!
//! A program that goes to the background forks, and threads do not survive that. So nothing is started before the
//! fork: a system emulator calls back when its machine is ready, the other programs when they initialise their
//! block layer, both after it. A QEMU that runs already has its main loop, and is started at once.

use std::ffi::{c_uint, c_void};
use std::io::Write as _;
use std::mem::MaybeUninit;
use std::panic::catch_unwind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use super::host::{self, QemuHost};
use super::once;
use super::symbols::{self, Symbols};
use super::types::Notifier;
use crate::control;

/// `MODULE_INIT_BLOCK`, in every release.
const MODULE_INIT_BLOCK: c_uint = 1;

/// Programs that come and go with every snapshot and never serve a guest: nothing happens in them.
const LEFT_ALONE: [&str; 1] = ["qemu-img"];

const LOADED_TWICE: &str = "the filter works in this process already; this second copy stays idle. \
                            To change to another release, restart the VM or migrate it";

/// How often the starting thread looks for the main loop, and how often in all (a minute).
const MAIN_LOOP_POLL: Duration = Duration::from_millis(1);
const MAIN_LOOP_POLLS: u32 = 60_000;

/// The dynamic linker calls what stands in this section.
#[used]
// SAFETY: the section holds pointers to functions of this type.
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: extern "C" fn() = on_load;

extern "C" fn on_load() {
    // A panic here must not keep the program from starting.
    let _caught = catch_unwind(when_loaded);
}

fn when_loaded() {
    if !symbols::is_qemu() || LEFT_ALONE.contains(&host::program_name().as_str()) {
        return;
    }
    match once::claim() {
        Ok(true) => {}
        Ok(false) => return complain(LOADED_TWICE),
        Err(error) => {
            return complain(&format!("cannot tell whether it is loaded twice, so it stays idle: {error}"));
        }
    }
    let symbols = match Symbols::load() {
        Ok(symbols) => symbols,
        Err(_) => return start_when_ready(),
    };
    // SAFETY: takes nothing; NULL as long as there is no main loop.
    if !unsafe { (symbols.qemu_get_aio_context)() }.is_null() {
        return start_when_ready();
    }
    match symbols.qemu_add_machine_init_done_notifier {
        // SAFETY: the notifier is static and in no list; the list is static too, and nothing runs beside us yet.
        Some(add) => unsafe { add(READY.0.get()) },
        // SAFETY: QEMU's own constructors do the same, before `main`.
        None => unsafe { (symbols.register_module_init)(on_block_init, MODULE_INIT_BLOCK) },
    }
}

/// Says something where QEMU's own messages go.
fn complain(what: &str) {
    // Whoever closed it does not want to know.
    let _unheard = writeln!(std::io::stderr(), "qemu-cdp: {what}");
}

/// The notifier's place: QEMU writes its links.
struct Ready(std::cell::UnsafeCell<Notifier>);

// SAFETY: touched by the program's first thread only.
unsafe impl Sync for Ready {}

static READY: Ready = Ready(std::cell::UnsafeCell::new(Notifier::new(on_machine_ready)));

unsafe extern "C" fn on_machine_ready(_notifier: *mut Notifier, _data: *mut c_void) {
    let _caught = catch_unwind(start_when_ready);
}

unsafe extern "C" fn on_block_init() {
    let _caught = catch_unwind(start_when_ready);
}

/// Starts a thread that waits for the main loop and then starts the control thread. Once in a process.
fn start_when_ready() {
    static STARTED: AtomicBool = AtomicBool::new(false);
    // ORDERING: Relaxed: only who is first matters.
    if STARTED.swap(true, Ordering::Relaxed) {
        return;
    }
    let mask = SignalMask::block_all();
    // Without a thread there is no capture; the program does not care.
    let _failed = thread::Builder::new().name("cdp-start".to_owned()).spawn(|| {
        let _caught = catch_unwind(start);
    });
    drop(mask);
}

fn start() {
    let socket = control::socket_path();
    let host = match Symbols::load() {
        Ok(symbols) => {
            if !wait_for_main_loop(&symbols) {
                return;
            }
            let version = super::find_version(&symbols);
            let glue = super::prepare(&symbols, version.as_ref());
            QemuHost::new(Some(&symbols), version.as_ref(), glue)
        }
        Err(missing) => {
            let refused = format!("this QEMU does not export '{missing}': use a build with modules enabled");
            QemuHost::new(None, None, Err(refused))
        }
    };
    // Without a thread there is no capture; the guest does not care.
    let _failed = control::start(Arc::new(host), socket);
}

fn wait_for_main_loop(symbols: &Symbols) -> bool {
    for _ in 0..MAIN_LOOP_POLLS {
        // SAFETY: takes nothing; reads one pointer, which is set once, when the context is complete.
        if !unsafe { (symbols.qemu_get_aio_context)() }.is_null() {
            return true;
        }
        thread::sleep(MAIN_LOOP_POLL);
    }
    false
}

/// Blocks all signals in this thread until it is dropped: threads of ours must not take QEMU's.
struct SignalMask(libc::sigset_t);

impl SignalMask {
    fn block_all() -> Self {
        let mut all = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: fills the whole set.
        unsafe { libc::sigfillset(all.as_mut_ptr()) };
        let mut before = MaybeUninit::<libc::sigset_t>::zeroed();
        // SAFETY: both sets live; an all-zero set is an empty one, should the call fail.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr()) };
        // SAFETY: zeroed above, or filled by the call.
        Self(unsafe { before.assume_init() })
    }
}

impl Drop for SignalMask {
    fn drop(&mut self) {
        // SAFETY: the set that was there before.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut()) };
    }
}
