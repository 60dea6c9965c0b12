//! One TCP connection: two directions of bytes in order, with delay, stalls, and a cut at any byte.

use std::collections::VecDeque;
use std::time::Duration;

use cdp_tests::random::Random;

/// Bytes that a direction takes before its sender has to wait.
const WINDOW: usize = 256 << 10;

/// One direction.
#[derive(Debug, Default)]
pub(crate) struct Pipe {
    bytes: VecDeque<u8>,
    /// Nothing arrives before.
    stalled_until: Duration,
    /// What was sent before the end still arrives.
    pub(crate) closed: bool,
}

impl Pipe {
    pub(crate) fn room(&self) -> usize {
        if self.closed { 0 } else { WINDOW.saturating_sub(self.bytes.len()) }
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        if !self.closed {
            self.bytes.extend(bytes);
        }
    }

    pub(crate) fn stall(&mut self, until: Duration) {
        self.stalled_until = self.stalled_until.max(until);
    }

    /// The connection breaks: a random part of what is under way still arrives.
    pub(crate) fn cut(&mut self, random: &mut Random) {
        let keep = random.within(0..self.bytes.len() as u64 + 1) as usize;
        self.bytes.truncate(keep);
        self.closed = true;
    }

    /// What arrives now, up to `most` bytes.
    pub(crate) fn receive(&mut self, now: Duration, most: usize) -> Vec<u8> {
        if now < self.stalled_until {
            return Vec::new();
        }
        let count = most.min(self.bytes.len());
        self.bytes.drain(..count).collect()
    }

    /// Whether the receiver has seen the end.
    pub(crate) fn is_over(&self) -> bool {
        self.closed && self.bytes.is_empty()
    }
}

/// A connection, numbered in the order of connecting.
#[derive(Debug, Default)]
pub(crate) struct Conn {
    pub(crate) up: Pipe,
    pub(crate) down: Pipe,
}

impl Conn {
    /// The server's process is gone: what was on its way to it is nobody's.
    pub(crate) fn orphan(&mut self, random: &mut Random) {
        self.cut(random);
        self.up.bytes.clear();
    }

    pub(crate) fn cut(&mut self, random: &mut Random) {
        self.up.cut(random);
        self.down.cut(random);
    }
}
