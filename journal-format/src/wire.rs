//! Messages between host-agent and cdp-server over one byte stream. Layout: `docs/formats/wire.md`.
//!
//! Every message is a 16-byte [`MessageHeader`] and a body. The body of [`MessageType::Frame`] is an encoded frame
//! (`docs/formats/frame.md`); every other body is a protobuf message of this module. Unknown protobuf fields are
//! ignored and absent ones have their default, so either side may be the newer one.
//!
//! The conversation: the agent connects and says [`Hello`]; the server answers [`Welcome`]. The agent sends
//! [`Inventory`] whenever the set of disks changes, [`DiskStatus`] about once a second for each protected disk. To
//! protect a disk the server sends [`SetProtection`]; the agent sends [`OpenDisk`], learns from [`DiskOpened`] where
//! the server's journal ends and which epoch comes next, captures, and ships frames in LSN order; the server sends
//! [`Ack`] when they are durable. After a reconnect the agent sends [`OpenDisk`] for each disk it is capturing, with
//! `resume_epoch` set, and resends from `durable_lsn + 1`. Each server request carries a number that the agent's
//! [`CommandResult`] repeats. While a disk is being synced the agent asks with [`HashRequest`] what the server has
//! already; [`Hashes`] come in any order, beside everything else. When a disk's capture has ended and everything of it
//! is durable, the agent sends [`CloseDisk`].

use prost::Message;
use prost::encoding::{self, DecodeContext, WireType};
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::{FormatError, FormatErrorKind};
use crate::layout::{header_crc, layout};
use crate::limits::MAX_FRAME_BYTES;
use crate::record::GapReason;
use crate::units::DiskId;

/// Encoded size of a message header, in bytes.
pub const MESSAGE_HEADER_BYTES: usize = 16;
/// First four bytes of every message.
pub const MESSAGE_MAGIC: [u8; 4] = *b"CDPW";
/// The protocol's version, said in [`Hello`] and [`Welcome`]; a different one is refused with a message.
pub const PROTOCOL_VERSION: u32 = 1;
/// Largest body of an [`Inventory`], in bytes: some ten thousand disks.
pub const MAX_INVENTORY_BYTES: usize = 4 << 20;
/// Largest body of any other message that is not a frame, in bytes. So a peer that has not yet said who it is cannot
/// make the other side hold more than this.
pub const MAX_CONTROL_BYTES: usize = 64 << 10;

/// Most chunks in one [`HashRequest`]: 16 MiB of disk to be read for it.
pub const MAX_HASH_CHUNKS: u32 = 256;

/// What a message's body is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u16)]
pub enum MessageType {
    /// [`Hello`], agent to server, first.
    Hello = 1,
    /// [`Welcome`], server to agent, the answer.
    Welcome = 2,
    /// [`Inventory`], agent to server.
    Inventory = 3,
    /// [`OpenDisk`], agent to server.
    OpenDisk = 4,
    /// [`DiskOpened`], server to agent, the answer.
    DiskOpened = 5,
    /// An encoded frame, agent to server.
    Frame = 6,
    /// [`Ack`], server to agent.
    Ack = 7,
    /// [`Refused`], server to agent.
    Refused = 8,
    /// [`SetProtection`], server to agent.
    SetProtection = 9,
    /// [`InsertBookmark`], server to agent.
    InsertBookmark = 10,
    /// [`CommandResult`], agent to server.
    CommandResult = 11,
    /// [`DiskStatus`], agent to server.
    DiskStatus = 12,
    /// [`Ping`], either way; answered with [`MessageType::Pong`].
    Ping = 13,
    /// [`Ping`], the answer, with the same number.
    Pong = 14,
    /// [`HashRequest`], agent to server.
    HashRequest = 15,
    /// [`Hashes`], server to agent, the answer.
    Hashes = 16,
    /// [`CloseDisk`], agent to server.
    CloseDisk = 17,
}

impl MessageType {
    /// The type with that number, if there is one.
    #[must_use]
    pub const fn from_u16(value: u16) -> Option<Self> {
        Some(match value {
            1 => Self::Hello,
            2 => Self::Welcome,
            3 => Self::Inventory,
            4 => Self::OpenDisk,
            5 => Self::DiskOpened,
            6 => Self::Frame,
            7 => Self::Ack,
            8 => Self::Refused,
            9 => Self::SetProtection,
            10 => Self::InsertBookmark,
            11 => Self::CommandResult,
            12 => Self::DiskStatus,
            13 => Self::Ping,
            14 => Self::Pong,
            15 => Self::HashRequest,
            16 => Self::Hashes,
            17 => Self::CloseDisk,
            _ => return None,
        })
    }

