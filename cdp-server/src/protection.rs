//! The protection controller: makes real what the operator wants.
//!
//! What is wanted is in the catalog; what is, comes from agents. The two are compared on every inventory (an agent or
//! a VM came back) and every two seconds, and the difference becomes commands. Commands are idempotent at the agent, so
//! one too many does no harm; one that failed is sent again after a rest.
//!
//! A `PUT` writes the wish down first, then sends the command and waits for its result. What it answers:
//!
//! | case | answer | the wish |
//! | --- | --- | --- |
//! | the agent has done it | 200 | kept |
//! | agent or VM not there, or no answer in time | 202, the reason in the body | kept; carried out when they are back |
//! | the agent cannot switch it on | 409 `agent-refused` | taken back |
//! | the agent cannot switch it off | 409 `agent-refused` | kept: capture must not go on against the operator's will |

use core::ops::RangeInclusive;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use cdp_api::limits::{RING_MIB, SYNC_TIMEOUT_MS, THROTTLE_MS};
use cdp_api::{
    Kind, OverflowPolicy, Problem, Protection, ProtectionOptions, ProtectionPhase, ProtectionState, SyncState,
};
use journal_format::DiskId;

use crate::catalog::DiskRow;
use crate::core::Core;
use crate::error::ServerError;
use crate::fleet::{Command, LiveDisk, Mode};
use crate::limits::{COMMAND_TIMEOUT, FORGET_EVERY};
use crate::model::cut;
use crate::rest::problem::{ApiError, agent_refused};

/// What a disk needs, given what is wanted and what is. `None`: nothing, or nothing now.
fn needed(wanted: Option<bool>, live: &LiveDisk) -> Option<bool> {
    let wanted = wanted?;
    let captured = is_captured(live);
    let possible = live.refused.is_empty() || !wanted;
    (wanted != captured && possible && !live.resting).then_some(wanted)
}

fn is_captured(live: &LiveDisk) -> bool {
    live.fresh && live.mode != Mode::Off
}

/// Writes down what agents report, without what is another VM's. All that was reported before the call is written when
/// this returns, whoever writes it.
///
/// # Errors
/// When the catalog cannot be written; it is tried again the next time.
pub(crate) fn record(core: &Core) -> Result<(), ServerError> {
    let _one_at_a_time = core.recording.lock().unwrap_or_else(PoisonError::into_inner);
    let mut outcome = Ok(());
    for (session, part) in core.fleet.unwritten() {
        if let Err(error) = core.catalog.record_report(&part, core.now_ns()) {
            core.fleet.write_again(session);
            outcome = Err(error);
        }
        for disk in part.vms.iter().flat_map(|vm| &vm.disks) {
            core.write_name(disk.id);
        }
    }
    outcome
}

/// Sends what is needed to all disks that agents report now. Does not wait for results: those show in the live state.
pub(crate) fn reconcile(core: &Core, now: Instant) -> Result<(), ServerError> {
    for disk in core.catalog.disks()? {
        // An agent whose disk another host has is told too: the answer to its open decides, and may be another by now.
        for live in core.fleet.everywhere(disk.id, now) {
            let change = needed(disk.protect, &live);
            if let Some(enabled) = change.filter(|_| !live.is_held) {
                tracing::info!(disk = disk.name(), enabled, session = live.session.0, "switching protection");
            }
            let untold = is_captured(&live) && live.told != Some(disk.options) && !live.resting;
            if let Some(enabled) = change.or((disk.protect == Some(true) && untold).then_some(true)) {
                let options = enabled.then_some(disk.options);
                core.fleet.command_to(live.session, disk.id, Command::SetProtection(options), now);
            }
        }
    }
    Ok(())
}

