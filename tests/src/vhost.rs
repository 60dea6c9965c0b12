//! A guest's side of a `vhost-user-blk` export, without a guest: the memory that the guest would have is a memfd shared with
//! the storage daemon, which reads a request's data from there *while the request is in flight*. So a test can do what no
//! NBD client can: change the buffer of a request after it was submitted.
//!
//! The messages are those of QEMU's `docs/interop/vhost-user.rst`; queue and requests those of virtio 1.x (split queue,
//! `VIRTIO_BLK_T_OUT`). The memory is written with `pwrite`, which the other side's mapping sees at once.

use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use crate::wait_for;

/// Requests that may be in flight.
pub const SLOTS: usize = 16;
/// Largest request, in bytes.
pub const BUFFER_BYTES: usize = 64 << 10;

const QUEUE: u16 = 64;
const DESCRIPTORS_PER_REQUEST: u16 = 3;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const HEADERS: u64 = 0x3000;
const STATUSES: u64 = 0x4000;
const BUFFERS: u64 = 0x1_0000;
const MEMORY_BYTES: u64 = BUFFERS + (SLOTS * BUFFER_BYTES) as u64;
/// Where the guest believes its memory to be.
const GUEST_BASE: u64 = 0x10_0000;

const VERSION_1: u64 = 1 << 32;
const PROTOCOL_FEATURES: u64 = 1 << 30;
const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const SET_VRING_ENABLE: u32 = 18;

const BLOCK_OUT: u32 = 1;
const NEXT: u16 = 1;
const DEVICE_WRITES: u16 = 2;

/// The memory, for changing buffers from another thread.
#[derive(Debug)]
pub struct Memory(File);

impl Memory {
    /// Overwrites the start of a slot's buffer.
    ///
    /// # Panics
    /// When it does not fit.
    pub fn fill(&self, slot: usize, bytes: &[u8]) {
        assert!(bytes.len() <= BUFFER_BYTES);
        self.put(BUFFERS + (slot * BUFFER_BYTES) as u64, bytes);
    }

    /// The same memory, for another thread.
    ///
    /// # Panics
    /// When there are no more descriptors.
    #[must_use]
    pub fn shared(&self) -> Self {
        Self(self.0.try_clone().expect("a descriptor"))
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.0.write_all_at(bytes, at).expect("shared memory");
    }

    fn get<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.0.read_exact_at(&mut bytes, at).expect("shared memory");
        bytes
    }
}

/// The guest's driver of one disk.
#[derive(Debug)]
pub struct VhostBlk {
    control: UnixStream,
    memory: Memory,
    kick: EventFd,
    call: EventFd,
    submitted: u16,
    completed: u16,
}

impl VhostBlk {
    /// Connects to the export at `socket` and sets its queue up.
    ///
    /// # Panics
    /// When the other side does not speak vhost-user.
    #[must_use]
    pub fn connect(socket: &Path) -> Self {
        let control = wait_for("the vhost-user socket", || UnixStream::connect(socket).ok());
        control.set_read_timeout(Some(crate::PATIENCE)).expect("timeout");
        let memory = memfd_create(c"guest-memory", MFdFlags::MFD_CLOEXEC).expect("a memfd");
        let memory = File::from(memory);
        memory.set_len(MEMORY_BYTES).expect("size");
        let event = || EventFd::new().expect("an eventfd");
        let mut disk = Self {
            control,
            memory: Memory(memory),
            kick: event(),
            call: event(),
            submitted: 0,
            completed: 0,
        };
        disk.set_up();
        disk
    }

    fn set_up(&mut self) {
        self.tell(GET_FEATURES, &[], None);
        let offered = self.answer();
        assert_ne!(offered & VERSION_1, 0, "virtio 1 is offered");
        self.tell(SET_OWNER, &[], None);
        // Without the protocol features the queue is enabled from the start; with them it has to be said.
        self.tell(SET_FEATURES, &[VERSION_1 | (offered & PROTOCOL_FEATURES)], None);
        let memory = self.memory.0.as_raw_fd();
        self.tell(SET_MEM_TABLE, &[1, GUEST_BASE, MEMORY_BYTES, GUEST_BASE, 0], Some(memory));
        let of_queue = |number: u64| number << 32;
        self.tell(SET_VRING_NUM, &[of_queue(u64::from(QUEUE))], None);
        let [used, available] = [USED, AVAILABLE].map(|at| GUEST_BASE + at);
        self.tell(SET_VRING_ADDR, &[0, GUEST_BASE, used, available, 0], None);
        self.tell(SET_VRING_BASE, &[of_queue(0)], None);
        let (call, kick) = (self.call.as_fd().as_raw_fd(), self.kick.as_fd().as_raw_fd());
        self.tell(SET_VRING_CALL, &[0], Some(call));
        self.tell(SET_VRING_KICK, &[0], Some(kick));
        if offered & PROTOCOL_FEATURES != 0 {
            self.tell(SET_VRING_ENABLE, &[of_queue(1)], None);
        }
    }