    /// Largest body of this type, in bytes.
    #[must_use]
    pub const fn max_body_bytes(self) -> usize {
        match self {
            Self::Frame => MAX_FRAME_BYTES,
            Self::Inventory => MAX_INVENTORY_BYTES,
            _ => MAX_CONTROL_BYTES,
        }
    }
}

/// The 16 bytes before every body.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct MessageHeader {
    magic: [u8; 4],
    kind: U16,
    reserved: U16,
    body_bytes: U32,
    header_crc: U32,
}

layout!(MessageHeader { magic, kind, reserved, body_bytes, header_crc });
const _: () = assert!(size_of::<MessageHeader>() == MESSAGE_HEADER_BYTES);

impl MessageHeader {
    /// The header for a body of that type and length.
    ///
    /// # Errors
    /// `TooLarge` when the body is over the type's limit.
    pub fn new(kind: MessageType, body_bytes: usize) -> Result<Self, FormatError> {
        let len = u32::try_from(body_bytes).ok().filter(|_| body_bytes <= kind.max_body_bytes());
        let len = len.ok_or(FormatError::new(FormatErrorKind::TooLarge, "message", "body over the limit"))?;
        let mut header = Self {
            magic: MESSAGE_MAGIC,
            kind: U16::new(kind as u16),
            reserved: U16::new(0),
            body_bytes: U32::new(len),
            header_crc: U32::new(0),
        };
        header.header_crc = U32::new(header_crc(header.as_bytes()));
        Ok(header)
    }

    /// Reads and checks a header; returns the type and the body's length, which is within the type's limit.
    ///
    /// # Errors
    /// What is wrong with it; after any error the stream cannot be trusted and must be closed.
    pub fn parse(bytes: &[u8]) -> Result<(MessageType, usize), FormatError> {
        let err = |kind, detail| FormatError::new(kind, "message header", detail);
        let (header, _) =
            Self::read_from_prefix(bytes).map_err(|_| FormatError::truncated("message header"))?;
        if header.magic != MESSAGE_MAGIC {
            return Err(err(FormatErrorKind::Magic, "the peer does not speak this protocol"));
        }
        if header.header_crc.get() != header_crc(header.as_bytes()) {
            return Err(err(FormatErrorKind::Checksum, "the header is corrupt"));
        }
        let kind = MessageType::from_u16(header.kind.get()).filter(|_| header.reserved.get() == 0);
        let kind =
            kind.ok_or(err(FormatErrorKind::Version, "unknown message type; upgrade the older side"))?;
        let len = header.body_bytes.get() as usize;
        if len > kind.max_body_bytes() {
            return Err(err(FormatErrorKind::TooLarge, "body over the limit"));
        }
        Ok((kind, len))
    }
}

/// A protobuf message of this protocol.
pub trait Control: Message + Default {
    /// Its type in the message header. ([`Ping`] says `Ping`; a pong is made with [`encode_as`].)
    const KIND: MessageType;
}

/// Encodes header and body.
///
/// # Errors
/// `TooLarge` when the body is over its limit.
pub fn encode<M: Control>(message: &M) -> Result<Vec<u8>, FormatError> {
    encode_as(M::KIND, message)
}

/// Encodes header and body under another type than the message's own (for [`MessageType::Pong`]).
///
/// # Errors
/// `TooLarge` when the body is over its limit.
pub fn encode_as<M: Control>(kind: MessageType, message: &M) -> Result<Vec<u8>, FormatError> {
    let header = MessageHeader::new(kind, message.encoded_len())?;
    let mut out = header.as_bytes().to_vec();
    out.append(&mut message.encode_to_vec());
    Ok(out)
}

/// Decodes a body.
///
/// # Errors
/// `Invalid` when the bytes are no such message.
pub fn decode<M: Control>(body: &[u8]) -> Result<M, FormatError> {
    M::decode(body).map_err(|_| FormatError::invalid("message", "the body is no such protobuf message"))
}

