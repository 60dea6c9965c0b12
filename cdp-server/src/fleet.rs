//! The live state: which agents are connected, which disks they report, how those are doing, and which commands wait
//! for an answer. Nothing here outlives the process; what has to is in the catalog.
//!
//! One lock, never held over I/O. `now` is an argument throughout.

mod claims;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use cdp_api::{Conflict, OverflowPolicy, ProtectionOptions};
use journal_format::wire::{self, CommandResult, DiskStatus};
use journal_format::{DiskId, Epoch, Lsn, Stamp};
use tokio::sync::oneshot;

pub(crate) use self::claims::{LiveDisk, Mode};

use self::claims::{Claims, Live};
use crate::data::peer::Peer;
use crate::data::plane::SessionId;
use crate::limits::MAX_REASON_BYTES;
use crate::model::{DiskReport, HostId, HostReport, cut};

#[derive(Debug, Default)]
struct Inner {
    last_number: u64,
    sessions: HashMap<SessionId, Arc<Peer>>,
    disks: HashMap<DiskId, Claims>,
    /// Which host has which disk, connected or not, and its epoch.
    owners: HashMap<DiskId, (HostId, Epoch)>,
    /// What each session reported last.
    reports: HashMap<SessionId, HostReport>,
    /// Sessions whose reports the catalog has yet to learn: they are new, or another VM than before has the disk now.
    unwritten: BTreeSet<SessionId>,
    pending: HashMap<u64, Pending>,
}

#[derive(Debug)]
struct Pending {
    session: SessionId,
    disk: DiskId,
    /// Which VM's disk it was about.
    vm_pid: u32,
    protection: Option<Option<ProtectionOptions>>,
    answer: oneshot::Sender<CommandResult>,
}

/// A command that an agent was sent.
#[derive(Debug)]
pub(crate) enum Command {
    /// Switch protection on, in this way, or off.
    SetProtection(Option<ProtectionOptions>),
    /// Put a bookmark into the stream.
    InsertBookmark(String),
}

/// All connected agents.
#[derive(Debug, Default)]
pub(crate) struct Fleet {
    inner: Mutex<Inner>,
}

impl Fleet {
    /// A number for a new connection.
    pub(crate) fn next_session(&self) -> SessionId {
        SessionId(self.lock().next_number())
    }

    pub(crate) fn connected(&self, peer: &Arc<Peer>) {
        self.lock().sessions.insert(peer.id, Arc::clone(peer));
    }

    /// Forgets a connection: its disks are no longer online, its commands will not be answered.
    pub(crate) fn disconnected(&self, session: SessionId) {
        let mut inner = self.lock();
        inner.sessions.remove(&session);
        inner.unwritten.remove(&session);
        inner.pending.retain(|_, pending| pending.session != session);
        let host = inner.reports.remove(&session).map(|report| report.id);
        let owned = inner.owners.iter().filter(|(_, (owner, _))| Some(*owner) == host);
        let owned: Vec<DiskId> = owned.map(|(disk, _)| *disk).collect();
        for disk in owned {
            inner.wake(disk);
        }
        inner.keep_claims(|live| live.session != session);
    }

    /// Closes every connection.
    pub(crate) fn close_all(&self, reason: &str) {
        let peers: Vec<_> = self.lock().sessions.values().cloned().collect();
        for peer in peers {
            peer.close(reason);
        }
    }

    pub(crate) fn agents(&self) -> usize {
        self.lock().sessions.len()
    }

    /// Whether an agent of that host is connected and has said what it has.
    pub(crate) fn has_agent(&self, host: HostId) -> bool {
        self.lock().reports.values().any(|report| report.id == host)
    }

    /// Takes over what a connection reports; it replaces what the same connection reported before, and of the same
    /// disks what an older connection of its host did. The catalog has to learn of it: [`Fleet::unwritten`].
    pub(crate) fn reported(&self, session: SessionId, host: &HostReport) {
        let mut inner = self.lock();
        let mut reported = HashSet::new();
        for vm in &host.vms {
            for disk in &vm.disks {
                reported.insert((disk.id, vm.pid));
                inner.disks.entry(disk.id).or_default().report(session, host, vm, disk);
            }
        }
        let disks: HashSet<DiskId> = reported.iter().map(|(disk, _)| *disk).collect();
        inner.reports.insert(session, host.clone());
        inner.unwritten.insert(session);
        inner.keep_claims(|live| {
            let of_host = live.host == host.id && disks.contains(&live.disk());
            !(live.session == session || of_host) || reported.contains(&(live.disk(), live.vm_pid))
        });
        for disk in disks {
            inner.settle(disk);
        }
    }

