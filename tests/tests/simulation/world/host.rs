//! The agent's steps, and the filter's end of its socket.

use std::time::Duration;

use capture_ring::control::CaptureFds;
use capture_ring::{HostClock, Ring};
use host_agent::session::{DiskInfo, Event, FilterId, Holding, VmInfo};
use journal_format::{GapReason, ImageTag};
use std::os::fd::AsFd;

use super::{DEVICES, LOOK_EVERY, VM_UUID, World};
use crate::agent::{ToAgent, ToFilter, same_fds};
use crate::guest::{Attached, DISKS, Phase};
use crate::model::End;
use crate::net::Conn;

fn place(device: &str) -> usize {
    DEVICES.iter().position(|name| *name == device).expect("a listed device")
}

impl World {
    pub(super) fn drain(&mut self) {
        let i = self.random.within(0..DISKS as u64) as usize;
        let now = self.now;
        if let Some(agent) = &mut self.agent {
            agent.drain(now, self.ids[i]);
        }
        self.after_agent();
    }

    /// Takes along what the agent has done.
    pub(super) fn after_agent(&mut self) {
        let Some(agent) = &mut self.agent else { return };
        self.orders.append(&mut agent.to_filters);
        let (notes, bookmarks) = (std::mem::take(&mut agent.notes), std::mem::take(&mut agent.bookmarks));
        let dead = agent.is_dead();
        for note in notes {
            self.trace.note(|| note);
        }
        for (disk, lsn, stamp, name) in bookmarks {
            let i = self.ids.iter().position(|id| *id == disk).expect("one of the disks");
            let whole = self.captured(i).is_some_and(|(_, whole)| whole);
            self.trace.note(|| format!("disk {i}: {name} at LSN {lsn}"));
            // In the ring of a dead QEMU it follows records that nobody will ask for.
            if self.vm.as_ref().is_some_and(|vm| vm.disks[i].attached.is_some()) {
                self.models[i].point(lsn.0, stamp.0, whole, None, "bookmark");
            } else {
                self.models[i].point(lsn.0, stamp.0, self.models[i].ends_whole(), None, "bookmark");
            }
        }
        if dead {
            self.kill_agent();
        }
    }

    pub(super) fn agent_step(&mut self) {
        self.reconnect_filter();
        self.agent_runs();
        self.after_agent();
        self.watch();
        self.after_agent();
        self.filter_step();
    }

    fn agent_runs(&mut self) {
        let now = self.now;
        let most = if self.random.chance(30) { self.random.within(1..2000) as usize } else { usize::MAX };
        let slow = !self.healthy && self.random.chance(50);
        let reads = self.random.chance(30);
        let Some(agent) = &mut self.agent else { return };
        if let Some(said) = self.to_agent.pop_front() {
            agent.hear(now, said);
        }
        if reads {
            agent.load(now);
        }
        if agent.connecting.is_some() && !slow {
            let conn = self.server.is_running().then_some(self.next_conn);
            if let Some(id) = conn {
                self.next_conn += 1;
                self.conns.insert(id, Conn::default());
            }
            agent.connected(now, conn);
        }
        agent.step(now, &mut self.conns, most);
        let in_use = agent.conn;
        // Connections that the agent has left are closed; the server learns of it later.
        for (id, conn) in &mut self.conns {
            if Some(*id) != in_use {
                conn.up.closed = true;
                conn.down.closed = true;
            }
        }
        self.conns.retain(|id, conn| Some(*id) == in_use || !conn.up.is_over());
        if self.agent_stops.is_some_and(|end| now >= end || agent.is_flushed()) {
            self.kill_agent();
        }
    }

    pub(super) fn watch(&mut self) {
        let alive = self.vm.as_ref().map(|vm| vm.pid);
        let Some(agent) = &mut self.agent else { return };
        let watched = std::mem::take(&mut agent.watched);
        for (filter, pid) in watched.into_iter().map(|filter| (filter, self.checks.pid_of(filter))) {
            if alive == Some(pid) {
                agent.watched.push(filter);
            } else {
                agent.handle(self.now, Event::ProcessDead(filter));
            }
        }
    }

