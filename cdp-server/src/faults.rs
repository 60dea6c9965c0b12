//! What keeps a disk's journal from taking frames, or parts of it from being read: noticed where it happens, shown by
//! REST, metrics and log until it is over.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::sync::{Mutex, MutexGuard, PoisonError};

use cdp_api::{Fault, FaultKind, time};
use journal_format::{DiskId, Lsn};
use journal_store::{Damage, StoreError};

use crate::fleet::LiveDisk;

/// The faults there are now.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    /// With the last LSN that was durable when it began.
    disks: Mutex<HashMap<DiskId, (Fault, Lsn)>>,
}

impl Faults {
    /// Notes that the store failed for a disk whose journal is durable up to `durable`. What is known already keeps its time,
    /// and is not logged again.
    pub(crate) fn note(&self, disk: DiskId, error: &StoreError, durable: Lsn, now_ns: u64) {
        let Some(kind) = kind_of(error) else { return };
        let mut disks = self.lock();
        // What poisoned a disk was noted when it happened, with its own kind.
        if disks
            .get(&disk)
            .is_some_and(|(known, _)| known.kind == kind || matches!(error, StoreError::Poisoned { .. }))
        {
            return;
        }
        let (message, since) = (error.to_string(), time::rfc3339(now_ns));
        let hint = match error {
            StoreError::Io { source, .. } if daemon::advice(source) == daemon::MORE_FILES => {
                daemon::MORE_FILES
            }
            _ => hint(kind),
        };
        let fault = Fault { kind, message, hint: hint.to_owned(), since };
        log(disk, &fault);
        disks.insert(disk, (fault, durable));
    }

    /// Notes what opening a journal, or checking it, found damaged.
    pub(crate) fn note_damage(&self, damage: &Damage, now_ns: u64) {
        let (file, from, kind) = (damage.path.display(), damage.first_lsn, FaultKind::Damaged);
        let upto =
            if damage.last_lsn == Lsn::MAX { "the end".to_owned() } else { damage.last_lsn.to_string() };
        let message =
            format!("{file} is damaged at byte {}, lsn {from} to {upto}: {}", damage.offset, damage.detail);
        let (hint, since) = (damage.kind.advice().to_owned(), time::rfc3339(now_ns));
        let fault = Fault { kind, message, hint, since };
        let mut disks = self.lock();
        if disks.get(&damage.disk).is_none_or(|(known, _)| known.kind != kind) {
            log(damage.disk, &fault);
            disks.insert(damage.disk, (fault, Lsn::ZERO));
        }
    }

    /// Notes that a disk's journal is durable up to `durable`. A fault is over when that is more than there was; a journal that
    /// only was opened again has proven nothing. Damage does not go away by that.
    pub(crate) fn over(&self, disk: DiskId, durable: Lsn) {
        self.clear(disk, |fault, before| fault.kind != FaultKind::Damaged && durable > before);
    }

    /// Notes that a disk's journal was found whole.
    pub(crate) fn whole(&self, disk: DiskId) {
        self.clear(disk, |fault, _| fault.kind == FaultKind::Damaged);
    }

    fn clear(&self, disk: DiskId, is_over: impl Fn(&Fault, Lsn) -> bool) {
        let mut disks = self.lock();
        if disks.get(&disk).is_some_and(|(fault, before)| is_over(fault, *before))
            && let Some((fault, _)) = disks.remove(&disk)
        {
            tracing::info!(%disk, kind = fault.kind.as_str(), since = fault.since, "the journal works again");
        }
    }

    pub(crate) fn of(&self, disk: DiskId) -> Option<Fault> {
        self.lock().get(&disk).map(|(fault, _)| fault.clone())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<DiskId, (Fault, Lsn)>> {
        self.disks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The fault of a disk whose host cannot write to its spool.
pub(crate) fn spool(live: &LiveDisk) -> Option<Fault> {
    let since = live.spool_failing_since.filter(|_| live.fresh)?;
    let message = format!("the spool of the disk's host fails: {}", live.status.spool_trouble);
    let kind = FaultKind::SpoolFailing;
    Some(Fault { kind, message, hint: hint(kind).to_owned(), since: time::rfc3339(since.0) })
}

fn log(disk: DiskId, fault: &Fault) {
    tracing::error!(%disk, kind = fault.kind.as_str(), error = fault.message, hint = fault.hint, "the journal fails");
}

/// `None` for errors that are the caller's, not the store's.
fn kind_of(error: &StoreError) -> Option<FaultKind> {
    match error {
        StoreError::Io { source, .. } => Some(match source.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
                FaultKind::DiskFull
            }
            _ => FaultKind::IoError,
        }),
        StoreError::Poisoned { .. } => Some(FaultKind::IoError),
        StoreError::Damaged { .. } => Some(FaultKind::Damaged),
        _ => None,
    }
}

/// What to do about it.
pub(crate) const fn hint(kind: FaultKind) -> &'static str {
    match kind {
        FaultKind::DiskFull => {
            "free space in the store's file system or enlarge it; nothing acknowledged is lost, the agent keeps the \
             rest and tries again every few seconds"
        }
        FaultKind::IoError => {
            "look at the store's disk and file system (the kernel's log, smartctl); the journal is opened anew, and \
             goes on by itself once writing works"
        }
        FaultKind::SpoolFailing => {
            "see that the agent's user can write to --spool-dir and that there is space; until then a server that is away, or \
             slow, soon costs a gap"
        }
        FaultKind::Damaged => {
            "cdpctl verify shows what is damaged; put back a copy of the file and restart the server, or restore points \
             that do not need it"
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: DiskId = DiskId([1; 16]);

    fn io(kind: ErrorKind) -> StoreError {
        StoreError::Io { operation: "write", path: "/x".into(), source: kind.into() }
    }

    #[test]
    fn a_full_disk_stays_one_while_the_poison_it_left_is_met_again() {
        let faults = Faults::default();
        faults.note(DISK, &io(ErrorKind::StorageFull), Lsn(7), 1);
        let first = faults.of(DISK).expect("noted");
        assert_eq!(first.kind, FaultKind::DiskFull);
        faults.note(DISK, &StoreError::Poisoned { disk: DISK, cause: "write".to_owned() }, Lsn(7), 2);
        faults.note(DISK, &io(ErrorKind::StorageFull), Lsn(7), 3);
        assert_eq!(faults.of(DISK).as_ref(), Some(&first));
        faults.over(DISK, Lsn(7));
        assert_eq!(faults.of(DISK), Some(first), "nothing more is durable than when it began");
        faults.over(DISK, Lsn(8));
        assert_eq!(faults.of(DISK), None);
    }

    #[test]
    fn a_frame_that_does_not_follow_is_no_fault_of_the_disk() {
        let faults = Faults::default();
        faults.note(DISK, &StoreError::Invalid { disk: DISK, detail: "a hole".to_owned() }, Lsn(7), 1);
        assert_eq!(faults.of(DISK), None);
    }
}