    /// The reports that the catalog has yet to learn, each without the disks that are another VM's. They count as
    /// written from now on; see [`Fleet::write_again`].
    pub(crate) fn unwritten(&self) -> Vec<(SessionId, HostReport)> {
        let mut inner = self.lock();
        let sessions = std::mem::take(&mut inner.unwritten);
        let mut reports = Vec::new();
        for session in sessions {
            let Some(mut report) = inner.reports.get(&session).cloned() else { continue };
            for vm in &mut report.vms {
                let is_current = |disk: &DiskReport| {
                    let current = inner.disks.get(&disk.id).and_then(Claims::current);
                    current.is_none_or(|live| live.session == session && live.vm_pid == vm.pid)
                };
                vm.disks.retain(is_current);
            }
            report.vms.retain(|vm| !vm.disks.is_empty());
            reports.push((session, report));
        }
        reports
    }

    /// The catalog could not learn of that session's report.
    pub(crate) fn write_again(&self, session: SessionId) {
        let mut inner = self.lock();
        if inner.reports.contains_key(&session) {
            inner.unwritten.insert(session);
        }
    }

    /// Which host had a disk before the server started, with which epoch.
    pub(crate) fn had(&self, disk: DiskId, host: HostId, epoch: Epoch) {
        self.lock().owners.insert(disk, (host, epoch));
    }

    /// A session has opened a disk for its host, which owns it.
    pub(crate) fn opened(&self, session: SessionId, host: HostId, disk: DiskId, epoch: Epoch) {
        let mut inner = self.lock();
        inner.owners.insert(disk, (host, epoch));
        let Some(claims) = inner.disks.get_mut(&disk) else { return };
        claims.forget_captures_but_of(host);
        claims.newest_epoch = epoch.0;
        if let Some(live) = claims.of(session) {
            live.held.clear();
            if live.status.epoch != epoch.0 {
                live.begin_epoch();
            }
        }
        inner.settle(disk);
    }

    /// A session was refused a disk that another host has.
    pub(crate) fn held(&self, session: SessionId, disk: DiskId, why: String) {
        let mut inner = self.lock();
        if let Some(live) = inner.disks.get_mut(&disk).and_then(|claims| claims.of(session)) {
            live.held = why;
        }
    }

    /// A disk was given up.
    pub(crate) fn closed(&self, disk: DiskId) {
        let mut inner = self.lock();
        inner.owners.remove(&disk);
        inner.wake(disk);
        inner.settle(disk);
    }

    /// Takes over a disk's status. Ignored from a connection that does not report the disk, or when another host has
    /// it, and for an epoch that is over.
    pub(crate) fn status(&self, session: SessionId, disk: DiskId, status: DiskStatus, now: Instant) {
        let mut inner = self.lock();
        let owner = inner.owners.get(&disk).copied();
        let Some(live) = inner.disks.get_mut(&disk).and_then(|claims| claims.of(session)) else { return };
        let of_owner = owner.is_none_or(|(host, epoch)| (host, epoch.0) == (live.host, status.epoch));
        if !of_owner || live.of_another >= status.epoch.max(1) {
            return;
        }
        live.mode = Mode::from_wire(&status.mode);
        live.mode_at = Some(now);
        if live.mode == Mode::Capturing {
            live.mark(Stamp(status.host_stamp), Lsn(status.captured_lsn));
        }
        live.spool_failing_since = (!status.spool_trouble.is_empty())
            .then(|| live.spool_failing_since.unwrap_or(Stamp(status.host_stamp)));
        live.status = status;
    }

    /// Up to which instant of its host's clock everything is durable, given the last durable LSN. `None` when the disk
    /// is not being captured right now: then nobody knows what came after its newest record.
    pub(crate) fn covered_until(&self, disk: DiskId, durable: Lsn, now: Instant) -> Option<Stamp> {
        let mut inner = self.lock();
        let live = inner.disks.get_mut(&disk)?.current_mut()?;
        (live.mode == Mode::Capturing && live.is_fresh(now)).then(|| live.cover(durable))
    }

    /// The state of a disk that an agent reports now.
    pub(crate) fn live(&self, disk: DiskId, now: Instant) -> Option<LiveDisk> {
        Some(self.lock().disks.get(&disk)?.current()?.snapshot(now))
    }

    /// The state of a disk at every agent that reports it now.
    pub(crate) fn everywhere(&self, disk: DiskId, now: Instant) -> Vec<LiveDisk> {
        let mut inner = self.lock();
        let Some(claims) = inner.disks.get_mut(&disk) else { return Vec::new() };
        let sessions = claims.sessions();
        sessions.into_iter().filter_map(|session| Some(claims.of(session)?.snapshot(now))).collect()
    }

    /// Who claims a disk and does not have it.
    pub(crate) fn conflicts(&self, disk: DiskId) -> Vec<Conflict> {
        self.lock().disks.get(&disk).map(Claims::conflicts).unwrap_or_default()
    }

