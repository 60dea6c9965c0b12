//! Checks of whole journals: in the background, one disk at a time, with progress; the last of each disk is kept.
//!
//! A check reads everything a disk has stored, at the pace of the store's volume. One at a time, so that a check of all
//! disks disturbs ingest no more than that of one. Results live as long as the server.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cdp_api::limits::MAX_DAMAGED_PARTS;
use cdp_api::{DamagedPart, Verification, VerificationState, time};
use journal_format::{DiskId, Lsn};
use journal_store::{Damage, DiskStore};

use crate::core::Core;
use crate::error::ServerError;

/// The checks that were begun.
#[derive(Debug, Default)]
pub(crate) struct Checks {
    disks: Mutex<HashMap<DiskId, Verification>>,
    /// Held by the one that reads.
    turn: Mutex<()>,
}

impl Checks {
    /// The last check of a disk.
    pub(crate) fn of(&self, disk: DiskId) -> Option<Verification> {
        self.lock().get(&disk).cloned()
    }

    fn change(&self, disk: DiskId, change: impl FnOnce(&mut Verification)) {
        if let Some(check) = self.lock().get_mut(&disk) {
            change(check);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<DiskId, Verification>> {
        self.disks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Begins a check, unless one of the disk is under way; says how it is.
///
/// # Errors
/// `Io` when no thread can be started.
pub(crate) fn start(core: &Arc<Core>, disk: Arc<DiskStore>) -> Result<Verification, ServerError> {
    let (id, started) = (disk.id(), time::rfc3339(core.now_ns()));
    let mut checks = core.checks.lock();
    if let Some(check) = checks.get(&id).filter(|check| check.state != VerificationState::Done) {
        return Ok(check.clone());
    }
    let check = Verification {
        disk: id.to_string(),
        state: VerificationState::Waiting,
        started,
        done_bytes: 0,
        total_bytes: 0,
        first_lsn: 0,
        last_lsn: 0,
        damage: Vec::new(),
        more_damage: false,
    };
    let core = Arc::clone(core);
    let shared = Arc::clone(&core);
    let thread = std::thread::Builder::new().name("cdp-verify".to_owned()).spawn(move || run(&shared, &disk));
    thread.map_err(|e| ServerError::io("start thread", "cdp-verify", e))?;
    checks.insert(id, check.clone());
    Ok(check)
}

fn run(core: &Core, disk: &DiskStore) {
    let (checks, id) = (&core.checks, disk.id());
    // It guards no data, only an order.
    let _turn = checks.turn.lock().unwrap_or_else(PoisonError::into_inner);
    checks.change(id, |check| check.state = VerificationState::Running);
    let found = disk.verify(Lsn::FIRST..=Lsn::MAX, &mut |progress| {
        checks.change(id, |check| {
            (check.done_bytes, check.total_bytes) = (progress.done_bytes, progress.total_bytes);
        });
        ControlFlow::Continue(())
    });
    match found.damage.iter().find(|damage| damage.kind.loses_points()).or(found.damage.first()) {
        Some(damage) => core.faults.note_damage(damage, core.now_ns()),
        None => core.faults.whole(id),
    }
    tracing::info!(disk = %id, damaged_parts = found.damage.len(), bytes = found.data_bytes, "journal checked");
    checks.change(id, |check| {
        (check.first_lsn, check.last_lsn) = found.checked.map_or((0, 0), |(first, last)| (first.0, last.0));
        check.more_damage = found.damage.len() > MAX_DAMAGED_PARTS;
        check.damage = found.damage.iter().take(MAX_DAMAGED_PARTS).map(part).collect();
        check.state = VerificationState::Done;
    });
}

fn part(damage: &Damage) -> DamagedPart {
    DamagedPart {
        kind: damage.kind.as_str().to_owned(),
        file: damage.path.display().to_string(),
        offset: damage.offset,
        first_lsn: damage.first_lsn.0,
        last_lsn: damage.last_lsn.0,
        loses_points: damage.kind.loses_points(),
        detail: damage.detail.clone(),
        hint: damage.kind.advice().to_owned(),
    }
}
