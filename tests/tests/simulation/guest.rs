//! The VM: a guest that writes to two disks, and the real filter engine under it, driven as the glue in QEMU drives it.

use std::cell::{Cell, RefCell};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use capture_ring::control::CaptureFds;
use capture_ring::{HostClock, Ring};
use cdp_filter::engine::{
    Answer, Begin, Capture, InFlight, Kind, Outcome, Request, Resync, Runtime, Step, SyncWait, WaitToken,
    Waiters,
};

use super::memory::{bytes_of, fill};
use super::model::SECTOR;

/// Disks of the VM.
pub(crate) const DISKS: usize = 2;

thread_local! {
    /// Tokens whose parked requests may go on.
    static WOKEN: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
    /// The time of this thread's run, for time-outs.
    static NOW_NS: Cell<u64> = const { Cell::new(0) };
}

/// It is so late now, for requests that wait.
pub(crate) fn set_now(now: Duration) {
    // Never 0, which the engine takes for "never".
    NOW_NS.set(1 + now.as_nanos() as u64);
}

fn now_ns() -> u64 {
    NOW_NS.get()
}

fn wake(token: WaitToken) {
    WOKEN.with_borrow_mut(|woken| woken.push(token.0 as u64));
}

/// The tokens woken since the last call.
pub(crate) fn woken() -> Vec<u64> {
    WOKEN.with_borrow_mut(std::mem::take)
}

/// Where a request of the guest stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Phase {
    /// Waits for an overlapping one, for room, or for the server.
    Parked,
    /// May begin again.
    Woken,
    /// On its way to the disk.
    Issued,
    /// The disk has answered.
    Answered(Outcome),
    /// Done, and to be durable before the guest is told.
    Syncing,
}

/// A request of the guest.
pub(crate) struct Op {
    pub(crate) id: u64,
    pub(crate) request: Request,
    /// What the disk shall hold; zeroes for a zero or a discard.
    pub(crate) data: Vec<u8>,
    pub(crate) phase: Phase,
    pub(crate) in_flight: Box<InFlight>,
    pub(crate) captured: bool,
    /// Sectors that the disk has not done yet.
    pub(crate) left: Vec<usize>,
    /// What sectors held before this request changed them.
    pub(crate) before: Vec<(usize, Vec<u8>)>,
    pub(crate) fails: bool,
    /// With sync mode: what the guest's flush waits for, and the LSN.
    pub(crate) sync: Option<(SyncWait, u64)>,
    pub(crate) began: u64,
    pub(crate) label: &'static str,
}

/// A running capture of a disk, as it is in QEMU.
pub(crate) struct Attached {
    pub(crate) capture: Arc<Capture>,
    pub(crate) waiters: Waiters,
    pub(crate) resync: Option<Resync>,
    pub(crate) answer: Answer,
    pub(crate) resync_at: Duration,
    /// The memory, to look at; QEMU holds its descriptor.
    pub(crate) ring: Arc<Ring>,
    pub(crate) clock: HostClock,
    /// Who waits for the detach to be over: the filter's connection and the request.
    pub(crate) detaching: Option<(u64, u64)>,
}

impl Attached {
    pub(crate) fn new(fds: &CaptureFds) -> Self {
        let bell = fds.bell.try_clone().expect("a descriptor");
        let runtime = Runtime { wake, now_ns };
        let capture = Capture::attach(fds.ring.as_fd(), fds.clock.as_fd(), bell, runtime);
        let capture = capture.expect("the agent's own ring");
        let ring = Ring::open(fds.ring.as_fd()).expect("the agent's own ring");
        let clock = HostClock::open(fds.clock.as_fd()).expect("the agent's own clock");
        let waiters = Waiters::new(&capture);
        let resync = Some(Resync::new(Arc::clone(&capture)));
        Self {
            capture,
            waiters,
            resync,
            answer: Answer::None,
            resync_at: Duration::ZERO,
            ring,
            clock,
            detaching: None,
        }
    }
}

