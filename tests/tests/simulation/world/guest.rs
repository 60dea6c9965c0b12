//! What the guest does, and what the disks do with its requests.

use capture_ring::SyncState;
use cdp_filter::engine::{Answer, Begin, InFlight, Kind, Outcome, Request, WaitToken};
use host_agent::session::{Event, FilterId};

use super::{DEVICES, LEDGER, World};
use crate::guest::{Attached, DISKS, Op, Phase, VmDisk, answer, woken};
use crate::model::{Loose, Model, SECTOR, Span};

impl World {
    pub(super) fn guest(&mut self) {
        if self.vm.as_ref().is_none_or(|vm| self.now < vm.boots_at) {
            return;
        }
        let i = self.random.within(0..DISKS as u64) as usize;
        if self.is_busy(i) {
            return;
        }
        if self.random.chance(12) {
            return self.ledger();
        }
        let (random, size) = (&mut self.random, self.images[i].len());
        let sectors = size / SECTOR;
        let longest = if random.chance(10) { 128 } else { 24 };
        let length = 1 + random.within(0..longest) as usize;
        let start = if random.chance(50) {
            LEDGER + random.within(0..40) as usize
        } else {
            random.within(LEDGER as u64..sectors as u64) as usize
        };
        let length = length.min(sectors - start.min(sectors - 1)).max(1);
        let start = start.min(sectors - length);
        let (offset, bytes) = ((start * SECTOR) as u64, length * SECTOR);
        let drawn = random.within(0..100);
        match drawn {
            0..6 => {
                let zero = Request::zero(offset, bytes as u64, drawn < 2, drawn % 2 == 0);
                self.issue(i, zero, vec![0; bytes], "zero");
            }
            6..10 => self.issue(i, Request::discard(offset, bytes as u64), vec![0; bytes], "discard"),
            10..14 => self.flush(i),
            14..16 if self.weights.resizes => self.resize(i),
            _ => {
                let data = if random.chance(30) {
                    vec![random.next_u64() as u8; bytes]
                } else {
                    random.bytes(bytes)
                };
                self.issue(i, Request::write(offset, bytes as u64, drawn > 90), data, "write");
            }
        }
    }

    pub(super) fn is_busy(&self, i: usize) -> bool {
        let busy = |disk: &VmDisk| disk.ops.len() >= 6 || disk.is_resizing() || disk.draining;
        self.vm.as_ref().is_some_and(|vm| busy(&vm.disks[i]))
    }

    /// A number goes to disk 0 and, once it is there, to disk 1: at any instant disk 1 is not ahead.
    pub(super) fn ledger(&mut self) {
        let Some(vm) = &self.vm else { return };
        let running = |disk: usize| vm.disks[disk].ops.iter().any(|op| op.label == "ledger");
        if running(0) || running(1) {
            return;
        }
        let disk = (self.ledger % 2) as usize;
        if vm.disks[disk].is_resizing() || vm.disks[disk].draining {
            return;
        }
        self.ledger += 1;
        let number = self.ledger.div_ceil(2);
        let mut data = vec![0; LEDGER * SECTOR];
        data[..8].copy_from_slice(&number.to_le_bytes());
        self.issue(disk, Request::write(0, data.len() as u64, true), data, "ledger");
    }

    pub(super) fn issue(&mut self, i: usize, request: Request, data: Vec<u8>, label: &'static str) {
        self.moments += 1;
        let fails = label != "ledger" && self.random.chance(self.weights.eio);
        let (id, began) = (self.next_op, self.moments);
        self.next_op += 1;
        self.trace.note(|| format!("guest {i}: {label} #{id} {} +{}", request.offset, request.length));
        let op = Op {
            id,
            request,
            data,
            phase: Phase::Woken,
            in_flight: Box::default(),
            captured: false,
            left: Vec::new(),
            before: Vec::new(),
            fails,
            sync: None,
            began,
            label,
        };
        let vm = self.vm.as_mut().expect("the guest runs");
        vm.disks[i].ops.push(op);
        let at = vm.disks[i].ops.len() - 1;
        self.begin(i, at);
    }

