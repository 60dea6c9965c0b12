//! Lock files: what only one agent may use is one agent's for as long as it lives, however it ends.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Why a lock was not taken.
#[derive(Debug)]
pub(crate) enum LockError {
    /// Another agent has it; the number of its process, as far as known.
    Held(String),
    /// The system's answer.
    Os(io::Error),
}

/// Takes the lock in the file at `path`, which is made where it is missing. It is given back when the file is closed.
pub(crate) fn take(path: &Path) -> Result<File, LockError> {
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
    let mut file = file.map_err(LockError::Os)?;
    match file.try_lock() {
        Ok(()) => {
            let text = format!("{}\n", std::process::id());
            // For people, and a proof that the place can be written to.
            file.set_len(0).and_then(|()| file.write_all(text.as_bytes())).map_err(LockError::Os)?;
            Ok(file)
        }
        Err(TryLockError::WouldBlock) => {
            let mut pid = String::new();
            let _ = file.read_to_string(&mut pid);
            Err(LockError::Held(pid.trim().to_owned()))
        }
        Err(TryLockError::Error(error)) => Err(LockError::Os(error)),
    }
}