/// One disk as the VM has it.
#[derive(Default)]
pub(crate) struct VmDisk {
    pub(crate) attached: Option<Attached>,
    /// For the next agent: what this one gave, also after the capture has ended.
    pub(crate) held: Option<CaptureFds>,
    pub(crate) ops: Vec<Op>,
    /// QEMU waits for the disk's requests; the guest makes none.
    pub(crate) draining: bool,
}

impl VmDisk {
    /// As in QEMU, nothing else runs beside a resize.
    pub(crate) fn is_resizing(&self) -> bool {
        self.ops.iter().any(|op| op.request.kind == Kind::Resize)
    }
}

/// A running QEMU.
pub(crate) struct Vm {
    pub(crate) pid: u32,
    pub(crate) disks: [VmDisk; DISKS],
    /// The guest does nothing before.
    pub(crate) boots_at: Duration,
}

impl Vm {
    pub(crate) fn new(pid: u32, boots_at: Duration) -> Self {
        Self { pid, disks: [VmDisk::default(), VmDisk::default()], boots_at }
    }
}

impl Op {
    /// The range on a disk of `size` bytes.
    pub(crate) fn range(&self) -> std::ops::Range<usize> {
        let start = self.request.offset as usize;
        start..start + self.data.len()
    }

    /// Asks the engine, and copies the data when it may go. Without a capture it simply goes.
    pub(crate) fn begin(&mut self, attached: Option<&Attached>) {
        if let Some(attached) = attached {
            let begin =
                attached.capture.begin(&self.request, WaitToken(self.id as usize), &mut self.in_flight);
            if begin == Begin::Wait {
                self.phase = Phase::Parked;
                return;
            }
            self.captured = true;
            if !self.in_flight.pieces().is_empty() {
                fill(self.in_flight.pieces(), &self.data);
            }
        }
        self.phase = Phase::Issued;
        self.left = (0..self.data.len().div_ceil(SECTOR)).collect();
    }

    /// The disk does one sector of it.
    pub(crate) fn apply(&mut self, sector: usize, disk: &mut [u8]) {
        let issued = if self.in_flight.pieces().is_empty() {
            None
        } else {
            // From the ring's copy, whatever the guest does to its buffer.
            Some(bytes_of(self.in_flight.pieces()))
        };
        let source = issued.as_deref().unwrap_or(&self.data);
        let at = self.request.offset as usize + sector * SECTOR;
        let from = sector * SECTOR..((sector + 1) * SECTOR).min(source.len());
        let to = at..at + from.len();
        self.before.push((at, disk[to.clone()].to_vec()));
        disk[to].copy_from_slice(&source[from]);
    }
}

/// Answers what a resync asks of the disk.
pub(crate) fn answer(disk: &[u8], step: Step<'_>, fails: bool) -> Result<Answer, Option<Duration>> {
    match step {
        Step::Status { .. } | Step::Read { .. } if fails => Ok(Answer::Failed),
        Step::Status { offset, length } => {
            let Some(range) = disk.get(offset as usize..(offset + length) as usize) else {
                return Ok(Answer::Failed);
            };
            let is_zero = |sector: &[u8]| sector.iter().all(|byte| *byte == 0);
            let mut sectors = range.chunks(SECTOR);
            let zero = sectors.next().is_some_and(is_zero);
            let more = sectors.take_while(|sector| is_zero(sector) == zero).count();
            Ok(Answer::Status { length: (((1 + more) * SECTOR) as u64).min(length), zero })
        }
        Step::Read { offset, length, pieces } => {
            let Some(range) = disk.get(offset as usize..(offset + length) as usize) else {
                return Ok(Answer::Failed);
            };
            fill(pieces, range);
            Ok(Answer::Read { zero: range.iter().all(|byte| *byte == 0) })
        }
        Step::Pause(pause) => Err(Some(pause)),
        Step::Stop => Err(None),
    }
}