    pub(super) fn reconnect_filter(&mut self) {
        let (None, Some(vm), Some(_)) = (self.filter, &self.vm, &self.agent) else { return };
        if self.agent_stops.is_some()
            || vm.disks.iter().any(|disk| disk.attached.as_ref().is_some_and(|a| a.detaching.is_some()))
        {
            return;
        }
        let filter = FilterId(self.next_filter);
        self.next_filter += 1;
        self.filter = Some(filter);
        self.checks.filters.push((filter, vm.pid));
        let info = VmInfo {
            pid: vm.pid,
            program: "qemu".into(),
            qemu_version: "10.0".into(),
            name: "vm".into(),
            uuid: VM_UUID,
            refused: String::new(),
        };
        self.tell(Event::FilterUp(filter, info));
        let vm = self.vm.as_ref().expect("the VM runs");
        for (i, disk) in vm.disks.iter().enumerate() {
            let Some(fds) = &disk.held else { continue };
            let ring = Ring::open(fds.ring.as_fd()).expect("an agent made it");
            let of = Some((ring.config().disk, ring.config().epoch));
            let holding = Holding { device: DEVICES[i].into(), ended: disk.attached.is_none(), of };
            self.to_agent.push_back(ToAgent::Held(filter, holding, same_fds(fds)));
        }
        self.listed = [0; DISKS];
        self.look();
    }

    /// What the filter looks at now and then: sizes that changed without a captured request, and its list of disks.
    pub(super) fn look(&mut self) {
        self.look_at = self.now + LOOK_EVERY;
        for i in 0..DISKS {
            if self.vm.as_ref().is_some_and(|vm| vm.disks[i].ops.is_empty()) {
                self.check_size(i);
            }
        }
        let sizes = std::array::from_fn(|i| self.images[i].len() as u64);
        if let Some(filter) = self.filter
            && self.listed != sizes
        {
            self.listed = sizes;
            let disks = (0..DISKS).map(|i| DiskInfo {
                device: DEVICES[i].into(),
                disk_bytes: sizes[i],
                ..DiskInfo::default()
            });
            let event = Event::FilterDisks(filter, disks.collect());
            self.tell(event);
        }
    }

    pub(super) fn check_size(&mut self, i: usize) {
        let size = self.images[i].len() as u64;
        if self.attached(i).is_none_or(|attached| attached.ring.disk_bytes() == size) {
            return;
        }
        self.observe(i, |world| {
            world.models[i].settle_all(world.images[i].clone(), Vec::new());
            world.attached(i).expect("it is attached").capture.size_changed(size);
            None
        });
    }

    /// Says something to the agent, if it can still hear.
    pub(super) fn tell(&mut self, event: Event) {
        if !self.filter_closing {
            self.to_agent.push_back(ToAgent::Event(event));
        }
    }

    pub(super) fn filter_step(&mut self) {
        if self.now >= self.look_at {
            self.look();
        }
        let Some((filter, order)) = self.orders.pop_front() else {
            if std::mem::take(&mut self.filter_closing) {
                self.filter = None;
            }
            return;
        };
        if self.filter != Some(filter) {
            return;
        }
        match order {
            ToFilter::Attach { request, device, image, fds } => {
                self.attach(place(&device), filter, request, image, *fds);
            }
            ToFilter::Detach { request, device } => self.detach(place(&device), filter, request),
            ToFilter::Resync { device } => self.observe(place(&device), |world| {
                if let Some(attached) = world.attached(place(&device)) {
                    attached.capture.resume();
                }
                None
            }),
            ToFilter::Hold { request, device, outbox } => {
                let held = self.vm.as_mut().and_then(|vm| vm.disks[place(&device)].held.as_mut());
                let error = if held.is_some() { String::new() } else { "nothing is held".to_owned() };
                if let Some(held) = held {
                    held.outbox = outbox;
                    self.checks.adopted += 1;
                }
                self.tell(Event::FilterResult(filter, request, error));
            }
            ToFilter::Forget { device } => {
                let disk = self.vm.as_mut().map(|vm| &mut vm.disks[place(&device)]);
                if let Some(disk) = disk.filter(|disk| disk.attached.is_none()) {
                    disk.held = None;
                }
            }
        }
    }

    pub(crate) fn attached(&self, i: usize) -> Option<&Attached> {
        self.vm.as_ref()?.disks[i].attached.as_ref()
    }

