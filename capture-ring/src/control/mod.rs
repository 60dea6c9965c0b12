//! The control socket between filter and agent: who is there, which disks it has, and switching capture on and off.
//! Layout: `docs/formats/control.md`.
//!
//! The filter connects (a `SOCK_SEQPACKET` Unix socket, so a message arrives whole or not at all) and says
//! [`Message::Hello`] and [`Message::Disks`]; from then on the agent commands and the filter answers each command
//! with [`Message::Result`]. What the filter still holds from an agent before, it says first ([`Message::Held`]).
//! File descriptors travel with [`Message::Attach`], [`Message::Held`] and [`Message::Hold`] only. Both ends check every
//! length; after any error the connection is closed.

mod codec;
mod socket;

pub use codec::{decode, encode};
pub use socket::{Connection, Listener};

use std::os::fd::OwnedFd;

use journal_format::ImageTag;

/// The version both ends must speak.
pub const PROTOCOL_VERSION: u16 = 1;
/// First four bytes of every message.
pub const MESSAGE_MAGIC: [u8; 4] = *b"CDPC";
/// Bytes before a message's body.
pub const MESSAGE_HEADER_BYTES: usize = 16;
/// Where the agent listens, unless the environment says otherwise.
pub const DEFAULT_SOCKET: &str = "/run/qemu-cdp/agent.sock";
/// Environment variable with another path for the socket.
pub const SOCKET_ENV: &str = "CDP_AGENT_SOCKET";

/// Longest texts, in bytes of UTF-8.
pub mod text {
    /// Name of the program that loaded the filter.
    pub const PROGRAM: usize = 64;
    /// Version text of the running QEMU.
    pub const QEMU_VERSION: usize = 128;
    /// Name of the VM.
    pub const VM_NAME: usize = 128;
    /// Device id or path.
    pub const DEVICE: usize = 128;
    /// Node name.
    pub const NODE: usize = 64;
    /// Driver name.
    pub const DRIVER: usize = 32;
    /// Why something cannot be protected.
    pub const REFUSED: usize = 256;
    /// What became of a command; what fault ended capture.
    pub const MESSAGE: usize = 512;
}

/// A filter introduces itself.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Hello {
    /// [`PROTOCOL_VERSION`].
    pub protocol: u16,
    /// Process id as the filter sees it; the agent believes the socket's credentials.
    pub pid: u32,
    /// Name of the program.
    pub program: String,
    /// Version text of the running QEMU.
    pub qemu_version: String,
    /// Name of the VM.
    pub vm_name: String,
    /// UUID of the VM, all zero where it has none.
    pub vm_uuid: [u8; 16],
    /// Not empty when this QEMU cannot be protected: why and what to do.
    pub refused: String,
}

/// One disk of a VM.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct DiskInfo {
    /// Device id, the tail of its path, or the node's name where there is no device.
    pub device: String,
    /// Name of the node below the device.
    pub node: String,
    /// That node's driver.
    pub driver: String,
    /// Size in bytes.
    pub disk_bytes: u64,
    /// Whether the guest cannot write to it.
    pub read_only: bool,
    /// Not empty when this disk cannot be protected: why and what to do.
    pub refused: String,
}

/// A message, either way.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Message {
    /// Filter to agent, first on every connection.
    Hello(Hello),
    /// Filter to agent: its disks, on connecting, whenever they change, and when asked.
    Disks {
        /// Some or all of them.
        disks: Vec<DiskInfo>,
        /// The list goes on in the next message.
        more: bool,
    },
    /// Agent to filter: say which disks there are.
    List,
    /// Agent to filter: capture this device into the ring whose descriptors come along ([`CaptureFds`]); hold them.
    Attach {
        /// Repeated by the result.
        request: u64,
        /// Which device.
        device: String,
        /// How the last epoch left its image, if it was closed: an image that is still so need not be read.
        image: Option<ImageTag>,
    },
    /// Agent to filter: stop capturing. The result comes when no request is in flight any more.
    Detach {
        /// Repeated by the result.
        request: u64,
        /// Which device.
        device: String,
    },
    /// Agent to filter: there is room again, go back to capturing and copy what is dirty.
    Resync {
        /// Repeated by the result.
        request: u64,
        /// Which device.
        device: String,
    },
    /// Filter to agent: what became of a command.
    Result {
        /// The command's number.
        request: u64,
        /// Whether it was done.
        ok: bool,
        /// Why not, and what to do.
        message: String,
    },
    /// Filter to agent: a fault has ended capture of this device; the guest goes on.
    Fault {
        /// Which device.
        device: String,
        /// What happened.
        message: String,
    },
    /// Filter to agent, between hello and disks: these descriptors ([`CaptureFds`]) came with an attach of an agent
    /// before, and nobody has said that they are not needed any more.
    Held {
        /// Which device.
        device: String,
        /// The capture has ended: nothing will be published any more.
        ended: bool,
    },
    /// Agent to filter: hold the outbox that comes along instead of the one that came with the attach.
    Hold {
        /// Repeated by the result.
        request: u64,
        /// Which device.
        device: String,
    },
    /// Agent to filter: everything of an ended capture is in its place, let its descriptors go. No result.
    Forget {
        /// Which device.
        device: String,
    },
}

/// The descriptors that come with [`Message::Attach`] and [`Message::Held`], in this order.
#[derive(Debug)]
pub struct CaptureFds {
    /// The ring ([`crate::Ring::open`]).
    pub ring: OwnedFd,
    /// The host's clock ([`crate::HostClock::open`]).
    pub clock: OwnedFd,
    /// The consumer's eventfd ([`crate::Bell`]).
    pub bell: OwnedFd,
    /// What the agent wants to have back if it dies; the filter neither reads nor maps it.
    pub outbox: OwnedFd,
}

/// Descriptors as received.
#[derive(Debug)]
pub enum Fds {
    /// With most messages.
    None,
    /// With [`Message::Attach`] and [`Message::Held`].
    Capture(CaptureFds),
    /// With [`Message::Hold`].
    Outbox(OwnedFd),
}

/// A message as received.
#[derive(Debug)]
pub struct Received {
    /// What it says.
    pub message: Message,
    /// What came along, always as the message needs it.
    pub fds: Fds,
}