/// Decodes an inventory of at most `most` VMs and disks together. An empty item takes two bytes here and a hundred times
/// that in memory, so they are counted before anything is allocated for them.
///
/// # Errors
/// `TooLarge` when there are more; `Invalid` when the bytes are no inventory.
pub fn decode_inventory(body: &[u8], most: usize) -> Result<Inventory, FormatError> {
    const VMS: u32 = 1;
    const DISKS: u32 = 5;
    let mut items = 0_usize;
    each_message(body, VMS, &mut |vm| {
        items = items.saturating_add(1);
        each_message(vm, DISKS, &mut |_| {
            items = items.saturating_add(1);
            Ok(())
        })
    })?;
    if items > most {
        return Err(FormatError::new(
            FormatErrorKind::TooLarge,
            "inventory",
            "more VMs and disks than a host has",
        ));
    }
    decode(body)
}

/// Calls `each` with the bytes of every field of that number that holds a message.
fn each_message(
    mut message: &[u8],
    field: u32,
    each: &mut dyn FnMut(&[u8]) -> Result<(), FormatError>,
) -> Result<(), FormatError> {
    let bad = || FormatError::invalid("inventory", "the body is no such protobuf message");
    while !message.is_empty() {
        let (tag, kind) = encoding::decode_key(&mut message).map_err(|_| bad())?;
        if (tag, kind) != (field, WireType::LengthDelimited) {
            encoding::skip_field(kind, tag, &mut message, DecodeContext::default()).map_err(|_| bad())?;
            continue;
        }
        let length =
            encoding::decode_varint(&mut message).ok().and_then(|length| usize::try_from(length).ok());
        let (inside, rest) = length.and_then(|length| message.split_at_checked(length)).ok_or_else(bad)?;
        each(inside)?;
        message = rest;
    }
    Ok(())
}

/// The disk id of a message's 16-byte field.
///
/// # Errors
/// `Invalid` for any other length.
pub fn disk_id(field: &[u8]) -> Result<DiskId, FormatError> {
    field
        .try_into()
        .map(DiskId)
        .map_err(|_| FormatError::invalid("message", "a disk id is not 16 bytes long"))
}

/// The reason that a message's field is the number of; `None` for 0, and for one that this program does not know.
#[must_use]
pub fn gap_reason(field: u32) -> Option<GapReason> {
    u8::try_from(field).ok().and_then(GapReason::from_u8)
}

macro_rules! control {
    ($($name:ident),* $(,)?) => {
        $(impl Control for $name { const KIND: MessageType = MessageType::$name; })*
    };
}
control!(
    Hello,
    Welcome,
    Inventory,
    OpenDisk,
    DiskOpened,
    Ack,
    Refused,
    SetProtection,
    InsertBookmark,
    CommandResult,
    DiskStatus,
    Ping,
    HashRequest,
    Hashes,
    CloseDisk,
);

/// The agent introduces itself.
#[derive(Clone, PartialEq, Message)]
pub struct Hello {
    /// [`PROTOCOL_VERSION`].
    #[prost(uint32, tag = "1")]
    pub protocol: u32,
    /// 16 bytes, stable for the host (its machine id).
    #[prost(bytes = "vec", tag = "2")]
    pub host_id: Vec<u8>,
    /// Host name, for people.
    #[prost(string, tag = "3")]
    pub host_name: String,
    /// The agent's version, for people.
    #[prost(string, tag = "4")]
    pub agent_version: String,
    /// The shared token, when the server asks for one; else empty.
    #[prost(string, tag = "5")]
    pub token: String,
}

/// The server's answer.
#[derive(Clone, PartialEq, Message)]
pub struct Welcome {
    /// [`PROTOCOL_VERSION`].
    #[prost(uint32, tag = "1")]
    pub protocol: u32,
    /// Not empty when the server refuses the agent: why and what to do. The server then closes the connection.
    #[prost(string, tag = "2")]
    pub refused: String,
    /// The server's version, for people.
    #[prost(string, tag = "3")]
    pub server_version: String,
}

/// Every VM on the host that has the filter loaded, with its disks, protected or not. Replaces the host's last one.
#[derive(Clone, PartialEq, Message)]
pub struct Inventory {
    /// The VMs.
    #[prost(message, repeated, tag = "1")]
    pub vms: Vec<Vm>,
}