    pub(super) fn begin(&mut self, i: usize, at: usize) {
        self.observe(i, |world| {
            let disk = &mut world.vm.as_mut().expect("the guest runs").disks[i];
            let attached = disk.attached.as_ref();
            disk.ops[at].begin(attached);
            let waits = attached.is_some_and(|attached| attached.ring.waiting() > 0);
            world.checks.waits += u64::from(waits);
            None
        });
    }

    pub(super) fn flush(&mut self, i: usize) {
        self.observe(i, |world| {
            let disk = &mut world.vm.as_mut().expect("the guest runs").disks[i];
            let Some(attached) = &disk.attached else { return None };
            let sync = attached.capture.flush()?;
            let lsn = attached.ring.captured_lsn().0;
            world.next_op += 1;
            let op = Op {
                id: world.next_op - 1,
                request: Request::write(0, 0, false),
                data: Vec::new(),
                phase: Phase::Syncing,
                in_flight: Box::<InFlight>::default(),
                captured: false,
                left: Vec::new(),
                before: Vec::new(),
                fails: false,
                sync: Some((sync, lsn)),
                began: world.moments,
                label: "flush",
            };
            world.trace.note(|| format!("guest {i}: flush #{} at LSN {lsn}", op.id));
            disk.ops.push(op);
            None
        });
    }

    /// A flush, or a write with FUA, may have to wait for the server. If it need not (any more), the guest is told.
    pub(super) fn sync(&mut self, i: usize, at: usize) {
        let disk = &mut self.vm.as_mut().expect("the guest runs").disks[i];
        let op = &mut disk.ops[at];
        let (wait, lsn) = op.sync.as_mut().expect("it syncs");
        if let Some(attached) = &disk.attached {
            if attached.capture.wait_durable(wait, WaitToken(op.id as usize)) == Begin::Wait {
                op.phase = Phase::Parked;
                return;
            }
            if attached.ring.sync_state() == SyncState::InForce {
                let acked = self.server.acked.get(&self.ids[i]).copied().unwrap_or_default();
                assert!(
                    acked.0 >= *lsn,
                    "I5: disk {i}: a flush is complete at LSN {lsn}, acknowledged {acked}"
                );
                self.checks.flushes += 1;
            }
        }
        disk.ops.remove(at);
        self.detached(i);
    }

    pub(super) fn resize(&mut self, i: usize) {
        let vm = self.vm.as_ref().expect("the guest runs");
        // As in QEMU: a resize is alone on its disk.
        if !vm.disks[i].ops.is_empty() {
            return;
        }
        let sectors = self.random.within(300..1400) as usize;
        self.issue(i, Request::resize((sectors * SECTOR) as u64), Vec::new(), "resize");
    }

    /// Does engine calls and notes the LSNs that they gave: what the disk settled at is what they mean.
    pub(super) fn observe(&mut self, i: usize, call: impl FnOnce(&mut Self) -> Option<Span>) {
        let before = self.captured(i);
        let span = call(self);
        let Some((first, was_whole)) = before else { return };
        let Some((last, whole)) = self.captured(i) else { return };
        let attached = self.vm.as_ref().and_then(|vm| vm.disks[i].attached.as_ref()).expect("it is observed");
        let stamp = attached.clock.last().0;
        let what = if span.is_some() { "guest" } else { "other" };
        for lsn in first + 1..=last {
            // Of several records of one call only the last one can end a gap.
            let whole = whole && (lsn == last || was_whole);
            // Each record takes one stamp.
            let stamp = stamp - (last - lsn);
            let span = span.filter(|_| lsn == first + 1);
            self.models[i].point(lsn, stamp, whole, span, what);
            if let Some(span) = span {
                self.checks.in_order(span, stamp);
            }
        }
    }