    fn detach(&mut self, i: usize, filter: FilterId, request: u64) {
        self.trace.note(|| format!("filter: detach {}", DEVICES[i]));
        if let Some(attached) = self.attached(i) {
            attached.capture.release_waiters();
        }
        // In QEMU the device is drained first.
        self.settle_ops(i);
        self.models[i].end_epoch(End::Detached(self.deaths()));
        let attached = self.vm.as_mut().and_then(|vm| vm.disks[i].attached.as_mut());
        let Some(attached) = attached else {
            return self.tell(Event::FilterResult(filter, request, String::new()));
        };
        attached.detaching = Some((filter.0, request));
        attached.resync_at = Duration::ZERO;
        self.observe(i, |world| {
            world.attached(i).expect("it is attached").capture.detach();
            None
        });
        self.detached(i);
    }

    /// As the glue does it: the disk is drained, an old capture ends, the new one begins.
    fn attach(&mut self, i: usize, filter: FilterId, request: u64, image: Option<ImageTag>, fds: CaptureFds) {
        if let Some(attached) = self.attached(i) {
            attached.capture.release_waiters();
        }
        self.settle_ops(i);
        let old = self.vm.as_mut().and_then(|vm| vm.disks[i].attached.take());
        if let Some(mut old) = old {
            old.capture.detach();
            self.models[i].end_epoch(End::Detached(self.deaths()));
            drop(old.resync.take());
        }
        HostClock::open(fds.clock.as_fd()).expect("the agent's own clock").raise_to(self.floor());
        let attached = Attached::new(&fds);
        let first = attached.ring.config().first_lsn.0;
        self.trace.note(|| format!("filter: {} is attached at LSN {first}", DEVICES[i]));
        let begins = attached.ring.config().begins;
        self.check_reason(i, first, image.is_some(), begins);
        self.models[i].begin_epoch(first, begins);
        self.models[i].settle_all(self.images[i].clone(), Vec::new());
        let stamp = attached.clock.last().0;
        self.models[i].point(first, stamp, false, None, "attach");
        let unchanged = image == Some(self.tag(i));
        let disk = &mut self.vm.as_mut().expect("a filter asks").disks[i];
        (disk.attached, disk.held) = (Some(attached), Some(fds));
        if unchanged {
            self.checks.unchanged += 1;
            self.trace.note(|| format!("disk {i} is as it was left"));
            self.observe(i, |world| {
                world.attached(i).expect("it is attached").capture.unchanged();
                None
            });
        }
        // It may have been resized since the agent was told.
        self.check_size(i);
        self.tell(Event::FilterResult(filter, request, String::new()));
    }

    fn deaths(&self) -> u64 {
        self.agents_gone + self.vms_gone
    }

    /// What a new epoch says of why it begins with a gap is what happened to the epoch that the journal ends with.
    fn check_reason(&self, i: usize, first: u64, closed: bool, reason: GapReason) {
        use GapReason::{AgentLost, Attach, UncleanEnd};
        let last = self.models[i].epochs.iter().rfind(|epoch| epoch.first < first).filter(|_| !closed);
        let may: &[GapReason] = match last.and_then(|epoch| epoch.end) {
            _ if last.is_none() => &[Attach],
            // Only an agent that has lost something says so.
            Some(End::VmGone) if self.agents_gone == 0 => &[UncleanEnd],
            Some(End::VmGone) => &[UncleanEnd, AgentLost],
            // Whoever had it detached may have died before the server heard of it, or QEMU before it said so.
            Some(End::Detached(then)) if then < self.deaths() => &[Attach, AgentLost, UncleanEnd],
            _ => &[Attach, AgentLost],
        };
        let switched = last.is_some_and(|epoch| epoch.switched) && reason == Attach;
        assert!(
            switched || may.contains(&reason),
            "I4: disk {i}: the epoch at {first} begins for {reason:?}, not for one of {may:?}"
        );
    }

    /// Completes everything in flight on a disk.
    pub(super) fn settle_ops(&mut self, i: usize) {
        loop {
            self.wake();
            let Some(vm) = &self.vm else { return };
            let ops = &vm.disks[i].ops;
            let Some(at) = ops.iter().position(|op| op.phase != Phase::Parked) else {
                assert!(ops.is_empty(), "a parked request is never woken");
                return;
            };
            match ops[at].phase {
                Phase::Woken => self.begin(i, at),
                Phase::Issued => self.apply(i, at),
                Phase::Answered(outcome) => self.finish(i, at, outcome),
                Phase::Syncing => self.sync(i, at),
                Phase::Parked => {}
            }
        }
    }
}
