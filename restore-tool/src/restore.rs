//! One restore from beginning to end: check the target, copy, verify, give it its name.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use cdp_api::ResolvedPoint;
use serde::Serialize;

use crate::copy::{self, Pass};
use crate::error::RestoreError;
use crate::source::{DiskName, Image};
use crate::target::{Format, Target};

/// What to restore to, and how.
#[derive(Clone, Debug)]
pub struct Order {
    /// File or block device to write.
    pub output: PathBuf,
    /// Format of the image.
    pub format: Format,
    /// Overwrite a target that is not empty.
    pub force: bool,
}

/// What was done.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Report {
    /// Whose disk.
    pub disk: DiskName,
    /// The point that was restored.
    pub point: ResolvedPoint,
    /// The file or device that was written.
    pub output: PathBuf,
    /// Its format.
    pub format: Format,
    /// Size of the disk in bytes.
    pub disk_bytes: u64,
    /// Bytes that were written; the rest are zeroes.
    pub data_bytes: u64,
    /// Whether the target was read back and compared; a restore that could not be verified is an error, so `true`.
    pub verified: bool,
    /// What else is worth knowing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remark: Option<String>,
    /// How long it took, in seconds.
    pub duration_s: f64,
}

/// A failed restore, and the state in which it left the target.
#[derive(Debug)]
pub struct Failure {
    /// What went wrong.
    pub error: RestoreError,
    /// What the target holds now, as a sentence; `None` when it was not touched at all.
    pub left: Option<String>,
}

impl From<RestoreError> for Failure {
    fn from(error: RestoreError) -> Self {
        Self { error, left: None }
    }
}

/// What stops a restore, from any thread.
#[derive(Debug, Default)]
pub struct Stop {
    asked: AtomicBool,
    reached: Mutex<Reached>,
}

/// How far a restore is, as far as stopping it is concerned.
#[derive(Debug, Default)]
enum Reached {
    /// Nothing is written.
    #[default]
    Nothing,
    /// The target is being written, through that temporary file if it is a file.
    Writing { temporary: Option<PathBuf>, left: String },
    /// The target is the finished image.
    Complete,
}

impl Stop {
    /// Asks the restore to stop at the next block; false when it was asked before.
    pub fn ask(&self) -> bool {
        // ORDERING: Relaxed; the flag stands alone, no other memory is published with it.
        !self.asked.swap(true, Ordering::Relaxed)
    }

    pub(crate) fn is_asked(&self) -> bool {
        // ORDERING: Relaxed; as in `ask`.
        self.asked.load(Ordering::Relaxed)
    }

    /// For a process that is about to end without waiting for the restore: removes what is temporary and says what is
    /// left, as in [`Failure::left`]. `None` when the restore is complete: it had better be let finish.
    #[must_use]
    pub fn abandon(&self) -> Option<Option<String>> {
        match &*self.reached() {
            Reached::Nothing => Some(None),
            Reached::Writing { temporary: None, left } => Some(Some(left.clone())),
            Reached::Writing { temporary: Some(temporary), left } => {
                Some(Some(match fs::remove_file(temporary) {
                    Ok(()) => left.clone(),
                    Err(error) => {
                        format!(
                            "{left}; the temporary file {} could not be removed ({error})",
                            temporary.display()
                        )
                    }
                }))
            }
            Reached::Complete => None,
        }
    }

    fn reached(&self) -> MutexGuard<'_, Reached> {
        self.reached.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The stages of a restore, for showing progress.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stage {
    /// Copying.
    Copy,
    /// Reading back.
    Verify,
}

/// Told the stage, and the position reached on the disk in bytes.
pub type OnProgress<'a> = &'a dyn Fn(Stage, u64);

/// Restores `image` as `order` says. `stop` may be asked at any time by a signal handler. The target's name means the
/// new image only after it was written, made durable, read back and found equal.
///
/// # Errors
/// See [`RestoreError`]; [`Failure::left`] and [`crate::target`] say what is left.
pub fn restore(
    image: &mut dyn Image,
    order: &Order,
    stop: &Stop,
    on_progress: OnProgress,
) -> Result<Report, Failure> {
    let begin = Instant::now();
    let target = Target::prepare(&order.output, order.format, image.disk_bytes(), order.force)?;
    let left = target.after_failure();
    *stop.reached() = Reached::Writing { temporary: target.temporary(), left: left.clone() };
    let (output, remark) = (target.path().to_owned(), target.remark(image.disk_bytes()));
    let outcome = write(image, target, order.format, stop, on_progress);
    let data_bytes = outcome.map_err(|error| Failure { error, left: Some(left) })?;
    Ok(Report {
        disk: image.disk().clone(),
        point: image.point().clone(),
        output,
        format: order.format,
        disk_bytes: image.disk_bytes(),
        data_bytes,
        verified: true,
        remark,
        duration_s: begin.elapsed().as_secs_f64(),
    })
}

/// Copies, verifies and commits; returns the bytes that are not holes.
fn write(
    image: &mut dyn Image,
    target: Target,
    format: Format,
    stop: &Stop,
    on_progress: OnProgress,
) -> Result<u64, RestoreError> {
    let mut output = target.output(format, image.disk_bytes())?;
    let path = target.path().to_owned();
    let copying = |position| on_progress(Stage::Copy, position);
    let written = copy::copy(image, output.as_mut(), &Pass { path: &path, stop, progress: &copying })?;
    let verifying = |position| on_progress(Stage::Verify, position);
    copy::verify(output.as_mut(), &written, &Pass { path: &path, stop, progress: &verifying })?;
    drop(output);
    // Held over the renaming: whoever abandons the restore sees it either before or after.
    let mut reached = stop.reached();
    target.commit()?;
    *reached = Reached::Complete;
    Ok(written.data_bytes)
}
