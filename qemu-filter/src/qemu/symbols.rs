//! Every function and object of QEMU that we use, looked up by name in the running process.
//!
//! Nothing is linked: a library with an undefined QEMU symbol would keep every other program that inherits
//! `LD_PRELOAD` from starting. A process without [`PROBES`] is not QEMU's block layer, and nothing happens in
//! it. A process that has those but lacks another is a QEMU we do not know: refused by name of the symbol.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

use super::types::{
    AioContext, BdrvChild, BlockBackend, BlockDriver, BlockDriverState, CoSleep, Coroutine, Notifier, QDict,
    QemuError, QemuIoVector, QemuMutex, VersionInfo,
};

/// A process with all of these is a QEMU.
const PROBES: [&CStr; 3] = [c"bdrv_register", c"qemu_coroutine_yield", c"register_module_init"];

/// Set by clang's control-flow integrity, which aborts on a function pointer that is not its own.
const CFI: &CStr = c"__cfi_check";

/// Address of an exported symbol, null when there is none.
fn lookup(name: &CStr) -> *mut c_void {
    // SAFETY: the name is NUL-terminated; RTLD_DEFAULT is a valid handle.
    unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) }
}

/// Whether this process has QEMU's block layer in it.
pub(crate) fn is_qemu() -> bool {
    PROBES.iter().all(|name| !lookup(name).is_null())
}

/// Whether function pointers that are not QEMU's own would abort the process.
pub(crate) fn has_control_flow_integrity() -> bool {
    !lookup(CFI).is_null()
}

