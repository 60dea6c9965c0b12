//! The sending side of one agent's connection: a bounded queue and a thread that writes.
//!
//! The committer and REST requests send without ever blocking: a peer that does not read fills its queue and is cut
//! off, instead of holding up the others.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use journal_format::wire::{self, Control};

use crate::data::plane::SessionId;
use crate::data::socket::Socket;
use crate::limits::OUTGOING_MESSAGES;

/// One connected agent, to be sent to and to be closed.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) id: SessionId,
    /// Host name and address, for logs.
    pub(crate) label: String,
    out: SyncSender<Vec<u8>>,
    stream: Arc<Socket>,
    closed: AtomicBool,
}

impl Peer {
    /// The peer, and what its writer thread runs on.
    pub(crate) fn new(id: SessionId, label: String, stream: Arc<Socket>) -> (Arc<Self>, Receiver<Vec<u8>>) {
        let (out, outgoing) = sync_channel(OUTGOING_MESSAGES);
        (Arc::new(Self { id, label, out, stream, closed: AtomicBool::new(false) }), outgoing)
    }

    /// Queues a message. `false` when the connection is closed, or is closed now because the peer does not read.
    pub(crate) fn send<M: Control>(&self, message: &M) -> bool {
        self.send_bytes(wire::encode(message))
    }

    pub(crate) fn pong(&self, ping: &wire::Ping) -> bool {
        self.send_bytes(wire::encode_as(wire::MessageType::Pong, ping))
    }

    /// As [`Peer::send`], of a message that is encoded already.
    pub(crate) fn send_bytes(&self, encoded: Result<Vec<u8>, journal_format::FormatError>) -> bool {
        match encoded.map(|bytes| self.out.try_send(bytes)) {
            Ok(Ok(())) => !self.is_closed(),
            Ok(Err(_)) => {
                self.close("it does not read what it is sent");
                false
            }
            Err(error) => {
                tracing::error!(agent = self.label, %error, "a message of the server's own does not encode");
                false
            }
        }
    }

    /// Closes the connection; reader and writer end soon after. Only the first call logs its reason.
    pub(crate) fn close(&self, reason: &str) {
        // ORDERING: a flag for logging and for `send`'s answer; nothing is published through it.
        if !self.closed.swap(true, Ordering::Relaxed) {
            tracing::info!(agent = self.label, reason, "closing the connection");
        }
        self.stream.cut();
    }

    pub(crate) fn is_closed(&self) -> bool {
        // ORDERING: see `close`.
        self.closed.load(Ordering::Relaxed)
    }
}

/// The writer thread: sends what is queued, and pings when nothing was for a while. Ends with the connection.
pub(crate) fn write_loop(
    peer: &std::sync::Weak<Peer>,
    outgoing: &Receiver<Vec<u8>>,
    stream: &Socket,
    ping_every: Duration,
) {
    let mut ping = 0;
    loop {
        let bytes = match outgoing.recv_timeout(ping_every) {
            Ok(bytes) => bytes,
            Err(RecvTimeoutError::Timeout) => {
                ping += 1;
                match wire::encode(&wire::Ping { number: ping }) {
                    Ok(bytes) => bytes,
                    Err(_) => continue,
                }
            }
            Err(RecvTimeoutError::Disconnected) => return,
        };
        if let Err(error) = { stream }.write_all(&bytes) {
            if let Some(peer) = peer.upgrade() {
                peer.close(&format!("sending failed: {error}"));
            }
            return;
        }
    }
}
