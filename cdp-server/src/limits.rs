//! Every limit of the server, and the relations between them.

use std::time::Duration;

use journal_format::limits::MAX_FRAME_BYTES;

/// Most agents connected at once. One host has one agent, and each takes one file descriptor and two threads.
pub const MAX_AGENTS: usize = 512;

/// Most connections to the agents' port that have not said who they are. One more, and the oldest of them is cut off,
/// so that any number of silent ones keeps no agent out.
pub const MAX_STRANGERS: usize = 128;

/// Most bytes of a Unix socket's path: `sun_path` of unix(7), without the byte that ends it.
pub const MAX_SOCKET_PATH: usize = 107;

/// Bytes of frames that may wait for the committer, over all agents. Readers stop reading when it is full, so TCP
/// holds the agents back.
pub const INGEST_QUEUE_BYTES: usize = 64 << 20;

/// Bytes of buffers that are kept for the frames to come, over all agents: some of those of a batch.
pub const SPARE_BYTES: usize = 16 << 20;

/// Smaller buffers are not kept: the allocator has them at hand.
pub const MIN_SPARE_BYTES: usize = 64 << 10;

/// The committer makes a batch durable once it holds this many bytes, or sooner when nothing more waits.
pub const BATCH_BYTES: usize = 16 << 20;

/// Where many disks take part a batch goes on until it holds this much for each: making a disk durable costs as much of the
/// processor's time as appending some hundred KiB, however little it has. Nobody waits for that: a batch ends when nothing
/// more is there.
pub const DISK_BATCH_BYTES: usize = 1 << 20;

/// No batch goes on beyond this many bytes: it bounds how long the first of it waits.
pub const MAX_BATCH_BYTES: usize = 64 << 20;

/// A batch with [`DISK_BATCH_BYTES`] for each disk that has less than [`BATCH_BYTES`] waits this long for more, again and again: so much
/// means that more is on its way. Otherwise reader and committer take turns on a core with a frame or two, and every commit's wait for
/// the disk is paid for as little. It is what a frame takes from the socket to the queue, with some room.
pub const LINGER: Duration = Duration::from_micros(500);

/// How old a batch becomes by waiting, at most: some ten times what making it durable takes.
pub const LINGER_MOST: Duration = Duration::from_millis(10);

/// Messages that may wait to be sent to one agent. A peer that lets them pile up is not reading and is cut off.
pub const OUTGOING_MESSAGES: usize = 4096;

/// Threads that hash the journals' contents for agents that compare.
pub const HASH_THREADS: usize = 2;

/// Requests for hashes that one connection may have under way; more are answered with "not now".
pub const MAX_HASH_REQUESTS: usize = 64;

/// Requests for hashes that may wait, over all agents; more are answered with "not now".
pub const HASH_QUEUE: usize = 1024;

/// Bytes of a disk read at once to be hashed.
pub const HASH_READ_BYTES: u64 = 4 << 20;

/// Disks that one host may report; an inventory with more is cut there, with a warning.
pub const MAX_HOST_DISKS: usize = 8192;

/// VMs of one host that may claim the same disk; more are left out of the report, with a warning.
pub const MAX_CLAIMS: usize = 16;

/// VMs and disks together in one inventory; one with more is refused before anything is kept of it.
pub const MAX_INVENTORY_ITEMS: usize = 4 * MAX_HOST_DISKS;

/// Longest name (VM, device, node, driver, host, version) that is kept, in bytes; longer ones are cut.
pub const MAX_NAME_BYTES: usize = 256;

/// Longest explanation that is kept, in bytes; longer ones are cut.
pub const MAX_REASON_BYTES: usize = 1024;

/// How long the server waits for its peers. An input of the server, so that its tests of slow peers take seconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Patience {
    /// How long a connection of an agent may take to say who it is.
    pub hello: Duration,
    /// A connection of an agent on which no byte arrives for this long is dead, and an agent that was not heard for this
    /// long loses its disks to another host that has them too.
    pub idle: Duration,
    /// How long one message of an agent may take to arrive, from its first byte to its last.
    pub message: Duration,
    /// How long an agent may take to accept bytes.
    pub write: Duration,
    /// How long the head of a REST request may take to arrive; also how long a connection waits for the next request.
    pub http_head: Duration,
    /// How long the body of a REST request may take to arrive.
    pub http_body: Duration,
    /// A REST connection on which no byte goes either way for this long is closed. Longer than any request takes to be
    /// answered.
    pub http_silence: Duration,
}

