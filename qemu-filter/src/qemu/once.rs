//! One copy of the library works in a process; a second one stays idle.
//!
//! Two copies would each replace the other's callbacks and capture every write twice. They can come together:
//! preloaded and loaded into the running process as well, or loaded twice from two files. Each copy has statics of its
//! own, so the mark is one that all of the process sees: a named mapping. It outlives a fork into the background and
//! ends with the program.

use std::ffi::CStr;

/// Name of the mapping, as `/proc/self/maps` shows it behind `/memfd:`.
const MARK: &CStr = c"cdp-filter-loaded";
const MARK_BYTES: usize = 4096;

/// Claims the process for this copy; `false` when another copy has it. Called by constructors, which the dynamic
/// linker runs one after another.
///
/// # Errors
/// When the mark can be neither looked for nor made.
pub(crate) fn claim() -> std::io::Result<bool> {
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    if maps.contains(&*MARK.to_string_lossy()) {
        return Ok(false);
    }
    make_mark().map(|()| true)
}

fn make_mark() -> std::io::Result<()> {
    // SAFETY: a name that ends with a NUL.
    let fd = unsafe { libc::memfd_create(MARK.as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    let anywhere = std::ptr::null_mut();
    // SAFETY: a new mapping at an address of the kernel's choice; nobody ever reads it.
    let mapped = unsafe { libc::mmap(anywhere, MARK_BYTES, libc::PROT_NONE, libc::MAP_SHARED, fd, 0) };
    let answer = if mapped == libc::MAP_FAILED { Err(std::io::Error::last_os_error()) } else { Ok(()) };
    // SAFETY: opened above and used nowhere else; the mapping keeps the file.
    unsafe { libc::close(fd) };
    answer
}