    pub(super) fn captured(&self, i: usize) -> Option<(u64, bool)> {
        let attached = self.vm.as_ref()?.disks[i].attached.as_ref()?;
        Some((attached.ring.captured_lsn().0, !attached.ring.gap_is_open()))
    }

    pub(super) fn disk(&mut self) {
        self.wake();
        let i = self.random.within(0..DISKS as u64) as usize;
        let Some(vm) = &mut self.vm else { return };
        let disk = &mut vm.disks[i];
        let ready: Vec<usize> =
            (0..disk.ops.len()).filter(|at| !matches!(disk.ops[*at].phase, Phase::Parked)).collect();
        if ready.is_empty() {
            return;
        }
        let at = ready[self.random.within(0..ready.len() as u64) as usize];
        match disk.ops[at].phase {
            Phase::Parked => {}
            Phase::Woken => self.begin(i, at),
            Phase::Issued => self.apply(i, at),
            Phase::Answered(outcome) => self.finish(i, at, outcome),
            Phase::Syncing => self.sync(i, at),
        }
    }

    pub(super) fn wake(&mut self) {
        let Some(vm) = &mut self.vm else { return drop(woken()) };
        for disk in &mut vm.disks {
            disk.draining &= !disk.ops.is_empty();
            let draining = disk.draining;
            if let Some(Attached { capture, waiters, .. }) = &mut disk.attached {
                let _sleep = waiters.step(capture, || draining);
            }
        }
        let tokens = woken();
        for op in vm.disks.iter_mut().flat_map(|disk| &mut disk.ops) {
            if op.phase == Phase::Parked && tokens.contains(&op.id) {
                op.phase = if op.sync.is_some() { Phase::Syncing } else { Phase::Woken };
            }
        }
    }

    pub(super) fn apply(&mut self, i: usize, at: usize) {
        self.changes[i] += 1;
        let (random, image) = (&mut self.random, &mut self.images[i]);
        let op = &mut self.vm.as_mut().expect("the guest runs").disks[i].ops[at];
        if op.request.kind == Kind::Resize {
            let (old, new) = (image.len(), op.request.length as usize);
            image.resize(new, 0);
            if new > old && random.chance(50) {
                // What a device shows behind its old end need not be zeroes.
                let byte = random.next_u64() as u8;
                image[old..].fill(byte);
            }
            op.phase = Phase::Answered(Outcome::Succeeded);
            return;
        }
        let whole = random.chance(40);
        for _ in 0..if whole { op.left.len() } else { random.within(0..op.left.len() as u64 + 1) as usize } {
            let sector = op.left.swap_remove(random.within(0..op.left.len() as u64) as usize);
            op.apply(sector, image);
        }
        if op.fails && random.chance(30) {
            let untouched = op.before.is_empty() && op.label != "write" && random.chance(50);
            op.phase = Phase::Answered(if untouched { Outcome::NotDone } else { Outcome::Failed });
        } else if op.left.is_empty() {
            op.phase = Phase::Answered(if op.fails { Outcome::Failed } else { Outcome::Succeeded });
        }
    }

    pub(super) fn finish(&mut self, i: usize, at: usize, outcome: Outcome) {
        self.moments += 1;
        let ended = self.moments;
        self.observe(i, |world| {
            let disk = &mut world.vm.as_mut().expect("the guest runs").disks[i];
            let mut op = disk.ops.remove(at);
            let image = &world.images[i];
            let model = &mut world.models[i];
            let mut span = None;
            if op.request.kind == Kind::Resize {
                let old = model.size();
                model.resize(image.len());
                model.settle(old, image.get(old..).unwrap_or_default());
            } else if outcome == Outcome::Succeeded {
                // What the guest asked for; where it only goes to the disk, what the disk made of it.
                let range = op.range();
                match op.in_flight.pieces().is_empty() && op.label != "zero" && op.label != "discard" {
                    true => model.settle(range.start, &image[range]),
                    false => model.settle(range.start, &op.data),
                }
                span = Some(Span { began: op.began, ended });
            } else {
                let range = op.range();
                model.settle(range.start, &image[range]);
            }
            let id = op.id;
            model.tighten(id);
            if let Some(attached) = disk.attached.as_ref().filter(|_| op.captured) {
                attached.capture.finish(&mut op.in_flight, outcome);
                if let Some(wait) = op.in_flight.sync_wait() {
                    let sync = Some((wait, attached.ring.captured_lsn().0));
                    let (data, in_flight) = (Vec::new(), Box::<InFlight>::default());
                    disk.ops.push(Op { data, in_flight, captured: false, sync, phase: Phase::Syncing, ..op });
                }
            }
            world.trace.note(|| format!("disk {i}: #{id} {outcome:?}"));
            span
        });
        self.detached(i);
    }

