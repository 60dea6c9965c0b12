//! The server's byte stream, cut into messages and checked.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects
    )
)]

use capture_ring::{Overflow, Policy};
use journal_format::wire::{self, MESSAGE_HEADER_BYTES, MessageHeader, MessageType};
use journal_format::{ChunkHash, Epoch, GapReason, ImageTag, Lsn, Stamp};

use crate::compare::{Answer, Wanted};
use crate::error::AgentError;
use crate::session::{ServerMessage, Settings};

/// How a server that speaks TLS answers what is none: an alert record.
const TLS_ALERT: [u8; 2] = [0x15, 0x03];

/// Bytes that came and are not whole messages yet. Holds at most one message and one receive.
#[derive(Debug, Default)]
pub struct Inbox {
    bytes: Vec<u8>,
    used: usize,
}

impl Inbox {
    /// Where received bytes are appended.
    pub fn buffer(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }

    /// Forgets everything: the connection is gone.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.used = 0;
    }

    /// The next whole message, if there is one.
    ///
    /// # Errors
    /// When the stream is no stream of this protocol; the connection must be closed.
    #[expect(clippy::should_implement_trait, reason = "an error ends the stream, an empty answer does not")]
    pub fn next(&mut self) -> Result<Option<ServerMessage>, AgentError> {
        let rest = self.bytes.get(self.used..).unwrap_or_default();
        if rest.starts_with(&TLS_ALERT) {
            return Err(AgentError::Protocol("it speaks TLS: give the agent --tls-ca".to_owned()));
        }
        if rest.len() < MESSAGE_HEADER_BYTES {
            self.compact();
            return Ok(None);
        }
        let (kind, len) = MessageHeader::parse(rest)?;
        if kind == MessageType::Frame {
            return Err(AgentError::Protocol("a server sends no frames".to_owned()));
        }
        let end = MESSAGE_HEADER_BYTES.saturating_add(len);
        let Some(body) = rest.get(MESSAGE_HEADER_BYTES..end) else {
            self.compact();
            return Ok(None);
        };
        let message = decode(kind, body)?;
        self.used = self.used.saturating_add(end);
        Ok(Some(message))
    }

    fn compact(&mut self) {
        if self.used > 0 {
            self.bytes.drain(..self.used.min(self.bytes.len()));
            self.used = 0;
        }
    }
}

fn decode(kind: MessageType, body: &[u8]) -> Result<ServerMessage, AgentError> {
    Ok(match kind {
        MessageType::Welcome => ServerMessage::Welcome(wire::decode(body)?),
        MessageType::DiskOpened => {
            let opened: wire::DiskOpened = wire::decode(body)?;
            ServerMessage::DiskOpened {
                disk: wire::disk_id(&opened.disk)?,
                durable_lsn: lsn(opened.durable_lsn)?,
                durable_stamp: Stamp(opened.durable_stamp),
                epoch: Epoch(opened.epoch),
                closed_image: opened.closed_image.try_into().ok().map(ImageTag),
                begins: wire::gap_reason(opened.begins).unwrap_or(GapReason::UncleanEnd),
                refused: opened.refused,
            }
        }
        MessageType::Ack => {
            let ack: wire::Ack = wire::decode(body)?;
            ServerMessage::Ack(wire::disk_id(&ack.disk)?, lsn(ack.durable_lsn)?)
        }
        MessageType::Refused => {
            let refused: wire::Refused = wire::decode(body)?;
            ServerMessage::Refused(wire::disk_id(&refused.disk)?, refused.message, refused.retry_ms)
        }
        MessageType::SetProtection => {
            let set: wire::SetProtection = wire::decode(body)?;
            let settings = set.enabled.then(|| settings(set.options.unwrap_or_default()));
            ServerMessage::SetProtection(set.request, wire::disk_id(&set.disk)?, settings)
        }
        MessageType::InsertBookmark => {
            let insert: wire::InsertBookmark = wire::decode(body)?;
            ServerMessage::InsertBookmark(insert.request, wire::disk_id(&insert.disk)?, insert.name)
        }
        MessageType::Hashes => {
            let hashes: wire::Hashes = wire::decode(body)?;
            let wanted =
                Wanted { lsn: lsn(hashes.lsn)?, first_chunk: hashes.first_chunk, chunks: hashes.chunks };
            let known: Vec<ChunkHash> = ChunkHash::all_in(&hashes.hashes).collect();
            let known = Some(known).filter(|known| !known.is_empty());
            ServerMessage::Hashes(
                wire::disk_id(&hashes.disk)?,
                Epoch(hashes.epoch),
                Answer { wanted, hashes: known },
            )
        }
        MessageType::Ping => ServerMessage::Ping(wire::decode::<wire::Ping>(body)?.number),
        MessageType::Pong => ServerMessage::Pong(wire::decode::<wire::Ping>(body)?.number),
        other => return Err(AgentError::Protocol(format!("a server sends no {other:?}"))),
    })
}