/// One QEMU process.
#[derive(Clone, PartialEq, Message)]
pub struct Vm {
    /// 16 bytes, or empty where QEMU was given none.
    #[prost(bytes = "vec", tag = "1")]
    pub uuid: Vec<u8>,
    /// Name (`-name`, or the program's name and process number).
    #[prost(string, tag = "2")]
    pub name: String,
    /// Process id on the host.
    #[prost(uint32, tag = "3")]
    pub pid: u32,
    /// Version text of the running QEMU.
    #[prost(string, tag = "4")]
    pub qemu_version: String,
    /// Its disks.
    #[prost(message, repeated, tag = "5")]
    pub disks: Vec<Disk>,
    /// Not empty when this QEMU cannot be protected: why and what to do.
    #[prost(string, tag = "6")]
    pub refused: String,
}

/// One disk of a VM.
#[derive(Clone, PartialEq, Message)]
pub struct Disk {
    /// 16 bytes: the disk's id.
    #[prost(bytes = "vec", tag = "1")]
    pub disk: Vec<u8>,
    /// Device id, the second half of `vm/device`.
    #[prost(string, tag = "2")]
    pub device: String,
    /// Name of the node below the device.
    #[prost(string, tag = "3")]
    pub node: String,
    /// Its driver (`qcow2`, `raw`, `file`, …).
    #[prost(string, tag = "4")]
    pub driver: String,
    /// Size in bytes.
    #[prost(uint64, tag = "5")]
    pub disk_bytes: u64,
    /// Whether the guest can write to it.
    #[prost(bool, tag = "6")]
    pub read_only: bool,
    /// Not empty when this disk cannot be protected: why and what to do.
    #[prost(string, tag = "7")]
    pub refused: String,
}

/// The agent is about to capture a disk, or goes on after a reconnect.
#[derive(Clone, PartialEq, Message)]
pub struct OpenDisk {
    /// 16 bytes: the disk's id.
    #[prost(bytes = "vec", tag = "1")]
    pub disk: Vec<u8>,
    /// Size in bytes.
    #[prost(uint64, tag = "2")]
    pub disk_bytes: u64,
    /// The epoch that goes on, or 0 for a new one.
    #[prost(uint64, tag = "3")]
    pub resume_epoch: u64,
}

/// Where the server's journal of a disk ends.
#[derive(Clone, PartialEq, Message)]
pub struct DiskOpened {
    /// 16 bytes: the disk's id.
    #[prost(bytes = "vec", tag = "1")]
    pub disk: Vec<u8>,
    /// Last durable LSN; the next frame starts right after it.
    #[prost(uint64, tag = "2")]
    pub durable_lsn: u64,
    /// Stamp of that record in nanoseconds; the agent's clock must be past it.
    #[prost(uint64, tag = "3")]
    pub durable_stamp: u64,
    /// Epoch to use: the resumed one, or a new one.
    #[prost(uint64, tag = "4")]
    pub epoch: u64,
    /// Not empty when the server cannot take this disk: why and what to do. `epoch` is 0 then when the reason may pass;
    /// when another host has the disk, it is that host's epoch, and no older one ever goes on.
    #[prost(string, tag = "5")]
    pub refused: String,
    /// 16 bytes when the journal ends with a close record: its image tag; else empty.
    #[prost(bytes = "vec", tag = "6")]
    pub closed_image: Vec<u8>,
    /// Why a new epoch begins with a gap: see [`gap_reason`]; 0 for an epoch that goes on. `UncleanEnd` is what the server
    /// says of an epoch of whose end it was told nothing.
    #[prost(uint32, tag = "7")]
    pub begins: u32,
}

/// The agent gives a disk up that it opened on this connection: it sends no more frames of it, and has none that are not
/// durable, unless it threw them away. Another host may open it from now on.
#[derive(Clone, PartialEq, Message)]
pub struct CloseDisk {
    /// 16 bytes: the disk's id.
    #[prost(bytes = "vec", tag = "1")]
    pub disk: Vec<u8>,
    /// How its last epoch ended, which is why the next one begins with a gap: see [`gap_reason`]; 0 when the agent saw no
    /// end of it, because QEMU was gone.
    #[prost(uint32, tag = "2")]
    pub ended: u32,
}

