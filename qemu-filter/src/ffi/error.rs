//! Errors for C: a negative errno, and a text for people.

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_int};

use crate::engine::guard;

thread_local! {
    /// The text of this thread's last failed call.
    static LAST: RefCell<CString> = RefCell::default();
}

/// Why a call failed.
#[derive(Debug)]
pub(super) struct Failure {
    errno: c_int,
    text: String,
}

impl Failure {
    pub(super) fn new(errno: c_int, text: impl Into<String>) -> Self {
        Self { errno, text: text.into() }
    }

    pub(super) fn invalid(text: impl Into<String>) -> Self {
        Self::new(libc::EINVAL, text)
    }
}

/// Runs the body of a C function: 0, or a negative errno and the text kept for `cdp_last_error`.
pub(super) fn boundary(work: impl FnOnce() -> Result<(), Failure>) -> c_int {
    let failure = match guard(work) {
        Ok(Ok(())) => return 0,
        Ok(Err(failure)) => failure,
        Err(panic) => Failure::new(libc::EIO, format!("a bug in the capture library: {panic}")),
    };
    let text = CString::new(failure.text.replace('\0', " ")).unwrap_or_default();
    // A thread that is just ending has no place for the text any more; the errno has to do.
    let _ = LAST.try_with(|last| last.replace(text));
    -failure.errno
}

/// The text of this thread's last failed call; valid until its next one.
pub(super) fn last_error() -> *const std::ffi::c_char {
    const NONE: &CStr = c"";
    LAST.try_with(|last| last.borrow().as_ptr()).unwrap_or(NONE.as_ptr())
}