    fn tell(&mut self, request: u32, payload: &[u64], fd: Option<RawFd>) {
        let mut message = request.to_le_bytes().to_vec();
        message.extend(1_u32.to_le_bytes());
        message.extend((payload.len() as u32 * 8).to_le_bytes());
        message.extend(payload.iter().flat_map(|word| word.to_le_bytes()));
        let fds: Vec<_> = fd.into_iter().collect();
        let with = [ControlMessage::ScmRights(&fds)];
        let with = if fds.is_empty() { &[][..] } else { &with[..] };
        let sent =
            sendmsg::<()>(self.control.as_raw_fd(), &[IoSlice::new(&message)], with, MsgFlags::empty(), None);
        assert_eq!(sent, Ok(message.len()), "message {request}");
    }

    fn answer(&mut self) -> u64 {
        let mut message = [0; 20];
        self.control.read_exact(&mut message).expect("an answer");
        u64::from_le_bytes(message[12..].try_into().expect("8 bytes"))
    }

    /// The memory that the storage daemon reads from.
    #[must_use]
    pub const fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Submits a write of the first `length` bytes of a slot's buffer, which is not in flight, to `offset` of the disk; both are
    /// multiples of 512. Does not wake the storage daemon: see [`VhostBlk::kick`].
    ///
    /// # Panics
    /// When the slot does not exist.
    pub fn submit(&mut self, slot: usize, offset: u64, length: usize) {
        assert!(slot < SLOTS && length <= BUFFER_BYTES && offset.is_multiple_of(512));
        let first = slot as u16 * DESCRIPTORS_PER_REQUEST;
        let (header, status) = (HEADERS + slot as u64 * 16, STATUSES + slot as u64);
        let mut head = BLOCK_OUT.to_le_bytes().to_vec();
        head.extend([0; 4]);
        head.extend((offset / 512).to_le_bytes());
        self.memory.put(header, &head);
        self.memory.put(status, &[0xff]);
        self.describe(first, header, 16, NEXT);
        self.describe(first + 1, BUFFERS + (slot * BUFFER_BYTES) as u64, length as u32, NEXT);
        self.describe(first + 2, status, 1, DEVICE_WRITES);
        self.memory.put(AVAILABLE + 4 + u64::from(self.submitted % QUEUE) * 2, &first.to_le_bytes());
        self.submitted = self.submitted.wrapping_add(1);
        self.memory.put(AVAILABLE + 2, &self.submitted.to_le_bytes());
    }

    fn describe(&self, number: u16, at: u64, length: u32, flags: u16) {
        let mut descriptor = (GUEST_BASE + at).to_le_bytes().to_vec();
        descriptor.extend(length.to_le_bytes());
        descriptor.extend(flags.to_le_bytes());
        descriptor.extend((number + 1).to_le_bytes());
        self.memory.put(u64::from(number) * 16, &descriptor);
    }

    /// Wakes the storage daemon.
    ///
    /// # Panics
    /// When the eventfd breaks.
    pub fn kick(&self) {
        self.kick.write(1).expect("an eventfd");
    }

    /// Waits until everything submitted has completed.
    ///
    /// # Panics
    /// When a request failed, or nothing completes.
    pub fn wait_all(&mut self) {
        while self.completed != self.submitted {
            let used = u16::from_le_bytes(self.memory.get(USED + 2));
            if used == self.completed {
                let mut fds = [PollFd::new(self.call.as_fd(), PollFlags::POLLIN)];
                let patience = PollTimeout::try_from(Duration::from_secs(30)).expect("a time-out");
                assert_eq!(poll(&mut fds, patience), Ok(1), "nothing completes");
                self.call.read().expect("an eventfd");
                continue;
            }
            let entry = USED + 4 + u64::from(self.completed % QUEUE) * 8;
            let slot = u32::from_le_bytes(self.memory.get(entry)) / u32::from(DESCRIPTORS_PER_REQUEST);
            assert_eq!(self.memory.get(STATUSES + u64::from(slot)), [0], "the request in slot {slot} failed");
            self.completed = self.completed.wrapping_add(1);
        }
    }
}

impl Drop for VhostBlk {
    fn drop(&mut self) {
        let _ = self.control.flush();
    }
}