/// What the API says of a disk's protection.
pub(crate) fn state(core: &Core, disk: &DiskRow, live: Option<&LiveDisk>, gap_open: bool) -> ProtectionState {
    let enabled = disk.protect.unwrap_or(false);
    let (phase, reason) = match (enabled, live) {
        (true, None) => (ProtectionPhase::Offline, offline(core, disk)),
        (true, Some(live)) if !live.fresh || live.mode == Mode::Off => {
            let reason = if live.refused.is_empty() { &live.last_error } else { &live.refused };
            (ProtectionPhase::Starting, reason.clone())
        }
        (true, Some(live)) if live.mode == Mode::Tracking => {
            (ProtectionPhase::Tracking, "the ring was full; history resumes after a resync".to_owned())
        }
        (true, Some(live)) if gap_open => (ProtectionPhase::Syncing, ring_differs(disk, live)),
        (true, Some(live)) => (ProtectionPhase::Protected, ring_differs(disk, live)),
        (false, Some(live)) if live.fresh && live.mode != Mode::Off => {
            (ProtectionPhase::Stopping, live.last_error.clone())
        }
        (false, Some(live)) => (ProtectionPhase::Off, live.refused.clone()),
        (false, None) => (ProtectionPhase::Off, String::new()),
    };
    let status = live.filter(|live| is_captured(live)).map(|live| &live.status);
    ProtectionState {
        enabled,
        phase,
        reason,
        options: disk.options,
        sync_state: status.map(|status| SyncState::named(&status.sync)).unwrap_or_default(),
        waiting: status.map_or(0, |status| status.waiting),
        waiting_ms: status.map_or(0, |status| status.waiting_ms),
    }
}

/// A ring keeps its size for as long as its capture lasts.
fn ring_differs(disk: &DiskRow, live: &LiveDisk) -> String {
    let now_mib = live.status.ring_bytes >> 20;
    match disk.options.ring_mib {
        Some(wanted) if now_mib > 0 && now_mib != u64::from(wanted) => format!(
            "the ring has {now_mib} MiB until the next capture, which gets {wanted}: switch protection off and on, \
             or restart the VM, when it suits you"
        ),
        _ => String::new(),
    }
}

/// The options that a `PUT` asks for: the disk's own, with what the body says.
fn asked(disk: &DiskRow, body: &Protection) -> Result<ProtectionOptions, ApiError> {
    let mut options = disk.options;
    if let Some(name) = &body.policy {
        options.policy = OverflowPolicy::named(name).ok_or_else(|| {
            let what = format!("'{}' is no policy", cut(name.clone(), 64));
            ApiError::from(Problem::new(Kind::BadValue, what, "policy is track, throttle or strict"))
        })?;
    }
    if let Some(value) = body.throttle_ms {
        options.throttle_ms = within("throttle_ms", value, THROTTLE_MS)?;
    }
    if let Some(value) = body.ring_mib {
        options.ring_mib = Some(within("ring_mib", value, RING_MIB)?);
    }
    if let Some(value) = body.sync_timeout_ms {
        options.sync_timeout_ms = within("sync_timeout_ms", value, SYNC_TIMEOUT_MS)?;
    }
    options.sync = body.sync.unwrap_or(options.sync);
    Ok(options)
}

fn within(name: &str, value: u64, range: RangeInclusive<u32>) -> Result<u32, ApiError> {
    u32::try_from(value).ok().filter(|value| range.contains(value)).ok_or_else(|| {
        let hint = format!("{name} is from {} to {}", range.start(), range.end());
        Problem::new(Kind::BadValue, format!("{name} is {value}"), hint).into()
    })
}

/// Why no agent reports a disk.
fn offline(core: &Core, disk: &DiskRow) -> String {
    if disk.host.is_some_and(|host| core.fleet.vm_runs(host, &disk.vm)) {
        return "the VM runs but has no such disk now: unplugged, or known under another name since QEMU was started \
                anew; protection starts when it is back, or unprotect it and protect the one it has become"
            .to_owned();
    }
    "the host's agent is not connected or the VM does not run; protection starts when both are back"
        .to_owned()
}

/// Whether the wish is already a fact, or has still to become one.
pub(crate) enum Outcome {
    /// The agent has done it.
    Done,
    /// It will be done; why not yet, is said here.
    Pending(String),
}