/// What is not known counts as the default.
fn settings(options: wire::ProtectionOptions) -> Settings {
    let overflow = match options.overflow {
        1 => Overflow::Throttle,
        2 => Overflow::Strict,
        _ => Overflow::Track,
    };
    let policy = Policy {
        overflow,
        throttle_ms: options.throttle_ms,
        sync: options.sync,
        sync_timeout_ms: options.sync_timeout_ms,
    };
    Settings { policy, ring_mib: options.ring_mib }
}

/// An LSN that leaves room for more records than any disk can have.
fn lsn(value: u64) -> Result<Lsn, AgentError> {
    if value < u64::MAX / 2 {
        Ok(Lsn(value))
    } else {
        Err(AgentError::Protocol(format!("LSN {value} is impossible")))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ack(lsn: u64) -> Vec<u8> {
        wire::encode(&wire::Ack { disk: vec![4; 16], durable_lsn: lsn }).unwrap()
    }

    #[test]
    fn messages_come_out_whole_however_the_bytes_arrive() {
        let stream = [ack(1), ack(2), wire::encode(&wire::Ping { number: 9 }).unwrap()].concat();
        for step in 1..stream.len() {
            let mut inbox = Inbox::default();
            let mut seen = Vec::new();
            for piece in stream.chunks(step) {
                inbox.buffer().extend_from_slice(piece);
                while let Some(message) = inbox.next().unwrap() {
                    seen.push(message);
                }
            }
            let disk = journal_format::DiskId([4; 16]);
            let expected =
                [ServerMessage::Ack(disk, Lsn(1)), ServerMessage::Ack(disk, Lsn(2)), ServerMessage::Ping(9)];
            assert_eq!(seen, expected);
            assert!(inbox.bytes.is_empty(), "nothing piles up");
        }
    }

    #[test]
    fn what_a_server_may_not_say_is_refused() {
        let refused = |bytes: Vec<u8>| {
            let mut inbox = Inbox::default();
            inbox.buffer().extend_from_slice(&bytes);
            inbox.next().is_err()
        };
        assert!(refused(ack(u64::MAX)));
        assert!(refused(wire::encode(&wire::Ack { disk: vec![4; 15], durable_lsn: 1 }).unwrap()));
        assert!(refused(wire::encode(&wire::Inventory::default()).unwrap()));
        assert!(refused(b"HTTP/1.1 400 Bad Request\r\n".to_vec()));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), at in 0_usize..40, xor in any::<u8>()) {
            let mut inbox = Inbox::default();
            inbox.buffer().extend_from_slice(&bytes);
            let _ = inbox.next();
            let mut good = ack(7);
            if let Some(byte) = good.get_mut(at) {
                *byte ^= xor;
            }
            let mut inbox = Inbox::default();
            inbox.buffer().extend_from_slice(&good);
            let _ = inbox.next();
        }
    }
}
