//! Who says that he has a disk. Mostly that is one VM; two when a VM was cloned with its UUID, or is just being moved.
//!
//! One of the claims is the *current* one: what it says of the disk is shown, and commands go to its agent. It is the
//! one of the host that has the disk; where none has, or that host does not report it, the one that came first, so that
//! a second VM that turns up changes nothing. All others are *rivals*.

use std::collections::VecDeque;
use std::time::Instant;

use cdp_api::{Conflict, ProtectionOptions};
use journal_format::wire::DiskStatus;
use journal_format::{DiskId, Lsn, Stamp};

use crate::data::plane::SessionId;
use crate::limits::{HELD_RETRY, MAX_CONFLICTS, RECONCILE_RETRY, STATUS_FRESH};
use crate::model::{DiskReport, HostId, HostReport, VmReport};

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
    pub(super) fn from_wire(text: &str) -> Self {
        match text {
            "capturing" => Self::Capturing,
            "tracking" => Self::Tracking,
            _ => Self::Off,
        }
    }
}

impl Mode {
    /// Capturing, unless tracking is already known, which only a status can end.
    pub(super) const fn max_capturing(self) -> Self {
        match self {
            Self::Tracking => Self::Tracking,
            Self::Off | Self::Capturing => Self::Capturing,
        }
    }
}

/// One VM's disk that an agent reports now.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) session: SessionId,
    pub(super) host: HostId,
    host_name: String,
    pub(super) vm: String,
    report: DiskReport,
    pub(super) vm_pid: u32,
    vm_refused: String,
    pub(super) status: DiskStatus,
    pub(super) mode: Mode,
    /// When `mode` was learned; `None` before the first status or result of this session.
    pub(super) mode_at: Option<Instant>,
    /// Host times and the LSN that has to be durable for all before that time to be.
    marks: VecDeque<(Stamp, Lsn)>,
    covered: Stamp,
    pub(super) last_command: Option<Instant>,
    pub(super) command_running: bool,
    pub(super) last_error: String,
    /// What this agent was last told about how to protect it.
    pub(super) told: Option<ProtectionOptions>,
    /// Since when its host cannot write to its spool, on the host's clock.
    pub(super) spool_failing_since: Option<Stamp>,
    /// Why the disk was refused to it: another host has it.
    pub(super) held: String,
    /// The newest epoch that was another VM's of the same agent; 0 for none. What the agent still says of that one is not
    /// said of this VM.
    pub(super) of_another: u64,
    is_rival: bool,
}

/// A copy of a live disk's state, for a moment.
#[derive(Clone, Debug, Default)]
pub(crate) struct LiveDisk {
    pub(crate) session: SessionId,
    pub(crate) vm_pid: u32,
    /// Why it cannot be protected; empty when it can.
    pub(crate) refused: String,
    /// What the last protection command failed with.
    pub(crate) last_error: String,
    pub(crate) mode: Mode,
    pub(crate) status: DiskStatus,
    /// Whether `mode` is recent; if not, nothing is known of the capture.
    pub(crate) fresh: bool,
    /// Whether it was refused because another host has the disk.
    pub(crate) is_held: bool,
    /// Whether a protection command is under way or failed a moment ago.
    pub(crate) resting: bool,
    /// What its agent was last told about how to protect it.
    pub(crate) told: Option<ProtectionOptions>,
    /// Since when its host cannot write to its spool, on the host's clock.
    pub(crate) spool_failing_since: Option<Stamp>,
}

/// All claims to one disk, in the order in which they came.
#[derive(Debug, Default)]
pub(super) struct Claims {
    list: Vec<Live>,
    current: usize,
    /// The newest capture session that was opened while it was claimed; 0 for none.
    pub(super) newest_epoch: u64,
    /// Which VM was the current one when that was decided last.
    shown: Option<(SessionId, u32)>,
}

impl Claims {
    pub(super) fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Live> {
        self.list.iter()
    }

    pub(super) fn current(&self) -> Option<&Live> {
        self.list.get(self.current)
    }

