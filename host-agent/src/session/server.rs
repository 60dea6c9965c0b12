//! The connection to the server: connecting again, greeting, staying alive.

use std::time::Duration;

use journal_format::{DiskId, Epoch, GapReason, ImageTag, Lsn, Stamp, wire};

use super::capture::Opened;
use super::{Action, Event, Session, Settings, ToServer};
use crate::compare::Answer;
use crate::limits::{PING_AFTER, RECONNECT_FIRST, RECONNECT_MOST, SERVER_SILENT};

/// A message from the server, its fields checked.
#[derive(Clone, Debug, PartialEq)]
pub enum ServerMessage {
    /// The answer to the greeting.
    Welcome(wire::Welcome),
    /// Where the journal of a disk ends.
    DiskOpened {
        /// Whose.
        disk: DiskId,
        /// Last durable LSN.
        durable_lsn: Lsn,
        /// Its stamp.
        durable_stamp: Stamp,
        /// Epoch to use.
        epoch: Epoch,
        /// How the last epoch left the image, if the journal ends with its close.
        closed_image: Option<ImageTag>,
        /// Why a new epoch begins with a gap, as far as the server knows.
        begins: GapReason,
        /// Why not, or empty.
        refused: String,
    },
    /// Everything up to this LSN is durable.
    Ack(DiskId, Lsn),
    /// No frames of this disk now; why, and how many milliseconds to wait.
    Refused(DiskId, String, u32),
    /// Switch protection: request, disk; how to protect it, or `None` for off.
    SetProtection(u64, DiskId, Option<Settings>),
    /// Put a bookmark: request, disk, name.
    InsertBookmark(u64, DiskId, String),
    /// What the journal of a disk has, for an epoch.
    Hashes(DiskId, Epoch, Answer),
    /// Answer with a pong.
    Ping(u64),
    /// The answer to a ping.
    Pong(u64),
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    /// No connection; the next try.
    Down { retry_at: Duration },
    /// TCP is connecting.
    Connecting,
    /// Hello was sent.
    Greeting,
    /// Welcome came.
    Up,
}

/// The connection's state.
#[derive(Debug)]
pub(super) struct Server {
    state: State,
    /// Tries since the last welcome.
    failures: u32,
    heard: Duration,
    pinged: Duration,
}

impl Server {
    pub(super) fn new() -> Self {
        let zero = Duration::ZERO;
        Self { state: State::Down { retry_at: zero }, failures: 0, heard: zero, pinged: zero }
    }

    pub(super) fn is_up(&self) -> bool {
        self.state == State::Up
    }

    fn pause(&self) -> Duration {
        RECONNECT_FIRST
            .saturating_mul(1_u32.checked_shl(self.failures).unwrap_or(u32::MAX))
            .min(RECONNECT_MOST)
    }
}

impl Session {
    pub(super) fn server_connected(&mut self, now: Duration) {
        if self.server.state != State::Connecting {
            return;
        }
        self.server.state = State::Greeting;
        self.server.heard = now;
        self.out.push(Action::Send(ToServer::Hello(wire::Hello {
            protocol: wire::PROTOCOL_VERSION,
            host_id: self.identity.host_id.to_vec(),
            host_name: self.identity.host_name.clone(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            token: self.identity.token.clone(),
        })));
    }

    pub(super) fn server_lost(&mut self, now: Duration) {
        let was_up = self.server.is_up();
        self.server.state = State::Down { retry_at: now.saturating_add(self.server.pause()) };
        self.server.failures = self.server.failures.saturating_add(1).min(16);
        if was_up {
            self.close_links();
        }
    }

    pub(super) fn disconnect(&mut self, now: Duration, reason: String) {
        self.out.push(Action::Disconnect(reason));
        self.server_lost(now);
    }

    pub(super) fn server_message(&mut self, now: Duration, message: ServerMessage) {
        self.server.heard = now;
        match (&self.server.state, message) {
            (State::Greeting, ServerMessage::Welcome(welcome)) => self.welcome(now, &welcome),
            (State::Up, message) => self.dispatch(now, message),
            (State::Greeting, other) => self.disconnect(now, format!("expected a welcome, got {other:?}")),
            // Bytes that were on their way when the connection was given up.
            (State::Down { .. } | State::Connecting, _) => {}
        }
    }

    fn welcome(&mut self, now: Duration, welcome: &wire::Welcome) {
        if !welcome.refused.is_empty() || welcome.protocol != wire::PROTOCOL_VERSION {
            let why = if welcome.refused.is_empty() {
                format!("it speaks protocol {}, this agent {}", welcome.protocol, wire::PROTOCOL_VERSION)
            } else {
                welcome.refused.clone()
            };
            self.disconnect(now, format!("the server refuses this agent: {why}"));
            return;
        }
        self.server.state = State::Up;
        self.server.failures = 0;
        self.server.pinged = now;
        self.send_inventory();
        self.reopen_links();
    }

    fn dispatch(&mut self, now: Duration, message: ServerMessage) {
        match message {
            ServerMessage::Welcome(_) => self.disconnect(now, "a second welcome".to_owned()),
            ServerMessage::DiskOpened {
                disk,
                durable_lsn: durable,
                durable_stamp: stamp,
                epoch,
                closed_image,
                begins,
                refused,
            } => {
                let opened = Opened { durable, stamp, epoch, closed_image, begins };
                self.disk_opened(now, disk, opened, &refused);
            }
            ServerMessage::Ack(disk, lsn) => self.acked(now, disk, lsn),
            ServerMessage::Refused(disk, why, retry_ms) => self.refused(now, disk, &why, retry_ms),
            ServerMessage::SetProtection(request, disk, Some(settings)) => {
                self.protect(now, request, disk, settings);
            }
            ServerMessage::SetProtection(request, disk, None) => self.unprotect(now, request, disk),
            ServerMessage::InsertBookmark(request, disk, name) => self.bookmark(now, request, disk, &name),
            ServerMessage::Hashes(disk, epoch, answer) => {
                self.out.push(Action::GiveHashes(disk, epoch, answer));
            }
            ServerMessage::Ping(number) => self.send(ToServer::Pong(wire::Ping { number })),
            ServerMessage::Pong(_) => {}
        }
    }

    pub(super) fn server_tick(&mut self, now: Duration) {
        let silent = now.saturating_sub(self.server.heard);
        match self.server.state {
            State::Down { retry_at } if now >= retry_at && !self.stopping => {
                self.server.state = State::Connecting;
                self.out.push(Action::Connect);
            }
            State::Greeting | State::Up if silent >= SERVER_SILENT => {
                self.disconnect(now, format!("the server has been silent for {} s", silent.as_secs()));
            }
            State::Up if silent >= PING_AFTER && now.saturating_sub(self.server.pinged) >= PING_AFTER => {
                self.server.pinged = now;
                self.send(ToServer::Ping(wire::Ping { number: 0 }));
            }
            _ => {}
        }
    }
}

impl From<ServerMessage> for Event {
    fn from(message: ServerMessage) -> Self {
        Self::Server(message)
    }
}
