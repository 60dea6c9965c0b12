//! What goes wrong, what comes back, and the server's steps.

use std::time::Duration;

use host_agent::limits::STOP_FLUSH;
use host_agent::session::{Event, Identity};

use super::{DEVICES, HOST, World, options};
use crate::agent::{Agent, ToAgent};
use crate::check::Checks;
use crate::guest::{DISKS, Phase, Vm, woken};
use crate::model::{End, SECTOR};

impl World {
    pub(super) fn server_step(&mut self) {
        let (now, random) = (self.now, &mut self.random);
        let most = if random.chance(30) { random.within(1..5000) as usize } else { usize::MAX };
        let outcome = self.server.step(now, &mut self.conns, random, most);
        for note in outcome.notes {
            self.trace.note(|| note);
        }
        if outcome.committed {
            Checks::committed(self);
        }
    }

    pub(super) fn start_server(&mut self) {
        self.trace.note(|| "server starts".to_owned());
        self.server.start();
        Checks::restarted(self);
    }

    pub(super) fn start_vm(&mut self) {
        self.next_pid += 1;
        let pid = self.next_pid;
        // About as long as it takes to be captured again.
        let steps = if self.random.chance(60) { self.random.within(0..600) } else { 0 };
        self.vm = Some(Vm::new(pid, self.now + Duration::from_micros(steps * self.weights.step_us)));
        // What was on its way to one of the disks may not be there.
        self.ledger -= self.ledger % 2;
        self.trace.note(|| format!("VM starts as {pid}"));
    }

    pub(super) fn start_agent(&mut self) {
        self.trace.note(|| "agent starts".to_owned());
        let identity = Identity { host_id: HOST, host_name: "host".into(), token: String::new() };
        let mut agent = Agent::new(self.now, identity, self.sizes.clone(), self.floor());
        agent.discarded = std::mem::take(&mut self.discarded);
        self.agent = Some(agent);
    }

    pub(super) fn fault(&mut self) {
        let kind = self.random.within(0..24);
        // Each run has its own selection of faults.
        if self.weights.faults & (1 << kind) == 0 || !self.random.chance(40) {
            return self.recover();
        }
        self.faults += 1;
        match kind {
            0 => self.kill_vm(),
            1 => self.kill_agent(),
            2 | 3 => self.cut(),
            4..=6 => self.stall(),
            7 => self.kill_server(false),
            8 | 9 => self.kill_server(true),
            10 => self.break_volumes(),
            11 => self.change_contents(),
            12 => self.toggle(),
            13 => {
                let pause = Duration::from_millis(self.random.within(100..3000));
                self.advance(pause);
            }
            14 => self.lose_filter(),
            15 | 21 | 22 => self.stop_vm(),
            16 => self.fuse_agent(),
            17 => self.stop_agent(),
            18 => self.change_options(),
            19 => self.drain_disk(),
            20 => self.order_bookmark(),
            _ => self.crash_in_commit(),
        }
    }

    pub(super) fn recover(&mut self) {
        let pause = Duration::from_millis(50);
        if self.vm.is_none() {
            self.start_vm();
        } else if self.agent.is_none() && self.now > self.agent_gone + pause {
            self.start_agent();
        } else if !self.server.is_running() && self.now > self.server_gone + pause {
            self.start_server();
        } else if self.random.chance(50) {
            self.server.heal();
        }
    }

    pub(super) fn kill_vm(&mut self) {
        let Some(mut vm) = self.vm.take() else { return };
        self.trace.note(|| "VM is killed".to_owned());
        let random = &mut self.random;
        for (disk, image) in vm.disks.iter_mut().zip(&mut self.images) {
            for op in &mut disk.ops {
                for sector in std::mem::take(&mut op.left) {
                    if op.phase == Phase::Issued && random.chance(50) {
                        op.apply(sector, image);
                    }
                }
            }
            if random.chance(20) {
                let start = random.within(1..(image.len() / SECTOR) as u64) as usize * SECTOR;
                let end = (start + (64 << 10)).min(image.len());
                image[start..end].fill(random.next_u64() as u8);
            }
        }
        self.changes.iter_mut().for_each(|changes| *changes += 1);
        self.models.iter_mut().for_each(|model| model.end_epoch(End::VmGone));
        self.bury(vm);
    }