    pub(super) fn current_mut(&mut self) -> Option<&mut Live> {
        self.list.get_mut(self.current)
    }

    /// What a session claims: of several VMs the one that its agent would protect.
    pub(super) fn of(&mut self, session: SessionId) -> Option<&mut Live> {
        let mine = self.list.iter_mut().filter(|live| live.session == session);
        mine.min_by_key(|live| !live.report.refused.is_empty())
    }

    /// What a session claims for that VM.
    pub(super) fn of_vm(&mut self, session: SessionId, pid: u32) -> Option<&mut Live> {
        self.list.iter_mut().find(|live| (live.session, live.vm_pid) == (session, pid))
    }

    /// The sessions that claim it.
    pub(super) fn sessions(&self) -> Vec<SessionId> {
        let mut sessions: Vec<SessionId> = self.list.iter().map(|live| live.session).collect();
        sessions.sort_unstable();
        sessions.dedup();
        sessions
    }

    /// Takes over a VM's claim; it keeps its place if that session, or an older one of its host, has made it before.
    pub(super) fn report(&mut self, session: SessionId, host: &HostReport, vm: &VmReport, disk: &DiskReport) {
        let same = |live: &&mut Live| live.host == host.id && live.vm_pid == vm.pid;
        match self.list.iter_mut().find(same) {
            Some(live) if live.session == session => {
                live.report = disk.clone();
                live.vm_refused.clone_from(&vm.refused);
            }
            Some(live) => *live = Live::new(session, host, vm, disk),
            None => self.list.push(Live::new(session, host, vm, disk)),
        }
    }

    /// Keeps only the claims for which `keep` says so.
    pub(super) fn retain(&mut self, keep: impl Fn(&Live) -> bool) {
        for live in self.list.iter().filter(|live| live.is_rival && !keep(live)) {
            let (disk, vm, pid, host) = (live.report.id, &live.vm, live.vm_pid, &live.host_name);
            tracing::info!(%disk, vm, pid, host, "this VM does not claim the disk any more");
        }
        self.list.retain(keep);
    }

    /// The disk is that host's: whatever another host's agent captures is not of it.
    pub(super) fn forget_captures_but_of(&mut self, host: HostId) {
        for live in self.list.iter_mut().filter(|live| live.host != host) {
            (live.mode, live.mode_at) = (Mode::Off, None);
        }
    }

    /// Whoever was refused the disk may try again at once: something has changed.
    pub(super) fn wake(&mut self) {
        for live in self.list.iter_mut().filter(|live| !live.held.is_empty()) {
            live.held.clear();
            live.last_command = None;
        }
    }

    /// Decides anew which claim is the current one; logs rivals that have become such or have ceased to be. Returns
    /// the current one's session when another VM is the current one now.
    pub(super) fn settle(&mut self, owner: Option<HostId>) -> Option<SessionId> {
        let rank = |live: &Live| (owner != Some(live.host), !live.refused().is_empty());
        self.current =
            self.list.iter().enumerate().min_by_key(|(_, live)| rank(live)).map_or(0, |(at, _)| at);
        let holder = self.current().map(|live| (live.vm.clone(), live.vm_pid, live.host_name.clone()));
        for (at, live) in self.list.iter_mut().enumerate() {
            let is_rival = at != self.current;
            let (vm, pid, host) = (&live.vm, live.vm_pid, &live.host_name);
            if is_rival && !live.is_rival {
                let disk = live.report.id;
                let holder =
                    holder.as_ref().map(|(vm, pid, host)| format!("VM {vm}, process {pid} on host {host}"));
                tracing::warn!(%disk, vm, pid, host, holder, "a second VM claims this disk and is not protected; \
                    give it its own UUID, unless it is being moved");
            } else if !is_rival && live.is_rival {
                tracing::info!(disk = %live.report.id, vm, pid, host, "of the VMs that claim this disk, this one comes first now");
            }
            live.is_rival = is_rival;
        }
        let before = self.shown;
        self.shown = self.current().map(|live| (live.session, live.vm_pid));
        let same_agent = before.zip(self.shown).is_some_and(|(old, new)| old.0 == new.0 && old.1 != new.1);
        let epoch = self.newest_epoch;
        if let Some(live) = self.current_mut().filter(|_| same_agent) {
            live.of_another = epoch;
            (live.mode, live.mode_at) = (Mode::Off, None);
            live.begin_epoch();
        }
        self.shown.filter(|_| self.shown != before).map(|(session, _)| session)
    }