/// Declares [`Symbols`]: `required` ones make `load` fail by name, `optional` ones exist in some releases or
/// programs only.
macro_rules! symbols {
    (required { $($(#[$rdoc:meta])* $required:ident: $rtype:ty,)* }
     optional { $($(#[$odoc:meta])* $optional:ident: $otype:ty,)* }) => {
        /// QEMU's functions and objects, by their C names.
        #[expect(non_snake_case, reason = "the names are QEMU's")]
        #[derive(Clone, Copy, Debug)]
        pub(crate) struct Symbols {
            $($(#[$rdoc])* pub(crate) $required: $rtype,)*
            $($(#[$odoc])* pub(crate) $optional: Option<$otype>,)*
        }

        impl Symbols {
            /// Looks all of them up.
            ///
            /// # Errors
            /// The name of the first required symbol that the process does not export.
            pub(crate) fn load() -> Result<Self, &'static str> {
                Ok(Self {
                    $($required: {
                        let address = lookup(symbols!(@name $required));
                        if address.is_null() {
                            return Err(stringify!($required));
                        }
                        // SAFETY: not null; QEMU exports this name with this type, as declared in its headers
                        // of every release that `layout` has a table for. Both sides are one pointer wide.
                        unsafe { std::mem::transmute::<*mut c_void, $rtype>(address) }
                    },)*
                    $($optional: {
                        let address = lookup(symbols!(@name $optional));
                        // SAFETY: as above; a null pointer is None, by the layout guarantee of Option
                        // for function pointers and NonNull.
                        unsafe { std::mem::transmute::<*mut c_void, Option<$otype>>(address) }
                    },)*
                })
            }
        }
    };
    (@name $symbol:ident) => {{
        const NAME: &CStr = match CStr::from_bytes_with_nul(concat!(stringify!($symbol), "\0").as_bytes()) {
            Ok(name) => name,
            Err(_) => panic!("a symbol's name has no NUL inside"),
        };
        NAME
    }};
}

symbols! {
    required {
        aio_bh_schedule_oneshot_full:
            unsafe extern "C" fn(*mut AioContext, unsafe extern "C" fn(*mut c_void), *mut c_void, *const c_char),
        aio_co_reschedule_self: unsafe extern "C" fn(*mut AioContext),
        aio_co_wake: unsafe extern "C" fn(*mut Coroutine),
        aio_poll: unsafe extern "C" fn(*mut AioContext, bool) -> bool,
        bdrv_default_perms: unsafe extern "C" fn(),
        /// 7.2 reads all three arguments, the others two.
        bdrv_do_drained_begin_quiesce: unsafe extern "C" fn(*mut BlockDriverState, *mut c_void, usize),
        /// 7.2 reads all four arguments, the others three.
        bdrv_drain_poll: unsafe extern "C" fn(*mut BlockDriverState, usize, usize, usize) -> bool,
        bdrv_drained_end: unsafe extern "C" fn(*mut BlockDriverState),
        bdrv_drain_all_begin: unsafe extern "C" fn(),
        bdrv_drain_all_end: unsafe extern "C" fn(),
        bdrv_file: *mut BlockDriver,
        bdrv_filter_or_cow_child: unsafe extern "C" fn(*mut BlockDriverState) -> *mut BdrvChild,
        bdrv_get_format_name: unsafe extern "C" fn(*mut BlockDriverState) -> *const c_char,
        bdrv_get_node_name: unsafe extern "C" fn(*const BlockDriverState) -> *const c_char,
        bdrv_is_allocated_above: unsafe extern "C" fn(
            *mut BlockDriverState,
            *mut BlockDriverState,
            bool,
            i64,
            i64,
            *mut i64,
        ) -> c_int,
        bdrv_is_read_only: unsafe extern "C" fn(*mut BlockDriverState) -> bool,
        bdrv_next_all_states: unsafe extern "C" fn(*mut BlockDriverState) -> *mut BlockDriverState,
        bdrv_qcow2: *mut BlockDriver,
        bdrv_raw: *mut BlockDriver,
        bdrv_ref: unsafe extern "C" fn(*mut BlockDriverState),
        bdrv_register: unsafe extern "C" fn(*mut BlockDriver),
        bdrv_skip_filters: unsafe extern "C" fn(*mut BlockDriverState) -> *mut BlockDriverState,
        bdrv_unref: unsafe extern "C" fn(*mut BlockDriverState),
        blk_add_aio_context_notifier: unsafe extern "C" fn(
            *mut BlockBackend,
            unsafe extern "C" fn(*mut AioContext, *mut c_void),
            unsafe extern "C" fn(*mut c_void),
            *mut c_void,
        ),
        blk_add_remove_bs_notifier: unsafe extern "C" fn(*mut BlockBackend, *mut Notifier),
        blk_all_next: unsafe extern "C" fn(*mut BlockBackend) -> *mut BlockBackend,
        blk_bs: unsafe extern "C" fn(*mut BlockBackend) -> *mut BlockDriverState,
        blk_co_preadv: unsafe extern "C" fn(*mut BlockBackend, i64, i64, *mut QemuIoVector, c_int) -> c_int,
        blk_drain: unsafe extern "C" fn(*mut BlockBackend),
        blk_get_aio_context: unsafe extern "C" fn(*const BlockBackend) -> *mut AioContext,
        blk_get_attached_dev_id: unsafe extern "C" fn(*mut BlockBackend) -> *mut c_char,
        blk_get_perm: unsafe extern "C" fn(*mut BlockBackend, *mut u64, *mut u64),
        blk_getlength: unsafe extern "C" fn(*mut BlockBackend) -> i64,
        blk_new_open: unsafe extern "C" fn(
            *const c_char,
            *const c_char,
            *mut QDict,
            c_int,
            *mut *mut QemuError,
        ) -> *mut BlockBackend,
        blk_pwrite: unsafe extern "C" fn(*mut BlockBackend, i64, i64, *const c_void, c_int) -> c_int,
        blk_remove_aio_context_notifier: unsafe extern "C" fn(
            *mut BlockBackend,
            unsafe extern "C" fn(*mut AioContext, *mut c_void),
            unsafe extern "C" fn(*mut c_void),
            *mut c_void,
        ),
        blk_unref: unsafe extern "C" fn(*mut BlockBackend),
        error_free: unsafe extern "C" fn(*mut QemuError),
        error_get_pretty: unsafe extern "C" fn(*const QemuError) -> *const c_char,
        g_free: unsafe extern "C" fn(*mut c_void),
        iohandler_get_aio_context: unsafe extern "C" fn() -> *mut AioContext,
        notifier_remove: unsafe extern "C" fn(*mut Notifier),
        qdict_new: unsafe extern "C" fn() -> *mut QDict,
        qdict_put_str: unsafe extern "C" fn(*mut QDict, *const c_char, *const c_char),
        qemu_co_sleep_ns_wakeable: unsafe extern "C" fn(*mut CoSleep, c_uint, i64),
        qemu_co_sleep_wake: unsafe extern "C" fn(*mut CoSleep),
        qemu_coroutine_create:
            unsafe extern "C" fn(unsafe extern "C" fn(*mut c_void), *mut c_void) -> *mut Coroutine,
        qemu_coroutine_enter: unsafe extern "C" fn(*mut Coroutine),
        qemu_coroutine_self: unsafe extern "C" fn() -> *mut Coroutine,
        qemu_coroutine_yield: unsafe extern "C" fn(),
        qemu_get_aio_context: unsafe extern "C" fn() -> *mut AioContext,
        qemu_get_current_aio_context: unsafe extern "C" fn() -> *mut AioContext,
        qemu_get_vm_name: unsafe extern "C" fn() -> *const c_char,
        qemu_mutex_lock_impl: unsafe extern "C" fn(*mut QemuMutex, *const c_char, c_int),
        qemu_mutex_unlock_impl: unsafe extern "C" fn(*mut QemuMutex, *const c_char, c_int),
        register_module_init: unsafe extern "C" fn(unsafe extern "C" fn(), c_uint),
    }
    optional {
        /// Only in 7.2.
        aio_context_acquire: unsafe extern "C" fn(*mut AioContext),
        /// Only in 7.2.
        aio_context_release: unsafe extern "C" fn(*mut AioContext),
        /// Without it no image has a tag; likewise the other two.
        bdrv_cow_child: unsafe extern "C" fn(*mut BlockDriverState) -> *mut BdrvChild,
        bdrv_getlength: unsafe extern "C" fn(*mut BlockDriverState) -> i64,
        bdrv_primary_child: unsafe extern "C" fn(*mut BlockDriverState) -> *mut BdrvChild,
        /// Only in 8.0 and later.
        bdrv_drain_all_begin_nopoll: unsafe extern "C" fn(),
        /// Only in 8.0 and later.
        blk_co_block_status_above: unsafe extern "C" fn(
            *mut BlockBackend,
            *mut BlockDriverState,
            i64,
            i64,
            *mut i64,
            *mut i64,
            *mut *mut BlockDriverState,
        ) -> c_int,
        /// Only in 8.0 and later. Asserts that it is called in the main thread.
        blk_in_drain: unsafe extern "C" fn(*mut BlockBackend) -> bool,
        /// Only in programs with a monitor.
        qapi_free_VersionInfo: unsafe extern "C" fn(*mut VersionInfo),
        /// Only in system emulators.
        qemu_add_machine_init_done_notifier: unsafe extern "C" fn(*mut Notifier),
        /// Only in system emulators: 16 bytes in the order they are written.
        qemu_uuid: std::ptr::NonNull<[u8; 16]>,
        /// Only in programs with a monitor.
        qmp_query_version: unsafe extern "C" fn(*mut *mut QemuError) -> *mut VersionInfo,
    }
}

// SAFETY: the table is never changed, and the three drivers that it points to are only reached through
// `driver::Driver`, which uses atomic accesses for what changes.
unsafe impl Send for Symbols {}
// SAFETY: as above.
unsafe impl Sync for Symbols {}