/// Everything of the disk up to this LSN survives a power cut.
#[derive(Clone, PartialEq, Message)]
pub struct Ack {
    /// 16 bytes: the disk's id.
    #[prost(bytes = "vec", tag = "1")]
    pub disk: Vec<u8>,
    /// Last durable LSN.
    #[prost(uint64, tag = "2")]
    pub durable_lsn: u64,
}

/// The server cannot take frames of a disk now. The agent keeps them, and opens the disk again after `retry_ms`.
#[derive(Clone, PartialEq, Message)]
pub struct Refused {
    /// 16 bytes: the disk's id.
    #[prost(bytes = "vec", tag = "1")]
    pub disk: Vec<u8>,
    /// Why and what to do.
    #[prost(string, tag = "2")]
    pub message: String,
    /// How long to wait before trying again, in milliseconds.
    #[prost(uint32, tag = "3")]
    pub retry_ms: u32,
}

/// Switch protection of a disk. Idempotent; `CommandResult` says when it is done (on: capture runs, the initial sync
/// has begun; off: everything captured is durable and QEMU's own callbacks are back).
#[derive(Clone, PartialEq, Message)]
pub struct SetProtection {
    /// Repeated by the result.
    #[prost(uint64, tag = "1")]
    pub request: u64,
    /// 16 bytes: the disk's id.
    #[prost(bytes = "vec", tag = "2")]
    pub disk: Vec<u8>,
    /// On or off.
    #[prost(bool, tag = "3")]
    pub enabled: bool,
    /// How to protect it; absent: all defaults. Changes the policies of a disk that is captured already; the ring's size
    /// counts from the next capture on.
    #[prost(message, optional, tag = "4")]
    pub options: Option<ProtectionOptions>,
}

/// How a disk is protected.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct ProtectionOptions {
    /// When the ring is full: 0 track, 1 throttle, 2 strict.
    #[prost(uint32, tag = "1")]
    pub overflow: u32,
    /// With throttle: longest wait of a request in milliseconds.
    #[prost(uint32, tag = "2")]
    pub throttle_ms: u32,
    /// Size of the ring in MiB; 0: the agent's own default.
    #[prost(uint32, tag = "3")]
    pub ring_mib: u32,
    /// Whether a guest's flush completes only when everything before it is durable.
    #[prost(bool, tag = "4")]
    pub sync: bool,
    /// Longest wait of a flush in milliseconds.
    #[prost(uint32, tag = "5")]
    pub sync_timeout_ms: u32,
}

/// Put a bookmark record into the disk's stream, now.
#[derive(Clone, PartialEq, Message)]
pub struct InsertBookmark {
    /// Repeated by the result.
    #[prost(uint64, tag = "1")]
    pub request: u64,
    /// 16 bytes: the disk's id.
    #[prost(bytes = "vec", tag = "2")]
    pub disk: Vec<u8>,
    /// 1 to 255 bytes of UTF-8.
    #[prost(string, tag = "3")]
    pub name: String,
}

/// What became of a server's request.
#[derive(Clone, PartialEq, Message)]
pub struct CommandResult {
    /// The request's number.
    #[prost(uint64, tag = "1")]
    pub request: u64,
    /// Empty when it was done; else why not and what to do.
    #[prost(string, tag = "2")]
    pub error: String,
    /// For a bookmark: its LSN.
    #[prost(uint64, tag = "3")]
    pub lsn: u64,
    /// For a bookmark: its stamp in nanoseconds.
    #[prost(uint64, tag = "4")]
    pub stamp: u64,
}