    /// The rivals, for people; of very many the first.
    pub(super) fn conflicts(&self) -> Vec<Conflict> {
        let rivals = self.list.iter().enumerate().filter(|(at, _)| *at != self.current);
        let conflict = |live: &Live| Conflict {
            host: live.host_name.clone(),
            vm: live.vm.clone(),
            vm_pid: live.vm_pid,
            reason: self.why_not(live),
        };
        rivals.map(|(_, live)| conflict(live)).take(MAX_CONFLICTS).collect()
    }

    fn why_not(&self, rival: &Live) -> String {
        if !rival.refused().is_empty() {
            return rival.refused().to_owned();
        }
        if !rival.held.is_empty() {
            return rival.held.clone();
        }
        let Some(live) = self.current() else { return String::new() };
        format!(
            "process {} (VM {}) on host {} claimed this disk first: same VM UUID or name, same device; give one of the \
             VMs its own UUID, or stop one",
            live.vm_pid, live.vm, live.host_name
        )
    }
}

impl Live {
    fn new(session: SessionId, host: &HostReport, vm: &VmReport, disk: &DiskReport) -> Self {
        Self {
            session,
            host: host.id,
            host_name: host.name.clone(),
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
            held: String::new(),
            of_another: 0,
            is_rival: false,
        }
    }

    pub(super) fn disk(&self) -> DiskId {
        self.report.id
    }

    /// Why its agent cannot protect it; empty when it can.
    pub(super) fn refused(&self) -> &str {
        if self.report.refused.is_empty() { &self.vm_refused } else { &self.report.refused }
    }

    /// A new capture session of it has begun: what the former one's status counted says nothing.
    pub(super) fn begin_epoch(&mut self) {
        self.status = DiskStatus::default();
        self.marks.clear();
    }

    /// Up to which instant everything is durable.
    pub(super) fn cover(&mut self, durable: Lsn) -> Stamp {
        while let Some((stamp, _)) = self.marks.pop_front_if(|(_, lsn)| *lsn <= durable) {
            self.covered = self.covered.max(stamp);
        }
        self.covered
    }

    pub(super) fn mark(&mut self, stamp: Stamp, captured: Lsn) {
        if self.marks.len() == COVER_MARKS {
            // Keeping the oldest keeps an answer possible while the lag lasts; the newest is replaced.
            self.marks.pop_back();
        }
        if self.marks.back().is_none_or(|(last, _)| *last < stamp) {
            self.marks.push_back((stamp, captured));
        }
    }

    pub(super) fn is_fresh(&self, now: Instant) -> bool {
        self.mode_at.is_some_and(|at| now.saturating_duration_since(at) < STATUS_FRESH)
    }

    pub(super) fn snapshot(&self, now: Instant) -> LiveDisk {
        let failed = !self.last_error.is_empty() || self.command_running;
        let rest = if self.held.is_empty() { RECONCILE_RETRY } else { HELD_RETRY };
        let recent = self.last_command.is_some_and(|at| now.saturating_duration_since(at) < rest);
        LiveDisk {
            session: self.session,
            vm_pid: self.vm_pid,
            refused: self.refused().to_owned(),
            last_error: self.last_error.clone(),
            mode: self.mode,
            status: self.status.clone(),
            fresh: self.is_fresh(now),
            is_held: !self.held.is_empty(),
            resting: failed && recent,
            told: self.told,
            spool_failing_since: self.spool_failing_since,
        }
    }
}