    /// QEMU's process is gone.
    fn bury(&mut self, vm: Vm) {
        self.graveyard.push(vm);
        self.vms_gone += 1;
        drop(woken());
        self.part();
    }

    /// The filter's connection ends from its side.
    fn part(&mut self) {
        let Some(filter) = self.filter.take() else { return };
        self.tell(Event::FilterLost(filter));
        self.filter_closing = false;
        self.orders.clear();
    }

    /// QEMU ends in good order: each disk is drained, tells that it goes, and is closed. Now and then a disk does not
    /// come to rest first.
    pub(super) fn stop_vm(&mut self) {
        if self.vm.is_none() {
            return;
        }
        for (i, device) in DEVICES.iter().enumerate() {
            let restless = self.random.chance(20);
            let is_known = !self.random.chance(10);
            self.trace.note(|| format!("QEMU closes {device}, restless: {restless}"));
            if let Some(attached) = self.attached(i) {
                attached.capture.release_waiters();
            }
            if !restless {
                self.settle_ops(i);
            }
            let known = is_known.then(|| self.tag(i));
            self.observe(i, |world| {
                if let Some(attached) = world.attached(i) {
                    attached.capture.close(|| known);
                }
                None
            });
            let (random, vm) = (&mut self.random, self.vm.as_mut().expect("it runs"));
            if random.chance(20) {
                let image = &mut self.images[i];
                let start = random.within(0..(image.len() / SECTOR) as u64) as usize * SECTOR;
                image[start..start + SECTOR].fill(random.next_u64() as u8);
                self.changes[i] += 1;
            }
            drop(vm.disks[i].attached.as_mut().and_then(|attached| attached.resync.take()));
        }
        self.models.iter_mut().for_each(|model| model.end_epoch(End::VmGone));
        let vm = self.vm.take().expect("it runs");
        self.bury(vm);
    }

    /// The agent dies amid what one of its next events brings about.
    pub(super) fn fuse_agent(&mut self) {
        let actions = 1 + self.random.within(0..12);
        if let Some(agent) = &mut self.agent {
            agent.fuse = Some(actions);
        }
    }

    /// The agent is asked to stop, as for an update.
    pub(super) fn stop_agent(&mut self) {
        let now = self.now;
        if let Some(agent) = self.agent.as_mut().filter(|_| self.agent_stops.is_none()) {
            self.trace.note(|| "agent is asked to stop".to_owned());
            agent.hear(now, ToAgent::Event(Event::Stop));
            self.agent_stops = Some(now + STOP_FLUSH);
            self.after_agent();
        }
    }

    pub(super) fn change_options(&mut self) {
        let i = self.random.within(0..DISKS as u64) as usize;
        let options = options(&mut self.random);
        self.trace.note(|| format!("operator: disk {i}: {options:?}"));
        self.server.options.insert(self.ids[i], options);
        self.server.wish_now();
    }

    /// QEMU waits for the requests of a disk, and the guest makes none meanwhile.
    pub(super) fn drain_disk(&mut self) {
        let i = self.random.within(0..DISKS as u64) as usize;
        if let Some(vm) = &mut self.vm {
            self.trace.note(|| format!("QEMU drains disk {i}"));
            vm.disks[i].draining = true;
        }
    }

    pub(super) fn order_bookmark(&mut self) {
        let i = self.random.within(0..DISKS as u64) as usize;
        self.server.bookmark(self.ids[i], &mut self.conns);
    }