impl Patience {
    /// What a server has unless told otherwise.
    pub const DEFAULT: Self = Self {
        hello: Duration::from_secs(10),
        idle: Duration::from_secs(45),
        message: Duration::from_secs(60),
        write: Duration::from_secs(30),
        http_head: Duration::from_secs(60),
        http_body: Duration::from_secs(30),
        http_silence: Duration::from_secs(120),
    };
}

/// What [`Patience::idle`] may be set to, in seconds.
pub const AGENT_TIMEOUT_S: core::ops::RangeInclusive<u64> = 5..=3600;

/// An agent's connection on which the server had nothing to say for this long gets a ping, or sooner, so that there are
/// [`PINGS`] within [`Patience::idle`].
pub const PING_EVERY: Duration = Duration::from_secs(10);

/// Pings that an agent may miss before it is taken for dead.
pub const PINGS: u32 = 4;

/// What an agent is told to wait before it opens a refused disk again.
pub const RETRY_AFTER: Duration = Duration::from_secs(2);

/// Epochs that may have been handed out after the newest one in a journal whose catalog was lost. An epoch is one switching
/// on of protection, and its first record makes it known to the journal within a second or so.
pub const LOST_EPOCHS: u64 = 1024;

/// How long a REST request waits for an agent to carry out a command.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a bookmark waits to become durable after the agent has set it.
pub const BOOKMARK_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a question about a time that is newer than the newest record waits to learn whether more is to come.
pub const COVER_TIMEOUT: Duration = Duration::from_secs(2);

/// How far an agent's clock may be ahead of the server's before times count as the future, in nanoseconds.
pub const CLOCK_SKEW_NS: u64 = 1_000_000_000;

/// A status older than this says nothing about the present. Agents report about once a second.
pub const STATUS_FRESH: Duration = Duration::from_secs(10);

/// How often wanted and real protection are compared, beside every inventory.
pub const RECONCILE_EVERY: Duration = Duration::from_secs(2);

/// How often frames that were read once and not again are forgotten: memory of a restore is given back within twice this.
pub const FORGET_EVERY: Duration = Duration::from_secs(30);

/// How long a protection command that failed or was not answered rests before it is sent again.
pub const RECONCILE_RETRY: Duration = Duration::from_secs(20);

/// How long it rests when it failed because another host has the disk.
pub const HELD_RETRY: Duration = Duration::from_secs(5);

/// VMs that are shown for one disk beside the one that has it.
pub const MAX_CONFLICTS: usize = 16;

/// Largest body of a REST request, in bytes.
pub const MAX_REST_BODY_BYTES: usize = 64 << 10;

/// Of a body that is too large, bytes that are read and thrown away before the refusal: a client that still writes when
/// the connection ends sees a broken pipe and not the answer.
pub const MAX_DISCARD_BYTES: usize = 64 << 20;

/// Most REST connections at once. One more, and the one that has been quiet longest is cut off, unless a request of it
/// is being worked on. Bounds descriptors, so that REST cannot starve the data plane.
pub const MAX_HTTP_CONNECTIONS: usize = 256;

/// REST requests that may read the store at once.
pub const MAX_READERS: usize = 16;

/// Bytes of disk contents that may be on their way to REST clients at once; more requests wait for those to be taken.
pub const MAX_ANSWER_BYTES: u32 = 256 << 20;

/// How long a request waits for its place in [`MAX_ANSWER_BYTES`].
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);

/// How long a clean stop waits for open REST requests.
pub const STOP_TIMEOUT: Duration = Duration::from_secs(5);

const _: () = assert!(MAX_FRAME_BYTES < INGEST_QUEUE_BYTES);
const _: () = assert!(BATCH_BYTES <= INGEST_QUEUE_BYTES);
const _: () = assert!(DISK_BATCH_BYTES < BATCH_BYTES);
const _: () = assert!(PING_EVERY.as_secs() * (PINGS as u64) < Patience::DEFAULT.idle.as_secs());
const _: () = assert!(MAX_READERS as u64 * cdp_api::limits::MAX_DATA_BYTES <= MAX_ANSWER_BYTES as u64);
const _: () = assert!((MAX_AGENTS + MAX_STRANGERS + MAX_HTTP_CONNECTIONS) as u64 * 2 < daemon::WANTED_FILES);
const _: () =
    assert!(cdp_api::limits::MAX_BOOKMARK_BYTES == journal_format::limits::MAX_BOOKMARK_BYTES as usize);
const _: () = assert!(
    COMMAND_TIMEOUT.as_secs() + BOOKMARK_TIMEOUT.as_secs() < Patience::DEFAULT.http_silence.as_secs()
);
const _: () = assert!(COMMAND_TIMEOUT.as_secs() + BOOKMARK_TIMEOUT.as_secs() < 90, "the client waits 90 s");