/// How a protected disk is doing at the agent.
#[derive(Clone, PartialEq, Message)]
pub struct DiskStatus {
    /// 16 bytes: the disk's id.
    #[prost(bytes = "vec", tag = "1")]
    pub disk: Vec<u8>,
    /// `capturing`, `tracking` or `off`.
    #[prost(string, tag = "2")]
    pub mode: String,
    /// Last LSN that was reserved in the ring.
    #[prost(uint64, tag = "3")]
    pub captured_lsn: u64,
    /// Stamp of the newest record the agent has taken out, in nanoseconds.
    #[prost(uint64, tag = "4")]
    pub captured_stamp: u64,
    /// Last LSN that was sent.
    #[prost(uint64, tag = "5")]
    pub shipped_lsn: u64,
    /// Raw bytes taken out of the ring and not yet acknowledged.
    #[prost(uint64, tag = "6")]
    pub unacked_bytes: u64,
    /// Bytes of the ring's arena in use.
    #[prost(uint64, tag = "7")]
    pub ring_used_bytes: u64,
    /// Bytes of the ring's arena.
    #[prost(uint64, tag = "8")]
    pub ring_bytes: u64,
    /// Bytes of disk still to be synced.
    #[prost(uint64, tag = "9")]
    pub dirty_bytes: u64,
    /// Bytes used in the outbox.
    #[prost(uint64, tag = "10")]
    pub outbox_used_bytes: u64,
    /// The host's clock when this was made, in nanoseconds: all that is older and was captured is ≤ `captured_lsn`.
    #[prost(uint64, tag = "11")]
    pub host_stamp: u64,
    /// The epoch that this is about.
    #[prost(uint64, tag = "12")]
    pub epoch: u64,
    /// Guest requests and flushes that wait: for room in the ring, or for durability.
    #[prost(uint64, tag = "20")]
    pub waiting: u64,
    /// For how long some have waited without a break, in milliseconds.
    #[prost(uint64, tag = "21")]
    pub waiting_ms: u64,
    /// Sync mode: `off`, `in-force`, `suspended` (a gap is open) or `lost` (a flush has waited too long).
    #[prost(string, tag = "22")]
    pub sync: String,
    /// Bytes that the running or last sync has read back from the disk, holes left out.
    #[prost(uint64, tag = "24")]
    pub sync_read_bytes: u64,
    /// Those of them that were compared with hashes of the server's.
    #[prost(uint64, tag = "25")]
    pub sync_compared_bytes: u64,
    /// Those that the server had already, and that were not shipped.
    #[prost(uint64, tag = "26")]
    pub sync_equal_bytes: u64,
    /// Those that were shipped.
    #[prost(uint64, tag = "27")]
    pub sync_shipped_bytes: u64,
    /// Bytes of files in the disk's spool.
    #[prost(uint64, tag = "30")]
    pub spool_used_bytes: u64,
    /// Most bytes of files that it may have; 0 for no spool.
    #[prost(uint64, tag = "31")]
    pub spool_bytes: u64,
    /// Not empty while the spool cannot be written to: why.
    #[prost(string, tag = "32")]
    pub spool_trouble: String,
}

/// Keeps a quiet connection alive.
#[derive(Clone, PartialEq, Message)]
pub struct Ping {
    /// Repeated by the answer.
    #[prost(uint64, tag = "1")]
    pub number: u64,
}

/// Which contents does the server's journal have there at that LSN?
#[derive(Clone, PartialEq, Message)]
pub struct HashRequest {
    /// 16 bytes: the disk's id.
    #[prost(bytes = "vec", tag = "1")]
    pub disk: Vec<u8>,
    /// The epoch that asks; repeated by the answer.
    #[prost(uint64, tag = "2")]
    pub epoch: u64,
    /// At which point; it need not be a restorable one.
    #[prost(uint64, tag = "3")]
    pub lsn: u64,
    /// First chunk, as a number of 64 KiB chunks from the disk's start.
    #[prost(uint64, tag = "4")]
    pub first_chunk: u64,
    /// How many chunks: 1 to [`MAX_HASH_CHUNKS`].
    #[prost(uint32, tag = "5")]
    pub chunks: u32,
}

/// The answer to a [`HashRequest`].
#[derive(Clone, PartialEq, Message)]
pub struct Hashes {
    /// 16 bytes: the disk's id.
    #[prost(bytes = "vec", tag = "1")]
    pub disk: Vec<u8>,
    /// As in the request.
    #[prost(uint64, tag = "2")]
    pub epoch: u64,
    /// As in the request.
    #[prost(uint64, tag = "3")]
    pub lsn: u64,
    /// As in the request.
    #[prost(uint64, tag = "4")]
    pub first_chunk: u64,
    /// As in the request.
    #[prost(uint32, tag = "5")]
    pub chunks: u32,
    /// A [`crate::ChunkHash`] for each chunk; [`crate::ChunkHash::UNKNOWN`] where the contents cannot be read. Empty when
    /// the server cannot say now: the LSN is not durable yet, or too many requests wait.
    #[prost(bytes = "vec", tag = "6")]
    pub hashes: Vec<u8>,
}