/// Carries out a `PUT`. Waits at most [`COMMAND_TIMEOUT`].
pub(crate) async fn set(core: &Arc<Core>, disk: &DiskRow, body: &Protection) -> Result<Outcome, ApiError> {
    let (enabled, options) = (body.enabled, asked(disk, body)?);
    if enabled && let Some(problem) = impossible(core, disk) {
        return Err(problem.into());
    }
    persist(core, disk.id, Some(enabled), options).await?;
    let command = Command::SetProtection(enabled.then_some(options));
    let Some(result) = core.fleet.command(disk.id, command, Instant::now()) else {
        return Ok(if enabled { Outcome::Pending(offline(core, disk)) } else { Outcome::Done });
    };
    match tokio::time::timeout(COMMAND_TIMEOUT, result).await {
        Ok(Ok(result)) if result.error.is_empty() => Ok(Outcome::Done),
        Ok(Ok(result)) => {
            if enabled {
                persist(core, disk.id, disk.protect, disk.options).await?;
            }
            Err(agent_refused(&result.error).into())
        }
        Ok(Err(_)) => {
            Ok(Outcome::Pending("the connection to the host's agent broke; it will be told again".to_owned()))
        }
        Err(_) => Ok(Outcome::Pending("the host's agent is still at it; ask again for the state".to_owned())),
    }
}

/// The agent says beforehand that it cannot protect the disk.
fn impossible(core: &Core, disk: &DiskRow) -> Option<Problem> {
    let live = core.fleet.live(disk.id, Instant::now())?;
    (!live.refused.is_empty()).then(|| agent_refused(&live.refused))
}

async fn persist(
    core: &Arc<Core>,
    id: DiskId,
    protect: Option<bool>,
    options: ProtectionOptions,
) -> Result<(), ApiError> {
    let core = Arc::clone(core);
    let done = tokio::task::spawn_blocking(move || {
        core.catalog.set_options(id, &options)?;
        core.catalog.set_protect(id, protect)
    })
    .await;
    let done =
        done.map_err(|_| Problem::new(Kind::Internal, "the catalog's task failed", "see the server's log"))?;
    Ok(done?)
}

/// Compares what is wanted and what is, and looks after what nobody else does, until the receiver's sender is dropped.
pub(crate) fn reconcile_loop(core: &Core, stop: &std::sync::mpsc::Receiver<()>, every: Duration) {
    let mut forgot = Instant::now();
    while stop.recv_timeout(every) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
        if let Err(error) = record(core) {
            tracing::error!(%error, "cannot write down what agents report; trying again");
        }
        if let Err(error) = reconcile(core, Instant::now()) {
            tracing::error!(%error, "cannot compare wanted and real protection; trying again");
        }
        core.note_found();
        if forgot.elapsed() >= FORGET_EVERY {
            core.store.forget_unused();
            forgot = Instant::now();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn live(mode: Mode) -> LiveDisk {
        LiveDisk { mode, fresh: true, ..LiveDisk::default() }
    }

    #[test]
    fn only_a_difference_makes_a_command() {
        let capturing = live(Mode::Capturing);
        let off = live(Mode::Off);
        assert_eq!(needed(Some(true), &off), Some(true));
        assert_eq!(needed(Some(true), &capturing), None);
        assert_eq!(needed(Some(false), &capturing), Some(false));
        assert_eq!(needed(Some(false), &off), None);
        assert_eq!(needed(Some(true), &live(Mode::Tracking)), None, "a resync is the agent's own business");
        assert_eq!(needed(None, &capturing), None, "a wish that was lost is not guessed");
    }

    #[test]
    fn what_rests_or_cannot_be_is_left_alone() {
        assert_eq!(needed(Some(true), &LiveDisk { resting: true, ..live(Mode::Off) }), None);
        let refused = "unknown QEMU".to_owned();
        assert_eq!(needed(Some(true), &LiveDisk { refused: refused.clone(), ..live(Mode::Off) }), None);
        assert_eq!(needed(Some(false), &LiveDisk { refused, ..live(Mode::Capturing) }), Some(false));
    }
}
