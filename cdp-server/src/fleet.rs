//! The live state: which agents are connected, which disks they report, how those are doing, and which commands wait
//! for an answer. Nothing here outlives the process; what has to is in the catalog.
//!
//! One lock, never held over I/O. `now` is an argument throughout.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use cdp_api::{OverflowPolicy, ProtectionOptions};
use journal_format::wire::{self, CommandResult, DiskStatus};
use journal_format::{DiskId, Lsn, Stamp};
use tokio::sync::oneshot;

use crate::data::peer::Peer;
use crate::data::plane::SessionId;
use crate::limits::{MAX_REASON_BYTES, RECONCILE_RETRY, STATUS_FRESH};
use crate::model::{DiskReport, HostId, HostReport, VmReport, cut};

/// Statuses kept per disk to know up to which instant everything is durable; at one a second this covers a minute of
/// lag, and the oldest are the ones that matter first.
const COVER_MARKS: usize = 64;

/// What a capture does, as the agent says.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum Mode {
    /// Nothing, or not known.
    #[default]
    Off,
    /// Notes what changes, records nothing.
    Tracking,
    /// Records.
    Capturing,
}

impl Mode {
    fn from_wire(text: &str) -> Self {
        match text {
            "capturing" => Self::Capturing,
            "tracking" => Self::Tracking,
            _ => Self::Off,
        }
    }
}

/// One disk that an agent reports now.
#[derive(Debug)]
struct Live {
    session: SessionId,
    host: HostId,
    vm: String,
    report: DiskReport,
    vm_pid: u32,
    vm_refused: String,
    status: DiskStatus,
    mode: Mode,
    /// When `mode` was learned; `None` before the first status or result of this session.
    mode_at: Option<Instant>,
    /// Host times and the LSN that has to be durable for all before that time to be.
    marks: VecDeque<(Stamp, Lsn)>,
    covered: Stamp,
    last_command: Option<Instant>,
    command_running: bool,
    last_error: String,
    /// What this agent was last told about how to protect it.
    told: Option<ProtectionOptions>,
    /// Since when its host cannot write to its spool, on the host's clock.
    spool_failing_since: Option<Stamp>,
}

/// A copy of a live disk's state, for a moment.
#[derive(Clone, Debug, Default)]
pub(crate) struct LiveDisk {
    pub(crate) vm_pid: u32,
    /// Why it cannot be protected; empty when it can.
    pub(crate) refused: String,
    /// What the last protection command failed with.
    pub(crate) last_error: String,
    pub(crate) mode: Mode,
    pub(crate) status: DiskStatus,
    /// Whether `mode` is recent; if not, nothing is known of the capture.
    pub(crate) fresh: bool,
    /// Whether a protection command is under way or failed a moment ago.
    pub(crate) resting: bool,
    /// What its agent was last told about how to protect it.
    pub(crate) told: Option<ProtectionOptions>,
    /// Since when its host cannot write to its spool, on the host's clock.
    pub(crate) spool_failing_since: Option<Stamp>,
}

#[derive(Debug, Default)]
struct Inner {
    last_number: u64,
    sessions: HashMap<SessionId, Arc<Peer>>,
    disks: HashMap<DiskId, Live>,
    pending: HashMap<u64, Pending>,
}

#[derive(Debug)]
struct Pending {
    session: SessionId,
    disk: DiskId,
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
        inner.disks.retain(|_, live| live.session != session);
        inner.pending.retain(|_, pending| pending.session != session);
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

    /// Takes over what a connection reports; it replaces what the same connection reported before. A disk that another
    /// connection reported is the newer one's: its VM has moved, or its agent has reconnected.
    pub(crate) fn reported(&self, session: SessionId, host: &HostReport) {
        let mut inner = self.lock();
        let mut old: HashMap<DiskId, Live> = HashMap::new();
        let gone: Vec<_> =
            inner.disks.iter().filter(|(_, l)| l.session == session).map(|(id, _)| *id).collect();
        for id in gone {
            old.extend(inner.disks.remove(&id).map(|live| (id, live)));
        }
        for vm in &host.vms {
            for disk in &vm.disks {
                let live = match old.remove(&disk.id) {
                    Some(live) if live.vm_pid == vm.pid => live.with_report(vm, disk),
                    // A new process of the VM: what was known of the old one's capture says nothing.
                    _ => Live::new(session, host.id, vm, disk),
                };
                inner.disks.insert(disk.id, live);
            }
        }
    }

    /// Takes over a disk's status. Ignored from a connection that does not report the disk.
    pub(crate) fn status(&self, session: SessionId, disk: DiskId, status: DiskStatus, now: Instant) {
        let mut inner = self.lock();
        let Some(live) = inner.disks.get_mut(&disk).filter(|live| live.session == session) else { return };
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
        let live =
            inner.disks.get_mut(&disk).filter(|live| live.mode == Mode::Capturing && live.is_fresh(now))?;
        while let Some((stamp, _)) = live.marks.pop_front_if(|(_, lsn)| *lsn <= durable) {
            live.covered = live.covered.max(stamp);
        }
        Some(live.covered)
    }

