//! Every limit of the server, and the relations between them.

use std::time::Duration;

use journal_format::limits::MAX_FRAME_BYTES;

/// Most agents connected at once. One host has one agent, and each takes one file descriptor.
pub const MAX_AGENTS: usize = 512;

/// Bytes of frames that may wait for the committer, over all agents. Readers stop reading when it is full, so TCP
/// holds the agents back.
pub const INGEST_QUEUE_BYTES: usize = 64 << 20;

/// The committer makes a batch durable once it holds this many bytes, or sooner when nothing more waits.
pub const BATCH_BYTES: usize = 16 << 20;

/// Messages that may wait to be sent to one agent. A peer that lets them pile up is not reading and is cut off.
pub const OUTGOING_MESSAGES: usize = 4096;

/// Disks that one host may report; an inventory with more is cut there, with a warning.
pub const MAX_HOST_DISKS: usize = 8192;

/// Longest name (VM, device, node, driver, host, version) that is kept, in bytes; longer ones are cut.
pub const MAX_NAME_BYTES: usize = 256;

/// Longest explanation that is kept, in bytes; longer ones are cut.
pub const MAX_REASON_BYTES: usize = 1024;

/// How long a connection may take to say who it is.
pub const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

/// A connection on which nothing arrives for this long is dead.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(45);

/// How long one message may take to arrive, from its first byte to its last.
pub const MESSAGE_TIMEOUT: Duration = Duration::from_secs(60);

/// A connection on which the server had nothing to say for this long gets a ping.
pub const PING_EVERY: Duration = Duration::from_secs(10);

/// How long the peer may take to accept bytes.
pub const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// What an agent is told to wait before it opens a refused disk again.
pub const RETRY_AFTER: Duration = Duration::from_secs(2);

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

/// How long a protection command that failed or was not answered rests before it is sent again.
pub const RECONCILE_RETRY: Duration = Duration::from_secs(20);

/// Largest body of a REST request, in bytes.
pub const MAX_REST_BODY_BYTES: usize = 64 << 10;

/// Most REST connections at once; more wait to be accepted. Bounds descriptors, so that REST cannot starve the data plane.
pub const MAX_HTTP_CONNECTIONS: usize = 256;

/// A REST connection on which no byte goes either way for this long is closed. Longer than any request takes to be answered.
pub const HTTP_IDLE: Duration = Duration::from_secs(120);

/// REST requests that may read the store at once; each may hold `cdp_api::limits::MAX_DATA_BYTES`.
pub const MAX_READERS: usize = 16;

/// How long a clean stop waits for open REST requests.
pub const STOP_TIMEOUT: Duration = Duration::from_secs(5);

const _: () = assert!(MAX_FRAME_BYTES < INGEST_QUEUE_BYTES);
const _: () = assert!(BATCH_BYTES <= INGEST_QUEUE_BYTES);
const _: () = assert!(PING_EVERY.as_secs() * 3 < IDLE_TIMEOUT.as_secs());
const _: () =
    assert!(cdp_api::limits::MAX_BOOKMARK_BYTES == journal_format::limits::MAX_BOOKMARK_BYTES as usize);
const _: () = assert!(COMMAND_TIMEOUT.as_secs() + BOOKMARK_TIMEOUT.as_secs() < HTTP_IDLE.as_secs());
const _: () = assert!(COMMAND_TIMEOUT.as_secs() + BOOKMARK_TIMEOUT.as_secs() < 90, "the client waits 90 s");