    pub(super) fn lose_filter(&mut self) {
        if self.filter.is_some() {
            self.trace.note(|| "the filter's connection is lost".to_owned());
            self.part();
        }
    }

    pub(super) fn kill_agent(&mut self) {
        let Some(agent) = self.agent.take() else { return };
        self.trace.note(|| "agent is killed".to_owned());
        self.discarded = agent.discarded;
        if let Some(conn) = agent.conn.and_then(|id| self.conns.get_mut(&id)) {
            conn.cut(&mut self.random);
        }
        self.agent_gone = self.now;
        self.agents_gone += 1;
        self.agent_stops = None;
        self.to_agent.clear();
        // What the agent had written into the socket still arrives.
        let arrives = self.random.within(0..self.orders.len() as u64 + 1) as usize;
        self.orders.truncate(arrives);
        self.filter_closing = self.filter.is_some();
    }

    pub(super) fn cut(&mut self) {
        self.trace.note(|| "network is cut".to_owned());
        for conn in self.conns.values_mut() {
            conn.cut(&mut self.random);
        }
    }

    pub(super) fn stall(&mut self) {
        let until = self.now + Duration::from_millis(self.random.within(1..4000));
        self.trace.note(|| format!("network stalls until {until:?}"));
        for conn in self.conns.values_mut() {
            if self.random.chance(70) {
                conn.up.stall(until);
            }
            if self.random.chance(70) {
                conn.down.stall(until);
            }
        }
    }

    pub(super) fn kill_server(&mut self, power: bool) {
        if !self.server.is_running() {
            return;
        }
        self.trace.note(|| format!("server is killed, power cut: {power}"));
        self.server_gone = self.now;
        match power {
            true => self.server.power_cut(&mut self.conns, &mut self.random),
            false => self.server.kill(&mut self.conns, &mut self.random),
        }
    }

    pub(super) fn break_volumes(&mut self) {
        let n = self.random.within(1..12);
        let for_good = self.random.chance(40);
        self.trace.note(|| format!("volumes fail at change {n}, for good: {for_good}"));
        self.server.fail_at(n, for_good);
    }

    /// The power fails amid what the next commit does.
    pub(super) fn crash_in_commit(&mut self) {
        if !self.server.is_running() {
            return;
        }
        let n = self.random.within(1..10);
        self.server.fail_at(n, true);
        self.server_step();
        self.kill_server(true);
    }

    pub(super) fn change_contents(&mut self) {
        let i = self.random.within(0..DISKS as u64) as usize;
        if self.vm.as_ref().is_none_or(|vm| !vm.disks[i].ops.is_empty()) {
            return;
        }
        self.trace.note(|| format!("contents of disk {i} change"));
        self.changes[i] += 1;
        let (random, image) = (&mut self.random, &mut self.images[i]);
        let start = random.within(1..(image.len() / SECTOR) as u64) as usize * SECTOR;
        let end = (start + (100 << 10)).min(image.len());
        image[start..end].fill(random.next_u64() as u8);
        let bytes = image[start..end].to_vec();
        self.observe(i, |world| {
            if let Some(attached) = world.vm.as_ref().and_then(|vm| vm.disks[i].attached.as_ref()) {
                attached.capture.contents_changed();
            }
            world.models[i].settle(start, &bytes);
            None
        });
    }

    pub(super) fn toggle(&mut self) {
        let i = self.random.within(0..DISKS as u64) as usize;
        let wanted = self.random.chance(60);
        self.trace.note(|| format!("operator: protection of disk {i}: {wanted}"));
        self.want(i, wanted);
        self.server.wish_now();
    }

    /// The operator's wish is written down.
    pub(super) fn want(&mut self, i: usize, wanted: bool) {
        if wanted && !self.server.wanted.get(&self.ids[i]).copied().unwrap_or_default() {
            self.models[i].switch_on();
        }
        self.server.want(self.ids[i], wanted);
    }
}