    /// The state of a disk that an agent reports now.
    pub(crate) fn live(&self, disk: DiskId, now: Instant) -> Option<LiveDisk> {
        self.lock().disks.get(&disk).map(|live| live.snapshot(now))
    }

    /// Whether that VM runs: an agent reports a disk of it.
    pub(crate) fn vm_runs(&self, host: HostId, vm: &str) -> bool {
        self.lock().disks.values().any(|live| live.host == host && live.vm == vm)
    }

    /// Sends a command to the agent that reports the disk. The answer comes through the receiver, which fails when
    /// the connection ends first. `None` when no agent reports the disk.
    pub(crate) fn command(
        &self,
        disk: DiskId,
        command: Command,
        now: Instant,
    ) -> Option<oneshot::Receiver<CommandResult>> {
        let (answer, result) = oneshot::channel();
        let mut inner = self.lock();
        let request = inner.next_number();
        let live = inner.disks.get_mut(&disk)?;
        let session = live.session;
        let protection = match &command {
            Command::SetProtection(options) => Some(*options),
            Command::InsertBookmark(_) => None,
        };
        if protection.is_some() {
            live.last_command = Some(now);
            live.command_running = true;
        }
        let peer = Arc::clone(inner.sessions.get(&session)?);
        inner.pending.insert(request, Pending { session, disk, protection, answer });
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

    /// Takes over what became of a command.
    pub(crate) fn completed(&self, session: SessionId, mut result: CommandResult, now: Instant) {
        result.error = cut(result.error, MAX_REASON_BYTES);
        let mut inner = self.lock();
        let pending = inner.pending.remove(&result.request);
        let Some(pending) = pending.filter(|pending| pending.session == session) else { return };
        if let Some(live) = inner.disks.get_mut(&pending.disk)
            && let Some(options) = pending.protection
        {
            live.command_running = false;
            live.last_error.clone_from(&result.error);
            if result.error.is_empty() {
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
}

impl Mode {
    /// Capturing, unless tracking is already known, which only a status can end.
    const fn max_capturing(self) -> Self {
        match self {
            Self::Tracking => Self::Tracking,
            Self::Off | Self::Capturing => Self::Capturing,
        }
    }
}

impl Live {
    fn new(session: SessionId, host: HostId, vm: &VmReport, disk: &DiskReport) -> Self {
        Self {
            session,
            host,
            vm: vm.name.clone(),
            report: disk.clone(),
            vm_pid: vm.pid,
            vm_refused: vm.refused.clone(),
            status: DiskStatus::default(),
            mode: Mode::Off,
            mode_at: None,
            marks: VecDeque::new(),
            covered: Stamp::ZERO,
            last_command: None,
            command_running: false,
            last_error: String::new(),
            told: None,
            spool_failing_since: None,
        }
    }

    fn with_report(mut self, vm: &VmReport, disk: &DiskReport) -> Self {
        self.report = disk.clone();
        self.vm_refused.clone_from(&vm.refused);
        self
    }

    fn mark(&mut self, stamp: Stamp, captured: Lsn) {
        if self.marks.len() == COVER_MARKS {
            // Keeping the oldest keeps an answer possible while the lag lasts; the newest is replaced.
            self.marks.pop_back();
        }
        if self.marks.back().is_none_or(|(last, _)| *last < stamp) {
            self.marks.push_back((stamp, captured));
        }
    }

    fn is_fresh(&self, now: Instant) -> bool {
        self.mode_at.is_some_and(|at| now.saturating_duration_since(at) < STATUS_FRESH)
    }

    fn snapshot(&self, now: Instant) -> LiveDisk {
        let failed = !self.last_error.is_empty() || self.command_running;
        let recent = self.last_command.is_some_and(|at| now.saturating_duration_since(at) < RECONCILE_RETRY);
        let refused = if self.report.refused.is_empty() { &self.vm_refused } else { &self.report.refused };
        LiveDisk {
            vm_pid: self.vm_pid,
            refused: refused.clone(),
            last_error: self.last_error.clone(),
            mode: self.mode,
            status: self.status.clone(),
            fresh: self.is_fresh(now),
            resting: failed && recent,
            told: self.told,
            spool_failing_since: self.spool_failing_since,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::time::Duration;

    const DISK: DiskId = DiskId([3; 16]);

    fn host(pid: u32) -> HostReport {
        let disk = DiskReport { id: DISK, device: "disk0".to_owned(), ..DiskReport::default() };
        let vm = VmReport { name: "vm".to_owned(), pid, disks: vec![disk], ..VmReport::default() };
        HostReport { vms: vec![vm], ..HostReport::default() }
    }

    fn status(mode: &str, captured_lsn: u64, host_stamp: u64) -> DiskStatus {
        DiskStatus { mode: mode.to_owned(), captured_lsn, host_stamp, ..DiskStatus::default() }
    }

    fn peer(fleet: &Fleet) -> (Arc<Peer>, std::sync::mpsc::Receiver<Vec<u8>>) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("binds");
        let stream = TcpStream::connect(listener.local_addr().expect("bound")).expect("connects");
        let (peer, outgoing) = Peer::new(fleet.next_session(), "host".to_owned(), Arc::new(stream));
        fleet.connected(&peer);
        (peer, outgoing)
    }

    #[test]
    fn a_time_is_covered_once_what_was_captured_before_it_is_durable() {
        let (fleet, now) = (Fleet::default(), Instant::now());
        fleet.reported(SessionId(1), &host(1));
        fleet.status(SessionId(1), DISK, status("capturing", 10, 1000), now);
        fleet.status(SessionId(1), DISK, status("capturing", 20, 2000), now);
        assert_eq!(fleet.covered_until(DISK, Lsn(9), now), Some(Stamp::ZERO));
        assert_eq!(fleet.covered_until(DISK, Lsn(15), now), Some(Stamp(1000)));
        assert_eq!(fleet.covered_until(DISK, Lsn(20), now), Some(Stamp(2000)));
        assert_eq!(
            fleet.covered_until(DISK, Lsn(20), now + STATUS_FRESH),
            None,
            "the agent has fallen silent"
        );
    }

    #[test]
    fn a_disk_that_is_only_tracked_covers_nothing() {
        let (fleet, now) = (Fleet::default(), Instant::now());
        fleet.reported(SessionId(1), &host(1));
        fleet.status(SessionId(1), DISK, status("tracking", 10, 1000), now);
        assert_eq!(fleet.covered_until(DISK, Lsn(10), now), None);
    }

    #[test]
    fn a_new_process_of_a_vm_is_not_taken_to_be_captured() {
        let (fleet, now) = (Fleet::default(), Instant::now());
        fleet.reported(SessionId(1), &host(1));
        fleet.status(SessionId(1), DISK, status("capturing", 10, 1000), now);
        fleet.reported(SessionId(1), &host(1));
        assert_eq!(fleet.live(DISK, now).expect("live").mode, Mode::Capturing);
        fleet.reported(SessionId(1), &host(2));
        assert_eq!(fleet.live(DISK, now).expect("live").mode, Mode::Off);
    }

    #[test]
    fn only_the_connection_that_reports_a_disk_speaks_for_it() {
        let (fleet, now) = (Fleet::default(), Instant::now());
        fleet.reported(SessionId(1), &host(1));
        fleet.status(SessionId(2), DISK, status("capturing", 10, 1000), now);
        assert_eq!(fleet.live(DISK, now).expect("live").mode, Mode::Off);
        fleet.disconnected(SessionId(2));
        assert!(fleet.live(DISK, now).is_some());
        fleet.disconnected(SessionId(1));
        assert!(fleet.live(DISK, now).is_none());
    }

    #[test]
    fn a_result_reaches_who_asked_and_only_from_the_agent_that_was_asked() {
        let (fleet, now) = (Fleet::default(), Instant::now());
        let (asked, _outgoing) = peer(&fleet);
        fleet.reported(asked.id, &host(1));
        let mut answer = fleet
            .command(DISK, Command::SetProtection(Some(ProtectionOptions::default())), now)
            .expect("sent");
        let request = fleet.lock().last_number;
        fleet.completed(asked.id, CommandResult { request, ..CommandResult::default() }, now);
        assert!(answer.try_recv().is_ok());
        assert_eq!(fleet.live(DISK, now).expect("live").mode, Mode::Capturing);

        let mut answer = fleet.command(DISK, Command::SetProtection(None), now).expect("sent");
        let request = fleet.lock().last_number;
        fleet.completed(SessionId(999), CommandResult { request, ..CommandResult::default() }, now);
        assert!(answer.try_recv().is_err());
        assert_eq!(fleet.live(DISK, now).expect("live").mode, Mode::Capturing);
    }

    #[test]
    fn a_failed_command_rests_before_it_is_tried_again() {
        let (fleet, now) = (Fleet::default(), Instant::now());
        let (asked, _outgoing) = peer(&fleet);
        fleet.reported(asked.id, &host(1));
        let _answer = fleet
            .command(DISK, Command::SetProtection(Some(ProtectionOptions::default())), now)
            .expect("sent");
        let request = fleet.lock().last_number;
        let error = "no".to_owned();
        fleet.completed(asked.id, CommandResult { request, error, ..CommandResult::default() }, now);
        assert!(fleet.live(DISK, now).expect("live").resting);
        let later = now + RECONCILE_RETRY + Duration::from_secs(1);
        assert!(!fleet.live(DISK, later).expect("live").resting);
    }
}
