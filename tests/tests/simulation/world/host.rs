//! The agent's steps, and the filter's end of its socket.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use host_agent::session::{DiskInfo, Event, FilterId, VmInfo};
use journal_format::Stamp;

use super::{DEVICES, LOOK_EVERY, VM_UUID, World};
use crate::agent::ToFilter;
use crate::guest::{Attached, DISKS, Phase};
use crate::net::Conn;

impl World {
    pub(super) fn drain(&mut self) {
        let i = self.random.within(0..DISKS as u64) as usize;
        let now = self.now;
        if let Some(agent) = &mut self.agent {
            agent.drain(now, self.ids[i]);
        }
    }

    pub(super) fn agent_step(&mut self) {
        self.reconnect_filter();
        let now = self.now;
        let most = if self.random.chance(30) { self.random.within(1..2000) as usize } else { usize::MAX };
        let slow = !self.healthy && self.random.chance(50);
        let Some(agent) = &mut self.agent else { return };
        if let Some(event) = self.to_agent.pop_front() {
            agent.handle(now, event);
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
        let notes = std::mem::take(&mut agent.notes);
        let in_use = agent.conn;
        for note in notes {
            self.trace.note(|| note);
        }
        // Connections that the agent has left are closed; the server learns of it later.
        for (id, conn) in &mut self.conns {
            if Some(*id) != in_use {
                conn.up.closed = true;
                conn.down.closed = true;
            }
        }
        self.conns.retain(|id, conn| Some(*id) == in_use || !conn.up.is_over());
        self.watch();
        self.filter_step();
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
        self.to_agent.push_back(Event::FilterUp(filter, info));
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
            self.to_agent.push_back(Event::FilterDisks(filter, disks.collect()));
        }
    }

    pub(super) fn check_size(&mut self, i: usize) {
        let size = self.images[i].len() as u64;
        let attached = self.vm.as_ref().and_then(|vm| vm.disks[i].attached.as_ref());
        if attached.is_none_or(|attached| attached.ring.disk_bytes() == size) {
            return;
        }
        self.observe(i, |world| {
            let attached = world.vm.as_ref().and_then(|vm| vm.disks[i].attached.as_ref());
            world.models[i].settle_all(world.images[i].clone(), Vec::new());
            attached.expect("it is attached").capture.size_changed(size);
            None
        });
    }

    pub(super) fn filter_step(&mut self) {
        if self.now >= self.look_at {
            self.look();
        }
        let Some((filter, order)) = self.agent.as_mut().and_then(|agent| agent.to_filters.pop_front()) else {
            return;
        };
        if self.filter != Some(filter) {
            return;
        }
        let place = |device: &str| DEVICES.iter().position(|name| *name == device).expect("a listed device");
        match order {
            ToFilter::Attach { request, device, fds } => self.attach(place(&device), filter, request, *fds),
            ToFilter::Detach { request, device } => {
                let i = place(&device);
                self.trace.note(|| format!("filter: detach {device}"));
                // In QEMU the device is drained first.
                self.settle_ops(i);
                let attached = self.vm.as_mut().and_then(|vm| vm.disks[i].attached.as_mut());
                match attached {
                    Some(attached) => {
                        attached.detaching = Some((filter.0, request));
                        attached.resync_at = Duration::ZERO;
                        self.observe(i, |world| {
                            let vm = world.vm.as_ref().expect("it is attached");
                            vm.disks[i].attached.as_ref().expect("it is attached").capture.detach();
                            None
                        });
                        self.detached(i);
                    }
                    None => self.to_agent.push_back(Event::FilterResult(filter, request, String::new())),
                }
            }
            ToFilter::Resync { device } => {
                let i = place(&device);
                self.observe(i, |world| {
                    let attached = world.vm.as_ref().and_then(|vm| vm.disks[i].attached.as_ref());
                    if let Some(attached) = attached {
                        attached.capture.resume();
                    }
                    None
                });
            }
        }
    }

    /// As the glue does it: the disk is drained, an old capture ends, the new one begins.
    pub(super) fn attach(&mut self, i: usize, filter: FilterId, request: u64, fds: [OwnedFd; 3]) {
        self.settle_ops(i);
        let old = self.vm.as_mut().and_then(|vm| vm.disks[i].attached.take());
        if let Some(mut old) = old {
            old.capture.detach();
            drop(old.resync.take());
        }
        let [ring, clock, bell] = fds;
        clock_floor(&clock, self.floor());
        let attached = Attached::new(&ring, &clock, bell);
        let first = attached.ring.config().first_lsn.0;
        self.trace.note(|| format!("filter: {} is attached at LSN {first}", DEVICES[i]));
        self.models[i].begin_epoch(first);
        self.models[i].settle_all(self.images[i].clone(), Vec::new());
        let stamp = attached.clock.last().0;
        self.models[i].point(first, stamp, false, None, "attach");
        self.vm.as_mut().expect("a filter asks").disks[i].attached = Some(attached);
        // It may have been resized since the agent was told.
        self.check_size(i);
        self.to_agent.push_back(Event::FilterResult(filter, request, String::new()));
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
                Phase::Parked => {}
            }
        }
    }
}

fn clock_floor(fd: &OwnedFd, floor: Stamp) {
    capture_ring::HostClock::open(fd.as_fd()).expect("the agent's own clock").raise_to(floor);
}