    /// Whether that VM runs: an agent reports a disk of it.
    pub(crate) fn vm_runs(&self, host: HostId, vm: &str) -> bool {
        self.lock().disks.values().flat_map(Claims::iter).any(|live| live.host == host && live.vm == vm)
    }

    /// Sends a command to the agent that has the disk. The answer comes through the receiver, which fails when
    /// the connection ends first. `None` when no agent reports the disk.
    pub(crate) fn command(
        &self,
        disk: DiskId,
        command: Command,
        now: Instant,
    ) -> Option<oneshot::Receiver<CommandResult>> {
        let session = self.lock().disks.get(&disk)?.current()?.session;
        self.command_to(session, disk, command, now)
    }

    /// As [`Fleet::command`], to one of the agents that report the disk.
    pub(crate) fn command_to(
        &self,
        session: SessionId,
        disk: DiskId,
        command: Command,
        now: Instant,
    ) -> Option<oneshot::Receiver<CommandResult>> {
        let (answer, result) = oneshot::channel();
        let mut inner = self.lock();
        let request = inner.next_number();
        let live = inner.disks.get_mut(&disk)?.of(session)?;
        let protection = match &command {
            Command::SetProtection(options) => Some(*options),
            Command::InsertBookmark(_) => None,
        };
        if protection.is_some() {
            live.last_command = Some(now);
            live.command_running = true;
        }
        let vm_pid = live.vm_pid;
        let peer = Arc::clone(inner.sessions.get(&session)?);
        inner.pending.insert(request, Pending { session, disk, vm_pid, protection, answer });
        drop(inner);
        let disk = disk.0.to_vec();
        let sent = match command {
            Command::SetProtection(options) => {
                let enabled = options.is_some();
                peer.send(&wire::SetProtection { request, disk, enabled, options: options.map(to_wire) })
            }
            Command::InsertBookmark(name) => peer.send(&wire::InsertBookmark { request, disk, name }),
        };
        if !sent {
            self.lock().pending.remove(&request);
            return None;
        }
        Some(result)
    }

    /// Takes over what became of a command. It says nothing of another VM that has the disk by now.
    pub(crate) fn completed(&self, session: SessionId, mut result: CommandResult, now: Instant) {
        result.error = cut(result.error, MAX_REASON_BYTES);
        let mut inner = self.lock();
        let pending = inner.pending.remove(&result.request);
        let Some(pending) = pending.filter(|pending| pending.session == session) else { return };
        let owner = inner.owners.get(&pending.disk).map(|(host, _)| *host);
        let claims = inner.disks.get_mut(&pending.disk);
        if let Some(live) = claims.and_then(|claims| claims.of_vm(session, pending.vm_pid))
            && let Some(options) = pending.protection
        {
            live.command_running = false;
            live.last_error.clone_from(&result.error);
            // An agent may think that it captures a disk that is another host's by now.
            if result.error.is_empty() && owner.is_none_or(|host| host == live.host) {
                // Until the next status says more, the command's success is what is known.
                live.mode = if options.is_some() { live.mode.max_capturing() } else { Mode::Off };
                live.told = options;
                live.mode_at = Some(now);
            }
        }
        // Whoever asked may have given up waiting.
        let _ = pending.answer.send(result);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn to_wire(options: ProtectionOptions) -> wire::ProtectionOptions {
    wire::ProtectionOptions {
        overflow: match options.policy {
            OverflowPolicy::Track => 0,
            OverflowPolicy::Throttle => 1,
            OverflowPolicy::Strict => 2,
        },
        throttle_ms: options.throttle_ms,
        ring_mib: options.ring_mib.unwrap_or(0),
        sync: options.sync,
        sync_timeout_ms: options.sync_timeout_ms,
    }
}

impl Inner {
    fn next_number(&mut self) -> u64 {
        self.last_number += 1;
        self.last_number
    }

    /// Drops the claims for which `keep` says no.
    fn keep_claims(&mut self, keep: impl Fn(&Live) -> bool) {
        let mut touched = Vec::new();
        for (disk, claims) in &mut self.disks {
            if !claims.iter().all(&keep) {
                claims.retain(&keep);
                touched.push(*disk);
            }
        }
        for disk in touched {
            self.settle(disk);
        }
        self.disks.retain(|_, claims| !claims.is_empty());
    }

    /// Decides anew who has the disk; the catalog learns of a change.
    fn settle(&mut self, disk: DiskId) {
        let owner = self.owners.get(&disk).map(|(host, _)| *host);
        let changed = self.disks.get_mut(&disk).and_then(|claims| claims.settle(owner));
        self.unwritten.extend(changed);
    }

    fn wake(&mut self, disk: DiskId) {
        if let Some(claims) = self.disks.get_mut(&disk) {
            claims.wake();
        }
    }
}