    pub(super) fn resync(&mut self) {
        let i = self.random.within(0..DISKS as u64) as usize;
        let (now, fails) = (self.now, self.random.chance(self.weights.eio));
        let due = |world: &Self| {
            let disk = &world.vm.as_ref()?.disks[i];
            disk.attached.as_ref().filter(|a| a.resync.is_some() && now >= a.resync_at).map(|_| ())
        };
        if due(self).is_none() {
            return self.detached(i);
        }
        let whole = self.captured(i).is_some_and(|(_, whole)| whole);
        self.observe(i, |world| {
            let vm = world.vm.as_mut().expect("it is due");
            let disk = &mut vm.disks[i];
            let attached = disk.attached.as_mut().expect("it is due");
            let mut resync = attached.resync.take().expect("it is due");
            let given = std::mem::replace(&mut attached.answer, Answer::None);
            let next = answer(&world.images[i], resync.step(given, now), fails);
            match next {
                Ok(next) => (attached.answer, attached.resync) = (next, Some(resync)),
                Err(Some(pause)) => {
                    attached.resync_at = now + pause;
                    attached.resync = Some(resync);
                }
                Err(None) => {}
            }
            if !whole && !attached.ring.gap_is_open() {
                let (contents, loose) = settled(&world.images[i], &world.models[i], &disk.ops);
                world.models[i].settle_all(contents, loose);
                world.trace.note(|| format!("disk {i}: the gap has ended"));
            }
            None
        });
        self.detached(i);
    }

    /// Answers a detach that is over.
    pub(super) fn detached(&mut self, i: usize) {
        let Some(vm) = &mut self.vm else { return };
        let disk = &mut vm.disks[i];
        let over = disk.attached.as_ref().is_some_and(|a| a.detaching.is_some() && a.capture.is_idle());
        if !over {
            return;
        }
        let attached = disk.attached.take().expect("it is over");
        let (filter, request) = attached.detaching.expect("it is over");
        for op in &mut disk.ops {
            assert!(!op.captured, "a capture is idle when no request is in it");
        }
        self.trace.note(|| format!("filter: {} is detached", DEVICES[i]));
        if self.filter == Some(FilterId(filter)) {
            self.tell(Event::FilterResult(FilterId(filter), request, String::new()));
        }
    }
}

/// What the disk holds without the requests in flight, and what these may have written.
fn settled(image: &[u8], model: &Model, ops: &[Op]) -> (Vec<u8>, Vec<Loose>) {
    let (mut contents, mut loose) = (image.to_vec(), Vec::new());
    // A resize in flight may have been done by the disk.
    contents.truncate(model.size());
    contents.extend_from_slice(model.tail(contents.len()));
    for op in ops.iter().filter(|op| op.captured) {
        for (at, before) in op.before.iter().rev() {
            contents[*at..*at + before.len()].copy_from_slice(before);
        }
        if !op.data.is_empty() {
            let offset = op.request.offset as usize;
            loose.push(Loose { request: op.id, offset, bytes: op.data.as_slice().into() });
        }
    }
    (contents, loose)
}
